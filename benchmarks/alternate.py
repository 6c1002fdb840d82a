"""Measures programs that do the same thing in turn, each in its own process.

A benchmark names its sides, that is the programs to compare, and calls `measure`; the process of each side calls
`serve`. Processes stay alive and take turns, so that all are warm and a machine that slows down slows all of them. If
they do not fit into memory together, or their start is part of the measurement, every round starts new ones (`fresh`).
"""

import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil

OURS, THEIRS = "ours", "PyTorch"
Result = dict[str, Any]
#: For each side: `about`, what it reported when ready; `rounds`, its measurements; `error`, why it ended early, or "".
Found = dict[str, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the arguments that all comparisons share."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--minutes", type=float, default=5.0, help="no round begins later, but for the second")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether it works")
    parser.add_argument("--sides", default="", help="only those that match one of these, as 'ours*;transformers'")
    parser.add_argument("--json", type=pathlib.Path, help="write all that was measured to this file, too")
    parser.add_argument("--cores", type=int, default=0, help="1 on a busy machine; 0 = all")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)


def pin(cores: int) -> None:
    """Restricts this process and its children to this many cores; 0 = no restriction.

    With one core, no side waits for threads that other processes keep from running, so that CPU seconds are comparable
    on a busy machine; with several, OpenMP would spin.
    """
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def number_of_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> float:
    """Peak resident memory in GB since this program started, without workers."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:  # rusage includes the time before exec
        return next(int(line.split()[1]) * 1024 / 1e9 for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def serve(prepare: Callable[[], tuple[Result, Callable[[], Result]]]) -> None:
    """The main function of a side: prepares, reports that it is ready, and measures a round whenever asked.

    Args:
      prepare: returns what to report before the first round, and a function that measures a round.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get into the answers
    start = time.perf_counter()

    def say(result: Result) -> None:
        print(json.dumps(result | {"peak_gb": peak_memory()}), file=answers, flush=True)

    about, work = prepare()
    say(about | {"prepared_s": time.perf_counter() - start})
    for _ in sys.stdin:
        say(work())


class _EndedError(Exception):
    """The process of a side ended; the message states why."""


class _Side:
    """The process of a side, as seen by the parent."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by `close`
        self._start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **environment},
        )

    def answer(self, limit: float) -> Result:
        assert self._process.stdout is not None
        timer = threading.Timer(limit, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        raise _EndedError(f"killed by signal {-status}, after {limit:.0f} s or for want of memory" if status < 0
                          else said[-1] if said else f"status {status}")  # fmt: skip

    def ask(self, limit: float) -> Result:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.answer(limit)

    def close(self) -> Result:
        """Lets the process end; returns the seconds from its start to its end."""
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=60)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()
        return {"seconds": time.perf_counter() - self._start}


def measure(
    module: str,
    sides: Mapping[str, Mapping[str, str]],
    args: argparse.Namespace,
    arguments: Sequence[str],
    *,
    fresh: bool = False,
    limit: float = 1800.0,
) -> Found:
    """Measures all sides in turn, in alternating order, so that none gets only the quieter moments of the machine.

    Args:
      module: run for each side as `python -m module --side=NAME ...`.
      sides: additions to the environment of the process, by name.
      args: with the arguments of `add_arguments`.
      arguments: command line arguments, passed on to the sides.
      fresh: uses a new process in each round, and also measures its lifetime and CPU seconds (`seconds`, `cpu`).
      limit: seconds within which a side must answer.
    """
    pin(args.cores)
    wanted = (args.sides or "*").split(";")
    sides = {name: more for name, more in sides.items() if any(fnmatch.fnmatchcase(name, one) for one in wanted)}
    found: Found = {name: {"about": {}, "rounds": [], "error": ""} for name in sides}
    alive: dict[str, _Side] = {}

    def start(name: str) -> None:
        found[name]["about"] = {}
        alive[name] = _Side(module, [*arguments, f"--side={name}"], sides[name])
        found[name]["about"] = alive[name].answer(limit)
        tell(f"{name}: {_short(found[name]['about'])}")

    def one_round(name: str) -> Result:
        if not fresh:
            return alive[name].ask(limit)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start(name)
        result = alive[name].ask(limit)
        result |= alive.pop(name).close()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return result | {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}

    @contextlib.contextmanager
    def noting_the_end(name: str) -> Iterator[None]:
        try:
            yield
        except _EndedError as error:
            found[name]["error"] = str(error)[:300]
            alive.pop(name).close()
            tell(f"{name}: {found[name]['error']}")

    try:
        for name in () if fresh else reversed(sides):  # ours last: it keeps its memory, and the others need less
            room = psutil.virtual_memory().available / 1e9
            need = 1.3 * max((found[other]["about"]["peak_gb"] for other in alive), default=0)
            if room < need:
                found[name]["error"] = f"not begun: {room:.1f} GB free beside the others; --sides measures it apart"
                tell(f"{name}: {found[name]['error']}")
                continue
            tell(f"{name}: starting ...")
            with noting_the_end(name):
                start(name)
        begun = time.monotonic()
        for number in range(args.rounds):
            if number > 1 and time.monotonic() - begun > 60 * args.minutes:
                break
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                if not found[name]["error"]:
                    with noting_the_end(name):
                        found[name]["rounds"].append(one_round(name))
                        tell(f"round {number + 1} of {args.rounds}, {name}: {_short(found[name]['rounds'][-1])}")
    finally:
        for side in alive.values():
            side.close()
    return found


def tell(text: str) -> None:
    """Reports progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def _short(result: Result) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())


def table(found: Found, columns: Mapping[str, str], key: str, peer: str, *, less: bool = False) -> str:
    """Markdown table with a row per side: medians over rounds with minimum and maximum (for memory only the maximum),
    and the ratio to a peer.

    Args:
      found: from `measure`.
      columns: titles of the measured values, by key; cells without a value stay empty.
      key: the value that is compared.
      peer: the side to compare with, round by round.
      less: whether lower is better.
    """
    lines = [f"| | {' | '.join(columns.values())} | times {peer} |", "|---" * (len(columns) + 2) + "|"]
    for name, side in found.items():
        if not side["rounds"]:
            lines.append(f"| {name} | failed: {side['error']}" + " |" * (len(columns) + 1))
            continue
        values = {column: [one[column] for one in side["rounds"] if column in one] for column in columns}
        values |= {"peak_gb": [max(values["peak_gb"])]} if values.get("peak_gb") else {}
        cells = [spread(values[column]) for column in columns]
        pairs = zip(side["rounds"], found.get(peer, side)["rounds"], strict=False)
        ratios = [theirs[key] / own[key] if less else own[key] / theirs[key] for own, theirs in pairs]
        cells.append("" if name == peer or peer not in found else spread(ratios))
        note = f" (then failed: {side['error']})" if side["error"] else ""
        lines.append(f"| {name}{note} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Median, with minimum and maximum if they differ, to three digits."""
    if not values:
        return ""
    low, middle, high = (f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}" for value in (
        min(values), statistics.median(values), max(values)))  # fmt: skip
    return middle if low == high else f"{middle} ({low} to {high})"


def report(args: argparse.Namespace, title: str, found: Any, text: str) -> None:
    """Prints a table below a title line, and writes all measurements to `--json`."""
    machine = f"{platform.machine()}, {number_of_cores()} cores, load {os.getloadavg()[1]:.1f} in the last five minutes"
    line = f"{title} ({machine})"
    print(f"{line}\n\n{text}\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        content = {"title": line, "date": date, "table": text, "measured": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
