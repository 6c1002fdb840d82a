"""HDF5 files, and MATLAB files of version 7.3, which are HDF5: their numeric datasets, read by rows.

Only what lies in the file itself is read: links into other files, external storage and virtual datasets are refused.
"""

import contextlib
import functools
import io
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import h5py
import numpy as np

from data_prep.readers import stacks
from data_prep.readers.base import Array, Layout, UnreadableError
from data_prep.readers.clips import check_size

_CACHE = 256 << 20  # bytes of unpacked chunks
_MAX_OBJECTS = 10_000
_FAR = 1 << 50  # bytes: no HDF5 file ends behind it
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

    with _opened(path) as (file, _):
        file.visititems(visit)  # follows no link but the hard ones
    if count > _MAX_OBJECTS:
        raise UnreadableError(f"more than {_MAX_OBJECTS} objects")
    return found


def read_names(path: str | os.PathLike[str], key: str, count: int) -> list[str]:
    """The texts or numbers of a one-dimensional dataset, as texts.

    Raises:
      UnreadableError: damaged, not there, or not `count` of them.
    """
    with _opened(path) as (file, _):
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
    elsewhere = "transposed" if columns_first else "kept"
    shape = layout.frames, layout.height, layout.width
    with _opened(path) as (file, cut):
        dataset = file[name]
        if dataset.external or dataset.is_virtual:
            raise UnreadableError("an array whose data lie in other files, which are not read")
        size, start = dataset.id.get_storage_size(), dataset.id.get_offset()
        if start is not None and dataset.id.get_type() == h5py.h5t.py_create(dtype):  # plain bytes, without gaps
            opened, stored = functools.partial(stacks.unpacked, path, start, "raw"), os.path.getsize(path) - start
            how: dict[str, Any] = {"channels": layout.channels, "columns_first": columns_first}
            return stacks.in_file(opened, min(stored, size), shape, dtype, elsewhere=elsewhere, **how)
        check_size(layout.width, layout.height)
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
        if not all(map(h5py.h5z.filter_avail, filters)):
            raise UnreadableError("compressed in a way that is not supported, without a plug-in of HDF5")
        if not size:
            raise UnreadableError("cut off: nothing of it was written")
        holes = dataset.chunks and not cut and dataset.id.get_num_chunks() < _chunks(dataset)
        warnings = (stacks.FEWER,) if holes else ()

    def planes(numbers: Iterable[int]) -> Iterator[np.ndarray]:
        with _opened(path) as (file, cut):
            for plane in _planes(file[name], numbers, layout, cut):
                yield plane.T if columns_first else plane

    return stacks.Stack(shape, dtype, planes, elsewhere=elsewhere, warnings=warnings)


def _planes(dataset: Any, numbers: Iterable[int], layout: Layout, cut: "_CutOff | None") -> Iterator[np.ndarray]:
    """Planes as they are stored."""
    where: list[Any] = [slice(None) if length > 1 else 0 for length in dataset.shape]
    first = next((axis for axis, length in enumerate(dataset.shape) if length > 1), 0)
    if dataset.chunks:  # those that hold parts of several planes are kept, and unpacked once
        access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
        kept = dataset.chunks[first] * math.prod(layout[1:]) * dataset.dtype.itemsize
        access.set_chunk_cache(10_007, min(2 * kept, _CACHE), 1.0)
        dataset = h5py.Dataset(h5py.h5d.open(dataset.file.id, dataset.name.encode(), access))
    for number in numbers:
        if layout.frames > 1:
            where[first] = number
        if cut:
            cut.missed = False
        plane = dataset[tuple(where)]
        if cut and cut.missed:
            raise UnreadableError(f"cut off in plane {number}")
        yield plane


def _chunks(dataset: Any) -> int:
    return math.prod(-(-length // part) for length, part in zip(dataset.shape, dataset.chunks, strict=True))


class _CutOff(io.RawIOBase):
    """A file that is cut off, as HDF5 would otherwise not open it: with zeros behind its end.

    Attributes:
      missed: whether some of these were read.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._end, self._position, self.missed = file, os.fstat(file.fileno()).st_size, 0, False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = _FAR if whence == os.SEEK_END else offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(min(self._position, self._end))
        data = self._file.read(len(buffer))
        self.missed |= len(data) < len(buffer)
        buffer[:] = data.ljust(len(buffer), b"\0")
        self._position += len(buffer)
        return len(buffer)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, _CutOff | None]]:
    with contextlib.ExitStack() as stack:
        try:
            cut = None
            try:
                file = h5py.File(path, "r", locking=False)
            except OSError:
                cut = _CutOff(stack.enter_context(pathlib.Path(path).open("rb")))
                file = h5py.File(cut, "r")
            yield stack.enter_context(file), cut
        except _ERRORS as error:
            raise UnreadableError("damaged or cut off") from error
