"""Folders that belong to one process at a time."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from usfmae_jax.errors import InputError


@contextlib.contextmanager
def hold(folder: pathlib.Path, taken: str) -> Iterator[None]:
    """Holds a folder for this process, where the file system knows locks; the lock ends with the process.

    Raises:
      InputError: another process holds it; `taken` is the message.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(taken) from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)  # also unlocks
