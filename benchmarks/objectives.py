r"""Compares objectives and settings of pretraining for equal training time: small models, several seeds, probes.

    python -m benchmarks.objectives --data='data/aul,data/hc' --phantoms=data/demo --probe=data/bus_bra \
        --output=objectives.jsonl --work=runs/objectives [--minutes=10] [--settings=mae,cross] \
        [--variant=demo] [--attentive]
    python -m benchmarks.objectives --output=objectives.jsonl --summary

Trains each setting with each seed for as many steps as fit into the given CPU minutes of one core, which equal the
wall-clock time of an otherwise idle core. The speed is measured in a short run first. Then probes the features on
frames that were not trained on, and on the phantoms' test split. The output file gets a line for each finished part;
the same command resumes from there. With `--attentive`, runs that were finished without that probe get it, as long as
their folders in `--work` exist.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

PLAIN = "mae"
#: By name: overrides of a variant of `configs/pretrain.py`, where {real} and {phantoms} stand for shards; or a
#: checkpoint to be probed without any training.
SETTINGS: dict[str, dict[str, Any] | str] = {
    "pixels": "pixels",
    "untrained": "random:tiny",
    PLAIN: {},
    "cross": {"objective": "cross_mae"},
    "cross_all": {"objective": "cross_mae", "mask.share": 1.0},
    "block2": {"mask.block": 2},
    "block4": {"mask.block": 4},
    "blur1": {"mask.blur": 1.0},
    "blur2": {"mask.blur": 2.0},
    "muon": {"optimizer.muon": True},
    "cross_muon": {"objective": "cross_mae", "optimizer.muon": True},
    "ema": {"train.ema": 0.995},
    "latent": {"objective": "latent", "train.ema": 0.996},
    "latent_block4": {"objective": "latent", "train.ema": 0.996, "mask.block": 4},
    "ratio50": {"mask.ratio": 0.5},
    "ratio60": {"mask.ratio": 0.6},
    "ratio85": {"mask.ratio": 0.85},
    "rate_0.0015": {"optimizer.learning_rate": 1.5e-3},
    "rate_0.006": {"optimizer.learning_rate": 6e-3},
    "crop50": {"augment.crop_scale": (0.5, 1.0)},
    "crop80": {"augment.crop_scale": (0.8, 1.0)},
    "pixel_targets": {"loss.normalize_targets": False},
    "fan_aware": {"mask.fan_aware": True},
    "view64": {"model.image_size": 64},
    "view96": {"model.image_size": 96},
    "view128_patch16": {"model.image_size": 128, "model.patch_size": 16},
    "batch256": {"train.batch_size": 256},
    "real_only": {"data.path": "{real}"},
    "phantoms_only": {"data.path": "{phantoms}"},
}
#: Overrides for every run: only a last checkpoint, no pictures, no probe, one loader thread and no loader process.
ALWAYS = {
    "checkpoint.every": 10**9, "log.every": 1, "log.pictures_every": 0, "probe.data.path": "", "data.workers": 0,
    "data.threads": 1,
}  # fmt: skip
METRICS = {"f1_macro": "macro-F1", "auroc": "AUROC"}
_ONE_THREAD = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # XLA; NumPy's libraries


class Runner:
    """Starts commands, each on its own core, and records their results."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.lock = args, threading.Lock()
        self.started: list[subprocess.Popen] = []
        self.cores: queue.Queue[int] = queue.Queue()
        cores = sorted(os.sched_getaffinity(0))
        for place in range(args.parallel):
            self.cores.put(cores[place % len(cores)])

    def start(self, core: int, module: str, log: pathlib.Path, *arguments: str) -> subprocess.Popen:
        """Starts `python -m usfmae_jax.MODULE` on one core; its output is appended to `log`."""
        os.sched_setaffinity(0, {core})  # of this thread, inherited by the process it starts
        command = [sys.executable, "-m", f"usfmae_jax.{module}", *arguments]
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | _ONE_THREAD)
        self.started.append(process)
        return process

    def stop(self) -> None:
        """Kills the processes that are still running."""
        for process in self.started:
            if process.poll() is None:
                process.kill()

    def training(self, setting: str, seed: int, workdir: pathlib.Path, steps: int) -> list[str]:
        """The arguments of a training run."""
        changed = self.args.table[setting]
        fields = {"seed": seed, "train.steps": steps, "data.path": "{real},{phantoms}"} | ALWAYS | changed
        fields["data.path"] = fields["data.path"].format(real=self.args.data, phantoms=self.args.phantoms).strip(",")
        overriding = [f"--config.{name}={value}" for name, value in fields.items()]
        return [f"--config=pretrain:{self.args.variant}", f"--workdir={workdir}", *overriding]

    def measure(self, setting: str, core: int) -> dict[str, Any]:
        """Images per CPU second after warm-up, and the number of steps that fit into the time."""
        first, more = self.args.trial
        workdir, log = self.fresh(f"{setting}-trial")
        process = self.start(core, "main", log, *self.training(setting, 0, workdir, 10**6))
        seconds = []
        for step in (first, first + more):
            while process.poll() is None and _steps(workdir) < step:
                time.sleep(0.05)
            _check(process, log)
            times = psutil.Process(process.pid).cpu_times()
            seconds.append(times.user + times.system)
        process.kill()
        process.wait()
        batch = json.loads((workdir / "config.json").read_text())["train"]["batch_size"]
        shutil.rmtree(workdir)
        cost = max(seconds[1] - seconds[0], 0.01) / more
        return {"trial": True, "images_per_second": batch / cost, "steps": max(1, round(60 * self.args.minutes / cost))}

    def train(self, setting: str, seed: int, core: int, steps: int) -> dict[str, Any]:
        """Trains and probes one seed of a setting."""
        workdir, log = self.fresh(f"{setting}-{seed}")
        found: dict[str, Any] = {"steps": steps}
        checkpoint = self.args.table[setting]
        if steps:
            start = time.monotonic()
            process = self.start(core, "main", log, *self.training(setting, seed, workdir, steps))
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            _check(process, log)
            losses = [line["loss"] for line in _lines(workdir / "metrics.jsonl") if "loss" in line]
            found |= {"wall_minutes": (time.monotonic() - start) / 60, "loss": statistics.mean(losses[-20:])}
            found["cpu_minutes"] = (usage.ru_utime + usage.ru_stime) / 60
            shutil.rmtree(workdir / "checkpoints")
            checkpoint = str(workdir / "encoder")
        asked = [(self.args.probe, "logistic"), (self.args.probe, "knn"), (self.args.phantoms, "logistic")]
        if self.args.attentive and checkpoint != "pixels":
            asked.append((self.args.probe, "attentive"))
        return found | {
            "probes": {
                f"{pathlib.Path(data).name} {protocol}": self.probe(core, checkpoint, data, protocol, workdir, log)
                for data, protocol in asked
                if data
            }
        }

    def late(self, setting: str, seed: int, core: int, steps: int) -> dict[str, Any]:
        """The attentive probe of a run that was finished without it."""
        workdir, log = self.args.work / f"{setting}-{seed}", self.args.work / f"{setting}-{seed}.log"
        name, checkpoint = f"{pathlib.Path(self.args.probe).name} attentive", self.args.table[setting]
        checkpoint = checkpoint if isinstance(checkpoint, str) else str(workdir / "encoder")
        found = self.probe(core, checkpoint, self.args.probe, "attentive", workdir, log)
        return {"steps": steps, "probes": {name: found}}

    def probe(
        self, core: int, checkpoint: str, data: str, protocol: str, workdir: pathlib.Path, log: pathlib.Path
    ) -> dict[str, Any]:
        """Runs `usfmae_jax.evaluate`; returns each metric with its interval and its values by fold."""
        where = workdir / f"{pathlib.Path(data).name}-{protocol}"
        fields = {"checkpoint": checkpoint, "data.path": data, "protocol": protocol, "examples": 0, "data.threads": 1}
        fields["cache"] = self.args.work / "cache"
        asked = [f"--config.{name}={value}" for name, value in fields.items()]
        process = self.start(core, "evaluate", log, "--config=evaluate:folder", f"--workdir={where}", *asked)
        process.wait()
        _check(process, log)
        results = json.loads((where / "results.json").read_text())
        folds = {name: results["folds"]["metrics"][name]["values"] for name in METRICS}
        return {name: results["metrics"][name] | {"folds": folds[name]} for name in METRICS}

    def fresh(self, name: str) -> tuple[pathlib.Path, pathlib.Path]:
        """An empty workdir, and a log file for the output of its processes."""
        workdir = self.args.work / name
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir(parents=True)
        return workdir, self.args.work / f"{name}.log"

    def part(self, setting: str, seed: int | None, steps: int = 0, late: bool = False) -> dict[str, Any]:
        """Runs one part of the comparison on a free core; appends its line to the output file."""
        core, start = self.cores.get(), time.monotonic()
        try:
            run = self.late if late else self.train
            found = self.measure(setting, core) if seed is None else run(setting, seed, core, steps)
        finally:
            self.cores.put(core)
        line = {"setting": setting, "seed": seed, "variant": self.args.variant, "minutes": self.args.minutes} | found
        with self.lock, self.args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line | {"took": time.monotonic() - start}


