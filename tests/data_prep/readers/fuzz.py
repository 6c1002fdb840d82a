"""Mutated files for the readers: whatever a file holds, its frames or one reason come out, in time and in silence.

    python -m tests.data_prep.readers.fuzz --cases=5000 FOLDER_OR_FILE...

Every case is a file and a seed. It runs in a child process with a limit of time and memory, so that a crash of a
native library and a hang are seen, and named with what repeats them: --seed=N --cases=1 FILE.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from data_prep.readers import SUFFIXES, Frame, Options, UnreadableError, read_frames
from data_prep.readers.clips import MAX_PIXELS

MEMORY = 6 << 30  # of addresses, most of which are never used
LIMIT = 20.0  # seconds for one case
_MAX_FRAMES = 100  # looked at
_HEADER = 2048
_EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
_NUMBERS = (b"0", b"-1", b"1", b"65536", b"2147483648", b"99999999999999999999", b"1e9", b"nan", b"")


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that ended otherwise than with frames or an UnreadableError."""

    path: str
    seed: int
    what: str

    def __str__(self) -> str:
        repeat = f"python -m tests.data_prep.readers.fuzz --cases=1 --seed={self.seed} {self.path!r}"
        return f"{self.what.strip()}\n  repeat with: {repeat}"


def mutate(data: bytes, seed: int) -> bytes:
    """Damages a file in one to three ways; the same seed always in the same ways."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(_MUTATIONS)(bytearray(data), rng) if data else data
    return data


def _flip_bits(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 3, 20))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _overwrite_run(data: bytearray, rng: random.Random) -> bytes:
    start, length = _place(data, rng), rng.choice((1, 4, 16, 200))
    run = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    data[start : start + length] = run
    return bytes(data)


def _truncate(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: _place(data, rng)])


def _repeat_block(data: bytearray, rng: random.Random) -> bytes:
    start, length = _place(data, rng), rng.choice((1, 8, 512, 4096))
    return bytes(data[: start + length] + data[start:])


def _remove_block(data: bytearray, rng: random.Random) -> bytes:
    start = _place(data, rng)
    return bytes(data[:start] + data[start + rng.choice((1, 8, 512)) :])


def _extreme_field(data: bytearray, rng: random.Random) -> bytes:
    start, width = _place(data, rng), rng.choice((1, 2, 4, 8))
    field = rng.choice(_EXTREMES) % (1 << 8 * width)
    data[start : start + width] = field.to_bytes(width, rng.choice(("little", "big")))
    return bytes(data)


def _extreme_number(data: bytearray, rng: random.Random) -> bytes:
    numbers = list(re.finditer(rb"-?\d+", data[:_HEADER]))
    if not numbers:
        return _extreme_field(data, rng)
    start, end = rng.choice(numbers).span()
    return bytes(data[:start] + rng.choice(_NUMBERS) + data[end:])


_MUTATIONS = _flip_bits, _overwrite_run, _truncate, _repeat_block, _remove_block, _extreme_field, _extreme_number


def _place(data: bytearray, rng: random.Random) -> int:
    # Half of the time in the header, where most of what matters is.
    return rng.randrange(min(_HEADER, len(data)) if rng.random() < 0.5 else len(data))


def run(
    cases: Iterable[tuple[str, int]],
    limit: float = LIMIT,
    read: Callable[[str, Options], Iterator[Frame]] = read_frames,
) -> Iterator[str | Failure]:
    """Yields for each case how it ended: "frames", the reason of an UnreadableError, or a Failure.

    Args:
      cases: (path, seed); see `mutate`.
      limit: seconds for a case, after which it is a hang.
      read: what is tested.
    """
    child: _Child | None = None
    try:
        for path, seed in cases:
            child = child or _Child(read)
            try:
                what = child.ask(path, seed, limit)
            except (EOFError, BrokenPipeError, TimeoutError) as error:
                hung = isinstance(error, TimeoutError)
                yield Failure(path, seed, f"hang: more than {limit} s" if hung else f"crash: exit status {child.end()}")
                child.end()
                child = None
                continue
            yield Failure(path, seed, what[1:]) if what.startswith("!") else what
    finally:
        if child:
            child.end()


class _Child:
    def __init__(self, read: Callable[[str, Options], Iterator[Frame]]):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, read), daemon=True)
        self._process.start()
        other.close()
        self._pipe.recv()  # it is ready

    def ask(self, path: str, seed: int, limit: float) -> str:
        self._pipe.send((path, seed))
        if not self._pipe.poll(limit):
            raise TimeoutError
        return self._pipe.recv()

    def end(self) -> int | None:
        self._process.join(1)
        status = self._process.exitcode
        self._process.kill()
        self._process.join()
        self._pipe.close()
        return status


def _serve(pipe, read: Callable[[str, Options], Iterator[Frame]]) -> None:
    import cv2

    cv2.setNumThreads(1)
    getattr(cv2.utils, "logging", cv2).setLogLevel(0)  # as workers do
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        pipe.send("ready")
        while True:
            try:
                path, seed = pipe.recv()
            except EOFError:
                return
            pipe.send(_try(path, seed, read, folder, printed))


def _try(path: str, seed: int, read: Callable[[str, Options], Iterator[Frame]], folder: str, printed) -> str:
    target = os.path.join(folder, f"case{''.join(pathlib.Path(path).suffixes[-2:])}")
    pathlib.Path(target).write_bytes(mutate(pathlib.Path(path).read_bytes(), seed))
    if path.endswith((".mhd", ".nhdr")):
        for data_file in pathlib.Path(path).parent.glob(pathlib.Path(path).name.split(".")[0] + "*raw"):
            shutil.copy(data_file, folder)
    rng = random.Random(seed)
    options = Options(
        stride=rng.choice((1, 1, 3)),
        max_frames=rng.choice((0, 0, 5)),
        axis=rng.choice((None, None, 0, 1, 2)),
        flip=rng.choice(("", "both")),
    )
    try:
        ended = _look_at(read(target, options))
    except UnreadableError as error:
        ended = str(error)
        if folder in ended or not ended.isprintable() or not 0 < len(ended) < 200:
            ended = f"!a reason that cannot be stored: {ended!r}"
    except BaseException:
        ended = f"!{traceback.format_exc()[-1500:]}"
    sys.stdout.flush()
    sys.stderr.flush()
    if printed.seek(0, os.SEEK_END):
        printed.seek(0)
        ended = f"!printed: {printed.read()[:500].decode(errors='replace')}"
        printed.seek(0)
        printed.truncate()
    return ended


def _look_at(frames: Iterator[Frame]) -> str:
    last = -1
    for count, frame in enumerate(frames):
        pixels = frame.pixels
        sound = (
            pixels.dtype in (np.uint8, np.uint16)
            and pixels.ndim == 3
            and pixels.shape[2] in (1, 3)
            and 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
            and frame.number > last
        )
        if not sound:
            return f"!frame {frame.number} after {last} is {pixels.dtype} {pixels.shape}"
        last = frame.number
        if count == _MAX_FRAMES:
            break
    return "frames" if last >= 0 else "!neither frames nor a reason"


def find(paths: Iterable[str]) -> list[str]:
    """Files, and all in folders that have a suffix which can be read, or none."""
    found = []
    for path in map(pathlib.Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [
            str(one) for one in inside if one.is_file() and (one == path or one.suffix.lower() in {*SUFFIXES, ""})
        ]
    return found


def draw(paths: list[str], count: int, seed: int) -> Iterator[tuple[str, int]]:
    """`count` cases, the same number for every kind of suffix whatever the number of its files."""
    kinds = collections.defaultdict(list)
    for path in paths:
        kinds[pathlib.Path(path).suffix.lower()].append(path)
    order = sorted(kinds)
    for case in range(count):
        files = kinds[order[case % len(order)]]
        yield files[case // len(order) % len(files)], seed + case


def main() -> int:
    """Prints what the cases came to; 1 if there were failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one case; default: %(default)s")
    parser.add_argument("paths", nargs="+", metavar="FILE", help="files, or folders with files")
    args = parser.parse_args()
    cases = list(draw(find(args.paths), args.cases, args.seed))
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures, slowest, started = 0, 0.0, time.monotonic()
    for (path, _), ended in zip(cases, run(cases, args.limit), strict=True):
        slowest, started = max(slowest, time.monotonic() - started), time.monotonic()
        kind = "failed" if isinstance(ended, Failure) else "frames" if ended == "frames" else "refused"
        counts[pathlib.Path(path).suffix.lower()][kind] += 1
        if isinstance(ended, Failure):
            failures += 1
            print(ended, flush=True)
    for suffix, count in sorted(counts.items()):
        numbers = "".join(f"{count[kind]:8} {kind}" for kind in ("frames", "refused", "failed"))
        print(f"{suffix or 'no suffix':10}{numbers}")
    print(f"{len(cases)} cases, {failures} failures, the slowest took {slowest:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
