"""Exceptions shared by several packages, and how commands report them: one sentence, an exit code, safe text."""

import argparse
import contextlib
import difflib
import errno
import multiprocessing.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

#: Exit codes: done; failed; bad input or config; preempted, to be restarted; stopped for good by Ctrl-C.
DONE, FAILED, BAD_INPUT, PREEMPTED, STOPPED = 0, 1, 2, 75, 130


class InputError(ValueError):
    """Bad input or configuration.

    The message is one sentence that states what is wrong and what to type instead. Commands print it without a
    traceback and exit with code 2.
    """


class FaultError(RuntimeError):
    """Something that a run depends on failed: a process that loads data, or the working directory.

    The message is one sentence that states what happened and how to continue. Commands print it without a traceback and
    exit with code 1.
    """


class DamagedRecord(Exception):
    """A record or image cannot be read; the input pipeline counts, names and skips it."""


def answer(action: Callable[[], int]) -> int:
    """Runs a command; for errors that the user can fix, prints one sentence instead of a traceback.

    Args:
      action: returns the exit code.

    Returns:
      the exit code; `BAD_INPUT` after an `InputError`, when the disk is full or gone, when a file is where a folder
      should be or the reverse, and when there is not enough memory; `FAILED` after a `FaultError`; `STOPPED` after
      Ctrl-C.
    """
    code = BAD_INPUT
    try:
        return action()
    except InputError as error:
        said = str(error)
    except FaultError as error:
        said, code = str(error), FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except Exception as error:
        said = storage_fault(error) or _in_the_way(error) or _out_of_memory(error) or _absent_devices(error)
        if not said:
            raise
    print(f"error: {said}", file=sys.stderr)
    return code


#: Installed scripts, see pyproject.toml, and the modules that `python -m` runs instead.
SCRIPTS = {
    "usfmae-pretrain": "usfmae_jax.main",
    "usfmae-finetune": "usfmae_jax.finetune",
    "usfmae-evaluate": "usfmae_jax.evaluate",
    "usfmae-predict": "usfmae_jax.predict",
    "usfmae-data": "data_prep.build",
}


def install(extra: str) -> str:
    """What to type to install the packages of an extra, see pyproject.toml."""
    return f"pip install '.[{extra}]' in the folder of usfmae_jax"


def as_started(text: str) -> str:
    """The help of a command; if started as a script, with names of scripts instead of `python -m MODULE`."""
    if pathlib.PurePath(sys.argv[0]).stem in SCRIPTS:
        for script, module in SCRIPTS.items():
            text = text.replace(f"python -m {module}", script)
    return text


def at_home(argv: Sequence[str]) -> list[str]:
    """Arguments in which "~" is the home folder: a shell replaces it in `--input ~/x`, but not in `--input=~/x`."""
    home = os.path.expanduser("~")
    return [re.sub(r"(?<=[=,])~(?=[/,]|$)", lambda _: home, one) if one.startswith("-") else one for one in argv]


