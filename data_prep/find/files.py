"""A folder of images and its labels: which files there are, and what is known about each without opening it.

Every dataset becomes a `Collection`; the plain folder is the one that knows least. Standard library only, so that
finding out that there is nothing to do takes no time.
"""

import collections
import csv
import dataclasses
import functools
import hashlib
import os
import pathlib
import stat
from collections.abc import Callable, Iterable
from typing import Any

from usfmae_jax.errors import InputError

COLUMNS = ("file", "label", "patient", "video", "split", "mask")
SPLITS = {"": "train", "train": "train", "val": "validation", "validation": "validation", "test": "test"}
FOLDER_LINK = "link to a folder, not followed"
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z")
_LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # of archives and file managers: as good as hidden


@dataclasses.dataclass(frozen=True)
class Item:
    """One source file of a dataset; paths are relative to the dataset and spelled as the file system does."""

    path: str
    mask: str = ""
    split: str = "train"
    label: int = -1  # -1 = none
    patient: str = ""  # empty = unknown: the video is then all that is known to belong together
    video: str = ""  # empty = its own
    frame: str = ""  # empty = the path

    @property
    def source(self) -> str:
        """The path as it is shown and stored."""
        return printable(self.path)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A file that cannot be used, and why."""

    source: str
    reason: str


@dataclasses.dataclass
class Collection:
    """What a build starts from.

    Attributes:
      items: in order.
      label_names: class names in the order of their numbers.
      rejected: files that cannot be used, found so far.
      left_out: kinds of files that were passed over, and how many.
      fingerprint: changes when a file that takes part does.
      options: of the readers, `readers.Options`.
      mask_kind: how the masks are read, see `masks.read_mask_as`.
      splits: official tables of folds by name: rows of (frame, fold, part), part being train, validation or test.
      warnings: sentences for the person.
    """

    items: list[Item]
    label_names: list[str]
    rejected: list[Rejected]
    left_out: dict[str, int]
    fingerprint: str
    options: Any = None
    mask_kind: str = "image"
    splits: dict[str, list[tuple[str, str, str]]] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Scan:
    """What a folder holds."""

    files: dict[str, tuple[int, int]]  # that take part: path below it, (size, mtime_ns)
    rejected: list[Rejected]
    left_out: collections.Counter[str]


def printable(path: str) -> str:
    """A path with forward slashes, and escapes for bytes that are not UTF-8."""
    path = path.replace(os.sep, "/")
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def collect(
    root: pathlib.Path, labels: str, suffixes: Iterable[str], can_be_read: Callable[[pathlib.Path], bool]
) -> Collection:
    """Lists a folder.

    Args:
      root: the folder, searched with everything below it; hidden files and linked folders are passed over.
      labels: "" for none, "parent" for the name of the directory that holds the file, or the path of a CSV file that
        has the column `file` and may have the others of `COLUMNS`; files it does not list are then left out.
      suffixes: of files that can be read, in lower case.
      can_be_read: tells by its content whether a file with another suffix, or none, can be.

    Raises:
      InputError: no folder, no images, or a labels file that does not fit them.
    """
    if not root.is_dir():
        raise InputError(f"--input={root} is not a folder")
    root = root.resolve()
    known = tuple(suffixes)
    scan = scan_folder(root, lambda path: path.lower().endswith(known) or can_be_read(root / path))
    if labels in ("", "parent"):
        paths = sorted(scan.files, key=printable)
        holders = [holder(path) if labels else "" for path in paths]
        names = label_names(holders)
        items = [Item(path, label=_number(label, names)) for path, label in zip(paths, holders, strict=True)]
        stats = scan.files
        if not items:
            raise InputError(
                f"--input={root} holds no images: expected files that end in {', '.join(sorted(suffixes))}"
            )
    else:
        items, names, stats, rejected = _read_labels(root, labels)
        listed = {item.path for item in items} | {item.mask for item in items}
        scan.left_out["images not in the labels file"] = len(scan.files.keys() - listed)
        scan.rejected = rejected
    return Collection(items, names, scan.rejected, dict(+scan.left_out), fingerprint(stats))


def fingerprint(stats: dict[str, tuple[int, int]]) -> str:
    """SHA-256 over paths, sizes and times of change of files, hex."""
    digest = hashlib.sha256()
    for path in sorted(stats, key=printable):
        digest.update(f"{printable(path)}\0{stats[path][0]}\0{stats[path][1]}\0".encode())
    return digest.hexdigest()


def label_names(labels: Iterable[str]) -> list[str]:
    """Class names in the order of their numbers, by value if all are integers; "" and -1 are none."""
    names = sorted(set(labels) - {"", "-1"})
    try:
        return sorted(names, key=int)
    except ValueError:
        return names


def _number(label: str, names: list[str]) -> int:
    return names.index(label) if label in names else -1


def holder(path: str) -> str:
    """Name of the folder that holds a file; empty at the top, where that of the input folder says nothing."""
    return _one_line(os.path.basename(os.path.dirname(path)))


def _one_line(label: str) -> str:
    return " ".join(printable(label).split())  # the list of class names has one a line


def scan_folder(root: pathlib.Path, wanted: Callable[[str], bool]) -> Scan:
    """Walks a folder, an absolute path that is no link; `wanted` tells by the path below it which files take part.

    Hidden files and litter are passed over, links to folders or out of this one are rejected.

    Raises:
      InputError: a folder cannot be read.
    """
    scan = Scan({}, [], collections.Counter())

    def fail(error: OSError) -> None:
        raise InputError(f"--input: folder {error.filename!r} cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=fail):
        below = os.path.relpath(folder, root)
        below = "" if below == os.curdir else below
        scan.left_out["hidden files and folders"] += sum(_is_hidden(name) for name in (*folders, *files))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                scan.rejected.append(Rejected(printable(os.path.join(below, name)), FOLDER_LINK))
        for name in files:
            if _is_hidden(name):
                continue
            path = os.path.join(below, name)
            if not wanted(path):
                is_archive = name.lower().endswith(_ARCHIVES)
                scan.left_out["archives, which have to be unpacked first" if is_archive else "other files"] += 1
                continue
            found = _stat(root, path)
            if isinstance(found, str):
                scan.rejected.append(Rejected(printable(path), found))
            else:
                scan.files[path] = found
    return scan


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LITTER


def _stat(root: pathlib.Path, path: str) -> tuple[int, int] | str:
    """(size, mtime_ns) of a file below `root`, which is absolute and no link; or why it cannot be used."""
    full = os.path.join(root, path)
    # What a link points at outside the input would end up in the shards without having been asked for.
    if not _is_below(full if os.path.islink(full) else os.path.dirname(full), str(root)):
        return "link that leaves the input folder"
    try:
        status = os.stat(full)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4096)  # one file after the other lies in the same folder
def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), root]) == root


def _read_labels(
    root: pathlib.Path, labels: str
) -> tuple[list[Item], list[str], dict[str, tuple[int, int]], list[Rejected]]:
    rows = _rows(labels)
    names = label_names(row["label"] for row in rows)
    items: list[Item] = []
    rejected: list[Rejected] = []
    stats: dict[str, tuple[int, int]] = {}
    missing: list[str] = []
    seen: set[str] = set()
    for row in rows:
        if row["split"] not in SPLITS:
            raise InputError(
                f"--labels={labels}: split {row['split']!r} of {printable(row['file'])!r} is none of train, val, test"
            )
        item = Item(
            path=_relative(root, labels, row["file"]),
            mask=_relative(root, labels, row["mask"]) if row["mask"] else "",
            split=SPLITS[row["split"]],
            label=_number(row["label"], names),
            patient=printable(row["patient"]),
            video=printable(row["video"]),
        )
        if item.path in seen:
            raise InputError(f"--labels={labels} lists {item.source!r} more than once")
        seen.add(item.path)
        problem = ""
        for path in filter(None, (item.path, item.mask)):
            if not os.path.lexists(root / path):
                missing.append(printable(path))
                continue
            found = _stat(root, path)
            stats[path] = (0, 0) if isinstance(found, str) else found
            problem = found if isinstance(found, str) else problem
        if problem:
            rejected.append(Rejected(item.source, problem))
        else:
            items.append(item)
    if missing:
        raise InputError(
            f"--labels={labels} names {len(missing)} files that are not below --input={root}, first {missing[0]!r}"
        )
    check_splits(items, "give all frames of a patient the same split")
    return items, names, stats, rejected


def _rows(labels: str) -> list[dict[str, str]]:
    try:
        with pathlib.Path(labels).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            head = file.readline()
            file.seek(0)
            # Excel separates with what the region of the computer does not use in numbers.
            separator = max(",;\t", key=head.count)
            reader = csv.DictReader(file, restval="", delimiter=separator)
            found = [(name or "").strip() for name in reader.fieldnames or []]
            reader.fieldnames = found
            if "file" not in found:
                raise InputError(f"--labels={labels} has no column 'file', only {found}; it may have {list(COLUMNS)}")
            rows = [{name: (row.get(name) or "").strip() for name in COLUMNS} for row in reader]
    except OSError as error:
        raise InputError(f"--labels={labels} is neither 'parent' nor a file: {error.strerror}") from error
    except csv.Error as error:
        raise InputError(f"--labels={labels} is no CSV file: {error}") from error
    if not rows:
        raise InputError(f"--labels={labels} lists no files")
    for row in rows:
        row["label"] = _one_line(row["label"])
    return rows


def _relative(root: pathlib.Path, labels: str, path: str) -> str:
    if "\\" in path and not os.path.lexists(root / path):  # as Windows writes it
        path = path.replace("\\", "/")
    if os.path.isabs(path) and pathlib.Path(path).is_relative_to(root):
        path = os.path.relpath(path, root)
    normal = os.path.normpath(path) if path else ""
    if not normal or os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
        raise InputError(f"--labels={labels}: {printable(path)!r} is not a path below --input")
    return normal


def check_splits(items: Iterable[Item], remedy: str) -> None:
    """Raises InputError if a patient, or a clip of an unknown one, is in two splits; `remedy` says what to do."""
    splits: dict[tuple[str, str], str] = {}
    for item in items:
        kind, name = ("patient", item.patient) if item.patient else ("video", item.video)
        if name and splits.setdefault((kind, name), item.split) != item.split:
            raise InputError(
                f"{kind} {name!r} is in the splits {splits[kind, name]} and {item.split}, and a test on {kind}s seen "
                f"in training says nothing; {remedy}"
            )
