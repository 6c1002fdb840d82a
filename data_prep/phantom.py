"""Simulated B-mode frames with labels and masks: data for demos and tests that nobody has to ask permission for.

    python -m data_prep.phantom --output=docs/phantoms.png

A frame is made the way a scanner makes it, on a grid of depth samples by beams:

1. Scatterers are circular complex Gaussian: the baseband view of many unresolved reflectors, whose places below a
   wavelength make their phase uniform [1].
2. An echogenicity map in dB (skin, fat, gland or liver, muscle, vessels, lesion) scales them; interfaces add a
   coherent part without speckle. What lies above attenuates: solid irregular lesions shadow, cysts enhance, the
   sides of smooth lesions refract [2].
3. Convolution with the point-spread function, a pulse along depth times a lateral Gaussian that is narrowest at the
   focus, turns scatterers into echoes [3, 4, 5]. Receiver noise, amplified with depth, and haze are added.
4. Envelope, gain, log compression to 50 to 65 dB, and scan conversion to the image, black outside the sector.

The tissue is a cartoon, the speckle is not: the envelope of uniform tissue is Rayleigh, mean / std = 1.91. There are
no multiple paths, no elevation and no steering. Demos and tests only; nothing clinical follows from it.

[1] Wagner, Smith, Sandrik, Lopez. Statistics of speckle in ultrasound B-scans. IEEE Trans. Sonics Ultrason. 30, 1983.
[2] Stavros et al. Solid breast nodules: use of sonography to distinguish between benign and malignant lesions.
    Radiology 196, 1995.
[3] Bamber, Dickinson. Ultrasonic B-scanning: a computer simulation. Phys. Med. Biol. 25, 1980.
[4] Meunier, Bertrand. Echographic image mean gray level changes with tissue dynamics: a system-based model study.
    IEEE Trans. Biomed. Eng. 42, 1995.
[5] Jensen. Field: a program for simulating ultrasound systems. Med. Biol. Eng. Comput. 34, 1996.
"""

import argparse
import dataclasses
import functools
import math

import cv2
import numpy as np

CLASSES = ("none", "cyst", "solid_regular", "solid_irregular")  # index = label

_MARGIN = 0.15  # tissue simulated beyond the field of view on each side, for the probe to move over
_SPEED_OF_SOUND = 1.54  # mm/us, the value that scanners assume
_NEPER = math.log(10) / 20  # amplitude = exp(_NEPER * dB)
_ALONE, _ACROSS = np.ones(1, np.float32), np.array([0.5, 0.7, 0.5], np.float32)  # lateral filters of unit energy
_LABELS, _TISSUE, _FRAME = range(3)  # random streams


@dataclasses.dataclass(frozen=True)
class Phantom:
    """One simulated frame."""

    image: np.ndarray  # uint8 [H, W]
    mask: np.ndarray  # uint8 [H, W], 0 or 255: the lesion, empty for class none
    sector: np.ndarray  # uint8 [H, W], 0 or 255: where the scan geometry images at all
    label: int  # index into CLASSES
    patient: str
    video: str
    frame: str
    geometry: str  # "linear" or "convex"


@dataclasses.dataclass(frozen=True)
class Probe:
    """A transducer and its preset; lengths in mm."""

    geometry: str
    frequency: float  # MHz
    depth: float
    span: float  # linear: footprint, mm; convex: opening angle, radians
    focus: float
    radius: float = 0.0  # of curvature, convex only
    margin: float = 0.0  # black surround, as a fraction of the longer image side


