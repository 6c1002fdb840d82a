"""Folders and files that belong to one process at a time."""

import contextlib
import pathlib
from collections.abc import Iterator

import filelock

from usfmae_jax.errors import InputError

_NAME = ".lock"  # hidden: neither a file of the input nor a part of a dataset


@contextlib.contextmanager
def hold(folder: pathlib.Path, taken: str, name: str = _NAME, wait: float = 0) -> Iterator[None]:
    """Holds a folder, or something in it, for this process, where the file system knows locks.

    The lock ends with the process, however that ends: a file that a crash left behind holds nobody up.

    Args:
      folder: where the lock lies meanwhile.
      taken: message of the error.
      name: of the lock, the same for all who ask for the same thing.
      wait: seconds until another process has to be done.

    Raises:
      InputError: another process holds it.
    """
    lock = filelock.FileLock(folder / name)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout as error:
        raise InputError(taken) from error
    except OSError:
        pass  # no locks here, or no right to write: two at once are rare, and this one is not to blame
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # gone, or read-only by now
                (folder / name).unlink()  # before it is released, so that it is never another's
        lock.release()
