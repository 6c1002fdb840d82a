"""Whether copies of real frames are recognised, and frames of other patients are not mistaken for copies.

    python -m benchmarks.near_duplicates --data=DIR [--frames=400] [--pictures=DIR]

DIR holds the public datasets BUS-BRA, HC18, AUL_liver, USGRA_nerve, TimTrack_muscle, COVID-BLUES and POCUS_lung as
published; missing ones are left out. Patients are split in two halves: the first is for choosing `NEAR` and `ALIKE`,
the second is reported, with one frame per patient and 95% intervals (Wilson). A false match is a pair of frames of
different patients that is called the same picture. Patients of AUL and USGRA are not known: their pairs, and those
within a patient, are listed for a person to judge; --pictures writes them side by side.

Three pairs of cases of BUS-BRA show the same frames, cut off at different depths; each pair counts as one patient here.
"""

import argparse
import collections
import csv
import dataclasses
import math
import pathlib
import timeit
from collections.abc import Callable, Iterable

import cv2
import numpy as np

from usfmae_jax.data import fingerprints
from usfmae_jax.data.records import decode_image

_RADII = (16, 24, 48, 64, 80, 88, 96, 104)
_LIMITS = (0.02, 0.03, 0.05, 0.1)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_ONE_PATIENT = {"65": "44", "91": "56", "356": "341"}  # cases of BUS-BRA that show the same frames


@dataclasses.dataclass(frozen=True)
class Still:
    """A frame as it would be stored: uint8 `[H, W]`, short side at most 256."""

    dataset: str
    patient: str  # empty: unknown
    name: str
    pixels: np.ndarray


