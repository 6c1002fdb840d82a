"""Data provenance: which datasets weights were trained on, and whether a test set is among them."""

import base64
import collections
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from usfmae_jax import files
from usfmae_jax.data.records import Shards, dataset_name, split_name
from usfmae_jax.errors import visible

if TYPE_CHECKING:  # which reads manifests through this module
    from usfmae_jax.data.table import Table

_SHA256 = re.compile("[0-9a-f]{64}")
_BITS = 48
_LARGEST = (1 << _BITS) - 1
_KEPT = 16_384  # hashes of a sample, of 8 letters each: 130 KB of JSON
_DID = {"pretrain": "pretrained, without labels,", "finetune": "fine-tuned, with labels,"}


def describe_data(sources: Sequence[Shards], hashes: bool = False) -> list[dict[str, Any]]:
    """Describes the datasets in some shards, without any path.

    Args:
      sources: the shards.
      hashes: also say what concerns the frames, for a lineage.

    Returns:
      for each dataset: `dataset`, `frames`, `shards` (pairs of file name and record count), and `licence` and
      `citation` from the `manifest.json` that a build writes beside its shards; "" if there is none; and
      `frame_hashes` (see `hash_frames`) if the manifests have those of all the frames, `cleaned` if marks were removed
      from some.
    """
    shards: dict[str, list[list[Any]]] = collections.defaultdict(list)
    parts: dict[str, collections.Counter[tuple[str, str]]] = collections.defaultdict(collections.Counter)
    for source in sources:
        for path, (name, count) in zip(source.paths, source.contents(), strict=True):
            shards[dataset_name(path)].append([name, count])
            parts[dataset_name(path)][os.fspath(epath.Path(path).parent), split_name(path)] += count
    found = []
    for dataset in sorted(shards):
        manifests = {folder: read_manifest(folder) for folder in dict.fromkeys(folder for folder, _ in parts[dataset])}
        manifest = next(iter(manifests.values()))
        samples = [_hashes_of(manifests[folder], split, n) for (folder, split), n in parts[dataset].items()]
        sample = _union(samples) if hashes else ""
        found.append(
            {
                "dataset": dataset,
                "frames": sum(count for _, count in shards[dataset]),
                "licence": _text(manifest.get("licence")),
                "citation": _text(manifest.get("citation")),
                "shards": shards[dataset],
            }
            | ({"frame_hashes": sample} if sample else {})
            | ({"cleaned": True} if hashes and any(one.get("cleaned") for one in manifests.values()) else {})
        )
    return found


