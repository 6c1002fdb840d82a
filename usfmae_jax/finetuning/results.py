"""What a fine-tuning run writes and prints: settings, splits and lineage before training, results after."""

import functools
import hashlib
import json
import os
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from usfmae_jax import files
from usfmae_jax.data.provenance import describe_data, without_hashes
from usfmae_jax.data.table import images as decode
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import predictions, tables
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.finetuning.build import Run, check_resumable
from usfmae_jax.finetuning.members import Member, steps_in, write_splits
from usfmae_jax.interop.model import Model, open_model, write_lineage
from usfmae_jax.reporting.masks import Coco, safe_path, write_png
from usfmae_jax.training import inspect
from usfmae_jax.training.forward import apply_batches, features_of, model_function
from usfmae_jax.training.mesh import describe as describe_mesh
from usfmae_jax.training.mesh import on_first_process, one_device

#: How many of the most confident errors the report shows.
EXAMPLES = 12
#: File with the SHA-256 of each file that a finished member has written.
CHECKSUMS = "checksums.json"
_AGAIN = "remove that folder, and the same command trains the member again"


def say(text: str) -> None:
    """Prints to stderr, from the first process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def is_finished(run: Run, member: Member) -> bool:
    """Whether a member has been trained and tested."""
    return (epath.Path(run.folder(member)) / "predictions.csv").exists()


def seal(folder: epath.Path, kind: str) -> None:
    """Writes checksums of a member's files, so that later corruption on disk is detected.

    Args:
      folder: folder of the member.
      kind: name of its model's folder.
    """
    written = sorted(path for part in (f"{kind}/*", "predictions.*", "validation.*") for path in folder.glob(part))
    found = {os.fspath(path.relative_to(folder)): _digest(path) for path in written}
    files.write(folder / CHECKSUMS, json.dumps(found, indent=1) + "\n")


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def check_finished(run: Run, member: Member) -> None:
    """Raises InputError if files of a finished member have changed; members of earlier versions have no checksums."""
    folder = epath.Path(run.folder(member))
    try:
        known = files.parse((folder / CHECKSUMS).read_bytes()) if (folder / CHECKSUMS).exists() else {}
        wrong = [name for name, digest in known.items() if _digest(folder / name) != digest]
    except FileNotFoundError as error:
        wrong = [os.path.basename(error.filename)]
    except (ValueError, TypeError, AttributeError):
        wrong = [CHECKSUMS]
    if wrong:
        raise InputError(f"{folder}: {wrong[0]} is damaged, or no more what the member left; {_AGAIN}")
    read_finished(run, member)


def read_finished(run: Run, member: Member) -> tuple[Predictions, Predictions]:
    """Reads the predictions of a finished member for its test part and its validation part.

    Raises:
      InputError: the files are damaged, or contain other rows.
    """
    folder, fold = epath.Path(run.folder(member)), member.fold
    found = []
    for name, part, rows in (("predictions", "test", fold.test), ("validation", "validation", fold.validation)):
        said = predictions.read(folder / f"{name}.csv", run.task.predictions)
        ids = predictions.identify(run.table, rows, fold.name, member.seed, member.fraction)
        ids.pop("copied")  # earlier versions did not write it
        if any(getattr(said, column).tolist() != values.tolist() for column, values in ids.items()):
            raise InputError(
                f"{folder}: the {len(said)} rows of {name}.csv are not the {len(rows)} frames of the member's {part} "
                f"part; {_AGAIN}"
            )
        found.append(said)
    return found[0], found[1]


def start(run: Run) -> None:
    """Writes settings, lineage and splits, and checks that finished members are unchanged.

    Raises:
      InputError: the workdir holds a run with other settings or another split, or a finished member is damaged.
    """

    def write() -> None:
        root = epath.Path(run.workdir)
        if (root / "config.json").exists():
            check_resumable(run, _stored(root / "config.json"))
        write_splits(run.workdir, run.table, run.folds, run.groups, run.members)
        files.write(root / "config.json", json.dumps(run.settings, indent=2) + "\n")
        write_lineage(run.workdir, run.lineage)
        for member in run.members:
            if is_finished(run, member):
                check_finished(run, member)

    on_first_process(write)


def _stored(path: epath.Path) -> dict[str, Any]:
    """The stored settings of a run; raises InputError if they are damaged."""
    try:
        stored = files.parse(path.read_bytes())
    except ValueError:
        stored = None
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name, {}), dict) for name in ("augment", "split")):
        raise InputError(
            f"{path} is damaged; remove it to go on with the settings that the run began with, or choose another "
            "--workdir"
        )
    return stored


def describe(run: Run, mesh: Mesh, batch_size: int, unfinished: int, at_a_time: int) -> None:
    """Prints what is about to run."""
    table, steps = run.table, [member.total_steps for member in run.members]
    summary = run.task.summary(table)
    train = run.settings["train"]
    short = min(steps_in(train["epochs"], len(member.fold.train), batch_size) for member in run.members)
    each = f"{f'{min(steps)} to {max(steps)}' if min(steps) < max(steps) else min(steps)} steps of {batch_size} each"
    if not train["steps"] and short < min(steps):
        each += f" (config.train.min_steps; {train['epochs']:g} epochs would be {short})"
    if at_a_time > 1:
        each += f", {at_a_time} members at a time"
    say(
        f"{describe_mesh(mesh)}\n"
        f"data: {len(table)} frames of {tables.counted(len(np.unique(table.patient_key)), 'patient')}"
        f"{summary and ': '}{summary}"
        + (f"; {table.left_out} without a label are left out" if table.left_out else "")
        + f"\nsplit: {run.split}\n"
        f"model: {run.title}\n"
        f"members: {len(run.members)}, of which {unfinished} are to be trained, {each}\n"
        f"workdir: {run.workdir}"
    )
    for warning in run.warnings:
        say(f"warning: {warning}")


def finish(run: Run, command: str, resamples: int, batch_size: int) -> None:
    """Writes the results of all members of the run, and prints them.

    Args:
      run: a run whose members are all finished.
      command: the command line that repeats it.
      resamples: number of bootstrap resamples.
      batch_size: images per call, for what the report computes.
    """
    task, table, init = run.task, run.table, run.init
    tested, validation = zip(*(read_finished(run, member) for member in run.members), strict=True)
    chosen = inspect.foremost(run.members)
    models = {number: open_model(run.folder(run.members[number])) for number in chosen}
    looks = [task.look(functools.partial(predict, run, models[number]), models[number]) for number in chosen]
    examples = task.examples(table, [(run.members[n].fold.test, tested[n]) for n in chosen], EXAMPLES)
    first = run.members[chosen[0]]
    strata, rows = task.strata(table), first.fold.test
    found = task.finish(
        run.workdir,
        predictions.concatenate(tested),
        predictions.concatenate(validation),
        about={
            "title": run.title,
            "protocol": "finetune",
            "datasets": sorted(set(table.dataset.tolist())),
            "split": run.split,
        },
        context={
            "config": run.settings,
            "weights": {
                "source": run.settings["init"] or "random",
                "fingerprint": init.fingerprint if init else "",
                "kind": init.kind if init else "random",
            },
            "lineage": without_hashes(run.lineage),
            "data": describe_data([table.shards]),
            "fingerprint": table.fingerprint,
            "warnings": run.warnings,
            "excluded": run.excluded,
            "command": command,
        },
        embedding=inspect.feature_map(
            table,
            rows,
            np.asarray(strata.names)[strata.code[rows]],
            features(run, models[chosen[0]], rows, batch_size),
            f"test frames as {first.name} sees them",
        ),
        examples=inspect.shown(table, examples, looks, run.image_format),
        resamples=resamples,
    )
    print(task.table(found), flush=True)
    say(f"report: {run.workdir}/report.html")


class Masks:
    """Writes predicted masks of a member's test frames: `WORKDIR/masks/MEMBER/FRAME.png`, and `coco.json` beside them.

    Args:
      run: run of the member.
      member: the member that predicts them.
    """

    def __init__(self, run: Run, member: Member):
        self._run, self._folder = run, epath.Path(run.workdir) / "masks" / member.name
        self._coco = Coco(run.task.outputs)

    def add(self, rows: np.ndarray, predicted: dict[str, np.ndarray]) -> None:
        """Writes the masks of some rows of the table; `predicted` is the result of the task's `predict` for them."""
        table = self._run.table
        for row, (mask, found) in zip(rows.tolist(), self._run.task.outlines(table, rows, predicted), strict=False):
            name = safe_path(str(table.frame_key[row])) + ".png"
            write_png(self._folder / name, mask)
            self._coco.add(name, mask.shape[:2], found)

    def write(self) -> None:
        """Writes the COCO JSON, after all masks are added."""
        self._coco.write(self._folder / "coco.json")


def predict(run: Run, model: Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """Predictions for images uint8 `[n, H, W, C]`; on one device, since only one process writes results."""
    function, variables = model_function(model, run.task.predict)
    return apply_batches(one_device(), function, variables, iter([images]), batch_size=len(images), total=len(images))


def features(run: Run, model: Model, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """The input features of a model's head, float32 `[N, D]`; also on one device."""
    function, variables = model_function(model, features_of)
    size, channels = run.image_format
    batch_size = min(batch_size, len(rows))
    images = decode(run.table, rows, size=size, channels=channels, batch_size=batch_size)
    return apply_batches(one_device(), function, variables, images, batch_size=batch_size, total=len(rows))
