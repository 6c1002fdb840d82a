"""Writes pages for people: `report.html` beside the shards, and an overview of several datasets.

The pages are rendered by `usfmae_jax.reporting.pages`. Equal data give equal bytes.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from usfmae_jax.data import cells, records
from usfmae_jax.errors import DamagedRecord, InputError
from usfmae_jax.files import parse
from usfmae_jax.reporting import charts, pages
from usfmae_jax.reporting.pages import part, ranked

_NAMES = 4  # file names per reason
_VALUES = 12  # values shown per fact about equipment
_SAMPLE = 2000  # frames measured
_SHEET = 60  # frames shown
_THUMBNAIL = 176  # pixels, long side
_BLACK = 5  # of 255: highest grey level that counts as black
_COUNTED = ("frames", "patients", "unknown_patients", "videos")  # of each split
_COLOUR = "colour", "class", "name"  # of masks


def write_page(folder: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` from the `manifest.json`, `rejected.csv` and shards of a folder.

    Args:
      folder: output of a build. Any key of the manifest may be missing.

    Returns:
      The page's path.

    Raises:
      InputError: there is no manifest, or no shards.
    """
    manifest = _read_manifest(folder)
    shards = records.open_shards(os.fspath(folder))
    look = _measure(shards)
    manifest.setdefault("kept", look.records)
    splits, sheet = manifest.get("splits") or {}, _sheet(shards, look, manifest)
    several = len(look.anatomies) > 1
    masked = any(one.get("masks") for one in splits.values())
    counted = (*_COUNTED, "masks") if masked else _COUNTED
    arguments = [
        [name, value if isinstance(value, str) else json.dumps(value, sort_keys=True)]
        for name, value in sorted((manifest.get("arguments") or {}).items())
    ]
    own = manifest.get("licence") == ""  # the catalogue's of a user's own files
    problems = manifest.get("problems") or ()
    labelled = bool((manifest.get("arguments") or {}).get("labels"))
    measured, sampled = f"{len(look.means):,} frames", look.records > len(look.means)
    pages.write(
        folder / "report.html",
        "build.html",
        title=_title(manifest),
        manifest=manifest,
        look=look,
        headline=_headline(manifest),
        own=own,
        warnings=_warnings(manifest, look),
        problems=() if own else problems,
        tips=problems if own and not labelled else (),
        split_heads=["Split", "Frames", "Patients", "Patients not known", "Clips or stills", *["Masks"] * masked, "MB"],
        splits=[
            [name, *(one.get(key, 0) for key in counted), round(one.get("bytes", 0) / 1e6, 1)]
            for name, one in splits.items()
        ],
        label_heads=["Label", *splits, "all", ""],
        labels=_labels(splits),
        anatomies=_bars(look.anatomies if several else {_anatomy(manifest): _kept(manifest)}),
        among=f", among {measured} evenly drawn" if several and sampled else "",
        expected=_expected(manifest),
        sheet=sheet,
        frames_shown=sum(map(len, sheet.values())),
        figures=_charts(look),
        drawn=f"{measured}, evenly drawn" if sampled else "All frames",
        rejected=_files(manifest.get("rejected"), folder / "rejected.csv"),
        unmasked=_files(manifest.get("unmasked"), folder / "unmasked.csv"),
        colours=[[one.get(key, "") for key in _COLOUR] for one in manifest.get("mask_colours") or ()],
        equipment=_equipment(manifest),
        arguments=arguments,
        sources=[_source(one) for one in manifest.get("sources") or ()],
    )
    return folder / "report.html"


def write_index(folders: Sequence[pathlib.Path], target: pathlib.Path) -> pathlib.Path:
    """Writes an overview of several datasets, with links to their pages; returns its path.

    Args:
      folders: of the datasets, each with a `manifest.json`.
      target: path of the page; links are relative to its folder.

    Raises:
      InputError: a folder has no manifest.
    """
    found = sorted(((_read_manifest(folder), folder) for folder in folders), key=lambda one: (_title(one[0]), one[1]))
    anatomies: collections.Counter[str] = collections.Counter()
    rows: list[list[Any]] = []
    for manifest, folder in found:
        anatomies[_anatomy(manifest)] += _kept(manifest)
        address = urllib.parse.quote(os.path.relpath(folder / "report.html", target.parent))
        numbers = [_kept(manifest), _total(manifest, "patients"), _total(manifest, "unknown_patients")]
        terms = [str(manifest.get(key) or "not stated") for key in ("licence", "verified")]
        rows.append([part("link", address, _title(manifest)), _anatomy(manifest), *numbers, *terms])
    sums = [sum(row[column] for row in rows) for column in (2, 3, 4)]
    headline = dict(zip(("datasets", "frames", "patients", "patients not known"), (len(rows), *sums), strict=True))
    pages.write(target, "index.html", title="All datasets", headline=headline, anatomies=_bars(anatomies), rows=rows)
    return target


