"""Looks for evaluation patients, videos and images in a pretraining corpus, and for their near-duplicates.

    python -m data_prep.audit --shards='data/*' --against=data/bus_bra,data/mmotu_2d:test --write-exclusions=leaks.csv
    python -m data_prep.audit --shards='data/*'
    python -m data_prep.audit --shards=data/hc --against=data/bus_bra --radius=20

--shards and --against take shards, folders and globs as training does, separated by commas, and read all splits unless
a name ends in :SPLIT. Frames match by patient, video or source file if the datasets have the same name, and regardless
of the name if their source pixels are equal or they are near-duplicates: resized, compressed, cropped by up to 5% per
side, brightened, or stripped of text or surroundings. Unknown patients match nobody.

Exit status: 0 and one line if nothing is found; 1 and a table if anything is found, or if damaged records could not be
compared; 2 for bad input. The list of exclusions contains all frames found; python -m data_prep.build --exclude=FILE
leaves them out. Without --against, duplicates within and across the datasets are shown, and the status is 0.
"""

import argparse
import collections
import dataclasses
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# `usfmae_jax.data.records` and tqdm are imported where they are needed, so that --help is quick.
import numpy as np

from data_prep import exclusions, isolate
from data_prep.exclusions import Match, match_ids
from usfmae_jax.data import fingerprints
from usfmae_jax.errors import STOPPED, DamagedRecord, InputError, Parser, visible, visible_output

_RECORDS = 256  # read per task
_PAIRS = 1024  # compared per task
_INSIDE = 64  # hash distance without --against: within 96, a large corpus has too many pairs to compare
_LIMIT = 60.0  # seconds for one record
_SHOWN = 10  # damaged records, at most


@dataclasses.dataclass
class Frames:
    """All records of some shards, without their images; index k refers to the same record in `places`, `ids`, `codes`.

    Attributes:
      paths: paths of the shards.
      places: (index into `paths`, index of the record in that shard).
      ids: values of `exclusions.IDS`.
      codes: uint64 `[N, 8]`, from `fingerprints.perceptual_hash`; zeros if the image is damaged.
      damaged: one message for each record that could not be read in full.
    """

    paths: list[str]
    places: list[tuple[int, int]]
    ids: list[tuple[str, ...]]
    codes: np.ndarray
    damaged: list[str]


