"""A folder: which files there are, and how names in it are spelled, told apart and shown.

Standard library only, so that finding out that there is nothing to do takes no time.
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
_NO_VALUE = {"na", "n/a", "#n/a", "<na>", "nan", "null"}  # as spreadsheets, R and pandas write it
_NOBODY = re.compile(
    "|anon(ym(ous|i[sz]ed)?)?(patient)?|deid(entified)?|(patient)?unknown(patient)?|none|null|nan?|notavailable|noname"
    "|unnamed|redacted|removed|xxx+"
)
_LONGEST = 5.0  # seconds for a pattern and a path
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z")
_LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # of archives and file managers: as good as hidden


@dataclasses.dataclass(frozen=True)
class Item:
    """One source file of a dataset; paths are relative to the dataset and spelled as the file system does."""

    path: str
    masks: tuple[str, ...] = ()  # several are joined
    split: str = "train"
    label: int = -1  # -1 = none
    patient: str = ""  # empty = unknown: the video is then all that is known to belong together
    video: str = ""  # empty = its own
    frame: str = ""  # empty = the path
    spacing: tuple[float, float] = (0.0, 0.0)  # mm from pixel to pixel, down and across; 0 = as the file says

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
      items: `Item` for every file, in order.
      label_names: class names in the order of their numbers.
      rejected: files that cannot be used, found so far.
      unmasked: files whose mask cannot be used, found so far.
      left_out: kinds of files that were passed over, and how many.
      fingerprint: changes when a file that takes part does.
      options: of the readers, `readers.Options`.
      mask_kind: how the masks are read, see `masks.read_mask_as`.
      beside: masks that were found beside the images by their names.
      splits: official tables of folds by name: rows of (frame, fold, part), part being train, validation or test.
      warnings: sentences for the person.
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
    """What a folder holds."""

    files: dict[str, tuple[int, int]]  # that take part: path below it, (size, mtime_ns)
    rejected: list[Rejected]
    left_out: collections.Counter[str]


def printable(path: str) -> str:
    """A path with forward slashes, and escapes for bytes that are not UTF-8 and characters that are not seen."""
    path = path.replace(os.sep, "/")
    return visible(path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace"), one_line=True)


def stated(cell: str) -> str:
    """A cell of a table without blanks around it; empty if it says that there is no value."""
    cell = cell.strip()
    return "" if cell.casefold() in _NO_VALUE else cell


def spacing_of(cell: str) -> tuple[float, float]:
    """Mm from pixel to pixel, down and across, from a cell with one number for both or with two; empty is not known.

    Raises:
      ValueError: it holds something else.
    """
    numbers = [float(word) for word in cell.replace(",", " ").split()]
    if len(numbers) not in (0, 1, 2) or not all(0 < one < math.inf for one in numbers):
        raise ValueError(cell)
    return (numbers[0], numbers[-1]) if numbers else (0.0, 0.0)


def known_patient(name: str) -> str:
    """The name of a patient; empty for one that stands for all whose name was taken away, such as "Anonymous"."""
    letters = "".join(filter(str.isalnum, name.partition("(")[0].casefold()))  # behind it: who issued it
    return "" if _NOBODY.fullmatch(letters) else name


def spelling(name: str) -> str:
    """What names of files are compared by: accents are written in two ways, and not always in UTF-8."""
    data = os.fsencode(name)
    try:
        return unicodedata.normalize("NFC", data.decode())
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def existing(root: pathlib.Path, path: str) -> str:
    """A path below `root` as the file system spells it; as it is if nothing there is called so."""
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
    """SHA-256 over paths, sizes and times of change of files, hex."""
    digest = hashlib.sha256()
    for path in sorted(stats, key=printable):
        digest.update(f"{printable(path)}\0{stats[path][0]}\0{stats[path][1]}\0".encode())
    return digest.hexdigest()


def label_names(labels: Iterable[str], where: str) -> list[str]:
    """Class names in the order of their numbers, by value if all are integers; "" and -1 are none.

    Raises:
      InputError: two differ in case only; the message says `where` they can be given one spelling.
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
    """Name of the folder that holds a file; empty at the top, where that of the input folder says nothing."""
    return one_line(os.path.basename(os.path.dirname(path)))


def one_line(label: str) -> str:
    """A class name as the list of names holds it, which has one a line."""
    return unicodedata.normalize("NFC", printable(" ".join(label.split())))


@contextlib.contextmanager
def searching(pattern: str) -> Iterator[Callable[[str], re.Match[str] | None]]:
    """Yields `re.search` of a pattern that somebody wrote, which for some paths could take for ever.

    What it yields raises InputError after a few seconds with one path, in the main thread, where it can be interrupted.
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
        if below.count(os.sep) + 1 >= _DEEPEST:  # the standard library walks, and removes, by recursion
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
