"""Folders that belong to one process at a time."""

import contextlib
import pathlib
from collections.abc import Iterator

import filelock

from usfmae_jax.errors import InputError

_NAME = ".lock"  # hidden: neither a file of the input nor a part of a dataset


@contextlib.contextmanager
def hold(folder: pathlib.Path, taken: str) -> Iterator[None]:
    """Holds a folder for this process, where the file system knows locks.

    The lock ends with the process, however that ends: a file that a crash left behind holds nobody up.

    Raises:
      InputError: another process holds it; `taken` is the message.
    """
    lock = filelock.FileLock(folder / _NAME)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise InputError(taken) from error
    except OSError:
        pass  # no locks here, or no right to write: two at once are rare, and this one is not to blame
    try:
        yield
    finally:
        if lock.is_locked:
            (folder / _NAME).unlink(missing_ok=True)  # before it is released, so that it is never another's
        lock.release()
