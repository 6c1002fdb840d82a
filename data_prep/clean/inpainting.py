"""Cleans frames: crops to the imaged sector and inpaints the marks that `data_prep/clean/marks.py` finds inside it.

Only the pixels of marks are filled, from their surroundings; no other pixel of the sector changes.
"""

import dataclasses

import cv2
import numpy as np

from data_prep.clean.marks import Regions, extremes, find_marks, over
from data_prep.clean.sector import Sector
from data_prep.readers.clips import COLOUR_SHARE, COLOUR_SPREAD

_FILL = 3  # pixels, radius of inpainting

# The colour rule of the readers: colour this strong has no meaning if it covers less than `COLOUR_SHARE` of a frame.
_SPREAD = round(255 * COLOUR_SPREAD)


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """A frame without annotations.

    Attributes:
      pixels: uint8 `[h, w, 1]` or `[h, w, 3]`, cropped to the bounding box of the sector, 0 outside the sector. One
        channel if any colour in the frame carried no meaning.
      box: left, top, right, bottom of the crop in the frame; right and bottom exclusive.
      removed: number of pixels by kind: "outside" (not black, outside the sector), "text" (grey, shaped like words),
        "graphics" (other grey marks), "colour" (coloured marks, including letters).
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    removed: dict[str, int]


def clean_frame(pixels: np.ndarray, sector: Sector) -> Cleaned:
    """Crops to the sector, blanks what is outside, and fills annotations inside from their surroundings.

    Inpainting follows Bertalmio, Bertozzi and Sapiro (CVPR 2001), as implemented in OpenCV.

    Args:
      pixels: uint8 `[H, W, 1]` or RGB `[H, W, 3]`.
      sector: the sector of this frame or its clip, with a mask of size `[H, W]`.

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
    """Mask of the annotations inside the sector that `clean_frame` would fill: uint8 `[H, W]`, 255 on annotations.

    Raises:
      ValueError: as for `clean_frame`.
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
    """Converts to one channel if the colour other than ink covers too little to carry meaning."""
    if image.shape[2] == 1:
        return image
    spread = cv2.bitwise_and(cv2.absdiff(*extremes(image)), cv2.bitwise_not(ink))
    if cv2.countNonZero(over(spread, _SPREAD)) > COLOUR_SHARE * spread.size:
        return image
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
