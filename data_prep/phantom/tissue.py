"""Cartoon tissue for simulated frames: layers, vessels and lesions, as maps of echogenicity and reflections.

Levels are in dB. The features that distinguish the lesions (echogenicity, outline, margin, shadow or enhancement)
follow the sonographic signs of [1].

[1] Stavros et al. Solid breast nodules: use of sonography to distinguish between benign and malignant lesions.
    Radiology 196, 1995.
"""

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np

from data_prep.phantom.scanner import Probe, to_space


@dataclasses.dataclass(frozen=True)
class Layer:
    """A tissue layer: thickness as a range in fractions of the imaged depth, levels in dB."""

    thickness: tuple[float, float]
    level: float
    fibres: float  # std of streaks along the layer
    lobules: float  # std of coarse patches
    septa: float  # brightness of thin curved lines
    interface: float  # amplitude of the reflection at its top


LAYERS = {
    "linear": (  # breast: skin, fat, gland, fat, pectoral muscle, chest wall
        Layer((0.03, 0.05), 5, 1.0, 0.5, 0, 1.5),
        Layer((0.10, 0.26), -8, 2.0, 2.0, 9, 1.2),
        Layer((0.28, 0.42), 2, 3.5, 2.5, -6, 1.0),
        Layer((0.04, 0.10), -7, 2.0, 1.5, 7, 0.8),
        Layer((0.12, 0.20), -6, 5.0, 1.0, 0, 1.6),
        Layer((1.00, 1.00), -10, 2.5, 3.0, 0, 2.2),
    ),
    "convex": (  # upper abdomen: skin, fat, muscle, liver, and the region beyond the diaphragm
        Layer((0.02, 0.03), 4, 1.0, 0.5, 0, 1.5),
        Layer((0.04, 0.09), -4, 2.5, 1.5, 7, 0.8),
        Layer((0.04, 0.08), -5, 5.0, 1.0, 0, 1.6),
        Layer((0.60, 0.85), 0, 0.8, 1.2, 0, 1.4),
        Layer((1.00, 1.00), -4, 1.5, 2.5, 0, 3.5),
    ),
}


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Smooth Gaussian noise of about unit variance, with `cells` independent values along each axis, float32."""
    noise = cv2.resize(rng.standard_normal(cells, np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return noise / np.float32(0.9)  # the standard deviation after cubic interpolation


def draw_layers(rng: np.random.Generator, probe: Probe, v: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws layered tissue on a grid: echogenicity (dB) and coherent reflections (amplitude), float32 [D, L] each."""
    shape = v.shape[0], u.shape[1]
    layers = LAYERS[probe.geometry]
    fibres, lobules = smooth_noise(rng, shape, (90, 14)), smooth_noise(rng, shape, (14, 9))
    septa = np.exp(-((smooth_noise(rng, shape, (13, 6)) / 0.12) ** 2))
    index = np.zeros(shape, np.uint8)
    reflections = np.zeros(shape, np.float32)
    edge, slope = 0.0, rng.uniform(-0.05, 0.05)
    for layer in layers:
        thickness = rng.uniform(*layer.thickness)
        relief = smooth_noise(rng, (1, shape[1]), (1, 6)) + 0.12 * smooth_noise(rng, (1, shape[1]), (1, 16))
        top = edge + min(0.15 * edge, 0.02) * relief + slope * u * min(1.0, 4 * edge)
        index += v > top
        # An interface reflects where it faces the probe, and consists of several discontinuous sheets.
        facing = layer.interface * np.exp(-((np.gradient(top[0]) * shape[1] / 0.6) ** 2))
        for sheet in np.array([-0.6, 0, 0.4], np.float32) * rng.uniform(0.01, 0.03):
            patchy = np.clip(0.2 + 0.5 * smooth_noise(rng, (1, shape[1]), (1, 25)), 0, 1)
            reflections += facing * patchy * np.exp(-(((v - top - sheet) * 280) ** 2))
        edge += thickness
    tables = np.array([dataclasses.astuple(layer)[1:5] for layer in (layers[0], *layers)], np.float32)
    level, *weights = (tables[:, k][index] for k in range(4))
    return level + weights[0] * fibres + weights[1] * lobules + weights[2] * septa, reflections


@dataclasses.dataclass(frozen=True)
class Lesion:
    """The appearance of a class; values are drawn from the ranges per patient, dB relative to surrounding tissue."""

    level: tuple[float, float]  # echogenicity
    texture: float  # std of the inside, dB
    outline: float  # amplitude of its second harmonic, as a fraction of the size
    ragged: float  # how slowly the harmonics of the outline decay, and the amount of noise added to it
    aspect: tuple[float, float]  # height / width
    edge: float  # width of the margin as a fraction of the size
    wall: float  # amplitude of the reflection of the wall
    shadow: tuple[float, float]  # attenuation through the whole lesion; negative = enhancement
    rim: float  # refraction shadow below the sides


