"""Unpacks archives of public datasets with care, since they come from untrusted sources.

Opens zip (also zip64), tar, tar.gz, tar.bz2, tar.xz, and single files compressed with gzip, bzip2 or xz. A member that
cannot or must not be unpacked is left out and reported; in the end, either all others are unpacked or none.
"""

import bz2
import calendar
import contextlib
import dataclasses
import errno
import functools
import gzip
import json
import lzma
import os
import pathlib
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from data_prep.find.files import Rejected
from usfmae_jax.errors import InputError

#: Describes the content of an unpacked archive, in its folder; hidden, so that it is not taken for data.
MARKER = ".extracted.json"

_MAGIC = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",  # without members
    b"PK\x07\x08": "split zip",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"Rar!\x1a\x07": "RAR",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
_TOOLS = {"RAR": "unrar x", "7z": "7z x", "split zip": "7z x"}
_DECOMPRESS: dict[str, Callable[[pathlib.Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_SUFFIX = re.compile(r"\.(zip|tar(\.(gz|bz2|xz))?|tgz|tbz2?|txz|rar|7z)$", re.IGNORECASE)
_PART = re.compile(r"\.(z\d\d|zip\.\d{3})$", re.IGNORECASE)
# What the standard library raises for damaged archives.
_ERRORS: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error)
_ERRORS += (EOFError, OSError, ValueError, OverflowError, NotImplementedError)

_RATIO = 200  # a genuine archive of images unpacks to a few times its size
_SMALL = 4 << 30  # bytes that are harmless whatever the ratio
_RESERVE = 256 << 20  # bytes left free on the disk
_HEADER = 8 << 20  # bytes; tarfile reads a header into memory whatever length it declares
_DEPTH = 3  # levels of archives within archives
_FOLDERS = 32  # depth of a file; trees that are far deeper cannot be walked or removed
_NAMES = 96 << 20  # characters of all names together, which are kept in memory
_BLOCK = 4096  # bytes that the smallest file takes on a disk
_CHUNK = 1 << 20

#: Name, seconds since 1970, why it is not unpacked ("" = it is), and a function that opens its content.
_Member = tuple[str, float, str, Callable[[], Any]]


@dataclasses.dataclass
class Extracted:
    """What was unpacked from an archive: number of files, their bytes, and the members left out."""

    files: int = 0
    bytes: int = 0
    rejected: list[Rejected] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Budget:
    archive: str
    limit: int  # bytes until it counts as a bomb
    room: int  # bytes on the disk
    names: int = _NAMES  # characters

    def take(self, size: int, declared: int = 0) -> None:
        """Uses up `size` bytes; raises InputError if they and the `declared` ones exceed the limits."""
        if size + declared > self.limit:
            raise InputError(
                f"{self.archive} would unpack to more than {_RATIO} times its size, as archives do that are made to "
                "fill disks; if you trust it, extract it by hand and build without --download"
            )
        if size + declared > self.room:
            raise InputError(f"{self.archive} unpacks to more than the disk has room for; free some and try again")
        self.limit -= size
        self.room -= size

    def take_name(self, name: str) -> None:
        """Uses up the characters of a name; raises InputError if there are too many."""
        self.names -= len(name)
        if self.names < 0:
            raise InputError(
                f"{self.archive} has names of more than {_NAMES >> 20} million letters, which no data need; if you "
                "trust it, extract it by hand and build without --download"
            )


class _DamagedError(Exception):
    """An archive, or one of its members, cannot be read."""


def folder_name(file: str) -> str:
    """Name of the folder that an archive is unpacked into: training_set for training_set.tar.gz."""
    name = _SUFFIX.sub("", file)
    return name if name not in ("", file) else f"{file}_files"


def kind(head: bytes) -> str:
    """The kind of archive, from the first 512 bytes of a file: a value of `_MAGIC`, "tar" or "" for none."""
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return ""
    return "tar"


def extract(
    archive: pathlib.Path, folder: pathlib.Path, *, nested: bool = False, note: Mapping[str, Any] | None = None
) -> Extracted:
    """Unpacks an archive into a new folder, completely or not at all.

    Left out and reported are absolute names, names that lead out of the folder, links, devices, members with a
    password, damaged members, and names already taken, even if in another case. In names that are not UTF-8, non-ASCII
    bytes are written as %XX. If the archive holds only a folder with the name of the new one, its content is moved up.
    Times are kept, modes and owners are not. Only one call at a time may unpack into a folder.

    Args:
      archive: the file; its kind is recognised by content, not by name.
      folder: the target, which must not exist, while its parent must. A killed run leaves `.NAME.incomplete` beside
        it, which the next one removes.
      nested: also unpacks archives inside, each into a folder beside it, and removes them.
      note: stored in `MARKER` in the folder, with counts and rejected members.

    Raises:
      InputError: `folder` exists, or the archive is of another kind, damaged, a bomb, or too large for the disk.
      OSError: the disk fills up nevertheless.
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
    """Unpacks an archive, and archives in it down to `depth` levels."""
    found = _kind_of_file(archive)
    if found in _TOOLS:
        raise InputError(
            f"{archive.name} is a {found} archive, which this tool does not open: extract it with "
            f"'{_TOOLS[found]} {archive.name}' in the folder where it lies and build without --download"
        )
    if not found:
        raise InputError(f"{archive.name} is no archive: look at what it holds, remove it and fetch it again")
    done, taken = Extracted(), dict[str, tuple[str, bool]]()
    try:
        with _reading():
            for name, seconds, problem, open_ in _members(archive, found, budget):
                budget.take_name(name)
                safe, unsafe = _safe_name(name)
                problem = unsafe or problem or _claim(safe, taken, budget)
                problem = problem or _write(open_, seconds, folder / safe, budget, done)
                if problem:
                    done.rejected.append(Rejected(f"{archive.name}/{name}", problem))
    except _DamagedError as error:
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


def _write(open_: Callable[[], Any], seconds: float, path: pathlib.Path, budget: _Budget, done: Extracted) -> str:
    """Writes a member to a file; returns why it could not be read, or ""."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _reading(), open_() as source, path.open("xb") as file:
            while chunk := source.read(_CHUNK):
                budget.take(len(chunk))
                file.write(chunk)
    except _DamagedError as error:
        path.unlink(missing_ok=True)
        return f"cannot be read: {error}"
    done.files += 1
    done.bytes += path.stat().st_size
    # The same archive always gives the same times, and so the same fingerprint of the input.
    os.utime(path, (int(min(max(0, seconds), 1 << 32)),) * 2)
    return ""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Converts the errors raised for damaged archives to `_DamagedError`."""
    try:
        yield
    except InputError:  # a ValueError, like some of the others
        raise
    except _ERRORS as error:
        # bz2 sets no errno, and an impossible position is EINVAL. Any other errno comes from the disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise _DamagedError(error) from error


def _kind_of_file(archive: pathlib.Path) -> str:
    """Like `kind`, but also recognises the parts of a split zip."""
    with archive.open("rb") as file:
        found = kind(file.read(512))
        file.seek(max(0, archive.stat().st_size - (22 + 0xFFFF)))
        tail = file.read()
    # The end record holds the disk number; 0xFFFF means it is in the zip64 record, which zipfile checks itself.
    end = tail.rfind(b"PK\x05\x06")
    disks = struct.unpack_from("<H", tail, end + 4)[0] if 0 <= end <= len(tail) - 8 else 0
    return "split zip" if _PART.search(archive.name) or (found == "zip" and disks not in (0, 0xFFFF)) else found


def _members(archive: pathlib.Path, found: str, budget: _Budget) -> Iterator[_Member]:
    """The members of an archive except folders; declared sizes count against the budget at once."""
    if found == "zip":
        yield from _zip_members(archive, budget)
        return
    with _DECOMPRESS[found](archive) if found in _DECOMPRESS else archive.open("rb") as stream:
        is_tar = kind(stream.read(512)) == "tar"
        stream.seek(0)
        if is_tar:
            yield from _tar_members(stream, budget)
        else:
            name = re.sub(r"\.(gz|bz2|xz)$", "", archive.name, flags=re.IGNORECASE)
            yield _printable(os.fsencode(name)), archive.stat().st_mtime, "", lambda: stream


def _zip_members(archive: pathlib.Path, budget: _Budget) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
        if sum(info.compress_size for info in infos) > archive.stat().st_size:
            raise zipfile.BadZipFile("its members overlap")
        budget.take(_BLOCK * len(infos), sum(info.file_size for info in infos))
        for info in infos:
            # zipfile decodes names not marked as UTF-8 as code page 437, but most of them are UTF-8 all the same.
            name = _printable(info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"))
            if name.endswith(("/", "\\")):
                continue
            kind_ = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0  # 3 = Unix
            problem = "protected by a password" if info.flag_bits & 1 else ""
            if kind_ not in (0, stat.S_IFREG):
                problem = "link, not followed" if kind_ == stat.S_IFLNK else "not a regular file"
            try:
                seconds = calendar.timegm(info.date_time)
            except ValueError:  # month 0
                seconds = 0
            yield name, seconds, problem, functools.partial(file.open, info)


class _Careful:
    """A stream for tarfile that refuses reads that would fill the memory, and remembers the last block read."""

    def __init__(self, stream: IO[bytes]):
        self.seek, self.tell, self._stream, self.last = stream.seek, stream.tell, stream, b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError("a header is longer than any header")
        self.last = self._stream.read(size)
        return self.last


def _tar_members(stream: IO[bytes], budget: _Budget) -> Iterator[_Member]:
    careful: Any = _Careful(stream)
    with tarfile.open(fileobj=careful, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            budget.take(_BLOCK, info.size)  # skipped members are decompressed too
            if info.isdir():
                continue
            problem = "link, not followed" if info.islnk() or info.issym() else "not a regular file"
            name = _printable(info.name.encode("utf-8", "surrogateescape"))
            yield name, info.mtime, "" if info.isreg() else problem, functools.partial(tar.extractfile, info)
    if any(careful.last[-512:]):  # tarfile treats a broken header as the end
        raise tarfile.ReadError("a header is broken")


def _printable(raw: bytes) -> str:
    """A name as text: %XX for bytes that are not UTF-8 and for control characters."""
    try:
        text, odd = raw.decode(), r"[\x00-\x1f\x7f]"
    except UnicodeDecodeError:
        text, odd = raw.decode("latin-1"), r"[\x00-\x1f\x7f-\xff]"
    return re.sub(odd, lambda found: f"%{ord(found[0]):02X}", text)


def _safe_name(name: str) -> tuple[str, str]:
    """A relative name with forward slashes, and ""; or "" and what is wrong with the name."""
    name = name.replace("\\", "/")  # the separator of Windows
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "", "absolute name"
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        return "", "name that leads out of the folder"
    if not parts or parts[-1] == MARKER:
        return "", "not the name of a file"
    if max(len(part.encode()) for part in parts) > 255 or len(name.encode()) > 2048:
        return "", "name that is too long"
    if len(parts) > _FOLDERS:
        return "", f"inside of more than {_FOLDERS - 1} folders"
    return "/".join(parts), ""


def _claim(name: str, taken: dict[str, tuple[str, bool]], budget: _Budget) -> str:
    """Claims the path of a file and its folders, which take up space too; returns why it cannot be used, or "".

    Some file systems ignore case or do not distinguish the two encodings of é, so that one file would replace another.
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
        if key not in taken:
            taken[key] = path, is_file
            budget.take_name(path)
            budget.take(0 if is_file else _BLOCK)
    return ""
