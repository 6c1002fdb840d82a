"""Reads numeric datasets of HDF5 files, including MATLAB 7.3, plane by plane.

Only data in the file itself are read: links to other files, external storage and virtual datasets are refused.
"""

import contextlib
import functools
import io
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import h5py
import numpy as np

from data_prep.readers import stacks
from data_prep.readers.base import Array, Layout, UnreadableError
from data_prep.readers.clips import check_size

_CACHE = 256 << 20  # bytes of decompressed chunks
_FAR = 1 << 50  # bytes: larger than any HDF5 file
_MATLAB_NUMERIC = {f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64)} | {"single", "double"}
_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)


def arrays(path: str | os.PathLike[str]) -> list[Array]:
    """The datasets of plain numbers, named by their path in the file without the leading slash.

    Raises:
      UnreadableError: damaged or truncated.
    """
    found: list[Array] = []

    def visit(name: str, thing: Any) -> None:
        if isinstance(thing, h5py.Dataset) and not name.startswith("#"):  # "#refs#" holds the content of MATLAB cells
            found.extend(_describe(name, thing, path))

    with _opened(path) as (file, _):
        file.visititems(visit)  # follows only hard links
    return found


def read_names(path: str | os.PathLike[str], key: str, count: int) -> list[str]:
    """The values of a one-dimensional dataset of strings or numbers, as strings.

    Raises:
      UnreadableError: damaged, missing, or not `count` values.
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
    except _ERRORS:  # a type that NumPy lacks
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
    with _opened(path) as (file, cut):
        dataset = file[name]
        if dataset.external or dataset.is_virtual:
            raise UnreadableError("an array whose data lie in other files, which are not read")
        size, start = dataset.id.get_storage_size(), dataset.id.get_offset()
        if start is not None and dataset.id.get_type() == h5py.h5t.py_create(dtype):
            # Contiguous, so read directly: in a truncated file, HDF5 would try to read ahead beyond the end.
            opened, stored = functools.partial(stacks.unpacked, path, start, "raw"), os.path.getsize(path) - start
            how: dict[str, Any] = {"columns_first": columns_first, "elsewhere": elsewhere}
            return stacks.in_file(layout, opened, min(stored, size), dtype, **how)
        check_size(layout.width, layout.height)
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
        if not all(map(h5py.h5z.filter_avail, filters)):
            raise UnreadableError("compressed in a way that is not supported, without a plug-in of HDF5")
        if not size:
            raise UnreadableError("cut off: nothing of it was written")
        first = next((axis for axis, length in enumerate(dataset.shape) if length > 1), 0)
        chunks = dataset.chunks or dataset.shape
        whole = math.prod(-(-length // part) for length, part in zip(dataset.shape, chunks, strict=True))
        holes = dataset.chunks and not cut and dataset.id.get_num_chunks() < whole
    # Chunks that span several planes are cached, so that each is decompressed once.
    cache = min(2 * chunks[first] * math.prod(layout[1:]) * dtype.itemsize, _CACHE)

    def planes(numbers: Iterable[int]) -> Iterator[np.ndarray]:
        with _opened(path, cache) as (file, cut):
            dataset = file[name]
            where: list[Any] = [slice(None) if length > 1 else 0 for length in dataset.shape]
            for number in numbers:
                if layout.frames > 1:
                    where[first] = number
                if cut:
                    cut.missed = False
                plane = dataset[tuple(where)]
                if cut and cut.missed:
                    raise UnreadableError(f"cut off in plane {number}")
                yield plane.T if columns_first else plane

    return stacks.Stack(layout[:3], dtype, planes, elsewhere=elsewhere, warnings=(stacks.FEWER,) if holes else ())


class _CutOff(io.FileIO):
    """A truncated file, padded with zeros so that HDF5 opens it.

    Attributes:
      missed: whether any of the padding was read.
    """

    missed = False

    def tell(self) -> int:
        return _FAR  # HDF5 asks after seeking to the end

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(min(offset, os.fstat(self.fileno()).st_size), whence)

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self.missed |= count < len(buffer)
        buffer[count:] = bytes(len(buffer) - count)
        return len(buffer)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], cache: int = 1 << 20) -> Iterator[tuple[Any, _CutOff | None]]:
    how: dict[str, Any] = {"mode": "r", "rdcc_nbytes": cache, "rdcc_nslots": 10_007, "rdcc_w0": 1.0}
    with contextlib.ExitStack() as stack:
        try:
            cut = None
            try:
                file = h5py.File(path, locking=False, **how)
            except OSError:
                cut = stack.enter_context(_CutOff(path))
                file = h5py.File(cut, **how)
            yield stack.enter_context(file), cut
        except _ERRORS as error:
            raise UnreadableError("damaged or cut off") from error
