"""Reads stacks of planes as frames: the part common to volumes and arrays once their headers are parsed.

A stack is read plane by plane in file order, so that memory use is constant whatever its size, compressed or not, and a
truncated file yields its intact frames before the error. Slicing along another axis collects as many slices as fit into
64 MiB in each pass over the file.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, cast

import numpy as np

from data_prep.readers.base import Frame, Layout, Options, UnreadableError, known_spacing, open_file
from data_prep.readers.clips import as_frames, check_size, chosen

MIN_SIDE = 16  # pixels of a picture
FEWER = "its header declares more frames than there are"
MORE = "its header declares fewer frames than there are"
UNKNOWN = "its header does not say how many frames there are"
ELSEWHERE = "its frames lie along another axis than is usual for its format"

_HELD = 64 << 20  # bytes of a stack in memory at a time
_MAX_UNPACKED = 64 << 30  # bytes of a compressed stack after decompression
_MAX_SLICES = 1_000_000
_PIECE = 1 << 20

_ALIKE = 3  # aspect ratio that pictures rarely exceed, but slices across a clip often do
_STILL = 0.01  # share of pixels that are constant: the screen around a moving picture
_STILL_TIMES = 2  # times as many as along any other axis; in 45 real clips, only ever along time
_STILL_LEVELS = 4 / 255  # of the range: variation of a constant pixel
_LOOKED_AT = 64  # positions sampled along each axis

_WINDOW = 0.1, 99.9  # percentiles
_SAMPLED_PLANES = 16
_SAMPLED_VALUES = 1 << 16  # per plane

# What is raised for compressed data that are damaged, truncated or of an unknown method.
_UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)

Opening = contextlib.AbstractContextManager[IO[bytes]]


@dataclasses.dataclass(frozen=True)
class Stack:
    """A three-dimensional array in a file.

    Attributes:
      shape: (Z, Y, X) of the data present, with the axes in the order of `Options.axis`.
      dtype: of the values, with their byte order.
      planes: yields the planes at ascending positions along the axis `slow`: each `[rest]` or `[rest, C]`, C = 3 or 4
        (RGB, RGBA), with the remaining axes in the order of `shape`.
      slow: the axis along which the file can be read plane by plane.
      series: whether this is a series of volumes along the first axis, which cannot be sliced along any other.
      elsewhere: how to treat pictures found along another axis than the first: "" refuses them, "kept" keeps their
        orientation, "transposed" swaps rows and columns.
      warnings: see `Frame`.
      cut: why there are fewer data than the header declares, raised after the last frame; "" if there are not.
      spacing: mm between values along (Z, Y, X); 0 = not known.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    planes: Callable[[Iterable[int]], Iterator[np.ndarray]]
    slow: int = 0
    series: bool = False
    elsewhere: str = ""
    warnings: tuple[str, ...] = ()
    cut: str = ""
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)


def read(stack: Stack, options: Options) -> Iterator[Frame]:
    """Yields the slices of a stack along `options.axis` (see `find_axis` if it is None), flipped by `options.flip`.

    uint8 is kept. All other types are mapped to it by one window for the whole stack, from the 0.1st to the 99.9th
    percentile of a sample (up to 2**16 values from each of 16 planes), so that slices remain comparable; NaN and
    infinities become 0. Slices that are then constant are dropped; the others keep their numbers.

    Raises:
      UnreadableError: too large, mostly NaN, truncated, damaged, or without any slice that is not constant.
    """
    axis = find_axis(stack) if options.axis is None else options.axis
    if stack.series and axis != 0:
        raise UnreadableError("a series of volumes, which can be sliced along axis 0 only")
    height, width = _sides(stack, axis)
    check_size(width, height)
    if min(width, height) == 1:
        raise UnreadableError(f"slices are lines of {max(width, height)} pixels: another axis?")
    if stack.shape[axis] > _MAX_SLICES:
        raise UnreadableError(f"{stack.shape[axis]} slices, more than a million")
    if stack.cut and axis != stack.slow:
        raise UnreadableError(stack.cut)
    told = options.axis is None and axis != 0
    warnings = (*stack.warnings, ELSEWHERE) if told else stack.warnings
    transposed = told and stack.elsewhere == "transposed"
    down, across = (length for other, length in enumerate(stack.spacing) if other != axis)
    spacing = known_spacing(*((across, down) if transposed else (down, across)))
    empty = True
    for frame in as_frames(_shown(stack, options, axis, transposed), warnings=warnings, spacing=spacing):
        yield frame
        empty = False
    if stack.cut:
        raise UnreadableError(stack.cut)
    if empty:
        raise UnreadableError("all slices are empty: one value throughout")


