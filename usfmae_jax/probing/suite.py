"""Compares frozen encoders on several labelled or masked datasets: one table, one page.

Every cell is a run of `probing.loop.evaluate` in its own folder, so that each has a report and an interrupted suite can
be resumed.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from usfmae_jax import files
from usfmae_jax.data.table import Table, read_row
from usfmae_jax.data.targets import known, read_targets
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import comparison
from usfmae_jax.evaluation import results as classes
from usfmae_jax.probing import build
from usfmae_jax.probing.loop import evaluate
from usfmae_jax.reporting import suite as reporting
from usfmae_jax.reporting.run import public
from usfmae_jax.training import checks
from usfmae_jax.training.mesh import on_first_process

#: Kinds of test, and the field of `config.suite` that holds the protocol of each; "" there leaves it out.
KINDS = {"classes": "labels", "masks": "masks", "numbers": "numbers"}
_MADE_OF = "made_of.json"  # in the folder of each test, beside its results
#: Units of lengths, which are learnt as a fraction of the frame's side.
_LENGTHS = ("mm", "cm")


def run(config: ml_collections.ConfigDict, workdir: str, command: str = "") -> dict[str, Any]:
    """Tests every encoder on every dataset, and writes suite.json, suite.md and report.html.

    Args:
      config: see `configs/suite.py`.
      workdir: folder for these files, and for a folder DATASET-KIND/ENCODER per test.
      command: the command line that repeats it, for the page.

    Returns:
      the contents of suite.json; in a job of several processes only in the first, {} in the others.

    Raises:
      InputError: an encoder or a dataset cannot be used at all; raised before anything is computed. A test that a
        dataset does not allow is left out and reported.
    """
    columns = _columns(checks.names(config.suite.checkpoints))
    targets = _targets(checks.names(config.suite.targets))
    datasets = _datasets(config, targets)
    weights: dict[str, str] = {}
    for column, checkpoint in columns.items():
        single = _one(config, checkpoint=checkpoint, protocol="auto")
        build.check(single)
        model = build.encoder(single)
        weights[column] = model.fingerprint if model else "pixels"
    tests = [
        (name, kind, *_single(config, kind, protocol, dataset, targets.get(name)))
        for name, dataset in datasets.items()
        for kind, protocol in dataset.kinds.items()
    ]
    workdir = checks.make_workdir(workdir)
    rows, left_out = [], []
    for name, kind, single, data in tests:
        folder, row = f"{workdir}/{name}-{kind}", dict[str, dict[str, Any]]()
        try:
            for column, checkpoint in columns.items():
                row[column] = _test(single, f"{folder}/{column}", checkpoint, data | {"weights": weights[column]})
        except InputError as error:
            left_out.append({"dataset": name, "kind": kind, "why": public(str(error))})
            continue
        if jax.process_index() == 0:
            rows.append(_row(name, kind, single.protocol, row, folder, config.bootstrap))
    if not rows and left_out:
        raise InputError(f"nothing could be tested: {left_out[0]['dataset']}: {left_out[0]['why']}")
    found = {
        "format": 1,
        "columns": list(columns),
        "rows": rows,
        "means": _means(rows, list(columns)),
        "left_out": left_out,
        "command": command,
    }
    on_first_process(lambda: reporting.write(workdir, found))
    if jax.process_index():
        return {}
    print(reporting.text(found), flush=True)
    return found


def _columns(checkpoints: Sequence[str]) -> dict[str, str]:
    """Short names of the encoders: the shortest ends of their paths that differ."""
    if not checkpoints:
        raise InputError("config.suite.checkpoints is missing: name one or more encoders, with commas between them")
    if len(set(checkpoints)) < len(checkpoints):
        raise InputError("config.suite.checkpoints names an encoder twice")
    for depth in range(1, 10):
        names = ["-".join(one.rstrip("/").split("/")[-depth:]) for one in checkpoints]
        if len(set(names)) == len(names):
            return {_safe(name): one for name, one in zip(names, checkpoints, strict=True)}
    raise InputError("config.suite.checkpoints names an encoder twice")


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "encoder"


def _targets(given: Sequence[str]) -> dict[str, tuple[str, str]]:
    """By dataset name, its table of numbers and the column; "" = the only numeric column."""
    found = {}
    for one in given:
        name, _, path = one.partition("=")
        if not name or not path:
            raise InputError(f"config.suite.targets={one!r} must be DATASET=FILE.csv or DATASET=FILE.csv#COLUMN")
        file, _, column = path.partition("#")
        found[name] = (file, column)
    return found


class Dataset(NamedTuple):
    """A dataset of a suite: its path, its frames, and the protocol of each kind of test."""

    path: str
    table: Table
    kinds: dict[str, str]


def _datasets(config: ml_collections.ConfigDict, targets: dict[str, tuple[str, str]]) -> dict[str, Dataset]:
    """The datasets by name."""
    found: dict[str, Dataset] = {}
    asked = {kind: config.suite[field] for kind, field in KINDS.items() if config.suite[field]}
    if not asked:
        raise InputError("config.suite.labels, masks and numbers are all empty: there is nothing to test")
    for path in [one.strip() for one in config.data.path.split(",")]:
        table = checks.read_frames(path, config.data.split)
        name = _safe(" and ".join(sorted(set(table.dataset.tolist()))))
        there = {
            "classes": len(np.unique(table.label[table.label >= 0])) > 1,
            "masks": _has_masks(table),
            "numbers": name in targets,
        }
        kinds = {kind: protocol for kind, protocol in asked.items() if there[kind]}
        if not kinds:
            raise InputError(
                f"config.data.path={path!r} has neither labels of two classes nor masks, and config.suite.targets no "
                f"table for {name}"
            )
        if name in found:
            raise InputError(f"config.data.path names {name} twice, {found[name].path!r} and {path!r}")
        found[name] = Dataset(path, table, kinds)
    if unknown := sorted(set(targets) - set(found)):
        raise InputError(f"config.suite.targets names {unknown[0]!r}, but the data are of {', '.join(found)}")
    return found


def _has_masks(table: Table) -> bool:
    return any(read_row(table, row)["mask"] for row in range(len(table)))


def _one(config: ml_collections.ConfigDict, **fields: Any) -> ml_collections.ConfigDict:
    """The config of a single evaluation."""
    single = ml_collections.ConfigDict(config.to_dict())
    if "suite" in single:
        del single.suite
    single.update(fields)
    return single


def _single(
    config: ml_collections.ConfigDict, kind: str, protocol: str, dataset: Dataset, targets: tuple[str, str] | None
) -> tuple[ml_collections.ConfigDict, dict[str, str]]:
    """The config of one kind of test on one dataset, and fingerprints of its inputs."""
    single, data = _one(config, protocol=protocol), {"data": dataset.table.fingerprint}
    single.data.path = dataset.path
    if kind != "classes":
        single.update(positive="", corruptions=False, classes=())
    if kind == "numbers" and targets:
        single.update(targets=targets[0], target=targets[1])
        said = read_targets(targets[0], dataset.table, checks.names([targets[1]]))
        table, found = known(dataset.table, said)
        single.of_frame = set(found.units) <= set(_LENGTHS) and all(
            min(read_row(table, row)["spacing"]) > 0 for row in range(len(table))
        )
        data["targets"] = found.fingerprint
    return single, data


def _test(config: ml_collections.ConfigDict, folder: str, checkpoint: str, made_of: dict[str, str]) -> dict[str, Any]:
    """The results of one encoder on one dataset; existing results are reused if their inputs are the same.

    Args:
      config: config of the test, without the encoder.
      folder: folder of the test.
      checkpoint: the encoder.
      made_of: fingerprints of weights, frames and numbers, whose paths alone may stay the same when contents change.
    """
    single, root = _one(config, checkpoint=checkpoint), epath.Path(folder)
    made_of = made_of | {"settings": json.loads(json.dumps(build.settings(single)))}
    try:
        if files.parse((root / _MADE_OF).read_bytes()) == made_of:
            return files.parse((root / "results.json").read_bytes())
    except (OSError, ValueError):
        pass
    found = evaluate(single, folder, "")
    on_first_process(lambda: files.write(root / _MADE_OF, json.dumps(made_of, indent=1) + "\n"))
    return found


def _row(
    dataset: str, kind: str, protocol: str, results: dict[str, dict[str, Any]], folder: str, resamples: int
) -> dict[str, Any]:
    """One row of the table, with differences from the first encoder under the same resampled patients."""
    first, *others = results
    metrics = {column: one["metrics"] for column, one in results.items()}
    lead = {"masks": "dice", "numbers": "r2"}.get(kind) or classes.lead(results[first])
    runs = {column: comparison.read(os.path.join(folder, column)) for column in results}
    positive = results[first]["task"].get("positive", "")
    differences = {
        column: comparison.compare(runs[first], runs[column], positive, resamples)["metrics"][lead] for column in others
    }
    counts = {unit: results[first]["counts"][unit] for unit in ("frames", "patients")}
    nothing = [
        column
        for column, one in (results if kind == "masks" else {}).items()
        if all(each["missed"] == each["frames"] and not each["invented"] for each in one["per_class"].values())
    ]
    return {
        "nothing_predicted": nothing,
        "dataset": dataset,
        "kind": kind,
        "protocol": protocol,
        "classes": results[first]["task"].get("classes", []),
        "lead": lead,
        **counts,
        "metrics": metrics,
        "differences": differences,
        "warnings": _warnings({column: run["context"]["warnings"] for column, run in results.items()}),
    }


def _warnings(said: dict[str, list[str]]) -> list[str]:
    """The warnings of all encoders, each with the encoders that it is about, if these are not all."""
    about: dict[str, list[str]] = {}
    for column, warnings in said.items():
        for warning in dict.fromkeys(warnings):
            about.setdefault(warning, []).append(column)
    return [one if len(which) == len(said) else f"{', '.join(which)}: {one}" for one, which in about.items()]


def _means(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Mean of the main metric over the datasets of each kind, equally weighted; None if one is not defined."""
    found: dict[str, dict[str, float | None]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        found[kind] = {}
        for column in columns:
            values = [row["metrics"][column][row["lead"]]["value"] for row in mine]
            found[kind][column] = None if None in values else float(np.mean(values))
    return found
