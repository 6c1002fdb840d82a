"""Simulated B-mode frames with labels and masks: data for demos and tests that need no permission.

    python -m data_prep.phantom --output=docs/phantoms.png

A frame is made the way a scanner makes it, on a grid of depth samples by beams:

1. Scatterers are circular complex Gaussian: the baseband signal of many unresolved reflectors, whose positions within
   a wavelength make their phase uniform [1].
2. An echogenicity map in dB (skin, fat, gland or liver, muscle, vessels, lesion) scales them; interfaces add a
   coherent part without speckle. Structures attenuate what lies below: solid irregular lesions cause shadows, cysts
   enhancement, and the sides of smooth lesions refraction [2].
3. The point-spread function turns scatterers into echoes. Receiver noise, amplified with depth, and haze are added.
4. Envelope, gain, log compression to 50 to 65 dB, and scan conversion to the image, black outside the sector.

The scanner of steps 1, 3 and 4 is in `data_prep/phantom/scanner.py`, the tissue of step 2 in
`data_prep/phantom/tissue.py`.

The tissue is a cartoon, but the speckle is realistic: the envelope of uniform tissue is Rayleigh, mean / std = 1.91.
Multipath, elevation and steering are not simulated. For demos and tests only; no clinical conclusions can be drawn.

[1] Wagner, Smith, Sandrik, Lopez. Statistics of speckle in ultrasound B-scans. IEEE Trans. Sonics Ultrason. 30, 1983.
[2] Stavros et al. Solid breast nodules: use of sonography to distinguish between benign and malignant lesions.
    Radiology 196, 1995.
"""

import dataclasses
import math
from typing import Any

import cv2
import numpy as np

from data_prep.phantom.scanner import (
    PROBES,
    Probe,
    Scan,
    complex_normal,
    receive,
    receiver_noise,
    scan_convert,
    scan_geometry,
    to_scan,
    to_space,
)
from data_prep.phantom.tissue import LESIONS, SEVERAL, draw_layers, draw_lesion, draw_vessels, smooth_noise

CLASSES = ("none", "cyst", "solid_regular", "solid_irregular")  # index = label

_MARGIN = 0.15  # tissue simulated beyond the field of view on each side, so that the probe can move
_NEPER = math.log(10) / 20  # amplitude = exp(_NEPER * dB)
_LABELS, _TISSUE, _FRAME = range(3)  # random streams


@dataclasses.dataclass(frozen=True)
class Phantom:
    """One simulated frame."""

    image: np.ndarray  # uint8 [H, W]
    mask: np.ndarray  # uint8 [H, W], 255 on the lesion, empty for class none; with several, the class of each pixel
    sector: np.ndarray  # uint8 [H, W], 0 or 255: the area that the scan geometry covers
    label: int  # index into CLASSES; -1 if there may be several lesions
    patient: str
    video: str
    frame: str
    geometry: str  # "linear" or "convex"


@dataclasses.dataclass(frozen=True)
class _Patient:
    """What all frames of a patient have in common."""

    probe: Probe
    scan: Scan
    tissue: np.ndarray  # float32 [D', L', 4]: echogenicity (dB), reflections, lesion outline, lesion inside (dB)
    more: tuple[np.ndarray, ...]  # float32 [D', L', 2]: outline and inside of each lesion after the first
    speckle: np.ndarray  # float32 [D', L', 2]
    kinds: tuple[str, ...]  # of the lesions
    shadows: tuple[float, ...]  # dB
    streaks: np.ndarray  # float32 [1, L]: dB lost over the depth, beam by beam
    tilt: float  # dB over the depth that time-gain compensation does not correct
    gain: float  # dB
    dynamic_range: float  # dB


