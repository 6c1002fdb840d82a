"""Burns annotations like those of scanners into clean frames, so that their removal can be measured.

The pieces are modelled on real screens: measurement text and comments, calipers with dotted lines, traces, rulers and
focus marks, boxes, logos, body marks, grey and colour bars, arrows; with and without anti-aliasing and a dark outline;
white, grey or coloured. Colour Doppler is part of the image: it is painted into the clean frame and must be preserved.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

KINDS = ("text", "caliper", "line", "scale", "box", "logo", "mark", "bar", "arrow")

_FAINT = 25  # of 255: fainter ink is not visible
_GREYS = ((255, 255, 255), (235, 235, 235), (200, 200, 200))
_COLOURS = ((255, 255, 0), (0, 255, 0), (0, 255, 255), (255, 160, 0), (90, 200, 255))
_WORDS = ("RIGHT", "LT BREAST", "MAMA DIR. QIE", "TRANS", "SAG ML", "Liver", "QSE", "Kidney R", "3 o'clock", "THYROID")
_LINES = ("D1 {:.2f} cm", "1 L {:.1f} mm", "HC {:.1f} cm", "x {:.1f}mm", "Vol {:.2f} ml", "Dist {:.2f} cm", "MI {:.1f}")


@dataclasses.dataclass(frozen=True)
class Burnt:
    """A frame with annotations and their ground truth.

    Attributes:
      image: uint8 `[H, W, 1]`, or `[H, W, 3]` if it contains coloured annotations or Doppler.
      clean: the same without annotations, of the same shape; with Doppler, but without JPEG compression.
      masks: by kind, uint8 `[H, W]`, 255 where ink or its dark outline covers a tenth of the pixel or more.
      doppler: uint8 `[H, W]`, 255 on colour Doppler.
    """

    image: np.ndarray
    clean: np.ndarray
    masks: dict[str, np.ndarray]
    doppler: np.ndarray


def screen(image: np.ndarray, sector: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places a uint8 `[H, W]` image and its sector on a larger dark screen, with margins of 4 to 20% on each side."""
    height, width = image.shape
    top, bottom = (round(height * rng.uniform(0.06, 0.2)) for _ in range(2))
    left, right = (round(width * rng.uniform(0.04, 0.2)) for _ in range(2))
    margins = (top, bottom), (left, right)
    return np.pad(image, margins), np.pad(sector, margins)


