"""The pretraining loop: set up, restore, then for every step: batch, update, report, save."""

import contextlib
import functools
import json
import sys
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from usfmae_jax import __version__, files
from usfmae_jax.data import pipeline
from usfmae_jax.data.provenance import describe_data
from usfmae_jax.data.records import Shards
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import tables
from usfmae_jax.interop.model import Lineage, Model, model_graph, read_lineage, save_model, write_lineage
from usfmae_jax.pretraining import build, inspect
from usfmae_jax.training import checkpoints, checks, hardware, writers
from usfmae_jax.training.mesh import damage_of_all, global_batch, make_mesh, on_first_process, replicated
from usfmae_jax.training.mesh import describe as describe_mesh
from usfmae_jax.training.monitor import Monitor, Preemption, Profile, naming_records
from usfmae_jax.training.state import State, abstract_state, init_state, teacher_state, weights_of
from usfmae_jax.training.update import compile_update


def pretrain(config: ml_collections.ConfigDict, workdir: str) -> bool:
    """Pretrains an encoder with the config's objective and writes it to `<workdir>/encoder/`.

    Args:
      config: see `configs/pretrain.py`.
      workdir: folder for checkpoints, logs, pictures and the encoder; an interrupted run in it is resumed.

    Returns:
      True if the run is complete, False if it was preempted, after saving.

    Raises:
      InputError: the config or the data is invalid; raised before anything is compiled.
      DivergedError: the loss or gradient norm is not finite; the last good checkpoint is kept.
    """
    objective, profile = build.objective(config), Profile(workdir, config.log.profile)
    mesh = make_mesh(**config.mesh)
    build.check(config, mesh.size)
    writers.check(config.log.to_dict(), workdir)
    sources, dataset = build.open_data(config)
    total_steps = build.count_steps(config, sources)
    optimizer, _ = build.make_optimizer(config)
    settings, about = build.settings(config, sources, objective.teacher), build.about(config, objective)
    saver = checkpoints.open_checkpoints(checks.make_workdir(workdir) + "/checkpoints", **config.checkpoint.keep)

    begun: dict[str, Any] = {}  # settings of the run being resumed

    def accept(stored: dict[str, Any]) -> None:
        begun.update(stored)
        absent = {"objective": "mae", "data_content": settings["data_content"]}  # versions that did not record these
        grown = {group: fields | stored.get(group, {}) for group, fields in build.ABSENT.items()}
        checkpoints.check_resumable(absent | stored | grown, settings, workdir, build.RESUMABLE)

    seen = objective.teacher.lineage if objective.teacher else []  # data that the teacher has seen counts as seen
    first_stages = [*(one | {"role": "teacher"} for one in seen), stage(settings, total_steps, sources)]
    averaged = config.train.ema > 0
    abstract = functools.partial(abstract_state, objective.make, optimizer, mesh, ema=averaged)
    found = checkpoints.resume(saver, abstract, accept, fallback=config.checkpoint.fallback)
    if found:
        graph, (state, first_step, position, aside) = model_graph(objective.make), found
        on_first_process(lambda: keep_lineage(workdir, begun.get("init", ""), first_stages))
    else:
        aside, first_step, position = "", 0, {"next_batch": 0, "damaged": []}
        ancestors: Lineage = []
        graph, state = init_state(objective.make, optimizer, mesh, config.seed, averaged)
        if config.init:
            state, ancestors, taken = build.with_weights(state, config.init, config.model)
            print(taken, file=sys.stderr)
        if jax.process_index() == 0:  # written now: a resumed run may no longer find its initial weights
            write_lineage(workdir, [*ancestors, *first_stages])
    if objective.teacher:
        state |= teacher_state(objective.teacher.params, mesh)
    looks = build.inspections(config, objective, graph, mesh, sources, dataset, workdir)
    damage = pipeline.DamageReport(sources, config.data.max_damaged, position["damaged"])
    batches = pipeline.iterate(dataset, position["next_batch"], config.data.workers, config.data.threads)
    update = build.make_step(config, objective, graph, mesh)
    report = Monitor(
        workdir,
        total_steps=total_steps,
        first_step=first_step,
        batch_size=config.train.batch_size,
        every=config.log.every,
        flops_per_image=objective.flops(),
        skippable=config.train.skip_nonfinite,
        page=True,
        writers=writers.open_writers(config.log.to_dict(), workdir, first_step, checks.flat(settings)),
    )
    report.skipped = position.get("skipped", 0)
    length = jax.device_put(np.int32(total_steps), replicated(mesh))
    train_step, step = None, first_step

    named, stopping = naming_records(dataset, sources, workdir), Preemption()
    with stopping as preemption, report, contextlib.closing(saver), contextlib.closing(batches), named, profile:
        if jax.process_index() == 0:
            files.write(epath.Path(workdir, "config.json"), json.dumps(settings, indent=2) + "\n")
        describe(report, config, mesh, sources, state, total_steps)
        report.say(f"workdir: {workdir}")
        if unseen := profile.between(first_step, total_steps):
            report.say(unseen)
        if aside:
            report.say(f"warning: {aside}")
        if first_step:
            report.say("already finished" if first_step == total_steps else f"resuming after step {first_step}")
        else:
            inspect.look(looks, report, state, 0)
        for step in range(first_step + 1, total_steps + 1):
            profile.begin(step)
            with report.waiting_for_input():
                batch = next(batches)
                for line in damage.update(damage_of_all(batch["damaged"])):
                    report.say(line)
                images = global_batch(mesh, batch["image"])
            if train_step is None:
                with report.pause():
                    train_step = compile_update(update, state, images, report.say)
            state, metrics = train_step(state, images, length)
            with report.pause():
                profile.end(step, metrics)
            report.update(step, metrics)
            stop = preemption.requested()
            if stop or step == total_steps or step % config.checkpoint.every == 0:
                report.flush()  # a state is saved only once its loss is known to be finite
                with report.pause():
                    position = {"next_batch": step, "damaged": sorted(damage.found), "skipped": report.skipped}
                    metadata = {"position": position, "config": settings, "about": about}
                    kept = {name: part for name, part in state.items() if name != "teacher"}
                    checkpoints.save(saver, kept, step, metadata, loss=report.mean_loss_since_save())
            if stop and step < total_steps:
                report.say(f"stopped at step {step} of {total_steps} as asked; the same command continues it")
                break
            inspect.look(looks, report, state, step, last=step == total_steps)
        batch = images = None  # release shared memory of the workers before they end
        if damage.found:
            report.say(f"{len(damage.found)} damaged records were skipped in all")
    if step < total_steps:
        return False
    with Preemption():  # the rest takes seconds: a signal does not interrupt it
        export(about, weights_of(state)["encoder"], workdir, total_steps)
    return True


