"""The fine-tuning loop: for every member: restore, then batch, update, report, evaluate, save; then test the best."""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from usfmae_jax.data import augment, pipeline
from usfmae_jax.evaluation.classification import LOSSES, NAMES, metrics, positive_class
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.finetuning import build as supervised_setup
from usfmae_jax.finetuning import classifiers, side_by_side
from usfmae_jax.finetuning import results as member_reports
from usfmae_jax.finetuning.build import Job
from usfmae_jax.finetuning.members import Member, class_weights
from usfmae_jax.finetuning.programs import Programs, compile_programs
from usfmae_jax.interop.model import Model, save_model
from usfmae_jax.training import checkpoints
from usfmae_jax.training.common import check_batch, make_workdir
from usfmae_jax.training.forward import apply_batches, fitting_batch
from usfmae_jax.training.mesh import global_batch, make_mesh, replicated
from usfmae_jax.training.monitor import Monitor, Preemption
from usfmae_jax.training.state import State
from usfmae_jax.training.update import combine


def finetune(config: ml_collections.ConfigDict, workdir: str, command: str = "") -> bool:
    """Trains and tests every member of a run, and leaves its results.

    Args:
      config: see `configs/finetune.py`.
      workdir: receives splits, members and results; an interrupted run in it is continued.
      command: how to repeat it, for the report.

    Returns:
      True when the run is complete, False when it was preempted after saving.

    Raises:
      InputError: something given cannot be used; raised before anything is compiled.
      DivergedError: loss or gradient norm is not finite; the last good checkpoint stays.
    """
    mesh = make_mesh(**config.mesh)
    check_batch(config, mesh)
    side_by_side.check(config, mesh)
    config = config.copy_and_resolve_references()
    config.evaluate.batch_size = fitting_batch(config.evaluate.batch_size, mesh, "config.evaluate.batch_size")
    job = supervised_setup.prepare(config, workdir)
    unfinished = [member for member in job.members if not member_reports.is_finished(job, member)]
    processes = side_by_side.how_many(job, mesh)
    member_reports.describe(job, mesh, len(unfinished), processes)
    if not side_by_side.train(train_members, job, unfinished, processes):
        return False
    if jax.process_index() == 0:
        member_reports.finish(job, command)
    return True


def train_members(job: Job, members: Sequence[Member], line: int = 0) -> bool:
    """Trains and tests members, one after the other, with programs that are compiled once.

    Args:
      job: of the run.
      members: to be trained.
      line: of the terminal that shows the progress; the first one also says what is compiled.

    Returns:
      False when it was preempted after saving.
    """
    with contextlib.redirect_stderr(io.StringIO()) if line else contextlib.nullcontext():
        programs = compile_programs(job, make_mesh(**job.config.mesh))
    with Preemption() as preemption:
        for member in members:
            trained = train(job, member, programs, preemption, line)
            if trained is None:
                return False
            test(job, member, programs, *trained)
    return True


def train(
    job: Job, member: Member, programs: Programs, preemption: Preemption, line: int = 0
) -> tuple[State, int, Predictions | None] | None:
    """Trains one member, or continues it; its progress is on a line of the terminal.

    Returns:
      parameters and statistics of the best evaluation, its step, and what it predicted of the validation part (None if
      that was before a restart); None when it was preempted after saving.
    """
    config, folder = job.config, member_reports.folder(job, member)
    saver = checkpoints.open_checkpoints(make_workdir(folder) + "/checkpoints", keep_latest=1, keep_best=0)
    found = checkpoints.latest_metadata(saver)
    if found:
        first_step, position, stored = found
        checkpoints.check_resumable(stored, job.settings, job.workdir, supervised_setup.RESUMABLE)
        state = checkpoints.restore(saver, programs.abstract, first_step)
    else:
        first_step, position = 0, {"next_batch": 0, "damaged": [], "best": {}, "worse": 0, "done": False}
        state = programs.start(config.seed + member.seed)
        if job.weights:
            state = classifiers.with_weights(state, classifiers.loadable(job.weights, job.description))
        state = state | {"best": programs.best_of(state)}
    best, best_score, worse, done = state.pop("best"), position["best"], position["worse"], position["done"]
    best_validation = None
    damage = pipeline.DamageReport([job.frames.shards], config.data.max_damaged, position["damaged"])
    dataset = training_batches(job, member)
    batches = pipeline.iterate(dataset, position["next_batch"], config.data.workers, config.data.threads)
    length = jax.device_put(np.int32(member.total_steps), replicated(programs.mesh))
    weights = class_weights(job.config, job.frames, member)
    number = job.members.index(member)
    monitor = Monitor(
        folder,
        total_steps=member.total_steps,
        first_step=first_step,
        batch_size=config.train.batch_size,
        every=config.log.every,
        flops_per_image=classifiers.training_flops(job.description, job.size),
        name=f"{member.name} ({number + 1}/{len(job.members)})",
        line=line,
    )
    saved = first_step
    with monitor as report, contextlib.closing(saver), contextlib.closing(batches):
        if first_step:
            report.say(f"{member.name}: resuming after step {first_step}")
        for step in range(first_step + 1, member.total_steps + 1):
            if done:
                break
            with report.waiting_for_input():
                batch = next(batches)
                for message in damage.update(batch["damaged"]):
                    report.say(message)
                weight = np.broadcast_to(weights, (len(batch["label"]), len(weights)))
                arrays: Any = {"image": batch["image"], "label": batch["label"], "weight": weight}
                arrays = global_batch(programs.mesh, arrays)
            state, numbers = programs.step(state, arrays, length)
            report.update(step, numbers)
            stop = preemption.requested()
            evaluated = step in member.evaluations
            if evaluated:
                report.flush()  # weights are evaluated only when their loss is known to be finite
                with report.pause():
                    score, predicted = validate(job, member, programs, state)
                    report.write(step, {f"validation/{name}": value for name, value in score.items()})
                    worse += 1
                    if better(config.stop.metric, score, best_score):
                        best, best_score, worse = programs.best_of(state), {"step": step, **score}, 0
                        best_validation = predicted
                done = step == member.total_steps or 0 < config.stop.patience <= worse
            due = evaluated and (member.evaluations.index(step) + 1) % config.checkpoint.every == 0
            if stop or done or due:
                report.flush()
                with report.pause():
                    position = {
                        "next_batch": step,
                        "damaged": sorted(damage.found),
                        "best": best_score,
                        "worse": worse,
                        "done": done,
                    }
                    loss = report.mean_loss_since_save()
                    whole = state | {"best": best}
                    metadata = {"position": position, "config": job.settings, "about": {"kind": "classification"}}
                    checkpoints.save(saver, whole, step, metadata, loss=loss)
                    saved = step
            if stop:
                report.say(
                    f"{member.name}: stopped at step {step} of {member.total_steps} as asked; the same command "
                    "continues it"
                )
                return None
        batch = arrays = None  # a worker's shared memory goes back before the worker does
        score, at = best_score[config.stop.metric], best_score["step"]
        report.say(f"{member.name}: best validation {config.stop.metric} {score:.3f} at step {at} of {saved}")
    return best | {"params": combine(state["params"], best["params"])}, at, best_validation


