"""Reads arrays as frames: NumPy (.npy, .npz), MATLAB (.mat, versions 5 and 7.3) and HDF5.

Axes: frames come first in NumPy and HDF5, `[N, H, W]` or `[N, H, W, C]`, and last in MATLAB, H x W x N or
H x W x C x N; stills are `[H, W]` or `[H, W, C]`. C is 3 (RGB), or 4 outside MATLAB; axes of length 1 are dropped.
`Options.axis` refers to `[N, H, W]`, so that 0 is the last axis in MATLAB. An array with its frames elsewhere, such as
`[H, W, N]` in a .npy file or `[N, H, W]` in a MATLAB file written by SciPy, is recognised by its shape and by the part
of its content that stands still (`stacks.find_axis`), with a warning.

Choice of array: one of numbers that can be frames, at least 16 x 16 pixels. If there are several, which may include
masks, `Options.key` must name one. Booleans, text, objects, complex numbers and structures are never read.

Intensity: see `stacks.read`. Unlike np.load and scipy.io.loadmat, memory use stays constant for compressed arrays and
MATLAB files, and a truncated file yields its intact frames before the error.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import struct
import tokenize
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from data_prep.readers import stacks
from data_prep.readers.base import Array, Frame, Layout, Options, UnreadableError, open_file

_MATLAB5 = b"MATLAB 5.0 MAT-file"
#: Member of an archive: name, flags, bytes if not compressed, and a function that opens it past the bytes to skip.
_Member = tuple[str, int, int | None, Callable[..., stacks.Opening]]
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, RecursionError, tokenize.TokenError)


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the frames of an array.

    Raises:
      UnreadableError: no such array, several, damaged, truncated, or unlike its header; see also `stacks.read`.
    """
    stack = open_array(path, options.key)
    frames = stacks.read(stack, options)
    if not options.patient_key:
        yield from frames
        return
    from data_prep.readers import hdf5

    axis = stacks.find_axis(stack) if options.axis is None else options.axis
    names = hdf5.read_names(path, options.patient_key, stack.shape[axis])
    for frame in frames:
        yield dataclasses.replace(frame, patient=names[frame.number], video=names[frame.number])


def open_array(path: str | os.PathLike[str], key: str = "") -> stacks.Stack:
    """The array `key` of a NumPy, MATLAB or HDF5 file, or the only one that can be frames.

    Raises:
      UnreadableError: as in `read`.
    """
    with open_file(path) as file:
        head = file.read(len(_MATLAB5))
    if head.startswith(b"\x93NUMPY"):
        key, stored = "", os.path.getsize(path)
        found = [_describe("", stored, functools.partial(stacks.unpacked, path, 0, "raw"))]
    elif head.startswith(b"PK"):
        found = list(_members(path))
    else:  # imported here, since h5py may be missing if it is not needed
        kind = "matlab" if head == _MATLAB5 else "hdf5"
        found = importlib.import_module(f"data_prep.readers.{kind}").arrays(path)
    if key:
        found = [array for array in found if array.name == key]
        if not found:
            raise UnreadableError("has no array of the name that was asked for")
    else:
        found = [array for array in found if _can_be_frames(array)]
        if len(found) > 1:
            raise UnreadableError(f"{len(found)} arrays could be frames: say which with the option key")
    layout = _layout(found[0]) if found else None
    if layout is None:
        raise UnreadableError("holds no array that can be frames: numbers, 16 x 16 or more")
    if found[0].dtype.kind not in "iuf" or found[0].dtype.itemsize > 8:  # objects would have to be unpickled
        raise UnreadableError("holds no integers or floating-point numbers")
    return found[0].open(layout)


def _can_be_frames(array: Array) -> bool:
    layout = _layout(array)
    # The second longest side, since frames may be along any axis.
    return layout is not None and array.dtype.kind in "iuf" and sorted(layout[:3])[1] >= stacks.MIN_SIDE


