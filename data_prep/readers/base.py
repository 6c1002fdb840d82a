"""What every reader gives and takes."""

import dataclasses
import math
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np


class UnreadableError(Exception):
    """Why a file gives no usable frames, in a few words that name no path and no person."""


UNKNOWN_SPACING = (0.0, 0.0)
_SPACINGS = 1e-3, 10.0  # mm: what lies beyond is another unit, or was never set


def known_spacing(down: float, across: float) -> tuple[float, float]:
    """Mm from pixel to pixel, down and across, where both can be; else `UNKNOWN_SPACING`."""
    sound = all(math.isfinite(one) and _SPACINGS[0] <= one <= _SPACINGS[1] for one in (down, across))
    return (float(down), float(across)) if sound else UNKNOWN_SPACING


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file to be read.

    Raises:
      UnreadableError: it is missing, may not be read, or is no regular file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise UnreadableError("not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from None


@dataclasses.dataclass(frozen=True)
class Options:
    """How files with more than one frame are read.

    Attributes:
      stride: every n-th frame of a clip or slice of a volume.
      max_frames: at most so many frames of a file, evenly spread; 0 takes all.
      axis: of a volume, along which it is sliced: 0, 1 or 2 of the array (z, y, x); None is told by its shape.
      flip: of the slices of a volume: "", "vertical", "horizontal" or "both".
      key: name of the array in HDF5, MATLAB and npz files; "" takes the only one that can be frames.
      patient_key: name of the HDF5 dataset that says, frame by frame, whose clip it is of.
    """

    stride: int = 1
    max_frames: int = 0
    axis: int | None = None
    flip: str = ""
    key: str = ""
    patient_key: str = ""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame as read, before it is cleaned, shrunk and stored.

    Attributes:
      pixels: uint8 or uint16 `[H, W, 1]` (grey) or `[H, W, 3]` (RGB).
      number: of the frame or slice in its file, from 0, counted before the stride.
      boxes: imaged regions that the file itself declares, as (left, top, right, bottom) in pixels, right and bottom
        exclusive; empty when it says nothing.
      patient: as the file names it; an identifier, hashed before anything is written. Empty when unknown.
      video: likewise: study, series and instance, whatever tells clips apart.
      facts: technical values that may be written, from a whitelist; the same in every frame of a file.
      removed: kinds of information in the file that were not taken over, and how many; the same in every frame.
      warnings: what a person should know about the file although its frames were taken, in fixed phrases that quote
        nothing of it; on the first frame is enough.
      spacing: mm from pixel to pixel, down and across; 0 = not known, see `known_spacing`.
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
    """How an array becomes frames: how many, their size, and their channels."""

    frames: int
    height: int
    width: int
    channels: int


class Array(NamedTuple):
    """One array of a file.

    Attributes:
      name: in the file; "" if it has none.
      dims: its lengths, in the order of the program that wrote it.
      dtype: of its numbers.
      frames_last: whether it follows MATLAB's convention.
      open: makes the `stacks.Stack`, given the layout; refuses what cannot be read.
    """

    name: str
    dims: tuple[int, ...]
    dtype: np.dtype
    frames_last: bool
    open: Callable[[Layout], Any]
