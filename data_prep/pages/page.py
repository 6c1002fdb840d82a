"""What a person looks at: `report.html` beside the shards, and one overview of several datasets.

The pages need nothing but themselves: pictures and charts are inside, nothing is loaded, nothing runs. Equal data give
equal bytes. Names come from strangers' files, so all text is escaped.
"""

import collections
import contextlib
import csv
import json
import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.pages import look
from usfmae_jax.data import records
from usfmae_jax.errors import InputError
from usfmae_jax.reporting import markup

_NAMES = 4  # of files per reason


def write_page(folder: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` from the `manifest.json`, `rejected.csv` and shards of a folder.

    Args:
      folder: as a build leaves it. Any key of the manifest may be missing.

    Returns:
      The page's path.

    Raises:
      InputError: there is no manifest, or no shards.
    """
    manifest = _read_manifest(folder)
    shards = records.open_shards(os.fspath(folder))
    seen = look.measure(shards)
    manifest.setdefault("kept", seen.records)
    sections = {
        "Counts": _counts(manifest, seen),
        "Frames": look.contact_sheet(shards, seen, manifest),
        "Size and brightness": look.charts(seen),
        "Left out": _left_out(manifest, folder),
        "Removed": _removed(manifest),
        "Equipment": _equipment(manifest),
        "How it was made": _made(manifest),
    }
    body = _header(manifest) + markup.tiles(_headline(manifest)) + _notices(manifest, seen) + markup.sections(sections)
    return markup.write(folder / "report.html", _title(manifest), body)


def write_index(folders: Sequence[pathlib.Path], target: pathlib.Path) -> pathlib.Path:
    """Writes one overview of several datasets, with links to their pages; returns its path.

    Args:
      folders: of the datasets, each with a `manifest.json`.
      target: the page; links are relative to the folder where it lies.

    Raises:
      InputError: a folder has no manifest.
    """
    found = sorted(((_read_manifest(folder), folder) for folder in folders), key=lambda one: (_title(one[0]), one[1]))
    anatomies: collections.Counter[str] = collections.Counter()
    rows: list[list[Any]] = []
    for manifest, folder in found:
        anatomy = str(manifest.get("anatomy") or "not stated")
        anatomies[anatomy] += _kept(manifest)
        link = urllib.parse.quote(os.path.relpath(folder / "report.html", target.parent))
        numbers = [_kept(manifest), _total(manifest, "patients"), _total(manifest, "unknown_patients")]
        terms = [str(manifest.get(key) or "not stated") for key in ("licence", "verified")]
        rows.append([markup.Html(f'<a href="{link}">{markup.escape(_title(manifest))}</a>'), anatomy, *numbers, *terms])
    sums = [sum(row[column] for row in rows) for column in (2, 3, 4)]
    body = '<p class="kicker">Ultrasound data</p><h1>All datasets</h1>'
    body += markup.tiles(
        dict(zip(("datasets", "frames", "patients", "patients not known"), (len(rows), *sums), strict=True))
    )
    heads = ["Dataset", "Anatomy", "Frames", "Patients", "Patients not known", "Licence", "Recipe checked with"]
    body += f"<section><h2>Frames by anatomy</h2>{markup.bars('Anatomy', anatomies)}</section>"
    body += f"<section><h2>Datasets</h2>{markup.table(heads, rows, stack=True, most=len(rows))}</section>"
    return markup.write(target, "All datasets", body)


def _header(manifest: Mapping[str, Any]) -> str:
    about = [manifest.get("anatomy"), f"version {manifest['version']}" if manifest.get("version") else ""]
    terms = {
        "Licence": str(manifest.get("licence") or "not stated"),
        "Please cite": str(manifest.get("citation") or "not stated"),
    }
    if homepage := str(manifest.get("homepage") or ""):
        # Anything but a web address, such as a script, stays text.
        is_link = homepage.startswith(("https://", "http://"))
        link = f'<a href="{markup.escape(homepage)}" rel="noreferrer">{markup.escape(homepage)}</a>'
        terms["Source"] = markup.Html(link) if is_link else homepage
    listed = "".join(f"<dt>{name}</dt><dd>{markup.escape(value)}</dd>" for name, value in terms.items())
    lead = markup.escape(", ".join(str(one) for one in about if one))
    return (
        f'<p class="kicker">Ultrasound dataset report</p><h1>{markup.escape(_title(manifest))}</h1>'
        f'<p class="lead">{lead}</p><dl class="terms">{listed}</dl>'
    )


def _headline(manifest: Mapping[str, Any]) -> dict[str, int]:
    """What is known of the numbers at the top; what the manifest does not say is not shown as zero."""
    numbers = {"frames kept": _kept(manifest)}
    names = {"dropped": "frames dropped", "rejected": "files rejected"}
    numbers |= {name: sum(_numbers(manifest, key).values()) for key, name in names.items() if key in manifest}
    names = {"patients": "patients", "unknown_patients": "patients not known"}
    return numbers | {name: _total(manifest, key) for key, name in names.items() if "splits" in manifest}


def _notices(manifest: Mapping[str, Any], seen: look.Look) -> str:
    found = [str(one) for one in manifest.get("warnings") or ()]
    if (kept := _kept(manifest)) != seen.records:
        found.append(f"The shards hold {seen.records:,} frames, but the build wrote {kept:,}: build it again.")
    if seen.damaged:
        found.append(f"{seen.damaged:,} of {len(seen.means) + seen.damaged:,} frames looked at cannot be read.")
    if unknown := _total(manifest, "unknown_patients"):
        found.append(
            f"{unknown:,} files or clips do not say whose they are, and count as a patient each: if a patient has "
            "several, they may be on both sides of a split."
        )
    boxes = [
        ("Please check", found),
        ("Known problems of this dataset", [str(p) for p in manifest.get("problems") or ()]),
    ]
    return "".join(markup.notice(name, lines) for name, lines in boxes)


def _expected(manifest: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of what is counted, as published, as found, and whether that agrees."""
    labels: collections.Counter[str] = collections.Counter()
    for split in _splits(manifest).values():
        labels.update(_numbers(split, "labels"))
    dropped = sum(_numbers(manifest, "dropped").values())
    found = dict(labels) | {name: _total(manifest, name) for name in ("patients", "videos")}
    found |= {"frames": _kept(manifest) + dropped, "files": _number((manifest.get("input") or {}).get("files"))}
    rows = []
    for name, number in _numbers(manifest, "expected").items():
        what = f"{name} (kept and dropped)" if name == "frames" and dropped else name
        rows.append([what, number, found.get(name, 0), "as expected" if found.get(name) == number else "differs"])
    return rows


def _counts(manifest: Mapping[str, Any], seen: look.Look) -> str:
    splits = _splits(manifest)
    heads = ["Split", "Frames", "Patients", "Patients not known", "Clips", "MB"]
    keys = ("frames", "patients", "unknown_patients", "videos")
    rows = [
        [name, *(_number(one.get(key)) for key in keys), round(_number(one.get("bytes")) / 1e6, 1)]
        for name, one in splits.items()
    ]
    page = markup.table(heads, rows, "By split", stack=True)
    labels = list(dict.fromkeys(label for one in splits.values() for label in _numbers(one, "labels")))
    counts = [[_numbers(one, "labels").get(label, 0) for one in splits.values()] for label in labels]
    top = max((sum(row) for row in counts), default=0)
    rows = [[label, *row, sum(row), markup.bar(sum(row), top)] for label, row in zip(labels, counts, strict=True)]
    page += markup.table(["Label", *splits, "all", ""], rows, "Frames by label")
    if len(seen.anatomies) > 1:
        where = "" if seen.records == len(seen.means) else f", among {len(seen.means):,} frames evenly drawn"
        page += markup.bars("Anatomy", seen.anatomies, f"Frames by anatomy{where}")
    else:
        page += markup.bars(
            "Anatomy", {str(manifest.get("anatomy") or "not stated"): _kept(manifest)}, "Frames by anatomy"
        )
    rows = [
        [what, number, found, says if says == "as expected" else markup.Html(f'<span class="differs">{says}</span>')]
        for what, number, found, says in _expected(manifest)
    ]
    return page + markup.table(["", "Published", "Found", ""], rows, "As published, and as found")


def _left_out(manifest: Mapping[str, Any], folder: pathlib.Path) -> str:
    examples: dict[str, list[str]] = collections.defaultdict(list)
    with contextlib.suppress(FileNotFoundError), (folder / "rejected.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if len(examples[row["reason"]]) < _NAMES:
                examples[row["reason"]].append(row["file"])
    rows = []
    for reason, number in markup.ranked(_numbers(manifest, "rejected")):
        names = examples.get(reason, [])
        more = f" and {number - len(names):,} more" if number > len(names) > 0 else ""
        rows.append([reason, number, ", ".join(names) + more])
    page = markup.table(
        ["Reason", "Frames"], markup.ranked(_numbers(manifest, "dropped")), "Frames that were read and dropped"
    )
    page += markup.table(["Reason", "Files", "Which (all are in rejected.csv)"], rows, "Files that could not be used")
    return page + markup.table(
        ["Kind", "Number"], markup.ranked(_numbers(manifest, "passed_over")), "Passed over, as not asked for"
    )


def _removed(manifest: Mapping[str, Any]) -> str:
    page = markup.table(
        ["Kind", "Number"], markup.ranked(_numbers(manifest, "removed")), "From the files, to protect patients"
    )
    page += markup.table(["Kind", "Pixels"], markup.ranked(_numbers(manifest, "cleaned")), "From the pictures")
    nothing = '<p class="soft">Nothing was removed from the files or from the pictures.</p>'
    return page or (nothing if {"removed", "cleaned"} & manifest.keys() else "")


def _equipment(manifest: Mapping[str, Any]) -> str:
    facts = manifest.get("technical") or {}
    rows = []
    for name, values in sorted(facts.items()):
        ranked = markup.ranked(_numbers(facts, name))
        more = f" and {len(values) - markup.ROWS:,} others" if len(values) > markup.ROWS else ""
        rows.append([name, ", ".join(f"{value} ({number:,})" for value, number in ranked[: markup.ROWS]) + more])
    return markup.table(["What the files say", "Values, and in how many files"], rows, most=len(rows))


def _made(manifest: Mapping[str, Any]) -> str:
    source = manifest.get("input") or {}
    facts = {
        "Tool": manifest.get("tool"),
        "Dataset": " ".join(str(manifest[key]) for key in ("dataset", "version") if manifest.get(key)),
        "Recipe checked with": manifest.get("verified"),
        "Files read": f"{_number(source.get('files')):,}" if source.get("files") else "",
        "Their fingerprint": source.get("fingerprint"),
        "SHA-256 of all": source.get("sha256"),
    }
    page = markup.table(["", ""], [[name, str(value)] for name, value in facts.items() if value])
    arguments = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in sorted((manifest.get("arguments") or {}).items())
    }
    page += markup.table(["Argument", "Value"], [[*one] for one in arguments.items()], "Built with", most=40)
    rows = []
    for one in manifest.get("sources") or ():
        kind = next((kind for kind in ("sha256", "md5") if one.get(kind)), "")
        rows.append([str(one.get("file", "")), _number(one.get("bytes")), f"{kind} {one.get(kind, '')}".strip()])
    page += markup.table(["File", "Bytes", "Checksum"], rows, "Downloaded")
    return page + markup.table(["File", "Bytes"], [[*one] for one in _numbers(manifest, "files").items()], "Written")


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no manifest.json that can be read: build the dataset again") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{folder / 'manifest.json'} is not a manifest: build the dataset again")
    return manifest


def _title(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("title") or manifest.get("dataset") or "Dataset without a name")


def _splits(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return dict(manifest.get("splits") or {})


def _kept(manifest: Mapping[str, Any]) -> int:
    return _number(manifest["kept"]) if "kept" in manifest else _total(manifest, "frames")


def _total(manifest: Mapping[str, Any], key: str) -> int:
    return sum(_number(split.get(key)) for split in _splits(manifest).values())


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _numbers(values: Mapping[str, Any], key: str) -> dict[str, int]:
    return {str(name): _number(number) for name, number in (values.get(key) or {}).items()}
