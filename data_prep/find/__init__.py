"""Collects what is known about every file of a dataset without opening it, from its folder and catalogue entry."""

import bisect
import collections
import dataclasses
import itertools
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from data_prep import catalog
from data_prep.catalog.schema import Entry, Layout, fill, glob_matcher
from data_prep.find import tables
from data_prep.find.beside import find_masks, without_images
from data_prep.find.files import (
    FOLDER_LINK,
    SPLITS,
    TOO_DEEP,
    Collection,
    Item,
    Rejected,
    Scan,
    check_splits,
    fingerprint,
    holder,
    known_patient,
    label_names,
    printable,
    scan_folder,
    searching,
    spacing_of,
)
from usfmae_jax.errors import InputError, some

#: Default templates, for layouts without one: the first whose groups all occur in the pattern.
_DEFAULTS = {
    "patient": ("{patient}",),
    "video": ("{video}",),
    "frame": ("{image}", "{video}/{frame}", "{patient}/{frame}"),
    "split": ("{split}",),
    "label": ("{cls}",),
}

Values = dict[str, str]

_MASK_FOLDER = re.compile(
    r"(?:[^/]+/)*?(?:masks?|labels?|annotations?|seg(?:mentation)?s?|gts?|ground[ _-]?truths?)(?:tr|ts)?/",
    re.IGNORECASE,
)
_DATA_FILES = (".raw", ".zraw", ".img")  # data files of headers; these may begin with any bytes


def collect(
    entry: Entry,
    root: pathlib.Path,
    *,
    labels: str = "",
    include: Sequence[str] = (),
    pattern: str = "",
    switches: Sequence[str] = (),
    masks: str = "auto",
) -> Collection:
    """Finds the files of a dataset and what is known about them from paths and tables.

    Args:
      entry: the catalogue entry.
      root: the folder that holds the dataset, at any depth.
      labels: "" for those of the entry, "parent" for the name of the folder that holds each file, or the path of a
        table, which then replaces all information in the entry, see `tables.read_labels`.
      include: globs to use instead of the entry's.
      pattern: regular expression to use instead of the entry's, with groups patient, video, frame, image, split, cls.
      switches: optional parts to include, or names from `catalog.SWITCHES`.
      masks: "off" uses none; files beside images that are named like masks are then frames.

    Raises:
      InputError: no files, an argument that does not fit the entry, a damaged table, or a patient in two splits.
    """
    if not root.is_dir():
        raise InputError(f"--input={root} is not a folder")
    root = root.resolve()
    _check_arguments(entry, pattern, switches)
    from data_prep.readers import SUFFIXES, Options  # late: they import OpenCV, which the catalogue does not need

    masks = "off" if "no_masks" in switches else masks
    plain = entry.generic and any("*" in layout.suffixes for layout in entry.layouts)
    listed = labels not in ("", "parent")
    if listed or (plain and not (include or pattern)):
        scan = scan_folder(root, lambda path: path.lower().endswith(tuple(SUFFIXES)) or _can_be_read(root / path))
        if listed:
            if pathlib.Path(labels).resolve().is_relative_to(root):  # it is not passed over
                scan.left_out.subtract(["other files"])
            return dataclasses.replace(_listed(root, labels, scan, masks), options=Options())
        if not scan.files:
            endings = ", ".join(sorted(SUFFIXES))
            raise InputError(f"--input={root} holds no images: expected files that end in {endings}")
        layout, paths = Layout(("**",)), sorted(scan.files, key=printable)
    else:
        scan = scan_folder(root, lambda path: True)
        layout, paths = _choose_layout(entry, root, scan, include, pattern, switches)
    by_name = _beside(scan.files, paths) if entry.generic and masks != "off" else {}
    drawn = {mask for found in by_name.values() for mask in found}
    with searching(layout.pattern) as search:
        known = {
            path: _variables(path, search(path) if layout.pattern else None) for path in paths if path not in drawn
        }
    warnings = _unmatched(layout, known)
    values = _values(layout, known)
    used = tables.apply(root, layout.tables, scan.files, known, values, warnings)
    if labels:
        for path in known:
            values[path]["label"] = holder(without_images(path) if drawn else path)
    where = "by renaming folders" if labels else "in the paths or tables"
    names = list(entry.classes) or label_names((value.get("label", "") for value in values.values()), where)
    if masks != "off":
        by_name = by_name or _masks(layout, known, scan.files, warnings)
    found = _items(layout, names, by_name, values, switches, warnings)
    check_splits(found, "--optional=one_split puts all of them in train")
    splits: dict[str, list[tuple[str, str, str]]] = {}
    for folds in layout.folds:
        by_key = {tables.plain_key(folds.match, known[item.path]): item for item in found}
        rows, read = tables.read_folds(root, folds, scan.files, by_key, warnings)
        splits |= {folds.name: rows} if rows else {}
        used |= read
    used |= {*known, *(mask for item in found for mask in item.masks)}
    warnings += _count(entry, found, names)
    if entry.generic and masks != "off":
        warnings += _mask_folders(known)
    patients = {item.patient for item in found}
    if entry.generic and not labels:
        warnings += _unread(root)
    if pattern and len(found) > len(patients) == 1 and patients != {""}:
        warnings.append(f"--pattern gives all {len(found):,} files one patient, {printable(*patients)!r}: is it right?")
    return Collection(
        items=found,
        label_names=names,
        rejected=_rejected(scan, layout),
        left_out=_left_out(scan, layout, used),
        fingerprint=fingerprint({path: scan.files[path] for path in used}),
        options=Options(**cast("Any", layout.reader)),
        mask_kind="auto" if drawn else layout.mask_kind,
        beside=len(drawn),
        splits=splits,
        warnings=warnings,
    )