def training_batches(job: Job, member: Member) -> Any:
    """This process's endless batches of a member; see `pipeline.training_batches`."""
    config = job.config
    rows = member.fold.train
    label = job.frames.label[rows].astype(np.int32)
    source = pipeline.Rows(job.frames.shards, job.frames.index[rows], {"label": label})
    return pipeline.training_batches(
        pipeline.LoadView((source,), job.size, config.data.channels, augment.Augmentation(**config.augment)),
        batch_size=config.train.batch_size,
        seed=config.seed + member.seed,
        strata=label if config.regularization.balanced_sampling else None,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def test(job: Job, member: Member, programs: Programs, best: State, step: int, validation: Predictions | None) -> None:
    """Writes what a finished member leaves, whose `best` weights are those after `step` updates.

    `predictions.csv` comes last and marks it. What `best` predicts of the validation part is asked again if not given.
    """
    replicate = jax.jit(lambda tree: tree, out_shardings=replicated(programs.mesh))
    best = replicate(best)  # what other processes hold comes here
    if validation is None:
        validation = predict(job, member, programs, best, member.fold.validation)
    parts = {"validation": validation, "predictions": predict(job, member, programs, best, member.fold.test)}
    if jax.process_index():
        return
    directory = epath.Path(member_reports.folder(job, member))
    params, stats = jax.device_get((best["params"], best.get("stats", {})))
    lineage = member_reports.lineage(job, member, step)
    save_model(str(directory / "classifier"), Model(params, job.description, job.preprocessing, lineage, stats))
    for name, found in parts.items():
        found.write(directory / f"{name}.csv")
    if not job.config.checkpoint.keep_finished:
        (directory / "checkpoints").rmtree()


def predict(job: Job, member: Member, programs: Programs, variables: State, rows: np.ndarray) -> Predictions:
    """Predictions of a member for some rows of the table."""
    found = apply_batches(
        programs.mesh,
        programs.predict,
        variables,
        programs.images(rows),
        batch_size=job.config.evaluate.batch_size,
        total=len(rows),
        desc=member.name,
    )
    return member_reports.predictions(job, member, rows, found["probabilities"])


def validate(job: Job, member: Member, programs: Programs, state: State) -> tuple[dict[str, float], Predictions]:
    """Metrics of a state on the member's validation part, without those that are not defined there; and predictions."""
    variables: State = {name: state[name] for name in ("params", "stats") if name in state}
    found = predict(job, member, programs, variables, member.fold.validation)
    positive = positive_class(found.classes, job.config.positive)
    values = metrics(found.label, found.probabilities, positive)
    scores = {name: float(values[name][0]) for name in NAMES if name in values}
    return {name: value for name, value in scores.items() if math.isfinite(value)}, found


def better(metric: str, score: dict[str, float], best: dict[str, float]) -> bool:
    """Whether an evaluation beats the best one so far; among equals the lower log loss is better."""
    if not best:
        return True
    sign = -1 if metric in LOSSES else 1
    return (sign * score[metric], -score["log_loss"]) > (sign * best[metric], -best["log_loss"])