@dataclasses.dataclass
class _Look:
    """Statistics of the records, measured on a sample."""

    records: int = 0
    damaged: int = 0
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # width, height
    means: list[float] = dataclasses.field(default_factory=list)  # grey level of a frame, 0 to 255
    blacks: list[float] = dataclasses.field(default_factory=list)  # share of a frame, percent
    groups: dict[tuple[str, int], list[int]] = dataclasses.field(default_factory=dict)  # (split, label): indices
    anatomies: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    masks: int = 0


def _measure(shards: records.Shards) -> _Look:
    """Measures an evenly spaced sample of the records."""
    look = _Look(records=len(shards))
    for index in np.unique(np.linspace(0, len(shards) - 1, min(len(shards), _SAMPLE)).round().astype(int)).tolist():
        try:
            record = records.decode_record(shards[index])
            short = min(record["height"], record["width"])
            reduction = next((by for by in (8, 4, 2) if short >= 128 * by), 1)
            pixels = records.decode_image(record["image"], reduction=reduction)
        except DamagedRecord:
            look.damaged += 1
            continue
        look.sizes.append((record["width"], record["height"]) if short else (pixels.shape[1], pixels.shape[0]))
        look.means.append(float(pixels.mean()))
        look.blacks.append(100 * float((pixels <= _BLACK).mean()))
        look.anatomies[record["anatomy"] or "not stated"] += 1
        look.masks += bool(record["mask"])
        split = records.split_name(shards.locate(index)[0])
        look.groups.setdefault((split, record["label"]), []).append(index)
    return look