def _read(data: pathlib.Path) -> Iterable[Still]:
    if (data / "BUS-BRA").is_dir():
        with (data / "BUS-BRA/bus_data.csv").open() as table:
            for row in csv.DictReader(table):
                case, name = _ONE_PATIENT.get(row["Case"], row["Case"]), f"{row['ID']}.png"
                yield Still("BUS-BRA", case, name, _load(data / "BUS-BRA/Images" / name))
    for path in sorted(data.glob("HC18/training/image/*.png")):
        yield Still("HC18", path.name[:3], path.name, _load(path))
    for dataset, pattern in (("AUL", "AUL_liver/*/image/*.jpg"), ("USGRA", "USGRA_nerve/images/*.png")):
        for path in sorted(data.glob(pattern)):
            yield Still(dataset, "", path.name, _load(path))
    for path in sorted(data.glob("TimTrack_muscle/*/*.png")):
        yield Still("TimTrack", path.parent.name, path.name, _load(path))
    for path in sorted(data.glob("COVID-BLUES/lus_videos/*.mp4")):
        clip = list(_clip(path))
        yield Still("COVID-BLUES", path.name.split("_")[1], path.name, _stored(clip[len(clip) // 2]))


def _load(path: pathlib.Path) -> np.ndarray:
    return _stored(decode_image(path.read_bytes())[:, :, 0])


def _clip(path: pathlib.Path) -> Iterable[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    while (read := capture.read())[0]:
        yield cv2.cvtColor(read[1], cv2.COLOR_BGR2GRAY)


def _stored(grey: np.ndarray) -> np.ndarray:
    scale = 256 / min(grey.shape)
    return grey if scale >= 1 else cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _resized(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return lambda grey: cv2.resize(grey, None, fx=scale, fy=scale, interpolation=how)


def _jpeg(grey: np.ndarray, quality: int) -> np.ndarray:
    return decode_image(cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())[:, :, 0]


def _crop(grey: np.ndarray, part: float, right: float | None = None, bottom: float | None = None) -> np.ndarray:
    """Cuts off a fraction of the height at top and bottom and of the width on both sides, unless given otherwise."""
    height, width = grey.shape
    below = height - round((part if bottom is None else bottom) * height)
    beside = width - round((part if right is None else right) * width)
    return np.ascontiguousarray(grey[round(part * height) : below, round(part * width) : beside])


def _gamma(grey: np.ndarray, power: float) -> np.ndarray:
    return np.rint(255 * (grey / 255) ** power).astype(np.uint8)


def _on_screen(grey: np.ndarray) -> np.ndarray:
    """The frame on a scanner's screen, with text and a grey bar beside it."""
    height, width = grey.shape
    screen = np.zeros((round(1.4 * height), round(1.5 * width)), np.uint8)
    top, left = round(0.25 * height), round(0.15 * width)
    screen[top : top + height, left : left + width] = grey
    for line, text in enumerate(("HOSPITAL 12:30", "MI 0.9 TIS 0.3", "Gn 52 C 60")):
        cv2.putText(screen, text, (4, 14 + 12 * line), _FONT, 0.4, 200, 1)
    bar = np.linspace(255, 0, height // 2).astype(np.uint8)[:, None]
    screen[top : top + len(bar), left + width + 20 : left + width + 28] = bar
    return screen


def _sector(grey: np.ndarray) -> np.ndarray:
    """The frame with its corners blanked, as in images of a convex probe."""
    outline = np.array([[0.3, 0], [0.7, 0], [1, 0.6], [0.98, 0.85], [0.5, 1], [0.02, 0.85], [0, 0.6]])
    mask = np.zeros_like(grey)
    cv2.fillPoly(mask, [(outline * grey.shape[::-1]).astype(np.int32)], 1)
    return grey * mask


def _annotated(grey: np.ndarray) -> np.ndarray:
    grey, (height, width) = grey.copy(), grey.shape
    cv2.putText(grey, "MAMA DIREITA", (width // 10, height // 2), _FONT, 0.5, 220, 1)
    cv2.putText(grey, "QSE 58 ANOS 10H", (width // 10, 5 * height // 8), _FONT, 0.5, 220, 1)
    for across, down in ((3, 4), (2, 3)):
        cv2.drawMarker(grey, (width // across, height // down), 230, cv2.MARKER_CROSS, 9)
    return grey


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "half the size": _resized(0.5),
    "twice the size": _resized(2),
    "JPEG of quality 50": lambda grey: _jpeg(grey, 50),
    "crop of 3% a side": lambda grey: _crop(grey, 0.03),
    "crop of 3% left and top": lambda grey: _crop(grey, 0.03, right=0, bottom=0),
    "crop of 5% a side": lambda grey: _crop(grey, 0.05),
    "lowest 20% cut off": lambda grey: _crop(grey, 0, bottom=0.2),
    "surround added": _on_screen,
    "corners blanked": _sector,
    "gamma 0.6": lambda grey: _gamma(grey, 0.6),
    "gamma 1.6": lambda grey: _gamma(grey, 1.6),
    "contrast 1.4, clipped": lambda grey: np.clip(1.4 * grey - 20, 0, 255).astype(np.uint8),
    "equalised (CLAHE)": lambda grey: cv2.createCLAHE(2.0, (8, 8)).apply(grey),
    "text and calipers burnt in": _annotated,
    "surround, gamma 0.7": lambda grey: _gamma(_on_screen(grey), 0.7),
    "text, crop of 2% a side": lambda grey: _crop(_annotated(grey), 0.02),
    "flipped (not meant to match)": lambda grey: np.ascontiguousarray(grey[:, ::-1]),
}


def interval(hits: int, number: int) -> str:
    """A proportion in percent with its 95% Wilson interval."""
    z, share = 1.96, hits / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2)) / (1 + z * z / number)
    return f"{100 * share:.1f} [{100 * max(0, middle - half):.1f}, {100 * min(1, middle + half):.1f}]"


def _copies(stills: list[Still]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Hash distances and similarities between the frames and their copies, by treatment."""
    seen = [fingerprints.views(still.pixels) for still in stills]
    codes = [fingerprints.hash_views(view)[None] for view in seen]
    found = {}
    for name, treat in COPIES.items():
        copied = [fingerprints.views(treat(still.pixels)) for still in stills]
        distance = [
            fingerprints.distances(fingerprints.hash_views(copy)[None], code)[0, 0]
            for copy, code in zip(copied, codes, strict=True)
        ]
        alike = [fingerprints.similarity(copy, view) for copy, view in zip(copied, seen, strict=True)]
        found[name] = np.array(distance), np.array(alike)
    return found


def _pairs(stills: list[Still]) -> tuple[list[tuple[float, int, str, int, int]], dict[str, int]]:
    """Pairs within the largest radius, (similarity, distance, kind, i, j), best first; number of all pairs by kind."""
    seen = [fingerprints.views(still.pixels) for still in stills]
    codes = np.array([fingerprints.hash_views(view) for view in seen])
    patients = np.array([still.patient for still in stills])
    datasets = np.array([still.dataset for still in stills])

    def kinds(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        unknown = (datasets[i] == datasets[j]) & (patients[i] == "")
        same = (datasets[i] == datasets[j]) & (patients[i] == patients[j])
        return np.where(unknown, "unknown", np.where(same, "same", "other"))

    i, j, distance = fingerprints.near_pairs(codes, radius=max(_RADII))
    alike = [fingerprints.similarity(seen[a], seen[b]) for a, b in zip(i, j, strict=True)]
    found = zip(alike, distance.tolist(), kinds(i, j).tolist(), i.tolist(), j.tolist(), strict=True)
    names, counts = np.unique(kinds(*np.triu_indices(len(stills), 1)), return_counts=True)
    return sorted(found, reverse=True), dict(zip(names.tolist(), counts.tolist(), strict=True))


def _print_radii(copies: dict[str, tuple[np.ndarray, np.ndarray]], stills: list[Still]) -> None:
    pairs, totals = _pairs(stills)
    other = [distance for _, distance, kind, *_ in pairs if kind == "other"]
    print("\nTuning half: copies within a hash distance, %; pairs of other patients within it, per million\n")
    print("| |" + "".join(f" {radius} |" for radius in _RADII) + "\n|---|" + "---|" * len(_RADII))
    for name, (distance, _) in copies.items():
        print(f"| {name} |" + "".join(f" {100 * np.mean(distance <= radius):.1f} |" for radius in _RADII))
    rates = [1e6 * sum(distance <= radius for distance in other) / totals["other"] for radius in _RADII]
    print("| other patients, per million |" + "".join(f" {rate:.1f} |" for rate in rates))
    near = [round(alike, 2) for alike, distance, kind, *_ in pairs if kind == "other" and distance <= fingerprints.NEAR]
    print(f"\nMost alike of other patients within {fingerprints.NEAR}: {near[:5]}")


def _print_verdict(copies: dict[str, tuple[np.ndarray, np.ndarray]], stills: list[Still]) -> None:
    print("\nHeld-out half: copies recognised, % with 95% interval\n")
    print(f"| | hash <= {fingerprints.NEAR} | and similarity >= {fingerprints.ALIKE} | hash <= {fingerprints.SAME} |")
    print("|---|---|---|---|")
    for name, (distance, alike) in copies.items():
        near, same = distance <= fingerprints.NEAR, distance <= fingerprints.SAME
        shares = (interval(int(hit.sum()), len(hit)) for hit in (near, near & (alike >= fingerprints.ALIKE), same))
        print(f"| {name} | {' | '.join(shares)} |")
    pairs, totals = _pairs(stills)
    other = [pair for pair in pairs if pair[2] == "other" and pair[1] <= fingerprints.NEAR]
    false = [pair for pair in other if pair[0] >= fingerprints.ALIKE]
    touched = {k for pair in false for k in pair[3:]}
    within = [sum(pair[1] <= radius for pair in other) for radius in (fingerprints.SAME, fingerprints.NEAR)]
    print(f"\n{totals['other']:,} pairs of other patients, {within[0]} within {fingerprints.SAME}, {within[1]} within")
    print(f"{fingerprints.NEAR}, {len(false)} called the same, with {interval(len(touched), len(stills))} % of frames")


def _print_found(stills: list[Still], shown: int, pictures: pathlib.Path | None) -> None:
    print("\nMost alike in the real data\n\n| similarity | distance | patient | frames |\n|---|---|---|---|")
    pairs = [pair for pair in _pairs(stills)[0] if pair[1] <= fingerprints.NEAR]
    for number, (alike, distance, kind, i, j) in enumerate(pairs[:shown]):
        print(f"| {alike:.2f} | {distance} | {kind} | {stills[i].dataset} {stills[i].name}, {stills[j].name} |")
        if pictures:
            pictures.mkdir(parents=True, exist_ok=True)
            both = [cv2.resize(stills[k].pixels, (320, 320), interpolation=cv2.INTER_AREA) for k in (i, j)]
            cv2.imwrite(str(pictures / f"{number:03d}.png"), np.hstack(both))


def _print_speed(stills: list[Still]) -> None:
    encoded = [cv2.imencode(".jpg", still.pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for still in stills]
    seen = [fingerprints.views(still.pixels) for still in stills]
    codes = np.array([fingerprints.hash_views(view) for view in seen])
    many = np.tile(codes, (200, 1))
    steps: dict[str, tuple[Callable[[], object], float]] = {
        "decode, images": (lambda: [decode_image(data) for data in encoded], len(seen)),
        "hash, images": (lambda: [fingerprints.perceptual_hash(still.pixels) for still in stills], len(seen)),
        "million pairs of hashes": (lambda: fingerprints.near_pairs(codes, many, 0), len(codes) * len(many) / 1e6),
        "similarity of others, pairs": (lambda: [fingerprints.similarity(seen[0], one) for one in seen], len(seen)),
        "similarity of copies, pairs": (lambda: [fingerprints.similarity(one, one) for one in seen], len(seen)),
    }
    print("\nOne thread, best of three\n\n| | per second |\n|---|---|")
    for name, (step, amount) in steps.items():
        print(f"| {name} | {amount / min(timeit.repeat(step, number=1, repeat=3)):,.0f} |")


def _print_thinning(data: pathlib.Path) -> None:
    print("\nFrames of clips that are kept, %, by the limit of `change`; JPEG 50 is what compression alone changes\n")
    print("| clips | frames |" + "".join(f" {limit} |" for limit in _LIMITS) + " JPEG 50, most |")
    print("|---|---|" + "---|" * (len(_LIMITS) + 1))
    for pattern, step in (("COVID-BLUES/lus_videos/*", 4), ("POCUS_lung/pocus_videos/*/*", 1)):
        total, kept, noise = 0, dict.fromkeys(_LIMITS, 0), 0.0
        for path in sorted(data.glob(pattern))[::step]:
            clip = list(_clip(path))
            small = [fingerprints.thumbnail(frame) for frame in clip]
            middle = len(clip) // 2
            noise = max(noise, fingerprints.change(small[middle], fingerprints.thumbnail(_jpeg(clip[middle], 50))))
            total += len(small)
            for limit in _LIMITS:
                last = np.full_like(small[0], -1e9)
                for this in small:
                    if not fingerprints.near_identical(last, this, limit):
                        last, kept[limit] = this, kept[limit] + 1
        if total:
            shares = "".join(f" {100 * kept[limit] / total:.0f} |" for limit in _LIMITS)
            print(f"| {pattern.split('/')[0]}, 1 in {step} | {total} |{shares} {noise:.3f} |")


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=pathlib.Path, required=True)
    add("--frames", type=int, default=400, help="to copy, of each half")
    add("--shown", type=int, default=60, help="pairs of real frames")
    add("--pictures", type=pathlib.Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    stills = list(_read(args.data))
    print(", ".join(f"{n} of {name}" for name, n in collections.Counter(still.dataset for still in stills).items()))
    people = {(still.dataset, still.patient or still.name): still for still in reversed(stills)}  # a frame each
    tuning = set(np.random.default_rng(1).permutation(len(people))[: len(people) // 2])
    side = {person: number in tuning for number, person in enumerate(sorted(people))}
    for report, chosen in ((_print_radii, True), (_print_verdict, False)):
        half = [still for still in stills if side[still.dataset, still.patient or still.name] == chosen]
        first = [still for person, still in people.items() if side[person] == chosen]
        order = np.random.default_rng(2).permutation(len(first))[: args.frames]
        report(_copies([first[k] for k in order]), half)
    _print_found(stills, args.shown, args.pictures)
    _print_speed(stills[:300])
    _print_thinning(args.data)


if __name__ == "__main__":
    main()
