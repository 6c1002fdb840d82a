"""Reports a build: `manifest.json` and `rejected.csv` beside the shards, and the summary on the screen."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep import identity, locks
from data_prep.find.files import Rejected
from usfmae_jax import __version__
from usfmae_jax.data import cells
from usfmae_jax.errors import InputError
from usfmae_jax.files import parse

if TYPE_CHECKING:  # finding that nothing is to be done must not wait for OpenCV and grain
    from data_prep.plan import Plan
    from data_prep.write.parts import Gathered, Row

MANIFEST = "manifest.json"
_SCHEMA = 1
_SHOWN = 20  # rejected files on the screen; the rest are in rejected.csv
_NONE = "(none)"
_SWITCHES = "clean", "thin", "deduplicate"
#: Arguments that are recorded only as a digest or number, and how to describe a difference if both builds have them.
_IN_WORDS = {
    "labels": "with another table of --labels",
    "exclude": "with another list of --exclude",
    "entry": "with another version of the catalogue",
    "masks_beside": "with another number of masks beside the images",
    "salt": "with another secret (--salt)",
}
#: Arguments that follow from another one, or whose digests it changes; for labels, only if one build has none.
_FOLLOWS = {
    "dataset": (*_SWITCHES, "entry", "anatomy"),
    "entry": ("patient_key",),
    "labels": (*_SWITCHES, "masks_beside"),
    "masks": ("masks_beside",),
    "encoding": ("quality",),
    "salt": ("clean", "include", "pattern", "optional", "key", "entry", "labels", "exclude"),
}


def _count(rows: Iterable[Row], sizes: Mapping[str, int], label_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Frames, patients, videos, masks, bytes and labels by split."""
    by_split: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        by_split[row.split].append(row)
    names = {-1: _NONE} | dict(enumerate(label_names))
    return {
        split: {
            "frames": len(some),
            "patients": len({row.patient for row in some if row.patient_known}),
            "unknown_patients": len({row.patient for row in some if not row.patient_known}),
            "videos": len({row.video for row in some}),
            "masks": sum(row.masked for row in some),
            "bytes": sizes[split],
            "labels": {
                names[label]: number for label, number in sorted(collections.Counter(row.label for row in some).items())
            },
        }
        for split, some in by_split.items()
    }


def _hash_splits(rows: Iterable[Row]) -> dict[str, str]:
    """By split, a sample of its frames, by which a lineage tells what weights have seen.

    Private builds have none: it goes wherever weights go, and tells those who hold a picture that it was learnt from.
    """
    from usfmae_jax.data import provenance  # which imports OpenCV

    by_split: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        by_split[row.split].append(row.sha256)
    return {split: provenance.hash_frames(hashes) for split, hashes in by_split.items()}


def write_rejected(path: pathlib.Path, rejected: Sequence[Rejected]) -> None:
    """Writes a table of files and reasons, unless it would be empty."""
    if not rejected:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        cells.write(file, ("file", "reason"), sorted((one.source, one.reason) for one in rejected))


