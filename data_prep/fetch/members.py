"""What is in an archive, member by member, whatever kind of archive it is and whatever is wrong with it."""

import bz2
import calendar
import contextlib
import dataclasses
import errno
import functools
import gzip
import lzma
import os
import pathlib
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from usfmae_jax.errors import InputError

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
_DECOMPRESS: dict[str, Callable[[pathlib.Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_PART = re.compile(r"\.(z\d\d|zip\.\d{3})$", re.IGNORECASE)
_HEADER = 8 << 20  # bytes; tarfile takes a header into memory that is as long as it says
# What the standard library raises on damage.
_ERRORS: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error)
_ERRORS += (EOFError, OSError, ValueError, OverflowError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Member:
    """A file, or something else, in an archive."""

    name: str  # see `_printable`
    size: int  # bytes, as declared
    seconds: float  # of its last change, since 1970
    kind: str  # "file", "folder", or why it is neither
    open: Callable[[], Any]  # its content, of a file


def kind(head: bytes) -> str:
    """What the first 512 bytes of a file say it is.

    Returns "zip", "split zip", "tar", "gzip", "bzip2", "xz", "RAR", "7z" or "".
    """
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return ""
    return "tar"


class DamagedError(Exception):
    """An archive or a member of it cannot be read."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns what is raised for damage into `DamagedError`."""
    try:
        yield
    except InputError:  # a ValueError, like some of the others
        raise
    except _ERRORS as error:
        # bz2 gives no number; a position that cannot be is an invalid argument. Other numbers are the disk's.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DamagedError(error) from error


def kind_of_file(archive: pathlib.Path) -> str:
    """Like `kind`, but sees the last part of a split zip."""
    with archive.open("rb") as file:
        found = kind(file.read(512))
        file.seek(max(0, archive.stat().st_size - (22 + 0xFFFF)))
        tail = file.read()
    if _PART.search(archive.name):
        return "split zip"
    # The end record counts disks. 0xFFFF: the number is in the zip64 record, which zipfile checks itself.
    end = tail.rfind(b"PK\x05\x06")
    if found == "zip" and 0 <= end <= len(tail) - 8 and struct.unpack_from("<H", tail, end + 4)[0] not in (0, 0xFFFF):
        return "split zip"
    return found


def members(archive: pathlib.Path, found: str, check: Callable[[int], None]) -> Iterator[Member]:
    """The members of an archive of this kind; `check` refuses sizes, all at once where they are known."""
    if found == "zip":
        yield from _zip_members(archive, check)
        return
    with _DECOMPRESS[found](archive) if found in _DECOMPRESS else archive.open("rb") as stream:
        is_tar = kind(stream.read(512)) == "tar"
        stream.seek(0)
        if is_tar:
            yield from _tar_members(stream)
        else:
            name = re.sub(r"\.(gz|bz2|xz)$", "", archive.name, flags=re.IGNORECASE)
            yield Member(_printable(os.fsencode(name)), 0, archive.stat().st_mtime, "file", lambda: stream)


def _zip_members(archive: pathlib.Path, check: Callable[[int], None]) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
        if sum(info.compress_size for info in infos) > archive.stat().st_size:
            raise zipfile.BadZipFile("its members overlap")
        check(sum(info.file_size for info in infos))
        for info in infos:
            # What is not marked as UTF-8 was decoded as code page 437, and is UTF-8 all the same more often than not.
            name = _printable(info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"))
            mode = info.external_attr >> 16 if info.create_system == 3 else 0  # 3 = Unix
            what = "file"
            if name.endswith(("/", "\\")):
                what = "folder"
            elif info.flag_bits & 1:
                what = "protected by a password"
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                what = "link, not followed" if stat.S_ISLNK(mode) else "not a regular file"
            try:
                seconds = calendar.timegm(info.date_time)
            except ValueError:  # month 0
                seconds = 0
            yield Member(name, info.file_size, seconds, what, functools.partial(file.open, info))


class _Careful:
    """A stream for tarfile that refuses to fill the memory, and remembers the end of what was read."""

    def __init__(self, stream: IO[bytes]):
        self.seek, self.tell, self._stream, self.last = stream.seek, stream.tell, stream, b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError("a header is longer than any header")
        self.last = self._stream.read(size)
        return self.last


def _tar_members(stream: IO[bytes]) -> Iterator[Member]:
    careful: Any = _Careful(stream)
    with tarfile.open(fileobj=careful, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would remember all
            what = "link, not followed" if info.islnk() or info.issym() else "not a regular file"
            if info.isreg() or info.isdir():
                what = "file" if info.isreg() else "folder"
            name = _printable(info.name.encode("utf-8", "surrogateescape"))
            yield Member(name, info.size, info.mtime, what, functools.partial(tar.extractfile, info))
    if any(careful.last[-512:]):  # tarfile takes a broken header for the end
        raise tarfile.ReadError("a header is broken")


def _printable(raw: bytes) -> str:
    """A name as text: %XX for bytes that are not UTF-8 and for control characters."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in raw)
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"%{ord(found[0]):02X}", text)