def find_axis(stack: Stack) -> int:
    """The axis along which the pictures of a stack follow each other.

    Pictures have at least 16 x 16 pixels, which leaves no axis, one or all three. Of three, it is the first, unless its
    pictures are far longer than wide, or so many pixels are constant along another axis that it must be time.

    Raises:
      UnreadableError: there is no such axis, or it cannot be determined.
    """
    sides = [sorted(_sides(stack, axis)) for axis in range(3)]
    possible = [axis for axis in range(1 if stack.series else 3) if sides[axis][0] >= MIN_SIDE]
    found = possible[0] if possible else None
    if len(possible) == 3:
        alike = [axis for axis in possible if sides[axis][1] <= _ALIKE * sides[axis][0]]
        still = _still_axis(stack)
        if alike == [still]:
            found = still
        elif still not in (None, 0) or (still is None and 0 not in alike):
            found = None
    if found is None or (found and not stack.elsewhere):
        slices = ", ".join("{} x {} along {}".format(*_sides(stack, axis), axis) for axis in range(3))
        raise UnreadableError(f"its frames may lie along another axis ({slices}): say which with --axis")
    return found


def _sides(stack: Stack, axis: int) -> tuple[int, int]:
    height, width = (length for other, length in enumerate(stack.shape) if other != axis)
    return height, width


