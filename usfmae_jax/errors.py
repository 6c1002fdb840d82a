"""The exceptions that several rooms raise and catch, and how doors answer them: a sentence and an exit code."""

import errno
import re
import sys
from collections.abc import Callable

#: Exit codes: done, bad input or config, stopped by preemption after a saved checkpoint.
DONE, BAD_INPUT, PREEMPTED = 0, 2, 75


class InputError(ValueError):
    """Bad input or configuration.

    The message is one sentence that says what is wrong and what to type instead. Doors print it without a
    traceback and exit with status 2.
    """


class DamagedRecord(Exception):
    """A record or image that cannot be read; the input pipeline counts, names and skips it."""


def answer(action: Callable[[], int]) -> int:
    """Runs a door; what a person can mend is one sentence instead of a traceback.

    Args:
      action: returns the exit code.

    Returns:
      the exit code; `BAD_INPUT` after an `InputError`, and when the disk is full or gone.
    """
    try:
        return action()
    except InputError as error:
        said = str(error)
    except Exception as error:
        said = storage_fault(error)
        if not said:
            raise
    print(f"error: {said}", file=sys.stderr)
    return BAD_INPUT


#: What systems say of a disk that is full or gone; libraries that write hand it on inside of longer texts.
_STORAGE = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EROFS: "Read-only file system",
    errno.EIO: "Input/output error",
    errno.ESTALE: "Stale file handle",
    errno.ENOTCONN: "Transport endpoint is not connected",
}


def storage_fault(error: BaseException | None) -> str:
    """What to say when an error, or what caused it, is that of a disk that is full or gone; "" when it is not."""
    while error:
        number = error.errno if isinstance(error, OSError) else None
        found = re.search("|".join(_STORAGE.values()), str(error))
        if number in _STORAGE or found:
            said = found[0] if found else _STORAGE[number or errno.EIO]
            where = re.search('Failed writing: "([^"]+)', str(error))
            name = where[1] if where else getattr(error, "filename", None)
            place = f" ({name})" if name else ""
            remedy = "make room" if said.startswith(("No space", "Disk quota")) else "make it writable again"
            return f"{said}{place}; {remedy}, and the same command goes on from what was saved last"
        error = error.__cause__ or error.__context__
    return ""
