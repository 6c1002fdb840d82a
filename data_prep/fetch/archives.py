"""Archives of public datasets, opened with care: whoever packed them is a stranger.

Opens zip (also zip64), tar, tar.gz, tar.bz2, tar.xz, and single files compressed with gzip, bzip2 or xz. A member that
cannot or must not be unpacked is left out and named; of the rest there is all in the end, or nothing.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.fetch import members
from data_prep.find.files import Rejected
from usfmae_jax.errors import InputError

#: What an archive unpacked to, in the folder it became; hidden, so that nobody takes it for data.
MARKER = ".extracted.json"

_TOOLS = {"RAR": "unrar x", "7z": "7z x", "split zip": "7z x"}
_SUFFIX = re.compile(r"\.(zip|tar(\.(gz|bz2|xz))?|tgz|tbz2?|txz|rar|7z)$", re.IGNORECASE)

_RATIO = 200  # a real archive of images unpacks to a few times its size
_SMALL = 4 << 30  # bytes that are no danger whatever the ratio
_RESERVE = 256 << 20  # bytes that stay free on the disk
_DEPTH = 3  # of archives in archives
_BLOCK = 4096  # bytes that the smallest file takes on a disk
_CHUNK = 1 << 20


@dataclasses.dataclass
class Extracted:
    """What came out of an archive: files and their bytes, and the members that were left out."""

    files: int = 0
    bytes: int = 0
    rejected: list[Rejected] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Budget:
    archive: str
    limit: int  # bytes until it counts as a bomb
    room: int  # bytes on the disk

    def check(self, size: int) -> None:
        """Raises InputError unless so many bytes may still be written."""
        if size > self.limit:
            raise InputError(
                f"{self.archive} would unpack to more than {_RATIO} times its size, as archives do that are made to "
                "fill disks; if you trust it, extract it by hand and build without --download"
            )
        if size > self.room:
            raise InputError(f"{self.archive} unpacks to more than the disk has room for; free some and try again")

    def take(self, size: int) -> None:
        self.check(size)
        self.limit -= size
        self.room -= size


def folder_name(file: str) -> str:
    """Name of the folder that an archive becomes: training_set.tar.gz becomes training_set."""
    name = _SUFFIX.sub("", file)
    return name if name not in ("", file) else f"{file}_files"


def extract(
    archive: pathlib.Path, folder: pathlib.Path, *, nested: bool = False, note: Mapping[str, Any] | None = None
) -> Extracted:
    """Unpacks an archive into a new folder, completely or not at all.

    Left out and named are: absolute names and names that lead out of the folder, links, devices, members with a
    password, damaged ones, and names that are taken or differ from one only in case. Bytes of names that are not
    UTF-8 become %XX. If all lies in one folder of the new folder's name, that one is it. Times are kept, modes and
    owners are not. One call at a time for a folder.

    Args:
      archive: the file; its content decides what it is, not its name.
      folder: where it goes; its parent exists, it does not. A killed run leaves `.NAME.incomplete` beside it, which
        the next one removes.
      nested: also unpack zip and tar files inside, each into a folder beside it, and remove them.
      note: goes into `MARKER` in the folder, beside counts and names.

    Raises:
      InputError: `folder` exists, or the archive is of another kind, damaged, a bomb, or too large for the disk.
      OSError: the disk is full after all.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} is in the way of {archive.name}: move it away, or build without --download")
    temporary = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        limit = max(_SMALL, _RATIO * archive.stat().st_size)
        budget = _Budget(archive.name, limit, shutil.disk_usage(temporary).free - _RESERVE)
        done = _extract(archive, temporary, budget, _DEPTH if nested else 0)
        root = temporary
        if os.listdir(temporary) == [folder.name] and (temporary / folder.name).is_dir():
            root = temporary / folder.name
        about = {"files": done.files, "rejected": [[one.source, one.reason] for one in done.rejected], **(note or {})}
        (root / MARKER).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        root.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def _extract(archive: pathlib.Path, folder: pathlib.Path, budget: _Budget, depth: int) -> Extracted:
    found = members.kind_of_file(archive)
    if found in _TOOLS:
        raise InputError(
            f"{archive.name} is a {found} archive, which this tool does not open: extract it with "
            f"'{_TOOLS[found]} {archive.name}' in the folder where it lies and build without --download"
        )
    if not found:
        raise InputError(f"{archive.name} is no archive: look at what it holds, remove it and fetch it again")
    try:
        with members.reading():
            done = _unpack(members.members(archive, found, budget.check), archive.name, folder, budget)
    except members.DamagedError as error:
        raise InputError(f"{archive.name} is damaged or incomplete ({error}): remove it and fetch it again") from error
    if not done.files:
        why = f"{done.rejected[0].source!r}: {done.rejected[0].reason}" if done.rejected else "it holds no files"
        raise InputError(f"nothing in {archive.name} can be extracted ({why})")
    for path in sorted(path for path in folder.rglob("*") if _SUFFIX.search(path.name)) if depth else ():
        if path.is_file():
            _extract_nested(path, f"{archive.name}/{path.relative_to(folder).as_posix()}", budget, depth, done)
    return done