@visible_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    try:
        return run(_parse(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return STOPPED
    return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("data_prep.audit", __doc__ or "", allow_abbrev=False)
    add = parser.add_argument
    add("--shards", required=True, help="the corpus")
    add("--against", default="", help="evaluation sets that must not be in it")
    add("--write-exclusions", metavar="FILE", type=pathlib.Path, help="CSV, for build --exclude=FILE")
    default = f"default: {fingerprints.NEAR}, without --against {_INSIDE}"
    add("--radius", type=int, help=f"hash distance, 0 to 128, up to which pictures are compared; {default}")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: all cores")
    args = parser.parse_args(argv)
    args.radius = args.radius if args.radius is not None else fingerprints.NEAR if args.against else _INSIDE
    if not 0 <= args.radius <= 128 or args.workers < 1:
        raise InputError(f"--radius={args.radius} must be from 0 to 128, --workers={args.workers} at least 1")
    if args.write_exclusions and not args.against:
        raise InputError("--write-exclusions needs --against, the evaluation sets to keep out of the corpus")
    if args.write_exclusions and (
        args.write_exclusions.is_dir() or not args.write_exclusions.absolute().parent.is_dir()
    ):
        raise InputError(f"--write-exclusions={args.write_exclusions} is no file in a folder that exists")
    return args


def run(args: argparse.Namespace) -> int:
    """Runs the audit; returns the exit status."""
    files = [_open(value) for value in (args.shards, args.against) if value]
    if args.against:
        both = files[0].keys() & files[1].keys()
        files[0] = {path: count for path, count in files[0].items() if path not in both}
        if both:
            print(f"{len(both):,} shards of --against are not compared with themselves", file=sys.stderr)
        if not files[0]:
            raise InputError(f"--shards={args.shards} holds nothing but what --against names")
    corpus = _read(files[0], "corpus", args.workers)
    if not args.against:
        _print_duplicates(corpus, find_duplicates(corpus, args.radius, args.workers))
        return 0
    evaluation = _read(files[1], "evaluation", args.workers)
    matches = find_leaks(corpus, evaluation, args.radius, args.workers)
    if args.write_exclusions:
        exclusions.write(args.write_exclusions, exclusions.rows(corpus.ids, evaluation.ids, matches))
    total = f"{len(corpus.ids):,} frames of the corpus and {len(evaluation.ids):,} of evaluation sets"
    if not matches:
        unknown = len(corpus.damaged) + len(evaluation.damaged)
        note = f", but {unknown:,} damaged records could not be compared: build their shards again" if unknown else ""
        print(f"no evaluation patient, video, image or near-duplicate among {total}{note}")
        return 1 if unknown else 0
    groups: dict[tuple[str, ...], list[Match]] = collections.defaultdict(list)
    for match in matches:
        groups[evaluation.ids[match.other][0], exclusions.REASONS[match.reason]].append(match)
    _print_groups(("evaluation set", "because of"), groups, corpus, evaluation)
    print(f"\n{len({match.frame for match in matches}):,} frames of the corpus belong to evaluation sets, of {total}.")
    listed = f"Leave them out:  python -m data_prep.build --exclude={args.write_exclusions} ..."
    print(listed if args.write_exclusions else "List them:  the same command with --write-exclusions=FILE")
    return 1


def _open(value: str) -> dict[str, int]:
    """Maps each shard that a flag names to its number of records."""
    from usfmae_jax.data import records

    files: dict[str, int] = {}
    for part in map(str.strip, value.split(",")):
        match = re.fullmatch(r"(.+):(\w+)", part)
        path, split = match.groups() if match and not os.path.exists(part) else (part, None)
        shards = records.open_shards(path, split)
        files |= {file: count for file, (_, count) in zip(shards.paths, shards.contents(), strict=True)}
    return files


def _read(files: dict[str, int], name: str, workers: int) -> Frames:
    tasks = [(path, k, min(k + _RECORDS, count)) for path, count in files.items() for k in range(0, count, _RECORDS)]
    results = _map(_scan, tasks, workers, name, "frame", lambda task: task[2] - task[1])
    frames = Frames(list(files), [], [], np.concatenate([codes for _, _, codes, _ in results]), [])
    places = {path: place for place, path in enumerate(frames.paths)}
    for (path, _, _), (numbers, ids, _, damaged) in zip(tasks, results, strict=True):
        frames.places += [(places[path], number) for number in numbers]
        frames.ids += ids
        frames.damaged += damaged
    if frames.damaged:
        print(f"{name}: {len(frames.damaged):,} damaged records, compared by what is left of them:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in frames.damaged[:_SHOWN]), file=sys.stderr)
    return frames


def _scan(
    task: tuple[str, int, int], given_up: Mapping[int, str], begin: Callable[[int], None]
) -> tuple[list[int], list[tuple[str, ...]], np.ndarray, list[str]]:
    """Indices, ids and hashes of a range of a shard's records, and messages about the damaged ones."""
    path, start, stop = task
    numbers, ids, codes, damaged = [], [], [], []
    for number in range(start, stop):
        begin(number)
        try:
            if number in given_up:
                raise DamagedRecord(given_up[number])
            record = _record(path, number)
            numbers.append(number)
            ids.append(tuple(sys.intern(record[name]) for name in exclusions.IDS))
            codes.append(np.zeros(8, np.uint64))
            codes[-1] = fingerprints.perceptual_hash(_pixels(record))
        except DamagedRecord as error:
            damaged.append(f"number {number} of {os.path.basename(path)}: {error}")
    return numbers, ids, np.array(codes, np.uint64).reshape(-1, 8), damaged


def _compare(
    task: list[tuple[str, int, str, int]], given_up: Mapping[int, str], begin: Callable[[int], None]
) -> list[float]:
    """Similarity of pairs of records, each given by its shard and index; NaN if it cannot be computed."""
    alike = []
    for number, (path, one, other_path, other) in enumerate(task):
        begin(number)
        known = number not in given_up
        alike.append(fingerprints.similarity(_views(path, one), _views(other_path, other)) if known else np.nan)
    return alike


@functools.lru_cache(maxsize=2048)
def _views(path: str, number: int) -> np.ndarray:
    return fingerprints.views(_pixels(_record(path, number)))


def _record(path: str, number: int) -> dict[str, Any]:
    from usfmae_jax.data import records

    return records.decode_record(_shard(path)[number])


@functools.lru_cache(maxsize=8)
def _shard(path: str) -> Any:
    from usfmae_jax.data import records

    return records.Shards([path])


def _pixels(record: dict[str, Any]) -> np.ndarray:
    from usfmae_jax.data import records

    short = min(record["height"], record["width"])
    reduction = next((factor for factor in (8, 4, 2) if short >= 128 * factor), 1)
    return records.decode_image(record["image"], reduction=reduction)


def _map(
    function: isolate.Work, tasks: list[Any], workers: int, name: str, unit: str, size: Callable[[Any], int]
) -> list[Any]:
    """Results in the order of the tasks; `size` returns how many units, named `unit`, a task counts for."""
    import tqdm

    results: dict[int, Any] = {}
    preload = "usfmae_jax.data.records"  # the slowest import
    with tqdm.tqdm(total=sum(map(size, tasks)), desc=name, unit=unit) as bar:
        for number, result in isolate.isolated_map(function, tasks, workers, limit=_LIMIT, preload=preload):
            results[number] = result
            bar.update(size(tasks[number]))
    return [results[number] for number in range(len(tasks))]


def find_leaks(corpus: Frames, evaluation: Frames, radius: int, workers: int) -> list[Match]:
    """The first reason to exclude each corpus frame that leaks an evaluation set, one match per frame and set."""
    found = {(match.frame, evaluation.ids[match.other][0]): match for match in match_ids(corpus.ids, evaluation.ids)}
    pairs = [pair for pair in _near(corpus, evaluation, radius) if (pair[0], evaluation.ids[pair[1]][0]) not in found]
    for frame, other in _alike(corpus, evaluation, pairs, workers):
        found.setdefault((frame, evaluation.ids[other][0]), Match("near", frame, other))
    return sorted(found.values(), key=lambda match: (match.frame, match.other))


def find_duplicates(frames: Frames, radius: int, workers: int) -> list[Match]:
    """Frames that repeat an earlier one (equal pixels, or near-duplicates in another video), the first reason each."""
    seen: dict[str, int] = {}
    found: dict[int, Match] = {}
    for frame, (*_, sha256) in enumerate(frames.ids):
        if sha256 and seen.setdefault(sha256, frame) != frame:
            found[frame] = Match("pixels", frame, seen[sha256])
    pairs = [(j, i) for i, j in _near(frames, None, radius) if i not in found and j not in found]
    for frame, other in _alike(frames, frames, pairs, workers):
        found.setdefault(frame, Match("near", frame, other))
    return sorted(found.values(), key=lambda match: match.frame)


def _near(a: Frames, b: Frames | None, radius: int) -> list[tuple[int, int]]:
    """Pairs within a hash distance; without `b`, pairs of `a` (earlier, later) from different videos."""
    import tqdm

    groups, kinds = None, None
    if b is not None:  # a copy in each evaluation set counts
        sets = {name: number for number, name in enumerate(dict.fromkeys(ids[0] for ids in b.ids))}
        kinds = np.zeros(len(a.ids), np.int64), np.array([sets[ids[0]] for ids in b.ids], np.int64)
    else:
        numbers: dict[tuple[str, str], int] = {}
        videos = np.array([numbers.setdefault((ids[0], ids[2] or str(k)), k) for k, ids in enumerate(a.ids)])
        groups = videos, videos
    with tqdm.tqdm(total=len(a.ids), desc="hashes", unit="frame") as bar:
        i, j, _ = fingerprints.near_pairs(a.codes, b.codes if b else None, radius, groups, bar.update, kinds)
    return list(zip(i.tolist(), j.tolist(), strict=True))


def _alike(a: Frames, b: Frames, pairs: list[tuple[int, int]], workers: int) -> list[tuple[int, int]]:
    """Returns the pairs that are near-duplicates, most similar first."""
    ends = [(*a.places[i], *b.places[j]) for i, j in pairs]
    named = [(a.paths[p], m, b.paths[q], n) for p, m, q, n in ends]
    tasks = [named[k : k + _PAIRS] for k in range(0, len(named), _PAIRS)]
    alike = [value for found in _map(_compare, tasks, workers, "candidates", "pair", len) for value in found]
    order = sorted(range(len(pairs)), key=lambda k: -np.nan_to_num(alike[k]))
    return [pairs[k] for k in order if not alike[k] < fingerprints.ALIKE]  # NaN counts as alike


def _print_duplicates(frames: Frames, matches: list[Match]) -> None:
    groups: dict[tuple[str, ...], list[Match]] = collections.defaultdict(list)
    for match in matches:
        one, other = frames.ids[match.frame], frames.ids[match.other]
        shared = {key[0] for key in {*exclusions.keys(one)} & {*exclusions.keys(other)}}
        same = "video" if "video" in shared else "patient" if "patient" in shared else "-"
        groups[" and ".join(sorted({one[0], other[0]})), exclusions.REASONS[match.reason], same].append(match)
    if matches:
        _print_groups(("datasets", "what", "same"), groups, frames, frames)
    print(f"{len(matches):,} of {len(frames.ids):,} frames show what an earlier one shows")


def _print_groups(header: tuple[str, ...], groups: Mapping[tuple[str, ...], list[Match]], a: Frames, b: Frames) -> None:
    lines = [(*header, "frames", "example")]
    for key, some in sorted(groups.items()):
        example = ", ".join(f"{ids[0]} {ids[4] or ids[3]}" for ids in (a.ids[some[0].frame], b.ids[some[0].other]))
        lines.append((*key, f"{len(some):,}", example))
    shown = [[visible(cell, one_line=True) for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in shown) + 2 for column in range(len(lines[0]))]
    print("\n".join("".join(map(str.ljust, line, widths)).rstrip() for line in shown))


if __name__ == "__main__":
    sys.exit(main())
