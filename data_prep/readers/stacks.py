"""Stacks of planes to frames: what volumes and arrays share once their headers are understood.

A stack is read plane by plane in the order in which the file holds it, so that memory stays flat whatever its size,
compressed or not. Slicing along another axis gathers as many slices as fit into 64 MiB in each pass over the file.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

import numpy as np

from data_prep.readers.base import Frame, Options, UnreadableError
from data_prep.readers.clips import as_frames, check_size, chosen

_HELD = 64 << 20  # bytes of a stack in memory at a time
_MAX_UNPACKED = 64 << 30  # bytes of a compressed stack
_MAX_SLICES = 1_000_000
_MAX_RATIO = {"gzip": 1032, "zlib": 1032}  # no deflate stream unpacks to more times its size
_PIECE = 1 << 20

_WINDOW = 0.1, 99.9  # percentiles
_SAMPLED_PLANES = 16
_SAMPLED_VALUES = 1 << 16  # of each

# What compressed data that is damaged, cut off or of an unknown method raises.
_UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Stack:
    """A three-dimensional array in a file.

    Attributes:
      shape: (Z, Y, X), in the order of the axes as `Options.axis` counts them.
      dtype: of the numbers, with their byte order.
      planes: gives the planes of these numbers, ascending, along the axis `slow`: each `[rest]` or `[rest, C]`,
        C = 3 or 4 (RGB, RGBA), the rest in the order of `shape`.
      slow: the axis along which the file can be read plane by plane.
      series: a series of volumes one after the other along the first axis, which can be sliced along no other.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    planes: Callable[[Iterable[int]], Iterator[np.ndarray]]
    slow: int = 0
    series: bool = False


def read(stack: Stack, options: Options) -> Iterator[Frame]:
    """Yields the slices of a stack along `options.axis`, as the array stores them but for `options.flip`.

    uint8 stays as it is. All other numbers are mapped to it by one window for the whole stack, from the 0.1st to the
    99.9th percentile of a sample (up to 2**16 values of each of 16 planes), so that slices stay comparable; NaN and
    infinities become 0. Slices that are then of one value throughout are dropped; the others keep their numbers.

    Raises:
      UnreadableError: too large, mostly NaN, cut off, damaged, or without a slice that shows anything.
    """
    if stack.series and options.axis != 0:
        raise UnreadableError("a series of volumes, which can be sliced along axis 0 only")
    height, width = (length for axis, length in enumerate(stack.shape) if axis != options.axis)
    check_size(width, height)
    if min(width, height) == 1:
        raise UnreadableError(f"slices are lines of {max(width, height)} pixels: another axis?")
    if stack.shape[options.axis] > _MAX_SLICES:
        raise UnreadableError(f"{stack.shape[options.axis]} slices, more than a million")
    empty = True
    for frame in as_frames(_shown(stack, options)):
        yield frame
        empty = False
    if empty:
        raise UnreadableError("all slices are empty: one value throughout")


def check_numbers(dtype: np.dtype) -> None:
    """Refuses what is no plain number, such as objects, texts, truth values and complex numbers.

    Raises:
      UnreadableError: neither integers nor floating-point numbers of up to 64 bits.
    """
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnreadableError("holds no integers or floating-point numbers")


def in_file(
    opened: Callable[[], contextlib.AbstractContextManager[IO[bytes]]],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    *,
    channels: int = 1,
    slow: int = 0,
    columns_first: bool = False,
    series: bool = False,
    packed: bool = False,
) -> Stack:
    """A stack that a file holds without gaps.

    Args:
      opened: opens the file (or what unpacks it) at the first number.
      shape: as in `Stack`, and so are `dtype`, `slow` and `series`.
      dtype: of the numbers, with their byte order.
      channels: of each pixel.
      slow: the axis along which planes follow each other in the file.
      columns_first: whether planes are stored with their axes in reverse, channels included.
      series: whether volumes follow each other along the first axis.
      packed: whether it is compressed; it is then unpacked once if it is small, instead of for each pass.

    Raises:
      UnreadableError: planes are too large; or what is to be held in memory is damaged or cut off.
    """
    check_numbers(dtype)
    height, width = (length for axis, length in enumerate(shape) if axis != slow)
    check_size(width, height)
    plane_shape = (height, width, channels) if channels > 1 else (height, width)
    plane_bytes = math.prod(plane_shape) * dtype.itemsize
    held: list[bytes] = []
    if packed and shape[slow] * plane_bytes <= _HELD:
        held.extend(_read_planes(opened, range(shape[slow]), plane_bytes))

    def planes(numbers: Iterable[int]) -> Iterator[np.ndarray]:
        stored = (held[number] for number in numbers) if held else _read_planes(opened, numbers, plane_bytes)
        for data in stored:
            plane = np.frombuffer(data, dtype)
            yield plane.reshape(plane_shape[::-1]).T if columns_first else plane.reshape(plane_shape)

    return Stack(shape, dtype, planes, slow, series)


@contextlib.contextmanager
def unpacked(path: str | os.PathLike[str], start: int, packing: str, skip: int = 0) -> Iterator[IO[bytes]]:
    """Opens what a file holds from byte `start` on: "raw", or unpacked by "gzip", "zlib" or "bzip2", less `skip` bytes.

    Raises:
      UnreadableError: as the data are used: damaged or cut off.
    """
    with unpacking(), pathlib.Path(path).open("rb") as file:
        file.seek(start)
        stream = _UNPACKERS[packing](file)
        skip_bytes(stream, skip)
        yield stream