def _check(process: subprocess.Popen, log: pathlib.Path) -> None:
    if process.returncode:
        raise RuntimeError(f"{log} ends with status {process.returncode}:\n{log.read_text()[-1000:]}")


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _steps(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def compare(args: argparse.Namespace) -> int:
    """Runs the parts that have no line in the file yet, seed by seed, so that an early end leaves whole rounds.

    Returns:
      the number of failed parts; the others are done nevertheless.
    """
    lines, runner = _lines(args.output), Runner(args)
    failed: list[str] = []
    steps = {line["setting"]: line["steps"] for line in lines if line.get("trial")}
    done = {(line["setting"], line["seed"]) for line in lines}

    def do(parts: Sequence[tuple[str, int | None]], late: bool = False) -> None:
        missing = [part for part in parts if late or part not in done]
        futures = {pool.submit(runner.part, *part, steps.get(part[0], 0), late): part for part in missing}
        took: list[float] = []
        for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            name, seed = futures[future]
            try:
                line = future.result()
            except RuntimeError as error:
                failed.append(name)
                print(f"{name}, seed {seed}: {error}", file=sys.stderr, flush=True)
                continue
            steps[name] = line["steps"]
            took.append(line["took"])
            left = statistics.mean(took) * (len(futures) - number) / args.parallel / 60
            told = [f"{probe} {found['f1_macro']['value']:.3f}" for probe, found in line.get("probes", {}).items()]
            told = told or [f"{line['images_per_second']:.1f} images/s", f"{line['steps']} steps"]
            what = f"{number} of {len(futures)}, {left:.0f} minutes left: {name}, {'speed' if seed is None else seed}"
            print(f"{what}: {', '.join(told)}", file=sys.stderr, flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        try:
            trained = [name for name in args.settings if not isinstance(args.table[name], str)]
            do([(name, None) for name in trained])
            once = [(name, args.seeds[0]) for name in args.settings if name not in trained]
            do(once + [(name, seed) for seed in args.seeds for name in trained if name in steps])
            do(_without_attentive(args) if args.attentive else [], late=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    return len(failed)


def _without_attentive(args: argparse.Namespace) -> list[tuple[str, int | None]]:
    """The finished runs that have no attentive probe and can have one, seed by seed."""
    probed: dict[tuple[int, str], set[str]] = {}
    for line in _lines(args.output):
        if not line.get("trial") and line["setting"] in args.settings and line["seed"] in args.seeds:
            probed.setdefault((line["seed"], line["setting"]), set()).update(line["probes"])

    def usable(seed: int, name: str) -> bool:
        if isinstance(args.table[name], str):
            return args.table[name] != "pixels"
        return (args.work / f"{name}-{seed}/encoder").exists()

    missing = sorted(part for part, found in probed.items() if not any(one.endswith(" attentive") for one in found))
    return [(name, seed) for seed, name in missing if usable(seed, name)]


def summary(lines: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """Markdown table with a row per setting: percent, mean over seeds (range), and the difference to plain MAE.

    Differences are between runs of the same seed, given as mean and range; widths of intervals are stated below.
    """
    speeds = {line["setting"]: line["images_per_second"] for line in lines if line.get("trial")}
    runs: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        if not line.get("trial") and (not names or line["setting"] in names):
            seeds = runs.setdefault(line["setting"], {})
            before = seeds.get(line["seed"], line)["probes"]
            seeds[line["seed"]] = {**line, "probes": {**before, **line["probes"]}}
    probes = list(
        dict.fromkeys(probe for seeds in runs.values() for line in seeds.values() for probe in line["probes"])
    )
    columns = [(probe, metric) for probe in probes for metric in METRICS]
    heads = [f"{probe}, {METRICS[metric]}" for probe, metric in columns]
    rows = ["| setting | seeds | steps | images/s | " + " | ".join(heads) + " |", "|---" * (4 + len(heads)) + "|"]

    def values(setting: str, column: tuple[str, str]) -> dict[int, float]:
        found = {seed: line["probes"].get(column[0]) for seed, line in runs.get(setting, {}).items()}
        return {seed: 100 * one[column[1]]["value"] for seed, one in found.items() if one}

    for setting, seeds in runs.items():
        cells = []
        for column in columns:
            own, plain = values(setting, column), values(PLAIN, column)
            differences = [value - plain[seed] for seed, value in own.items() if seed in plain]
            cell = _spread(list(own.values()), ".1f")
            if differences and setting != PLAIN:
                cell += f"; {_spread(differences, '+.1f')}"
            cells.append(cell)
        steps = " to ".join(map(str, sorted({line["steps"] for line in seeds.values()})))
        speed = f"{speeds[setting]:.0f}" if setting in speeds else ""
        rows.append(f"| {setting} | {len(seeds)} | {steps} | {speed} | " + " | ".join(cells) + " |")
    widths = []
    for (probe, metric), head in zip(columns, heads, strict=True):
        found = [
            line["probes"][probe][metric]["ci95"]
            for s in runs.values()
            for line in s.values()
            if probe in line["probes"]
        ]
        half = [50 * (high - low) for low, high in filter(None, found)]
        widths.append(f"{head} ± {statistics.median(half):.1f}" if half else f"{head} -")
    return "\n".join([*rows, "", "Half of a 95% interval over patients, median: " + "; ".join(widths) + "."])


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def _added(text: str) -> tuple[str, dict[str, Any]]:
    name, *fields = text.split()
    return name, dict(field.split("=", 1) for field in fields)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; the result includes `table`, all settings by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="shards to train on: folders or globs, separated by commas")
    parser.add_argument("--phantoms", default="", help="simulated shards: trained on too, and probed by their splits")
    parser.add_argument("--probe", default="", help="labelled shards that nothing was trained on")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON lines; finished parts are passed over")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/objectives"), help="for the runs")
    parser.add_argument("--variant", default="tiny", help="of configs/pretrain.py, to which settings are changes")
    parser.add_argument("--minutes", type=float, default=10, help="CPU minutes of training on one core")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--settings", default="", help="names, separated by commas; default: all")
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        type=_added,
        metavar="'NAME FIELD=VALUE ...'",
        help="a setting more",
    )
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each on a core of its own")
    parser.add_argument("--attentive", action="store_true", help="the attentive probe too, minutes a run")
    parser.add_argument(
        "--trial",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(10, 30),
        help="steps to warm up, and timed",
    )
    parser.add_argument(
        "--summary", action="store_true", help="print the table of the lines there are, and run nothing"
    )
    args = parser.parse_args(argv)
    args.table = SETTINGS | dict(args.add)
    args.settings = args.settings.split(",") if args.settings else list(args.table)
    if unknown := set(args.settings) - args.table.keys():
        parser.error(f"--settings: there is no {', '.join(sorted(unknown))}, but {', '.join(args.table)}")
    if not args.summary and not (args.probe and (args.data or args.phantoms)):
        parser.error("--probe, and --data or --phantoms, are missing")
    for name in ("minutes", "variant"):
        if not args.summary and any(line[name] != getattr(args, name) for line in _lines(args.output)):
            parser.error(f"--output={args.output} has runs of another --{name}: name another file")
    return args


def main() -> None:
    """Runs the comparison and prints the table."""
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that child processes are ended, too
    try:
        failed = 0 if args.summary else compare(args)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on after what is finished")
    print(summary(_lines(args.output), args.settings))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
