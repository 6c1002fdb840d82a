"""Kills and stops every long job at chosen and random moments, and prints what came of it: `make faults`.

    python -m tests.faults --times=20 --seed=0

A job is run undisturbed. Then, again and again: it is started, hit at some moment of that time, and given the same
command until it is done. What it leaves has to be bitwise what the undisturbed one left. Of the moments most are
random; some wait for a checkpoint to be in the middle of its writing, and some for the first compilation, for which
the cache of compiled programs is left out.

Jobs are forked from this process, which has imported what they need and has started nothing of JAX: the imports would
take most of the time. Two kinds of jobs go on at a time.
"""

import argparse
import collections
import hashlib
import os
import pathlib
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable

from tests.pretraining.runs import command, environment

JOBS = ("pretrain", "finetune", "evaluate", "build")
HITS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
#: Exit codes of a job that was hit: killed, done before it was hit, stopped, ended by the signal before it listened.
EXPECTED = {
    "SIGKILL": {-9, 0},
    "SIGTERM": {75, 0, -15},
    "Ctrl-C": {75, 0, 130, -2},
}
CHECKPOINT, COMPILE = "inside a checkpoint write", "inside the first compile"
#: Of every twenty moments so many are of these kinds, for jobs that have them; the others are random.
CHOSEN = {CHECKPOINT: 5, COMPILE: 3}
_MODEL = ("image_size=32", "patch_size=8", "width=32", "depth=2", "num_heads=2")
_WEIGHTS = ("**/model.safetensors", "**/predictions.csv")
_COMPILING, _COMPILED = "compiling the training step ...", r"compiling the training step took ([0-9.]+) s"


def _door(name: str, config: str, data: str, workdir: pathlib.Path, *fields: str) -> list[str]:
    door = [sys.executable, "-m", f"usfmae_jax.{name}", f"--config={config}", f"--workdir={workdir}"]
    return [*door, f"--config.data.path={data}", *(f"--config.{field}" for field in fields)]


def line(job: str, data: str, folder: pathlib.Path) -> tuple[list[str], tuple[str, ...]]:
    """The command of a job that works in `folder`, and globs of what has to be the same."""
    if job == "build":
        flags = ("--patients=60", "--frames=2", "--image_size=64", "--workers=1", f"--output={folder}")
        return [sys.executable, "-m", "data_prep.build", "--dataset=phantom", *flags], ("**/*.array_record-*",)
    if job == "pretrain":
        return command(data, folder, train__steps=18), _WEIGHTS
    split = ("split.kind=group", "split.folds=2", "split.duplicates=false")
    if job == "finetune":
        model = [f"model.{field}" for field in _MODEL]
        how = ("train.steps=10", "train.batch_size=16", "stop.every=2.0", "evaluate.bootstrap=20", "parallel=1")
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