class Parser(argparse.ArgumentParser):
    """The options of a command; an error is one sentence, which names the option nearest to an unknown one."""

    def __init__(self, module: str, doc: str, **settings: Any):
        """Args: module: what `python -m` runs; doc: text above the options; settings: passed to argparse."""
        how = argparse.RawDescriptionHelpFormatter
        name, about = as_started(f"python -m {module}"), as_started(doc)
        super().__init__(name, description=about, formatter_class=how, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse."""
        args = at_home(sys.argv[1:] if args is None else args)
        self._given = [one.partition("=")[0] for one in args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises: InputError, with the message of argparse."""
        unknown = re.findall(r"--\w[\w-]*", message) if message.startswith("unrecognized") else []
        if message.startswith("the following"):  # the missing option may have been given, misspelt
            unknown = [one for one in self._given if one.startswith("--") and one not in self._option_string_actions]
            message += "".join(f"; {one} is no option" for one in unknown)
        near = [name for one in unknown for name in difflib.get_close_matches(one, self._option_string_actions, n=1)]
        hint = f"; nearest is {', '.join(near)}" if near else ""
        raise InputError(f"{message}{hint}; --help shows examples")


#: Names of worker processes, which read files, train members or load images.
READER, TRAINER, LOADER = "reader of files", "trainer of members", "grain-"
#: The exit code of processes that `check_guard` ends, and the message that their parent prints.
UNGUARDED = 78
NO_GUARD = (
    'Put the calls below `if __name__ == "__main__":`, since they start worker processes that import the script again.'
)


def check_guard() -> None:
    """Prevents a script without a main guard from running again in its worker processes.

    Raises:
      InputError: this process is still importing the script, and was not started by this package.
    """
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):
        if process.name.startswith((READER, TRAINER, LOADER)):
            os._exit(UNGUARDED)  # the parent prints the message, once
        raise InputError(NO_GUARD)


def leave(code: int) -> NoReturn:
    """Ends the process; after a fault immediately, since Python would wait for a thread that may hang."""
    if code == FAILED:
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # otherwise semaphores leak, with a warning
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


#: System messages for a disk that is full or gone; libraries pass them on inside longer texts.
_STORAGE = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EROFS: "Read-only file system",
    errno.EIO: "Input/output error",
    errno.ESTALE: "Stale file handle",
    errno.ENOTCONN: "Transport endpoint is not connected",
}


def storage_fault(error: BaseException | None) -> str:
    """The message for an error caused, directly or not, by a disk that is full or gone; "" for other errors."""
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


def _in_the_way(error: Exception) -> str:
    """The message for a file where a folder should be, or the reverse; "" for other errors."""
    name = getattr(error, "filename", None)
    if not isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError) or not isinstance(name, str):
        return ""
    path = pathlib.Path(name)
    place = next((one for one in (path, *path.parents) if one.exists()), path)
    kind, wanted = ("folder", "file") if place.is_dir() else ("file", "folder")
    return f"{place} is a {kind}, where a {wanted} is to be; move it away, and start again"


def _out_of_memory(error: Exception) -> str:
    """The message for a device, or a machine, with too little memory; "" for other errors."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    return (
        "there is not enough memory; smaller images or batches take less, and --config.train.accumulate=2 computes a "
        "training batch in two parts"
    )


def _absent_devices(error: Exception) -> str:
    """The message when JAX does not find the devices that it was told to use; "" for other errors."""
    wanted, frames = os.environ.get("JAX_PLATFORMS"), traceback.extract_tb(error.__traceback__)
    if not wanted or not frames or not frames[-1].filename.endswith("xla_bridge.py"):
        return ""
    return (
        f"JAX_PLATFORMS={wanted} asks for devices that JAX does not find here; leave it out to take what there is, and "
        "see requirements-cuda.txt and requirements-tpu.txt for what GPUs and TPUs need"
    )


# Invisible characters: they control terminals or reverse the writing direction, so that one name looks like another.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_BARS = re.compile(r"(\n|\x1b\[A)*")  # how tqdm moves from line to line


def visible(text: str, one_line: bool = False) -> str:
    """Text with invisible characters as codes of four hex digits; with `one_line`, line ends and tabs too."""
    shown = _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return shown.replace("\n", "\\u000a").replace("\t", "\\u0009") if one_line else shown


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many there are more: "a, b, c and 4 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@contextlib.contextmanager
def visible_output() -> Iterator[None]:
    """Makes everything printed within it, whatever its origin, harmless to terminals. Decorates main functions."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Visible(streams[0]), _Visible(streams[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Visible:
    """A stream that makes invisible characters visible; progress bars may return to the start of their line."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        if not _BARS.fullmatch(text):
            begin = "\r" if text.startswith("\r") else ""
            self._stream.write(begin + visible(text.removeprefix("\r")))
        else:
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
