"""What the readers share: which frames of a file are taken, their largest size, when colour is kept, and silence."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import cv2
import numpy as np

from data_prep.readers.base import UNKNOWN_SPACING, Frame, Options, UnreadableError

MAX_PIXELS = 50_000_000  # of one frame

#: For `Frame.warnings`, whatever the kind of file.
WRONG_COUNT = "the header says another number of frames than there are, or none; those that are there were taken"

# Colour carries meaning (Doppler, elastography) when more than this share of the pixels has channels that differ by
# more than this much of the range. Tinted B-mode stays below 45 / 255, and calipers and logos below 1 pixel in 1000.
COLOUR_SHARE = 0.001
COLOUR_SPREAD = 48 / 255
_DECIDING = 8  # frames of a clip that say whether it has colour; fewer if they have more bytes than this
_DECIDING_BYTES = 64 << 20

Boxes = tuple[tuple[int, int, int, int], ...]
_Item = TypeVar("_Item")


def chosen(count: int, options: Options) -> Sequence[int]:
    """Which of `count` frames are taken, ascending.

    Every `stride`-th from the first; if these are more than `max_frames`, the middles of `max_frames` equal parts of
    them, since volumes begin and end with little to see.
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
    """Makes the pictures of one clip or volume frames: all of them grey, or all colour.

    Colour is kept if one of the first 8 pictures (of the first 64 MiB, if these are fewer) has colour that carries
    meaning. Frame by frame, a clip would change between grey and colour as Doppler comes and goes with the heartbeat.

    Args:
      pictures: (number in the file, uint8 or uint16 `[H, W]`, `[H, W, 1]` or RGB `[H, W, 3]`); consumed as needed, one
        by one if they are `[H, W]`, which all are then.
      boxes: regions that are asked for colour, as in `Frame`; whole pictures if there are none.
      warnings: see `Frame`; may grow until the first picture is there.
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
    """The first items of an iterator, until they are `enough`, and those that follow.

    An UnreadableError among the first is raised by what follows, so that the sound ones before it are not lost.
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
    """Keeps off the terminal what native libraries print about damaged data; at the end, the list holds it.

    Of the whole process, so for code that runs in one thread. What does not fit into a pipe is lost.
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
