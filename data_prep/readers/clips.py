"""Helpers for all readers: which frames are taken, size limits, whether colour is kept, and silencing libraries."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import cv2
import numpy as np

from data_prep.readers.base import UNKNOWN_SPACING, Frame, Options, UnreadableError

MAX_PIXELS = 50_000_000  # of one frame

#: For `Frame.warnings`, for any kind of file.
WRONG_COUNT = "the number of frames in the header is wrong or missing; all existing frames were taken"

# Colour carries meaning (Doppler, elastography) if in more than this share of the pixels the channels differ by more
# than this share of the range. Tinted B-mode stays below 45 / 255, and calipers and logos below 1 pixel in 1000.
COLOUR_SHARE = 0.001
COLOUR_SPREAD = 48 / 255
_DECIDING = 8  # frames of a clip that decide whether it has colour; fewer if they exceed `_DECIDING_BYTES`
_DECIDING_BYTES = 64 << 20

Boxes = tuple[tuple[int, int, int, int], ...]
_Item = TypeVar("_Item")


def chosen(count: int, options: Options) -> Sequence[int]:
    """Indices of those of `count` frames that are taken, ascending.

    Every `stride`-th from the first; if there are more than `max_frames`, they are divided into `max_frames` equal
    parts and the middle of each is taken, since the first and last slices of volumes show little.
    """
    strided = range(0, count, options.stride)
    if not 0 < options.max_frames < len(strided):
        return strided
    return [strided[(2 * i + 1) * len(strided) // (2 * options.max_frames)] for i in range(options.max_frames)]


def check_size(width: int, height: int) -> None:
    """Refuses frames that are too large, before anything is allocated for them.

    Raises:
      UnreadableError: no pixels, or more than `MAX_PIXELS`.
    """
    if width < 1 or height < 1:
        raise UnreadableError("header declares no pixels")
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")


def as_frames(
    pictures: Iterable[tuple[int, np.ndarray]],
    boxes: Boxes = (),
    warnings: Sequence[str] = (),
    spacing: tuple[float, float] = UNKNOWN_SPACING,
) -> Iterator[Frame]:
    """Converts the pictures of one clip or volume to frames, either all grey or all in colour.

    Colour is kept if any of the first 8 pictures (or of the first 64 MiB, if fewer) has colour that carries meaning.
    If decided frame by frame, a clip would alternate between grey and colour as Doppler varies with the heartbeat.

    Args:
      pictures: (number in the file, uint8 or uint16 `[H, W]`, `[H, W, 1]` or RGB `[H, W, 3]`); consumed lazily, one by
        one if the first is `[H, W]`, as all must then be.
      boxes: regions examined for colour, as in `Frame`; the whole pictures if empty.
      warnings: see `Frame`; may be appended to until the first picture is yielded.
      spacing: see `Frame`.
    """

    def enough(first: list[tuple[int, np.ndarray]]) -> bool:
        bytes_held = sum(pixels.nbytes for _, pixels in first)
        return first[0][1].ndim == 2 or len(first) == _DECIDING or bytes_held >= _DECIDING_BYTES

    first, rest = look_ahead(iter(pictures), enough)
    asked = [
        pixels[top:bottom, left:right]
        for _, pixels in first
        for left, top, right, bottom in boxes or [(0, 0, pixels.shape[1], pixels.shape[0])]
    ]
    colour = any(map(has_colour, asked))
    for number, pixels in itertools.chain(first, rest):
        is_colour = pixels.ndim == 3 and pixels.shape[2] == 3
        if is_colour and not colour:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        elif colour and not is_colour:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
        yield Frame(pixels.reshape(*pixels.shape[:2], -1), number, warnings=tuple(warnings), spacing=spacing)


def look_ahead(items: Iterator[_Item], enough: Callable[[list[_Item]], bool]) -> tuple[list[_Item], Iterator[_Item]]:
    """The first items of an iterator, until they are `enough`, and an iterator over the rest.

    An UnreadableError among the first items is raised by the second iterator, so that the items before it are not lost.
    """
    first: list[_Item] = []
    try:
        for item in items:
            first.append(item)
            if enough(first):
                break
    except UnreadableError as error:
        return first, _failing(error)
    return first, items


def _failing(error: UnreadableError) -> Iterator[Any]:
    raise error
    yield


def has_colour(pixels: np.ndarray) -> bool:
    """Whether uint8 or uint16 `[H, W]` or `[H, W, C]` (RGB or BGR) has colour that carries meaning, such as Doppler."""
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return False
    limit = COLOUR_SPREAD * np.iinfo(pixels.dtype).max
    spread = channel_spread(pixels)
    return bool(np.count_nonzero(spread > limit) > COLOUR_SHARE * spread.size)


def channel_spread(pixels: np.ndarray) -> np.ndarray:
    """The largest minus the smallest of the first three channels, `[H, W, C]` -> `[H, W]`; 0 is grey."""
    one, two, three = cv2.split(pixels)[:3]
    return cv2.subtract(cv2.max(cv2.max(one, two), three), cv2.min(cv2.min(one, two), three))


@contextlib.contextmanager
def silence() -> Iterator[list[str]]:
    """Captures what native libraries print to stderr about damaged data; on exit, the list yielded holds the text.

    Affects the whole process, so only for single-threaded code. Output that does not fit into a pipe is lost.
    """
    said: list[str] = []
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    terminal = os.dup(2)
    try:
        os.dup2(theirs, 2)
        yield said
    finally:
        os.dup2(terminal, 2)
        for descriptor in (theirs, terminal):
            os.close(descriptor)
        with open(ours, "rb") as pipe:
            said.append(pipe.read().decode("ascii", "replace"))