LESIONS = {
    "cyst": Lesion((-32, -20), 1.5, 0.06, 0.0, (0.55, 1.0), 0.06, 0.9, (-9, -5), 3.0),
    "solid_regular": Lesion((-12, -6), 1.5, 0.06, 0.05, (0.45, 0.85), 0.08, 0.5, (-3, 2), 2.5),
    "solid_irregular": Lesion((-16, -7), 3.5, 0.17, 0.9, (0.7, 1.3), 0.25, 0.1, (4, 16), 0.0),
}


#: Sizes and positions if one image has several lesions, see `draw_lesion`.
SEVERAL = {"sizes": (0.08, 0.13), "down": (0.25, 0.65), "across": 0.75}
_APART, _TRIES = 0.4, 100  # margin around each of them, as a fraction of its size; attempts to place it
_REACH = 3.0  # every outline is nearer to its centre than this, in sizes


def _blob(rng, x, z, *, size, aspect, outline, ragged=0.0):
    """A closed outline around (0, 0): float32, about 1 at the centre, 0 on the outline, negative outside."""
    tilt, squeeze = rng.uniform(-0.35, 0.35), math.sqrt(aspect)
    a = (x * math.cos(tilt) + z * math.sin(tilt)) * np.float32(squeeze / size)
    b = (z * math.cos(tilt) - x * math.sin(tilt)) * np.float32(1 / squeeze / size)
    k = np.arange(2, 12)[:, None]
    amplitude = outline * (2 / k) ** (3 - 2.5 * ragged) * rng.uniform(0.3, 1.0, k.shape)
    phase = rng.uniform(0, 2 * math.pi, k.shape)
    turn = np.linspace(0, 2 * math.pi, 2048, endpoint=False)  # a table: cosines of the whole grid would be slow
    reach = 1 + (amplitude * np.cos(k * turn + phase)).sum(0).astype(np.float32)
    away = np.hypot(a, b)
    near = np.flatnonzero(away < _REACH)  # farther out is always outside, and angles are slow
    found = 1 - away
    turned = np.arctan2(b.ravel()[near], a.ravel()[near]) * np.float32(1024 / math.pi)
    found.ravel()[near] = reach[turned.astype(np.int32) & 2047] - away.ravel()[near]
    return found


def draw_vessels(rng: np.random.Generator, probe: Probe, x: np.ndarray, z: np.ndarray, tissue: np.ndarray) -> None:
    """Draws dark vessels or lobules, in every class, as distractors from lesions. Edits `tissue` in place."""
    for _ in range(rng.integers(2, 7)):
        at_x, at_z = to_space(probe, rng.uniform(0.25, 0.9), rng.uniform(-0.9, 0.9))
        aspect, size = rng.uniform(0.2, 0.6), probe.depth * rng.uniform(0.012, 0.035)
        blob = _blob(rng, x - at_x, z - at_z, size=size, aspect=aspect, outline=0.04)
        depth = rng.uniform(8, 22) if probe.geometry == "convex" else rng.uniform(3, 8)
        tissue -= np.float32(depth) * np.clip(blob * 3 + 0.5, 0, 1)


def draw_lesion(
    rng: np.random.Generator,
    kind: Lesion,
    probe: Probe,
    x: np.ndarray,
    z: np.ndarray,
    tissue: np.ndarray,
    reflections: np.ndarray,
    *,
    sizes: tuple[float, float] = (0.08, 0.15),
    down: tuple[float, float] = (0.3, 0.52),
    across: float = 0.4,
    taken: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a lesion: its outline (0 on it, positive inside) and its inside (dB), float32 [D, L] each.

    Edits `reflections` in place: removes the interfaces inside the lesion and adds its wall. Its size is drawn from
    `sizes` and the depth of its centre from `down`, both as fractions of the imaged depth; sideways, the centre is at
    most `across` from the middle, as a fraction of half the width. It avoids the outlines in `taken` if there is room.
    """
    for _ in range(_TRIES):
        at_x, at_z = to_space(probe, rng.uniform(*down), rng.uniform(-across, across))
        size, aspect = probe.depth * rng.uniform(*sizes), rng.uniform(*kind.aspect)
        outline = _blob(rng, x - at_x, z - at_z, size=size, aspect=aspect, outline=kind.outline, ragged=kind.ragged)
        if not any(((outline > -_APART) & (other > -_APART)).any() for other in taken):
            break
    outline += np.float32(0.06 * kind.ragged) * smooth_noise(rng, tissue.shape, (40, 40))
    around = tissue[(outline < 0) & (outline > -0.6)].mean()
    inside = around + np.float32(rng.uniform(*kind.level)) + kind.texture * smooth_noise(rng, tissue.shape, (45, 30))

    down, across = np.gradient(outline)
    facing = np.abs(down) / (np.hypot(down, across) + 1e-6)  # a wall reflects where it faces the beam
    patchy = np.clip(0.5 + 0.5 * smooth_noise(rng, tissue.shape, (15, 15)), 0.05, 1.2)
    reflections *= outline < 0
    reflections += kind.wall * patchy * facing**4 * np.exp(-((outline / 0.05) ** 2))
    return outline, inside
