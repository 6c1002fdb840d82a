"""Finds marks burnt into a frame ("ink"): letters, calipers, rulers, boxes, discs, bars, logos.

Grey ink differs from tissue in three ways, each measured relative to the surrounding tissue, so that contrast and zoom
matter little:

- Sharp: speckle and interfaces are as wide as pulse and beam, but the edges of ink are one pixel wide. The Laplacian
  of ink is several times the value usual nearby.
- Bright: log-compressed speckle has a short upper tail; hardly a pixel of a Rayleigh envelope is 12 dB above its mean.
- Coherent: in ink, most pixels that are fairly sharp and bright are very sharp and bright; at an interface few are.

A frame has only a few ink levels, so lower thresholds apply to pixels as bright as ink that is already certain. Regions
enclosed by outlines are ink too if they are flat, or shaded along one axis only: discs, labels, bars.

Colour is ink if it is a thin stroke, of a single colour, or a bar, which is a rectangle shaded along one axis; colour
that varies over an area is Doppler or elastography and is kept.

The thresholds were chosen on phantoms and public frames; `benchmarks/deannotation.py` evaluates them on others.
"""

import functools

import cv2
import numpy as np

from data_prep.readers.clips import COLOUR_SHARE

# Thresholds (factor, offset, contrast, least): the Laplacian exceeds factor times its usual value nearby plus offset;
# the brightest of a pixel and its neighbours exceeds both the local mean plus contrast and least. In grey levels.
_RATHER = 1.5, 30, 40, 90
_VERY = 2.0, 75, 50, 120
_ALIKE = 2.0, 50, 40, 120  # for pixels as bright as ink that is certain
_SOMEWHAT = 1.0, 20, 35, 80  # in a line of letters
_BEGUN = 0.4  # share of such a line that must be found already
_AROUND = 15  # pixels, width of the window in which ink is coherent
_COHERENT = 0.3  # share of the rather sharp and bright pixels there that are very sharp and bright
_LEAST = 9  # such pixels, in all
# The number of `very` pixels needed for each number of `rather` pixels; uint8 like the sums, rounded as when measured.
_SUMS = 255 * np.arange(256, dtype=np.float32)
_ENOUGH = np.clip((_SUMS[:, None] < _COHERENT * _SUMS).sum(axis=0), _LEAST, 255).astype(np.uint8)
_SAME = 4  # grey levels, largest difference between pixels of one ink
_MUCH = 0.15  # share of the certain ink that makes a grey level an ink
_CELL, _USUAL = 4, 11  # usual values are measured in 11 x 11 cells of 4 x 4 pixels
_FACE = 10  # rows, the thickest line that the face of a probe leaves
_BLACK = 8  # tissue is brighter
_LABEL = 0.15  # of the shorter side: discs, labels and bars are narrower
_BLOCK = 8  # pixels, side of the blocks in which outlines far from each other are separated
_FLAT = 4  # grey levels per 2 pixels
_SURROUNDED = 0.4  # share of the rim of a flat region that is ink
_COLOURED = 40  # grey levels between channels, beyond the tint of the frame
_STROKE = 4  # pixels at 600 lines, half the width of the widest coloured stroke
_PLAIN = 20  # grey levels by which ink of one colour varies
_INK, _FLOW = 200, 230  # the brightest channel of ink is above the first, that of small flow below the second
_SHADED = 9  # grey levels from pixel to pixel along the even axis of a bar, in two channels
_BAR = 300  # pixels at 600 lines: bars are larger
_WIDE = 100  # pixels at 600 lines: labels, logos and bars are narrower


def square(side: int) -> np.ndarray:
    """Square structuring element, uint8 `[side, side]`."""
    return np.ones((side, side), np.uint8)


def over(values: np.ndarray, limit: float) -> np.ndarray:
    """Mask of where uint8 values exceed a limit: uint8, 0 or 255."""
    return cv2.threshold(values, limit, 255, cv2.THRESH_BINARY)[1]


