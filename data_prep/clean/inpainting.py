"""Cleans frames: crops to the imaged sector and fills what `data_prep/clean/marks.py` finds inside it.

Only the pixels found are filled from around them; no other pixel of the sector changes.
"""

import dataclasses

import cv2
import numpy as np

from data_prep.clean.marks import Regions, extremes, find_marks, over
from data_prep.clean.sector import Sector
from data_prep.readers.clips import COLOUR_SHARE, COLOUR_SPREAD

_FILL = 3  # pixels, radius of the fill

# The colour rule of the readers: less colour than `COLOUR_SHARE` of the frame, as strong as this, carries no meaning.
_SPREAD = round(255 * COLOUR_SPREAD)


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """A frame without annotations.

    Attributes:
      pixels: uint8 `[h, w, 1]` or `[h, w, 3]`, cropped to the bounding box of the sector, 0 outside the sector. One
        channel if what colour there was did not carry meaning.
      box: left, top, right, bottom of the crop in the frame; right and bottom exclusive.
      removed: how many pixels, by kind: "outside" (not black, beyond the sector), "text" (grey, in the shape of words),
        "graphics" (other grey marks), "colour" (coloured marks, letters too).
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    removed: dict[str, int]


def clean_frame(pixels: np.ndarray, sector: Sector) -> Cleaned:
    """Crops to the sector, blanks what is outside, and fills annotations inside from around them.

    The fill follows Bertalmio, Bertozzi and Sapiro (CVPR 2001), as OpenCV has it.

    Args:
      pixels: uint8 `[H, W, 1]` or RGB `[H, W, 3]`.
      sector: of this frame or its clip, of the same size.

    Raises:
      ValueError: the sizes differ, or the frame is not uint8 with one or three channels.
    """
    image, inside = _cropped(pixels, sector)
    outside = _lit(pixels) - _lit(image)
    grey, coloured = find_marks(image, inside)
    regions = Regions(grey, connectivity=8)
    words = regions.only(regions.words())
    counts = {"text": words, "graphics": cv2.subtract(grey, words), "colour": coloured}
    ink = cv2.bitwise_or(grey, coloured)
    image = _meaningful_colour(image, ink)
    if ink.any():
        image = _blanked(cv2.inpaint(image, ink, _FILL, cv2.INPAINT_NS).reshape(image.shape), inside)
    removed = {"outside": outside} | {kind: cv2.countNonZero(mask) for kind, mask in counts.items()}
    return Cleaned(image, sector.box, removed)


def overlay_mask(pixels: np.ndarray, sector: Sector) -> np.ndarray:
    """The annotations inside the sector that `clean_frame` would fill -> uint8 `[H, W]`, 255 where there are some.

    Raises:
      ValueError: as `clean_frame`.
    """
    image, inside = _cropped(pixels, sector)
    left, top, right, bottom = sector.box
    mask = np.zeros(pixels.shape[:2], np.uint8)
    mask[top:bottom, left:right] = cv2.bitwise_or(*find_marks(image, inside))
    return mask


def _cropped(pixels, sector):
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"expected uint8 [H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}.")
    if pixels.shape[:2] != sector.mask.shape:
        raise ValueError(f"the frame is {pixels.shape[:2]}, the sector {sector.mask.shape}.")
    left, top, right, bottom = sector.box
    inside = np.ascontiguousarray(sector.mask[top:bottom, left:right])
    return _blanked(np.ascontiguousarray(pixels[top:bottom, left:right]), inside), inside


def _blanked(image, inside):
    return cv2.bitwise_and(image, image, mask=inside).reshape(image.shape)


def _lit(image):
    return cv2.countNonZero(extremes(image)[1])


def _meaningful_colour(image, ink):
    """One channel where the colour apart from ink covers too little to carry meaning."""
    if image.shape[2] == 1:
        return image
    spread = cv2.bitwise_and(cv2.absdiff(*extremes(image)), cv2.bitwise_not(ink))
    if cv2.countNonZero(over(spread, _SPREAD)) > COLOUR_SHARE * spread.size:
        return image
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
