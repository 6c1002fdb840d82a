"""Finds the numeric arrays at the top level of MATLAB files of version 5 (and 6, 7), without reading their data.

The format is described in MathWorks' "MAT-File Format" (R2019b, chapter 1). SciPy reads it too, but only whole arrays,
and nothing of a truncated one.
"""

import functools
import os
import struct
from collections.abc import Iterator

import numpy as np

from data_prep.readers import stacks
from data_prep.readers.base import Array, UnreadableError, open_file

_HEADER = 128
_DESCRIPTION = 512  # bytes at the start of an array, enough for its type, dimensions and name
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC = range(6, 16)  # classes of arrays: double, single, int8 to uint64
_COMPLEX, _LOGICAL = 0x0800, 0x0200


def arrays(path: str | os.PathLike[str]) -> list[Array]:
    """The arrays of plain numbers; text, cells, structures, objects, logical and complex arrays are left out.

    Raises:
      UnreadableError: damaged or truncated.
    """
    try:
        return list(_arrays(path))
    except struct.error as error:
        raise UnreadableError("header is damaged or cut off") from error


def _arrays(path: str | os.PathLike[str]) -> Iterator[Array]:
    with open_file(path) as file:
        order = "<" if file.read(_HEADER).endswith(b"IM") else ">"
        position, end = _HEADER, os.fstat(file.fileno()).st_size
        while position < end:
            file.seek(position)
            kind, size = struct.unpack(order + "II", file.read(8))
            packed = kind == _COMPRESSED
            if kind in (_MATRIX, _COMPRESSED):
                start, packing = (position + 8, "zlib") if packed else (position, "raw")
                with stacks.unpacked(path, start, packing) as stream:
                    found = _describe(stream.read(_DESCRIPTION), order)
                if found is not None:
                    name, dims, dtype, skip, numbers = found
                    yield Array(
                        name,
                        dims,
                        dtype,
                        True,
                        functools.partial(
                            stacks.in_file,
                            opened=functools.partial(stacks.unpacked, path, start, packing, skip),
                            stored=None if packed else min(numbers, end - position - skip),
                            dtype=dtype,
                            columns_first=True,
                            elsewhere="transposed",
                        ),
                    )
            position += 8 + size + (0 if packed else -size % 8)


def _describe(head: bytes, order: str) -> tuple[str, tuple[int, ...], np.dtype, int, int] | None:
    """(name, dims, dtype, bytes before the data, bytes of data) of an array; None if not of plain numbers."""
    kind, flags = struct.unpack_from(order + "I12xI", head)
    if kind != _MATRIX or flags & 0xFF not in _NUMERIC or flags & (_COMPLEX | _LOGICAL):
        return None
    lengths, position = _small_element(head, 24, order)
    name, position = _small_element(head, position, order)
    stored, size = struct.unpack_from(order + "II", head, position)
    dims = tuple(np.frombuffer(lengths[: len(lengths) // 4 * 4], order + "i4").tolist())
    if stored not in _TYPES or min(dims, default=0) < 1:
        return None  # also for the short form, which has at most four bytes
    return name.decode("latin-1"), dims, np.dtype(order + _TYPES[stored]), position + 8, size


def _small_element(head: bytes, position: int, order: str) -> tuple[bytes, int]:
    """(data, position after it) of an element, which may be in the short form of eight bytes in total."""
    kind, size = struct.unpack_from(order + "II", head, position)
    if kind >> 16:
        return head[position + 4 : position + 4 + min(4, kind >> 16)], position + 8
    return head[position + 8 : position + 8 + size], position + 8 + size + -size % 8