def _grey_ink(level: np.ndarray, inside: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Ink in one channel.

    Args:
      level: uint8 `[H, W]`.
      inside: uint8 `[H, W]`, 0 or 255: the sector.
      other: uint8 `[H, W]`, 0 or 255: colour, which is ignored.

    Returns:
      uint8 `[H, W]`, 255 on ink and one pixel around it.
    """
    height, width = level.shape
    tissue = _without_fringe(level, inside)
    domain = cv2.erode(tissue, square(7), borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    tissue = cv2.bitwise_and(tissue, cv2.bitwise_not(other))
    cells = -(-width // _CELL), -(-height // _CELL)
    weight = cv2.resize(tissue, cells, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    mean = _usual(level, tissue, weight, 1.25)

    def full(cells):
        return cv2.resize(np.clip(cells, 0, 250).astype(np.uint8), (width, height))

    # Pixels outside the tissue are set to the usual level at its rim; the step that remains is outside the domain.
    filled = cv2.bitwise_or(cv2.bitwise_and(level, tissue), cv2.bitwise_and(full(mean), cv2.bitwise_not(tissue)))
    edge = cv2.convertScaleAbs(cv2.Laplacian(filled, cv2.CV_16S))
    usual = _usual(edge, tissue, weight, 2.0)
    sharpness, brightness = cv2.dilate(edge, square(3)), cv2.dilate(filled, square(3))

    def above(factor, offset, contrast, least):
        sharp = cv2.compare(sharpness, full(factor * usual + offset), cv2.CMP_GT)
        bright = cv2.compare(brightness, full(np.maximum(mean + contrast, least)), cv2.CMP_GT)
        return cv2.bitwise_and(cv2.bitwise_and(sharp, bright), domain)

    very = above(*_VERY)
    rather = cv2.bitwise_or(above(*_RATHER), very)
    # A pixel is coherent if enough of the `rather` pixels around it are `very` pixels.
    enough = cv2.LUT(_around(rather), _ENOUGH)
    inks = _inks(brightness, cv2.bitwise_and(very, cv2.compare(_around(very), enough, cv2.CMP_GE)))
    if inks.any():
        very = cv2.bitwise_or(very, cv2.bitwise_and(above(*_ALIKE), cv2.LUT(brightness, inks)))
    coherent = cv2.compare(_around(very), enough, cv2.CMP_GE)
    mask = cv2.bitwise_and(cv2.bitwise_and(rather, cv2.dilate(very, square(7))), coherent)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, square(5))
    if not mask.any():
        return mask
    mask = _finished_words(mask, cv2.bitwise_or(mask, above(*_SOMEWHAT)))
    # On the rim, edges are no evidence: there, pixels are ink if they are near ink and as bright as it.
    rim = cv2.bitwise_and(cv2.subtract(inside, domain), cv2.dilate(mask, square(_AROUND)))
    rim = cv2.bitwise_and(rim, cv2.compare(level, full(mean + 60), cv2.CMP_GT))
    mask = cv2.bitwise_or(mask, cv2.bitwise_and(rim, cv2.LUT(level, inks)))
    mask = cv2.bitwise_or(mask, _enclosed(mask, filled, full(np.maximum(mean + 25, 60))))
    _spare_the_probe(mask)
    return cv2.bitwise_and(cv2.dilate(mask, square(3)), inside)


def _finished_words(mask, candidates):
    """Completes lines of letters that were found in part."""
    lines = cv2.morphologyEx(candidates, cv2.MORPH_CLOSE, np.ones((3, 15), np.uint8))
    regions = Regions(lines, connectivity=8)
    begun = regions.mean(mask) > 255 * _BEGUN
    return cv2.bitwise_or(mask, cv2.bitwise_and(candidates, regions.only(regions.words() & begun)))


def _spare_the_probe(mask):
    """Clears, in place, a line along the top of the sector, which is the face of a linear probe."""
    top = mask[: max(8, len(mask) // 25)]
    rows = np.flatnonzero(np.count_nonzero(top, axis=1) > 0.5 * mask.shape[1])
    if rows.size <= _FACE:
        top[rows] = 0


def _without_fringe(level, inside):
    """The sector without the black fringe that a loose outline leaves around tissue; black areas inside are kept."""
    body = cv2.morphologyEx(over(level, _BLACK), cv2.MORPH_CLOSE, square(5))
    body = cv2.morphologyEx(body, cv2.MORPH_OPEN, square(13))
    outlines, _ = cv2.findContours(body, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(body, outlines, -1, (255,), cv2.FILLED)
    fringe = cv2.subtract(cv2.dilate(body, square(9)), body)
    return cv2.bitwise_and(inside, cv2.bitwise_not(fringe))


def _usual(values, inside, weight, limit):
    """Mean of uint8 `values` around each cell, with values far above it clipped: float32, one value per cell.

    `weight` is the fraction of each cell that is inside.
    """
    size = weight.shape[::-1]
    cells = cv2.resize(cv2.bitwise_and(values, inside), size, interpolation=cv2.INTER_AREA).astype(np.float32)
    share = cv2.blur(weight, (_USUAL, _USUAL)) + 1e-3
    mean = cv2.blur(cells, (_USUAL, _USUAL)) / share
    for _ in range(2):
        mean = cv2.blur(np.minimum(cells, limit * mean * weight), (_USUAL, _USUAL)) / share
    return mean


def _around(mask):
    """Number of mask pixels in the window around each pixel, uint8."""
    return cv2.boxFilter(mask & 1, cv2.CV_8U, (_AROUND, _AROUND), normalize=False)


def _inks(brightness, certain):
    """Lookup table of the grey levels that are common in certain ink: uint8 `[256]`, 0 or 255."""
    counts = cv2.calcHist([brightness], [0], certain, [256], [0, 256]).ravel()
    window = np.ones(2 * _SAME + 1)
    inks = np.convolve(counts, window, "same") >= max(_MUCH * counts.sum(), 60)
    inks = np.convolve(inks & (counts > 0), window, "same") > 0
    return np.where(inks, np.uint8(255), np.uint8(0))


def _enclosed(mask, level, bright):
    """Regions enclosed by outlines in `mask` that are flat, or shaded along one axis, and unlike their surroundings."""
    side = max(3, round(_LABEL * min(mask.shape)))
    found = np.zeros_like(mask)
    for part, outlines in _groups(mask, side):
        found[part] = cv2.bitwise_or(found[part], _enclosed_by(outlines, level[part], bright[part], side))
    return found


def _groups(mask, side):
    """Parts of a mask farther than `side` apart: yields the slices of each, with a margin, and its mask there."""
    blocks = np.ascontiguousarray(cv2.dilate(mask, square(_BLOCK), anchor=(0, 0))[::_BLOCK, ::_BLOCK])
    near = cv2.dilate(blocks, square(2 * (side // (2 * _BLOCK) + 2) + 1))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(near, connectivity=8)
    for number, (left, top, wide, high, _) in enumerate(stats[1:], 1):
        part = np.s_[_BLOCK * top : _BLOCK * (top + high), _BLOCK * left : _BLOCK * (left + wide)]
        own = np.where(labels[top : top + high, left : left + wide] == number, np.uint8(255), np.uint8(0))
        own = own.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)
        height, width = mask[part].shape
        yield part, cv2.bitwise_and(mask[part], own[:height, :width])


def _enclosed_by(mask, level, bright, side):
    between = cv2.subtract(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, square(side)), mask)
    apart = cv2.bitwise_not(cv2.dilate(mask, square(3)))  # ignores the step at the outline
    across, down = cv2.absdiff(level[:, 2:], level[:, :-2]), cv2.absdiff(level[2:], level[:-2])
    across = cv2.bitwise_and(cv2.copyMakeBorder(across, 0, 0, 1, 1, cv2.BORDER_REPLICATE), apart)
    down = cv2.bitwise_and(cv2.copyMakeBorder(down, 1, 1, 0, 0, cv2.BORDER_REPLICATE), apart)
    # A closed outline may enclose the dark end of a bar; if it has gaps, only bright, flat regions belong to it.
    regions = Regions(between)
    closed = regions.share_of_rim(mask) >= 0.95
    closed &= np.minimum(regions.mean(across), regions.mean(down)) < _FLAT
    closed &= (regions.mean(cv2.subtract(level, bright)) > 15) | (regions.deviation(level) > 40)
    uneven = over(cv2.min(cv2.blur(across, (3, 3)), cv2.blur(down, (3, 3))), _FLAT)
    flat = cv2.bitwise_and(cv2.subtract(between, uneven), cv2.compare(level, bright, cv2.CMP_GT))
    others = Regions(flat)
    return cv2.bitwise_or(regions.only(closed), others.only(others.share_of_rim(mask) >= _SURROUNDED))


def extremes(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum over the channels of every pixel, uint8 `[H, W]` each."""
    channels = cv2.split(image)
    lowest = highest = channels[0]
    for channel in channels[1:]:
        lowest, highest = cv2.min(lowest, channel), cv2.max(highest, channel)
    return lowest, highest


def find_marks(image: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grey and coloured ink in a sector.

    Args:
      image: uint8 `[H, W, 1]` or RGB `[H, W, 3]`.
      inside: uint8 `[H, W]`, 0 or 255: the sector.

    Returns:
      uint8 `[H, W]`, 0 or 255, each; no pixel is in both.
    """
    if image.shape[2] == 1:
        nothing = np.zeros_like(inside)
        return _grey_ink(np.ascontiguousarray(image[:, :, 0]), inside, nothing), nothing
    coloured, flow = _colours(image)
    other = cv2.bitwise_or(coloured, flow)
    # Colour is dark in one channel; white letters on it are not.
    grey = _grey_ink(extremes(image)[0], inside, other)
    return cv2.subtract(grey, other), cv2.bitwise_and(coloured, inside)


def _colours(image):
    """Masks of coloured ink and of colour that is signal: uint8 `[H, W]`, 0 or 255, each."""
    lowest, highest = extremes(image)
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
    """Mask of colour other than the tint of a frame that is displayed in sepia or blue."""
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
        # Small flow is slow, so dark, and not green; a small bright region next to large flow is a spur of it.
        thin = Regions(cv2.subtract(coloured, thick), connectivity=8)
        near = thin.largest(cv2.dilate(flow, square(2 * round(60 * scale) + 1))) > 0
        spur = (thin.size < 40 * scale**2) & (thin.largest(cv2.dilate(flow, square(3))) > 0)
        dark = (thin.largest(highest) < _FLOW) & (thin.mean(over(cv2.subtract(green, cv2.max(red, blue)), 20)) < 128)
        flow = cv2.bitwise_or(flow, thin.only((dark & near) | spur))
    ink = cv2.dilate(cv2.subtract(coloured, flow), square(5))  # compression spreads colour
    return cv2.subtract(ink, flow), flow


def _varied(thick, highest, green, scale):
    """Mask of colour regions that are neither of a single bright colour nor a bar."""
    regions = Regions(thick, connectivity=8)
    place = np.flatnonzero(cv2.erode(thick, square(5)))
    owner = regions.labels.ravel()[place]

    def total(values):
        return np.bincount(owner, values, regions.count)

    number = np.maximum(total(np.ones(len(place))), 1)
    plain, steps = np.ones(regions.count, bool), np.zeros((2, regions.count))
    for channel in (highest, green):
        values, near = channel.ravel()[place].astype(np.float64), np.ones(len(place))
        for limit in (3 * _PLAIN, _PLAIN):  # ignores letters on a label
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


class Regions:
    """Connected regions of a mask. Most methods take time proportional to the few pixels of the mask.

    Attributes:
      count: N, the number of regions including the background, which is region 0.
      labels: int32 `[H, W]`, the number of each pixel's region.
      size: int64 `[N]`, in pixels.
    """

    def __init__(self, mask: np.ndarray, connectivity: int = 4):
        # OpenCV's own statistics visit every pixel, which takes seven times as long.
        self.count, self.labels = cv2.connectedComponents(mask, connectivity=connectivity)
        self._place = np.flatnonzero(mask != 0)
        self._owner = self.labels.ravel()[self._place].astype(np.int64)
        self.size = np.bincount(self._owner, minlength=self.count)
        self.size[0] = mask.size - len(self._place)

    @functools.cached_property
    def height(self) -> np.ndarray:
        """Height of each region in pixels, int64 `[N]`."""
        return self._extent(self._place // self.labels.shape[1])

    @functools.cached_property
    def width(self) -> np.ndarray:
        """Width of each region in pixels, int64 `[N]`."""
        return self._extent(self._place % self.labels.shape[1])

    def _extent(self, along: np.ndarray) -> np.ndarray:
        first, last = np.full(self.count, self.labels.size), np.zeros(self.count, np.int64)
        np.minimum.at(first, self._owner, along)
        np.maximum.at(last, self._owner, along)
        return np.maximum(last - first + 1, 1)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of the values in each region."""
        return self._mean(values.ravel()[self._place])

    def deviation(self, values: np.ndarray) -> np.ndarray:
        """Standard deviation of the values in each region."""
        found = values.ravel()[self._place].astype(np.float32)
        return np.sqrt(np.maximum(self._mean(found**2) - self._mean(found) ** 2, 0))

    def _mean(self, found: np.ndarray) -> np.ndarray:
        return np.bincount(self._owner, found, self.count) / self.size

    def largest(self, values: np.ndarray) -> np.ndarray:
        """The largest value in each region."""
        found = np.zeros(self.count)
        np.maximum.at(found, self._owner, values.ravel()[self._place])
        return found

    def share_of_rim(self, mask: np.ndarray) -> np.ndarray:
        """Fraction of the pixels just outside each region that are in `mask`."""
        inside = np.where(self.labels > 0, np.uint8(255), np.uint8(0))
        rim = np.flatnonzero(cv2.subtract(cv2.dilate(inside, square(3)), inside) != 0)
        height, width = self.labels.shape
        row, column = divmod(rim, width)
        rows = np.maximum(row - 1, 0), row, np.minimum(row + 1, height - 1)
        columns = np.maximum(column - 1, 0), column, np.minimum(column + 1, width - 1)
        owner = np.max([self.labels[row, column] for row in rows for column in columns], axis=0)
        inked = np.bincount(owner, mask.ravel()[rim] > 0, self.count)
        return inked / np.maximum(np.bincount(owner, minlength=self.count), 1)

    def words(self) -> np.ndarray:
        """Which regions are shaped like words, low and wide: bool `[N]`."""
        low = (self.height >= 8) & (self.height < 0.1 * min(self.labels.shape))
        return low & (self.width > 1.5 * self.height)

    def only(self, chosen: np.ndarray) -> np.ndarray:
        """Mask of the regions chosen by a bool `[N]`: uint8 `[H, W]`, 0 or 255."""
        mask = np.zeros(self.labels.shape, np.uint8)
        mask.ravel()[self._place[chosen[self._owner]]] = 255
        return mask