@contextlib.contextmanager
def unpacking() -> Iterator[None]:
    """Turns what reading damaged data raises into UnreadableError."""
    try:
        yield
    except _UNPACKING_ERRORS as error:
        raise UnreadableError("damaged or cut off") from error


def skip_bytes(file: IO[bytes], count: int) -> None:
    """Moves forward, in a file that may be unpacked on the way; raises EOFError at its end."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        file.seek(count, os.SEEK_CUR)
        return
    while count > 0:
        read = len(file.read(min(count, _PIECE)))
        if not read:
            raise EOFError
        count -= read


def check_unpacked(size: int, stored: int, packing: str) -> None:
    """Refuses data whose header declares more than the file can hold, before any of it is read.

    Args:
      size: in bytes, as declared.
      stored: bytes that the file has for them.
      packing: as in `unpacked`.

    Raises:
      UnreadableError: cut off, a header that cannot be true, or more than 64 GiB compressed.
    """
    if packing == "raw" and size > stored:
        raise UnreadableError(f"cut off: {max(0, stored)} bytes of the {size} that its header declares")
    if packing != "raw" and size > _MAX_UNPACKED:
        raise UnreadableError(f"compressed, and larger than {_MAX_UNPACKED >> 30} GiB: unpack it first")
    if size > max(0, stored) * _MAX_RATIO.get(packing, size):
        raise UnreadableError("cut off, or its header is damaged: too few bytes for its size")


class _Inflated(io.RawIOBase):
    """A zlib stream as a file."""

    def __init__(self, file: IO[bytes]):
        self._file, self._engine = file, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._engine.eof:
            data = self._engine.unconsumed_tail or self._file.read(_PIECE)
            if not data:
                raise EOFError
            unpacked = self._engine.decompress(data, len(buffer))
            if unpacked:
                buffer[: len(unpacked)] = unpacked
                return len(unpacked)
        return 0


_UNPACKERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "raw": lambda file: file,
    "gzip": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    "zlib": lambda file: io.BufferedReader(_Inflated(file), _PIECE),
    "bzip2": lambda file: bz2.BZ2File(file),
}


def _read_planes(
    opened: Callable[[], contextlib.AbstractContextManager[IO[bytes]]], numbers: Iterable[int], size: int
) -> Iterator[bytes]:
    position = 0
    with opened() as file:
        for number in numbers:
            skip_bytes(file, (number - position) * size)
            data = file.read(size)
            if len(data) < size:
                raise UnreadableError(f"cut off in plane {number}")
            yield data
            position = number + 1
        file.read(1)  # at the end, a compressed file compares its checksum


def _shown(stack: Stack, options: Options) -> Iterator[tuple[int, np.ndarray]]:
    window = None if stack.dtype == np.uint8 else _find_window(stack)
    reverse, keep = slice(None, None, -1), slice(None)
    rows = reverse if options.flip in ("vertical", "both") else keep
    columns = reverse if options.flip in ("horizontal", "both") else keep
    for number, plane in _slices(stack, options):
        pixels = plane[rows, columns] if plane.ndim == 2 else plane[rows, columns, :3]
        pixels = np.array(pixels, order="C") if window is None else _to_uint8(pixels, *window)
        if pixels.min() != pixels.max():
            yield number, pixels


def _slices(stack: Stack, options: Options) -> Iterator[tuple[int, np.ndarray]]:
    axis, slow = options.axis, stack.slow
    numbers = chosen(stack.shape[axis], options)
    if axis == slow:
        yield from zip(numbers, stack.planes(numbers), strict=True)
        return
    other = 3 - axis - slow
    depth = stack.shape[slow]
    together = max(1, _HELD // (depth * stack.shape[other] * stack.dtype.itemsize))
    for start in range(0, len(numbers), together):
        group = list(numbers[start : start + together])
        gathered: np.ndarray = np.empty(0)
        for row, plane in enumerate(stack.planes(range(depth))):
            lines = plane.take(group, 0) if axis < other else plane.take(group, 1).swapaxes(0, 1)
            if row == 0:
                gathered = np.empty((len(group), depth, *lines.shape[1:]), stack.dtype)
            gathered[:, row] = lines
        for number, pixels in zip(group, gathered, strict=True):
            yield number, pixels if slow < other else pixels.swapaxes(0, 1)


def _find_window(stack: Stack) -> tuple[float, float]:
    sample = []
    for plane in stack.planes(chosen(stack.shape[stack.slow], Options(max_frames=_SAMPLED_PLANES))):
        values = plane.ravel()
        sample.append(values[:: max(1, values.size // _SAMPLED_VALUES)].astype(np.float64))
    values = np.concatenate(sample)
    finite = values[np.isfinite(values)]
    if 2 * finite.size < values.size:
        raise UnreadableError("more than half of the values are NaN or infinite")
    low, high = np.percentile(finite, _WINDOW)
    if low == high:  # almost all of one value
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def _to_uint8(plane: np.ndarray, low: float, high: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        scale = 255 / (high - low) if high > low else 0.0
        values = (plane.astype(np.result_type(plane.dtype, np.float32)) - low) * scale
        values = np.rint(np.clip(values, 0, 255))
    values[~np.isfinite(plane)] = 0
    return values.astype(np.uint8)