def _patient(rng, label, image_size, several):
    """Draws a patient: probe, tissue, lesions and presets; with `several`, `label` is the number of lesions."""
    presets = PROBES[("linear", "convex")[rng.integers(2)]]
    probe = presets[rng.integers(len(presets))]
    scan = scan_geometry(probe, image_size)
    rows, columns = (round(side * (1 + 2 * _MARGIN)) for side in scan.shape)
    v = np.linspace(-_MARGIN, 1 + _MARGIN, rows, dtype=np.float32)[:, None]
    u = np.linspace(-1 - 2 * _MARGIN, 1 + 2 * _MARGIN, columns, dtype=np.float32)[None, :]
    x, z = np.broadcast_arrays(*to_space(probe, v, u))
    tissue, reflections = draw_layers(rng, probe, v, u)
    draw_vessels(rng, probe, x, z, tissue)
    names = tuple(LESIONS)
    kinds = tuple(names[i] for i in rng.integers(len(names), size=label)) if several else (CLASSES[label],)
    kinds = tuple(name for name in kinds if name in LESIONS)
    lesions: list[tuple[np.ndarray, np.ndarray]] = []
    for name in kinds:
        place: dict[str, Any] = SEVERAL | {"taken": [outline for outline, _ in lesions]} if several else {}
        lesions.append(draw_lesion(rng, LESIONS[name], probe, x, z, tissue, reflections, **place))
    first, *more = lesions or [(np.full_like(tissue, -9), np.zeros_like(tissue))]
    return _Patient(
        probe=probe,
        scan=scan,
        tissue=cv2.merge([tissue, reflections, *first]),
        more=tuple(map(cv2.merge, more)),
        speckle=complex_normal(rng, rows, columns),
        kinds=kinds,
        shadows=tuple(rng.uniform(*LESIONS[name].shadow) for name in kinds),
        streaks=np.maximum(smooth_noise(rng, (1, scan.shape[1]), (1, 14)) - 0.6, 0) * np.float32(rng.uniform(2, 9)),
        tilt=rng.uniform(-12, 1),
        gain=rng.uniform(-4, 4),
        dynamic_range=rng.uniform(50, 65),
    )


