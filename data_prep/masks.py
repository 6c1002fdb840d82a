"""Converts annotations to masks: images, coloured images, outlines to be filled, or polygons."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from data_prep.find import tables
from data_prep.readers import IMAGES, UnreadableError, read_mask, volumes
from data_prep.readers.clips import channel_spread, check_size
from data_prep.readers.images import checked, load

FOREGROUND = 255
_THRESHOLD = 127  # for masks stored as JPEG or drawn with soft edges
_MAX_BYTES = 64 << 20
_MAX_CORNERS = 1_000_000
_MAX_COLOURS = 32  # with more, it is a picture
_NEAR = 64  # levels, the most by which JPEG changes any channel of a colour
_EDGES = 0.02  # of a mask: the largest share of mixed colours along borders

Colours = Mapping[tuple[int, int, int], int]
NO_COLOURS: Colours = {}


def read_mask_as(
    kind: str, path: str | os.PathLike[str], shape: tuple[int, int], colours: Colours = NO_COLOURS, image: str = ""
) -> np.ndarray:
    """Reads an annotation as a mask of the size of its image.

    Args:
      kind: "image": numbers or a few colours as stored, in an image or a volume of one slice; "auto": the same, except
        that JPEG and soft edges are read as "binary"; "binary": an image whose foreground is brighter than half of the
        range in any channel; "outline": an image of a closed line, which is filled; "polygons": filled polygons, from
        JSON with one list of corners [x, y], a list of such lists, or LabelMe shapes, or from XML with such shapes for
        several numbered images, as in DDTI.
      path: of the annotation.
      shape: (H, W) of the image. A mask of another size but the same aspect ratio is resized.
      colours: class number by colour (R, G, B), for coloured masks; black is the background.
      image: path of the image. The number at the end of its name, such as _2.jpg, selects its shapes in XML.

    Returns:
      uint8 `[H, W]`; 0 is background, and 255 is foreground unless the mask holds numbers. RGB `[H, W, 3]` for a
      coloured mask if `colours` is empty.

    Raises:
      UnreadableError: the file is missing, damaged, of another aspect ratio than the image, or not of this kind.
    """
    if kind == "polygons":
        return fill_polygons(_read_corners(path, shape, image), shape)
    if kind in ("image", "auto"):
        mask = _read_numbers(path, soft=kind == "auto")
        if mask.ndim == 3:
            mask = _classes(mask, colours) if colours else _few_colours(mask)
    else:
        mask = np.where(_lightest(_read_colours(path)) > _THRESHOLD, np.uint8(FOREGROUND), np.uint8(0))
    height, width = mask.shape[:2]
    if not _same_shape((height, width), shape):
        raise UnreadableError(f"is {width} x {height} pixels, the image {shape[1]} x {shape[0]}")
    if (height, width) != shape:
        mask = cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return fill_outline(mask) if kind == "outline" else mask


def join(masks: list[np.ndarray]) -> np.ndarray:
    """Joins several masks of one image: the largest number at each pixel, or the last colour other than black."""
    if any(mask.ndim == 3 for mask in masks):
        masks = [mask if mask.ndim == 3 else cv2.merge([mask] * 3) for mask in masks]
        joined = masks[0]
        for mask in masks[1:]:
            joined = np.where(mask.any(axis=2, keepdims=True), mask, joined)
        return joined
    return np.maximum.reduce(masks)


def colours_of(mask: np.ndarray) -> list[str]:
    """The colours of an RGB mask except black, as "#rrggbb"."""
    return [f"#{colour:06x}" for colour in np.unique(_packed(mask)).tolist() if colour]


def numbered(mask: np.ndarray, numbers: Mapping[str, int]) -> np.ndarray:
    """Replaces the colours of a mask, RGB or grey, by their class numbers: uint8 `[H, W]`; other greys are kept."""
    if mask.ndim == 2:
        table = np.array([numbers.get(f"#{grey:02x}{grey:02x}{grey:02x}", grey) for grey in range(256)], np.uint8)
        return np.asarray(cv2.LUT(mask, table))
    packed, classes = _packed(mask), np.zeros(mask.shape[:2], np.uint8)
    for colour, number in numbers.items():
        classes[packed == int(colour[1:], 16)] = number
    return classes


def _packed(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same aspect ratio, up to rounding of the smaller one to whole pixels."""
    (height, width), (tall, wide) = one, other
    return abs(height * wide - width * tall) <= max(height, width, tall, wide)


def _few_colours(mask: np.ndarray) -> np.ndarray:
    number = len(np.unique(_packed(mask)))
    if number > _MAX_COLOURS:
        raise UnreadableError(f"has {number:,} colours, a mask has few (--mask_colours names them)")
    return mask


def _classes(mask: np.ndarray, colours: Colours) -> np.ndarray:
    """The class with the nearest colour for every pixel; raises UnreadableError if too many pixels have none near."""
    known = np.array([(0, 0, 0), *colours], np.int32)
    packed, inverse = np.unique(_packed(mask), return_inverse=True)
    found = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)[:, None]
    distance = np.abs(found - known).max(axis=2)
    far, share = distance.min(axis=1) > _NEAR, np.bincount(inverse.ravel()) / inverse.size
    if share[far].sum() > _EDGES:
        worst = int(packed[far][share[far].argmax()])
        raise UnreadableError(f"has the colour #{worst:06x}, which --mask_colours does not name")
    numbers = np.array([0, *colours.values()], np.uint8)[distance.argmin(axis=1)]
    return numbers[inverse].reshape(mask.shape[:2])


