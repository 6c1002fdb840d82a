"""Scans folders, and decides how the names in them are spelled, compared and displayed.

Standard library only, so that finding that nothing is to be done is quick.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import re
import signal
import stat
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from usfmae_jax.errors import InputError, visible

SPLITS = {"": "train", "train": "train", "val": "validation", "validation": "validation", "test": "test"}
FOLDER_LINK = "link to a folder, not followed"
_DEEPEST, TOO_DEEP = 100, "folder in more than 100 others, not looked into"
_NO_VALUE = {"na", "n/a", "#n/a", "<na>", "nan", "null"}  # as written by spreadsheets, R and pandas
_NOBODY = re.compile(
    "|anon(ym(ous|i[sz]ed)?)?(patient)?|deid(entified)?|(patient)?unknown(patient)?|none|null|nan?|notavailable|noname"
    "|unnamed|redacted|removed|xxx+"
)
_LONGEST = 5.0  # seconds for matching a pattern to one path
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z")
_LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # left by archives and file managers: treated as hidden


@dataclasses.dataclass(frozen=True)
class Item:
    """One source file of a dataset; paths are relative to the dataset and spelled as in the file system."""

    path: str
    masks: tuple[str, ...] = ()  # several are joined
    split: str = "train"
    label: int = -1  # -1 = none
    patient: str = ""  # empty = unknown: then only frames of one video are known to belong together
    video: str = ""  # empty = a video of its own
    frame: str = ""  # empty = the path
    spacing: tuple[float, float] = (0.0, 0.0)  # pixel spacing in mm, down and across; 0 = as stated in the file

    @property
    def source(self) -> str:
        """The path as displayed and stored."""
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
      items: an `Item` for every file, in order; patient numbers for phantoms.
      label_names: class names in the order of their numbers.
      rejected: files found so far that cannot be used.
      unmasked: files found so far whose mask cannot be used.
      left_out: number of skipped files, by kind.
      fingerprint: changes when any file used does.
      options: `readers.Options` for the readers.
      mask_kind: how the masks are read, see `masks.read_mask_as`.
      beside: number of masks found beside the images by name.
      splits: official tables of folds by name: rows of (frame, fold, part), part being train, validation or test.
      warnings: sentences for the user.
    """

    items: list[Any]
    label_names: list[str]
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    options: Any = None
    mask_kind: str = "image"
    unmasked: list[Rejected] = dataclasses.field(default_factory=list)
    beside: int = 0
    splits: dict[str, list[tuple[str, str, str]]] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Scan:
    """The content of a folder."""

    files: dict[str, tuple[int, int]]  # files used: relative path -> (size, mtime_ns)
    rejected: list[Rejected]
    left_out: collections.Counter[str]


