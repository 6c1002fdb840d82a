"""How long a user waits: from the command to the first step, and to a probe that shows that something was learnt.

    python -m benchmarks.start [--variants=demo,tiny,base]
    python -m benchmarks.start --demo [--gain=0.05]

The time to the first step is measured from the start of the process to the first line in `metrics.jsonl`, with an
empty, with a filled and without a compilation cache (`JAX_COMPILATION_CACHE_DIR`; on a CPU nothing is cached unless
that names a folder). `--demo` measures `make pretrain` with everything installed: simulating the frames, unless --data
names shards, and training until the AUROC of logistic regression on frozen features is `--gain` above that of random
weights; then the run is stopped.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import alternate

_SMALL = ["model.width=32", "model.depth=1", "model.decoder_width=16", "probe.limit=48"]


def run(config: str, changes: list[str], workdir: pathlib.Path, cache: str, enough: Callable[[Any], bool]) -> Any:
    """Trains until a line of the log satisfies `enough`, then stops the run.

    Returns:
      that line, with `seconds` since the start of the process; or a dict with `error`, why there is none.
    """
    command = [sys.executable, "-m", "usfmae_jax.main", f"--config={config}", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if not cache:
        environment.pop("JAX_COMPILATION_CACHE_DIR")
    log, seen = workdir / "metrics.jsonl", 0
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, *(f"--config.{change}" for change in changes)], stderr=said, stdout=said, env=environment
        )
        try:
            while True:
                ended = process.poll() is not None
                lines = log.read_text().splitlines(keepends=True) if log.exists() else []
                for line in lines[seen:]:
                    if line.endswith("\n"):
                        seen += 1
                        found = json.loads(line) | {"seconds": time.perf_counter() - start}
                        if enough(found):
                            return found
                if ended:
                    said.seek(0)
                    text = said.read().strip().splitlines()
                    return {"error": text[-1] if process.returncode else "the run ended without it"}
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(300)


def first_steps(args: argparse.Namespace, data: str) -> None:
    """Measures every variant with an empty, a filled and no compilation cache."""
    found: dict[str, Any] = {}
    lines = ["| | empty cache, s | filled cache, s | no cache, s |", "|---|---|---|---|"]
    for variant in args.variants.split(","):
        cells: dict[str, list[Any]] = {}
        with tempfile.TemporaryDirectory() as cache:
            for number in range(args.rounds):
                for how, place in (("empty", f"{cache}/{number}"), ("filled", f"{cache}/{number}"), ("no", "")):
                    changes = [
                        f"data.path={data}",
                        "data.exclude=()",
                        "data.workers=0",
                        "probe.data.path=",
                        "log.every=1",
                    ]
                    changes += ["train.steps=2", *(_SMALL if args.quick else [])]
                    batch = {"base": 16}.get(variant, 64)
                    changes += [f"train.batch_size={8 if args.quick else batch}", *args.set]
                    with tempfile.TemporaryDirectory() as folder:
                        line = run(
                            f"pretrain:{variant}", changes, pathlib.Path(folder), place, lambda line: "loss" in line
                        )
                    cells.setdefault(how, []).append(line)
                    alternate.tell(f"{variant}, {how} cache: {line}")
        found[variant] = cells
        texts = [
            next((one["error"] for one in ones if "error" in one), "")
            or alternate.spread([one["seconds"] for one in ones])
            for ones in cells.values()
        ]
        lines.append(f"| :{variant} | {' | '.join(texts)} |")
    alternate.report(args, "start: from the command to the first step", found, "\n".join(lines))


def demo(args: argparse.Namespace, data: str, simulated: float) -> None:
    """Measures the time until the probe is better than on random weights."""
    scores: list[tuple[float, int, float]] = []

    def enough(line: Any) -> bool:
        if "probe/logistic_auroc" not in line:
            return False
        scores.append((line["seconds"], line["step"], line["probe/logistic_auroc"]))
        alternate.tell(f"step {line['step']}, {line['seconds']:.0f} s: AUROC {line['probe/logistic_auroc']:.3f}")
        return scores[-1][2] >= scores[0][2] + args.gain

    small = ["train.steps=4", "probe.every=2", *_SMALL] if args.quick else []
    changes = [f"data.path={data}", f"probe.data.path={data}", *small, *args.set]
    with tempfile.TemporaryDirectory() as folder:
        last = run("pretrain:demo", changes, pathlib.Path(folder), "", enough)
    rows = "\n".join(
        f"| {step:,} | {(simulated + seconds) / 60:.2f} | {score:.3f} |" for seconds, step, score in scores
    )
    text = f"| step | minutes | AUROC, logistic |\n|---|---|---|\n{rows}"
    if "error" in last:
        text += f"\n\n{args.gain:g} above random was not seen: {last['error']}."
    title = f"`make pretrain` to a probe {args.gain:g} above random, {simulated:.0f} s of it simulation"
    alternate.report(args, title, {"scores": scores, "simulated": simulated, "last": last}, text)


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="shards; default: phantoms, simulated first")
    parser.add_argument("--variants", default="demo,tiny,base", help="of configs/pretrain.py; base in batches of 16")
    parser.add_argument("--demo", action="store_true", help="to a probe above random instead")
    parser.add_argument("--gain", type=float, default=0.05, help="of AUROC")
    parser.add_argument("--set", action="append", default=[], help="a field of the config, such as probe.every=100")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether it works")
    parser.add_argument("--json", type=pathlib.Path, help="write all that was measured to this file, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, simulated = args.data, 0.0
        if not data:
            alternate.tell("simulating frames ...")
            size = ["--patients=100", "--frames=1"] if args.quick or not args.demo else []
            start, data = time.perf_counter(), f"{folder}/demo"
            command = [sys.executable, "-m", "data_prep.build", "--dataset=phantom", f"--output={data}", *size]
            subprocess.run(command, check=True, capture_output=True)
            simulated = time.perf_counter() - start
        if args.demo:
            demo(args, data, simulated)
        else:
            first_steps(args, data)


if __name__ == "__main__":
    main()
