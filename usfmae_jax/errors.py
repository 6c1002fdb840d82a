"""The exceptions that several rooms raise and catch, and how doors answer: a sentence, an exit code, harmless text."""

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
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

#: Exit codes: done; failed; bad input or config; stopped, and to be started again; stopped by Ctrl-C for good.
DONE, FAILED, BAD_INPUT, PREEMPTED, STOPPED = 0, 1, 2, 75, 130


class InputError(ValueError):
    """Bad input or configuration.

    The message is one sentence that says what is wrong and what to type instead. Doors print it without a
    traceback and exit with status 2.
    """


class FaultError(RuntimeError):
    """What a run stands on failed under it: a process that loads data, or the working directory.

    The message is one sentence that says what happened and how to go on. Doors print it without a traceback and exit
    with status 1.
    """


class DamagedRecord(Exception):
    """A record or image that cannot be read; the input pipeline counts, names and skips it."""


def answer(action: Callable[[], int]) -> int:
    """Runs a door; what a person can mend is one sentence instead of a traceback.

    Args:
      action: returns the exit code.

    Returns:
      the exit code; `BAD_INPUT` after an `InputError`, when the disk is full or gone, when something else is where a
      file or folder is to be, and when there is not enough memory; `FAILED` after a `FaultError`; `STOPPED` after
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


#: The scripts that an installation has, see pyproject.toml, and the modules that `python -m` runs.
SCRIPTS = {
    "usfmae-pretrain": "usfmae_jax.main",
    "usfmae-finetune": "usfmae_jax.finetune",
    "usfmae-evaluate": "usfmae_jax.evaluate",
    "usfmae-predict": "usfmae_jax.predict",
    "usfmae-data": "data_prep.build",
}


def as_started(text: str) -> str:
    """The help of a door, with the names of scripts instead of `python -m MODULE` where a script was started."""
    if pathlib.PurePath(sys.argv[0]).stem in SCRIPTS:
        for script, module in SCRIPTS.items():
            text = text.replace(f"python -m {module}", script)
    return text


class Parser(argparse.ArgumentParser):
    """The options of a door; a mistake is one sentence, which names the option nearest to one that there is not."""

    def __init__(self, module: str, doc: str, **settings: Any):
        """Args: module: what `python -m` runs; doc: stands above the options; settings: of argparse."""
        how = argparse.RawDescriptionHelpFormatter
        name, about = as_started(f"python -m {module}"), as_started(doc)
        super().__init__(name, description=about, formatter_class=how, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse."""
        self._given = [str(one).partition("=")[0] for one in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises: InputError, with what argparse says."""
        unknown = re.findall(r"--\w[\w-]*", message) if message.startswith("unrecognized") else []
        if message.startswith("the following"):  # one that is missing may be there, misspelt
            unknown = [one for one in self._given if one.startswith("--") and one not in self._option_string_actions]
            message += "".join(f"; {one} is no option" for one in unknown)
        near = [name for one in unknown for name in difflib.get_close_matches(one, self._option_string_actions, n=1)]
        hint = f"; nearest is {', '.join(near)}" if near else ""
        raise InputError(f"{message}{hint}; --help shows examples")


#: Names of processes that do a part of the work: they read files, train members, or load images.
READER, TRAINER, LOADER = "reader of files", "trainer of members", "grain-"
#: The status of those that `check_guard` ends, and what their parent says of it.
UNGUARDED = 78
NO_GUARD = (
    'Put the calls below `if __name__ == "__main__":`, since they start worker processes that import the script again.'
)


def check_guard() -> None:
    """Keeps a script without a main guard from starting again in the processes that it starts.

    Raises:
      InputError: this process still imports the script, and was started by something else.
    """
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):
        if process.name.startswith((READER, TRAINER, LOADER)):
            os._exit(UNGUARDED)  # the parent says it, once
        raise InputError(NO_GUARD)


def leave(code: int) -> NoReturn:
    """Ends the process; after a fault at once: what hangs may be a thread, which Python would wait for."""
    if code == FAILED:
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # else semaphores are left, and a warning
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


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


def _in_the_way(error: Exception) -> str:
    """What to say of a file where a folder is to be, or the reverse; "" when the error is another."""
    name = getattr(error, "filename", None)
    if not isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError) or not isinstance(name, str):
        return ""
    path = pathlib.Path(name)
    place = next((one for one in (path, *path.parents) if one.exists()), path)
    kind, wanted = ("folder", "file") if place.is_dir() else ("file", "folder")
    return f"{place} is a {kind}, where a {wanted} is to be; move it away, and start again"


def _out_of_memory(error: Exception) -> str:
    """What to say of a device, or a machine, that has too little memory; "" when the error is another."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    return (
        "there is not enough memory; smaller images or batches take less, and --config.train.accumulate=2 computes a "
        "training batch in two parts"
    )


def _absent_devices(error: Exception) -> str:
    """What to say when JAX does not find the devices that it is told to take; "" when the error is another."""
    wanted, frames = os.environ.get("JAX_PLATFORMS"), traceback.extract_tb(error.__traceback__)
    if not wanted or not frames or not frames[-1].filename.endswith("xla_bridge.py"):
        return ""
    return (
        f"JAX_PLATFORMS={wanted} asks for devices that JAX does not find here; leave it out to take what there is, and "
        "see requirements-cuda.txt and requirements-tpu.txt for what GPUs and TPUs need"
    )


# Characters that are not seen: they steer terminals, or turn the direction of writing, and a name looks like another.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_BARS = re.compile(r"(\n|\x1b\[A)*")  # how tqdm moves from line to line


def visible(text: str, one_line: bool = False) -> str:
    """Text with codes, four hex digits, for characters that are not seen; of `one_line` for line ends and tabs, too."""
    shown = _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return shown.replace("\n", "\\u000a").replace("\t", "\\u0009") if one_line else shown


@contextlib.contextmanager
def visible_output() -> Iterator[None]:
    """Whatever is printed meanwhile, wherever it comes from, steers no terminal. Decorates what runs a door."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Visible(streams[0]), _Visible(streams[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Visible:
    """A stream that shows what is not seen; progress bars may return to the beginning of their line."""

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
