"""Data provenance: which datasets weights were trained on, and whether a test set is among them."""

import base64
import collections
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from usfmae_jax import files
from usfmae_jax.data.records import Shards, dataset_name, split_name

if TYPE_CHECKING:  # which reads manifests through this module
    from usfmae_jax.data.table import Table

_SHA256 = re.compile("[0-9a-f]{64}")
_BITS = 48
_LARGEST = (1 << _BITS) - 1
_KEPT = 2048  # hashes of a sample, of 8 letters each: 750 KB of JSON for 46 large datasets
_DID = {"pretrain": "pretrained, without labels,", "finetune": "fine-tuned, with labels,"}


def describe_data(sources: Sequence[Shards], hashes: bool = False) -> list[dict[str, Any]]:
    """Describes the datasets in some shards, without any path.

    Args:
      sources: the shards.
      hashes: also say by what their frames are recognised, for a lineage.

    Returns:
      for each dataset: `dataset`, `frames`, `shards` (pairs of file name and record count), and `licence` and
      `citation` from the `manifest.json` that a build writes beside its shards; "" if there is none; and
      `frame_hashes` (see `hash_frames`) if the manifests have those of all the frames.
    """
    shards: dict[str, list[list[Any]]] = collections.defaultdict(list)
    parts: dict[str, dict[tuple[str, str], None]] = collections.defaultdict(dict)  # (folder, split), in order
    for source in sources:
        for path, (name, count) in zip(source.paths, source.contents(), strict=True):
            shards[dataset_name(path)].append([name, count])
            parts[dataset_name(path)][os.fspath(epath.Path(path).parent), split_name(path)] = None
    found = []
    for dataset in sorted(shards):
        manifests = {folder: read_manifest(folder) for folder, _ in parts[dataset]}
        manifest = next(iter(manifests.values()))
        sample = _union([_hashes_of(manifests[folder], split) for folder, split in parts[dataset]]) if hashes else ""
        found.append(
            {
                "dataset": dataset,
                "frames": sum(count for _, count in shards[dataset]),
                "licence": _text(manifest.get("licence")),
                "citation": _text(manifest.get("citation")),
                "shards": shards[dataset],
            }
            | ({"frame_hashes": sample} if sample else {})
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

    It holds the smallest of the hashes, cut to 48 bits: all of up to 2,048 frames, and of more the same ones in every
    dataset that has them (a bottom-k sketch; Cohen and Kaplan, PODC 2007), so that its size has a limit. Two
    different frames have the same 48 bits by chance once in 10^14 pairs.

    Args:
      sha256: of the frames, in hexadecimal, as in records; "" = not known.

    Returns:
      base64 of big-endian numbers of 48 bits: the hashes in order, and the largest that would have been in the sample;
      "" if a hash is not known.
    """
    hashes = _shorten(sha256)
    return "" if hashes is None else _encode(hashes, _LARGEST)


def without_hashes(lineage: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages as a person reads them, without `frame_hashes`."""

    def cut(data: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in data.items() if name != "frame_hashes"}

    return [stage | ({"data": [*map(cut, stage["data"])]} if "data" in stage else {}) for stage in lineage]


def seen_in(lineage: Sequence[dict[str, Any]], frames: "Table") -> dict[str, dict[str, int | None]]:
    """Which datasets of `frames` the stages of a lineage are known to have trained on, and on how many frames.

    Args:
      lineage: stages, from `interop.model.read_lineage`.
      frames: the frames to test on.

    Returns:
      dataset -> job, oldest first -> number of the dataset's frames that it trained on, under whatever name; estimated
      if there are more than 2,048. It is 0 if a dataset of that name was trained on that has none of these frames,
      at least not with the same pixels (a compressed or cropped copy has others: `data_prep.audit` finds those), and
      None if it is not known which frames of it.
    """
    learnt = [(stage.get("job", "unknown"), data) for stage in lineage for data in stage.get("data", ())]
    seen: dict[str, dict[str, int | None]] = {}
    for dataset in np.unique(frames.dataset).tolist():
        ours = frames.sha256[frames.dataset == dataset].tolist()
        hashes = _shorten(ours)
        found: dict[str, int | None] = {}
        for job, data in learnt:
            theirs = _decode(data.get("frame_hashes"))
            count = None if hashes is None or theirs is None else _shared(hashes, theirs, len(ours))
            if count or data.get("dataset") == dataset:
                before = found.get(job, 0)
                if before is None or count is None:
                    found[job] = before or count or None
                else:
                    found[job] = min(before + count, len(ours))
        if found:
            seen[dataset] = found
    return seen


def warn_of_seen(lineage: Sequence[dict[str, Any]], frames: "Table") -> list[str]:
    """A sentence for each dataset of `frames`, and each job of a lineage that has trained on it; see `seen_in`."""
    found = []
    for dataset, jobs in seen_in(lineage, frames).items():
        total = int(np.count_nonzero(frames.dataset == dataset))
        for job, count in jobs.items():
            did = _DID.get(job, f"trained ({job})")
            if count:
                of = f"{count:,} of the {total:,} frames" if count < total else f"all {total:,} frames"
                found.append(f"the weights were {did} on {of} of {dataset} that are tested here: no held-out result")
            elif count is None:
                found.append(f"the weights were {did} on {dataset}, which is tested here: no held-out result")
            else:
                found.append(
                    f"the weights were {did} on frames of {dataset}, none of them pixel by pixel one that is tested "
                    "here: held out only if patients and copies were kept apart"
                )
    return found


def _shorten(sha256: Iterable[str]) -> np.ndarray | None:
    """The first 48 bits of each hash, sorted, without repeats: uint64 `[N]`; None if one is no SHA-256."""
    hashes = list(sha256)
    if not all(map(_SHA256.fullmatch, hashes)):
        return None
    return np.unique(np.array([int(one[: _BITS // 4], 16) for one in hashes], np.uint64))


def _shared(ours: np.ndarray, theirs: np.ndarray, total: int) -> int:
    """How many of `total` frames with the hashes `ours` are in a sample; at least 1 if any is."""
    comparable = ours[ours <= theirs[-1]]
    hits = int(np.isin(comparable, theirs[:-1]).sum())
    return max(round(total * hits / len(comparable)), 1) if hits else 0


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


def _hashes_of(manifest: dict[str, Any], split: str) -> str:
    """The sample of frames of a split in a manifest, which may not be ours; "" if there is none."""
    found = manifest.get("frame_hashes")
    return _text(found.get(split)) if isinstance(found, dict) else ""


def _text(value: Any) -> str:
    """A text from a manifest, which may not be ours; anything but text would make the lineage unreadable."""
    return value if isinstance(value, str) else ""