def _sheet(shards: records.Shards, look: _Look, manifest: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Thumbnails by split, of every label, evenly spread over the records."""
    order = {"train": 0, "validation": 1, "test": 2}
    by_size = sorted(look.groups.items(), key=lambda one: (len(one[1]), one[0]))
    shares, left = {}, _SHEET
    for number, (key, indices) in enumerate(by_size):
        shares[key] = min(len(indices), left // (len(by_size) - number))  # small groups leave room
        left -= shares[key]
    sheet: dict[str, list[dict[str, Any]]] = {}
    for key, indices in sorted(by_size, key=lambda one: (order.get(one[0][0], 3), one[0])):
        for i in np.linspace(0, len(indices) - 1, shares[key]).round().astype(int):
            record = records.decode_record(shards[indices[i]])
            sheet.setdefault(key[0], []).append(_picture(record) | {"label": _label(manifest, key[1])})
    return sheet


def _picture(record: records.Record) -> dict[str, Any]:
    """A frame as a thumbnail, with the outline of its mask."""
    pixels = records.decode_image(record["image"], channels=3)
    scale = min(1, _THUMBNAIL / max(pixels.shape[:2]))
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    with contextlib.suppress(DamagedRecord):
        if record["mask"]:
            mask = cv2.resize(records.decode_image(record["mask"]), size, interpolation=cv2.INTER_NEAREST)
            outlines, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            pixels = cv2.drawContours(pixels, outlines, -1, (255, 176, 59), 1)
    name = record["frame"] or record["source"] or "without a name"
    return {"name": name, "width": size[0], "height": size[1], "image": pages.jpeg(pixels)}


def _charts(look: _Look) -> list[str]:
    if not look.means:
        return []
    grey = "Mean grey level of a frame, from 0 (black) to 255 (white)"
    black = f"Percent of a frame that is black (grey level {_BLACK} or less)"
    return [
        charts.sizes(look.sizes),
        charts.histogram("Brightness", grey, look.means, 255),
        charts.histogram("Black", black, look.blacks, 100),
    ]


def _headline(manifest: Mapping[str, Any]) -> dict[str, int]:
    """The known numbers for the top of the page; those missing in the manifest are left out, not shown as zero."""
    numbers = {"frames kept": _kept(manifest)}
    names = {"dropped": "frames dropped", "rejected": "files rejected"}
    numbers |= {name: sum(manifest[key].values()) for key, name in names.items() if key in manifest}
    names = {"patients": "patients", "unknown_patients": "patients not known"}
    return numbers | {name: _total(manifest, key) for key, name in names.items() if "splits" in manifest}


def _warnings(manifest: Mapping[str, Any], look: _Look) -> list[str]:
    found = [str(one) for one in manifest.get("warnings") or ()]
    if (kept := _kept(manifest)) != look.records:
        found.append(f"The shards hold {look.records:,} frames, but the build wrote {kept:,}: build it again.")
    if look.damaged:
        found.append(f"{look.damaged:,} of {len(look.means) + look.damaged:,} frames looked at cannot be read.")
    if unknown := _total(manifest, "unknown_patients"):
        found.append(
            f"{unknown:,} files or clips do not say whose they are, and count as a patient each: if a patient has "
            "several, they may be on both sides of a split."
        )
    return found


def _labels(splits: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each label: frames in each split and in total, and a bar."""
    counts = [one.get("labels") or {} for one in splits.values()]
    names = dict.fromkeys(name for one in counts for name in one)
    rows = [[name, *(one.get(name, 0) for one in counts), sum(one.get(name, 0) for one in counts)] for name in names]
    top = max((row[-1] for row in rows), default=0)
    return [[*row, part("bar", row[-1] / max(top, 1))] for row in rows]


def _bars(numbers: Mapping[str, int]) -> list[list[Any]]:
    """Rows of name, number and bar, the largest number first."""
    top = max([1, *numbers.values()])
    return [[name, number, part("bar", number / top)] for name, number in ranked(numbers)]


def _expected(manifest: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of what is counted, the published number, the number found, and whether they agree."""
    labels: collections.Counter[str] = collections.Counter()
    for split in (manifest.get("splits") or {}).values():
        labels.update(split.get("labels") or {})
    dropped = sum((manifest.get("dropped") or {}).values())
    found = dict(labels) | {name: _total(manifest, name) for name in ("patients", "videos")}
    found |= {"frames": _kept(manifest) + dropped, "files": (manifest.get("input") or {}).get("files", 0)}
    rows: list[list[Any]] = []
    for name, number in (manifest.get("expected") or {}).items():
        what = f"{name} (kept and dropped)" if name == "frames" and dropped else name
        agrees = "as expected" if found.get(name) == number else part("differs", "differs")
        rows.append([what, number, found.get(name, 0), agrees])
    return rows


def _files(reasons: Mapping[str, int] | None, table: pathlib.Path) -> list[list[Any]]:
    """Rows of reason, number of files, and some of their names, taken from the table of all files."""
    examples: dict[str, list[str]] = collections.defaultdict(list)
    with contextlib.suppress(FileNotFoundError), table.open(encoding="utf-8", newline="") as file:
        for row in cells.read_dicts(file):
            if len(examples[row["reason"]]) < _NAMES:
                examples[row["reason"]].append(row["file"])
    rows = []
    for reason, number in ranked(reasons):
        names = examples.get(reason, [])
        more = f" and {number - len(names):,} more" if number > len(names) > 0 else ""
        rows.append([reason, number, ", ".join(names) + more])
    return rows


def _equipment(manifest: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, values in sorted((manifest.get("technical") or {}).items()):
        more = f" and {len(values) - _VALUES:,} others" if len(values) > _VALUES else ""
        shown = ", ".join(f"{value} ({number:,})" for value, number in ranked(values)[:_VALUES])
        rows.append([name, shown + more])
    return rows


def _source(one: Mapping[str, Any]) -> list[Any]:
    kind = next((kind for kind in ("sha256", "md5") if one.get(kind)), "")
    return [str(one.get("file", "")), one.get("bytes", 0), f"{kind} {one.get(kind, '')}".strip()]


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = parse((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no manifest.json that can be read: build the dataset again") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{folder / 'manifest.json'} is not a manifest: build the dataset again")
    return manifest


def _title(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("title") or manifest.get("dataset") or "Dataset without a name")


def _anatomy(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("anatomy") or "not stated")


def _label(manifest: Mapping[str, Any], label: int) -> str:
    names = manifest.get("label_names") or ()
    if label < 0:
        return "no label" if names else ""
    return str(names[label]) if label < len(names) else f"label {label}"


def _kept(manifest: Mapping[str, Any]) -> int:
    return manifest["kept"] if "kept" in manifest else _total(manifest, "frames")


def _total(manifest: Mapping[str, Any], key: str) -> int:
    return sum(split.get(key, 0) for split in (manifest.get("splits") or {}).values())
