"""The types and errors shared by all readers."""

import dataclasses
import math
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np


class UnreadableError(Exception):
    """A file yields no usable frames; the message states why in a few words, without any path or person's name."""


UNKNOWN_SPACING = (0.0, 0.0)
_SPACINGS = 1e-3, 10.0  # mm: values outside are in another unit, or were never set


def known_spacing(down: float, across: float) -> tuple[float, float]:
    """Pixel spacing in mm, down and across, if both are plausible; else `UNKNOWN_SPACING`."""
    sound = all(math.isfinite(one) and _SPACINGS[0] <= one <= _SPACINGS[1] for one in (down, across))
    return (float(down), float(across)) if sound else UNKNOWN_SPACING


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading.

    Raises:
      UnreadableError: it is missing, not readable, or not a regular file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise UnreadableError("not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from None


@dataclasses.dataclass(frozen=True)
class Options:
    """How files with more than one frame are read.

    Attributes:
      stride: takes every n-th frame of a clip or slice of a volume.
      max_frames: largest number of frames per file, evenly spread; 0 takes all.
      axis: axis along which a volume is sliced: 0, 1 or 2 of the array (z, y, x); None = determined automatically.
      flip: how slices of a volume are flipped: "", "vertical", "horizontal" or "both".
      key: name of the array in HDF5, MATLAB and npz files; "" takes the only one that can be frames.
      patient_key: name of the HDF5 dataset with the patient of every frame.
    """

    stride: int = 1
    max_frames: int = 0
    axis: int | None = None
    flip: str = ""
    key: str = ""
    patient_key: str = ""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame as read, before it is cleaned, resized and stored.

    Attributes:
      pixels: uint8 or uint16 `[H, W, 1]` (grey) or `[H, W, 3]` (RGB).
      number: index of the frame or slice in its file, from 0, counted before the stride.
      boxes: imaged regions that the file itself declares, as (left, top, right, bottom) in pixels, right and bottom
        exclusive; empty if it declares none.
      patient: identifier from the file, hashed before it is written in private builds; empty if unknown.
      video: likewise, an identifier that distinguishes clips.
      facts: technical values that may be written, from an allowlist; the same in every frame of a file.
      removed: number of items in the file that were not kept, by kind; the same in every frame.
      warnings: what the user should know about a file whose frames were used, in fixed phrases that quote nothing from
        it; may be set on the first frame only.
      spacing: pixel spacing in mm, down and across; 0 = not known, see `known_spacing`.
    """

    pixels: np.ndarray
    number: int = 0
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    patient: str = ""
    video: str = ""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    removed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    spacing: tuple[float, float] = UNKNOWN_SPACING


class Layout(NamedTuple):
    """How an array is divided into frames: their number, size and channels."""

    frames: int
    height: int
    width: int
    channels: int


class Array(NamedTuple):
    """One array of a file.

    Attributes:
      name: name in the file; "" if it has none.
      dims: its shape, in the axis order of the program that wrote it.
      dtype: of its numbers.
      frames_last: whether it follows MATLAB's convention.
      open: makes the `stacks.Stack` for a layout; raises UnreadableError for an array that cannot be read.
    """

    name: str
    dims: tuple[int, ...]
    dtype: np.dtype
    frames_last: bool
    open: Callable[[Layout], Any]
