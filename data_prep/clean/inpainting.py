"""Cleans frames: crops to the imaged sector and removes text, calipers, rulers, boxes, logos, marks, bars inside it.

Grey ink is what `data_prep/clean/marks.py` finds. Colour is ink when it is a thin stroke, of one colour, or a bar,
that is a rectangle shaded along one axis; colour that varies over an area is Doppler or elastography and stays. Only
the pixels found are filled from around them; no other pixel of the sector changes.
"""

import dataclasses

import cv2
import numpy as np

from data_prep.clean.marks import Regions, grey_ink, over, square
from data_prep.clean.sector import Sector
from data_prep.readers.clips import COLOUR_SHARE, COLOUR_SPREAD

_FILL = 3  # pixels, radius of the fill
_COLOURED = 40  # grey levels between channels, beyond the tint of the frame
_STROKE = 4  # pixels at 600 lines, half the width of the widest coloured stroke
_PLAIN = 20  # grey levels that ink of one colour varies
_INK, _FLOW = 200, 230  # the brightest channel of ink is brighter, that of small flow darker
_SHADED = 9  # grey levels from pixel to pixel along the even axis of a bar, in two channels
_BAR = 300  # pixels at 600 lines: bars are larger
_WIDE = 100  # pixels at 600 lines: labels, logos and bars are narrower

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
    grey, coloured = _find(image, inside)
    regions = Regions(grey, connectivity=8)
    words = regions.only(regions.words())
    counts = {"text": words, "graphics": cv2.subtract(grey, words), "colour": coloured}
    ink = cv2.bitwise_or(grey, coloured)
    image = _meaningful_colour(image, ink)
    if ink.any():
        image = cv2.inpaint(image, ink, _FILL, cv2.INPAINT_NS).reshape(image.shape)
        image[inside == 0] = 0
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
    mask[top:bottom, left:right] = cv2.bitwise_or(*_find(image, inside))
    return mask


def _cropped(pixels, sector):
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"expected uint8 [H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}.")
    if pixels.shape[:2] != sector.mask.shape:
        raise ValueError(f"the frame is {pixels.shape[:2]}, the sector {sector.mask.shape}.")
    left, top, right, bottom = sector.box
    inside = np.ascontiguousarray(sector.mask[top:bottom, left:right])
    image = pixels[top:bottom, left:right].copy()
    image[inside == 0] = 0
    return image, inside


def _extremes(image):
    """Lowest and highest channel of every pixel."""
    channels = cv2.split(image)
    lowest = highest = channels[0]
    for channel in channels[1:]:
        lowest, highest = cv2.min(lowest, channel), cv2.max(highest, channel)
    return lowest, highest


def _lit(image):
    return cv2.countNonZero(_extremes(image)[1])


def _meaningful_colour(image, ink):
    """One channel where the colour apart from ink covers too little to carry meaning."""
    if image.shape[2] == 1:
        return image
    spread = cv2.bitwise_and(cv2.absdiff(*_extremes(image)), cv2.bitwise_not(ink))
    if cv2.countNonZero(over(spread, _SPREAD)) > COLOUR_SHARE * spread.size:
        return image
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]


def _find(image, inside):
    """Grey and coloured ink -> uint8 `[H, W]`, 0 or 255, each."""
    if image.shape[2] == 1:
        nothing = np.zeros_like(inside)
        return grey_ink(np.ascontiguousarray(image[:, :, 0]), inside, nothing), nothing
    coloured, flow = _colours(image)
    other = cv2.bitwise_or(coloured, flow)
    # Colour is dark in one channel, white letters on it are not.
    grey = grey_ink(_extremes(image)[0], inside, other)
    return cv2.subtract(grey, other), cv2.bitwise_and(coloured, inside)


