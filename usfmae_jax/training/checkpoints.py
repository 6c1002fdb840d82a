"""Checkpoints: Orbax stores the state, with the data position and the config inside the same checkpoint."""

import functools
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as orbax

from usfmae_jax import files
from usfmae_jax.data.records import matches
from usfmae_jax.errors import InputError
from usfmae_jax.interop.checkpoint import check_metadata, quiet, reason, signed, without_paths
from usfmae_jax.training.checks import flat
from usfmae_jax.training.mesh import on_first_process, replicated
from usfmae_jax.training.state import State

#: Config fields that any resumed run may change: they affect where and how fast it computes, not what.
RESUMABLE = (
    "mesh",
    "log",
    "checkpoint",
    "init",  # the weights may have been moved
    "data.path",  # so may the shards; their fingerprint is compared instead
    "data.workers",
    "data.threads",
    "data.max_damaged",
    "train.skip_nonfinite",
    "model.scan",
    "model.remat",
    "model.attention",
)

#: Fields of Orbax's own checkpoint metadata.
_ORBAX_FIELDS = {
    *("item_handlers", "metrics", "performance_metrics", "init_timestamp_nsecs", "commit_timestamp_nsecs"),
    "custom_metadata",
}


def open_checkpoints(
    directory: str, *, keep_latest: int = 2, keep_every: int = 0, keep_best: int = 1
) -> orbax.training.Checkpointer:
    """Opens the checkpoints in a folder; incomplete ones, left by a killed run, are removed.

    Args:
      directory: local (absolute) or `gs://`; created if absent.
      keep_latest: number of newest checkpoints to keep.
      keep_every: keep checkpoints at multiples of this step permanently; 0 = none.
      keep_best: number of checkpoints with the lowest loss to keep.
    """
    # Failures of background writes are logged at length by every thread involved; they are raised anyway, at the next
    # save or at the end.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    on_first_process(lambda: _mend_ranks(epath.Path(directory)))
    keep = orbax.training.preservation_policies
    policies: list[Any] = [keep.LatestN(max(keep_latest, 1))]
    if keep_every:
        policies.append(keep.EveryNSteps(keep_every))
    if keep_best:
        policies.append(keep.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=keep_best))
    start = functools.partial(
        _Checkpointer,
        epath.Path(directory),
        # The loop decides when to save; another policy here would refuse the save on preemption.
        save_decision_policy=orbax.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=keep.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
    )
    try:
        return start()
    except Exception:  # damaged metadata can raise anything
        on_first_process(lambda: _put_metadata_aside(epath.Path(directory)))
        return start()


def _mend_ranks(directory: epath.Path) -> None:
    """Gives a checkpoint with an unreadable loss the worst rank, since Orbax would otherwise fail to open any."""
    for path in matches(directory, "*/metrics/metrics"):
        try:
            math.isfinite(files.parse(path.read_bytes())["loss"])
        except (ValueError, LookupError, TypeError):
            path.write_text('{"loss": Infinity}')


def _put_metadata_aside(directory: epath.Path) -> None:
    """Renames metadata that Orbax cannot read, so that only that checkpoint counts as damaged and the others open."""
    for path in directory.glob("*/_CHECKPOINT_METADATA"):
        try:
            damaged = not files.parse(path.read_bytes()).keys() <= _ORBAX_FIELDS
        except (ValueError, AttributeError):
            damaged = True
        if damaged:
            path.rename(path.parent / f"{path.name}.damaged")


class _Checkpointer(orbax.training.Checkpointer):
    """Orbax's checkpointer, with paths removed from the files it has written."""

    def close(self) -> None:
        super().close()
        clean = functools.partial(without_paths, self.directory)
        if sys.exc_info()[0] is None:
            on_first_process(clean)
        elif jax.process_index() == 0:  # other processes may not have failed: do not wait for them
            clean()


def save(
    checkpoints: orbax.training.Checkpointer, state: State, step: int, metadata: dict[str, Any], *, loss: float
) -> None:
    """Starts saving and returns as soon as the arrays have been copied off the devices.

    Args:
      checkpoints: from `open_checkpoints`.
      state: the train state.
      step: number of completed updates; names the checkpoint.
      metadata: JSON: `position` of the data; `config` of the run, compared on resume; and `about`, the kind of run and
        the description of the model, see `interop.checkpoint`.
      loss: ranks checkpoints for `keep_best`.
    """
    if checkpoints.latest is not None and checkpoints.latest.step == step:
        return  # already saved by schedule before the run was told to stop
    metadata = signed(metadata | {"checksums": _checksums(state)})
    checkpoints.save_async(step, state, metrics={"loss": loss}, custom_metadata=metadata)


