"""Finds the imaged sector of a frame: the fan, rectangle or trapezoid of tissue on a screen with text, bars and logos.

Tissue is speckle: nowhere flat, almost everywhere a little brighter than the screen background, and wide. Letters,
rulers and grey bars are thin; boxes and headers are flat. So pixels that are neither flat nor of the background level
are counted in a window wider than a letter; where they fill most of the window, there is tissue. The sector is the
convex hull of that, since every scan geometry is convex except at the face of a curved probe. For a clip, the maximum
of every pixel over time is used, and of two candidates the moving one is tissue.

If the sector found is not trusted, the whole frame is used: a leftover mark does less harm than tissue cut off.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from data_prep.clean.marks import over, square

Box = tuple[int, int, int, int]

_WORK = 320  # pixels, longer side of the reduced image that is searched
_WINDOW = 9  # pixels of that image: 3% of the frame, wider than letters and bars
_DENSE = 0.6  # share of the window that tissue fills
_ABOVE = 2  # grey levels by which even the darkest tissue differs from the screen background
_FLAT = 1  # grey levels, largest range within 3 x 3 pixels of graphics or background
_MOVED = 12  # grey levels, smallest change over time that counts as motion
_SMALLEST = 0.03  # of the frame: anything smaller is not a sector
_FILLED = 0.2  # of the hull: anything less is scattered
_WHOLE = 0.97  # of the frame: anything more leaves nothing to cut
_RECTANGLE = 0.96  # of the width of the bounding box
_RIM = {"fan": 2, "linear": 0}  # pixels: the corners of pixels along a slanted side are tissue
_SPARSE = 0.03  # of a row or column: with more of it lit, it is not background
_STROKE, _BLACK = 60, 16  # grey levels: letters exceed the background by more than 60, and it stays below 16


@dataclasses.dataclass(frozen=True)
class Sector:
    """The part of a frame that shows tissue.

    Attributes:
      mask: uint8 `[H, W]`, 255 in the sector and 0 outside.
      box: left, top, right, bottom of the mask in pixels; right and bottom exclusive.
      kind: "fan" (also a trapezoid), "linear" (a rectangle), "declared" (within regions that the file declares) or
        "whole" (the sector fills the frame, or nothing better was found).
      trusted: whether it was found or declared; False if the whole frame is only the fallback.
    """

    mask: np.ndarray
    box: Box
    kind: str
    trusted: bool


def find_sector(frames: Sequence[np.ndarray], boxes: Sequence[Box] = ()) -> Sector:
    """The imaged sector shared by the frames of one clip.

    Args:
      frames: uint8 `[H, W]` or `[H, W, C]`, all of one size: a still, or a few frames of a clip.
      boxes: regions that the file declares, as (left, top, right, bottom), right and bottom exclusive. The sector is
        searched for in each. One that extends beyond the frame describes another picture and is ignored.

    Raises:
      ValueError: there are no frames, or they differ in size.
    """
    if not frames or len({frame.shape[:2] for frame in frames}) != 1:
        raise ValueError("frames must be one or more pictures of one size.")
    height, width = frames[0].shape[:2]
    brightest, moved = _over_time(frames)
    boxes = [box for box in boxes if 0 <= box[0] < box[2] <= width + 1 and 0 <= box[1] < box[3] <= height + 1]
    if not boxes:
        polygon, kind = _search(brightest, moved)
        if polygon is None:
            return Sector(np.full((height, width), 255, np.uint8), (0, 0, width, height), "whole", kind == "whole")
        mask = _draw(polygon, (height, width), _RIM[kind])
    else:
        mask, kind = np.zeros((height, width), np.uint8), "declared"
        for left, top, right, bottom in boxes:
            inside = brightest[top:bottom, left:right]
            polygon, shape = _search(inside, None if moved is None else moved[top:bottom, left:right])
            part = np.full_like(inside, 255) if polygon is None else _draw(polygon, inside.shape, _RIM[shape])
            mask[top:bottom, left:right] |= part
    left, top, wide, high = cv2.boundingRect(mask)
    return Sector(mask, (left, top, left + wide, top + high), kind, True)


def _over_time(frames):
    """Maximum over channels and time of every pixel, and where it changed (None for a still): uint8 `[H, W]` each."""
    greys = [_brightest_channel(frame) for frame in frames]
    top, bottom = greys[0], greys[0]
    for grey in greys[1:]:
        top, bottom = cv2.max(top, grey), cv2.min(bottom, grey)
    moved = over(cv2.subtract(top, bottom), _MOVED) if len(greys) > 1 else None
    return top, moved


def _brightest_channel(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 1:
        return np.ascontiguousarray(pixels[:, :, 0])
    first, second, third = cv2.split(pixels)
    return cv2.max(cv2.max(first, second), third)


def _draw(polygon, shape, beyond=0):
    """Mask of the polygon, enlarged by `beyond` pixels: uint8 of shape `shape`, 0 or 255."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(mask, polygon, (255,))
    return cv2.dilate(mask, square(2 * beyond + 1)) if beyond else mask


