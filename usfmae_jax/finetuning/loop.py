"""The fine-tuning loop: for every member: restore, then batch, update, report, evaluate, save; then test the best."""

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.data import augment, pipeline
from usfmae_jax.data.pipeline import LoadView, Rows
from usfmae_jax.data.provenance import restrict
from usfmae_jax.data.table import Table
from usfmae_jax.data.table import images as decode
from usfmae_jax.evaluation.predictions import Predictions, identify
from usfmae_jax.finetuning import build, results, side_by_side
from usfmae_jax.finetuning.build import Run
from usfmae_jax.finetuning.members import Member
from usfmae_jax.interop.model import Model, model_graph, save_model
from usfmae_jax.models.layers import without_lora
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.tasks import Task
from usfmae_jax.training import checkpoints, checks, hardware, writers
from usfmae_jax.training.forward import apply_batches, fitting_batch, in_pieces, with_mirror
from usfmae_jax.training.mesh import (
    batch_sharding,
    damage_of_all,
    global_batch,
    make_mesh,
    on_first_process,
    replicated,
)
from usfmae_jax.training.monitor import Monitor, Preemption, naming_records
from usfmae_jax.training.state import State, abstract_state, fill, state_maker
from usfmae_jax.training.update import Update, combine, compile_update, make_update, pick

#: Decoded validation and test images are kept in memory up to this many bytes; otherwise they are decoded each time.
KEPT_BYTES = 2**31


def finetune(config: ml_collections.ConfigDict, workdir: str, command: str = "") -> bool:
    """Trains and tests every member of a run, and writes the results.

    Args:
      config: see `configs/finetune.py`.
      workdir: folder for splits, members and results; an interrupted run in it is resumed.
      command: the command line that repeats it, for the report.

    Returns:
      True if the run is complete, False if it was preempted, after saving.

    Raises:
      InputError: the config or the data is invalid; raised before anything is compiled.
      DivergedError: the loss or gradient norm is not finite; the last good checkpoint is kept.
    """
    mesh = make_mesh(**config.mesh)
    checks.check_batch(checks.flat(config.to_dict()), mesh.size)
    writers.check(config.log.to_dict(), workdir)
    side_by_side.check(config.parallel, mesh)
    config = config.copy_and_resolve_references()
    config.evaluate.batch_size = fitting_batch(config.evaluate.batch_size, mesh, "config.evaluate.batch_size")
    run = build.prepare(config, workdir)
    unfinished = [member for member in run.members if not results.is_finished(run, member)]
    count = functools.partial(build.count_parameters, build.model_maker(config, run.description, 0))
    processes = side_by_side.how_many(len(run.members), config.parallel, count, mesh)
    results.start(run)
    results.describe(run, mesh, config.train.batch_size, len(unfinished), processes)
    if not side_by_side.train(functools.partial(train_members, config, run), unfinished, processes):
        return False
    on_first_process(lambda: results.finish(run, command, config.evaluate.bootstrap, config.evaluate.batch_size))
    return True


def train_members(config: ml_collections.ConfigDict, run: Run, members: Sequence[Member], line: int = 0) -> bool:
    """Trains and tests members, one after another, with programs that are compiled once.

    Args:
      config: config of the run.
      run: from `build.prepare`.
      members: the members to train.
      line: line of the terminal for the progress bar; the first also reports compilation.

    Returns:
      False if it was preempted, after saving.
    """
    with contextlib.redirect_stderr(io.StringIO()) if line else contextlib.nullcontext():
        trainer = Trainer(config, run)
    with Preemption() as preemption:
        for member in members:
            trained = trainer.train(member, preemption, line)
            if trained is None:
                return False
            trainer.test(member, *trained)
    return True