def write_manifest(
    folder: pathlib.Path,
    plan: Plan,
    gathered: Gathered,
    sizes: Mapping[str, int],
    downloaded: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Writes `manifest.json`, a full account of the dataset, and returns it; `sizes` are bytes by split."""
    dropped = collections.Counter(filter(None, gathered.reasons))
    technical: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    digests: dict[str, str] = {}
    for index in gathered.indices:
        dropped.update(index.dropped)
        digests |= index.digests
        for name, values in index.technical.items():
            technical[name].update(values)
    counts = _count(gathered.kept, sizes, plan.found.label_names)
    for name in identity.FREE_TEXTS & technical.keys() if plan.salt else ():
        technical[name] = collections.Counter(identity.without_single(technical[name]))
    entry = plan.entry
    manifest = {
        "schema": _SCHEMA,
        "tool": f"usfmae_jax {__version__}",
        "dataset": plan.name,
        "title": plan.name if entry.generic else entry.title,
        "version": entry.version,
        "anatomy": plan.arguments["anatomy"],
        "licence": entry.licence,
        "citation": entry.citation,
        "homepage": entry.homepage,
        "verified": entry.verified,
        "benchmark": entry.benchmark,
        "problems": list(entry.problems),
        "warnings": ([] if plan.salt else plan.found.warnings) + _of_readers(gathered),  # plans quote file names
        "arguments": plan.arguments,
        "input": {
            "fingerprint": plan.found.fingerprint,
            "files": len(plan.found.items) + len(plan.found.rejected),
            "sha256": _combine(digests, plan.salt),
        },
        "sources": list(downloaded),
        "label_names": plan.found.label_names,
        "splits": counts,
        "kept": sum(one["frames"] for one in counts.values()),
        "dropped": _sorted(dropped),
        "rejected": _sorted(collections.Counter(one.reason for one in gathered.rejected)),
        "unmasked": _sorted(collections.Counter(one.reason for one in gathered.unmasked)),
        "masks_beside": plan.found.beside,
        "mask_colours": plan.mask_colours or _mask_colours(gathered.mask_colours),
        "passed_over": _sorted(plan.found.left_out),
        "removed": _sorted(sum((index.removed for index in gathered.indices), collections.Counter())),
        "cleaned": _sorted(sum((index.cleaned for index in gathered.indices), collections.Counter())),
        "technical": {name: _sorted(values) for name, values in sorted(technical.items())},
        "expected": dict(entry.expected),
        "frame_hashes": {} if plan.salt else _hash_splits(gathered.kept),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _of_readers(gathered: Gathered) -> list[str]:
    """The warnings of readers, with the number of files each concerns."""
    counts = sum((index.warnings for index in gathered.indices), collections.Counter())
    return [f"{warning}: {number:,} file{'s' * (number > 1)}" for warning, number in sorted(counts.items())]


def _mask_colours(files: Mapping[str, int]) -> list[dict[str, Any]]:
    """The meaning of the numbers in masks that were drawn in colours, which are numbered in sorted order."""
    return [
        {"class": number, "colour": colour, "files": files[colour]} for number, colour in enumerate(sorted(files), 1)
    ]


def _combine(digests: dict[str, str], salt: bytes) -> str:
    """One digest for all source files, of lines "path digest" sorted by path; empty if there are none."""
    lines = "".join(f"{path} {digests[path]}\n" for path in sorted(digests))
    if salt and lines:
        return identity.keyed_digest(salt, "sources", lines)
    return hashlib.sha256(lines.encode()).hexdigest() if lines else ""


def _sorted(counter: Any) -> dict[str, int]:
    return {name: int(counter[name]) for name in sorted(counter)}


def put_back(target: pathlib.Path) -> None:
    """Restores the old dataset if a build was killed between the two renames of `publish`, with neither in place."""
    olds = list(target.with_name(f".{target.name}.incomplete").glob("*-old"))
    if not olds or target.exists():
        return
    with contextlib.suppress(InputError), locks.hold(target.parent, "another build is at work, and not killed"):
        if not target.exists():
            olds[0].rename(target)


def check_same(target: pathlib.Path, arguments: dict[str, Any], fingerprint: str) -> None:
    """Raises InputError unless `target` completely holds what these arguments and files would build."""
    remedy = "add --overwrite, or choose another --name"
    try:
        manifest = parse((target / MANIFEST).read_bytes())
        before, files_before, written = manifest["arguments"], manifest["input"]["fingerprint"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{target} was not built by this tool; {remedy}") from error
    if before != arguments:
        raise InputError(f"{target} was built {', '.join(_differences(before, arguments))}; {remedy}")
    if files_before != fingerprint:
        raise InputError(f"{target} was built from other files than --input holds now; {remedy}")
    for name, size in written.items():
        if not (target / name).exists() or (target / name).stat().st_size != size:
            raise InputError(f"{target / name} is missing or was changed after it was built; {remedy}")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describes how a dataset was built, where that differs from the present arguments."""
    before, now = ({**one, **one.get("options", {})} for one in (before, now))
    differs = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)} - {"options"}
    for cause, follows in _FOLLOWS.items():
        if cause in differs and not (cause == "labels" and before.get(cause) and now.get(cause)):
            differs -= {*follows}
    hidden = {*_IN_WORDS, *(("include", "pattern", "optional", "key") if before.get("salt") else ())}
    found = []
    for key in sorted(differs):
        value = before.get(key)
        if key in _SWITCHES:
            found.append(f"with --{key}={'on' if value else 'off'}")
        elif value is None or value is False or value == "":
            wanted = "" if key in hidden or now.get(key) in (None, "", True) else f"={now[key]}"
            found.append(f"without --{'private' if key == 'salt' else key}{wanted}")
        elif key not in hidden or value == "parent":
            found.append(f"with --{key}" if value is True else f"with --{key}={value}")
        elif now.get(key):
            found.append(_IN_WORDS.get(key, f"with another --{key}"))
        else:
            found.append(f"with --{'private' if key == 'salt' else key}")
    return found


