"""What removing annotations removes, and how it changes tissue: ours compared with the published recipe.

    python -m benchmarks.deannotation [--images=40] [--data=DIR] [--picture=docs/deannotation.png]

Annotations are burnt into phantoms with a seed not used for any choice or inspection (7, 8, 9, 11, 21, 31, 100, 2025
and 4711 were), half of them on larger screens; a third each are lossless, JPEG 90 and JPEG 80. With --data they are
also burnt into public frames; these were inspected for gross faults, and thresholds were chosen on all of USGRA. The
recipe is in `published_recipe.py`, with Tesseract if it is installed. The text detector of
`pip install rapidocr-onnxruntime` is measured if it is installed.

Ink pixels count only if visible: changed by more than 16 grey levels and by more than 2 sigma, the standard deviation
of the clean frame in 15 x 15 pixels. Gone: the remaining change is at most half of that, or within 2 sigma. Found: in
the mask, or outside the sector and so blanked. Tissue is the sector without ink and Doppler; "away" also leaves out
pixels within 4 of ink, which compression changed. Changes are in grey levels. Speed is per processor time of one
thread. Each figure is the mean over frames, with the 10th and 90th percentiles in brackets.
"""

import argparse
import collections
import itertools
import pathlib
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cv2
import numpy as np

from benchmarks import overlays, published_recipe
from data_prep import phantom
from data_prep.clean.inpainting import clean_frame, overlay_mask
from data_prep.clean.sector import Sector, find_sector
from data_prep.readers import read_frames

Frames = Iterable[tuple[np.ndarray, np.ndarray]]  # frame and mask of its sector, uint8 [H, W] each
Method = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, float]]  # image -> result, mask, seconds
Figures = dict[str, dict[str, list[float]]]  # method -> figure -> value for each frame

_SEED = 90210
_REAL = (
    "HC18/training/image/??1_*.png",
    "AUL_liver/*/image/?2.jpg",
    "TimTrack_muscle/S10/*2?.png",
    "USGRA_nerve/images/*",
)