def read_manifest(folder: epath.Path | str) -> dict[str, Any]:
    """The `manifest.json` in a build's folder; {} if there is none, or it cannot be read."""
    try:
        manifest = files.parse((epath.Path(folder) / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def hash_frames(sha256: Iterable[str]) -> str:
    """A sample of the frames of a dataset by which they are recognised in another one, as a text for JSON.

    It holds the smallest of the hashes, cut to 48 bits: all of up to 16,384 frames, and of more the same ones in every
    dataset that has them (a bottom-k sketch; Cohen and Kaplan, PODC 2007), so that its size has a limit. Two
    different frames have the same 48 bits by chance once in 10^14 pairs.

    Args:
      sha256: of the frames, in hexadecimal, as in records; "" = not known.

    Returns:
      base64 of big-endian numbers of 48 bits: the hashes in order, and the largest that would have been in the sample;
      "" if a hash is not known.
    """
    hashes = _shorten(sha256)
    return "" if hashes is None else _encode(np.unique(hashes), _LARGEST)


def without_hashes(lineage: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages as a person reads them, without `frame_hashes`."""

    def cut(data: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in data.items() if name != "frame_hashes"}

    return [stage | ({"data": [*map(cut, stage["data"])]} if "data" in stage else {}) for stage in lineage]


class Seen(NamedTuple):
    """What a job is known to have trained on of a dataset.

    Attributes:
      rows: int `[M]`, rows of the table with the pixels of a frame that it trained on, under whatever name.
      certain: whether no other row has; False if hashes are missing, or are a sample only.
    """

    rows: np.ndarray
    certain: bool

    @property
    def possible(self) -> bool:
        """Whether it has trained on a row, as far as is known."""
        return bool(len(self.rows)) or not self.certain


def seen_in(lineage: Sequence[dict[str, Any]], frames: "Table") -> dict[str, dict[str, Seen]]:
    """Which datasets of `frames` the stages of a lineage are known to have trained on: by their frames, or by name.

    A compressed or cropped copy has other pixels: `data_prep.audit` finds those.

    Args:
      lineage: stages, from `interop.model.read_lineage`.
      frames: the frames to test on.

    Returns:
      dataset -> job, oldest first -> what it trained on, if that has a row of the dataset or its name.
    """
    jobs: dict[str, list[dict[str, Any]]] = {}
    for stage in lineage:
        jobs.setdefault(stage.get("job", "unknown"), []).extend(stage.get("data", ()))
    samples = {job: [(data, _decode(data.get("frame_hashes"))) for data in datas] for job, datas in jobs.items()}
    found: dict[str, dict[str, Seen]] = {}
    for dataset in np.unique(frames.dataset).tolist():
        rows = np.flatnonzero(frames.dataset == dataset)
        ours = _shorten(frames.sha256[rows].tolist())
        for job, datas in samples.items():
            hit, named, certain = np.zeros(len(rows), bool), False, True
            for data, theirs in datas:
                same = data.get("dataset") == dataset
                named |= same
                if ours is None or theirs is None:
                    certain &= not same
                    continue
                known = np.isin(ours, theirs[:-1])
                certain &= bool((ours <= theirs[-1]).all() or not (same or known.any()))
                hit |= known
            if named or hit.any():
                found.setdefault(dataset, {})[job] = Seen(rows[hit], certain)
    return found


def say(dataset: str, job: str, seen: Seen, frames: "Table") -> str:
    """What a job has seen of a dataset, as the end of a sentence: "pretrained, without labels, on ..."."""
    count, total = len(seen.rows), int(np.count_nonzero(frames.dataset == dataset))
    which = f"{'' if seen.certain else 'at least '}{count:,} of the {total:,} frames"
    which = f"all {total:,} frames" if count == total else which if count else "frames"
    rest = "" if seen.possible else ", none of them pixel by pixel one that is tested here"
    return f"{_DID.get(job, f'trained ({visible(job)[:40]})')} on {which} of {dataset}{rest}"


def warn_of_seen(lineage: Sequence[dict[str, Any]], frames: "Table") -> list[str]:
    """A sentence for each dataset of the tested `frames`, and each job of a lineage that has trained on it."""
    found = []
    for dataset, jobs in seen_in(lineage, frames).items():
        for job, seen in jobs.items():
            if seen.possible:
                verdict = " that are tested here: no held-out result"
            else:
                verdict = ": held out only if patients and copies were kept apart"
            found.append(f"the weights were {say(dataset, job, seen, frames)}{verdict}")
    return found


def restrict(data: Sequence[dict[str, Any]], frames: "Table") -> list[dict[str, Any]]:
    """A description of data with hashes, of which only `frames` were trained on: the hashes are those of these."""
    found = []
    for one in data:
        rows, rest = frames.dataset == one.get("dataset"), {k: v for k, v in one.items() if k != "frame_hashes"}
        # Without such a row, the names in shards and records may differ.
        sample = hash_frames(frames.sha256[rows].tolist()) if "frame_hashes" in one and rows.any() else ""
        found.append(rest | ({"frame_hashes": sample} if sample else {}))
    return found


def _shorten(sha256: Iterable[str]) -> np.ndarray | None:
    """The first 48 bits of each hash: uint64 `[N]`; None if one is no SHA-256."""
    hashes = list(sha256)
    if not all(map(_SHA256.fullmatch, hashes)):
        return None
    return np.array([int(one[: _BITS // 4], 16) for one in hashes], np.uint64)


def _union(samples: Sequence[str]) -> str:
    """The sample of several sets of frames together; "" unless there is one of each."""
    decoded = [one for one in map(_decode, samples) if one is not None]
    if not decoded or len(decoded) < len(samples):
        return ""
    return _encode(np.unique(np.concatenate([one[:-1] for one in decoded])), min(int(one[-1]) for one in decoded))


def _encode(hashes: np.ndarray, largest: int) -> str:
    hashes = hashes[hashes <= largest]
    if len(hashes) > _KEPT:
        hashes, largest = hashes[:_KEPT], int(hashes[_KEPT - 1])
    numbers = np.append(hashes, np.uint64(largest)).astype(">u8")
    return base64.urlsafe_b64encode(numbers.view(np.uint8).reshape(-1, 8)[:, 2:].tobytes()).decode()


def _decode(sample: Any) -> np.ndarray | None:
    """The numbers of a sample; None if it is none, for it may not be ours."""
    try:
        data = np.frombuffer(base64.urlsafe_b64decode(sample), np.uint8).reshape(-1, _BITS // 8)
    except (TypeError, ValueError):
        return None
    numbers = np.pad(data, ((0, 0), (2, 0))).reshape(-1).view(">u8").astype(np.uint64)
    return numbers if len(numbers) else None


def _hashes_of(manifest: dict[str, Any], split: str, count: int) -> str:
    """The sample of a split's frames in a manifest, which may not be ours; "" if there is none for all `count`."""
    found, splits = manifest.get("frame_hashes"), manifest.get("splits")
    about = splits.get(split) if isinstance(splits, dict) else None
    whole = isinstance(about, dict) and about.get("frames") == count
    return _text(found.get(split)) if whole and isinstance(found, dict) else ""


def _text(value: Any) -> str:
    """A text from a manifest, which may not be ours; anything but text would make the lineage unreadable."""
    return value if isinstance(value, str) else ""
