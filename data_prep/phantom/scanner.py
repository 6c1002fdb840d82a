"""A simulated scanner: probes, the point-spread function, echoes and scan conversion.

Unresolved reflectors are circular complex Gaussian at baseband, since their positions within a wavelength make their
phase uniform [1]. Convolution with the point-spread function, a pulse along depth times a lateral Gaussian that is
narrowest at the focus, turns them into echoes [2, 3, 4] on a grid of depth samples by beams. Scan conversion resamples
that grid to an image. Multipath, elevation and steering are not simulated.

[1] Wagner, Smith, Sandrik, Lopez. Statistics of speckle in ultrasound B-scans. IEEE Trans. Sonics Ultrason. 30, 1983.
[2] Bamber, Dickinson. Ultrasonic B-scanning: a computer simulation. Phys. Med. Biol. 25, 1980.
[3] Meunier, Bertrand. Echographic image mean gray level changes with tissue dynamics: a system-based model study.
    IEEE Trans. Biomed. Eng. 42, 1995.
[4] Jensen. Field: a program for simulating ultrasound systems. Med. Biol. Eng. Comput. 34, 1996.
"""

import dataclasses
import functools
import math

import cv2
import numpy as np

_SPEED_OF_SOUND = 1.54  # mm/us, the value that scanners assume
_ALONE, _ACROSS = np.ones(1, np.float32), np.array([0.5, 0.7, 0.5], np.float32)  # lateral filters of unit energy


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
class Scan:
    """The grid that a probe samples, its point-spread function, and the mapping from the grid to the image."""

    shape: tuple[int, int]  # D depth samples, L beams
    pulse: np.ndarray  # float32 [P], along depth, unit energy
    beam: np.ndarray  # float32 [D, T + 1], half of the symmetric lateral response at each depth, unit energy
    columns: np.ndarray  # float32 [H, W], beam index of every pixel
    rows: np.ndarray  # float32 [H, W], depth index of every pixel
    sector: np.ndarray  # uint8 [H, W]


def to_scan(probe: Probe, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps mm, x across and z down from the centre of the probe face, to depth v in [0, 1] and beam u in [-1, 1]."""
    if probe.geometry == "linear":
        return z / probe.depth, x / (probe.span / 2)
    behind = z + probe.radius
    return (np.hypot(x, behind) - probe.radius) / probe.depth, np.arctan2(x, behind) / (probe.span / 2)


def to_space(probe: Probe, v: np.ndarray | float, u: np.ndarray | float) -> tuple:
    """The inverse of `to_scan`."""
    if probe.geometry == "linear":
        return u * np.float32(probe.span / 2), v * np.float32(probe.depth)
    angle, distance = u * np.float32(probe.span / 2), probe.radius + v * np.float32(probe.depth)
    return distance * np.sin(angle), distance * np.cos(angle) - np.float32(probe.radius)


@functools.lru_cache(maxsize=16)
def scan_geometry(probe: Probe, image_size: int) -> Scan:
    """Everything about a probe that is independent of the patient; `image_size` is the image's shorter side."""
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
    v, u = to_scan(probe, x[None, :], z[:, None])
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
    """Pulse and beam of a probe on its grid: float32 [P] and [D, T + 1].

    The pulse is two to three cycles long; the beam is as wide as wavelength times f-number at the focus, and wider away
    from it.
    """
    wavelength = _SPEED_OF_SOUND / probe.frequency
    # Below 0.7 samples (small images) the grid could not resolve the speckle: neighbours would be independent.
    sigma = max(0.7, 0.6 * wavelength * samples / probe.depth)
    t = np.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    # The pulse decays more slowly than it rises; OpenCV computes a correlation, so time is reversed here.
    pulse = np.exp(-0.5 * (t / np.where(t > 0, 0.85 * sigma, 1.15 * sigma)) ** 2)

    z = np.linspace(0, probe.depth, samples)
    width = 1.3 * wavelength * np.sqrt(1 + ((z - probe.focus) / (0.55 * probe.focus)) ** 2)
    pitch = probe.span / beams * (1.0 if probe.geometry == "linear" else probe.radius + z)
    sigma = np.clip(width / pitch, 0.7, beams / 30)
    t = np.arange(math.ceil(2.6 * sigma.max()) + 1)
    beam = np.exp(-0.5 * (t / sigma[:, None]) ** 2)
    beam /= np.sqrt(beam[:, :1] ** 2 + 2 * (beam[:, 1:] ** 2).sum(1, keepdims=True))
    return (pulse / np.linalg.norm(pulse)).astype(np.float32), beam.astype(np.float32)


def complex_normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Circular complex Gaussian samples of unit power, as two real channels: float32 [*shape, 2]."""
    return rng.standard_normal((*shape, 2), np.float32) * np.float32(math.sqrt(0.5))


def receive(scan: Scan, scatterers: np.ndarray) -> np.ndarray:
    """Convolves scatterers [D, L, 2] with the point-spread function: float32 [D, L, 2], same power."""
    samples, beams = scan.shape
    lines = cv2.sepFilter2D(scatterers, -1, _ALONE, scan.pulse, borderType=cv2.BORDER_REFLECT_101)
    reach = scan.beam.shape[1] - 1
    padded = cv2.copyMakeBorder(lines, 0, 0, reach, reach, cv2.BORDER_REFLECT_101).reshape(samples, -1)
    echoes: np.ndarray = scan.beam[:, :1] * padded[:, 2 * reach : 2 * (reach + beams)]
    for t in range(1, reach + 1):  # a convolution whose kernel changes from row to row
        both = padded[:, 2 * (reach - t) : 2 * (reach - t + beams)] + padded[:, 2 * (reach + t) :][:, : 2 * beams]
        both *= scan.beam[:, t : t + 1]
        echoes += both
    return echoes.reshape(samples, beams, 2)


def receiver_noise(rng: np.random.Generator, scan: Scan) -> np.ndarray:
    """Electronic noise of unit power in the band of the pulse, independent of the beam: float32 [D, L, 2]."""
    return cv2.sepFilter2D(complex_normal(rng, *scan.shape), -1, _ACROSS, scan.pulse)


def scan_convert(scan: Scan, samples: np.ndarray) -> np.ndarray:
    """Resamples a grid [D, L] to an image [H, W]; outside the sector, border values are repeated."""
    return cv2.remap(samples, scan.columns, scan.rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
