"""What a fine-tuning run writes and says: settings, splits and lineage before, predictions and results after."""

import json
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from usfmae_jax.data import table as labelled
from usfmae_jax.data.provenance import describe_data
from usfmae_jax.evaluation import predictions as tables
from usfmae_jax.evaluation import results
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.finetuning.build import RESUMABLE, Job
from usfmae_jax.finetuning.members import Member, write_splits
from usfmae_jax.interop.model import Model, open_model, write_lineage
from usfmae_jax.models.vit import SIZES
from usfmae_jax.probing import inspect as looking
from usfmae_jax.reporting import classification as reporting
from usfmae_jax.reporting.classification import embedding_points
from usfmae_jax.training import checkpoints, outcomes
from usfmae_jax.training.common import on_first_process
from usfmae_jax.training.forward import classifier_function
from usfmae_jax.training.outcomes import Outcome, Tested

#: Most confident errors that the report shows.
ERRORS = 12


def say(text: str) -> None:
    """Prints to stderr, once for all processes."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def folder(job: Job, member: Member) -> str:
    """Where a member lives."""
    return f"{job.workdir}/members/{member.name}"


def is_finished(job: Job, member: Member) -> bool:
    """Whether a member was trained and tested."""
    return (epath.Path(folder(job, member)) / "predictions.csv").exists()


def lineage(job: Job, member: Member, step: int) -> list[dict[str, Any]]:
    """Where a member's weights after `step` updates come from."""
    own = {"member": member.name, "step": step}
    return [*job.lineage[:-1], job.lineage[-1] | own]


def _write_start(job: Job) -> None:
    root = epath.Path(job.workdir)
    if (root / "config.json").exists():
        stored = json.loads((root / "config.json").read_text())
        checkpoints.check_resumable(stored, job.settings, job.workdir, RESUMABLE)
    write_splits(job.workdir, job.frames, job.folds, job.groups, job.members)
    (root / "config.json").write_text(json.dumps(job.settings, indent=2) + "\n")
    write_lineage(job.workdir, job.lineage)


def describe(job: Job, mesh: Mesh, unfinished: int, at_a_time: int) -> None:
    """Writes settings, lineage and splits, and says what is about to run.

    Raises:
      InputError: the workdir holds a run with other settings or another split.
    """
    on_first_process(lambda: _write_start(job))
    frames = job.frames
    counts = np.bincount(frames.label, minlength=len(frames.label_names))
    classes = ", ".join(f"{count} {name}" for name, count in zip(frames.label_names, counts, strict=True))
    say(
        f"{jax.devices()[0].device_kind}: {mesh.size} devices as data={mesh.shape['data']} x "
        f"fsdp={mesh.shape['fsdp']}, {jax.process_count()} processes\n"
        f"data: {len(frames)} frames of {len(np.unique(frames.patient_key))} patients: {classes}"
        + (f"; {frames.left_out} without a label are left out" if frames.left_out else "")
        + f"\nsplit: {job.split}\n"
        f"model: {title(job)}\n"
        f"members: {len(job.members)}, of which {unfinished} are to be trained, "
        f"{min(m.total_steps for m in job.members)} to {max(m.total_steps for m in job.members)} steps of "
        f"{job.config.train.batch_size} each{f', {at_a_time} members at a time' if at_a_time > 1 else ''}\n"
        f"workdir: {job.workdir}"
    )
    for warning in job.warnings:
        say(f"warning: {warning}")


def title(job: Job) -> str:
    """What was done, as a heading."""
    if job.description["model"] == "resnet50":
        shape = job.description["resnet"]
        usual = (list(shape["depths"]), shape["width"]) == ([3, 4, 6, 3], 64)
        model = "ResNet-50" if usual else f"ResNet of {3 * sum(shape['depths']) + 2} layers and width {shape['width']}"
    else:
        encoder = job.description["encoder"]
        names = ("patch_size", "width", "depth", "num_heads")
        size = next((size for size, kwargs in SIZES.items() if all(kwargs[n] == encoder[n] for n in names)), "")
        model = f"ViT-{size}" if size else f"ViT of width {encoder['width']} and depth {encoder['depth']}"
    on = " and ".join(sorted(set(job.frames.dataset.tolist())))
    if job.weights is None:
        return f"{model} trained from scratch on {on}"
    how = {"full": "", "frozen": ", head only", "last_k": f", last {job.config.last_k} blocks"}[job.config.mode]
    return f"Fine-tuned {model} on {on}{how}"


