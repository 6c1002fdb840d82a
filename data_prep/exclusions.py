"""Decides what is left out of a build: frames on an audit's list of exclusions, and duplicates of other frames.

The list is a CSV file with the columns of `COLUMNS` and one row for each pair of a corpus frame and an evaluation set
that it would leak. A frame is identified by its dataset and id, or by the SHA-256 of its source pixels; either may be
empty.
"""

import collections
import csv
import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from usfmae_jax.data import cells, fingerprints
from usfmae_jax.errors import InputError

COLUMNS = ("dataset", "frame", "sha256", "reason", "evaluation_dataset", "evaluation_frame")
#: Why a frame is on the list, the most certain reason first; the first that applies is used.
REASONS = {
    "patient": "same patient",
    "video": "same video",
    "image": "same source file",
    "pixels": "equal pixels",
    "near": "near-duplicate",
}

#: The fields that identify a record.
IDS = ("dataset", "patient", "video", "source", "frame", "sha256")

_MOST_PAIRS = 1 << 22  # of near-equal pictures from different videos; real data have thousands
_SPLITS = {"test": 0, "validation": 1}  # the copy in the smaller split is the one to keep


@dataclasses.dataclass(frozen=True)
class Exclusions:
    """Frames to leave out.

    Attributes:
      frames: (dataset, frame) -> reason.
      pixels: SHA-256 of source pixels -> reason.
    """

    frames: Mapping[tuple[str, str], str]
    pixels: Mapping[str, str]

    def reason(self, dataset: str, frame: str, sha256: str) -> str:
        """The reason why a frame is left out; empty if it is not."""
        return self.frames.get((dataset, frame)) or self.pixels.get(sha256, "")


def read(path: str | os.PathLike[str]) -> Exclusions:
    """Reads a list written by `write`; a list with only a header excludes nothing.

    Raises:
      InputError: the file cannot be read or is not such a list.
    """
    remedy = "python -m data_prep.audit --write-exclusions=FILE writes one"
    frames: dict[tuple[str, str], str] = {}
    pixels: dict[str, str] = {}
    try:
        with pathlib.Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            if tuple(next(reader, ())) != COLUMNS:
                raise InputError(f"{path} is no list of exclusions, whose first line is {','.join(COLUMNS)}; {remedy}")
            for row in reader:
                dataset, frame, sha256, reason = _checked(
                    [*map(cells.unquoted, row)], f"{path}, line {reader.line_num}"
                )
                if frame:
                    frames.setdefault((dataset, frame), reason)
                if sha256:
                    pixels.setdefault(sha256, reason)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no CSV file in UTF-8 ({error}); {remedy}") from error
    return Exclusions(frames, pixels)


def _checked(row: list[str], where: str) -> tuple[str, str, str, str]:
    if len(row) != len(COLUMNS):
        raise InputError(f"{where} has {len(row)} values where {len(COLUMNS)} belong; write the list again")
    dataset, frame, sha256, reason, evaluation, _ = row
    if reason not in REASONS:
        raise InputError(f"{where}: reason {reason!r} is none of {', '.join(REASONS)}")
    if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(f"{where}: {sha256[:80]!r} is no SHA-256, which has 64 hexadecimal digits")
    if not evaluation or not evaluation.isprintable():
        raise InputError(f"{where}: evaluation_dataset is {evaluation!r}, which is no name of a dataset")
    if not sha256 and not (dataset and frame):
        raise InputError(f"{where} names neither a dataset and its frame nor a SHA-256: nothing says what to exclude")
    return dataset, frame if dataset else "", sha256, f"excluded: {REASONS[reason]} in {evaluation}"


