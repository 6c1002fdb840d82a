"""Two programs that do the same, measured in turn in processes of their own."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

OURS, THEIRS = "ours", "PyTorch"
Result = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds what both benchmarks ask."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--cores", type=int, default=0, help="1 on a busy machine, and compare CPU seconds; 0 = all")
    parser.add_argument("--workers", type=int, default=1, help="of PyTorch's DataLoader")
    parser.add_argument("--compile", action="store_true", help="compile the PyTorch model")
    parser.add_argument("--torch_python", default=sys.executable, help="a Python that has torch, OpenCV, scikit-learn")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)


def need_torch(python: str) -> None:
    """Ends the program with a sentence when PyTorch is absent."""
    if subprocess.run([python, "-c", "import torch"], stderr=subprocess.DEVNULL, check=False).returncode:
        sys.exit(
            f"{python} has no PyTorch, which nothing but this comparison needs: pip install torch "
            "--index-url https://download.pytorch.org/whl/cpu, or name a Python that has it with --torch_python="
        )


def pin(cores: int) -> None:
    """Leaves this process and those that it starts only so many cores; 0 leaves all.

    With one core no side spends time waiting for threads that others keep from running: CPU seconds on a busy machine
    are then comparable, which they are not where OpenMP spins.
    """
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def run_side(python: str, module: str, side: str, arguments: Sequence[str]) -> Result:
    """Runs `python -m module --side=SIDE`, of which the last line of output is JSON.

    Adds `seconds`, the life of the process, and `cpu`, the CPU seconds of it and its workers.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [python, "-m", module, f"--side={side}", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        sys.exit(f"the side {side!r} failed with status {done.returncode}")
    return {"seconds": seconds, "cpu": cpu} | json.loads(done.stdout.splitlines()[-1])


def alternate(module: str, args: argparse.Namespace, arguments: Sequence[str]) -> Mapping[str, list[Result]]:
    """Both sides in turn, the first one changing, so that neither has the quieter moments of the machine."""
    found: dict[str, list[Result]] = {OURS: [], THEIRS: []}
    pythons = {OURS: sys.executable, THEIRS: args.torch_python}
    for number in range(args.rounds):
        for side in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            found[side].append(run_side(pythons[side], module, side, arguments))
            print(f"round {number + 1}, {side}: {found[side][-1]}", file=sys.stderr, flush=True)
    return found


def table(found: Mapping[str, list[Result]], rows: Mapping[str, str]) -> str:
    """Markdown: a row per measured key, seconds of both sides and how many times faster ours is."""
    lines = [
        "| | ours, s (median) | PyTorch, s (median) | times faster (min, median, max) |",
        "|---|---|---|---|",
    ]
    for key, title in rows.items():
        ours, theirs = ([result[key] for result in found[side]] for side in (OURS, THEIRS))
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        spread = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
        lines.append(f"| {title} | {statistics.median(ours):.1f} | {statistics.median(theirs):.1f} | {spread} |")
    return "\n".join(lines)