def as_tested(member: Member, rows: np.ndarray, probabilities: np.ndarray) -> Tested:
    """A member as evaluation knows one."""
    none = np.zeros(0, np.int64)
    return Tested(member.fold.name, member.seed, member.fraction, rows, probabilities, none, none)


def predictions(job: Job, member: Member, rows: np.ndarray, probabilities: np.ndarray) -> Predictions:
    """A member's predictions of some rows of the table."""
    return outcomes.of_rows(job.frames, as_tested(member, rows, probabilities), rows, probabilities.astype(np.float64))


def finish(job: Job, command: str) -> None:
    """Writes the results of all members of the run, and prints them."""
    parts = {
        name: [tables.read(epath.Path(folder(job, member)) / f"{name}.csv") for member in job.members]
        for name in ("predictions", "validation")
    }
    outcome = look(job, [part.probabilities for part in parts["predictions"]])
    weights = job.weights
    found = reporting.finish(
        job.workdir,
        tables.concatenate(parts["predictions"]),
        task={
            "title": title(job),
            "protocol": "finetune",
            "datasets": sorted(set(job.frames.dataset.tolist())),
            "split": job.split,
        },
        positive=job.config.positive,
        context={
            "config": job.settings,
            "weights": {
                "source": job.config.init or "random",
                "fingerprint": weights.fingerprint if weights else "",
                "kind": weights.kind if weights else "random",
            },
            "lineage": job.lineage,
            "data": describe_data([job.frames.shards]),
            "fingerprint": job.frames.fingerprint,
            "warnings": job.warnings,
            "excluded": job.excluded,
            "command": command,
        },
        validation=tables.concatenate(parts["validation"]),
        embedding=outcomes.embedding(job.frames, outcome),
        examples=looking.errors(job.frames, outcome, ERRORS),
        resamples=job.config.evaluate.bootstrap,
    )
    print(results.table(found), flush=True)
    say(f"report: {job.workdir}/report.html")


def look(job: Job, probabilities: list[np.ndarray]) -> Outcome:
    """What the report shows beside numbers: errors with attention, and a map of one member's features."""
    entries = [as_tested(m, m.fold.test, p) for m, p in zip(job.members, probabilities, strict=True)]
    chosen = outcomes.foremost(entries)
    weights = {number: open_model(folder(job, job.members[number])) for number in chosen}
    pool = job.description.get("pool", "mean")
    first = chosen[0]
    mapped, points = embedding_points(features(job, weights[first], entries[first].rows))
    return Outcome(
        tested=entries,
        excluded=job.excluded,
        split=job.split,
        rows=entries[first].rows[mapped],
        points=points,
        space=f"test frames as {job.members[first].name} sees them",
        attention={number: looking.rollout(weights[number], pool) for number in chosen},
        robustness=None,
        image_format=(job.size, job.config.data.channels),
    )


def features(job: Job, weights: Model, rows: np.ndarray) -> np.ndarray:
    """What the head of a classifier sees, float32 `[N, D]`; on one device, since one process alone writes results."""
    function, variables = classifier_function(weights)
    run, size = jax.jit(function), min(job.config.evaluate.batch_size, len(rows))
    batches = labelled.images(
        job.frames,
        rows,
        size=job.size,
        channels=job.config.data.channels,
        batch_size=size,
        threads=job.config.data.threads,
    )
    found = []
    for images in batches:
        padded = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), np.uint8)])
        found.append(np.asarray(run(variables, padded)["features"])[: len(images)])
    return np.concatenate(found)