def write(path: str | os.PathLike[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes rows with the values of `COLUMNS`."""
    with pathlib.Path(path).open("w", newline="", encoding="utf-8") as file:
        cells.write(file, COLUMNS, rows, quoting=csv.QUOTE_ALL)  # "\r" in a name would end a row


@dataclasses.dataclass(frozen=True)
class Match:
    """A frame that should be left out because of another one: one of an evaluation set, or an earlier duplicate."""

    reason: str  # a key of `REASONS`
    frame: int
    other: int


def keys(ids: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Keys that records share if they belong together, the most certain first: values of `IDS` -> (reason, *values).

    An unknown patient or video has the id of the file and so adds nothing to it.
    """
    dataset, patient, video, source, _, sha256 = ids
    if patient not in ("", source):
        yield "patient", dataset, patient
    if video not in ("", source):
        yield "video", dataset, video
    if source:
        yield "image", dataset, source
    if sha256:
        yield "pixels", sha256


def match_ids(corpus: Sequence[tuple[str, ...]], evaluation: Sequence[tuple[str, ...]]) -> Iterator[Match]:
    """Yields a match for each corpus record and evaluation dataset that share a key: first key, first record.

    Args:
      corpus: values of `IDS`.
      evaluation: likewise.
    """
    places: dict[tuple[str, ...], dict[str, int]] = collections.defaultdict(dict)
    for other, ids in enumerate(evaluation):
        for key in keys(ids):
            places[key].setdefault(ids[0], other)
    for frame, ids in enumerate(corpus):
        seen: set[str] = set()
        for key in keys(ids):
            for dataset, other in places.get(key, {}).items():
                if dataset not in seen:
                    seen.add(dataset)
                    yield Match(key[0], frame, other)


def rows(
    corpus: Sequence[tuple[str, ...]], evaluation: Sequence[tuple[str, ...]], matches: Iterable[Match]
) -> Iterator[tuple[str, ...]]:
    """The rows to be written by `write` for matches between corpus and evaluation."""
    number = collections.Counter((ids[0], ids[4]) for ids in corpus)
    for match in matches:
        dataset, _, _, _, frame, sha256 = corpus[match.frame]
        if sha256 and number[dataset, frame] > 1:
            frame = ""  # the name is ambiguous: the pixels tell which frame is meant
        other = evaluation[match.other]
        yield dataset, frame, sha256, match.reason, other[0], other[4]


def duplicates_within(
    rows: Sequence[Any], radius: int = fingerprints.SAME
) -> tuple[dict[int, tuple[str, int]], list[str]]:
    """Finds the frames of one build to drop because they are duplicates of another.

    Of frames with equal pixels, and of near-equal frames from different videos, one is kept: preferably one from the
    test split (then validation), then one with a label, else the first. Copies with contradictory labels are all kept,
    since only a person can tell which label is right.

    Args:
      rows: objects with `sha256`, `hash` (hex of `fingerprints.perceptual_hash`, or empty), `label`, `split`, `video`
        and `frame`.
      radius: largest hash distance of near-equal pictures.

    Returns:
      A dict from the index of each dropped frame to the reason and the index of the one kept; and warnings.
    """
    order = sorted(range(len(rows)), key=lambda k: (_SPLITS.get(rows[k].split, 2), rows[k].label < 0, k))
    dropped: dict[int, tuple[str, int]] = {}
    contradictions: list[tuple[int, int]] = []
    warnings: list[str] = []
    near = _near_pairs(rows, order, radius, warnings.append)
    for earlier, later, reason in itertools.chain(_equal_pairs(rows, order), near):
        if earlier in dropped or later in dropped:
            continue
        if rows[earlier].label != rows[later].label and min(rows[earlier].label, rows[later].label) >= 0:
            contradictions.append((earlier, later))
            continue
        dropped[later] = reason, earlier
    if contradictions:
        one, other = (rows[k].frame for k in contradictions[0])
        warnings.append(
            f"pictures with two labels, which are all kept: {len(contradictions):,}, the first {one!r} and {other!r}"
        )
    return dropped, warnings


def _equal_pairs(rows: Sequence[Any], order: list[int]) -> Iterator[tuple[int, int, str]]:
    """Pairs of indices with equal pixels, sorted by the later; of the earlier frames, the first of each label."""
    seen: dict[str, dict[int, int]] = collections.defaultdict(dict)
    for k in order:
        before, label = seen[rows[k].sha256], rows[k].label
        for other in sorted(before, key=label.__ne__):  # its own label first: such a copy contradicts nothing
            yield before[other], k, "equal pixels"
        if len(before) < fingerprints.COPIES:
            before.setdefault(label, k)


def _near_pairs(
    rows: Sequence[Any], order: list[int], radius: int, warn: Callable[[str], Any]
) -> Iterator[tuple[int, int, str]]:
    """Pairs of indices of near-equal pictures from different videos, sorted by the later."""
    hashed = [k for k in order if rows[k].hash]
    codes = np.array([np.frombuffer(bytes.fromhex(rows[k].hash), "<u8") for k in hashed], np.uint64).reshape(-1, 8)
    numbers: dict[str, int] = {}
    videos = np.array([numbers.setdefault(rows[k].video, len(numbers)) for k in hashed], np.int64)
    labels = np.array([rows[k].label for k in hashed], np.int64)
    i, j, _ = fingerprints.near_pairs(
        codes, radius=radius, groups=(videos, videos), kinds=(labels, labels), most=_MOST_PAIRS, warn=warn
    )
    for at in np.lexsort((i, j)):
        earlier, later = hashed[i[at]], hashed[j[at]]
        if rows[earlier].sha256 != rows[later].sha256:  # otherwise already found as equal
            yield earlier, later, "near-equal picture"
