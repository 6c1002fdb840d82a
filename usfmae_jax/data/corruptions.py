"""Graded corruptions that occur in ultrasound images, to test how robust a classifier is.

Like ImageNet-C [1] for photographs: one kind at a time, severity 1 (slight) to 5 (a sonographer would scan again).
Images are log-compressed, so attenuation, gain and any other factor of the echo's amplitude are added to grey levels.
Sizes are fractions of the image, since models differ in image size. The black background outside the imaged area stays
black.

[1] Hendrycks & Dietterich. Benchmarking Neural Network Robustness to Common Corruptions and Perturbations. ICLR 2019.
"""

from collections.abc import Callable

import cv2
import numpy as np

from usfmae_jax.errors import InputError

#: Severity 0 changes nothing.
SEVERITIES = (1, 2, 3, 4, 5)

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _depth_attenuation(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A fading far field: a loss in decibels that grows with depth, as with too high a probe frequency."""
    depth = np.linspace(0, 1, image.shape[0], dtype=np.float32)[:, None, None]
    return image - (0.08, 0.17, 0.28, 0.42, 0.60)[severity - 1] * depth


def _shadow(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Shadows of gas, ribs or lost contact: bands along the beams, dark below some depth."""
    height, width = image.shape[:2]
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, width), np.linspace(0, 1, height))
    beam = x / (0.7 + 0.3 * y)  # beams of most probes diverge a little with depth
    wide, dark = ((0.05, 0.35), (0.07, 0.5), (0.10, 0.6), (0.13, 0.75), (0.17, 0.9))[severity - 1]
    result = image
    for _ in range((1, 1, 2, 2, 3)[severity - 1]):
        across = np.abs(beam - rng.uniform(-0.4, 0.4)) / (wide * rng.uniform(0.75, 1.25))
        down = (y - rng.uniform(-0.1, 0.3)) / 0.2
        shade = _smooth(1.5 - across) * _smooth(down)
        result = result - dark * shade[:, :, None].astype(np.float32) * np.maximum(result, 0.25)
    return result


def _haze(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A haze of reverberation and side lobes, strongest in the near field, that fills dark areas."""
    strength = (0.10, 0.18, 0.28, 0.40, 0.55)[severity - 1]
    depth = np.linspace(0, 1, image.shape[0], dtype=np.float32)[:, None]
    veil = (0.7 + 0.3 * _noise(rng, image, 0.12)) * (1 - 0.5 * depth)
    veil *= 0.85 + 0.15 * _noise(rng, image, 0.015)
    return image + strength * np.clip(veil, 0, 1)[:, :, None] * (1 - image) ** 1.5


def _speckle(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """More speckle: Rayleigh amplitudes, wider than deep, added to the log-compressed echoes."""
    height, width = image.shape[:2]
    grain = max(0.006 * width, 0.7), max(0.0035 * height, 0.5)
    amplitude = np.hypot(*(_blurred(rng.standard_normal((height, width)), *grain) for _ in range(2)))
    amplitude /= np.sqrt(np.mean(amplitude**2))
    change = np.log(np.maximum(amplitude, 0.15)) / 2.5
    return image + (0.12, 0.22, 0.34, 0.48, 0.65)[severity - 1] * change[:, :, None].astype(np.float32) * (0.35 + image)


def _gain(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Overall gain, too high or too low with equal probability: highlights or tissue are lost."""
    sign = 1 if rng.random() < 0.5 else -1
    return image + sign * (0.08, 0.15, 0.22, 0.30, 0.40)[severity - 1]


def _blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Lost resolution, more across the beams than along them."""
    sigma = (0.004, 0.008, 0.013, 0.020, 0.030)[severity - 1]
    across, down = (max(sigma * side, 0.4 * severity) for side in (image.shape[1], image.shape[0] / 2))
    return _blurred(image, across, down).reshape(image.shape)


def _sector(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A narrower and shallower field of view: black outside a sector around a slightly shifted axis."""
    height, width = image.shape[:2]
    keep = (0.90, 0.80, 0.70, 0.60, 0.50)[severity - 1]
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, width), np.linspace(0, 1, height))
    radius = np.hypot(x - rng.uniform(-1, 1) * 0.25 * (1 - keep), y + 0.5)
    angle = np.arctan2(np.abs(x), y + 0.5)
    inside = (angle < np.arctan(0.75) * keep) & (radius < 0.5 + 1.05 * (keep + 1) / 2) & (radius > 0.5)
    return image * inside[:, :, None]


CORRUPTIONS: dict[str, Corruption] = {
    "depth_attenuation": _depth_attenuation,
    "shadow": _shadow,
    "haze": _haze,
    "speckle": _speckle,
    "gain": _gain,
    "blur": _blur,
    "sector": _sector,
}


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Corrupts one image.

    Args:
      image: uint8 `[H, W, C]`, at least 8 pixels a side.
      name: a key of `CORRUPTIONS`.
      severity: 1 to 5; 0 returns a copy.
      rng: source of randomness: give each frame its own, the same for all severities.

    Returns:
      uint8 `[H, W, C]`.

    Raises:
      InputError: the corruption or severity is not known.
    """
    if name not in CORRUPTIONS or severity not in (0, *SEVERITIES):
        raise InputError(
            f"there is no corruption {name!r} of severity {severity}; give one of {', '.join(CORRUPTIONS)} and 0 to 5"
        )
    if severity == 0:
        return image.copy()
    changed = CORRUPTIONS[name](image.astype(np.float32) / 255, severity, rng)
    changed = np.where(_imaged(image)[:, :, None], changed, image.astype(np.float32) / 255)
    return np.round(255 * np.clip(changed, 0, 1)).astype(np.uint8)


def _imaged(image: np.ndarray) -> np.ndarray:
    """The convex hull of all pixels that are not black: bool `[H, W]`; sectors and rectangles are convex."""
    bright = (image.max(axis=2) > 6).astype(np.uint8)
    bright = cv2.morphologyEx(bright, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    points = cv2.findNonZero(bright)
    hull = np.zeros_like(bright)
    if points is not None:
        cv2.fillConvexPoly(hull, cv2.convexHull(points), 1)
    return hull.astype(bool)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A smooth step: from 0 to 1 as values go from 0 to 1."""
    values = np.clip(values, 0, 1)
    return values * values * (3 - 2 * values)


def _noise(rng: np.random.Generator, image: np.ndarray, size: float) -> np.ndarray:
    """Smooth noise of standard deviation 1, with features a fraction `size` of the image: float32 `[H, W]`."""
    height, width = image.shape[:2]
    noise = _blurred(rng.standard_normal((height, width)), max(size * width, 0.5), max(size * height, 0.5))
    return (noise / max(noise.std(), 1e-6)).astype(np.float32)


def _blurred(values: np.ndarray, across: float, down: float) -> np.ndarray:
    return cv2.GaussianBlur(
        values.astype(np.float32), (0, 0), sigmaX=across, sigmaY=down, borderType=cv2.BORDER_REFLECT
    )
