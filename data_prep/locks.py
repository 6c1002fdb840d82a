"""Locks on folders and files that only one process at a time may use."""

import contextlib
import pathlib
from collections.abc import Iterator

import filelock

from usfmae_jax.errors import InputError

_NAME = ".lock"  # hidden: neither a file of the input nor a part of a dataset


@contextlib.contextmanager
def hold(folder: pathlib.Path, taken: str, name: str = _NAME, wait: float = 0) -> Iterator[None]:
    """Locks a folder, or something in it, for this process, if the file system supports locks.

    The lock is released when the process ends, however it ends: a lock file left behind by a crash blocks nobody.

    Args:
      folder: where the lock file is kept meanwhile.
      taken: message of the error.
      name: of the lock file, the same for all processes that use the same thing.
      wait: seconds to wait for another process to finish.

    Raises:
      InputError: another process holds the lock.
    """
    lock = filelock.FileLock(folder / name)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout as error:
        raise InputError(taken) from error
    except OSError:
        pass  # no locks here, or no write permission: concurrent use is rare, and no reason to fail
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # gone, or read-only by now
                (folder / name).unlink()  # before release, so that it never belongs to another process
        lock.release()