def print_summary(
    target: pathlib.Path, manifest: dict[str, Any], warnings: Sequence[str], tip: str, seconds: float
) -> None:
    """Prints what was built, what was left out, and the next commands; `tip` is advice for unknown patients."""
    frames = manifest["kept"]
    print(f"{target}: {frames:,} frames in {seconds:.1f} s, {frames / seconds:,.0f} images/s\n")
    masked = any(one["masks"] for one in manifest["splits"].values())
    head, width = ("masks", 18) if masked else ("", 0)
    print(f"{'split':12}{'frames':>10}{'patients':>10}{'unknown':>10}{'MB':>10}{head:>{width}}  labels")
    for split, one in manifest["splits"].items():
        labels = ", ".join(f"{name} {number:,}" for name, number in one["labels"].items())
        masks = f"{one['masks']:,} of {one['frames']:,}" if masked else ""
        print(
            f"{split:12}{one['frames']:>10,}{one['patients']:>10,}{one['unknown_patients']:>10,}"
            f"{one['bytes'] / 1e6:>10,.1f}{masks:>{width}}  {labels}"
        )
    unknown = sum(one["unknown_patients"] for one in manifest["splits"].values())
    if unknown:
        print(f"\nUnknown patients: {unknown:,}. Each such file counts as a patient of its own. {tip}")
    names = manifest["label_names"]
    if len(names) == 1:
        print(f"\nAll labels are {names[0]!r}: is that what was meant?")
    if manifest["masks_beside"]:
        beside = f"{manifest['masks_beside']:,} files are taken for masks of the images beside them, by their names"
        print(f"\nMasks: {beside}; --masks=off takes them as frames")
    if colours := manifest["mask_colours"]:
        named = ", ".join(f"{one['class']} {one.get('name') or one['colour']}" for one in colours)
        if "colour" in colours[0]:
            print(f"\nMasks in colours became classes: {named}; --mask_colours=NAME=#RRGGBB,... names and orders them")
        else:
            print(f"\nClasses in masks: {named}")
    for title, key in (("Passed over", "passed_over"), ("Dropped frames", "dropped"), ("Not taken over", "removed")):
        if manifest[key]:
            print(f"\n{title}: " + ", ".join(f"{kind} ({number:,})" for kind, number in manifest[key].items()))
    for warning in dict.fromkeys([*warnings, *manifest["warnings"]]):
        print(f"\nWarning: {warning}")
    _print_files(target / "unmasked.csv", "Kept without a mask", sum(manifest["unmasked"].values()))
    _print_files(target / "rejected.csv", "Rejected", sum(manifest["rejected"].values()))
    print(f"\nLook:  {target / 'report.html'}")
    path = f"--config.data.path='{target.parent}'"
    print(f"Next:  python -m usfmae_jax.main --config=pretrain:tiny {path}")
    if len({name for one in manifest["splits"].values() for name in one["labels"]} - {_NONE}) > 1:
        print(f"       python -m usfmae_jax.finetune --config=finetune:folder {path}")
    if masked:
        print(f"       python -m usfmae_jax.finetune --config=segment:folder {path}")


def _print_files(table: pathlib.Path, title: str, number: int) -> None:
    if not number:
        return
    print(f"\n{title}: {number:,} files, all of them in {table}:")
    with table.open(encoding="utf-8", newline="") as file:
        for row, _ in zip(cells.read_dicts(file), range(_SHOWN), strict=False):
            print(f"  {row['file']}: {row['reason']}")
