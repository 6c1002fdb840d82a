"""Locks a workdir for one run at a time: two would interleave their logs and remove each other's checkpoints.

Two mechanisms guard it. `flock` is released when the process ends, however it ends; it works on one machine and over
NFS as usually mounted. Since some shared file systems only lock per machine, or not at all, the run also renews a note
in the lock file every few seconds. A note from another machine is watched for a while before it is considered left
over from a crash; notes are compared with each other, never with a clock. The note holds only a hash of the machine,
since the file may outlive its run.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from usfmae_jax import files
from usfmae_jax.errors import FaultError, InputError

NAME = ".lock"  # hidden: not one of the run's outputs
_RENEWED = 3.0  # seconds
_WATCHED = 4 * _RENEWED


@contextlib.contextmanager
def hold(workdir: str, option: str = "--workdir") -> Iterator[None]:
    """Creates and locks the working directory of a run; `option` is the command-line option that names it.

    Buckets (`gs://` and the like) have no locks: nothing guards them, and users must start only one run in each. In a
    job of several processes, the first one holds the lock.

    Raises:
      InputError: another run is using the directory.
      FaultError: the directory vanished or was replaced during the run.
    """
    if "://" in workdir:
        yield
        return
    folder = pathlib.Path(workdir)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(folder / NAME, workdir, option)
    except OSError:  # not writable, which the run itself reports
        descriptor = -1
    with contextlib.ExitStack() as stack:
        if descriptor < 0:
            yield
            return
        stack.callback(_remove_empty, made)
        stack.callback(os.close, descriptor)
        _take(descriptor, folder / NAME, workdir, option)
        stack.callback(_remove, folder / NAME)  # before closing, so that the file is never another run's
        stop = threading.Event()
        renewing = threading.Thread(target=_renew, args=(descriptor, stop), daemon=True)
        renewing.start()
        stack.callback(renewing.join)
        stack.callback(stop.set)
        entered = folder.stat()
        try:
            yield
        except Exception as error:
            if _vanished(folder, entered):  # the likely cause of whatever failed
                raise FaultError(_gone(workdir, option)) from error
            raise
        if _vanished(folder, entered):
            raise FaultError(_gone(workdir, option))


def _open(path: pathlib.Path, workdir: str, option: str) -> int:
    """Opens the lock file and locks it, unless another run holds it; file systems without locks are accepted."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(_taken(workdir, option)) from None
        except OSError:
            pass  # no locks here: rely on the note
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # the previous run has just removed it


def _take(descriptor: int, path: pathlib.Path, workdir: str, option: str) -> None:
    """Makes sure that the run that left a note in the file, if any, has ended."""
    left = _read(path)
    note: dict[str, Any] = json.loads(left) if left else {}
    if not left or (note["machine"] == _machine() and _ended(note["process"])):
        return
    end = time.monotonic() + _WATCHED
    while time.monotonic() < end:
        time.sleep(_RENEWED / 3)
        if _read(path) not in ("", left):
            raise InputError(_taken(workdir, option))


def _read(path: pathlib.Path) -> str:
    """The current note, "" if there is no valid one; reopening the file bypasses caches of shared file systems."""
    try:
        text = path.read_text(encoding="utf-8")
        note = files.parse(text)
        whole = note.keys() >= {"machine", "process", "renewed"} and isinstance(note["process"], int)
        return text if whole else ""
    except (OSError, ValueError, AttributeError):
        return ""


def _renew(descriptor: int, stop: threading.Event) -> None:
    renewed = 0
    while True:
        note = json.dumps({"machine": _machine(), "process": os.getpid(), "renewed": renewed})
        with contextlib.suppress(OSError):  # the disk may be full for a while
            os.pwrite(descriptor, f"{note:100}\n".encode(), 0)
            os.fsync(descriptor)
        if stop.wait(_RENEWED):
            return
        renewed += 1


def _machine() -> str:
    with contextlib.suppress(OSError):
        return _digest(socket.gethostname() + pathlib.Path("/proc/sys/kernel/random/boot_id").read_text())
    return _digest(socket.gethostname())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # not a valid process id
        return True
    except OSError:
        return False
    return process == os.getpid()  # an earlier run in this process


def _vanished(folder: pathlib.Path, entered: os.stat_result) -> bool:
    """Whether a folder is no longer the one that was locked: removed, unmounted or replaced."""
    note = json.loads(_read(folder / NAME) or "{}")  # checked first: not all file systems have stable inode numbers
    if (note.get("machine"), note.get("process")) == (_machine(), os.getpid()):
        return False
    try:
        return not os.path.samestat(folder.stat(), entered)
    except OSError:
        return True


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # already gone, or read-only by now
        path.unlink()


def _remove_empty(folders: list[pathlib.Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _taken(workdir: str, option: str) -> str:
    return f"another run is at work in {option}={workdir}; wait for it, or choose another {option}"


def _gone(workdir: str, option: str) -> str:
    return (
        f"{option}={workdir} vanished while the run was at work, or another folder took its place; bring it back, and "
        "the same command goes on from what was saved last"
    )
