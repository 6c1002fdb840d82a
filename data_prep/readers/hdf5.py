"""HDF5 files, and MATLAB files of version 7.3, which are HDF5: their numeric datasets, read by rows.

Only what lies in the file itself is read: links into other files, external storage and virtual datasets are refused.
"""

import contextlib
import functools
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import h5py
import numpy as np

from data_prep.readers import stacks
from data_prep.readers.base import Array, Layout, UnreadableError
from data_prep.readers.clips import check_size

_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32000
_FILTERS = {_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF}  # others are looked for in plug-ins
_MAX_CHUNK = 256 << 20  # bytes
_MAX_LZF_CHUNK = 16 << 20  # h5py writes up to 1 MiB
_UNCHECKED = 1 << 20  # bytes of a compressed chunk, which cannot become more than 1 GiB
_MAX_OBJECTS = 10_000
_MATLAB_NUMERIC = {f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64)} | {"single", "double"}
_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)


def arrays(path: str | os.PathLike[str]) -> list[Array]:
    """The datasets of plain numbers, by their path in the file without the first slash.

    Raises:
      UnreadableError: damaged or cut off.
    """
    found: list[Array] = []
    count = 0

    def visit(name: str, thing: Any) -> bool | None:
        nonlocal count
        count += 1
        if isinstance(thing, h5py.Dataset) and not name.startswith("#"):  # "#refs#": the inside of MATLAB's cells
            found.extend(_describe(name, thing, path))
        return count > _MAX_OBJECTS or None

    with _opened(path) as file:
        file.visititems(visit)  # follows no link but the hard ones
    if count > _MAX_OBJECTS:
        raise UnreadableError(f"more than {_MAX_OBJECTS} objects")
    return found


def read_names(path: str | os.PathLike[str], key: str, count: int) -> list[str]:
    """The texts or numbers of a one-dimensional dataset, as texts.

    Raises:
      UnreadableError: damaged, not there, or not `count` of them.
    """
    with _opened(path) as file:
        dataset = file.get(key) if file.get(key, getlink=True).__class__ is h5py.HardLink else None
        if not isinstance(dataset, h5py.Dataset) or dataset.shape != (count,) or dataset.external or dataset.is_virtual:
            raise UnreadableError("has no names for each of its frames")
        texts = dataset.asstr(errors="replace")[:] if h5py.check_string_dtype(dataset.dtype) else dataset[:]
        return [str(text).strip() for text in texts]


def _describe(name: str, dataset: Any, path: str | os.PathLike[str]) -> Iterator[Array]:
    try:
        dims, dtype = dataset.shape, dataset.dtype
    except _ERRORS:  # a type that NumPy does not have
        return
    if not dims or dtype.kind not in "iuf":
        return
    kind = dataset.attrs.get("MATLAB_class")
    if kind is not None:
        if kind.decode("latin-1") not in _MATLAB_NUMERIC:
            return
        dims = dims[::-1]
    make = functools.partial(_stack, path, name, dtype, kind is not None)
    yield Array(name, dims, dtype, kind is not None, make)


def _stack(
    path: str | os.PathLike[str], name: str, dtype: np.dtype, columns_first: bool, layout: Layout
) -> stacks.Stack:
    check_size(layout.width, layout.height)
    with _opened(path) as file:
        _check(file[name])

    def planes(numbers: Iterable[int]) -> Iterator[np.ndarray]:
        with _opened(path) as file:
            for plane in _rows(file[name], numbers, layout):
                yield plane.T if columns_first else plane

    return stacks.Stack((layout.frames, layout.height, layout.width), dtype, planes)


def _rows(dataset: Any, numbers: Iterable[int], layout: Layout) -> Iterator[np.ndarray]:
    """Planes as they are stored. Chunks that span several are read once."""
    kept = [axis for axis, length in enumerate(dataset.shape) if length > 1]
    if layout.frames == 1:
        for _ in numbers:
            yield dataset[()].squeeze()
        return
    shape = [dataset.shape[axis] for axis in kept[1:]]
    together = dataset.chunks[kept[0]] if dataset.chunks else 1
    if together * math.prod(shape) * dataset.dtype.itemsize > _MAX_CHUNK:
        together = 1
    where: list[Any] = [0] * len(dataset.shape)
    for axis in kept:
        where[axis] = slice(None)
    first, block = 0, np.empty((0, *shape), dataset.dtype)
    for number in numbers:
        if not first <= number < first + len(block):
            first = number
            where[kept[0]] = slice(number, (number // together + 1) * together)
            block = dataset[tuple(where)]
        yield block[number - first]


def _check(dataset: Any) -> None:
    """Refuses what lies in other files, and what would take more memory than it says."""
    if dataset.external or dataset.is_virtual:
        raise UnreadableError("an array whose data lie in other files, which are not read")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    properties = dataset.id.get_create_plist()
    filters = {properties.get_filter(number)[0] for number in range(properties.get_nfilters())}
    if filters - _FILTERS:
        raise UnreadableError("compressed in a way that is not supported, expected gzip or lzf")
    stacks.check_unpacked(size, dataset.id.get_storage_size(), "gzip" if dataset.chunks else "raw")
    if not dataset.chunks:
        return
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk > (_MAX_LZF_CHUNK if _LZF in filters else _MAX_CHUNK):
        raise UnreadableError(f"chunks of {chunk >> 20} MiB are too large")
    stored: list[Any] = []
    dataset.id.chunk_iter(
        lambda info: stored.append((info.size, info.chunk_offset)) if info.size > _UNCHECKED else None
    )
    for length, offset in stored:
        if length > chunk + _UNCHECKED:
            raise UnreadableError("a chunk that is larger than it says")
        skipped, data = dataset.id.read_direct_chunk(offset)
        if _DEFLATE in filters and not skipped:  # as it is for chunks that would have grown
            # HDF5 unpacks whatever comes; here it ends at the size that it should have, with a checksum.
            engine = zlib.decompressobj()
            engine.decompress(data, chunk + 4)
            if not engine.eof:
                raise UnreadableError("a chunk that is larger than it says")


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (*_ERRORS, zlib.error) as error:
        raise UnreadableError("damaged or cut off") from error