def _extract_nested(path: pathlib.Path, shown: str, budget: _Budget, depth: int, done: Extracted) -> None:
    inner = path.with_name(folder_name(path.name))
    if inner.exists():
        done.rejected.append(Rejected(shown, f"not unpacked: there is a {inner.name!r} beside it"))
        return
    inner.mkdir()
    try:
        more = _extract(path, inner, budget, depth - 1)
    except InputError as error:
        shutil.rmtree(inner)
        done.rejected.append(Rejected(shown, f"not unpacked: {error}"))
        return
    done.files += more.files - 1
    done.bytes += more.bytes - path.stat().st_size
    done.rejected += [Rejected(shown.removesuffix(path.name) + one.source, one.reason) for one in more.rejected]
    path.unlink()


def _unpack(found: Iterator[members.Member], archive: str, folder: pathlib.Path, budget: _Budget) -> Extracted:
    done = Extracted()
    taken: dict[str, tuple[str, bool]] = {}
    for member in found:
        budget.check(member.size)  # also what is passed over is decompressed
        budget.take(_BLOCK)
        name, problem = _safe_name(member.name)
        if member.kind == "folder" and not problem:
            continue
        if not problem and member.kind not in ("file", "folder"):
            problem = member.kind
        problem = problem or _claim(name, taken) or _write(member, folder / name, budget, done)
        if problem:
            done.rejected.append(Rejected(f"{archive}/{member.name}", problem))
    return done


def _write(member: members.Member, path: pathlib.Path, budget: _Budget, done: Extracted) -> str:
    """Writes a file; returns why it could not be read, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    try:
        with members.reading(), member.open() as source, path.open("xb") as file:
            while chunk := source.read(_CHUNK):
                budget.take(len(chunk))
                written += file.write(chunk)
    except members.DamagedError as error:
        path.unlink(missing_ok=True)
        return f"cannot be read: {error}"
    # Equal archives give equal times, and so the same fingerprint of the input.
    seconds = int(min(max(0, member.seconds), 1 << 32))
    os.utime(path, (seconds, seconds))
    done.files += 1
    done.bytes += written
    return ""


def _safe_name(name: str) -> tuple[str, str]:
    """A name below the folder, with forward slashes, and what is wrong with it."""
    name = name.replace("\\", "/")  # a separator, as Windows writes it
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "", "absolute name"
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        return "", "name that leads out of the folder"
    if not parts or parts[-1] == MARKER:
        return "", "not the name of a file"
    if max(len(part.encode()) for part in parts) > 255 or len(name.encode()) > 2048:
        return "", "name that is too long"
    return "/".join(parts), ""


def _claim(name: str, taken: dict[str, tuple[str, bool]]) -> str:
    """Takes a file's path and its folders; returns why it cannot be had, or nothing.

    Some file systems tell neither case nor the two ways to write é apart: there, one file would replace the other.
    """
    parts = name.split("/")
    for end in range(1, len(parts) + 1):
        path, is_file = "/".join(parts[:end]), end == len(parts)
        key = unicodedata.normalize("NFC", path).casefold()
        before, was_file = taken.get(key, ("", is_file))
        if is_file != was_file:
            return f"a file and a folder are called {before!r}"
        if is_file and before:
            return "second of its name" if before == path else f"differs from {before!r} only in case"
        taken.setdefault(key, (path, is_file))
    return ""
