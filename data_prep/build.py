"""Turns a tree of images, or simulated patients, into shards that training reads and TensorFlow Datasets opens.

    python -m data_prep.build --dataset=phantom --output=data
    python -m data_prep.build --dataset=folder --input=DIR --output=data --labels=parent
    python -m data_prep.build --dataset=folder --input=DIR --output=data --labels=labels.csv --image_size=512

Writes OUTPUT/NAME/1.0.0/: the shards, `dataset_info.json` and `features.json`, `build.json` (what it was built from)
and, if files had to be left out, `rejected.csv` (which, and why). The same command again does nothing.

labels.csv has a header and the columns file,label,patient,video,split,mask, of which only `file` must be there:
paths are relative to --input, splits are train, val and test, an empty label is none, an empty patient is unknown.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# OpenCV, grain and TensorFlow Datasets are imported where they are needed: help and "up to date" should be quick.
from data_prep import items, report
from data_prep.items import Rejected
from usfmae_jax.errors import InputError

VERSION = "1.0.0"  # of the datasets
SPLITS = ("train", "validation", "test")
PHANTOM = {"patients": 500, "frames": 4, "seed": 0}
_WORKER = "data_prep.frames"  # what the worker processes run


@dataclasses.dataclass
class Plan:
    """All that is known before the first file is opened.

    Attributes:
      name: of the dataset.
      inputs: `items.Item` for a folder, patient numbers for phantoms.
      label_names: class names in the order of their numbers.
      arguments: all that decides about the content of the shards, nothing about this machine.
      fingerprint: of the input files; empty for phantoms.
      rejected: files that cannot be used, found so far.
      left_out: kinds of files that were passed over, and how many.
    """

    name: str
    inputs: list[Any]
    label_names: list[str]
    arguments: dict[str, Any]
    fingerprint: str = ""
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the door; returns the exit status."""
    try:
        run(_parse(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: nothing was built: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was built", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Builds what the arguments ask for, unless it is there already."""
    plan = _plan_phantoms(args) if args.dataset == "phantom" else _plan_folder(args)
    target = pathlib.Path(args.output) / plan.name / VERSION
    if not args.overwrite and target.exists():
        report.check_same(target, plan.arguments, plan.fingerprint)
        print(f"{target} is up to date")
        return
    from data_prep import shards

    started = time.monotonic()
    with shards.all_or_nothing(target, args.overwrite) as folder:
        counts = _build(plan, folder, args)
    seconds = time.monotonic() - started
    report.print_summary(target, counts, plan.label_names, plan.rejected, plan.left_out, seconds)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message}; --help shows examples")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m data_prep.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=("folder", "phantom"), help="a tree of images, or simulated patients")
    add("--input", help="folder: the tree of PNG, JPEG, TIFF or BMP files with 8 or 16 bits")
    add("--output", required=True, help="where the datasets are, for example data")
    add("--name", help="of the dataset; by default phantom, or the name of the input folder")
    add("--labels", default="", help="folder: 'parent' for the name of each file's folder, or a CSV file, see above")
    add("--anatomy", default="", help="goes into every record, for example breast")
    add("--format", default="array_record", choices=("array_record", "tfrecord"), help="default: %(default)s")
    add(
        "--encoding",
        default="jpeg",
        choices=("jpeg", "png", "raw"),
        help="of the images; default: jpeg, which takes 60%% of the space of png, decodes more than twice as fast and "
        "changes grey levels by less than one on average; png and raw (uncompressed BMP) are exact",
    )
    add("--quality", type=_at_least(1, 100), help="of JPEG; default: 95")
    add("--image_size", type=_at_least(0), default=256, help="of the short side; 0 keeps, default: %(default)s")
    add("--patients", type=_at_least(1), help=f"phantom: default: {PHANTOM['patients']}")
    add("--frames", type=_at_least(1), help=f"phantom: per patient, default: {PHANTOM['frames']}")
    add("--seed", type=_at_least(0), help=f"phantom: default: {PHANTOM['seed']}")
    add("--workers", type=_at_least(1), default=os.cpu_count() or 1, help="processes; default: all cores")
    add("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    if "://" in args.output:
        raise InputError(f"--output={args.output} is not local: build into a folder and copy it")
    if args.encoding != "jpeg" and args.quality:
        raise InputError(f"--quality is for --encoding=jpeg, not {args.encoding}")
    foreign = [*PHANTOM] if args.dataset == "folder" else ["input", "labels"]
    for flag in foreign:
        if getattr(args, flag) not in (None, ""):
            raise InputError(f"--{flag} has no meaning for --dataset={args.dataset}; leave it out")
    if args.dataset == "folder" and not args.input:
        raise InputError("--dataset=folder needs --input=DIR, the folder with the images")
    if args.name and not re.fullmatch("[a-zA-Z][a-zA-Z0-9_]*", args.name):
        raise InputError(f"--name={args.name} must be a letter followed by letters, digits and underscores")
    return args


def _at_least(low: int, high: int = 1 << 31) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in the range from {low} to {high}")
        return value

    number.__name__ = "number"  # argparse says "invalid number value"
    return number


def _plan_folder(args: argparse.Namespace) -> Plan:
    from data_prep.readers import SUFFIXES

    root = pathlib.Path(args.input)
    found = items.collect(root, args.labels, SUFFIXES)
    arguments = _storage_arguments(args)
    arguments["labels"] = args.labels
    if args.labels not in ("", "parent"):
        arguments["labels"] = f"sha256 {hashlib.sha256(pathlib.Path(args.labels).read_bytes()).hexdigest()}"
    return Plan(
        name=args.name or _safe_name(root.resolve().name),
        inputs=found.items,
        label_names=found.label_names,
        arguments=arguments,
        fingerprint=found.fingerprint,
        rejected=found.rejected,
        left_out=found.left_out,
    )


def _plan_phantoms(args: argparse.Namespace) -> Plan:
    from data_prep.phantom import CLASSES

    if not args.image_size:
        raise InputError("--image_size=0 keeps the size of files; give a size to simulate phantoms")
    if args.image_size < 32:
        raise InputError(f"--image_size={args.image_size} is too small to simulate phantoms; give 32 or more")
    chosen = {
        flag: default if getattr(args, flag) is None else getattr(args, flag) for flag, default in PHANTOM.items()
    }
    return Plan(
        name=args.name or "phantom",
        inputs=list(range(chosen["patients"])),
        label_names=list(CLASSES),
        arguments=_storage_arguments(args) | chosen,
    )


def _storage_arguments(args: argparse.Namespace) -> dict[str, Any]:
    chosen = {flag: getattr(args, flag) for flag in ("dataset", "anatomy", "format", "encoding", "image_size")}
    return chosen | ({"quality": args.quality or 95} if args.encoding == "jpeg" else {})


def _safe_name(name: str) -> str:
    """A folder's name as TensorFlow Datasets accepts it: BUS-BRA becomes bus_bra."""
    safe = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_") or "images"
    return safe if safe[0].isalpha() else f"d_{safe}"


def _job(plan: Plan, args: argparse.Namespace) -> Callable[[Any], Any]:
    """What turns one input into its records; runs in the workers."""
    from data_prep import frames

    how = frames.Storage(plan.name, args.anatomy, args.image_size, args.encoding, args.quality or 95)
    if args.dataset == "folder":
        return functools.partial(frames.process, root=args.input, how=how)
    patients = plan.arguments["patients"]
    return functools.partial(
        frames.simulate,
        how=how,
        seed=plan.arguments["seed"],
        frames=plan.arguments["frames"],
        first_test=patients - patients // 5,
    )


def _build(plan: Plan, folder: pathlib.Path, args: argparse.Namespace) -> dict[str, report.Count]:
    """Writes everything into `folder`."""
    import tqdm

    from data_prep import parallel, shards

    writers: dict[str, shards.SplitWriter] = {}
    counts: dict[str, report.Count] = collections.defaultdict(report.Count)
    channels = 1
    total = len(plan.inputs) + len(plan.rejected)
    with (
        contextlib.closing(parallel.ordered_map(_job(plan, args), plan.inputs, args.workers, _WORKER)) as results,
        tqdm.tqdm(
            total=len(plan.inputs), desc=plan.name, unit="patient" if args.dataset == "phantom" else "file"
        ) as bar,
    ):
        for result in results:
            bar.update()
            if isinstance(result, Rejected):
                plan.rejected.append(result)
                _check_usable(plan.rejected, total)
                continue
            for stored in result:
                if stored.split not in writers:
                    writers[stored.split] = shards.SplitWriter(folder, plan.name, stored.split, args.format)
                writers[stored.split].write(stored.record)
                counts[stored.split].add(stored.record, stored.patient_known)
                channels = max(channels, stored.channels)
    _check_usable(plan.rejected, total)
    writers = {split: writers[split] for split in SPLITS if split in writers}
    for split, writer in writers.items():
        writer.close()
        counts[split].bytes = writer.size
    counts = {split: counts[split] for split in writers}
    shards.write_metadata(
        folder,
        writers,
        name=plan.name,
        version=VERSION,
        description="Ultrasound frames, prepared with python -m data_prep.build.",
        label_names=plan.label_names,
        channels=channels,
    )
    report.write_reports(folder, counts, plan.rejected, plan.arguments, plan.fingerprint)
    return counts


def _check_usable(rejected: list[Rejected], total: int) -> None:
    if 2 * len(rejected) > total:
        first = rejected[0]
        raise InputError(
            f"more than half of the {total} files cannot be used, for example {first.source!r} ({first.reason}); "
            "is --input the right folder?"
        )


if __name__ == "__main__":
    sys.exit(main())
