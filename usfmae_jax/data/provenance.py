"""Data provenance: which datasets weights were trained on, and whether a test set is among them."""

import collections
from collections.abc import Sequence
from typing import Any

from etils import epath

from usfmae_jax import files
from usfmae_jax.data.records import Shards, dataset_name


def describe_data(sources: Sequence[Shards]) -> list[dict[str, Any]]:
    """Describes the datasets in some shards, without any path.

    Returns:
      for each dataset: `dataset`, `frames`, `shards` (pairs of file name and record count), and `licence` and
      `citation` from the `manifest.json` that a build writes beside its shards; "" if there is none.
    """
    shards: dict[str, list[list[Any]]] = collections.defaultdict(list)
    folders: dict[str, epath.Path] = {}
    for source in sources:
        for path, (name, count) in zip(source.paths, source.contents(), strict=True):
            shards[dataset_name(path)].append([name, count])
            folders.setdefault(dataset_name(path), epath.Path(path).parent)
    found = []
    for dataset in sorted(shards):
        manifest = read_manifest(folders[dataset])
        found.append(
            {
                "dataset": dataset,
                "frames": sum(count for _, count in shards[dataset]),
                "licence": _text(manifest.get("licence")),
                "citation": _text(manifest.get("citation")),
                "shards": shards[dataset],
            }
        )
    return found


def read_manifest(folder: epath.Path | str) -> dict[str, Any]:
    """The `manifest.json` in a build's folder; {} if there is none, or it cannot be read."""
    try:
        manifest = files.parse((epath.Path(folder) / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def seen_in(lineage: Sequence[dict[str, Any]], sources: Sequence[Shards]) -> dict[str, list[str]]:
    """Which datasets of `sources` the stages of a lineage are known to have trained on.

    A dataset counts as seen if one of the same name was trained on, in any version.

    Args:
      lineage: stages, from `interop.model.read_lineage`.
      sources: the shards to test on.

    Returns:
      for each dataset, the jobs that trained on it, oldest first.
    """
    names = {dataset_name(path) for source in sources for path in source.paths}
    seen: dict[str, list[str]] = collections.defaultdict(list)
    for stage in lineage:
        for data in stage.get("data", ()):
            dataset, job = data.get("dataset", ""), stage.get("job", "unknown")
            if dataset in names and job not in seen[dataset]:
                seen[dataset].append(job)
    return dict(seen)


def _text(value: Any) -> str:
    """A text from a manifest, which may not be ours; anything but text would make the lineage unreadable."""
    return value if isinstance(value, str) else ""
