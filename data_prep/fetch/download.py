"""Public datasets from the web into a folder: resumed, retried, checked and unpacked, each file whole or not at all.

A file arrives as NAME.part, with what tells its version in NAME.part.json, and gets its name when it is complete and
its checksum is right. Whatever stops a download, the same command again goes on where it stopped.
"""

import contextlib
import email.utils
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

# TensorFlow Datasets brings requests: certificates, proxies and time-outs are taken care of.
import requests
import tqdm
import urllib3

from data_prep import locks
from data_prep.fetch import archives, members
from data_prep.find.files import Rejected
from usfmae_jax.errors import InputError

_WAITS = (1, 2, 4, 8, 16, 32, 60)  # seconds before the next try, as long as nothing arrives
_LONGEST_WAIT = 300  # seconds; a server that asks for more is left alone
_TIMEOUTS = (15, 60)  # seconds: to connect, and without a byte
_REDIRECTS = 10
_CHUNK = 1 << 18
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "usfmae_jax data_prep"}
_pause = time.sleep


class _TryAgainError(Exception):
    """What went wrong that may go right the next time, and how many seconds the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


def fetch_all(downloads: Iterable[Any], folder: pathlib.Path) -> list[dict[str, Any]]:
    """Fetches the files of a dataset into a folder and unpacks them there; what is there already is kept.

    Args:
      downloads: objects with `url`, `file` (a plain name), `sha256` and `md5` (in hexadecimal, or empty), `bytes` (or
        0) and `extract`: False keeps the file as it is, True also unpacks it into a folder that is named after it,
        "nested" also unpacks archives inside. An unpacked archive may be removed; it is not fetched again.
      folder: is made if it does not exist.

    Returns:
      For every file {"file": name, "sha256": of the file, "bytes": its size}.

    Raises:
      InputError: something cannot be fetched or unpacked, or another process is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locks.hold(folder, f"another download into {folder} is at work; wait for it, or choose another"):
        return [_fetch_one(download, folder) for download in downloads]


def fetch(url: str, target: pathlib.Path, *, sha256: str = "", md5: str = "", size: int = 0) -> pathlib.Path:
    """Fetches one file; one that is there already with the right checksum is kept.

    Args:
      url: http or https.
      target: of the file; its folder is made if it does not exist.
      sha256: of the file in hexadecimal, if it is known.
      md5: likewise.
      size: of the file in bytes, if it is known.

    Returns:
      `target`.

    Raises:
      InputError: it cannot be fetched, is another file than expected, or another process is at work in the folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locks.hold(target.parent, f"another download into {target.parent} is at work; wait for it, or choose another"):
        _fetch(url, target, sha256.lower(), md5.lower(), size)
    return target


def rejected_members(folder: pathlib.Path) -> list[Rejected]:
    """The members that were left out of all archives that `fetch_all` unpacked in a folder."""
    markers = [_read_json(path) for path in sorted(folder.glob(f"*/{archives.MARKER}"))]
    return [Rejected(source, reason) for marker in markers for source, reason in marker.get("rejected", ())]


def _fetch_one(download: Any, folder: pathlib.Path) -> dict[str, Any]:
    name, sha256, md5 = download.file, download.sha256.lower(), download.md5.lower()
    if not name or name != pathlib.PurePath(name).name or name.startswith("."):
        raise InputError(f"{name!r} cannot be the name of a download: give one without folders")
    target, unpacked = folder / name, folder / archives.folder_name(name)
    if download.extract and os.path.lexists(unpacked):
        marker = _read_json(unpacked / archives.MARKER)
        if not {"file", "sha256", "md5", "bytes"} <= marker.keys():
            raise InputError(f"{unpacked} was not made by --download: move it away, or build without --download")
        if sha256 not in ("", marker["sha256"]) or md5 not in ("", marker["md5"]):
            raise InputError(f"{unpacked} comes from another version of {name}: remove it to have the new one fetched")
        return {key: marker[key] for key in ("file", "sha256", "bytes")}
    digests = _fetch(download.url, target, sha256, md5, download.bytes)
    source = {"file": name, "sha256": digests["sha256"], "bytes": target.stat().st_size}
    if download.extract:
        done = archives.extract(
            target, unpacked, nested=download.extract == "nested", note=source | {"md5": digests["md5"]}
        )
        if done.rejected:
            first = done.rejected[0]
            print(
                f"{name}: {len(done.rejected)} members were left out, first {first.source!r} ({first.reason})",
                file=sys.stderr,
            )
    return source


def _fetch(url: str, target: pathlib.Path, sha256: str, md5: str, size: int) -> dict[str, str]:
    """Does what `fetch` says; returns the file's digests."""
    if os.path.lexists(target):
        digests, problem = _check(target, sha256, md5, size)
        if problem:
            raise InputError(f"{target} {problem}: move it away to have it fetched again, or build without --download")
        return digests
    part, note = _parts(target)
    _download(url, target, size)
    digests, problem = _check(part, sha256, md5, size)
    note.unlink(missing_ok=True)
    if problem:
        bad = part.replace(target.with_name(target.name + ".bad"))
        raise InputError(
            f"{url} {problem}: the file was changed there or on its way; it is kept as {bad}; try again, or look at "
            "the dataset's page for a new version"
        )
    with part.open("rb") as file:
        os.fsync(file.fileno())  # a name that survives a power cut stands for bytes that did
    part.replace(target)
    return digests