def _search(picture, moved):
    """Polygon of the sector in full-size pixels, int32 `[N, 1, 2]`, and its kind; (None, "whole" or "") = the frame."""
    height, width = picture.shape
    if min(height, width) < 2 * _WINDOW:
        return None, ""
    lit, speckle, small = _speckle(picture)
    wanted = _wanted(small, moved)
    if wanted is None:
        return None, ""
    near = _draw(_hull(wanted), wanted.shape)
    if np.count_nonzero(wanted) < _FILLED * np.count_nonzero(near):
        return None, ""
    # The reduced image shows what is tissue, the full-size one where it ends, to the pixel.
    near = cv2.resize(cv2.dilate(near, square(7)), (width, height), interpolation=cv2.INTER_NEAREST)
    found = cv2.morphologyEx(cv2.bitwise_and(near, speckle), cv2.MORPH_OPEN, square(3))
    if not found.any():
        return None, ""
    hull = _hull(found)
    area = np.count_nonzero(_draw(hull, picture.shape))
    left, top, wide, high = cv2.boundingRect(hull)
    if area < _SMALLEST * picture.size:
        return None, ""
    if not _upright(hull, picture.shape):
        hull = _mirrored(hull, picture.shape)
        if np.count_nonzero(_draw(hull, picture.shape)) >= _WHOLE * picture.size:
            return None, "whole"
        return hull, "fan"
    lit = lit[top : top + high, left : left + wide]
    (first, last), (upper, lower) = _trim(lit, 0), _trim(lit, 1)
    left, right, top, bottom = left + first, left + last, top + upper, top + lower
    # Tissue continues beyond a ruler, and in the far field, where hardly any of it is lit.
    columns = np.count_nonzero(speckle[top:bottom], axis=0) > 0.5 * (bottom - top)
    left, right = left - _further(columns[:left][::-1], wide // 10), right + _further(columns[right:], wide // 10)
    rows = np.count_nonzero(speckle[:, left:right], axis=1) > _SPARSE * (right - left)
    bottom += _further(rows[bottom:], max(2, wide // 50))
    if (right - left) * (bottom - top) >= _WHOLE * picture.size:
        return None, "whole"
    corners = [[left, top], [right - 1, top], [right - 1, bottom - 1], [left, bottom - 1]]
    return np.array(corners, np.int32)[:, None], "linear"


def _rows(hull, shape):
    """First and last column of the hull in each of its rows -> int `[R]`, `[R]`."""
    mask = _draw(hull, shape).astype(bool)
    mask = mask[mask.any(axis=1)]
    return mask.argmax(axis=1), shape[1] - 1 - mask[:, ::-1].argmax(axis=1)


def _upright(hull, shape):
    """Whether the hull is a rectangle, or one whose lower corners are too dark to be seen."""
    first, last = _rows(hull, shape)
    upper = slice(len(first) // 20, len(first) // 3 + 1)
    return (last[upper] - first[upper]).min() >= _RECTANGLE * (last.max() - first.min())


def _mirrored(hull, shape):
    """Hull of `hull` and its mirror image, since a fan is symmetric but one of its sides may be dark."""
    first, last = _rows(hull, shape)
    upper = slice(len(first) // 20, len(first) * 2 // 5 + 1)
    seen = (first[upper] > 1) & (last[upper] < shape[1] - 2)  # not cut off by the frame
    if not seen.any():
        return hull
    middle = float(np.median((first[upper] + last[upper])[seen]))
    other = hull.copy()
    other[..., 0] = np.clip(np.rint(middle - hull[..., 0]), 0, shape[1] - 1)
    return cv2.convexHull(np.concatenate([hull, other]))


def _speckle(picture):
    """Masks of lit pixels, of pixels that look like tissue, and the latter in the reduced image: uint8, 0 or 255."""
    height, width = picture.shape
    shrink = max(1.0, max(height, width) / _WORK)
    # The background is the level of most of the picture's rim, else black: a frame without margins has tissue there.
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    counts = np.bincount(rim, minlength=256)
    screen = int(counts.argmax()) if counts.max() > rim.size / 2 else 0
    differs = over(cv2.absdiff(picture, np.full_like(picture, screen)), _ABOVE)
    darkest, lightest = cv2.erode(picture, square(3)), cv2.dilate(picture, square(3))
    uneven = over(cv2.subtract(lightest, darkest), _FLAT)
    # Thin bright strokes on black are letters; neither they nor the compression artefacts around them are tissue.
    opened = cv2.morphologyEx(picture, cv2.MORPH_OPEN, square(5))
    letters = over(cv2.subtract(picture, opened), _STROKE)
    letters = cv2.subtract(letters, over(opened, _BLACK))
    letters = cv2.dilate(letters, square(9))
    speckle = cv2.bitwise_and(cv2.bitwise_and(differs, uneven), cv2.bitwise_not(letters))
    size = max(1, round(width / shrink)), max(1, round(height / shrink))
    return differs, speckle, over(cv2.resize(speckle, size, interpolation=cv2.INTER_AREA), 96)


def _wanted(small, moved):
    """The parts of the reduced image that belong to the sector, uint8, 0 or 1; None if there are none."""
    # Bars are thin once the gaps between speckles are closed.
    solid = cv2.morphologyEx(small, cv2.MORPH_CLOSE, square(5), borderType=cv2.BORDER_REPLICATE)
    solid = cv2.morphologyEx(solid, cv2.MORPH_OPEN, square(_WINDOW), borderType=cv2.BORDER_REPLICATE)
    share = cv2.blur(cv2.min(small, solid), (_WINDOW, _WINDOW), borderType=cv2.BORDER_REPLICATE)
    dense = over(share, 255 * _DENSE)
    count, labels = cv2.connectedComponents(dense, connectivity=8)
    if count < 2:
        return None
    weight = np.bincount(labels.ravel())[1:].astype(np.float64)
    if moved is not None:
        motion = cv2.resize(moved, dense.shape[::-1], interpolation=cv2.INTER_AREA)
        share = np.bincount(labels.ravel(), weights=motion.ravel() > 0, minlength=count)[1:] / weight
        weight *= np.where((share > 0.02) | (share.max() <= 0.02), 1.0, 0.05)
    # A shadow may cut off half of a sector; small separate pieces are logos and bars.
    keep = np.concatenate([[False], weight >= 0.1 * weight.max()])
    return keep[labels].astype(np.uint8)


def _hull(mask):
    """Convex hull of the nonzero pixels, computed from the ends of each row."""
    rows = np.flatnonzero(mask.any(axis=1))
    first = mask[rows].astype(bool).argmax(axis=1)
    last = mask.shape[1] - 1 - mask[rows, ::-1].astype(bool).argmax(axis=1)
    ends = np.concatenate([np.stack([first, rows], axis=1), np.stack([last, rows], axis=1)])
    return cv2.convexHull(ends.astype(np.int32))


def _further(lines, gap):
    """Number of lines up to the last True that can be reached across gaps of fewer than `gap` False lines."""
    total = 0
    while (following := np.flatnonzero(lines[:gap])).size:
        step = int(following[-1]) + 1
        total, lines = total + step, lines[step:]
    return total


def _trim(lit, axis):
    """First and last line, less what a dark line near an end cuts off: a ruler or grey bar beside a rectangle."""
    share = np.count_nonzero(lit, axis=axis) / lit.shape[axis]
    edge = max(1, len(share) // 20)

    def behind(share):
        dark = np.flatnonzero(share[:edge] <= _SPARSE)
        cut = int(dark.max(initial=-1)) + 1
        return cut if share[:cut].sum() < 0.5 * cut else 0  # tissue continues beyond the dark outline of a ruler

    return behind(share), len(share) - behind(share[::-1])