def fill_outline(line: np.ndarray) -> np.ndarray:
    """Fills a closed line around a convex region, such as the ellipse of a fetal head; the line is part of the region.

    A line cut off by the border of the image is closed by the border; one with gaps, by its convex hull.

    Args:
      line: uint8 `[H, W]`, nonzero on the line.

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
    # Through a gap, the inside is connected to the surroundings, which touch all sides of the image.
    if inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any():
        return cv2.fillConvexPoly(filled, hull, FOREGROUND)
    filled[inside] = FOREGROUND
    return filled


def fill_polygons(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Draws the union of polygons.

    Args:
      polygons: float `[N, 2]` each, corners (x, y) in pixels, with the centre of the first pixel at (0, 0).
      shape: (H, W) of the mask.

    Returns:
      uint8 `[H, W]`, 0 or `FOREGROUND`.
    """
    mask = np.zeros(shape, np.uint8)
    # Corners far outside are errors, and OpenCV would trace every line to them.
    limit = 4 * max(shape)
    for corners in polygons:
        rounded = np.rint(np.clip(corners, -limit, limit)).astype(np.int32)
        cv2.fillPoly(mask, [rounded], FOREGROUND)  # one call each: overlaps in one call cancel out
    return mask


def _read_numbers(path: str | os.PathLike[str], soft: bool) -> np.ndarray:
    """Numbers `[H, W]`, or colours `[H, W, 3]` if the channels differ, uint8."""
    if pathlib.Path(path).suffix.lower() not in IMAGES:
        return _read_slice(path)
    try:
        mask = read_mask(path)
    except UnreadableError:
        mask = _read_colours(path)
        if not channel_spread(mask).any():  # no colours, but numbers above 255
            raise
        return mask
    if soft and len(np.unique(mask)) > _MAX_COLOURS:
        return np.where(mask > _THRESHOLD, np.uint8(FOREGROUND), np.uint8(0))
    return mask


def _read_colours(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image in colour, uint8 RGB `[H, W, 3]`."""
    data = checked(load(path, _MAX_BYTES))
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise UnreadableError("cannot be decoded") from error
    if pixels is None:
        raise UnreadableError("cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _lightest(pixels: np.ndarray) -> np.ndarray:
    """The maximum over the channels, `[H, W, 3]` -> `[H, W]`."""
    first, second, third = cv2.split(pixels)
    return np.asarray(cv2.max(cv2.max(first, second), third))  # ten times as fast as NumPy along the last axis


def _read_slice(path: str | os.PathLike[str]) -> np.ndarray:
    # Not read as frames, which are windowed, and left out if they are empty.
    stack = volumes.open_volume(path)
    if stack.shape[0] != 1:
        raise UnreadableError(f"has {stack.shape[0]} slices, expected the mask of one image")
    check_size(*stack.shape[1:])
    plane = next(stack.planes([0]))
    if plane.ndim != 2 or plane.dtype.kind not in "iu" or plane.min() < 0 or plane.max() > 255:
        raise UnreadableError("has colours or other numbers than 0 to 255, expected one of them per pixel")
    return plane.astype(np.uint8)


def _read_corners(path: str | os.PathLike[str], shape: tuple[int, int], image: str) -> list[np.ndarray]:
    is_xml, scale = pathlib.Path(path).suffix.lower() == ".xml", (1.0, 1.0)
    try:
        text = load(path, _MAX_BYTES)
        if is_xml:
            lists = _marks(tables.parse_xml(text), image)
        # Label names in a local encoding are common, and are not needed here.
        elif isinstance(data := json.loads(text.decode("utf-8", "replace")), dict):
            scale = _scale(data, shape)
            lists = [
                _rectangle(one) if one.get("shape_type") == "rectangle" else one["points"] for one in data["shapes"]
            ]
        else:
            lists = data if _depth(data) == 3 else [data]
        polygons = [np.array(corners, np.float64).reshape(-1, 2) for corners in lists if len(corners) > 2]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UnreadableError(f"no {'XML' if is_xml else 'JSON'} with polygons") from error
    if not all(np.isfinite(corners).all() for corners in polygons):
        raise UnreadableError("has corners that are no numbers")
    if sum(map(len, polygons)) > _MAX_CORNERS:
        raise UnreadableError(f"more than {_MAX_CORNERS:,} corners")
    # (0, 0) is the centre of the first pixel.
    return polygons if scale == (1, 1) else [(corners + 0.5) * scale - 0.5 for corners in polygons]


def _marks(root: Any, image: str) -> list[list[tuple[float, float]]]:
    """Corners of the shapes marked in one image of a DDTI case, whose <svg> elements hold JSON."""
    number = pathlib.PurePath(image).stem.rpartition("_")[2]
    drawn = [mark.findtext("svg") for mark in root.iter("mark") if (mark.findtext("image") or "").strip() == number]
    shapes = [shape for text in drawn if text for shape in json.loads(text)]
    if not shapes:
        raise UnreadableError(f"has no polygon of image {number}")
    return [[(corner["x"], corner["y"]) for corner in shape["points"]] for shape in shapes]


def _rectangle(shape: dict[str, Any]) -> list[tuple[float, float]]:
    (left, top), (right, bottom) = shape["points"]
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _scale(data: dict[str, Any], shape: tuple[int, int]) -> tuple[float, float]:
    """Factors that scale (x, y) from the picture that was annotated to the image."""
    height, width = data.get("imageHeight") or shape[0], data.get("imageWidth") or shape[1]
    if not _same_shape((height, width), shape):
        raise UnreadableError(f"is drawn on {width} x {height} pixels, the image has {shape[1]} x {shape[0]}")
    return shape[1] / width, shape[0] / height


def _depth(data: Any) -> float:
    """How deeply lists are nested: 2 for the corners of one polygon, 3 for several."""
    depth = 0
    while isinstance(data, list):
        depth, data = depth + 1, data[0] if data else math.nan
    return depth