def training_step(
    config: ml_collections.ConfigDict,
    task: Task,
    table: Table,
    description: dict[str, Any],
    preprocessing: dict[str, Any],
    mesh: Mesh,
) -> tuple[Update, State, dict[str, jax.ShapeDtypeStruct]]:
    """The training step of every member, with the shapes and shardings of its state and batch.

    Args:
      config: config of the run.
      task: see `build.Run`.
      table: see `build.Run`.
      description: see `build.Run`.
      preprocessing: see `build.Run`.
      mesh: mesh of the devices.
    """
    freeze, trained, _ = build.trained_part(config, description)
    make_model = build.model_maker(config, description, freeze)
    optimizer, learning_rate = build.make_optimizer(config, description)
    mean, std = (tuple(preprocessing[name]) for name in ("mean", "std"))

    def prepare(batch: Any, rng: jax.Array) -> tuple[Any, jax.Array]:
        return task.prepare(batch | {"image": normalize_images(batch["image"], mean, std)}, rng)

    how = {"accumulate": config.train.accumulate, "skip": config.train.skip_nonfinite > 0, "trained": trained}
    update = make_update(model_graph(make_model), prepare, task.loss, optimizer, learning_rate, mesh, **how)
    state = abstract_state(make_model, optimizer, mesh, lambda params: pick(params, trained))
    shapes: dict[str, Any] = {"image": ((*preprocessing["image_size"], preprocessing["channels"]), np.uint8)}
    if task.mask:
        shapes["mask"] = ((*preprocessing["image_size"], *task.mask_layers), np.uint8)
    for name, value in task.targets(table, np.arange(1)).items():
        shapes[name] = (value.shape[1:], value.dtype)
    size, over = config.train.batch_size, batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct((size, *one), dtype, sharding=over) for name, (one, dtype) in shapes.items()}
    return update, state, batch


def compile_for(config: ml_collections.ConfigDict, target: str, devices: list[Any]) -> dict[str, Any]:
    """Compiles the training step of `finetune` for hardware that need not be present; trains nothing.

    Args:
      config: see `configs/finetune.py`; its shards determine what is learnt, such as the number of classes.
      target: see `training.hardware`.
      devices: devices of the target.

    Returns:
      the result of `hardware.fit`.

    Raises:
      InputError: the config or the data is invalid.
    """
    table, task, _, description, preprocessing = build.read(config)
    flops = build.training_flops(description, preprocessing["image_size"]) * config.train.batch_size
    fields = checks.flat(config.to_dict())
    if description["model"] != "vit":
        del fields["model.remat"]  # only a ViT has it

    def attempt(settings: dict[str, Any]) -> dict[str, Any]:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(settings)
        mesh = make_mesh(**changed.mesh, devices=devices)
        checks.check_batch(checks.flat(changed.to_dict()), mesh.size)
        step = training_step(changed, task, table, description, preprocessing, mesh)
        return hardware.measure(target, *step, flops, remat=changed.model.remat)

    return hardware.fit(attempt, fields)


