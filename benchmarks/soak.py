"""A long run with a checkpoint, a probe and pictures every minute, and the memory that it and its workers use.

    python -m benchmarks.soak --data=data/demo [--minutes=30] [--output=docs/soak.png]

The model of the demo in batches of 16, with one loader process. A short run first measures the steps per minute.
Memory is anonymous and shared memory, from /proc, without pages backed by files, such as libraries, which the system
can drop and read again at any time. A page shared by several processes counts once (PSS).
"""

import argparse
import collections
import json
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import matplotlib
import psutil

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WARM_UP = 15  # minutes: the peak is only reached after some probes
_BATCH = 16
_EVENTS = ("checkpoint.every", "probe.every", "log.pictures_every")

Sample = tuple[float, float, float]  # minutes since the start, MB of the main process, MB of all processes


def start(data: str, workdir: pathlib.Path, steps: int, every: int) -> subprocess.Popen:
    """Starts a run that writes a checkpoint, probes and draws pictures every `every` steps."""
    fields = {"data.path": data, "probe.data.path": data, "probe.data.split": "test", "data.workers": 1}
    fields |= {"train.batch_size": _BATCH, "train.steps": steps, "log.every": 25} | dict.fromkeys(_EVENTS, every)
    overriding = [f"--config.{name}={value}" for name, value in fields.items()]
    door = [sys.executable, "-m", "usfmae_jax.main", "--config=configs/pretrain.py:demo", f"--workdir={workdir}"]
    return subprocess.Popen([*door, *overriding], stderr=(workdir.parent / "log.txt").open("w"))


def memory(process: psutil.Process) -> tuple[float, float]:
    """Memory in MB of a process, and of it together with all its descendants."""
    sizes = []
    for member in (process, *process.children(recursive=True)):
        try:
            pages = pathlib.Path(f"/proc/{member.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended in the meantime
            continue
        sizes.append(sum(map(int, re.findall(r"Pss_(?:Anon|Shmem): +(\d+) kB", pages))) * 1024 / 1e6)
    return sizes[0], sum(sizes)


def soak(data: str, minutes: float, folder: pathlib.Path) -> list[Sample]:
    """Lets a run last for `minutes` and then asks it to stop; exits with its log if it does not end as expected."""
    trial = start(data, folder / "trial", 400, 400)
    if trial.wait():
        sys.exit((folder / "log.txt").read_text()[-2000:])
    lines = [json.loads(line) for line in (folder / "trial" / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(line["images_per_second"] for line in lines if "images_per_second" in line)
    every = max(round(60 * speed / _BATCH), 1)
    print(f"{speed:.0f} images/s: everything every {every} steps", file=sys.stderr)
    run = start(data, folder / "run", 10**8, every)
    samples, begin = [], time.monotonic()
    while run.poll() is None and time.monotonic() - begin < 60 * minutes:
        samples.append(((time.monotonic() - begin) / 60, *memory(psutil.Process(run.pid))))
        time.sleep(3)
    run.send_signal(signal.SIGTERM)
    if run.wait(timeout=300) != 75:  # the status after saving and stopping
        sys.exit((folder / "log.txt").read_text()[-2000:])
    return samples


def by_minute(samples: list[Sample]) -> dict[int, float]:
    """Median memory of all processes in MB, for every minute after the warm-up."""
    found = collections.defaultdict(list)
    for minute, _, size in samples:
        found[int(minute)].append(size)
    return {minute: statistics.median(sizes) for minute, sizes in found.items() if minute >= WARM_UP}


def plot(samples: list[Sample], output: pathlib.Path) -> None:
    """Draws memory against time."""
    times, main_process, everything = zip(*samples, strict=True)
    figure, axis = plt.subplots(figsize=(7, 3))
    axis.plot(times, everything, color="#1f5f8b", linewidth=1, label="with its loader process")
    axis.plot(times, main_process, color="#d99a2b", linewidth=1, label="main process")
    axis.axvspan(0, WARM_UP, color="#999999", alpha=0.15, linewidth=0)
    axis.set(xlabel="minutes", ylabel="memory, MB", ylim=(0, None), xlim=(0, times[-1]))
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def main() -> None:
    """Runs, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/soak.png"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        samples = soak(args.data, args.minutes, folder)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    plot(samples, args.output)
    sizes = list(by_minute(samples).values())
    first, last = statistics.median(sizes[:5]), statistics.median(sizes[-5:])
    probes = sum("probe/rankme" in line for line in lines)
    print(f"{samples[-1][0]:.0f} minutes, {lines[-1]['step']} steps of {_BATCH}, {probes} probes")
    print("| | MB |\n|---|---|")
    print(f"| median of minutes {WARM_UP} to {WARM_UP + 5} | {first:.0f} |\n| median of the last five | {last:.0f} |")
    print(f"| change | {last / first - 1:+.1%} |")
    print(f"| lowest and highest median of a minute | {min(sizes):.0f}, {max(sizes):.0f} |")
    print(f"| highest sample | {max(size for _, _, size in samples):.0f} |")


if __name__ == "__main__":
    main()
