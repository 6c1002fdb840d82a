"""Finds files and reads their frames in separate processes, for commands that use them directly, without a build.

The frames of a file are kept in a folder as 8-bit PNG until they are used, so that neither side holds a whole clip in
memory. A file that crashes or stalls a reader only yields a reason.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence

import cv2

from data_prep import isolate
from data_prep.find.files import printable, scan_folder
from data_prep.readers import DEFAULTS, SUFFIXES, Frame, Options, UnreadableError, kind_of, read_frames
from data_prep.readers.base import open_file
from data_prep.readers.kinds import HEAD_BYTES
from usfmae_jax.data.records import to_uint8
from usfmae_jax.errors import InputError, install, some

KEPT = "the frames before the damage are taken"  # ends the reason if some frames of a file were read

_LIMIT = 60.0  # seconds for a frame
_MOST = 8 << 30  # bytes of the frames of one file
_NEEDED = {"dicom": "pydicom", "video": "av"}


@dataclasses.dataclass(frozen=True)
class Found:
    """A file to read: its path, its name relative to the folder given, and a stamp that changes when the file does."""

    path: str
    name: str
    stamp: str


@dataclasses.dataclass(frozen=True)
class Held:
    """A frame that was read: the path of its PNG, its number in the file, and (height, width) of a pixel in mm.

    The pixel size is (0, 0) if it is not known.
    """

    path: str
    number: int
    spacing: tuple[float, float]

    def load(self) -> bytes:
        """The bytes of the PNG."""
        return pathlib.Path(self.path).read_bytes()


def find(given: Sequence[str], outside: str) -> tuple[list[Found], list[tuple[str, str]], str]:
    """Finds all files that can be read.

    Args:
      given: files and folders; hidden files are skipped, and links that lead out of a folder rejected.
      outside: a folder to leave out, even if it lies in one of those.

    Returns:
      the files sorted by name, (name, reason) of those that cannot be used, and a sentence about skipped files or "".

    Raises:
      InputError: a path given does not exist, or two files have the same name.
    """
    found: list[Found] = []
    rejected: list[tuple[str, str]] = []
    others, without = list[str](), os.path.realpath(outside) + os.sep
    for one in given:
        root = pathlib.Path(one).expanduser()
        if root.is_file():
            status = root.stat()
            found.append(Found(str(root), printable(root.name), _stamp(status.st_size, status.st_mtime_ns)))
            continue
        if not root.is_dir():
            raise InputError(f"--data={one} is neither a file nor a folder")
        root = root.resolve()

        def wanted(path: str, root: pathlib.Path = root) -> bool:
            full = os.path.join(root, path)
            if full.startswith(without):
                return False
            taken = _is_read(full)
            if not taken:
                others.append(printable(path))
            return taken

        try:
            scan = scan_folder(root, wanted)
        except InputError as error:
            raise InputError(str(error).replace("--input", "--data")) from error
        found += [Found(os.path.join(root, path), printable(path), _stamp(*of)) for path, of in scan.files.items()]
        rejected += [(file.source, file.reason) for file in scan.rejected]
    found.sort(key=lambda file: file.name)
    for first, second in itertools.pairwise(found):
        if first.name == second.name:
            raise InputError(f"--data names two files {first.name}; give the folder that holds both of them")
    return found, rejected, _passed_over(sorted(others))


def _passed_over(names: list[str]) -> str:
    if len(names) > 1:
        return f"{len(names):,} files are passed over, since they are no images: {some(names)}"
    return f"1 file is passed over, since it is no image: {names[0]}" if names else ""


def _stamp(size: int, changed: int) -> str:
    return f"{size}-{changed}"


def _is_read(path: str) -> bool:
    """Whether a file in a folder is for the readers; DICOM files often have no suffix, or the end of a UID as one."""
    return path.lower().endswith(tuple(SUFFIXES - {""})) or _kind(path) == "dicom"


def check_libraries(files: Sequence[Found]) -> None:
    """Raises InputError if a library needed for any of the files is not installed, before any of them is read."""
    missing = {kind: name for kind, name in _NEEDED.items() if not importlib.util.find_spec(name)}
    for file in files if missing else ():
        if name := missing.get(_kind(file.path), ""):
            raise InputError(f"{file.name} needs {name}: {install('prep')}")


def _kind(path: str) -> str:
    with contextlib.suppress(UnreadableError, OSError), open_file(path) as file:
        return kind_of(file.read(HEAD_BYTES))
    return ""


def read(
    files: Sequence[Found], folder: str, workers: int = 2, options: Options = DEFAULTS
) -> Generator[tuple[int, list[Held], str], None, None]:
    """Reads files in worker processes; the PNGs of a file in `folder` are removed when the next file is requested.

    Args:
      files: the files to read.
      folder: used by this process alone; created here, and removed at the end.
      workers: number of processes, each of which reads one file ahead of the consumer.
      options: options of the readers.

    Yields:
      the index of a file, its frames, and why there are no more of them ("" = all were read), in the order in which
      the files are finished.

    Raises:
      InputError: a library that a kind of file needs is not installed.
    """
    tasks = [(file.path, os.path.join(folder, str(number)), options) for number, file in enumerate(files)]
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    os.makedirs(folder)
    try:
        how = {"limit": _LIMIT, "preload": "data_prep.frames"}
        with contextlib.closing(isolate.isolated_map(_hold, tasks, workers, **how)) as results:  # type: ignore[arg-type]
            for number, (held, reason) in results:
                yield number, held, reason
                shutil.rmtree(tasks[number][1], ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hold(
    task: tuple[str, str, Options], given_up: Mapping[int, str], begin: Callable[[int], None]
) -> tuple[list[Held], str]:
    """Reads one file in a worker process and writes its frames to a folder."""
    path, folder, options = task
    if given_up:
        return [], given_up[0]
    begin(0)
    os.makedirs(folder, exist_ok=True)
    held: list[Held] = []
    size, reason = 0, ""
    try:
        for frame in read_frames(path, options):
            place = os.path.join(folder, f"{len(held):06d}.png")
            size += _write(place, frame)
            held.append(Held(place, frame.number, frame.spacing))
            begin(0)
            if size > _MOST:
                raise UnreadableError(f"its frames take more than {_MOST >> 30} GiB (--max_frames takes some of them)")
    except UnreadableError as error:
        reason = f"{error}; {KEPT}" if held else str(error)
    return held, reason or ("" if held else "holds no frames")


def _write(path: str, frame: Frame) -> int:
    pixels = to_uint8(frame.pixels)
    if pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    pathlib.Path(path).write_bytes(data)
    return len(data)
