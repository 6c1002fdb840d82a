"""Finds pairs of rows with the same image under different patients, which must not be on both sides of a split.

`fingerprints` decides which images are the same; this module makes the two passes over the shards.
"""

import concurrent.futures
import csv
import pathlib
import sys
from collections.abc import Callable, Iterable

import cv2
import numpy as np
from tqdm import tqdm

from usfmae_jax.data import cells, fingerprints
from usfmae_jax.data.records import decode_image
from usfmae_jax.data.split_files import write_csv
from usfmae_jax.data.table import Table, read_row
from usfmae_jax.errors import DamagedRecord, InputError

_COLUMNS = ("data", "frame", "other")
_BLOCK = 8192  # candidate pairs at a time, so that views of at most twice as many images are in memory
_MANY = 2_000  # number of frames from which progress is shown


def near_duplicates(frames: Table, progress: bool = True, threads: int = 2) -> np.ndarray:
    """Finds frames of different patients that are the same image, perhaps with another size, crop or gain.

    Candidates are pairs whose hashes differ in at most `fingerprints.NEAR` bits; they are compared, and are the same if
    their similarity is at least `fingerprints.ALIKE`. Damaged images, and those without structure, are duplicates only
    if the hashes of their pixels are equal.

    Args:
      frames: table of the frames.
      progress: show progress bars if there are many frames.
      threads: threads that decode and compare.

    Returns:
      int64 `[P, 2]` rows i < j, sorted; complete, except that among more than `fingerprints.COPIES` equal images only
      enough pairs are given to connect them all.
    """
    quiet = not progress or len(frames) < _MANY
    _, patient = np.unique(frames.patient_key, return_inverse=True)
    cv2.setNumThreads(1)  # images are processed in parallel instead
    with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:

        def seen(rows: Iterable[int]) -> dict[int, np.ndarray]:
            rows = list(rows)
            return dict(zip(rows, pool.map(lambda row: _views(frames, row), rows), strict=True))

        codes = np.empty((len(frames), 8), np.uint64)
        hashes = pool.map(lambda row: fingerprints.hash_views(_views(frames, row)), range(len(frames)))
        for row, code in enumerate(tqdm(hashes, "looking for copies", len(frames), unit="frame", disable=quiet)):
            codes[row] = code
        i, j, _ = fingerprints.near_pairs(codes, groups=(patient, patient))
        pairs = np.column_stack([i, j])
        same = [_equal_pixels(frames, patient)]
        for start in tqdm(range(0, len(pairs), _BLOCK), "comparing", unit="block", disable=quiet):
            block = pairs[start : start + _BLOCK]
            same.append(block[_confirmed(block, seen(np.unique(block).tolist()), pool.map)])
    return np.unique(np.concatenate(same), axis=0)


def _views(frames: Table, row: int) -> np.ndarray:
    try:
        return fingerprints.views(decode_image(read_row(frames, row)["image"]))
    except DamagedRecord:
        return np.zeros((2, 64, 64), np.float32)


def _confirmed(block: np.ndarray, seen: dict[int, np.ndarray], run: Callable[..., Iterable[bool]]) -> np.ndarray:
    def alike(pair: np.ndarray) -> bool:
        return fingerprints.similarity(seen[int(pair[0])], seen[int(pair[1])]) >= fingerprints.ALIKE

    return np.fromiter(run(alike, block), bool, len(block))


def _equal_pixels(frames: Table, patient: np.ndarray) -> np.ndarray:
    """Pairs with equal, known `sha256` and different patients; for many copies, enough pairs to connect them all."""
    known = np.flatnonzero(frames.sha256 != "")
    _, codes = np.unique(frames.sha256[known], return_inverse=True)
    i, j = fingerprints.equal_pairs(codes, patient[known])
    return known[np.column_stack([i, j])]


def rule_out(frames: Table, pairs: np.ndarray, path: str) -> np.ndarray:
    """The pairs without those that a person has judged not to be copies.

    Args:
      frames: table of the frames.
      pairs: int `[P, 2]`, pairs of its rows.
      path: CSV file with the columns frame and other, as in a run's `duplicates.csv`; "" = rule nothing out.

    Raises:
      InputError: there is no such file, or it names a frame that is not in the table.
    """
    if not path:
        return pairs
    try:
        with pathlib.Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(cells.read_dicts(file))
        named = [(row["frame"], row["other"]) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"config.split.no_copies={path} cannot be read: {error}") from error
    except KeyError as error:
        raise InputError(
            f"config.split.no_copies={path} needs the columns frame and other: take lines of a run's duplicates.csv"
        ) from error
    place = {name: row for row, name in enumerate(frames.frame_key.tolist())}
    unknown = [name for pair in named for name in pair if name not in place]
    if unknown:
        raise InputError(f"config.split.no_copies={path} names {unknown[0]!r}, which is no frame of the data")
    looked_at = {frozenset((place[one], place[other])) for one, other in named}
    return pairs[[frozenset(pair) not in looked_at for pair in pairs.tolist()]].reshape(-1, 2)


def cached_near_duplicates(frames: Table, path: pathlib.Path | str, keep: bool = True) -> np.ndarray:
    """`near_duplicates`, read from the CSV file `path` if it was written for the same rows, else computed and written.

    In a job of several processes only the first should `keep` them; the others compute them silently.

    The file has one row per pair: the fingerprint of the data with the thresholds, and the `frame_key` of both frames;
    without pairs, it has one row with only the fingerprint.
    """
    if not keep:
        return near_duplicates(frames, progress=False)
    path = pathlib.Path(path)
    key = f"{frames.fingerprint}-{fingerprints.NEAR}-{fingerprints.ALIKE:g}"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(cells.read(file))
        if tuple(rows[0]) == _COLUMNS and len(rows) > 1 and {row[0] for row in rows[1:]} == {key}:
            place = {name: row for row, name in enumerate(frames.frame_key.tolist())}
            pairs = [(place[frame], place[other]) for _, frame, other in rows[1:] if frame or other]
            return np.asarray(pairs, np.int64).reshape(-1, 2)
    except (OSError, ValueError, LookupError):
        pass  # absent, or not in the format written below
    found = near_duplicates(frames)
    names = frames.frame_key[found].tolist()
    try:
        write_csv(path, _COLUMNS, [[key, *pair] for pair in names or [["", ""]]])
    except OSError as error:
        print(f"near-duplicates are not kept: {path} cannot be written: {error.strerror}", file=sys.stderr)
    return found