def burn(
    clean: np.ndarray,
    sector: np.ndarray,
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = KINDS,
    pieces: int = 6,
    doppler: bool = False,
    colour: float = 0.3,
    soft: float = 0.0,
    quality: int = 0,
) -> Burnt:
    """Burns annotations into a frame.

    Args:
      clean: uint8 `[H, W]`.
      sector: uint8 `[H, W]`, nonzero on imaged tissue; four of five pieces start on it, the others anywhere, bars and
        rulers near the left or right side of the frame.
      rng: source of all random choices.
      kinds: the kinds to choose from.
      pieces: number of pieces; each of `kinds` is used once before any is repeated.
      doppler: whether to add a colour Doppler patch to the sector.
      colour: probability that a piece is coloured.
      soft: standard deviation in pixels of a blur of the ink, as caused by video capture and resizing.
      quality: of a final JPEG compression, 0 for none.

    Raises:
      ValueError: a kind is unknown.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds are {', '.join(KINDS)}; not {', '.join(sorted(unknown))}.")
    base, flow = _doppler(clean, sector, rng) if doppler else (cv2.cvtColor(clean, cv2.COLOR_GRAY2RGB), clean * 0)
    image, masks, coloured = base.copy(), {kind: np.zeros_like(clean) for kind in kinds}, doppler
    order = [kinds[k] for _ in range(pieces // max(len(kinds), 1) + 1) for k in rng.permutation(len(kinds))]
    for kind in order[:pieces]:
        ink = _COLOURS[rng.integers(len(_COLOURS))] if rng.random() < colour else _GREYS[rng.integers(len(_GREYS))]
        place = _place(sector if rng.random() < 0.8 else np.full_like(sector, 255), rng)
        if kind in ("bar", "scale"):
            place = round(clean.shape[1] * (rng.uniform(0.01, 0.08) + 0.88 * rng.integers(2))), place[1]
        alpha, piece = np.zeros_like(clean), np.full((*clean.shape, 3), ink, np.uint8)
        _PAINT[kind](alpha, place, rng, piece)
        coloured |= bool(np.ptp(ink))
        if rng.random() < 0.3:  # a dark outline, which scanners use to stay legible on bright tissue
            outline = _soften(cv2.dilate(alpha, np.ones((3, 3), np.uint8)), soft)
            _blend(image, 0, outline)
            masks[kind] = cv2.max(masks[kind], outline)
        alpha = _soften(alpha, soft)
        _blend(image, piece, alpha)
        masks[kind] = cv2.max(masks[kind], alpha)
    if quality:
        coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
    channels = 3 if coloured else 1
    masks = {kind: np.where(mask > _FAINT, np.uint8(255), np.uint8(0)) for kind, mask in masks.items()}
    return Burnt(image[:, :, :channels].copy(), base[:, :, :channels].copy(), masks, flow)


def _soften(alpha, soft):
    return cv2.GaussianBlur(alpha, (0, 0), soft) if soft else alpha


def _blend(image, ink, alpha):
    """Paints `ink` (a grey level or `[H, W, 3]`) over `image` in place."""
    weight = alpha[:, :, None].astype(np.float32) / 255
    image[:] = np.rint(image + weight * (ink - image.astype(np.float32)))


def _place(allowed, rng):
    """A random pixel (x, y) of `allowed`."""
    rows, columns = np.nonzero(allowed)
    k = rng.integers(len(rows))
    return int(columns[k]), int(rows[k])


def _pixels(alpha, rng, low, high):
    """A random length, given in pixels of a screen of 600 lines, scaled to the size of the frame; at least 1."""
    return max(1, round(rng.uniform(low, high) * max(min(alpha.shape) / 600, 0.6)))


def _antialias(rng):
    return cv2.LINE_AA if rng.random() < 0.5 else cv2.LINE_8


def _away(place, length, rng):
    angle = rng.uniform(0, math.tau)
    return place[0] + round(length * math.cos(angle)), place[1] + round(length * math.sin(angle))


def _write(alpha, text, place, size, rng):
    """Writes with Pillow's scalable or OpenCV's built-in font; `place` is the upper left corner, `size` in pixels."""
    if rng.random() < 0.5:
        picture = Image.fromarray(alpha)
        draw = ImageDraw.Draw(picture)
        draw.fontmode = "L" if rng.random() < 0.5 else "1"
        draw.text(place, text, fill=255, font=ImageFont.load_default(size))
        alpha[:] = np.asarray(picture)
    else:
        position, thick = (place[0], place[1] + size), 2 if size > 18 and rng.random() < 0.5 else 1
        cv2.putText(alpha, text, position, cv2.FONT_HERSHEY_SIMPLEX, size / 28, (255,), thick, _antialias(rng))


def _dots(alpha, points, gap, radius):
    """Draws dots along a polyline, `gap` pixels apart."""
    for start, end in itertools.pairwise(points):
        steps = max(round(math.dist(start, end) / gap), 1)
        for x, y in np.linspace(start, end, steps, endpoint=False).round().astype(int).tolist():
            cv2.rectangle(alpha, (x, y), (x + radius, y + radius), (255,), -1)


def _text(alpha, place, rng, piece):
    size, lines = _pixels(alpha, rng, 11, 26), [_WORDS[rng.integers(len(_WORDS))]]
    if rng.random() < 0.6:
        lines = [_LINES[k].format(rng.uniform(0.3, 30)) for k in rng.integers(len(_LINES), size=rng.integers(1, 4))]
    x = min(place[0], max(alpha.shape[1] - size * max(map(len, lines)) // 2, 0))
    y = min(place[1], max(alpha.shape[0] - round(1.5 * size) * len(lines), 0))
    state = rng.bit_generator.state
    for number, line in enumerate(lines):
        rng.bit_generator.state = state  # one font for the whole block
        _write(alpha, line, (x, y + round(1.4 * size) * number), size, rng)


def _caliper(alpha, place, rng, piece):
    size, line = _pixels(alpha, rng, 4, 8), _antialias(rng)
    end, how = _away(place, _pixels(alpha, rng, 40, 180), rng), int(rng.integers(3))
    for number, (x, y) in enumerate((place, end)):
        half = max(1, round(0.7 * size))
        arms = [(size, 0), (0, size)] * (how != 1) + [(half, half), (half, -half)] * (how != 0)  # + or x or both
        for dx, dy in arms:
            cv2.line(alpha, (x - dx, y - dy), (x + dx, y + dy), (255,), 1, line)
        if rng.random() < 0.4:
            _write(alpha, str(number + 1), (x + size, y - 2 * size), max(9, 2 * size), rng)
    if rng.random() < 0.7:
        _dots(alpha, [place, end], _pixels(alpha, rng, 4, 9), int(rng.integers(2)))


def _line(alpha, place, rng, piece):
    axes, tilt = (_pixels(alpha, rng, 25, 110), _pixels(alpha, rng, 25, 110)), int(rng.integers(180))
    if rng.random() < 0.6:
        gap = _pixels(alpha, rng, 4, 9)
        angle = max(1, round(math.degrees(gap / max(axes))))
        points = np.asarray(cv2.ellipse2Poly(place, axes, tilt, 0, 360, angle)).tolist()
        _dots(alpha, points, gap, int(rng.integers(2)))
    else:
        cv2.ellipse(alpha, place, axes, tilt, 0, int(rng.integers(120, 361)), (255,), 1, _antialias(rng))


def _scale(alpha, place, rng, piece):
    """A ruler with numbers, tick marks or dots down the frame, sometimes a focus triangle."""
    (x, focus), step, tick = place, _pixels(alpha, rng, 25, 60), _pixels(alpha, rng, 4, 9)
    numbered, style, size = rng.random() < 0.4, rng.integers(3), _pixels(alpha, rng, 11, 14)
    state = rng.bit_generator.state
    for number, y in enumerate(range(step // 2, alpha.shape[0], step)):
        long = 2 if number % 5 == 0 else 1
        if style == 2:
            cv2.circle(alpha, (x, y), long, (255,), -1)
        else:
            cv2.rectangle(alpha, (x, y), (x + tick * long, y + int(style)), (255,), -1)
        if numbered and number % 2 == 0:
            rng.bit_generator.state = state
            _write(alpha, str(number // 2), (x - 3 * tick, y - tick), size, rng)
    if style == 0 and rng.random() < 0.4:
        cv2.line(alpha, (x, step // 2), (x, alpha.shape[0] - step // 2), (255,), 1)
    if rng.random() < 0.5:
        cv2.fillConvexPoly(
            alpha, np.array([[x, focus], [x + 2 * tick, focus - tick], [x + 2 * tick, focus + tick]]), (255,)
        )


def _box(alpha, place, rng, piece):
    if rng.random() < 0.6:  # region of interest
        end = place[0] + _pixels(alpha, rng, 60, 220), place[1] + _pixels(alpha, rng, 40, 160)
        cv2.rectangle(alpha, place, end, (255,), int(rng.integers(1, 3)))
        return
    size, letters = _pixels(alpha, rng, 12, 20), np.zeros_like(alpha)  # a filled label with dark letters
    cv2.rectangle(alpha, place, (place[0] + 5 * size, place[1] + round(1.6 * size)), (255,), -1)
    _write(letters, "FREEZE"[: int(rng.integers(3, 7))], (place[0] + size // 2, place[1] + size // 8), size, rng)
    _blend(piece, 0, letters)


def _logo(alpha, place, rng, piece):
    size = _pixels(alpha, rng, 14, 26)
    if rng.random() < 0.5:
        letters = np.zeros_like(alpha)
        cv2.circle(alpha, place, size, (255,), -1, _antialias(rng))
        _write(letters, "PSG"[rng.integers(3)], (place[0] - size // 2, place[1] - size // 2), size, rng)
        _blend(piece, 20, letters)
    else:
        _write(alpha, ("VENDOR", "GX", "Sono", "US-1")[rng.integers(4)], place, 2 * size, rng)


def _mark(alpha, place, rng, piece):
    """A body mark: an outline with the position of the probe."""
    size, line = _pixels(alpha, rng, 18, 34), _antialias(rng)
    for side in (-1, 1)[: 1 + int(rng.integers(2))]:
        for radius in (size, max(1, size // 5)):
            cv2.circle(alpha, (place[0] + side * size, place[1]), radius, (255,), 1, line)
    cv2.line(alpha, place, _away(place, size, rng), (255,), 2, line)


def _bar(alpha, place, rng, piece):
    """A grey or colour bar with a frame."""
    (x, y), width, height = place, _pixels(alpha, rng, 8, 18), _pixels(alpha, rng, 70, 180)
    cv2.rectangle(alpha, place, (x + width, y + height), (255,), -1)
    ramp: np.ndarray = np.linspace(255, 0, height - 1).astype(np.uint8)[:, None]
    if np.ptp(piece[0, 0]):
        ramp = np.asarray(cv2.applyColorMap(ramp, cv2.COLORMAP_JET))[:, 0, ::-1]
    inside = piece[y + 1 : y + height, x + 1 : x + width]
    inside[:] = ramp.reshape(height - 1, 1, -1)[: inside.shape[0]]


def _arrow(alpha, place, rng, piece):
    end, thick, line = _away(place, _pixels(alpha, rng, 20, 50), rng), int(rng.integers(1, 4)), _antialias(rng)
    cv2.arrowedLine(alpha, place, end, (255,), thick, line, tipLength=rng.uniform(0.3, 0.5))


_PAINT = dict(zip(KINDS, (_text, _caliper, _line, _scale, _box, _logo, _mark, _bar, _arrow), strict=True))


def _doppler(clean, sector, rng):
    """Paints colour flow in vessels, red to yellow and blue to cyan by velocity; returns the image and its mask."""
    (x, y), side = _place(cv2.erode(sector, np.ones((9, 9), np.uint8)), rng), _pixels(clean, rng, 80, 200)
    noise = [cv2.GaussianBlur(rng.normal(size=clean.shape).astype(np.float32), (0, 0), side / k) for k in (7, 25)]
    field = noise[0] / noise[0].std() + 0.3 * noise[1] / noise[1].std()
    box = np.zeros_like(sector)
    cv2.rectangle(box, (x - side, y - side), (x + side, y + side), (255,), -1)
    flow = np.where((np.abs(field) > 1) & (box > 0) & (sector > 0), np.uint8(255), np.uint8(0))
    speed = np.clip((np.abs(field) - 1) / 1.5, 0, 1)
    slow, fast = 110 + 145 * speed, 220 * speed * (speed > 0.3)
    image = cv2.cvtColor(clean, cv2.COLOR_GRAY2RGB)
    _blend(image, np.stack([slow * (field > 0), fast, slow * (field < 0)], axis=2), flow)
    return image, flow
