"""A workdir belongs to one run at a time: two would interleave their numbers and remove each other's checkpoints.

Two things guard it. `flock`, which ends with the process however that ends, on one machine and over NFS as most mount
it. And since some shared file systems grant it on each machine for itself, or not at all: a note in the file that the
run renews every few seconds. A note of another machine is watched before it is taken for what a crash left behind.
Compared are notes, not clocks. The machine is in it as a hash, for the file may outlive its run.
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

NAME = ".lock"  # hidden: no part of what a run leaves
_RENEWED = 3.0  # seconds
_WATCHED = 4 * _RENEWED


@contextlib.contextmanager
def hold(workdir: str, option: str = "--workdir") -> Iterator[None]:
    """Holds the working directory of a run, which is created; an option of the door names it.

    A bucket, `gs://` or the like, knows no locks: nothing guards it, and it is for the person to start one run in it.

    Of a job of several processes the first one holds it.

    Raises:
      InputError: another run is at work there.
      FaultError: the directory vanished meanwhile, or another took its place.
    """
    if "://" in workdir:
        yield
        return
    folder = pathlib.Path(workdir)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(folder / NAME, workdir, option)
    except OSError:  # a folder that cannot be written, which the run says itself
        descriptor = -1
    with contextlib.ExitStack() as stack:
        if descriptor < 0:
            yield
            return
        stack.callback(_remove_empty, made)
        stack.callback(os.close, descriptor)
        _take(descriptor, folder / NAME, workdir, option)
        stack.callback(_remove, folder / NAME)  # before it is closed, so that it is never another's
        stop = threading.Event()
        renewing = threading.Thread(target=_renew, args=(descriptor, stop), daemon=True)
        renewing.start()
        stack.callback(renewing.join)
        stack.callback(stop.set)
        entered = folder.stat()
        try:
            yield
        except Exception as error:
            if _vanished(folder, entered):  # whatever it is that failed for it
                raise FaultError(_gone(workdir, option)) from error
            raise
        if _vanished(folder, entered):
            raise FaultError(_gone(workdir, option))


def _open(path: pathlib.Path, workdir: str, option: str) -> int:
    """Opens the file that is there and locks it, if nobody else has it and the file system knows locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(_taken(workdir, option)) from None
        except OSError:
            pass  # no locks here: the note decides
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # the run before has removed it meanwhile


def _take(descriptor: int, path: pathlib.Path, workdir: str, option: str) -> None:
    """Makes sure that the run whose note is there has ended."""
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
    """The note as it is now: opening a file asks the server of a shared file system for it."""
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
    except (ProcessLookupError, OverflowError):  # no number of a process
        return True
    except OSError:
        return False
    return process == os.getpid()  # a run before in the same process


def _vanished(folder: pathlib.Path, entered: os.stat_result) -> bool:
    """Whether a folder is no longer the one that was entered: removed, unmounted, or another in its place."""
    note = json.loads(_read(folder / NAME) or "{}")  # asked first: not every file system numbers folders for good
    if (note.get("machine"), note.get("process")) == (_machine(), os.getpid()):
        return False
    try:
        return not os.path.samestat(folder.stat(), entered)
    except OSError:
        return True


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # gone, or read-only by now
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