def _listed(root: pathlib.Path, labels: str, scan: Scan, masks: str) -> Collection:
    """The content of a user's own table, with masks found beside the listed images if it lists no masks itself."""
    found, stats = tables.read_labels(root, labels, masks)
    if masks != "off" and not (found.unmasked or any(item.masks for item in found.items)):
        by_name = _beside(scan.files, [item.path for item in found.items])
        drawn = {mask for some in by_name.values() for mask in some} - stats.keys()
        for number, item in enumerate(found.items):
            of_item = tuple(mask for mask in by_name.get(item.path, ()) if mask in drawn)
            found.items[number] = dataclasses.replace(item, masks=of_item)
        found.beside, found.mask_kind = len(drawn), "auto" if drawn else "image"
        stats |= {mask: scan.files[mask] for mask in drawn}
    scan.left_out["images not in the labels file"] = len(scan.files.keys() - stats.keys())
    found.left_out, found.fingerprint = dict(+scan.left_out), fingerprint(stats)
    return found


def _beside(files: Iterable[str], paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Maps images and volumes in `paths` to their masks among `files`."""
    from data_prep.readers import IMAGES, VOLUMES

    can_be = tuple(IMAGES | VOLUMES)
    found = find_masks(path for path in files if path.lower().endswith(can_be))
    return {path: found[path] for path in paths if path in found}


def _unread(root: pathlib.Path) -> list[str]:
    """A warning for each table in the folder whose name says that it holds labels."""
    return [
        f"{name} is in the folder and is not read; --labels=DIR/{name}, where DIR is that of --input, takes labels and "
        "patients from it"
        for name in ("labels.csv", "labels.xlsx")
        if (root / name).is_file()
    ]


def _mask_folders(frames: Iterable[str]) -> list[str]:
    """A warning if some frames, but not all, are in folders with the name of a mask folder; else empty."""
    inside: dict[str, int] = collections.Counter()
    others = False
    for path in frames:
        if called := _MASK_FOLDER.match(path):
            inside[called[0]] += 1
        others = others or not called
    if not (inside and others):
        return []
    files, (first, *more) = sum(inside.values()), [printable(folder) for folder in inside]
    where = first + (f" and {len(more)} folder{'s' * (len(more) > 1)} more" if more else "")
    subject = (
        "1 file in {} looks like a mask but matches"
        if files == 1
        else f"{files:,} files in {{}} look like masks but match"
    )
    return [
        f"{subject.format(where)} no image by name, and became frames; name masks x_mask.png or masks/x.png for an "
        "image x.png, or give the column 'mask' in --labels (--masks=off: they are images)"
    ]


def _check_arguments(entry: Entry, pattern: str, switches: Sequence[str]) -> None:
    if entry.name == "phantom":
        raise InputError("--dataset=phantom is simulated and takes no --input; leave it out")
    known = {switch for layout in entry.layouts for switch in layout.optional} | set(catalog.SWITCHES)
    for switch in switches:
        if switch not in known:
            raise InputError(f"--optional={switch} is not known to {entry.name}, only {', '.join(sorted(known))}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"--pattern={pattern} is no regular expression: {error}") from error
    if pattern and not re.compile(pattern).groupindex:
        raise InputError(f"--pattern={pattern} names nothing; name what is whose, as in '(?P<patient>[^/]+)/'")


def _choose_layout(
    entry: Entry,
    root: pathlib.Path,
    scan: Scan,
    include: Sequence[str],
    pattern: str,
    switches: Sequence[str],
) -> tuple[Layout, list[str]]:
    """The first layout that matches any file, with the user's own globs and pattern applied, and its files, sorted."""
    if not (entry.layouts or include):
        raise InputError(
            f"the layout of {entry.name} is not known: look at its files and add --include='**/*.png' for those that "
            r"are frames and, if their paths tell patients apart, --pattern='(?P<patient>[^/]+)/[^/]+\.png$'"
        )
    layouts = list(entry.layouts) or [Layout(tuple(include))]
    if include:
        layouts = [dataclasses.replace(layouts[0], include=tuple(include), optional={}, suffixes=(), content="")]
    for layout in layouts:
        globs = [*layout.include, *(glob for switch in switches for glob in layout.optional.get(switch, ()))]
        layout = dataclasses.replace(layout, include=tuple(globs))
        if pattern:
            layout = dataclasses.replace(layout, pattern=pattern, patient="", video="", frame="", split="", label="")
        wanted = _wanted(layout)
        paths = [path for path in scan.files if wanted(path)]
        if layout.content:
            paths = [path for path in paths if _is_dicom(root / path)]
        if paths:
            return layout, sorted(paths, key=_natural)
    expected = "; ".join(dict.fromkeys(glob for layout in layouts for glob in layout.include))
    endings = ", ".join(dict.fromkeys(suffix for layout in layouts for suffix in layout.suffixes))
    raise InputError(
        f"--input={root} holds no files of {entry.name}, expected {expected}{endings and f' that end in {endings}'}: "
        "is it the folder that the archives were extracted into? If the files lie differently, add --include=GLOB"
    )


def _wanted(layout: Layout) -> Callable[[str], bool]:
    included, excluded = glob_matcher(layout.include), glob_matcher(layout.exclude)
    suffixes = layout.suffixes
    if "*" in suffixes:
        from data_prep.readers import SUFFIXES

        suffixes = tuple(SUFFIXES)
    return lambda path: (
        included(path) and not excluded(path) and (not suffixes or path.lower().endswith(tuple(suffixes)))
    )


def _can_be_read(path: pathlib.Path) -> bool:
    from data_prep.readers.kinds import HEAD_BYTES, kind_of

    if path.suffix.lower() in _DATA_FILES or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return bool(kind_of(file.read(HEAD_BYTES)))
    except OSError:
        return False


def _is_dicom(path: pathlib.Path) -> bool:
    from data_prep.readers.kinds import DICOM, HEAD_BYTES, kind_of

    if path.suffix and path.suffix.lower() in DICOM:
        return True  # if it is not DICOM it is damaged, and the reader reports that
    try:
        with path.open("rb") as file:
            return kind_of(file.read(HEAD_BYTES)) == "dicom"
    except OSError:
        return True  # the reader will report why


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key that puts frame 10 after frame 2, so that neighbouring frames of a clip are adjacent."""
    parts = re.split(r"(\d+)", printable(path))
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def _variables(path: str, found: re.Match[str] | None) -> Values:
    """The variables available to templates over this path."""
    folder, name = posixpath.split(path)
    ext = name[-7:] if name.lower().endswith(".nii.gz") else posixpath.splitext(name)[1]
    groups = {group: value for group, value in found.groupdict().items() if value} if found else {}
    places = {"name": name, "stem": name.removesuffix(ext), "ext": ext, "dir": folder or "."}
    return places | {"up": posixpath.dirname(folder) or "."} | groups


def _unmatched(layout: Layout, paths: Iterable[str]) -> list[str]:
    with searching(layout.pattern) as search:
        strange = [path for path in paths if layout.pattern and not search(path)]
    if not strange:
        return []
    return [
        f"{len(strange):,} files do not match the pattern of ids, first {printable(strange[0])!r}: each of them counts "
        "as a patient of its own"
    ]


def _values(layout: Layout, known: Mapping[str, Values]) -> dict[str, Values]:
    """Fields by path, as far as the paths alone determine them."""
    groups = set(re.compile(layout.pattern).groupindex)
    templates = {}
    for field, candidates in _DEFAULTS.items():
        fitting = [one for one in candidates if set(re.findall(r"\{(\w+)\}", one)) <= groups]
        templates[field] = getattr(layout, field) or (fitting[0] if fitting else "")
    return {
        path: {field: printable(fill(template, variables)) for field, template in templates.items()}
        for path, variables in known.items()
    }


def _items(
    layout: Layout,
    names: list[str],
    masks: Mapping[str, tuple[str, ...]],
    values: Mapping[str, Values],
    switches: Sequence[str],
    warnings: list[str],
) -> list[Item]:
    """An item for every file, with all that is known about it; appends to `warnings`."""
    numbers = _label_numbers(layout, names)
    found = [
        Item(
            path,
            masks=masks.get(path, ()),
            split="train" if "one_split" in switches else _split(layout, path, value.get("split", "")),
            label=numbers.get(value.get("label", "").casefold(), -1),
            patient=known_patient(value.get("patient", "")),
            video=value.get("video", ""),
            frame=value.get("frame", ""),
            spacing=_spacing(path, value.get("spacing", "")),
        )
        for path, value in values.items()
    ]
    odd = sorted({values[item.path]["label"] for item in found if item.label < 0} - {"", "-1"})
    if odd:
        warnings.append(f"labels that are none of {', '.join(names)} are left out: {some(list(map(repr, odd)))}")
    return _unique_frames(found, warnings)


def _spacing(path: str, value: str) -> tuple[float, float]:
    try:
        return spacing_of(value)
    except ValueError as error:
        raise InputError(
            f"a table says that the pixels of {printable(path)!r} are {value!r} mm large, which is no number; mend it"
        ) from error


def _masks(
    layout: Layout, known: Mapping[str, Values], files: Mapping[str, Any], warnings: list[str]
) -> dict[str, tuple[str, ...]]:
    """The masks that a layout names, by the path of their image; appends to `warnings` if none of them exists."""
    # NUL marks wildcards, so that a `*` in the name of an image is not one.
    named = {path: fill(layout.mask.replace("*", "\0"), variables) for path, variables in known.items()}
    named = {path: posixpath.normpath(mask) for path, mask in named.items() if mask}
    ordered = sorted(files) if "*" in layout.mask else []
    there = {path: _matching(mask, ordered) if "\0" in mask else (mask,) for path, mask in named.items()}
    found = {path: masks for path, masks in there.items() if masks and masks[0] in files}
    if named and not found:
        warnings.append(f"there are no masks, which were expected at {layout.mask}")
    return found


def _matching(mask: str, ordered: list[str]) -> tuple[str, ...]:
    """The sorted paths that match a mask, in which NUL is `*` and two NULs and a slash are `**/`."""
    pattern = re.compile(re.escape(mask).replace("\0\0/", "(?:[^/]+/)*").replace("\0", "[^/]*"), re.DOTALL)
    prefix = mask.partition("\0")[0]
    later = itertools.islice(ordered, bisect.bisect_left(ordered, prefix), None)
    return tuple(filter(pattern.fullmatch, itertools.takewhile(lambda path: path.startswith(prefix), later)))


def _split(layout: Layout, path: str, value: str) -> str:
    split = layout.splits.get(value, SPLITS.get(value.lower(), ""))
    if not split:
        known = ", ".join([*layout.splits, "train", "val", "test"])
        raise InputError(
            f"{printable(path)!r} is in split {value!r}, which is none of {known}; --optional=one_split puts all files "
            "in train"
        )
    return split


def _label_numbers(layout: Layout, names: list[str]) -> dict[str, int]:
    """Class numbers by their case-folded names in paths and tables; of equal names, the first."""
    numbers = {name.casefold(): number for number, name in reversed([*enumerate(names)])}
    said = {key.casefold(): numbers.get(name.casefold(), -1) for key, name in layout.labels.items()}
    return numbers | said


def _unique_frames(found: list[Item], warnings: list[str]) -> list[Item]:
    """Removes frame ids shared by several files."""
    times = collections.Counter(item.frame for item in found if item.frame)
    twice = [frame for frame, count in times.items() if count > 1]
    if not twice:
        return found
    warnings.append(f"{len(twice):,} frame ids stand for several files, first {twice[0]!r}: the paths are their ids")
    return [dataclasses.replace(item, frame="") if times[item.frame] > 1 else item for item in found]


def _count(entry: Entry, found: list[Item], names: list[str]) -> list[str]:
    """Warnings about counts that differ from the published ones; frames are only counted when files are read."""
    counts = {
        "files": len(found),
        "patients": len({item.patient for item in found} - {""}),
        "videos": len({item.video for item in found} - {""}),
    } | {name: sum(item.label == number for item in found) for number, name in enumerate(names)}
    return [
        f"{counts[what]:,} {what} were found, {expected:,} are in the whole dataset"
        for what, expected in entry.expected.items()
        if what in counts and counts[what] != expected
    ]


def _rejected(scan: Scan, layout: Layout) -> list[Rejected]:
    wanted = _wanted(layout)
    return [one for one in scan.rejected if one.reason in (FOLDER_LINK, TOO_DEEP) or wanted(one.source)]


def _left_out(scan: Scan, layout: Layout, used: set[str]) -> dict[str, int]:
    excluded = glob_matcher(layout.exclude)
    scan.left_out.update(
        "masks and copies that the catalogue excludes" if excluded(path) else "other files"
        for path in scan.files
        if path not in used
    )
    return dict(+scan.left_out)
