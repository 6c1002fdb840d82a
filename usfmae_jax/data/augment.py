"""Augmented views of uint8 images: crop, rotation, flip and resize as one affine warp; grey levels as one table.

RandAugment (Cubuk et al. 2020) as in the MAE fine-tuning recipe [1], m9-mstd0.5-inc1, with three changes from the paper
made by the PyTorch implementation that the recipe uses: the magnitude of each operation is drawn around the given one,
each operation is skipped with probability 1/2, and all of them grow stronger with the magnitude.

[1] He et al. Masked Autoencoders Are Scalable Vision Learners. 2022, table 9.
"""

import dataclasses
import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training views are drawn.

    Attributes:
      crop_scale: area of the crop as a fraction of the image, drawn uniformly; a crop that does not fit is drawn again.
      crop_ratio: aspect ratio of the crop, width to height, drawn log-uniformly.
      rotation: degrees, (lowest, highest), drawn uniformly.
      hflip, vflip: probability of a mirrored view. Vertical flips swap near field and shadows: off by default.
      interpolation: 'nearest', 'linear' or 'cubic'.
      brightness: gain, (lowest, highest), added as a fraction of the grey scale; off at (0, 0). See `levels`.
      contrast: contrast factor, drawn log-uniformly: above 1 for a smaller dynamic range; off at (1, 1).
      gamma: exponent of the grey map, drawn log-uniformly; off at (1, 1).
      randaugment_magnitude: strength of `randaugment`, 0 to 10; 0 = off.
      randaugment_ops: number of its operations per view.
      trivialaugment: whether each view gets one of these operations at a random strength (Müller & Hutter 2021).
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotation: tuple[float, float] = (0.0, 0.0)
    hflip: float = 0.5
    vflip: float = 0.0
    interpolation: str = "linear"
    brightness: tuple[float, float] = (0.0, 0.0)
    contrast: tuple[float, float] = (1.0, 1.0)
    gamma: tuple[float, float] = (1.0, 1.0)
    randaugment_magnitude: float = 0.0
    randaugment_ops: int = 2
    trivialaugment: bool = False


def random_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Draws a crop as Inception does (Szegedy et al. 2015): ten tries, then the largest central crop of allowed shape.

    Returns:
      (left, top, width, height), in pixels, inside the image.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = math.sqrt(area * shape), math.sqrt(area / shape)
        if w <= width and h <= height:
            return rng.uniform(0, width - w), rng.uniform(0, height - h), w, h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, height * shape), min(height, width / shape)
    return (width - w) / 2, (height - h) / 2, w, h


def random_view(
    rng: np.random.Generator, height: int, width: int, size: tuple[int, int], how: Augmentation
) -> np.ndarray:
    """Draws one view as a float64 `[2, 3]` matrix that maps pixels of the view to pixels of the image.

    Args:
      rng: source of randomness; the number of draws may vary.
      height: height of the image.
      width: width of the image.
      size: (height, width) of the view.
      how: the augmentation settings.
    """
    left, top, w, h = random_crop(rng, height, width, how.crop_scale, how.crop_ratio)
    flip_x = -1.0 if rng.random() < how.hflip else 1.0
    flip_y = -1.0 if rng.random() < how.vflip else 1.0
    angle = math.radians(rng.uniform(*how.rotation))
    cos, sin = math.cos(angle), math.sin(angle)
    scale_x, scale_y = flip_x * w / size[1], flip_y * h / size[0]
    xx, xy, yx, yy = cos * scale_x, -sin * scale_y, sin * scale_x, cos * scale_y
    # The centre of the view maps to the centre of the crop; the centre of pixel i is at i.
    x, y = (size[1] - 1) / 2, (size[0] - 1) / 2
    shift_x, shift_y = left + (w - 1) / 2 - (xx * x + xy * y), top + (h - 1) / 2 - (yx * x + yy * y)
    return np.array([[xx, xy, shift_x], [yx, yy, shift_y]])


