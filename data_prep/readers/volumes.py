"""Reads volumes and sequences as frames: NIfTI (.nii, .nii.gz), MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr).

Orientation: slices are those of the array as stored, in the order (z, y, x) of SimpleITK; axis 0 varies slowest in the
file. The direction matrix is not applied: it is often wrong in ultrasound, and whether a dataset is upside down is
better checked once by eye (`Options.flip`). nibabel returns the same array transposed, (x, y, z). 2D+t sequences are
volumes whose first axis is time; the volumes of 3D+t follow one another. If frames seem to lie along another axis, the
file is refused: whether they are then transposed depends on the library that wrote it.

Headers are parsed here because libraries open any file that a header names, return nothing or zeros for truncated
files, and, in the case of pynrrd, decompress the whole volume before the first slice.

Pixel size: from the header, in mm unless NIfTI or NRRD state another unit. Programs write 1 x 1 if they do not know it,
and no scanner has pixels that large, so it counts as not known.

Intensity: see `stacks.read`. A scale factor in the header has no effect, since the window is relative.
"""

import dataclasses
import functools
import gzip
import itertools
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, cast

import numpy as np

from data_prep.readers import stacks
from data_prep.readers.base import Frame, Layout, Options, UnreadableError, open_file

LONGER = "its data file holds more than its header declares"

_MAX_LINE = 1 << 16
_MAX_HEADER = 64 << 20  # bytes; tracked sequences have ten lines or more per frame

_NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_NIFTI_UNITS = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # mm: not stated, m, mm, micrometres
_NIFTI_COLOURS = {128: 3, 2304: 4}  # RGB and RGBA of 8 bits
# Type names of MetaImage and NRRD without underscores and spaces, such as METUSHORT, unsigned short int, uint16_t.
_INTEGERS = re.compile("(?:met)?(unsigned|signed|u)?(?:(char|short|int|longlong|long)(?:int)?|int(8|16|32|64)t?)")
_BITS = {"char": 8, "short": 16, "int": 32, "long": 32, "longlong": 64}  # MetaImage's LONG on any machine
_FLOATS = {"float": "f4", "double": "f8", "metfloat": "f4", "metdouble": "f8"}
_NRRD_PACKINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_NRRD_COLOURS = {"rgb-color", "rgba-color", "3-color", "4-color", "vector", "3-vector", "4-vector"}
_NRRD_SPACE = {"domain", "space", "time", "???", "none"}


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the slices of a volume, or the frames of a sequence, that are not empty.

    Memory use is constant; a compressed volume may have up to 64 GiB.

    Raises:
      UnreadableError: see `open_volume` and `stacks.read`.
    """
    stack = open_volume(path)
    if stack.shape[0] == 3 and _three_equal(stack):
        # A still whose three equal channels were stored as slices, as in PSFHS and FH-PS-AOP.
        options = Options(max_frames=1, flip=options.flip)
    yield from stacks.read(stack, options)


def open_volume(path: str | os.PathLike[str]) -> stacks.Stack:
    """Opens the volume of a NIfTI, MetaImage or NRRD file.

    Raises:
      UnreadableError: of another format, damaged, of an unsupported kind, or without a single complete plane; or its
        data file is missing or outside the folder of the header.
    """
    path = os.fspath(path)
    try:
        with open_file(path) as file:
            head = file.read(4)
            file.seek(0)
            if head == b"NRRD":
                return _nrrd(file, path)
            if head.isascii() and head.strip().isalnum():
                return _meta_image(file, path)
            packing = "gzip" if head.startswith(b"\x1f\x8b") else "raw"
            unpacked = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packing == "gzip" else file
            return _nifti(unpacked.read(540), path, packing)
    except (ValueError, OverflowError, LookupError, struct.error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError("header is damaged or cut off") from error


def _stack(
    path: str,
    name: str,
    sizes: tuple[int, ...],
    dtype: np.dtype,
    channels: int,
    *,
    start: int,
    packing: str,
    skip: int = 0,
    spacing: Sequence[float] = (),
) -> stacks.Stack:
    """The volume that a header describes.

    Args:
      path: of the header.
      name: name of a separate data file; "" if the data follow the header.
      sizes: lengths of the axes, fastest first, without the channels; from the third on, 0 or -1 if unknown.
      dtype: of the values, with their byte order.
      channels: number of interleaved channels.
      start: offset of the (compressed) data in their file; -1 if they are at its end.
      packing: "raw", "gzip", "zlib" or "bzip2".
      skip: bytes to skip after decompression; -1 if the data are at the end of the file.
      spacing: mm along the axes of `sizes`; () = not known.
    """
    frames, height, width, series = _shape(sizes)
    if channels not in (1, 3, 4):
        raise UnreadableError(f"{channels} channels, expected grey or colour")
    if min(start, skip) < -1:
        raise UnreadableError("header is damaged or cut off")
    at_end = -1 in (start, skip)
    if at_end and packing != "raw":
        raise UnreadableError("compressed data at the end of their file, which is not supported")
    data_path = _data_file(path, name) if name else path
    stored, warnings = None, list[str]()
    if packing == "raw":
        size, total = frames * height * width * channels * dtype.itemsize, os.path.getsize(data_path)
        if at_end:
            start, skip = max(0, total - size), 0
        stored = total - start - skip
        if name and 0 < size < stored:
            stored, warnings = size, [LONGER]  # the rest may belong to other volumes
    opened = functools.partial(stacks.unpacked, data_path, start, packing, skip)
    stack = stacks.in_file(Layout(frames, height, width, channels), opened, stored, dtype, series=series)
    x, y, z = (*spacing, 0.0, 0.0, 0.0)[:3]
    if x == y == 1:
        x = y = z = 0.0
    return dataclasses.replace(stack, warnings=(*stack.warnings, *warnings), spacing=(z, y, x))


def _shape(sizes: tuple[int, ...]) -> tuple[int, int, int, bool]:
    """Z (0 = unknown), Y and X from sizes, fastest first, and whether it is a series of volumes."""
    if min(sizes[:2], default=0) < 1 or min(sizes) < -1:
        raise UnreadableError("header declares no pixels")
    sizes = tuple(max(0, size) for size in sizes)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) == 4 and sizes[2] == 1:  # x, y, 1, t
        sizes = sizes[:2] + sizes[3:]
    if len(sizes) > 4:
        raise UnreadableError(f"{len(sizes)} dimensions, expected 2, 3 or 4")
    x, y, z, t = sizes + (1,) * (4 - len(sizes))
    return t * z, y, x, t != 1


def _three_equal(stack: stacks.Stack) -> bool:
    try:
        return all(np.array_equal(one, two) for one, two in itertools.pairwise(stack.planes(range(3))))
    except UnreadableError:  # reported later, after the intact planes
        return False


def _nifti(head: bytes, path: str, packing: str) -> stacks.Stack:
    order = "<" if head[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
    (size,) = struct.unpack_from(order + "i", head)
    if size == 540 and head[4:8] == b"n+2\0":
        kind, dims = struct.unpack_from(order + "h", head, 12)[0], struct.unpack_from(order + "8q", head, 16)
        start, slope = struct.unpack_from(order + "qd", head, 168)
        sides, (unit,) = struct.unpack_from(order + "8d", head, 104), struct.unpack_from(order + "i", head, 500)
    elif size == 348 and head[344:348] == b"n+1\0":
        dims, kind = struct.unpack_from(order + "8h", head, 40), struct.unpack_from(order + "h", head, 70)[0]
        start, slope = struct.unpack_from(order + "ff", head, 108)
        sides, unit = struct.unpack_from(order + "8f", head, 76), head[123]
    else:
        raise UnreadableError("NIfTI header without its data (a pair of files?), expected .nii or .nii.gz")
    if kind not in _NIFTI_TYPES and kind not in _NIFTI_COLOURS:
        raise UnreadableError(f"NIfTI with numbers of type {kind}, which is not supported")
    if slope < 0:
        raise UnreadableError("NIfTI with a negative slope: dark would become bright")
    if not 1 <= dims[0] <= 7:
        raise UnreadableError("header is damaged or cut off")
    dtype, channels = np.dtype(order + _NIFTI_TYPES.get(kind, "u1")), _NIFTI_COLOURS.get(kind, 1)
    skip = max(int(start), size)
    spacing = [abs(side) * _NIFTI_UNITS.get(unit & 7, 0.0) for side in sides[1 : 1 + dims[0]]]
    return _stack(
        path, "", dims[1 : 1 + dims[0]], dtype, channels, start=0, packing=packing, skip=skip, spacing=spacing
    )


def _meta_image(file: IO[bytes], path: str) -> stacks.Stack:
    fields: dict[str, str] = {}
    while "ElementDataFile" not in fields:
        key, value = _field(_line(file), "=")
        if not key.startswith("Seq_"):  # per-frame fields such as the probe position
            fields[key] = value
    if fields.get("BinaryData", "True").lower() not in ("true", "1"):
        raise UnreadableError("MetaImage with numbers as text, which is not supported")
    order = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))
    name = fields["ElementDataFile"] if fields["ElementDataFile"].upper() not in ("", "LOCAL") else ""
    return _stack(
        path,
        name,
        _numbers(fields["DimSize"], int(fields["NDims"])),
        _dtype(fields["ElementType"], ">" if order.lower() in ("true", "1") else "<"),
        int(fields.get("ElementNumberOfChannels", 1)),
        start=int(fields.get("HeaderSize", 0)) if name else file.tell(),
        packing="zlib" if fields.get("CompressedData", "False").lower() in ("true", "1") else "raw",
        spacing=_lengths(fields.get("ElementSpacing", fields.get("ElementSize", "")).split()),
    )


def _nrrd(file: IO[bytes], path: str) -> stacks.Stack:
    _line(file)  # the magic number
    fields: dict[str, str] = {}
    while line := _line(file, end_allowed=True):
        if not line.startswith(b"#") and b":=" not in line:
            key, value = _field(line, ":")
            fields[key.lower().replace(" ", "")] = value
    packing = fields["encoding"].lower()
    if packing not in _NRRD_PACKINGS:
        raise UnreadableError("NRRD with an encoding that is not supported, expected raw, gzip or bzip2")
    if int(fields.get("lineskip", 0)):
        raise UnreadableError("NRRD with lines to be skipped, which is not supported")
    sizes = _numbers(fields["sizes"], int(fields["dimension"]))
    spacing = _nrrd_spacing(fields)
    channels = 1
    first = fields.get("kinds", "domain").lower().split(maxsplit=1)[0]
    if first in _NRRD_COLOURS and sizes[0] in (1, 3, 4):
        channels, sizes, spacing = sizes[0], sizes[1:], spacing[1:]
    elif first not in _NRRD_SPACE:
        raise UnreadableError("NRRD whose first axis is neither space nor colour, which is not supported")
    name = fields.get("datafile", "")
    start, skip = 0 if name else file.tell(), int(fields.get("byteskip", 0))
    dtype = _dtype(fields["type"], ">" if fields.get("endian", "little").lower() == "big" else "<")
    packing = _NRRD_PACKINGS[packing]
    return _stack(path, name, sizes, dtype, channels, start=start, packing=packing, skip=skip, spacing=spacing)


def _nrrd_spacing(fields: dict[str, str]) -> list[float]:
    """Spacing in mm along the axes, from "space directions" or else "spacings"; [] if in another unit."""
    units = re.findall(r'"([^"]*)"', fields.get("spaceunits", "")) or ["mm"]
    if any(unit not in ("mm", "millimeter", "millimeters", "") for unit in units):
        return []
    if directions := re.findall(r"none|\([^)]*\)", fields.get("spacedirections", "")):
        return [math.hypot(*_lengths(one.strip("()").split(","))) for one in directions]
    return _lengths(fields.get("spacings", "").split())


def _lengths(words: Sequence[str]) -> list[float]:
    """Parses numbers, 0 for anything else: an unreadable size is no reason to lose frames."""
    found = []
    for word in words:
        try:
            found.append(abs(float(word)))
        except ValueError:
            found.append(0.0)
    return found


def _dtype(name: str, order: str) -> np.dtype:
    name = re.sub("[ _]", "", name.lower())
    if name in _FLOATS:
        return np.dtype(order + _FLOATS[name])
    found = _INTEGERS.fullmatch(name)
    if not found:
        raise UnreadableError("a type of numbers that is not supported")
    sign, kind, bits = found.groups()
    return np.dtype(f"{order}{'u' if sign in ('u', 'unsigned') else 'i'}{int(bits or _BITS[kind]) // 8}")


def _line(file: IO[bytes], end_allowed: bool = False) -> bytes:
    line = file.readline(_MAX_LINE)
    if len(line) == _MAX_LINE or file.tell() > _MAX_HEADER or not (line or end_allowed):
        raise UnreadableError("header is damaged or cut off")
    return line.strip(b"\r\n")


def _field(line: bytes, separator: str) -> tuple[str, str]:
    key, found, value = line.decode("utf-8", "surrogateescape").partition(separator)
    if not found:
        raise UnreadableError("header is damaged or cut off")
    return key.strip(), value.strip()


def _numbers(text: str, count: int) -> tuple[int, ...]:
    """The lengths of `count` axes; a missing last one, the number of frames, becomes 0 (unknown)."""
    numbers = tuple(int(word) for word in text.split())
    if len(numbers) == count - 1 >= 2:
        return (*numbers, 0)
    if len(numbers) != count:
        raise UnreadableError("header is damaged or cut off")
    return numbers


def _data_file(path: str, name: str) -> str:
    """The path of the data file that a header names; it must lie in the folder of the header."""
    if "%" in name or name.split()[0].upper() == "LIST":
        raise UnreadableError("one volume in a list of files, which is not supported")
    folder = os.path.realpath(os.path.dirname(path))
    full = os.path.realpath(os.path.join(folder, name))
    if os.path.commonpath([folder, full]) != folder:
        raise UnreadableError("its data file lies outside the folder of the header")
    if not os.path.isfile(full):
        raise UnreadableError("the data file that it names is missing")
    return full
