"""Annotations to masks: drawn as images, as outlines that have to be filled, or as lists of polygon corners."""

import json
import math
import os
import pathlib
from typing import Any

import cv2
import numpy as np

from data_prep.readers import IMAGES, UnreadableError, read_mask, volumes
from data_prep.readers.clips import check_size
from data_prep.readers.images import image_size, load

FOREGROUND = 255
_THRESHOLD = 127  # of masks that were stored as JPEG or drawn with soft edges
_MAX_BYTES = 64 << 20
_MAX_CORNERS = 1_000_000


def read_mask_as(kind: str, path: str | os.PathLike[str], shape: tuple[int, int]) -> np.ndarray:
    """Reads an annotation as a mask of the image it belongs to.

    Args:
      kind: "image", numbers as they are stored, in an image or a volume of one slice; "binary", an image in which what
        is lighter than half of the range, in any channel, is meant; "outline", an image of a closed line, which is
        filled; "polygons", JSON with one list of corners [x, y], a list of such lists, or the shapes of LabelMe,
        filled.
      path: of the annotation.
      shape: (H, W) of the image.

    Returns:
      uint8 `[H, W]`; 0 is background and, but for "image", 255 all else.

    Raises:
      UnreadableError: the file is missing, damaged, of another size than the image, or not of this kind.
    """
    if kind == "polygons":
        return fill_polygons(_read_corners(path, shape), shape)
    if kind == "image":
        mask = read_mask(path) if pathlib.Path(path).suffix.lower() in IMAGES else _read_slice(path)
    else:
        mask = np.where(_read_lightest(path) > _THRESHOLD, np.uint8(FOREGROUND), np.uint8(0))
    if mask.shape != shape:
        raise UnreadableError(f"is {mask.shape[1]} x {mask.shape[0]} pixels, the image {shape[1]} x {shape[0]}")
    return fill_outline(mask) if kind == "outline" else mask


def fill_outline(line: np.ndarray) -> np.ndarray:
    """Fills a closed line around a convex region, such as the ellipse of a fetal head; the line belongs to the region.

    A line that the border of the image cuts is closed by the border; one with gaps by its convex hull.

    Args:
      line: uint8 `[H, W]`, 0 off the line.

    Returns:
      uint8 `[H, W]`, 0 or `FOREGROUND`.
    """
    points = cv2.findNonZero(line)
    filled = np.where(line > 0, np.uint8(FOREGROUND), np.uint8(0))
    if points is None:
        return filled
    hull = cv2.convexHull(points)
    area = cv2.moments(hull)
    if not area["m00"]:  # all points on one straight line
        return filled
    centre = round(area["m01"] / area["m00"]), round(area["m10"] / area["m00"])
    if line[centre]:  # filled already
        return filled
    _, regions = cv2.connectedComponents((line == 0).astype(np.uint8), connectivity=4)
    inside = regions == regions[centre]
    # Through a gap the inside runs out into the surroundings, which lie at all sides of the image.
    if inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any():
        return cv2.fillConvexPoly(filled, hull, FOREGROUND)
    filled[inside] = FOREGROUND
    return filled


def fill_polygons(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Draws the union of polygons.

    Args:
      polygons: float `[N, 2]` each, corners as (x, y) in pixels, the middle of the first pixel being (0, 0).
      shape: (H, W) of the mask.

    Returns:
      uint8 `[H, W]`, 0 or `FOREGROUND`.
    """
    mask = np.zeros(shape, np.uint8)
    # Nobody means corners far outside; OpenCV would walk along every line of them.
    limit = 4 * max(shape)
    for corners in polygons:
        rounded = np.rint(np.clip(corners, -limit, limit)).astype(np.int32)
        cv2.fillPoly(mask, [rounded], FOREGROUND)  # one call each: overlaps in one call cancel out
    return mask


def _read_lightest(path: str | os.PathLike[str]) -> np.ndarray:
    """The lightest channel of an image, uint8 `[H, W]`."""
    data = load(path, _MAX_BYTES)
    width, height = image_size(data)
    check_size(height, width)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise UnreadableError("cannot be decoded") from error
    if pixels is None:
        raise UnreadableError("cannot be decoded")
    blue, green, red = cv2.split(pixels)
    return np.asarray(cv2.max(cv2.max(blue, green), red))  # NumPy takes ten times as long along the last axis


def _read_slice(path: str | os.PathLike[str]) -> np.ndarray:
    # Not as frames: those are windowed, and left out when they are empty.
    stack = volumes.open_volume(path)
    if stack.shape[0] != 1:
        raise UnreadableError(f"has {stack.shape[0]} slices, expected the mask of one image")
    check_size(*stack.shape[1:])
    plane = next(stack.planes([0]))
    if plane.ndim != 2 or plane.dtype.kind not in "iu" or plane.min() < 0 or plane.max() > 255:
        raise UnreadableError("has colours or other numbers than 0 to 255, expected one of them per pixel")
    return plane.astype(np.uint8)


def _read_corners(path: str | os.PathLike[str], shape: tuple[int, int]) -> list[np.ndarray]:
    try:
        # Label names in the encoding of some workplace are common, and nobody asks for them here.
        data = json.loads(load(path, _MAX_BYTES).decode("utf-8", "replace"))
        if isinstance(data, dict):
            _check_size(data, shape)
            lists = [
                _rectangle(one) if one.get("shape_type") == "rectangle" else one["points"] for one in data["shapes"]
            ]
        else:
            lists = data if _depth(data) == 3 else [data]
        polygons = [np.array(corners, np.float64).reshape(-1, 2) for corners in lists if len(corners) > 2]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UnreadableError("no JSON with polygons") from error
    if not all(np.isfinite(corners).all() for corners in polygons):
        raise UnreadableError("has corners that are no numbers")
    if sum(map(len, polygons)) > _MAX_CORNERS:
        raise UnreadableError(f"more than {_MAX_CORNERS:,} corners")
    return polygons


def _rectangle(shape: dict[str, Any]) -> list[tuple[float, float]]:
    (left, top), (right, bottom) = shape["points"]
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _check_size(data: dict[str, Any], shape: tuple[int, int]) -> None:
    height, width = data.get("imageHeight") or shape[0], data.get("imageWidth") or shape[1]
    if (height, width) != shape:
        raise UnreadableError(f"is drawn on {width} x {height} pixels, the image has {shape[1]} x {shape[0]}")


def _depth(data: Any) -> float:
    """How many lists lie in each other: 2 for the corners of one polygon; 3 for several."""
    depth = 0
    while isinstance(data, list):
        depth, data = depth + 1, data[0] if data else math.nan
    return depth