def phantoms(number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Clean frames, about 600 x 800, and their sectors."""
    for patient in range(number):
        (one,) = phantom.simulate_patient(patient, seed=_SEED, image_size=520, frames=1)
        rng = np.random.default_rng([_SEED, patient])
        yield overlays.screen(one.image, one.sector, rng) if patient % 2 else (one.image, one.sector)


def real_frames(folder: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Grey public frames, cropped to their sectors, and their sectors."""
    for pattern in _REAL:
        for path in sorted(pathlib.Path(folder).glob(pattern)):
            frame = next(read_frames(path)).pixels
            if frame.shape[2] == 1 and frame.dtype == np.uint8:
                sector = find_sector([frame])
                left, top, right, bottom = sector.box
                inside = np.ascontiguousarray(sector.mask[top:bottom, left:right])
                yield cv2.bitwise_and(frame[top:bottom, left:right, 0], inside), inside


def burnt(frames: Frames, *, doppler: bool = False, soft: float = 0.0) -> Iterator[tuple[overlays.Burnt, np.ndarray]]:
    """The frames with annotations burnt in, and their sectors."""
    for number, (clean, sector) in enumerate(frames):
        rng = np.random.default_rng([_SEED, number, 1])
        quality = (0, 90, 80)[number % 3]
        yield overlays.burn(clean, sector, rng, pieces=8, doppler=doppler, soft=soft, quality=quality), sector


def _processor_time():
    """Processor time of this process and its finished children, in seconds."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def ours(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Result in the size of the whole frame, mask including all outside the sector, seconds without the mask."""
    start = _processor_time()
    sector = find_sector([image])
    cleaned = clean_frame(image, sector)
    seconds = _processor_time() - start
    left, top, right, bottom = cleaned.box
    result = np.zeros((*image.shape[:2], 3), np.uint8)
    result[top:bottom, left:right] = cleaned.pixels
    return result, cv2.bitwise_or(overlay_mask(image, sector), cv2.bitwise_not(sector.mask)), seconds


def published(find_text: published_recipe.Boxes | None) -> Method:
    """The published recipe, with or without an engine that finds text."""

    def run(image):
        image = _rgb(image)
        start = _processor_time()
        result, mask = published_recipe.deannotate(image, find_text)
        return result, mask, _processor_time() - start

    return run


def _rgb(image):
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def _grey(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


def _sigma(clean):
    grey = _grey(clean)
    mean = cv2.blur(grey, (15, 15))
    return np.sqrt(np.maximum(cv2.blur(grey * grey, (15, 15)) - mean * mean, 0))


def judge(truth: overlays.Burnt, sector: np.ndarray, result: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The figures of one frame; kinds of annotations not visible in it are missing."""
    before, clean = _rgb(truth.image).astype(np.int16), _rgb(truth.clean)
    change = np.abs(before - clean).max(axis=2)
    left_over = np.abs(result.astype(np.int16) - clean).max(axis=2)
    limit = 2 * _sigma(clean)
    ink = np.max(list(truth.masks.values()), axis=0)
    seen = (ink > 0) & (change > 16) & (change > limit)
    gone = left_over <= np.maximum(change / 2, limit)
    figures = {}
    inside = seen & (sector > 0)
    for name, where in {"all": seen, "in the sector": inside}.items():
        if where.any():
            figures[f"gone {name}"], figures[f"found {name}"] = gone[where].mean(), (mask > 0)[where].mean()
    for kind, drawn in truth.masks.items():
        if (where := inside & (drawn > 0)).any():
            figures[f"gone {kind}"] = gone[where].mean()
    tissue = (sector > 0) & (ink == 0) & (truth.doppler == 0)
    away = (sector > 0) & (cv2.dilate(ink | truth.doppler, np.ones((9, 9), np.uint8)) == 0)
    moved = np.abs(_grey(result) - _grey(_rgb(truth.image)))
    for name, where in {"tissue": tissue, "away": away}.items():
        figures[f"change {name}"], figures[f"share {name}"] = moved[where].mean(), (moved[where] > 1).mean()
    flow = (truth.doppler > 0) & (cv2.dilate(ink, np.ones((9, 9), np.uint8)) == 0)
    if flow.any():
        figures["change Doppler"] = np.abs(result - before)[flow].mean()
    return figures


def measure(frames: Frames, methods: dict[str, Method], **how: Any) -> Figures:
    """All figures of all methods on the same frames, with annotations burnt in by `burnt(frames, **how)`."""
    figures: Figures = {name: collections.defaultdict(list) for name in methods}
    for truth, sector in burnt(frames, **how):
        for name, method in methods.items():
            result, mask, seconds = method(truth.image)
            for key, value in judge(truth, sector, result, mask).items():
                figures[name][key].append(value)
            figures[name]["images/s"].append(1 / seconds)
    return figures


def changes(frames: Frames, methods: dict[str, Method]) -> Figures:
    """How the methods change frames without annotations."""
    figures: Figures = {name: collections.defaultdict(list) for name in methods}
    for clean, sector in frames:
        for name, method in methods.items():
            moved = np.abs(_grey(method(clean[:, :, None])[0]) - clean)[sector > 0]
            figures[name]["change tissue"].append(float(moved.mean()))
            figures[name]["share tissue"].append(float((moved > 1).mean()))
    return figures


def detectors(frames: Frames, engines: dict[str, published_recipe.Boxes], soft: float = 0.0) -> Figures:
    """Detection of letters alone: share of letters found, share of tissue mistaken for letters, and speed."""
    figures: Figures = {name: collections.defaultdict(list) for name in ("ours", *engines)}
    for truth, sector in burnt(frames, soft=soft):
        image, ink = _rgb(truth.image), np.max(list(truth.masks.values()), axis=0)
        where = Sector(sector, (0, 0, sector.shape[1], sector.shape[0]), "declared", True)
        for name in figures:
            start = _processor_time()
            mask = published_recipe.text_mask(image, engines[name]) if name in engines else overlay_mask(image, where)
            figures[name]["images/s"].append(1 / (_processor_time() - start))
            letters = (truth.masks["text"] > 0) & (sector > 0)
            if letters.any():
                figures[name]["found text"].append(float((mask > 0)[letters].mean()))
            figures[name]["share tissue"].append(float((mask > 0)[(sector > 0) & (ink == 0)].mean()))
    return figures


def show(title: str, figures: Figures) -> None:
    """Prints a table with the methods as columns."""
    print(f"\n### {title}\n\n| | {' | '.join(figures)} |\n|---|{'---|' * len(figures)}")
    rows = dict.fromkeys(row for values in figures.values() for row in values)
    for row in sorted(rows, key=lambda row: (row.split()[0] != "gone", row.split()[0] != "found")):
        percent = row.split()[0] in ("gone", "found", "share")
        digits = 0 if row == "images/s" else 1 if row.split()[0] in ("gone", "found") else 2
        cells = []
        for values in figures.values():
            found = np.array(values[row]) * (100 if percent else 1)
            mean, low, high = (f"{value:.{digits}f}" for value in (found.mean(), *np.percentile(found, (10, 90))))
            cells.append(f"{mean}{'%' if percent else ''} ({low}, {high})")
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def draw(path: str) -> None:
    """Writes a picture with a row per phantom: with annotations, annotations found (red), and the result."""
    rows: list[np.ndarray] = []
    for clean, sector in itertools.islice(phantoms(8), 0, 8, 3):
        rng = np.random.default_rng([_SEED, len(rows)])
        image = _rgb(overlays.burn(clean, sector, rng, doppler=len(rows) == 1).image)
        where = find_sector([image])
        found, cleaned = image.copy(), clean_frame(image, where)
        found[overlay_mask(image, where) > 0] = 255, 0, 0
        left, top, right, bottom = cleaned.box
        blank = np.zeros_like(image)
        blank[top:bottom, left:right] = cleaned.pixels  # grey is repeated over the channels
        tiles = [cv2.resize(tile, (400, 300), interpolation=cv2.INTER_AREA) for tile in (image, found, blank)]
        rows.append(np.hstack(tiles))
    cv2.imwrite(path, cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40, help="phantoms (default %(default)s)")
    parser.add_argument("--data", help="folder with the public datasets")
    parser.add_argument("--picture", help="only write this .png: before, found, after")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    if args.picture:
        draw(args.picture)
        return
    engines = {"Tesseract": published_recipe.tesseract(), "DB (rapidocr)": published_recipe.rapidocr()}
    installed = {name: engine for name, engine in engines.items() if engine}
    ocr = engines["Tesseract"]
    methods = {"ours": ours, "published recipe" if ocr else "published recipe without OCR": published(ocr)}
    show(f"{args.images} phantoms", measure(phantoms(args.images), methods))
    show("With colour Doppler", measure(phantoms(args.images), methods, doppler=True))
    show("Ink blurred by 0.7 pixels", measure(phantoms(args.images), methods, soft=0.7))
    show("Phantoms without annotations", changes(phantoms(args.images), methods))
    show("Letters, phantoms", detectors(phantoms(args.images), installed))
    show("Letters blurred by 0.7 pixels", detectors(phantoms(args.images), installed, soft=0.7))
    if args.data:
        number = sum(1 for _ in real_frames(args.data))
        show(f"{number} public frames", measure(real_frames(args.data), methods))
        show("Public frames as they are, their own marks included", changes(real_frames(args.data), methods))
        show("Letters, public frames", detectors(real_frames(args.data), installed))


if __name__ == "__main__":
    main()
