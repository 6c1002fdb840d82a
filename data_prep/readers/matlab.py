"""MATLAB files of version 5 (and 6, 7): the numeric arrays at their top level, without reading them.

The format is described in MathWorks' "MAT-File Format" (R2019b, chapter 1). SciPy reads it too, but a whole array at
a time, and nothing of one that is cut off.
"""

import functools
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import IO

import numpy as np

from data_prep.readers import stacks
from data_prep.readers.base import Array, Layout, UnreadableError

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC = range(6, 16)  # classes of arrays: double, single, int8 to uint64
_COMPLEX, _LOGICAL = 0x0800, 0x0200
_MAX_ELEMENTS = 10_000
_MAX_SMALL = 128  # bytes of a name, or of the dimensions


def arrays(path: str | os.PathLike[str]) -> list[Array]:
    """The arrays of plain numbers; texts, cells, structures, objects, truth values and complex numbers are left out.

    Raises:
      UnreadableError: damaged or cut off.
    """
    try:
        with stacks.unpacking(), pathlib.Path(path).open("rb") as file:
            return list(_arrays(file, path))
    except struct.error as error:
        raise UnreadableError("header is damaged or cut off") from error


def _arrays(file: IO[bytes], path: str | os.PathLike[str]) -> Iterator[Array]:
    order = "<" if file.read(_HEADER).endswith(b"IM") else ">"
    end = os.fstat(file.fileno()).st_size
    position = _HEADER
    for _ in range(_MAX_ELEMENTS):
        if position >= end:
            return
        file.seek(position)
        kind, size = struct.unpack(order + "II", file.read(8))
        packed = kind == _COMPRESSED
        if kind in (_MATRIX, _COMPRESSED):
            start, packing = (position + 8, "zlib") if packed else (position, "raw")
            with stacks.unpacked(path, start, packing) as stream:
                found = _describe(stream, order)
            if found is not None:
                name, dims, dtype, skip, numbers = found
                stored = None if packed else min(numbers, end - position - skip)
                opened = functools.partial(stacks.unpacked, path, start, packing, skip)
                yield Array(name, dims, dtype, True, functools.partial(_stack, opened, stored, dtype))
        position += 8 + size + (0 if packed else -size % 8)
    raise UnreadableError(f"more than {_MAX_ELEMENTS} variables")


def _describe(stream: IO[bytes], order: str) -> tuple[str, tuple[int, ...], np.dtype, int, int] | None:
    """(name, dims, dtype, bytes before the numbers, bytes of them) of an array here; None if not of plain numbers."""
    kind, _, flags, *_ = struct.unpack(order + "II8xI4x", stream.read(24))
    if kind != _MATRIX or flags & 0xFF not in _NUMERIC or flags & (_COMPLEX | _LOGICAL):
        return None
    dims_data, dims_read = _element(stream, order)
    name, name_read = _element(stream, order)
    stored, size = struct.unpack(order + "II", stream.read(8))
    dims = struct.unpack(f"{order}{len(dims_data) // 4}i", dims_data[: len(dims_data) // 4 * 4])
    if stored not in _TYPES or min(dims, default=0) < 1:
        return None  # also the short form, for up to four bytes
    return name.decode("latin-1"), dims, np.dtype(order + _TYPES[stored]), 24 + dims_read + name_read + 8, size


def _element(stream: IO[bytes], order: str) -> tuple[bytes, int]:
    """(data, bytes read) of a small element, which may have the short form of eight bytes in all."""
    tag = stream.read(8)
    kind, size = struct.unpack(order + "II", tag)
    if kind >> 16:
        return tag[4 : 4 + min(4, kind >> 16)], 8
    if size > _MAX_SMALL:
        raise UnreadableError("header is damaged or cut off")
    padded = size + -size % 8
    data = stream.read(padded)
    if len(data) < padded:
        raise EOFError
    return data[:size], 8 + padded


def _stack(opened: stacks.Opened, stored: int | None, dtype: np.dtype, layout: Layout) -> stacks.Stack:
    shape = layout.frames, layout.height, layout.width
    return stacks.in_file(
        opened, stored, shape, dtype, channels=layout.channels, columns_first=True, elsewhere="transposed"
    )