def _checksums(state: State) -> list[int]:
    """One checksum per array, sensitive to every bit and independent of how the array is sharded.

    `interop.checkpoint.checksum` computes the same on the host when a model is opened. Orbax only checksums its
    indices: a bit flipped on disk in a parameter would go unnoticed.
    """
    leaves = jax.tree.leaves(state)
    return jax.device_get(_checksum(leaves[0].sharding.mesh)(leaves)).tolist()


@functools.lru_cache(4)
def _checksum(mesh: Mesh) -> Callable[[Any], jax.Array]:
    def one(leaf: jax.Array) -> jax.Array:
        size = leaf.dtype.itemsize
        bits = leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * size}"))
        place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
        for axis in reversed(range(leaf.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        # Odd factors lose no bit of a value, and since they differ, swapped values are detected.
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return jax.jit(lambda leaves: jnp.stack([one(leaf) for leaf in leaves]), out_shardings=replicated(mesh))


def resume(
    checkpoints: orbax.training.Checkpointer,
    abstract: Callable[[], State],
    accept: Callable[[dict[str, Any]], None],
    *,
    fallback: bool = False,
) -> tuple[State, int, dict[str, Any], str] | None:
    """Loads the newest checkpoint directly onto the devices, sharded as `abstract()` specifies.

    Args:
      checkpoints: from `open_checkpoints`.
      abstract: returns the result of `state.abstract_state`; not called if there is nothing to load.
      accept: raises InputError if the config of a checkpoint, nested JSON, does not match that of this run.
      fallback: load the newest intact checkpoint; damaged newer ones are moved to the workdir's `damaged_checkpoints/`.

    Returns:
      the state, its step, the data position, and a message about checkpoints moved aside ("" = none); None if there is
      no checkpoint.

    Raises:
      InputError: the newest checkpoint cannot be loaded, or with `fallback`, none of them can.
    """
    steps = [checkpoint.step for checkpoint in checkpoints.checkpoints]
    wanted = abstract() if steps else {}
    for place, step in reversed(list(enumerate(steps))):
        try:
            with quiet():
                stored: Any = checkpoints.metadata(step).custom_metadata
            check_metadata(stored)
            accept(stored["config"])
            with quiet():
                state = checkpoints.load(step, wanted)
            known = stored.get("checksums")  # earlier versions wrote none
            if known is not None and known != _checksums(state):
                raise ValueError("its checksum is wrong")
        except InputError:
            raise
        except Exception as error:  # damaged bytes can raise anything
            if fallback and place:
                continue
            remedy = "remove that checkpoint to resume from the one before, or add --config.checkpoint.fallback=true"
            remedy = remedy if place else "there is no earlier one; remove it to start anew"
            raise InputError(
                f"checkpoint {step} in {checkpoints.directory} cannot be loaded: {reason(error)}; {remedy}, or choose "
                "another --workdir"
            ) from error
        damaged = steps[place + 1 :]
        said = _set_aside(checkpoints, damaged) if damaged else ""
        return state, step, stored["position"], said
    return None


def _set_aside(checkpoints: orbax.training.Checkpointer, steps: Sequence[int]) -> str:
    """Moves damaged checkpoints out of the way of a run that resumes from an earlier one."""
    folder = checkpoints.directory.parent / "damaged_checkpoints"

    def move() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for step in steps:
            taken = len(list(folder.iterdir()))  # a checkpoint of the same step may have been moved here before
            (checkpoints.directory / str(step)).rename(folder / f"{step}-{taken}")

    on_first_process(move)
    checkpoints.reload()
    return f"checkpoint {', '.join(map(str, steps))} could not be loaded and was moved to {folder.name}/"


#: What is compared by its fingerprint, by the name of that.
_MEANT = {
    "init_fingerprint": "the fingerprint of config.init",
    "teacher_fingerprint": "the fingerprint of config.latent.teacher",
}


def check_resumable(
    stored: Mapping[str, Any], current: Mapping[str, Any], workdir: str, resumable: Sequence[str]
) -> None:
    """Refuses to resume with a config that would compute something different.

    Args:
      stored: config of the checkpoint, nested JSON.
      current: config of this run, nested JSON.
      workdir: for the error message.
      resumable: fields, or groups of fields, that may differ.

    Raises:
      InputError: lists every other field that differs, with both values.
    """
    old, new = flat(stored), flat(current)
    differences = [
        f"{_MEANT.get(name, name)} is {new.get(name)!r} but was {old.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not any(name == f or name.startswith(f + ".") for f in resumable)
    ]
    if differences:
        data = any(difference.startswith(("data_fingerprint", "data_content")) for difference in differences)
        raise InputError(
            f"the checkpoint in {workdir} was made with another config: {'; '.join(differences)}. "
            f"Use the old values{' and the shards as they were' * data} to resume, or another --workdir to start anew."
        )
