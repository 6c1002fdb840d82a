"""The headers of NIfTI, MetaImage and NRRD files: what they hold, where, and how it is packed.

Read by hand, for three reasons: the libraries unpack a whole volume before they give its first slice, they follow a
header to any file that it names, and they allocate what it declares.
"""

import dataclasses
import gzip
import os
import pathlib
import stat
import struct
import zlib
from typing import BinaryIO

import numpy as np

from data_prep.readers.base import UnreadableError

_MAX_LINE = 1 << 16
_MAX_HEADER = 64 << 20  # tracked sequences have ten lines or more for each frame

_NIFTI_TYPES = {
    2: ("u1", 1),
    4: ("i2", 1),
    8: ("i4", 1),
    16: ("f4", 1),
    64: ("f8", 1),
    128: ("u1", 3),  # RGB
    256: ("i1", 1),
    512: ("u2", 1),
    768: ("u4", 1),
    1024: ("i8", 1),
    1280: ("u8", 1),
    2304: ("u1", 4),  # RGBA
}
_META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # whatever the machine
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_NRRD_TYPES = {
    name: kind
    for kind, names in {
        "i1": "signed char,int8,int8_t",
        "u1": "uchar,unsigned char,uint8,uint8_t",
        "i2": "short,short int,signed short,signed short int,int16,int16_t",
        "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
        "i4": "int,signed int,int32,int32_t",
        "u4": "uint,unsigned int,uint32,uint32_t",
        "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
        "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(",")
}
_NRRD_PACKINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_NRRD_COLOURS = {"rgb-color", "rgba-color", "3-color", "4-color", "vector", "3-vector", "4-vector"}
_NRRD_SPACE = {"domain", "space", "time", "???", "none"}


@dataclasses.dataclass(frozen=True)
class Header:
    """What a volume's header says.

    Attributes:
      sizes: of the axes, fastest first, without that of the channels.
      dtype: of the numbers, with their byte order.
      channels: of each pixel, next to each other.
      path: of the file that holds the numbers.
      start: where they begin in it; -1 if they are at its end.
      packing: "raw", "gzip", "zlib" or "bzip2".
      skip: bytes to be left out after unpacking.
    """

    sizes: tuple[int, ...]
    dtype: np.dtype
    channels: int
    path: str
    start: int
    packing: str = "raw"
    skip: int = 0


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads the header of a NIfTI, MetaImage or NRRD file.

    Raises:
      UnreadableError: none of these, damaged, of a kind that is not supported, its data file is missing, or lies
        outside the folder of the header.
    """
    path = os.fspath(path)
    try:
        with pathlib.Path(path).open("rb") as file:
            head = file.read(4)
            file.seek(0)
            if head == b"NRRD":
                return _nrrd(file, path)
            if head.isascii() and head.strip().isalnum():
                return _meta_image(file, path)
            packing = "gzip" if head.startswith(b"\x1f\x8b") else "raw"
            unpacked = gzip.GzipFile(fileobj=file) if packing == "gzip" else file
            return _nifti(unpacked.read(540), path, packing)
    except (ValueError, OverflowError, LookupError, struct.error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError("header is damaged or cut off") from error
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from error


def _nifti(head: bytes, path: str, packing: str) -> Header:
    order = "<" if head[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
    (size,) = struct.unpack_from(order + "i", head)
    if size == 540 and head[4:8] == b"n+2\0":
        kind, dims = struct.unpack_from(order + "h", head, 12)[0], struct.unpack_from(order + "8q", head, 16)
        start, slope = struct.unpack_from(order + "qd", head, 168)
    elif size == 348 and head[344:348] == b"n+1\0":
        dims, kind = struct.unpack_from(order + "8h", head, 40), struct.unpack_from(order + "h", head, 70)[0]
        start, slope = struct.unpack_from(order + "ff", head, 108)
    else:
        raise UnreadableError("NIfTI header without its data (a pair of files?), expected .nii or .nii.gz")
    if kind not in _NIFTI_TYPES:
        raise UnreadableError(f"NIfTI with numbers of type {kind}, which is not supported")
    if slope < 0:
        raise UnreadableError("NIfTI with a negative slope: dark would become bright")
    if not 1 <= dims[0] <= 7:
        raise UnreadableError("header is damaged or cut off")
    dtype, channels = _NIFTI_TYPES[kind]
    start = max(int(start), size)
    place = (0, start) if packing == "gzip" else (start, 0)
    return Header(dims[1 : 1 + dims[0]], np.dtype(order + dtype), channels, path, place[0], packing, place[1])


def _meta_image(file: BinaryIO, path: str) -> Header:
    fields: dict[str, str] = {}
    while "ElementDataFile" not in fields:
        key, value = _field(_line(file), "=")
        if not key.startswith("Seq_"):  # where the probe was, for each frame
            fields[key] = value
    if fields.get("BinaryData", "True").lower() not in ("true", "1"):
        raise UnreadableError("MetaImage with numbers as text, which is not supported")
    swapped = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() in ("true", "1")
    if fields["ElementType"] not in _META_TYPES:
        raise UnreadableError("MetaImage with a type of numbers that is not supported")
    packing = "zlib" if fields.get("CompressedData", "False").lower() in ("true", "1") else "raw"
    name = fields["ElementDataFile"] or "LOCAL"
    local = name.upper() == "LOCAL"
    return Header(
        sizes=_numbers(fields["DimSize"], int(fields["NDims"])),
        dtype=np.dtype((">" if swapped else "<") + _META_TYPES[fields["ElementType"]]),
        channels=int(fields.get("ElementNumberOfChannels", 1)),
        path=path if local else _data_file(path, name),
        start=file.tell() if local else _offset(fields.get("HeaderSize", "0")),
        packing=packing,
    )


def _nrrd(file: BinaryIO, path: str) -> Header:
    _line(file)  # the magic
    fields: dict[str, str] = {}
    while line := _line(file, end_allowed=True):
        if not line.startswith(b"#") and b":=" not in line:
            key, value = _field(line, ":")
            fields[key.lower().replace(" ", "")] = value
    kind, packing = fields["type"].lower(), fields["encoding"].lower()
    if kind not in _NRRD_TYPES:
        raise UnreadableError("NRRD with a type of numbers that is not supported")
    if packing not in _NRRD_PACKINGS:
        raise UnreadableError("NRRD with an encoding that is not supported, expected raw, gzip or bzip2")
    if int(fields.get("lineskip", 0)):
        raise UnreadableError("NRRD with lines to be skipped, which is not supported")
    sizes = _numbers(fields["sizes"], int(fields["dimension"]))
    channels = 1
    first = fields.get("kinds", "domain").lower().split(maxsplit=1)[0]
    if first in _NRRD_COLOURS and sizes[0] in (1, 3, 4):
        channels, sizes = sizes[0], sizes[1:]
    elif first not in _NRRD_SPACE:
        raise UnreadableError("NRRD whose first axis is neither space nor colour, which is not supported")
    name = fields.get("datafile", "")
    start, skip = 0 if name else file.tell(), _offset(fields.get("byteskip", "0"))
    packing = _NRRD_PACKINGS[packing]
    if packing == "raw":
        start, skip = (-1, 0) if skip == -1 else (start + skip, 0)
    order = ">" if fields.get("endian", "little").lower() == "big" else "<"
    return Header(
        sizes=sizes,
        dtype=np.dtype(order + _NRRD_TYPES[kind]),
        channels=channels,
        path=_data_file(path, name) if name else path,
        start=start,
        packing=packing,
        skip=skip,
    )


def _line(file: BinaryIO, end_allowed: bool = False) -> bytes:
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
    numbers = tuple(int(word) for word in text.split())
    if len(numbers) != count:
        raise UnreadableError("header is damaged or cut off")
    return numbers


def _offset(text: str) -> int:
    """A number of bytes; -1 for data at the end of their file."""
    number = int(text)
    if number < -1:
        raise UnreadableError("header is damaged or cut off")
    return number


def _data_file(path: str, name: str) -> str:
    """The path of the data file that a header names; only what lies in the folder of the header is opened."""
    if "%" in name or name.split()[0].upper() == "LIST":
        raise UnreadableError("one volume in a list of files, which is not supported")
    folder = os.path.realpath(os.path.dirname(path))
    full = os.path.realpath(os.path.join(folder, name))
    if os.path.commonpath([folder, full]) != folder:
        raise UnreadableError("its data file lies outside the folder of the header")
    try:
        status = os.stat(full)
    except OSError as error:
        raise UnreadableError("the data file that it names is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError("its data file is not a regular file")
    return full