PROBES = {
    "linear": (
        Probe("linear", frequency=7.5, depth=44, span=38, focus=18),
        Probe("linear", frequency=9.0, depth=36, span=38, focus=15, margin=0.03),
        Probe("linear", frequency=8.0, depth=40, span=38, focus=20, margin=0.02),
    ),
    "convex": (
        Probe("convex", frequency=3.5, depth=110, span=1.05, focus=60, radius=50, margin=0.03),
        Probe("convex", frequency=4.5, depth=90, span=1.15, focus=45, radius=40, margin=0.02),
        Probe("convex", frequency=3.5, depth=120, span=1.2, focus=70, radius=40, margin=0.04),
    ),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A tissue layer: thickness as a range of fractions of the imaged depth, levels in dB."""

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
    "convex": (  # upper abdomen: skin, fat, muscle, liver, and what lies behind the diaphragm
        Layer((0.02, 0.03), 4, 1.0, 0.5, 0, 1.5),
        Layer((0.04, 0.09), -4, 2.5, 1.5, 7, 0.8),
        Layer((0.04, 0.08), -5, 5.0, 1.0, 0, 1.6),
        Layer((0.60, 0.85), 0, 0.8, 1.2, 0, 1.4),
        Layer((1.00, 1.00), -4, 1.5, 2.5, 0, 3.5),
    ),
}


@dataclasses.dataclass(frozen=True)
class Scan:
    """The grid that a probe samples, its point-spread function, and the way from there to the image."""

    shape: tuple[int, int]  # D depth samples, L beams
    pulse: np.ndarray  # float32 [P], along depth, unit energy
    beam: np.ndarray  # float32 [D, T + 1], half of the symmetric lateral response at each depth, unit energy
    columns: np.ndarray  # float32 [H, W], beam index of every pixel
    rows: np.ndarray  # float32 [H, W], depth index of every pixel
    sector: np.ndarray  # uint8 [H, W]


def _to_scan(probe, x, z):
    """Position in mm, x across, z down from the middle of the probe face -> depth v in [0, 1], beam u in [-1, 1]."""
    if probe.geometry == "linear":
        return z / probe.depth, x / (probe.span / 2)
    behind = z + probe.radius
    return (np.hypot(x, behind) - probe.radius) / probe.depth, np.arctan2(x, behind) / (probe.span / 2)


def _to_space(probe, v, u):
    """The inverse of `_to_scan`."""
    if probe.geometry == "linear":
        return u * np.float32(probe.span / 2), v * np.float32(probe.depth)
    angle, distance = u * np.float32(probe.span / 2), probe.radius + v * np.float32(probe.depth)
    return distance * np.sin(angle), distance * np.cos(angle) - np.float32(probe.radius)


@functools.lru_cache(maxsize=16)
def _scan(probe, image_size):
    """Everything about a probe that does not depend on the patient -> Scan."""
    half = probe.span / 2
    sine, cosine = (half, 1.0) if probe.geometry == "linear" else (math.sin(half), math.cos(half))
    reach = 1.0 if probe.geometry == "linear" else probe.radius + probe.depth
    top, bottom = probe.radius * cosine - probe.radius, probe.depth
    extent = np.array([bottom - top, 2 * reach * sine])  # mm, height and width of the sector
    extent += 2 * probe.margin * extent.max()
    pixel = extent.min() / image_size  # mm
    height, width = (max(image_size, round(side / pixel)) for side in extent)
    x = (np.arange(width, dtype=np.float32) - (width - 1) / 2) * pixel
    z = (np.arange(height, dtype=np.float32) - (height - 1) / 2) * pixel + (top + bottom) / 2
    v, u = _to_scan(probe, x[None, :], z[:, None])
    v, u = np.broadcast_arrays(v, u)

    arc = probe.span * (1.0 if probe.geometry == "linear" else probe.radius + 0.6 * probe.depth)
    samples, beams = round(1.15 * probe.depth / pixel), round(arc / pixel)
    pulse, beam = _point_spread(probe, samples, beams)
    return Scan(
        shape=(samples, beams),
        pulse=pulse,
        beam=beam,
        columns=np.ascontiguousarray((u + 1) / 2 * (beams - 1), np.float32),
        rows=np.ascontiguousarray(v * (samples - 1), np.float32),
        sector=np.where((v >= 0) & (v <= 1) & (np.abs(u) <= 1), 255, 0).astype(np.uint8),
    )


def _point_spread(probe, samples, beams):
    """Pulse and beam of a probe on its grid -> float32 [P] and [D, T + 1].

    Two to three cycles long; as wide as wavelength times f-number at the focus, and wider away from it.
    """
    wavelength = _SPEED_OF_SOUND / probe.frequency
    # Below 0.7 samples the grid could not hold the speckle (small images): neighbours would be independent.
    sigma = max(0.7, 0.6 * wavelength * samples / probe.depth)
    t = np.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    # It rings down slower than it rises; OpenCV correlates, so time runs backwards here.
    pulse = np.exp(-0.5 * (t / np.where(t > 0, 0.85 * sigma, 1.15 * sigma)) ** 2)

    z = np.linspace(0, probe.depth, samples)
    width = 1.3 * wavelength * np.sqrt(1 + ((z - probe.focus) / (0.55 * probe.focus)) ** 2)
    pitch = probe.span / beams * (1.0 if probe.geometry == "linear" else probe.radius + z)
    sigma = np.clip(width / pitch, 0.7, beams / 30)
    t = np.arange(math.ceil(2.6 * sigma.max()) + 1)
    beam = np.exp(-0.5 * (t / sigma[:, None]) ** 2)
    beam /= np.sqrt(beam[:, :1] ** 2 + 2 * (beam[:, 1:] ** 2).sum(1, keepdims=True))
    return (pulse / np.linalg.norm(pulse)).astype(np.float32), beam.astype(np.float32)


def _normal(rng, *shape):
    """Circular complex Gaussian of unit power as two real channels -> float32 [*shape, 2]."""
    return rng.standard_normal((*shape, 2), np.float32) * np.float32(math.sqrt(0.5))


def _echoes(scan, scatterers):
    """Scatterers [D, L, 2] seen through the point-spread function -> float32 [D, L, 2], same power."""
    samples, beams = scan.shape
    lines = cv2.sepFilter2D(scatterers, -1, _ALONE, scan.pulse, borderType=cv2.BORDER_REFLECT_101)
    reach = scan.beam.shape[1] - 1
    padded = cv2.copyMakeBorder(lines, 0, 0, reach, reach, cv2.BORDER_REFLECT_101).reshape(samples, -1)
    echoes = scan.beam[:, :1] * padded[:, 2 * reach : 2 * (reach + beams)]
    for t in range(1, reach + 1):  # a convolution whose kernel changes from row to row
        both = padded[:, 2 * (reach - t) : 2 * (reach - t + beams)] + padded[:, 2 * (reach + t) :][:, : 2 * beams]
        both *= scan.beam[:, t : t + 1]
        echoes += both
    return echoes.reshape(samples, beams, 2)


def homogeneous_envelope(probe: Probe, *, seed: int = 0, image_size: int = 256) -> np.ndarray:
    """The envelope of uniform tissue before log compression, unit mean power -> float32 [D, L].

    Fully developed speckle: Rayleigh distributed, mean / std = sqrt(pi / (4 - pi)) = 1.91.
    """
    scan = _scan(probe, image_size)
    echoes = _echoes(scan, _normal(np.random.default_rng(seed), *scan.shape))
    return cv2.magnitude(echoes[..., 0], echoes[..., 1])


def _smooth(rng, shape, cells):
    """Smooth Gaussian noise of about unit variance, with `cells` independent values along each axis -> float32."""
    noise = cv2.resize(rng.standard_normal(cells, np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return noise / np.float32(0.9)  # what cubic interpolation leaves of the standard deviation


def _layers(rng, probe, v, u):
    """Layered tissue on a grid -> echogenicity (dB) and coherent reflections (amplitude), float32 [D, L] each."""
    shape = v.shape[0], u.shape[1]
    layers = LAYERS[probe.geometry]
    fibres, lobules = _smooth(rng, shape, (90, 14)), _smooth(rng, shape, (14, 9))
    septa = np.exp(-((_smooth(rng, shape, (13, 6)) / 0.12) ** 2))
    index = np.zeros(shape, np.uint8)
    reflections = np.zeros(shape, np.float32)
    edge, slope = 0.0, rng.uniform(-0.05, 0.05)
    for layer in layers:
        thickness = rng.uniform(*layer.thickness)
        relief = _smooth(rng, (1, shape[1]), (1, 6)) + 0.12 * _smooth(rng, (1, shape[1]), (1, 16))
        top = edge + min(0.15 * edge, 0.02) * relief + slope * u * min(1.0, 4 * edge)
        index += v > top
        # An interface reflects where it faces the probe, and is several sheets that come and go.
        facing = layer.interface * np.exp(-((np.gradient(top[0]) * shape[1] / 0.6) ** 2))
        for sheet in np.array([-0.6, 0, 0.4], np.float32) * rng.uniform(0.01, 0.03):
            patchy = np.clip(0.2 + 0.5 * _smooth(rng, (1, shape[1]), (1, 25)), 0, 1)
            reflections += facing * patchy * np.exp(-(((v - top - sheet) * 280) ** 2))
        edge += thickness
    tables = np.array([dataclasses.astuple(layer)[1:5] for layer in (layers[0], *layers)], np.float32)
    level, *weights = (tables[:, k][index] for k in range(4))
    return level + weights[0] * fibres + weights[1] * lobules + weights[2] * septa, reflections


@dataclasses.dataclass(frozen=True)
class Lesion:
    """What a class looks like; ranges are drawn per patient, dB relative to the tissue around."""

    level: tuple[float, float]  # echogenicity
    texture: float  # std of the inside, dB
    outline: float  # amplitude of its second harmonic, as a fraction of the size
    ragged: float  # how slowly the harmonics of the outline fall off, and noise on top
    aspect: tuple[float, float]  # height / width
    edge: float  # width of the margin as a fraction of the size
    wall: float  # amplitude of the reflection of the wall
    shadow: tuple[float, float]  # attenuation along the whole lesion; negative enhances
    rim: float  # refraction shadow below the sides


LESIONS = {
    "cyst": Lesion((-32, -20), 1.5, 0.06, 0.0, (0.55, 1.0), 0.06, 0.9, (-9, -5), 3.0),
    "solid_regular": Lesion((-12, -6), 1.5, 0.06, 0.05, (0.45, 0.85), 0.08, 0.5, (-3, 2), 2.5),
    "solid_irregular": Lesion((-16, -7), 3.5, 0.17, 0.9, (0.7, 1.3), 0.25, 0.1, (4, 16), 0.0),
}


def _blob(rng, x, z, *, size, aspect, outline, ragged=0.0):
    """A closed outline around (0, 0) -> float32, 1 at the centre, 0 on the outline, negative outside."""
    tilt, squeeze = rng.uniform(-0.35, 0.35), math.sqrt(aspect)
    a = (x * math.cos(tilt) + z * math.sin(tilt)) * np.float32(squeeze / size)
    b = (z * math.cos(tilt) - x * math.sin(tilt)) * np.float32(1 / squeeze / size)
    k = np.arange(2, 12)[:, None]
    amplitude = outline * (2 / k) ** (3 - 2.5 * ragged) * rng.uniform(0.3, 1.0, k.shape)
    phase = rng.uniform(0, 2 * math.pi, k.shape)
    turn = np.linspace(0, 2 * math.pi, 2048, endpoint=False)  # a table: cosines of the whole grid would be slow
    reach = 1 + (amplitude * np.cos(k * turn + phase)).sum(0).astype(np.float32)
    return reach[(np.arctan2(b, a) * np.float32(1024 / math.pi)).astype(np.int32) & 2047] - np.hypot(a, b)


def _vessels(rng, probe, x, z, tissue):
    """Dark vessels or lobules in every class: what a lesion has to be told from. Edits `tissue` in place."""
    for _ in range(rng.integers(2, 7)):
        at_x, at_z = _to_space(probe, rng.uniform(0.25, 0.9), rng.uniform(-0.9, 0.9))
        aspect, size = rng.uniform(0.2, 0.6), probe.depth * rng.uniform(0.012, 0.035)
        blob = _blob(rng, x - at_x, z - at_z, size=size, aspect=aspect, outline=0.04)
        depth = rng.uniform(8, 22) if probe.geometry == "convex" else rng.uniform(3, 8)
        tissue -= np.float32(depth) * np.clip(blob * 3 + 0.5, 0, 1)


def _lesion(rng, kind, probe, x, z, tissue, reflections):
    """Draws a lesion -> its outline (0 on it, positive inside) and its inside (dB), float32 [D, L] each.

    Adds its wall to `reflections`, in place of the interfaces it displaces.
    """
    at_x, at_z = _to_space(probe, rng.uniform(0.3, 0.52), rng.uniform(-0.4, 0.4))
    size, aspect = probe.depth * rng.uniform(0.08, 0.15), rng.uniform(*kind.aspect)
    outline = _blob(rng, x - at_x, z - at_z, size=size, aspect=aspect, outline=kind.outline, ragged=kind.ragged)
    outline += np.float32(0.06 * kind.ragged) * _smooth(rng, tissue.shape, (40, 40))
    around = tissue[(outline < 0) & (outline > -0.6)].mean()
    inside = around + np.float32(rng.uniform(*kind.level)) + kind.texture * _smooth(rng, tissue.shape, (45, 30))

    down, across = np.gradient(outline)
    facing = np.abs(down) / (np.hypot(down, across) + 1e-6)  # a wall reflects where it faces the beam
    patchy = np.clip(0.5 + 0.5 * _smooth(rng, tissue.shape, (15, 15)), 0.05, 1.2)
    reflections *= outline < 0
    reflections += kind.wall * patchy * facing**4 * np.exp(-((outline / 0.05) ** 2))
    return outline, inside


@dataclasses.dataclass(frozen=True)
class _Patient:
    """What the frames of a patient share."""

    probe: Probe
    scan: Scan
    tissue: np.ndarray  # float32 [D', L', 4]: echogenicity (dB), reflections, lesion outline, lesion inside (dB)
    speckle: np.ndarray  # float32 [D', L', 2]
    kind: Lesion | None
    shadow: float  # dB
    streaks: np.ndarray  # float32 [1, L]: dB lost over the depth, beam by beam
    tilt: float  # dB over the depth that the time-gain compensation leaves
    gain: float  # dB
    dynamic_range: float  # dB


def _patient(rng, label, image_size):
    """Draws a patient: probe, tissue, lesion and presets."""
    presets = PROBES[("linear", "convex")[rng.integers(2)]]
    probe = presets[rng.integers(len(presets))]
    scan = _scan(probe, image_size)
    rows, columns = (round(side * (1 + 2 * _MARGIN)) for side in scan.shape)
    v = np.linspace(-_MARGIN, 1 + _MARGIN, rows, dtype=np.float32)[:, None]
    u = np.linspace(-1 - 2 * _MARGIN, 1 + 2 * _MARGIN, columns, dtype=np.float32)[None, :]
    x, z = np.broadcast_arrays(*_to_space(probe, v, u))
    tissue, reflections = _layers(rng, probe, v, u)
    _vessels(rng, probe, x, z, tissue)
    kind = LESIONS.get(CLASSES[label])
    outline, inside = np.full_like(tissue, -9), np.zeros_like(tissue)
    if kind:
        outline, inside = _lesion(rng, kind, probe, x, z, tissue, reflections)
    return _Patient(
        probe=probe,
        scan=scan,
        tissue=cv2.merge([tissue, reflections, outline, inside]),
        speckle=_normal(rng, rows, columns),
        kind=kind,
        shadow=rng.uniform(*kind.shadow) if kind else 0.0,
        streaks=np.maximum(_smooth(rng, (1, scan.shape[1]), (1, 14)) - 0.6, 0) * np.float32(rng.uniform(2, 9)),
        tilt=rng.uniform(-12, 1),
        gain=rng.uniform(-4, 4),
        dynamic_range=rng.uniform(50, 65),
    )


def _move(rng, patient):
    """The tissue as a moved probe sees it -> tissue [D, L, 4] and scatterers [D, L, 2].

    Hand motion: a shift, a rotation and a change of pressure, and speckle that is only partly that of the last frame.
    """
    probe, (samples, beams) = patient.probe, patient.scan.shape
    v = np.linspace(0, 1, samples, dtype=np.float32)[:, None]
    u = np.linspace(-1, 1, beams, dtype=np.float32)[None, :]
    x, z = _to_space(probe, v, u)
    turn, pressure = rng.normal(0, 0.02), rng.normal(1, 0.015)
    shift_x, shift_z = probe.depth * np.clip(rng.normal(0, (0.02, 0.006)), -0.05, 0.05)
    moved_x = x * math.cos(turn) - z * math.sin(turn) + np.float32(shift_x)
    moved_z = (z * math.cos(turn) + x * math.sin(turn)) * np.float32(pressure) + np.float32(shift_z)
    v, u = _to_scan(probe, moved_x, moved_z)
    rows, columns = patient.tissue.shape[:2]
    row = (v + _MARGIN) * np.float32((rows - 1) / (1 + 2 * _MARGIN))
    column = (u + 1 + 2 * _MARGIN) * np.float32((columns - 1) / (2 + 4 * _MARGIN))
    tissue = cv2.remap(patient.tissue, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    # Whole samples only: interpolated noise would lose power.
    middle = samples // 2, beams // 2
    top = int(np.clip(row[middle] - middle[0], 0, rows - samples))
    left = int(np.clip(column[middle] - middle[1], 0, columns - beams))
    kept = rng.uniform(0.4, 0.9)  # correlation with the speckle of the patient
    scatterers = _normal(rng, samples, beams) * np.float32(math.sqrt(1 - kept**2))
    scatterers += np.float32(kept) * patient.speckle[top : top + samples, left : left + beams]
    return tissue, scatterers


def _below(weight, loss):
    """Total of `weight` above each sample, scaled so that the largest is `loss` dB -> float32 [D, L]."""
    total = np.cumsum(weight, axis=0)
    return total * np.float32(loss / max(total[-1].max(), 1))


def _frame(rng, patient):
    """One frame of a patient -> image and mask, uint8 [H, W]."""
    scan, probe, kind = patient.scan, patient.probe, patient.kind
    tissue, scatterers = _move(rng, patient)
    level, reflections, outline, inside = cv2.split(tissue)
    v = np.linspace(0, 1, scan.shape[0], dtype=np.float32)[:, None]

    loss = v * patient.streaks
    if kind:
        lesion = np.clip(outline / np.float32(kind.edge) + 0.5, 0, 1)
        sides = np.abs(cv2.Sobel(lesion, cv2.CV_32F, 1, 0))
        level += lesion * (inside - level)
        loss += cv2.blur(_below(lesion, patient.shadow) + _below(sides, kind.rim), (scan.shape[1] // 40 + 1, 1))
    focus = 2 * np.exp(-(((v - probe.focus / probe.depth) / 0.25) ** 2))
    gain = np.exp(_NEPER * (focus + patient.tilt * v - loss))
    amplitude = gain * np.exp(np.float32(_NEPER) * level)
    scatterers *= (amplitude * (1 + 2 * reflections))[..., None]
    scatterers[..., 0] += gain * reflections * np.float32(0.7)

    echoes = _echoes(scan, scatterers)
    # Receiver noise, which the time-gain compensation amplifies too, and the haze of side lobes and reverberation.
    noise = cv2.sepFilter2D(_normal(rng, *scan.shape), -1, _ACROSS, scan.pulse)
    haze = cv2.blur(amplitude, (scan.shape[1] // 5, scan.shape[0] // 12))
    echoes += noise * (np.exp(_NEPER * (22 * v - 49)) + np.float32(0.04) * haze)[..., None]
    envelope = cv2.GaussianBlur(cv2.magnitude(echoes[..., 0], echoes[..., 1]), (3, 3), 0.7)  # the video filter

    decibel = cv2.log(envelope + 1e-6) * np.float32(1 / _NEPER)
    brightness = patient.gain + rng.normal(0, 1) + 0.42 * patient.dynamic_range
    display = cv2.convertScaleAbs(np.maximum(decibel + brightness, 0), alpha=255 / patient.dynamic_range)
    image = cv2.remap(display, scan.columns, scan.rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mask = cv2.remap(outline, scan.columns, scan.rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return image & scan.sector, np.where(mask > 0, scan.sector, np.uint8(0))


def simulate_patient(patient: int, *, seed: int = 0, image_size: int = 256, frames: int = 4) -> list[Phantom]:
    """The frames of one patient.

    They share probe, tissue, lesion and presets and differ by hand motion, speckle and gain. Frame `k` depends on
    (seed, patient, image_size, k) only. Every four patients 4n to 4n + 3 have one of each class, in random order.

    Args:
        patient: number of the patient, from 0.
        seed: of the whole collection.
        image_size: the shorter side of the images in pixels, 32 or more.
        frames: how many.

    Returns:
        A list of `Phantom`.
    """
    if patient < 0 or image_size < 32:
        raise ValueError(f"patient is {patient} and image_size {image_size}; they start at 0 and 32.")
    label = int(np.random.default_rng([seed, _LABELS, patient // 4, 0]).permutation(len(CLASSES))[patient % 4])
    drawn = _patient(np.random.default_rng([seed, _TISSUE, patient, 0]), label, image_size)
    geometry, sector, name = drawn.probe.geometry, drawn.scan.sector, f"p{patient:05d}"
    phantoms = []
    for k in range(frames):
        image, mask = _frame(np.random.default_rng([seed, _FRAME, patient, k]), drawn)
        phantoms.append(Phantom(image, mask, sector.copy(), label, name, name, f"{name}_{k:02d}", geometry))
    return phantoms


def contact_sheet(*, seed: int = 0) -> np.ndarray:
    """The first frame of every geometry (rows) and class (columns), with captions -> uint8 [H, W]."""
    rows = []
    for geometry, image_size in (("linear", 288), ("convex", 224)):
        found: dict[int, np.ndarray] = {}
        patient = 0
        while len(found) < len(CLASSES):
            (phantom,) = simulate_patient(patient, seed=seed, image_size=image_size, frames=1)
            if phantom.geometry == geometry:
                found.setdefault(phantom.label, phantom.image)
            patient += 1
        side = max(image.shape[0] for image in found.values())
        for label, image in sorted(found.items()):
            tile = np.full((side + 30, 336), 16, np.uint8)
            top, left = (side - image.shape[0]) // 2 + 4, (336 - image.shape[1]) // 2
            tile[top : top + image.shape[0], left : left + image.shape[1]] = image
            caption = f"{geometry}: {CLASSES[label].replace('_', ' ')}"
            cv2.putText(tile, caption, (8, side + 23), cv2.FONT_HERSHEY_SIMPLEX, 0.45, 210, 1, cv2.LINE_AA)
            found[label] = tile
        rows.append(np.hstack([found[label] for label in range(len(CLASSES))]))
    return np.vstack(rows)


def main(arguments: list[str] | None = None) -> None:
    """Writes the contact sheet."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.phantom",
        description="Simulate labelled B-mode frames and write a contact sheet: every scan geometry and lesion class.",
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture to write, e.g. docs/phantoms.png")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated collection (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        written = cv2.imwrite(options.output, contact_sheet(seed=options.seed))
    except cv2.error:
        written = False
    if not written:
        parser.error(f"--output: cannot write {options.output!r}; name a .png in a folder that exists")
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