def _colours(image):
    """Coloured ink and colour that is signal -> uint8 `[H, W]`, 0 or 255, each."""
    lowest, highest = _extremes(image)
    coloured = over(cv2.subtract(highest, lowest), _COLOURED)
    ink, flow = np.zeros_like(coloured), np.zeros_like(coloured)
    if coloured.any():
        coloured = cv2.bitwise_and(coloured, _beyond_tint(image))
        left, top, width, height = cv2.boundingRect(coloured)
        part = slice(max(0, top - 4), top + height + 4), slice(max(0, left - 4), left + width + 4)
        scale = max(min(coloured.shape) / 600, 0.6)
        ink[part], flow[part] = _sort_colours(coloured[part].copy(), np.ascontiguousarray(image[part]), scale)
    return ink, flow


def _beyond_tint(image):
    """Where the colour is another than that of a frame shown in sepia or blue."""
    red, green, blue = cv2.split(image)
    base = green[::4, ::4].astype(np.float32)
    lit = base > 40
    beyond = np.zeros_like(green)
    for channel in (red, blue):
        tint = float(np.median(channel[::4, ::4][lit] / base[lit])) if lit.any() else 1.0
        tinted = cv2.convertScaleAbs(green, alpha=min(max(tint, 0.75), 1.33))
        beyond = cv2.max(beyond, cv2.absdiff(channel, tinted))
    return over(beyond, _COLOURED)


def _sort_colours(coloured, image, scale):
    red, green, blue = cv2.split(image)
    highest = cv2.max(cv2.max(red, green), blue)
    stroke = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * round(_STROKE * scale) + 1,) * 2)
    thick = cv2.dilate(cv2.morphologyEx(coloured, cv2.MORPH_OPEN, stroke), square(5))
    thick = cv2.bitwise_and(thick, coloured)
    flow = _varied(thick, highest, green, scale)
    if cv2.countNonZero(flow) <= COLOUR_SHARE * 600**2 * scale**2:
        flow[:] = 0  # too little to carry meaning
    else:
        # Small flow is slow, that is dark, and not green; what is small and bright beside large flow is a spur of it.
        thin = Regions(cv2.subtract(coloured, thick), connectivity=8)
        near = thin.largest(cv2.dilate(flow, square(2 * round(60 * scale) + 1))) > 0
        spur = (thin.size < 40 * scale**2) & (thin.largest(cv2.dilate(flow, square(3))) > 0)
        dark = (thin.largest(highest) < _FLOW) & (thin.mean(over(cv2.subtract(green, cv2.max(red, blue)), 20)) < 128)
        flow = cv2.bitwise_or(flow, thin.only((dark & near) | spur))
    ink = cv2.dilate(cv2.subtract(coloured, flow), square(5))  # compression spreads colour
    return cv2.subtract(ink, flow), flow


def _varied(thick, highest, green, scale):
    """Regions of colour that are neither of one bright colour nor a bar."""
    regions = Regions(thick, connectivity=8)
    place = np.flatnonzero(cv2.erode(thick, square(5)))
    owner = regions.labels.ravel()[place]

    def total(values):
        return np.bincount(owner, values, regions.count)

    number = np.maximum(total(np.ones(len(place))), 1)
    plain, steps = np.ones(regions.count, bool), np.zeros((2, regions.count))
    for channel in (highest, green):
        values, near = channel.ravel()[place].astype(np.float64), np.ones(len(place))
        for limit in (3 * _PLAIN, _PLAIN):  # letters on a label do not count
            centre = total(values * near) / np.maximum(total(near), 1)
            near = np.abs(values - centre[owner]) < limit
        plain &= total(near) > 0.75 * number
        if channel is highest:
            plain &= centre > _INK
        for axis in (0, 1):
            steps[axis] += total(cv2.absdiff(channel, np.roll(channel, 1, axis)).ravel()[place]) / number
    filled = regions.size / (regions.width * regions.height)
    bar = (
        (filled > 0.7)
        & (regions.size > _BAR * scale**2)
        & (steps.min(axis=0) < np.where(filled > 0.79, _SHADED, _SHADED / 2))
    )
    narrow = np.minimum(regions.width, regions.height) < _WIDE * scale
    return regions.only(~(narrow & (plain | bar)))
