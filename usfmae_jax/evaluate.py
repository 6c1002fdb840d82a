"""Test an encoder with a probe, or a fine-tuned model, on labelled frames; or compare two such runs.

    python -m usfmae_jax.evaluate --config=evaluate:busbra --config.checkpoint=runs/pretrain-tiny
    python -m usfmae_jax.evaluate --config=suite --config.suite.checkpoints=A,B --config.data.path=DIR,DIR
    python -m usfmae_jax.evaluate compare A B [--positive=CLASS] [--output=FILE.json]

`compare` takes the workdirs of two runs of evaluate or finetune on the same frames (or their predictions.csv) and
reports whether one is better: a paired bootstrap over patients and, for classifiers, McNemar's test.

Exit codes: 0 done; 2 bad input or config.
"""

import json
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections

from usfmae_jax import cli, files
from usfmae_jax.errors import DONE, InputError, Parser, answer, visible_output


def main(config: ml_collections.ConfigDict, workdir: str, flags: Any) -> int:
    """Runs the evaluation and prints its table; returns the exit code."""
    import jax  # only once the flags are known to be valid

    from usfmae_jax.probing import loop, suite

    cli.start(flags)
    if jax.process_count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has replaced the handler, for loops that save
    with cli.alone_in(workdir):
        run = suite.run if config.protocol == "suite" else loop.evaluate
        run(config, workdir, cli.command("usfmae_jax.evaluate"))
    if jax.process_index() == 0:
        print(f"{workdir}/report.html", file=sys.stderr)
    return DONE


@visible_output()
def compare(argv: Sequence[str]) -> int:
    """Runs the subcommand `compare`; returns the exit code."""
    doc = "Whether one run is better than another, on the frames that both were tested on."
    parser = Parser("usfmae_jax.evaluate compare", doc)
    parser.add_argument("a", metavar="A", help="workdir of a run of evaluate or finetune, or its predictions.csv")
    parser.add_argument("b", metavar="B", help="of the run to compare it with")
    parser.add_argument(
        "--positive", default="", metavar="CLASS", help="that counts as positive of two; default: A's, else the last"
    )
    parser.add_argument(
        "--resamples", type=int, default=2000, metavar="N", help="of the bootstrap; default: %(default)s"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the numbers there, as JSON")

    def act() -> int:
        args = parser.parse_args(argv)
        from usfmae_jax.evaluation import comparison

        if args.resamples < 1:
            raise InputError(f"--resamples={args.resamples} must be 1 or more")
        a, b = comparison.read(args.a), comparison.read(args.b)
        of_a, of_b = _results(args.a), _results(args.b)
        task = of_a.get("task") or {}
        positive, unit = args.positive or str(task.get("positive") or ""), str(task.get("unit") or "")
        found = comparison.compare(a, b, positive, args.resamples, unit=unit)
        names = [pathlib.PurePath(run).name for run in (args.a, args.b)]
        print(comparison.table(found, *(names if len({*names}) == 2 else (args.a, args.b))))
        for run, of in ((args.a, of_a), (args.b, of_b)):
            for warning in of.get("warnings", []):
                print(f"warning on {run}: {warning}", file=sys.stderr)
        if args.output:
            _write(args.output, json.dumps(found, indent=2) + "\n")
        return DONE

    return answer(act)


def _results(workdir: str) -> dict[str, Any]:
    """What a run recorded about its task and the warnings on it; {} if nothing."""
    folder = pathlib.Path(workdir)
    try:
        found = files.parse(((folder.parent if folder.is_file() else folder) / "results.json").read_bytes())
        task, warnings = found["task"], found.get("warnings", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if not isinstance(task, dict) or not isinstance(warnings, list):
        return {}
    return {"task": task, "warnings": [str(one) for one in warnings]}


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output={path} cannot be written: {error.strerror or error}") from error


def run() -> None:
    """The command's entry point; ends the process."""
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare(sys.argv[2:]))
    cli.run(__doc__, "evaluate", main)


if __name__ == "__main__":
    run()