def _layout(array: Array) -> Layout | None:
    if min(array.dims[0 if array.frames_last else 1 :], default=0) < 1:  # 0 frames means that their number is not known
        return None
    match [length for length in array.dims if length != 1]:
        case [height, width]:
            return Layout(1, height, width, 1)
        case [height, width, 3 | 4 as channels] if channels == 3 or not array.frames_last:
            return Layout(1, height, width, channels)
        case [height, width, frames] if array.frames_last:
            return Layout(frames, height, width, 1)
        case [frames, height, width]:
            return Layout(frames, height, width, 1)
        case [height, width, 3, frames] if array.frames_last:
            return Layout(frames, height, width, 3)
        case [frames, height, width, 3 | 4 as channels] if not array.frames_last:
            return Layout(frames, height, width, channels)
    return None


def _members(path: str | os.PathLike[str]) -> Iterator[Array]:
    try:
        with stacks.unpacking(), zipfile.ZipFile(path) as archive:
            members: list[_Member] = [
                (one.filename, one.flag_bits, None, functools.partial(_member, path, one)) for one in archive.infolist()
            ]
    except UnreadableError:  # the list of members, at the end of the file, is missing or damaged
        members = list(_members_in_place(path))
        if not members:
            raise
    for name, flags, stored, opened in members:
        if name.endswith(".npy"):
            if flags & 1:
                raise UnreadableError("encrypted")
            yield _describe(name.removesuffix(".npy"), stored, opened)


@contextlib.contextmanager
def _member(path: str | os.PathLike[str], member: zipfile.ZipInfo, skip: int = 0) -> Iterator[IO[bytes]]:
    with stacks.unpacking(), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        stacks.skip_bytes(file, skip)
        yield file


def _members_in_place(path: str | os.PathLike[str]) -> Iterator[_Member]:
    """The members of a truncated archive."""
    with open_file(path) as file:
        end = os.fstat(file.fileno()).st_size
        while len(head := file.read(30)) == 30 and head.startswith(b"PK\3\4"):
            flags, method, size, name_length, extra_length = struct.unpack("<6xHH8xI4xHH", head)
            name, extra = file.read(name_length).decode("latin-1"), file.read(extra_length)
            if size == 0xFFFFFFFF and len(extra) >= 20:
                (size,) = struct.unpack_from("<Q", extra, 12)
            start = file.tell()
            if method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                packing = "deflate" if method == zipfile.ZIP_DEFLATED else "raw"
                # A member that was still being written when the file ended has no size yet.
                stored = min(size or end, end - start) if packing == "raw" else None
                yield name, flags, stored, functools.partial(stacks.unpacked, path, start, packing)
            if size > end - start:
                return
            file.seek(size, os.SEEK_CUR)


def _describe(name: str, stored: int | None, opened: Callable[..., stacks.Opening]) -> Array:
    """Describes an array; `opened` opens it at its header, past the bytes to skip."""
    with opened() as file:
        start = file.tell()
        dims, fortran, dtype = _header(file)
        start = file.tell() - start
    stored = None if stored is None else stored - start
    make = functools.partial(_stack, fortran, opened=functools.partial(opened, start), stored=stored, dtype=dtype)
    return Array(name, dims, dtype, False, make)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether the first axis varies fastest, dtype); leaves the file at the first number."""
    parsers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in parsers:
            raise UnreadableError("NumPy array with names in its type, expected plain numbers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers written by Python 2
            dims, fortran, dtype = parsers[version](file)
    except _HEADER_ERRORS as error:
        raise UnreadableError("header is damaged or cut off") from error
    if min(dims, default=0) < 0:
        raise UnreadableError("header is damaged or cut off")
    return dims, fortran, dtype


def _stack(fortran: bool, layout: Layout, **stored: Any) -> stacks.Stack:
    if fortran and layout.frames > 1 and layout.channels > 1:
        raise UnreadableError("NumPy array of colour frames in Fortran order, which is not supported")
    slow = 2 if fortran and layout.frames != 1 else 0
    return stacks.in_file(layout, **stored, slow=slow, columns_first=fortran, elsewhere="kept")