class Process:
    """A job in a process and group of its own, forked from this one, as if its command had been typed.

    Args:
      words: the command, `python -m MODULE FLAGS`.
      log: receives what it prints; emptied before.
      cache: folder for compiled programs; none without it.
    """

    def __init__(self, words: list[str], log: pathlib.Path, cache: pathlib.Path | None):
        log.write_text("")
        self.pid, self.began, self._code = os.fork(), time.monotonic(), -1
        if not self.pid:
            _become(words, log, cache)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
        """Its exit code; None when it is still at work after some seconds, or when something has come true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.0005)
        return None

    def hit(self, number: int) -> int:
        """Sends its group a signal; returns its exit code."""
        os.killpg(self.pid, number)
        code = self.wait(120)
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError("two minutes after the signal the job is still there")
        return code


def _become(words: list[str], log: pathlib.Path, cache: pathlib.Path | None) -> None:
    """What the forked process does; does not return."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache) if cache else None)
    sys.argv = [words[2], *words[3:]]
    code: object = 0
    try:
        runpy.run_module(words[2], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:  # as Python itself ends of it
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def finish(words: list[str], log: pathlib.Path, cache: pathlib.Path | None, tries: int = 3) -> float:
    """Gives a command until it ends with 0; returns the seconds that took; raises AssertionError if it does not."""
    began = time.monotonic()
    for _ in range(tries):
        if Process(words, log, cache).wait(600) == 0:
            return time.monotonic() - began
    raise AssertionError(f"the job does not end well: {_end(log)}")


def _end(log: pathlib.Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def writes(folder: pathlib.Path) -> set[pathlib.Path]:
    """Checkpoints that are being written, or were when the job was killed."""
    return {*folder.glob("checkpoints/*orbax-checkpoint-tmp*"), *folder.glob("*/*/checkpoints/*orbax-checkpoint-tmp*")}


def _until(folder: pathlib.Path, count: int) -> Callable[[], bool]:
    """Tells whether so many checkpoints have begun to be written."""
    seen: set[pathlib.Path] = set()

    def begun() -> bool:
        seen.update(writes(folder))
        return len(seen) >= count

    return begun


def compiles(log: pathlib.Path) -> bool:
    """Whether a job is compiling its training step, or was when it was killed."""
    said = log.read_text(errors="replace")
    return _COMPILING in said and not re.search(_COMPILED, said)


def try_fault(job: str, fault: str, times: int, data: str, draw: random.Random, cache: pathlib.Path) -> str:
    """Hits a job several times; returns what came of it as a row of a table."""
    with tempfile.TemporaryDirectory() as name:
        base = pathlib.Path(name)
        log = base / "log"
        words, globs = line(job, data, base / "first")
        cold = finish(words, log, None)
        took = re.search(_COMPILED, log.read_text())
        words, _ = line(job, data, base / "warm")
        finish(words, log, cache)
        words, _ = line(job, data, base / "whole")
        whole = finish(words, log, cache)
        expected = digest(base / "whole", globs)
        assert expected == digest(base / "first", globs), f"{job}: two undisturbed runs differ"
        kinds = [kind for kind, of_twenty in CHOSEN.items() if took for _ in range(round(of_twenty * times / 20))]
        outcomes, fell, lost = collections.Counter[str](), collections.Counter[str](), []
        for number, kind in enumerate(kinds + ["random"] * (times - len(kinds))):
            folder = base / f"hit-{number}"
            words, _ = line(job, data, folder)
            process = Process(words, log, None if kind == COMPILE else cache)
            if kind == CHECKPOINT:  # one of the first few, a bit after it began
                code = process.wait(600, _until(folder, draw.randint(1, 4)))
                code = process.wait(draw.uniform(0, 0.01)) if code is None else code
            elif kind == COMPILE:
                code = process.wait(600, lambda: compiles(log))
                code = process.wait(draw.uniform(0, float(took[1]))) if code is None else code  # type: ignore[index]
            else:
                code = process.wait(draw.uniform(0.05, whole))
            if code is None:
                inside = [COMPILE] if compiles(log) else [CHECKPOINT] if writes(folder) else ["elsewhere"]
                code = process.hit(HITS[fault])
                fell.update(inside)
            ran = time.monotonic() - process.began
            assert code in EXPECTED[fault], f"{job} after {fault}: exit code {code}: {_end(log)}"
            again = finish(words, log, cache)
            lost.append(max(0.0, ran + again - (cold if kind == COMPILE else whole)))
            outcomes["bitwise the same" if digest(folder, globs) == expected else "DIFFERENT"] += 1
    came = ", ".join(f"{count} {what}" for what, count in outcomes.items())
    moments = ", ".join(f"{fell[kind]} {kind}" for kind in (CHECKPOINT, COMPILE) if fell[kind]) or "-"
    row = f"| {job} | {fault} | {fell.total()} | {moments} | {came} | {sum(lost) / times:.1f} of {whole:.1f} s"
    return row + f", most {max(lost):.1f} |"


def try_job(job: str, faults: Iterable[str], times: int, seed: int, data: str) -> bool:
    """Prints a row for each fault of a job; returns whether every promise was kept."""
    kept = True
    with tempfile.TemporaryDirectory() as cache:
        for fault in faults:
            try:
                row = try_fault(job, fault, times, data, random.Random(f"{seed} {job} {fault}"), pathlib.Path(cache))
            except AssertionError as error:
                row, kept = f"| {job} | {fault} | BROKEN: {error} |", False
            kept &= "DIFFERENT" not in row
            os.write(1, f"{row}\n".encode())
    return kept


def _import_all() -> None:
    """What all jobs import, once."""
    import usfmae_jax.finetuning.loop
    import usfmae_jax.pretraining.loop
    import usfmae_jax.probing.loop  # noqa: F401


def main() -> int:
    """Prints the table; returns 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="of each fault; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    parser.add_argument("--jobs", default=",".join(JOBS), help="default: %(default)s")
    parser.add_argument("--faults", default=",".join(HITS), help="default: %(default)s")
    parser.add_argument("--parallel", type=int, default=2, help="kinds of jobs at a time; default: %(default)s")
    args = parser.parse_args()
    os.environ |= environment() | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    _import_all()
    kept = True
    with tempfile.TemporaryDirectory() as data:
        make = [sys.executable, "-m", "data_prep.build", "--dataset=phantom", "--patients=24", "--frames=2"]
        subprocess.run([*make, "--image_size=64", f"--output={data}"], check=True, capture_output=True)
        print("| job | fault | hits | among them | after the same command again | time lost, start included |")
        print("|---|---|---|---|---|---|", flush=True)
        waiting, running = args.jobs.split(","), 0
        while waiting or running:
            if waiting and running < args.parallel:
                job = waiting.pop(0)
                running += 1
                if not os.fork():
                    code = 1
                    try:
                        code = int(not try_job(job, args.faults.split(","), args.times, args.seed, data))
                    except BaseException:
                        traceback.print_exc()
                    os._exit(code)
                continue
            kept &= os.wait()[1] == 0
            running -= 1
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