def warp(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Applies a view's matrix to a uint8 image `[H, W, C]`: uint8 `[*size, C]`, black outside the image."""
    flags = INTERPOLATION[interpolation] | cv2.WARP_INVERSE_MAP
    view = cv2.warpAffine(image, matrix, (size[1], size[0]), flags=flags, borderMode=cv2.BORDER_CONSTANT)
    return view.reshape(*size, image.shape[2])


def levels(brightness: float, contrast: float, gamma: float) -> np.ndarray:
    """The effect of gain, dynamic range and grey map on a log-compressed image, as a table of 256 levels (uint8).

    After log compression, gain is an offset. A change of dynamic range stretches the grey scale downwards from white,
    the strongest echo: k times the contrast corresponds to 1/k of the decibels. Black stays black and near-black gets
    hardly brighter, since most of it is background, which no scanner setting changes.

    Args:
      brightness: offset as a fraction of the grey scale.
      contrast: contrast factor k.
      gamma: exponent of the grey map; above 1 darkens.
    """
    level = np.arange(256) / 255
    changed = np.clip(1 - (1 - level) * contrast + brightness, 0, 1) ** gamma
    seen = 1 - np.exp(-np.arange(256) / 8)
    return np.round(255 * np.where(changed > level, level + (changed - level) * seen, changed)).astype(np.uint8)


def adjust(image: np.ndarray, rng: np.random.Generator, how: Augmentation) -> np.ndarray:
    """Applies the random changes of grey levels, without moving pixels: uint8 `[H, W, C]` in and out.

    Nothing is drawn for augmentations that are off, so that they do not change other views.
    """
    if how.randaugment_magnitude > 0:
        image = randaugment(image, rng, how.randaugment_magnitude, how.randaugment_ops)
    if how.trivialaugment:
        image = trivialaugment(image, rng)
    brightness = rng.uniform(*how.brightness) if any(how.brightness) else 0.0
    contrast, gamma = (
        math.exp(rng.uniform(math.log(span[0]), math.log(span[1]))) if tuple(span) != (1, 1) else 1.0
        for span in (how.contrast, how.gamma)
    )
    if (brightness, contrast, gamma) == (0.0, 1.0, 1.0):
        return image
    return cv2.LUT(image, levels(brightness, contrast, gamma)).reshape(image.shape)


def reduction(matrix: np.ndarray) -> int:
    """The largest of 1, 2, 4, 8 by which an image can be shrunk without the view having to enlarge it.

    JPEG decodes at such fractions directly, faster and without the aliasing of a warp that skips pixels.
    """
    (xx, xy, _), (yx, yy, _) = matrix.tolist()
    pixels = min(math.hypot(xx, yx), math.hypot(xy, yy))  # image pixels per pixel of the view
    return next(factor for factor in (8, 4, 2, 1) if pixels >= factor or factor == 1)


def shrink_view(matrix: np.ndarray, factor: float) -> np.ndarray:
    """The matrix of the same view on an image shrunk by `factor`."""
    shrunk = matrix / factor
    shrunk[:, 2] += (1 / factor - 1) / 2
    return shrunk


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a whole uint8 image `[H, W, C]` to `size` (height, width) by area; the aspect ratio is not kept."""
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA).reshape(*size, image.shape[2])


_FULL = 10.0  # magnitude at which an operation is at its strongest
_DEVIATION = 0.5  # standard deviation of the magnitude
# The mean colour of ImageNet, as in the recipe; "L" is its grey level.
_FILL: dict[str, tuple[int, ...] | int] = {"RGB": (124, 116, 104), "L": 117}

Operation = Callable[[Image.Image, float, float], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_FILL[image.mode]
    )


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    """Brightens levels in the lower half of the scale."""
    table = [min(255, level + amount) if level < 128 else level for level in range(256)]
    return image.point(table * len(image.getbands()))


#: (image, strength in [0, 1], sign -1 or 1) -> image.
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "invert": lambda image, strength, sign: ImageOps.invert(image),
    "rotate": lambda image, strength, sign: image.rotate(
        sign * 30 * strength, Image.Resampling.BICUBIC, fillcolor=_FILL[image.mode]
    ),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, max(4 - int(strength * 4), 1)),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, 256 - int(strength * 256)),
    "solarize_add": lambda image, strength, sign: _solarize_add(image, int(strength * 110)),
    "color": lambda image, strength, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * strength),
    "contrast": lambda image, strength, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * strength),
    "brightness": lambda image, strength, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * strength),
    "sharpness": lambda image, strength, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * strength),
    "shear_x": lambda image, strength, sign: _affine(image, (1, sign * 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": lambda image, strength, sign: _affine(image, (1, 0, 0, sign * 0.3 * strength, 1, 0)),
    "translate_x": lambda image, strength, sign: _affine(
        image, (1, 0, sign * 0.45 * strength * image.size[0], 0, 1, 0)
    ),
    "translate_y": lambda image, strength, sign: _affine(
        image, (1, 0, 0, 0, 1, sign * 0.45 * strength * image.size[1])
    ),
}


def randaugment(image: np.ndarray, rng: np.random.Generator, magnitude: float = 9.0, count: int = 2) -> np.ndarray:
    """Draws `count` operations with replacement and applies each with probability 1/2.

    Args:
      image: uint8 `[H, W, C]`, C = 1 or 3.
      rng: source of randomness.
      magnitude: mean strength, 0 to 10.
      count: number of operations.

    Returns:
      uint8 `[H, W, C]`.
    """
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    names = list(OPERATIONS)
    for name in (names[number] for number in rng.integers(len(names), size=count)):
        applied, sign = rng.random() < 0.5, 1.0 if rng.random() < 0.5 else -1.0
        strength = float(np.clip(rng.normal(magnitude, _DEVIATION), 0, _FULL)) / _FULL
        if applied:
            picture = OPERATIONS[name](picture, strength, sign)
    return np.asarray(picture).reshape(image.shape)


def trivialaugment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies one operation or none, with equal probability, at a strength drawn uniformly (Müller & Hutter 2021).

    Args:
      image: uint8 `[H, W, C]`, C = 1 or 3.
      rng: source of randomness.

    Returns:
      uint8 `[H, W, C]`.
    """
    chosen = int(rng.integers(len(OPERATIONS) + 1))
    sign, strength = 1.0 if rng.random() < 0.5 else -1.0, float(rng.random())
    if chosen == len(OPERATIONS):
        return image
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return np.asarray(list(OPERATIONS.values())[chosen](picture, strength, sign)).reshape(image.shape)
