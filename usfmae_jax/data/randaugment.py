"""RandAugment on uint8 arrays, as the MAE fine-tuning recipe sets it: m9-mstd0.5-inc1.

Cubuk et al. 2020, with three changes of the widely used PyTorch version that the recipe [1] relies on: the magnitude
of every operation is drawn about the one that is asked for, an operation is left out with probability 1/2, and all
of them grow stronger with the magnitude.

[1] He et al. Masked Autoencoders Are Scalable Vision Learners. 2022, table 9.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_FULL = 10.0  # magnitude at which an operation is at its strongest
_DEVIATION = 0.5  # of the magnitude
_FILL: dict[str, tuple[int, ...] | int] = {
    "RGB": (124, 116, 104),
    "L": 117,
}  # the mean of ImageNet, as in the recipe; "L" is its grey

Operation = Callable[[Image.Image, float, float], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_fill(image))


def _fill(image: Image.Image) -> tuple[int, ...] | int:
    return _FILL[image.mode]


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    """Brightens what is below half of the scale."""
    table = [min(255, level + amount) if level < 128 else level for level in range(256)]
    return image.point(table * len(image.getbands()))


#: (image, strength in [0, 1], sign -1 or 1) -> image.
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "invert": lambda image, strength, sign: ImageOps.invert(image),
    "rotate": lambda image, strength, sign: image.rotate(
        sign * 30 * strength, Image.Resampling.BICUBIC, fillcolor=_fill(image)
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
    """Applies `count` operations drawn with replacement, each with probability 1/2.

    Args:
      image: uint8 `[H, W, C]`, C = 1 or 3.
      rng: where the randomness comes from.
      magnitude: mean strength, 0 to 10.
      count: how many operations.

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
