"""Kills and stops every long job at random moments, and prints what came of it: `make faults`.

    python -m tests.faults --times=20 --seed=0

A job is run once undisturbed. Then, again and again: it is started, hit at a random moment of that time, and given the
same command until it is done. What it leaves has to be bitwise what the undisturbed one left.
"""

import argparse
import collections
import hashlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

from tests.pretraining.runs import command, environment

JOBS = ("build", "pretrain", "finetune", "evaluate")
HITS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
#: Exit codes of a job that was hit: killed, done before it was hit, stopped after saving, ended by the signal.
EXPECTED = {
    "SIGKILL": {-9, 0},
    "SIGTERM": {75, 0, -15},  # -15: before the loop listens, or where there is none
    "Ctrl-C": {75, 0, 130, -2, 1},
}
_MODEL = ("image_size=32", "patch_size=8", "width=32", "depth=2", "num_heads=2")
_WEIGHTS = ("**/model.safetensors", "**/predictions.csv")


def _door(name: str, config: str, data: str, workdir: pathlib.Path, *fields: str) -> list[str]:
    door = [sys.executable, "-m", f"usfmae_jax.{name}", f"--config={config}", f"--workdir={workdir}"]
    return [*door, f"--config.data.path={data}", *(f"--config.{field}" for field in fields)]


def line(job: str, data: str, folder: pathlib.Path) -> tuple[list[str], tuple[str, ...]]:
    """The command of a job that works in `folder`, and globs of what has to be the same."""
    if job == "build":
        flags = ("--patients=60", "--frames=2", "--image_size=64", "--workers=1", f"--output={folder}")
        return [sys.executable, "-m", "data_prep.build", "--dataset=phantom", *flags], ("**/*.array_record-*",)
    if job == "pretrain":
        return command(data, folder, train__steps=30), _WEIGHTS
    split = ("split.kind=group", "split.folds=2", "split.duplicates=false")
    if job == "finetune":
        model = [f"model.{field}" for field in _MODEL]
        how = ("train.steps=16", "train.batch_size=16", "stop.every=2.0", "evaluate.bootstrap=20", "parallel=1")
        return _door("finetune", "configs/finetune.py:folder", data, folder, *split, *model, *how), _WEIGHTS
    how = ("checkpoint=pixels", "bootstrap=20", f"cache={folder / 'cache'}")
    return _door("evaluate", "configs/evaluate.py:folder", data, folder, *split, *how), _WEIGHTS


def digest(folder: pathlib.Path, globs: Iterable[str]) -> str:
    """Hash of names and contents of files below a folder; raises AssertionError when there are none."""
    found = sorted({path for glob in globs for path in folder.glob(glob) if "checkpoints" not in path.parts})
    assert found, f"nothing in {folder}"
    whole = hashlib.sha256()
    for path in found:
        whole.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return whole.hexdigest()


def start(words: list[str], log: pathlib.Path) -> subprocess.Popen:
    """Starts a job in a group of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(words, env=environment(), stdout=file, stderr=file, start_new_session=True)


def hit(words: list[str], number: int, after: float, log: pathlib.Path) -> tuple[int, float]:
    """Starts a job and sends its group a signal after some seconds; returns its exit code and the seconds it ran."""
    began = time.monotonic()
    process = start(words, log)
    try:
        return process.wait(timeout=after), time.monotonic() - began
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number)
        return process.wait(timeout=120), time.monotonic() - began


def finish(words: list[str], log: pathlib.Path, tries: int = 3) -> float:
    """Gives a command until it ends with 0; returns the seconds that took; raises AssertionError if it does not."""
    began = time.monotonic()
    for _ in range(tries):
        if start(words, log).wait(timeout=600) == 0:
            return time.monotonic() - began
    raise AssertionError(f"the job does not end well: {_end(log)}")


def _end(log: pathlib.Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def try_fault(job: str, fault: str, times: int, data: str, draw: random.Random, say: Callable[[str], None]) -> None:
    """Hits a job several times, and says what came of it as a row of a table."""
    with tempfile.TemporaryDirectory() as name:
        base = pathlib.Path(name)
        words, globs = line(job, data, base / "whole")
        whole = finish(words, base / "log")
        expected, outcomes, lost = digest(base / "whole", globs), collections.Counter[str](), []
        for number in range(times):
            folder = base / f"hit-{number}"
            words, _ = line(job, data, folder)
            code, ran = hit(words, HITS[fault], draw.uniform(0.2, whole), base / "log")
            assert code in EXPECTED[fault], f"{job} after {fault}: exit code {code}: {_end(base / 'log')}"
            lost.append(max(0.0, ran + finish(words, base / "log") - whole))
            same = digest(folder, globs) == expected
            outcomes["bitwise the same" if same else "DIFFERENT"] += 1
    came = ", ".join(f"{count} {what}" for what, count in outcomes.items())
    say(f"| {job} | {fault} | {times} | {came} | {sum(lost) / times:.0f} of {whole:.0f} s, most {max(lost):.0f} |")
    assert "DIFFERENT" not in outcomes


def main() -> None:
    """Prints the table; ends with an AssertionError where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="of each fault; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    parser.add_argument("--jobs", default=",".join(JOBS), help="default: %(default)s")
    parser.add_argument("--faults", default=",".join(HITS), help="default: %(default)s")
    args = parser.parse_args()
    say = lambda text: print(text, flush=True)  # noqa: E731
    say("| job | fault | times | outcome | time lost, start included |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as data:
        make = [sys.executable, "-m", "data_prep.build", "--dataset=phantom", "--patients=24", "--frames=2"]
        subprocess.run([*make, "--image_size=64", f"--output={data}"], check=True, capture_output=True)
        for job in args.jobs.split(","):
            for fault in args.faults.split(","):
                try_fault(job, fault, args.times, data, random.Random(f"{args.seed} {job} {fault}"), say)


if __name__ == "__main__":
    main()