def _move(rng, patient):
    """The tissue seen by a moved probe: tissue [D, L, 4], further lesions [D, L, 2] each, and scatterers [D, L, 2].

    Hand motion: a shift, a rotation and a change of pressure, and speckle only partly correlated between frames.
    """
    probe, (samples, beams) = patient.probe, patient.scan.shape
    v = np.linspace(0, 1, samples, dtype=np.float32)[:, None]
    u = np.linspace(-1, 1, beams, dtype=np.float32)[None, :]
    x, z = to_space(probe, v, u)
    turn, pressure = rng.normal(0, 0.02), rng.normal(1, 0.015)
    shift_x, shift_z = probe.depth * np.clip(rng.normal(0, (0.02, 0.006)), -0.05, 0.05)
    moved_x = x * math.cos(turn) - z * math.sin(turn) + np.float32(shift_x)
    moved_z = (z * math.cos(turn) + x * math.sin(turn)) * np.float32(pressure) + np.float32(shift_z)
    v, u = to_scan(probe, moved_x, moved_z)
    rows, columns = patient.tissue.shape[:2]
    row = (v + _MARGIN) * np.float32((rows - 1) / (1 + 2 * _MARGIN))
    column = (u + 1 + 2 * _MARGIN) * np.float32((columns - 1) / (2 + 4 * _MARGIN))
    tissue, *more = (
        cv2.remap(one, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for one in (patient.tissue, *patient.more)
    )

    # Whole samples only: interpolated noise would lose power.
    middle = samples // 2, beams // 2
    top = int(np.clip(row[middle] - middle[0], 0, rows - samples))
    left = int(np.clip(column[middle] - middle[1], 0, columns - beams))
    kept = rng.uniform(0.4, 0.9)  # correlation with the speckle of the patient
    scatterers = complex_normal(rng, samples, beams) * np.float32(math.sqrt(1 - kept**2))
    scatterers += np.float32(kept) * patient.speckle[top : top + samples, left : left + beams]
    return tissue, more, scatterers


def _below(weight, loss):
    """Sum of `weight` above each sample, scaled so that the largest total is `loss` dB: float32 [D, L]."""
    total = np.cumsum(weight, axis=0)
    return total * np.float32(loss / max(total[-1].max(), 1))


def _frame(rng, patient, several):
    """One frame of a patient: image and mask, uint8 [H, W] each."""
    scan, probe = patient.scan, patient.probe
    tissue, more, scatterers = _move(rng, patient)
    level, reflections, *first = cv2.split(tissue)
    lesions = [first, *map(cv2.split, more)]
    v = np.linspace(0, 1, scan.shape[0], dtype=np.float32)[:, None]

    loss = v * patient.streaks
    for name, shadow, (outline, inside) in zip(patient.kinds, patient.shadows, lesions, strict=False):
        kind = LESIONS[name]
        lesion = np.clip(outline / np.float32(kind.edge) + 0.5, 0, 1)
        sides = np.abs(cv2.Sobel(lesion, cv2.CV_32F, 1, 0))
        level += lesion * (inside - level)
        loss += cv2.blur(_below(lesion, shadow) + _below(sides, kind.rim), (scan.shape[1] // 40 + 1, 1))
    focus = 2 * np.exp(-(((v - probe.focus / probe.depth) / 0.25) ** 2))
    gain = np.exp(_NEPER * (focus + patient.tilt * v - loss))
    amplitude = gain * np.exp(np.float32(_NEPER) * level)
    scatterers *= (amplitude * (1 + 2 * reflections))[..., None]
    scatterers[..., 0] += gain * reflections * np.float32(0.7)

    echoes = receive(scan, scatterers)
    # Receiver noise, which time-gain compensation also amplifies, and the haze of side lobes and reverberation.
    noise = receiver_noise(rng, scan)
    haze = cv2.blur(amplitude, (scan.shape[1] // 5, scan.shape[0] // 12))
    echoes += noise * (np.exp(_NEPER * (22 * v - 49)) + np.float32(0.04) * haze)[..., None]
    envelope = cv2.GaussianBlur(np.sqrt(echoes[..., 0] ** 2 + echoes[..., 1] ** 2), (3, 3), 0.7)  # the video filter

    decibel = cv2.log(envelope + 1e-6) * np.float32(1 / _NEPER)
    brightness = patient.gain + rng.normal(0, 1) + 0.42 * patient.dynamic_range
    display = cv2.convertScaleAbs(np.maximum(decibel + brightness, 0), alpha=255 / patient.dynamic_range)
    image = scan_convert(scan, display)
    mask = np.zeros_like(image)
    for name, (outline, _) in zip(patient.kinds, lesions, strict=False):
        mask[(scan_convert(scan, outline) > 0) & (scan.sector > 0)] = CLASSES.index(name) if several else 255
    return image & scan.sector, mask


def simulate_patient(
    patient: int, *, seed: int = 0, image_size: int = 256, frames: int = 4, several: bool = False
) -> list[Phantom]:
    """Simulates the frames of one patient.

    They share probe, tissue, lesions and presets, and differ in hand motion, speckle and gain. Frame `k` depends only
    on (seed, patient, image_size, several, k). Patients 4n to 4n + 3 have one of each class, in random order.

    Args:
        patient: number of the patient, from 0.
        seed: of the whole collection.
        image_size: the shorter side of the images in pixels, 32 or more.
        frames: number of frames.
        several: each patient has 0 to 3 separate lesions of any class; of four patients 4n to 4n + 3, one has each
            number. Masks then hold class numbers, indices into CLASSES.

    Returns:
        A list of `Phantom`.

    Raises:
        ValueError: `patient` is negative or `image_size` below 32.
    """
    if patient < 0 or image_size < 32:
        raise ValueError(f"patient is {patient} and image_size {image_size}; they start at 0 and 32.")
    label = int(np.random.default_rng([seed, _LABELS, patient // 4, 0]).permutation(len(CLASSES))[patient % 4])
    drawn = _patient(np.random.default_rng([seed, _TISSUE, patient, 0]), label, image_size, several)
    geometry, sector, name = drawn.probe.geometry, drawn.scan.sector, f"p{patient:05d}"
    phantoms = []
    for k in range(frames):
        image, mask = _frame(np.random.default_rng([seed, _FRAME, patient, k]), drawn, several)
        known = -1 if several else label
        phantoms.append(Phantom(image, mask, sector.copy(), known, name, name, f"{name}_{k:02d}", geometry))
    return phantoms
