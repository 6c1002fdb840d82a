"""What a build tells: `build.json` and `rejected.csv` beside the shards, and the table on the screen."""

import collections
import csv
import dataclasses
import json
import pathlib
from typing import Any

from data_prep.items import Rejected
from usfmae_jax import __version__
from usfmae_jax.errors import InputError

_SHOWN = 20  # rejected files in the table; the rest is in rejected.csv


@dataclasses.dataclass
class Count:
    """What one split holds."""

    frames: int = 0
    patients: set[str] = dataclasses.field(default_factory=set)
    unknown: set[str] = dataclasses.field(default_factory=set)  # patients that are only known to be one
    labels: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    bytes: int = 0

    def add(self, record: dict[str, Any], patient_known: bool) -> None:
        """Counts one record."""
        self.frames += 1
        self.labels[record["label"]] += 1
        (self.patients if patient_known else self.unknown).add(record["patient"])


def write_reports(
    folder: pathlib.Path,
    counts: dict[str, Count],
    rejected: list[Rejected],
    arguments: dict[str, Any],
    fingerprint: str,
) -> None:
    """Writes `rejected.csv`, if any were, and `build.json`, which `check_same` reads."""
    if rejected:
        with (folder / "rejected.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "reason"])
            writer.writerows(sorted((one.source, one.reason) for one in rejected))
    manifest = {
        "tool": f"usfmae_jax {__version__}",
        "arguments": arguments,
        "input": fingerprint,
        "splits": {
            split: {"frames": count.frames, "patients": len(count.patients), "unknown_patients": len(count.unknown)}
            for split, count in counts.items()
        },
        "rejected": len(rejected),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / "build.json").write_text(json.dumps(manifest, indent=2) + "\n")


def check_same(target: pathlib.Path, arguments: dict[str, Any], fingerprint: str) -> None:
    """Raises InputError unless `target` holds, complete, what these arguments and files would build."""
    remedy = "add --overwrite to replace it, or choose another --output or --name"
    try:
        manifest = json.loads((target / "build.json").read_text())
        before, files_before, written = manifest["arguments"], manifest["input"], manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{target} was not built by this tool; {remedy}") from error
    if before != arguments:
        differences = [
            f"{key} was {before.get(key)!r} and is now {arguments.get(key)!r}"
            for key in sorted(before.keys() | arguments.keys())
            if before.get(key) != arguments.get(key)
        ]
        raise InputError(f"{target} was built with other arguments ({', '.join(differences)}); {remedy}")
    if files_before != fingerprint:
        raise InputError(f"{target} was built from other files than --input holds now; {remedy}")
    for name, size in written.items():
        if not (target / name).exists() or (target / name).stat().st_size != size:
            raise InputError(f"{target / name} is missing or was changed after it was built; {remedy}")


def print_summary(
    target: pathlib.Path,
    counts: dict[str, Count],
    label_names: list[str],
    rejected: list[Rejected],
    left_out: dict[str, int],
    seconds: float,
) -> None:
    """Prints what was built, what was not, and what to type next."""
    frames = sum(count.frames for count in counts.values())
    print(f"{target}: {frames:,} frames in {seconds:.1f} s, {frames / seconds:,.0f} images/s\n")
    print(f"{'split':12}{'frames':>10}{'patients':>10}{'unknown':>10}{'MB':>10}  labels")
    names = {-1: "(none)"} | dict(enumerate(label_names))
    for split, count in counts.items():
        labels = ", ".join(f"{names[label]} {number:,}" for label, number in sorted(count.labels.items()))
        print(
            f"{split:12}{count.frames:>10,}{len(count.patients):>10,}{len(count.unknown):>10,}"
            f"{count.bytes / 1e6:>10,.1f}  {labels}"
        )
    unknown = sum(len(count.unknown) for count in counts.values())
    if unknown:
        print(f"\nUnknown patients: {unknown:,}. Each such file counts as a patient of its own.")
    if len(label_names) == 1:
        print(f"\nAll labels are {label_names[0]!r}: is that what was meant?")
    if left_out:
        print("\nPassed over: " + ", ".join(f"{number:,} {kind}" for kind, number in sorted(left_out.items())))
    if rejected:
        print(f"\nRejected: {len(rejected):,} files, all of them in {target / 'rejected.csv'}:")
        for one in sorted(rejected, key=lambda one: one.source)[:_SHOWN]:
            print(f"  {one.source}: {one.reason}")
    path = f"--config.data.path='{target.parent}'"
    print(f"\nNext:  python -m usfmae_jax.main --config=configs/pretrain.py:tiny {path}")
