"""Volumes and sequences to frames: NIfTI (.nii, .nii.gz), MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr).

Orientation: slices are those of the array as it is stored, which is the order (z, y, x) in which SimpleITK gives it;
axis 0 is what varies slowest in the file. Nothing is rotated by the direction matrix: what it says about the patient
is often wrong in ultrasound, and whether a set lies upside down is better looked at once (`Options.flip`). nibabel
gives the same array transposed, (x, y, z). 2D+t sequences are volumes whose first axis is time; of 3D+t the volumes
follow each other.

Intensity: see `stacks.read`. A scale factor in the header changes nothing, since the window is relative.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator

import numpy as np

from data_prep.readers import stacks
from data_prep.readers.base import Frame, Options, UnreadableError
from data_prep.readers.volume_headers import read_header


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the slices of a volume, or the frames of a sequence, that are not empty.

    Memory stays flat; a compressed volume may have up to 64 GiB.

    Raises:
      UnreadableError: see `volume_headers.read_header` and `stacks.read`.
    """
    stack = open_volume(path)
    if stack.shape[0] == 3 and _three_equal(stack):
        # A still whose three channels were taken for slices, as in PSFHS and FH-PS-AOP.
        options = Options(max_frames=1, flip=options.flip)
    yield from stacks.read(stack, options)


def open_volume(path: str | os.PathLike[str]) -> stacks.Stack:
    """The volume of a NIfTI, MetaImage or NRRD file, before any of its numbers are read.

    Raises:
      UnreadableError: see `volume_headers.read_header`; or the file is too short for what its header declares.
    """
    header = read_header(path)
    stacks.check_numbers(header.dtype)
    shape, series = _shape(header.sizes)
    if header.channels not in (1, 3, 4):
        raise UnreadableError(f"{header.channels} channels, expected grey or colour")
    if header.packing != "raw" and min(header.start, header.skip) < 0:
        raise UnreadableError("compressed data at the end of their file, which is not supported")
    size = math.prod(shape) * header.channels * header.dtype.itemsize
    stored = os.path.getsize(header.path) - max(header.start, 0)
    stacks.check_unpacked(size + header.skip, stored, header.packing)
    start = stored - size if header.start < 0 else header.start
    return stacks.in_file(
        functools.partial(stacks.unpacked, header.path, start, header.packing, header.skip),
        shape,
        header.dtype,
        channels=header.channels,
        series=series,
        packed=header.packing != "raw",
    )


def _shape(sizes: tuple[int, ...]) -> tuple[tuple[int, int, int], bool]:
    """(Z, Y, X) of sizes given fastest first, and whether it is a series of volumes."""
    if min(sizes, default=0) < 1:
        raise UnreadableError("header declares no pixels")
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) == 4 and sizes[2] == 1:  # x, y, 1, t
        sizes = sizes[:2] + sizes[3:]
    if len(sizes) > 4:
        raise UnreadableError(f"{len(sizes)} dimensions, expected 2, 3 or 4")
    x, y, z, t = sizes + (1,) * (4 - len(sizes))
    return (t * z, y, x), t > 1


def _three_equal(stack: stacks.Stack) -> bool:
    return all(np.array_equal(one, two) for one, two in itertools.pairwise(stack.planes(range(3))))