def _still_axis(stack: Stack) -> int | None:
    """The axis along which many more pixels are constant than along the others; None if there is none.

    Looks at the first 64 MiB only, so that a large stack need not be decompressed twice.
    """
    rest = _sides(stack, stack.slow)
    steps = tuple(slice(None, None, max(1, length // _LOOKED_AT)) for length in rest)
    count = min(stack.shape[stack.slow], max(2, _HELD // (math.prod(rest) * stack.dtype.itemsize)))
    planes: list[np.ndarray] = []
    with contextlib.suppress(UnreadableError):  # reported later, when that plane is read
        for plane in stack.planes(chosen(count, Options(max_frames=_LOOKED_AT))):
            planes.append(_as_float((plane if plane.ndim == 2 else plane[:, :, 1])[steps]))
    if len(planes) < 2:
        return None
    block = np.moveaxis(np.stack(planes), 0, stack.slow)
    low, high = np.percentile(block[np.isfinite(block)], _WINDOW) if np.isfinite(block).any() else (0.0, 0.0)
    with np.errstate(invalid="ignore"):
        shares = [float((np.ptp(block, axis) <= _STILL_LEVELS * (high - low)).mean()) for axis in range(3)]
    *_, second, most = sorted(shares)
    return shares.index(most) if most > max(_STILL, _STILL_TIMES * second) else None


def _as_float(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs warn
        return values.astype(np.float64)


def in_file(
    layout: Layout,
    opened: Callable[[], Opening],
    stored: int | None,
    dtype: np.dtype,
    *,
    slow: int = 0,
    columns_first: bool = False,
    series: bool = False,
    elsewhere: str = "",
) -> Stack:
    """A stack stored contiguously in a file: the part that is present, whatever the header declares.

    Args:
      layout: as declared in the header; the length along `slow` is below 1 if it is not declared.
      opened: opens the file (or a decompressor of it) at the first value.
      stored: number of bytes present from there on; None for compressed data, which are decompressed once if small,
        rather than in every pass.
      dtype: of the values, with their byte order.
      slow: the axis along which planes follow each other in the file, see `Stack`.
      columns_first: whether planes are stored with their axes reversed, including channels.
      series: see `Stack`.
      elsewhere: see `Stack`.

    Raises:
      UnreadableError: there is no complete plane, or planes are too large.
    """
    *shape, channels = layout
    height, width = (length for axis, length in enumerate(shape) if axis != slow)
    check_size(width, height)
    plane_shape = (height, width, channels) if channels > 1 else (height, width)
    plane_bytes, declared, cut = math.prod(plane_shape) * dtype.itemsize, shape[slow], ""
    if stored is None:
        data, cut = _unpack(opened)
        if len(data) <= _HELD:
            opened, stored = lambda: io.BytesIO(data), len(data)
        elif not 0 < declared * plane_bytes <= _MAX_UNPACKED:
            raise UnreadableError(f"compressed, and not known to be up to {_MAX_UNPACKED >> 30} GiB: unpack it first")
        else:
            stored = declared * plane_bytes
    there, rest = divmod(max(0, stored), plane_bytes)
    if not cut and there < max(declared, 1) and (rest or slow or not there):
        cut = f"cut off: {max(0, stored)} bytes of the {max(declared, 1) * plane_bytes} that its header declares"
    if not there:
        raise UnreadableError(cut)
    warnings: tuple[str, ...] = ()
    if declared < 1:
        warnings = (UNKNOWN,)
    elif there > declared and (rest or slow):
        there = declared  # followed by other data
    elif there != declared and not cut:
        warnings = (MORE if there > declared else FEWER,)

    def planes(numbers: Iterable[int]) -> Iterator[np.ndarray]:
        for stored_plane in _read_planes(opened, numbers, plane_bytes):
            plane = np.frombuffer(stored_plane, dtype)
            yield plane.reshape(plane_shape[::-1]).T if columns_first else plane.reshape(plane_shape)

    shape[slow] = there
    return Stack((shape[0], shape[1], shape[2]), dtype, planes, slow, series, elsewhere, warnings, cut)


@contextlib.contextmanager
def unpacked(path: str | os.PathLike[str], start: int, packing: str, skip: int = 0) -> Iterator[IO[bytes]]:
    """Opens the data of a file from byte `start` on, decompressed, past the first `skip` bytes.

    Args:
      path: of the file.
      start: offset in the file.
      packing: "raw" or the compression: "gzip", "zlib", "deflate" or "bzip2".
      skip: bytes to skip after decompression.

    Raises:
      UnreadableError: damaged or truncated; also raised within the block, while the data are used.
    """
    with unpacking(), open_file(path) as file:
        file.seek(start)
        stream = _UNPACKERS[packing](file)
        skip_bytes(stream, skip)
        yield stream


@contextlib.contextmanager
def unpacking() -> Iterator[None]:
    """Converts the errors raised for damaged compressed data to UnreadableError."""
    try:
        yield
    except _UNPACKING_ERRORS as error:
        raise UnreadableError("damaged or cut off") from error


def skip_bytes(file: IO[bytes], count: int) -> None:
    """Moves forward in a file that may be decompressed on the fly; raises EOFError at the end of one that is."""
    if isinstance(file, io.BufferedReader | io.BytesIO) and file.seekable():
        file.seek(count, os.SEEK_CUR)
        return
    while count > 0:
        read = len(file.read(min(count, _PIECE)))
        if not read:
            raise EOFError
        count -= read


class _Inflated(io.RawIOBase):
    """A zlib or deflate stream as a file."""

    def __init__(self, file: IO[bytes], bits: int):
        self._file, self._engine, self._given = file, zlib.decompressobj(bits), 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._given

    def readinto(self, buffer: Any) -> int:
        while not self._engine.eof:
            data = self._engine.unconsumed_tail or self._file.read(_PIECE)
            if not data:
                raise EOFError
            unpacked = self._engine.decompress(data, len(buffer))
            if unpacked:
                buffer[: len(unpacked)] = unpacked
                self._given += len(unpacked)
                return len(unpacked)
        return 0


_UNPACKERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "raw": lambda file: file,
    "gzip": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    "zlib": lambda file: io.BufferedReader(_Inflated(file, 15), _PIECE),
    "deflate": lambda file: io.BufferedReader(_Inflated(file, -15), _PIECE),
    "bzip2": lambda file: bz2.BZ2File(file),
}


def _unpack(opened: Callable[[], Opening]) -> tuple[bytes, str]:
    """The intact part of compressed data, as far as it fits in memory, and why it ends early ("" = it does not)."""
    data, problem = io.BytesIO(), ""
    try:
        with opened() as file:
            # read1 returns what was decompressed before the damage, which read would lose.
            while data.tell() <= _HELD and (piece := cast(io.BufferedReader, file).read1(_PIECE)):
                data.write(piece)
    except UnreadableError as error:
        problem = str(error)
    return data.getvalue(), problem


def _read_planes(opened: Callable[[], Opening], numbers: Iterable[int], size: int) -> Iterator[bytes]:
    position = 0
    with opened() as file:
        for number in numbers:
            skip_bytes(file, (number - position) * size)
            data = file.read(size)
            if len(data) < size:
                raise UnreadableError(f"cut off in plane {number}")
            yield data
            position = number + 1
        file.read(1)  # reading to the end makes a compressed file verify its checksum


def _shown(stack: Stack, options: Options, axis: int, transposed: bool) -> Iterator[tuple[int, np.ndarray]]:
    window = None if stack.dtype == np.uint8 else _find_window(stack)
    rows = slice(None, None, -1 if options.flip in ("vertical", "both") else 1)
    columns = slice(None, None, -1 if options.flip in ("horizontal", "both") else 1)
    for number, plane in _slices(stack, chosen(stack.shape[axis], options), axis):
        plane = plane.swapaxes(0, 1) if transposed else plane
        pixels = plane[rows, columns, :3] if plane.ndim == 3 else plane[rows, columns]
        pixels = np.array(pixels, order="C") if window is None else _to_uint8(pixels, *window)
        if pixels.min() != pixels.max():
            yield number, pixels


def _slices(stack: Stack, numbers: Sequence[int], axis: int) -> Iterator[tuple[int, np.ndarray]]:
    slow = stack.slow
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
    try:
        for plane in stack.planes(chosen(stack.shape[stack.slow], Options(max_frames=_SAMPLED_PLANES))):
            values = plane.ravel()
            sample.append(_as_float(values[:: max(1, values.size // _SAMPLED_VALUES)]))
    except UnreadableError:
        if not sample:
            raise  # otherwise it is reported after the intact planes
    values = np.concatenate(sample)
    finite = values[np.isfinite(values)]
    if 2 * finite.size < values.size:
        raise UnreadableError("more than half of the values are NaN or infinite")
    low, high = np.percentile(finite, _WINDOW)
    if low == high:  # almost all values are equal
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def _to_uint8(plane: np.ndarray, low: float, high: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        scale = 255 / (high - low) if high > low else 0.0
        values = (plane.astype(np.result_type(plane.dtype, np.float32)) - low) * scale
        values = np.rint(np.clip(values, 0, 255))
    values[~np.isfinite(plane)] = 0
    return values.astype(np.uint8)