def compile_for(config: ml_collections.ConfigDict, target: str, devices: list[Any]) -> dict[str, Any]:
    """Compiles the training step of `pretrain` for hardware that need not be present; needs no data, trains nothing.

    Args:
      config: see `configs/pretrain.py`.
      target: see `training.hardware`.
      devices: devices of the target.

    Returns:
      the result of `hardware.fit`.

    Raises:
      InputError: the config is invalid.
    """

    def attempt(settings: dict[str, Any]) -> dict[str, Any]:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(settings)
        objective = build.objective(changed)
        mesh = make_mesh(**changed.mesh, devices=devices)
        build.check(changed, mesh.size)
        optimizer, _ = build.make_optimizer(changed)
        state = abstract_state(objective.make, optimizer, mesh, ema=changed.train.ema > 0)
        if objective.teacher:
            state |= teacher_state(objective.teacher.params, mesh, abstract=True)
        update = build.make_step(changed, objective, model_graph(objective.make), mesh)
        flops = objective.flops() * changed.train.batch_size
        batch = build.abstract_batch(changed, mesh)
        return hardware.measure(target, update, state, batch, flops, remat=changed.model.remat)

    return hardware.fit(attempt, checks.flat(config.to_dict()))


def describe(
    report: Monitor,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    sources: list[Shards],
    state: State,
    total_steps: int,
) -> None:
    """Prints what is about to run."""
    report.say(f"Total: {parameter_overview.count_parameters(state['params']):,} parameters")
    frames = sum(map(len, sources))
    report.say(
        f"{describe_mesh(mesh)}\n"
        f"data: {frames} frames from {tables.counted(len(sources), 'source')}; {total_steps} steps of "
        f"{config.train.batch_size} = {total_steps * config.train.batch_size / frames:.1f} epochs\n"
        f"evaluation sets kept out of it: {', '.join(config.data.exclude) or 'none'}"
    )


def stage(settings: dict[str, Any], total_steps: int, sources: list[Shards]) -> dict[str, Any]:
    """What this run adds to the lineage of its weights."""
    code = f"usfmae_jax {__version__}"
    data = describe_data(sources, hashes=True)
    return {"job": "pretrain", "code": code, "step": total_steps, "config": settings, "data": data}


def keep_lineage(workdir: str, init: str, stages: Lineage) -> None:
    """Makes sure that a resumed run has a lineage; it is written anew if the run began with random weights.

    Args:
      workdir: folder of the run.
      init: the initial weights of the run; "" = random ones.
      stages: what the run itself adds to the lineage.

    Raises:
      InputError: lineage.json is missing or damaged, and the lineage of the initial weights is not known.
    """
    try:
        if read_lineage(workdir):
            return
    except InputError:  # it does not contain a lineage
        pass
    if init:
        raise InputError(
            f"{workdir}/lineage.json, which says where {init} came from, is missing or damaged; put a copy of it back, "
            "or choose another --workdir to start anew"
        )
    write_lineage(workdir, stages)
    print("warning: lineage.json was missing or damaged and is written anew", file=sys.stderr)


def export(about: dict[str, Any], params: Any, workdir: str, step: int) -> None:
    """Writes the encoder's parameters after `step` updates of the run in `workdir` to `<workdir>/encoder/`."""
    if jax.process_count() > 1:
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        params = jax.jit(lambda p: p, out_shardings=replicated(mesh))(params)  # gather the shards of other hosts
    if jax.process_index():
        return
    lineage = read_lineage(workdir)
    lineage[-1:] = [stage | {"step": step} for stage in lineage[-1:]]
    directory = f"{workdir}/encoder"
    model = Model({"encoder": jax.device_get(params)}, about["description"], about["preprocessing"], lineage)
    save_model(directory, model.encoder())
    print(f"encoder after step {step}: {directory}", file=sys.stderr)