class Trainer:
    """Trains and tests members of a run, with functions that are compiled once for all of them.

    Args:
      config: config of the run.
      run: from `build.prepare`.
    """

    def __init__(self, config: ml_collections.ConfigDict, run: Run):
        self.config, self.run, self.mesh = config, run, make_mesh(**config.mesh)
        self._whole_images = self._decoded()
        freeze, trained, _ = build.trained_part(config, run.description)
        make_model = build.model_maker(config, run.description, freeze)
        optimizer, _ = build.make_optimizer(config, run.description)
        graph = model_graph(make_model)
        mean, std = (tuple(run.preprocessing[name]) for name in ("mean", "std"))

        def predict(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
            return run.task.predict(nnx.merge(graph, *variables.values()), normalize_images(images, mean, std))

        def part(params: Any) -> Any:
            return pick(params, trained)

        update, state, batch = training_step(config, run.task, run.table, run.description, run.preprocessing, self.mesh)
        kept = [name for name in ("params", "stats") if name in state]

        def best(state: State) -> State:
            """What is kept from the best evaluation: the trained parameters and the statistics."""
            return {name: part(state[name]) if name == "params" else state[name] for name in kept}

        results.say(f"Total: {parameter_overview.count_parameters(state['params']):,} parameters")
        self._update = compile_update(update, state, batch, results.say)
        self._start = state_maker(make_model, optimizer, self.mesh, part)
        self._abstract = state | {"best": best(state)}
        self._copy_best = jax.jit(lambda state: jax.tree.map(jnp.copy, best(state)))
        self._predict = with_mirror(predict, run.task.mirror) if config.evaluate.flip else predict

    def train(
        self, member: Member, preemption: Preemption, line: int = 0
    ) -> tuple[State, int, dict[str, np.ndarray] | None] | None:
        """Trains one member, or resumes it, with a progress bar on a line of the terminal.

        Returns:
          parameters and statistics of the best evaluation, its step, and its predictions for the validation part (None
          if they were made before a restart); None instead if it was preempted, after saving.
        """
        config, run, task = self.config, self.run, self.run.task
        folder = checks.make_workdir(run.folder(member))
        saver = checkpoints.open_checkpoints(folder + "/checkpoints", keep_latest=1, keep_best=0)
        accept = functools.partial(build.check_resumable, run)
        found = checkpoints.resume(saver, lambda: self._abstract, accept, fallback=config.checkpoint.fallback)
        if found:
            state, first_step, position, aside = found
        else:
            aside, first_step, position = "", 0, {"next_batch": 0, "damaged": [], "best": {}, "worse": 0, "done": False}
            state = self._start(config.seed + member.seed)
            if run.init:
                state = fill(state, build.loadable(run.init, run.description))
            state = state | {"best": self._copy_best(state)}
        best, best_score, worse, done = state.pop("best"), position["best"], position["worse"], position["done"]
        best_predicted = None
        damage = pipeline.DamageReport([run.table.shards], config.data.max_damaged, position["damaged"])
        dataset = self.batches(member)
        batches = pipeline.iterate(dataset, position["next_batch"], config.data.workers, config.data.threads)
        length = jax.device_put(np.int32(member.total_steps), replicated(self.mesh))
        settings = checks.flat(run.settings)
        monitor = Monitor(
            folder,
            total_steps=member.total_steps,
            first_step=first_step,
            batch_size=config.train.batch_size,
            every=config.log.every,
            flops_per_image=build.training_flops(run.description, run.image_format[0]),
            skippable=config.train.skip_nonfinite,
            name=f"{member.name} ({run.members.index(member) + 1}/{len(run.members)})",
            line=line,
            writers=writers.open_writers(config.log.to_dict(), folder, first_step, settings, run.workdir),
        )
        monitor.skipped = position.get("skipped", 0)
        saved = first_step
        named = naming_records(dataset, [run.table.shards], folder)
        with monitor as report, contextlib.closing(saver), contextlib.closing(batches), named:
            if aside:
                report.say(f"warning: {member.name}: {aside}")
            if first_step:
                report.say(f"{member.name}: resuming after step {first_step}")
            for step in range(first_step + 1, member.total_steps + 1):
                if done:
                    break
                with report.waiting_for_input():
                    batch = next(batches)
                    for message in damage.update(damage_of_all(batch.pop("damaged"), member.name)):
                        report.say(message)
                    del batch["record"]
                    batch = global_batch(self.mesh, batch)
                state, numbers = self._update(state, batch, length)
                report.update(step, numbers)
                stop = preemption.requested()
                evaluated = step in member.evaluations
                if evaluated:
                    report.flush()  # weights are evaluated only once their loss is known to be finite
                    with report.pause():
                        variables: State = {name: state[name] for name in ("params", "stats") if name in state}
                        predicted = self.predict(member, variables, member.fold.validation)
                        score = task.score(run.table, member.fold.validation, predicted)
                        report.write(step, {f"validation/{name}": value for name, value in score.items()})
                        worse += 1
                        if better(score, best_score, config.stop.metric, task.tie, task.losses):
                            best, best_score, worse = self._copy_best(state), {"step": step, **score}, 0
                            best_predicted = predicted
                    done = step == member.total_steps or 0 < config.stop.patience <= worse
                due = evaluated and (member.evaluations.index(step) + 1) % config.checkpoint.every == 0
                if stop or done or due:
                    report.flush()
                    with report.pause():
                        position = {"next_batch": step, "damaged": sorted(damage.found), "best": best_score}
                        position |= {"worse": worse, "done": done, "skipped": report.skipped}
                        metadata = {"position": position, "config": run.settings, "about": {"kind": config.task}}
                        whole = state | {"best": best}
                        checkpoints.save(saver, whole, step, metadata, loss=report.mean_loss_since_save())
                        saved = step
                if stop:
                    report.say(
                        f"{member.name}: stopped at step {step} of {member.total_steps} as asked; the same command "
                        "continues it"
                    )
                    return None
            batch = None  # release shared memory of the workers before they end
            score, at = best_score[config.stop.metric], best_score["step"]
            report.say(f"{member.name}: best validation {config.stop.metric} {score:.3f} at step {at} of {saved}")
        return best | {"params": combine(state["params"], best["params"])}, at, best_predicted

    def test(self, member: Member, best: State, step: int, validation: dict[str, np.ndarray] | None) -> None:
        """Tests a member and writes its results; its `best` weights are those after `step` updates.

        `predictions.csv` is written last and marks the member as finished. Predictions for the validation part are
        computed again if not given.
        """
        run, config, fold = self.run, self.config, member.fold
        best = jax.jit(lambda tree: tree, out_shardings=replicated(self.mesh))(best)  # gather other processes' parts
        validation = self.predict(member, best, fold.validation) if validation is None else validation
        masks = results.Masks(run, member) if config.get("save_masks") and jax.process_index() == 0 else None
        tested = self.predict(member, best, fold.test, masks)
        if jax.process_index():
            return
        directory, task = epath.Path(run.folder(member)), run.task.fitted(run.table, fold.train)
        params, stats = (jax.device_get(best.get(name, {})) for name in ("params", "stats"))
        learnt = run.table.take(np.concatenate([fold.train, fold.validation]))
        stage = run.lineage[-1] | {"member": member.name, "step": step}
        lineage = [*run.lineage[:-1], stage | {"data": restrict(stage["data"], learnt)}]
        described = task.describe(run.description)
        model = Model(without_lora(params), described, run.preprocessing, lineage, stats)
        save_model(str(directory / model.kind), model)
        if masks:
            masks.write()
        for name, rows, predicted in (("validation", fold.validation, validation), ("predictions", fold.test, tested)):
            self.record(member, rows, predicted).write(directory / f"{name}.csv")
        results.seal(directory, model.kind)
        if not config.checkpoint.keep_finished:
            (directory / "checkpoints").rmtree()

    def record(self, member: Member, rows: np.ndarray, predicted: dict[str, np.ndarray]) -> Predictions:
        """A member's predictions for some rows, in the form that is written."""
        ids = identify(self.run.table, rows, member.fold.name, member.seed, member.fraction, member.fold.copied)
        return self.run.task.record(ids, self.run.table, rows, predicted)

    def predict(
        self, member: Member, variables: State, rows: np.ndarray, masks: results.Masks | None = None
    ) -> dict[str, np.ndarray]:
        """Predicts some rows of the table; returns what the task keeps, arrays `[N, ...]` by name.

        Args:
          member: the member that predicts.
          variables: its parameters and statistics.
          rows: rows of the table.
          masks: writer of predicted masks; None = masks are not written.
        """
        how = {"batch_size": self.config.evaluate.batch_size, "desc": member.name}
        task = self.run.task.fitted(self.run.table, member.fold.train)

        def work(piece: np.ndarray) -> dict[str, np.ndarray]:
            images = self._whole_images(piece)
            predicted = apply_batches(self.mesh, self._predict, variables, images, total=len(piece), **how)
            if masks:
                masks.add(piece, predicted)
            return task.measure(self.run.table, piece, predicted)

        return in_pieces(rows, work)

    def batches(self, member: Member) -> Any:
        """This process's endless batches of a member; see `data.pipeline.training_batches`."""
        config, run, rows = self.config, self.run, member.fold.train
        (size, channels), balanced = run.image_format, config.regularization.balanced_sampling
        targets = run.task.fitted(run.table, rows).targets(run.table, rows)
        source = Rows(run.table.shards, run.table.index[rows], targets)
        return pipeline.training_batches(
            LoadView((source,), size, channels, augment.Augmentation(**config.augment), run.task.mask),
            batch_size=config.train.batch_size,
            seed=config.seed + member.seed,
            strata=run.task.strata(run.table).code[rows] if balanced else None,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )

    def _decoded(self) -> Any:
        """A function that yields batches uint8 `[n, H, W, C]` of whole images for given rows.

        Validation and test images are decoded now, so that damaged ones are found early, and kept in memory if there
        are not too many.

        Raises:
          InputError: an image is damaged; the message names it.
        """
        (size, channels), batch_size = self.run.image_format, self.config.evaluate.batch_size
        how = {"batch_size": batch_size, "threads": self.config.data.threads}

        def whole(rows: np.ndarray) -> Iterator[np.ndarray]:
            return decode(self.run.table, rows, size=size, channels=channels, **how)

        parts = [rows for member in self.run.members for rows in (member.fold.validation, member.fold.test)]
        needed = np.unique(np.concatenate(parts))
        if len(needed) * size[0] * size[1] * channels > KEPT_BYTES:
            return whole
        kept = np.concatenate(list(whole(needed)))

        def slices(rows: np.ndarray) -> Iterator[np.ndarray]:
            places = np.searchsorted(needed, rows)
            for start in range(0, len(rows), batch_size):
                yield kept[places[start : start + batch_size]]

        return slices


def better(score: dict[str, float], best: dict[str, float], metric: str, tie: str, losses: frozenset[str]) -> bool:
    """Whether an evaluation beats the best so far by `metric`, with ties broken by `tie`; lower is better for `losses`.

    NaN (undefined) is worse than any number.
    """
    if not best:
        return True
    names = [name for name in (metric, tie) if name]
    new, old = ([-one[name] if name in losses else one[name] for name in names] for one in (score, best))
    return np.nan_to_num(new, nan=-np.inf).tolist() > np.nan_to_num(old, nan=-np.inf).tolist()