def printable(path: str) -> str:
    """A path with forward slashes, and with escapes for bytes that are not UTF-8 and for invisible characters."""
    path = path.replace(os.sep, "/")
    return visible(path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace"), one_line=True)


def stated(cell: str) -> str:
    """A table cell without surrounding white space; empty if it stands for a missing value."""
    cell = cell.strip()
    return "" if cell.casefold() in _NO_VALUE else cell


def spacing_of(cell: str) -> tuple[float, float]:
    """Pixel spacing in mm, down and across, from a cell with one or two numbers; zeros (unknown) if it is empty.

    Raises:
      ValueError: the cell holds anything else.
    """
    numbers = [float(word) for word in cell.replace(",", " ").split()]
    if len(numbers) not in (0, 1, 2) or not all(0 < one < math.inf for one in numbers):
        raise ValueError(cell)
    return (numbers[0], numbers[-1]) if numbers else (0.0, 0.0)


def known_patient(name: str) -> str:
    """The name of a patient; empty for a placeholder used for anonymised patients, such as "Anonymous"."""
    letters = "".join(filter(str.isalnum, name.partition("(")[0].casefold()))  # the issuer follows in parentheses
    return "" if _NOBODY.fullmatch(letters) else name


def spelling(name: str) -> str:
    """Normalised file name for comparisons: accents have two encodings, and are not always in UTF-8."""
    data = os.fsencode(name)
    try:
        return unicodedata.normalize("NFC", data.decode())
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def existing(root: pathlib.Path, path: str) -> str:
    """A path below `root` as spelled in the file system; unchanged if no such file exists."""
    if os.path.lexists(root / path):
        return path
    found = ""
    for name in path.split(os.sep):
        full = os.path.join(found, name)
        if not os.path.lexists(root / full):
            folder = str(root / found)
            changed = os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0
            full = os.path.join(found, _names(folder, changed).get(spelling(name), name))
        found = full
    return found


@functools.lru_cache(maxsize=64)
def _names(folder: str, changed: int) -> dict[str, str]:
    return {spelling(name): name for name in os.listdir(folder)} if changed else {}


def fingerprint(stats: dict[str, tuple[int, int]]) -> str:
    """SHA-256 over the paths, sizes and modification times of files, hex."""
    digest = hashlib.sha256()
    for path in sorted(stats, key=printable):
        digest.update(f"{printable(path)}\0{stats[path][0]}\0{stats[path][1]}\0".encode())
    return digest.hexdigest()


def label_names(labels: Iterable[str], where: str) -> list[str]:
    """Sorted class names, by value if all are integers; the index is the class number. "" and "-1" are no class.

    Raises:
      InputError: two names differ only in case; the message includes `where`, which tells how to unify them.
    """
    names = sorted(set(labels) - {"", "-1"})
    spellings: dict[str, str] = {}
    for name in names:
        other = spellings.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(
                f"the classes {other!r} and {name!r} differ in upper and lower case only: are they one? "
                f"Give them one spelling {where}, or names that differ more"
            )
    try:
        return sorted(names, key=int)
    except ValueError:
        return names


def holder(path: str) -> str:
    """Name of the folder that holds a file; empty at the top, since the input folder's name is no label."""
    return one_line(os.path.basename(os.path.dirname(path)))


def one_line(label: str) -> str:
    """A class name on one line, as stored in the list of names."""
    return unicodedata.normalize("NFC", printable(" ".join(label.split())))


@contextlib.contextmanager
def searching(pattern: str) -> Iterator[Callable[[str], re.Match[str] | None]]:
    """Yields `re.search` for a user's pattern, with a time limit, since some patterns could take forever.

    In the main thread, the function raises InputError after a few seconds on one path; elsewhere there is no limit.
    """
    compiled, at = re.compile(pattern), [""]

    def late(*_: Any) -> None:
        raise InputError(
            f"the pattern {pattern!r} takes too long for {printable(at[0])!r}: write it without repetitions in "
            "repetitions, such as (a+)+"
        )

    def search(path: str) -> re.Match[str] | None:
        at[0] = path
        signal.setitimer(signal.ITIMER_REAL, _LONGEST)
        return compiled.search(path)

    if threading.current_thread() is not threading.main_thread():
        yield compiled.search
        return
    before = signal.signal(signal.SIGALRM, late)
    try:
        yield search
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def scan_folder(root: pathlib.Path, wanted: Callable[[str], bool]) -> Scan:
    """Scans a folder, an absolute path without links; `wanted` selects files by their path relative to it.

    Hidden files and litter are skipped; links to folders and links that lead out of the folder are rejected.

    Raises:
      InputError: a folder cannot be read.
    """
    scan = Scan({}, [], collections.Counter())

    def fail(error: OSError) -> None:
        raise InputError(f"--input: folder {error.filename!r} cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=fail):
        below = os.path.relpath(folder, root)
        below = "" if below == os.curdir else below
        if below.count(os.sep) + 1 >= _DEEPEST:  # the standard library walks and removes recursively
            scan.rejected += [Rejected(printable(os.path.join(below, name)), TOO_DEEP) for name in sorted(folders)]
            folders.clear()
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
            found = check_file(root, path)
            if isinstance(found, str):
                scan.rejected.append(Rejected(printable(path), found))
            else:
                scan.files[path] = found
    return scan


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LITTER


def check_file(root: pathlib.Path, path: str) -> tuple[int, int] | str:
    """(size, mtime_ns) of a file below `root`, an absolute path without links; or why it cannot be used."""
    full = os.path.join(root, path)
    # The target of a link out of the input folder would end up in the shards although nobody asked for it.
    if not _is_below(full if os.path.islink(full) else os.path.dirname(full), str(root)):
        return "link that leaves the input folder"
    try:
        status = os.stat(full)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4096)  # successive files are mostly in the same folder
def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), root]) == root


def check_splits(items: Iterable[Item], remedy: str) -> None:
    """Raises InputError if a patient, or a video of an unknown one, is in two splits; `remedy` says what to do."""
    splits: dict[tuple[str, str], str] = {}
    for item in items:
        kind, name = ("patient", item.patient) if item.patient else ("video", item.video)
        if name and splits.setdefault((kind, name), item.split) != item.split:
            raise InputError(
                f"{kind} {name!r} is in the splits {splits[kind, name]} and {item.split}, and a test on {kind}s seen "
                f"in training says nothing; {remedy}"
            )