def _check(path: pathlib.Path, sha256: str, md5: str, size: int) -> tuple[dict[str, str], str]:
    """Digests of a file, and what is wrong with it."""
    if not path.is_file():
        return {}, "is not a file"
    found = path.stat().st_size
    if size and found != size:
        return {}, f"has {found:,} bytes, expected {size:,}"
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for digest in digests.values():
                digest.update(chunk)
    result = {name: digest.hexdigest() for name, digest in digests.items()}
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected and result[name] != expected:
            return result, f"has {name} {result[name]}, expected {expected}"
    return result, ""


def _download(url: str, target: pathlib.Path, size: int) -> None:
    """Fills the part of a target, in as many tries as it takes while something arrives."""
    part, _ = _parts(target)
    failures, furthest = 0, 0
    with requests.Session() as session, tqdm.tqdm(desc=target.name, unit="B", unit_scale=True) as bar:
        while True:
            try:
                return _continue(session, url, target, size, bar)
            except _TryAgainError as error:
                there = part.stat().st_size if part.exists() else 0
                failures = 1 if there > furthest else failures + 1
                furthest = max(furthest, there)
                if failures > len(_WAITS):
                    raise InputError(
                        f"{url} cannot be fetched ({error}); what has arrived is kept: run the same command again later"
                    ) from error
                _pause(max(error.wait, _WAITS[failures - 1]))


def _continue(session: requests.Session, url: str, target: pathlib.Path, size: int, bar: tqdm.tqdm) -> None:
    """One try: starts the part, or goes on with one that the server can prove to be of the same version."""
    part, note = _parts(target)
    before: dict[str, Any] = {"url": "", "version": "", "bytes": 0} | _read_json(note)
    start = part.stat().st_size if part.exists() and before["url"] == url and before["version"] else 0
    if start and start == before["bytes"]:
        return
    # The server sends all if the file has changed.
    asked = {"Range": f"bytes={start}-", "If-Range": before["version"]} if start else {}
    with _reading(), _open(session, url, _HEADERS | asked) as response:
        is_part = response.status_code == 206
        first, total = _range(response.headers) if is_part else (0, _length(response.headers))
        version = _version(response.headers)
        same = (first, version) == (start, before["version"]) and before["bytes"] in (0, total)
        if response.status_code == 416 or (is_part and not (start and same)):
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
            if not first:  # and emptied: a kill leaves no bytes of one version with the note of another
                note.write_text(json.dumps({"url": url, "version": version, "bytes": total}) + "\n")
            bar.reset(total=total or size or None)
            bar.initial = bar.n = first
            while chunk:
                bar.update(file.write(chunk))
                chunk = next(chunks, b"")
    if part.stat().st_size < (total or size):
        raise _TryAgainError("the connection ended early")


def _open(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """Sends the request and follows redirects, over http and https and never from the second to the first."""
    start = url
    for _ in range(_REDIRECTS):
        scheme = urllib.parse.urlsplit(url).scheme
        if scheme not in ("http", "https"):
            raise InputError(f"{start} leads to a {scheme or 'missing'}: address; only http and https are followed")
        if scheme == "http" and start.startswith("https:"):
            raise InputError(f"{start} leads from https to http, where anyone may change the file; it is not fetched")
        response = session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=_TIMEOUTS)
        if not response.is_redirect:
            return response
        url = urllib.parse.urljoin(url, response.headers["Location"])
        response.close()
    raise InputError(f"{start} leads from one address to the next, more than {_REDIRECTS} times; it is not fetched")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Tells what may go right the next time from what will not."""
    try:
        yield
    except requests.exceptions.SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise InputError(f"the server's certificate is not trusted ({error}); it is not fetched") from error
        raise _TryAgainError(_brief(error)) from error
    except requests.ConnectionError as error:
        if "Failed to resolve" in str(error):  # no network, or no such host: waiting seldom helps
            raise InputError(f"the address cannot be reached ({_brief(error)}); is this machine on line?") from error
        raise _TryAgainError(_brief(error)) from error
    except (requests.Timeout, urllib3.exceptions.HTTPError, ConnectionError) as error:
        raise _TryAgainError(_brief(error)) from error
    except requests.RequestException as error:
        raise InputError(f"the address cannot be used: {error}") from error


def _brief(error: Exception) -> str:
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError) or "timed out" in str(error):
        return "time-out"
    # requests wraps what urllib3 wraps: "HTTPSConnection(...): Failed to resolve 'host' (...)" is the part for people.
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return str(reason or error).split(": ", 1)[-1][:200]


def _check_status(response: requests.Response, url: str, target: pathlib.Path) -> None:
    status, says = response.status_code, f"{response.status_code} {response.reason}".strip()
    if status in (200, 206):
        return
    if status in (408, 425, 429) or status >= 500:
        wait = _retry_after(response.headers.get("Retry-After", ""))
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
    """A page where an archive was expected is a log-in, a consent form or an excuse."""
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_page = start.startswith((b"<!doctype html", b"<html")) or (
        "text/html" in response.headers.get("Content-Type", "") and not members.kind(head[:512])
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


def _range(headers: Any) -> tuple[int, int]:
    """First byte of a part, -1 if it is not told, and the size of the whole, 0 if that is not."""
    match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    return (int(match[1]), 0 if match[2] == "*" else int(match[2])) if match else (-1, 0)


def _length(headers: Any) -> int:
    text = headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else 0


def _version(headers: Any) -> str:
    """What `If-Range` takes: the ETag unless it is weak, else the time of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _retry_after(text: str) -> float:
    """Seconds, from a number or a date; 0 if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _parts(target: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
