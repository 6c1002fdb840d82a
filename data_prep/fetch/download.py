"""Downloads public datasets into a folder: resumed, retried, checked and unpacked, each file completely or not at all.

A file is written to NAME.part, with its version in NAME.part.json, and renamed once it is complete and its checksum is
right. Whatever interrupts a download, running the same command again resumes it.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Iterable
from typing import Any

import requests
import tqdm
import urllib3

from data_prep import locks
from data_prep.fetch import archives
from data_prep.find.files import Rejected
from usfmae_jax.errors import InputError
from usfmae_jax.files import parse

_WAITS = (1, 2, 4, 8, 16, 32, 60)  # seconds before each retry, starting over whenever data arrive
_LONGEST_WAIT = 300  # seconds; if a server asks for more, the download stops
_TIMEOUTS = (15, 60)  # seconds: to connect, and between bytes
_REDIRECTS = 10
_CHUNK = 1 << 18
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "usfmae_jax data_prep"}
_pause = time.sleep


class _TryAgainError(Exception):
    """A failure that a retry may cure, and the seconds that the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


def fetch_all(downloads: Iterable[Any], folder: pathlib.Path) -> list[dict[str, Any]]:
    """Fetches the files of a dataset into a folder and unpacks them there; existing files are kept.

    Args:
      downloads: objects with `url`, `file` (a plain name), `sha256` and `md5` (hexadecimal, or empty), `bytes` (or 0)
        and `extract`: False only keeps the file, True also unpacks it into a folder named after it, "nested" also
        unpacks archives inside. Once unpacked, an archive may be removed; it is not fetched again.
      folder: created if it does not exist.

    Returns:
      For every file {"file": name, "sha256": of the file, "bytes": its size}.

    Raises:
      InputError: a file cannot be fetched or unpacked, or another process is downloading into the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locks.hold(folder, f"another download into {folder} is at work; wait for it, or choose another"):
        return [_fetch_and_unpack(download, folder) for download in downloads]


def rejected_members(folder: pathlib.Path) -> list[Rejected]:
    """The members left out of the archives that `fetch_all` unpacked in a folder."""
    markers = [_read_json(path) for path in sorted(folder.glob(f"*/{archives.MARKER}"))]
    return [Rejected(source, reason) for marker in markers for source, reason in marker.get("rejected", ())]


def _fetch_and_unpack(download: Any, folder: pathlib.Path) -> dict[str, Any]:
    name, expected = download.file, {"sha256": download.sha256.lower(), "md5": download.md5.lower()}
    if not name or name != pathlib.PurePath(name).name or name.startswith("."):
        raise InputError(f"{name!r} cannot be the name of a download: give one without folders")
    target, unpacked = folder / name, folder / archives.folder_name(name)
    if download.extract and os.path.lexists(unpacked):
        marker = _read_json(unpacked / archives.MARKER)
        if not {"file", "sha256", "md5", "bytes"} <= marker.keys():
            raise InputError(f"{unpacked} was not made by --download: move it away, or build without --download")
        if any(digest not in ("", marker[key]) for key, digest in expected.items()):
            raise InputError(f"{unpacked} comes from another version of {name}: remove it to have the new one fetched")
        return {key: marker[key] for key in ("file", "sha256", "bytes")}
    digests = _fetch(download.url, target, expected, download.bytes)
    source = {"file": name, "sha256": digests["sha256"], "bytes": target.stat().st_size}
    if download.extract:
        nested = download.extract == "nested"
        done = archives.extract(target, unpacked, nested=nested, note=source | {"md5": digests["md5"]})
        if done.rejected:
            first = f"{done.rejected[0].source!r} ({done.rejected[0].reason})"
            print(f"{name}: {len(done.rejected)} members were left out, first {first}", file=sys.stderr)
    return source


def _fetch(url: str, target: pathlib.Path, expected: dict[str, str], size: int) -> dict[str, str]:
    """Fetches a file unless it exists; returns its digests."""
    if os.path.lexists(target):
        digests, problem = _check(target, expected, size)
        if problem:
            raise InputError(f"{target} {problem}: move it away to have it fetched again, or build without --download")
        return digests
    part, note = _parts(target)
    _download(url, target, size)
    digests, problem = _check(part, expected, size)
    note.unlink(missing_ok=True)
    if problem:
        bad = part.replace(target.with_name(target.name + ".bad"))
        raise InputError(
            f"{url} {problem}: the file was changed there or on its way; it is kept as {bad}; try again, or look at "
            "the dataset's page for a new version"
        )
    with part.open("rb") as file:
        os.fsync(file.fileno())  # after a power cut, a file with its final name is complete
    part.replace(target)
    return digests


def _check(path: pathlib.Path, expected: dict[str, str], size: int) -> tuple[dict[str, str], str]:
    """Digests of a file, and what is wrong with it ("" = nothing)."""
    if not path.is_file():
        return {}, "is not a file"
    if size and path.stat().st_size != size:
        return {}, f"has {path.stat().st_size:,} bytes, expected {size:,}"
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for digest in digests.values():
                digest.update(chunk)
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    wrong = [name for name, digest in expected.items() if digest not in ("", found[name])]
    return found, f"has {wrong[0]} {found[wrong[0]]}, expected {expected[wrong[0]]}" if wrong else ""


def _download(url: str, target: pathlib.Path, size: int) -> None:
    """Downloads to the .part file of a target, retrying as long as data keep arriving."""
    part, _ = _parts(target)
    failures, furthest = 0, 0
    with requests.Session() as session, tqdm.tqdm(desc=target.name, unit="B", unit_scale=True) as bar:
        session.headers.update(_HEADERS)
        session.max_redirects = _REDIRECTS
        if url.lower().startswith("https:"):
            session.adapters.pop("http://")  # where anyone could change the file in transit
        while True:
            try:
                return _try(session, url, target, size, bar)
            except (_TryAgainError, requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError) as error:
                reason = _reason(error, url)
                there = part.stat().st_size if part.exists() else 0
                failures = 1 if there > furthest else failures + 1
                furthest = max(furthest, there)
                if failures > len(_WAITS):
                    raise InputError(
                        f"{url} cannot be fetched ({reason}); what has arrived is kept: run the same command again "
                        "later"
                    ) from error
                _pause(max(getattr(error, "wait", 0), _WAITS[failures - 1]))


def _try(session: requests.Session, url: str, target: pathlib.Path, size: int, bar: tqdm.tqdm) -> None:
    """Starts the .part file, or resumes one if the server confirms that the version is the same."""
    part, note = _parts(target)
    before: dict[str, Any] = {"url": "", "version": "", "bytes": 0} | _read_json(note)
    start = part.stat().st_size if part.exists() and before["url"] == url and before["version"] else 0
    if start and start == before["bytes"]:
        return
    # If the file has changed, the server sends all of it.
    asked = {"Range": f"bytes={start}-", "If-Range": before["version"]} if start else {}
    with session.get(url, headers=asked, stream=True, timeout=_TIMEOUTS) as response:
        first, total = _extent(response)
        version = _version(response.headers)
        same = (first, version) == (start, before["version"]) and before["bytes"] in (0, total)
        if response.status_code == 416 or (response.status_code == 206 and not (start and same)):
            part.unlink(missing_ok=True)
            raise _TryAgainError("the server sent another part than asked for")
        _check_status(response, url, target)
        if size and total not in (0, size):
            raise InputError(
                f"{url} offers {total:,} bytes, expected {size:,}: the file was changed there; look at the dataset's "
                "page for a new version"
            )
        _check_room(target, (total or size) - first)
        chunks = response.raw.stream(_CHUNK, decode_content=False)
        chunk = next(chunks, b"")
        if not first:
            _check_content(chunk, response, url, target)
        with part.open("ab" if first else "wb") as file:
            if not first:  # written once the file is empty, so that bytes of another version never have this note
                note.write_text(json.dumps({"url": url, "version": version, "bytes": total}) + "\n")
            bar.reset(total=total or size or None)
            bar.initial = bar.n = first
            while chunk:
                bar.update(file.write(chunk))
                chunk = next(chunks, b"")
    if part.stat().st_size < (total or size):
        raise _TryAgainError("the connection ended early")


def _reason(error: Exception, url: str) -> str:
    """Why an attempt failed, in short; raises InputError if a retry would fail too."""
    # requests wraps errors of urllib3: "HTTPSConnection(...): Failed to resolve 'host' (...)". The end is readable.
    inner = getattr(error.args[0], "reason", None) if error.args else None
    text = str(inner or error).split(": ", 1)[-1][:200]
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        raise InputError(f"the server's certificate is not trusted ({error}); {url} is not fetched") from error
    if "Failed to resolve" in str(error):  # no network, or no such host: waiting rarely helps
        raise InputError(f"the address cannot be reached ({text}); is this machine on line?") from error
    if isinstance(error, requests.TooManyRedirects):
        raise InputError(f"{url} leads from one address to the next, more than {_REDIRECTS} times; it is not fetched")
    if isinstance(error, requests.exceptions.InvalidSchema):
        raise InputError(
            f"{url} leads to an address that is not fetched ({error}): only http and https are followed, and never "
            "from https to http, where anyone may change the file"
        ) from error
    if isinstance(error, requests.RequestException) and not isinstance(
        error, requests.ConnectionError | requests.Timeout
    ):
        raise InputError(f"the address cannot be used: {error}") from error
    return "time-out" if isinstance(error, requests.Timeout) or "timed out" in str(error) else text


def _check_status(response: requests.Response, url: str, target: pathlib.Path) -> None:
    status, says = response.status_code, f"{response.status_code} {response.reason}".strip()
    if status in (200, 206):
        return
    if status in (408, 425, 429) or status >= 500:
        wait = 0.0
        with contextlib.suppress(urllib3.exceptions.InvalidHeader):
            wait = urllib3.Retry().parse_retry_after(response.headers.get("Retry-After", ""))
        if wait > _LONGEST_WAIT:
            raise InputError(
                f"{url} is busy ({says}) and asks to wait {wait / 60:,.0f} minutes: run the same command again then"
            )
        raise _TryAgainError(says, wait)
    raise InputError(
        f"{url} answers {says}: open the dataset's page in a browser, download the file there (it may want an account) "
        f"and save it as {target}"
    )


def _check_content(head: bytes, response: requests.Response, url: str, target: pathlib.Path) -> None:
    """Refuses a web page sent instead of the file: a log-in, a consent form or an error page."""
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_page = start.startswith((b"<!doctype html", b"<html")) or (
        "text/html" in response.headers.get("Content-Type", "") and not archives.kind(head[:512])
    )
    if is_page and not target.name.lower().endswith((".html", ".htm")):
        raise InputError(
            f"{url} gives a web page instead of the file, most likely a log-in: open it in a browser, download the "
            f"file there and save it as {target}"
        )
    if not head:
        raise _TryAgainError("the server sent nothing")


def _check_room(target: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise InputError(
            f"{target.name} needs {size / 1e9:,.1f} GB more in {target.parent}, where {free / 1e9:,.1f} GB are free: "
            "free some, or choose another --input"
        )


def _extent(response: requests.Response) -> tuple[int, int]:
    """First byte sent (-1 if a partial response does not state it) and size of the whole file (0 if not stated)."""
    if response.status_code != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else 0
    match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (int(match[1]), 0 if match[2] == "*" else int(match[2])) if match else (-1, 0)


def _version(headers: Any) -> str:
    """The validator for `If-Range`: the ETag unless it is weak, else Last-Modified."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _parts(target: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = parse(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
