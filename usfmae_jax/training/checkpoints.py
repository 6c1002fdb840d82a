"""Checkpoints: Orbax holds the state; the data position and the config travel inside the same checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as orbax

from usfmae_jax.errors import InputError
from usfmae_jax.training.checks import flat
from usfmae_jax.training.state import State

#: Config fields that a resumed run of any loop may change: they alter where and how fast it computes, not what.
RESUMABLE = (
    "mesh",
    "log",
    "checkpoint",
    "init",  # the weights may have moved
    "data.path",  # likewise the shards; their fingerprint is compared instead
    "data.workers",
    "data.threads",
    "data.max_damaged",
    "model.scan",
    "model.remat",
    "model.attention",
)


def open_checkpoints(
    directory: str, *, keep_latest: int = 2, keep_every: int = 0, keep_best: int = 1
) -> orbax.training.Checkpointer:
    """Opens the checkpoints below a folder; a half-written one, left by a killed run, is removed.

    Args:
      directory: local (absolute) or `gs://`; created if absent.
      keep_latest: how many of the newest to keep.
      keep_every: keep those at multiples of this step for good; 0 = none.
      keep_best: how many of those with the lowest loss to keep.
    """
    keep = orbax.training.preservation_policies
    policies: list[Any] = [keep.LatestN(max(keep_latest, 1))]
    if keep_every:
        policies.append(keep.EveryNSteps(keep_every))
    if keep_best:
        policies.append(keep.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=keep_best))
    return orbax.training.Checkpointer(
        epath.Path(directory),
        # The loop decides when; asking again here would refuse the save on preemption.
        save_decision_policy=orbax.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=keep.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
    )


def save(
    checkpoints: orbax.training.Checkpointer, state: State, step: int, metadata: dict[str, Any], *, loss: float
) -> None:
    """Starts saving and returns as soon as the arrays are copied off the devices.

    Args:
      checkpoints: from `open_checkpoints`.
      state: the train state.
      step: finished updates; names the checkpoint.
      metadata: JSON: `position` of the data; `config` of the run, compared on resume; and `about`, which says what kind
        of run wrote it and what the model is, see `interop.checkpoint`.
      loss: ranks checkpoints for `keep_best`.
    """
    if checkpoints.latest is not None and checkpoints.latest.step == step:
        return  # saved already, by schedule, before the run was told to stop
    checkpoints.save_async(step, state, metrics={"loss": loss}, custom_metadata=metadata)


def latest_metadata(checkpoints: orbax.training.Checkpointer) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """Step, data position and config of the newest checkpoint; None when there is none."""
    latest = checkpoints.latest
    if latest is None:
        return None
    stored = checkpoints.metadata(latest).custom_metadata
    return latest.step, stored["position"], stored["config"]


def restore(checkpoints: orbax.training.Checkpointer, abstract: State, step: int) -> State:
    """Loads a state straight onto the devices that `abstract` (from `state.abstract_state`) names.

    Raises:
      InputError: the checkpoint does not fit.
    """
    try:
        return checkpoints.load(step, abstract)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"checkpoint {step} in {checkpoints.directory} cannot be loaded: {str(error).splitlines()[0]}; "
            "remove that checkpoint to resume from the one before, or choose another --workdir"
        ) from error


def check_resumable(
    stored: Mapping[str, Any], current: Mapping[str, Any], workdir: str, resumable: Sequence[str]
) -> None:
    """Refuses to resume with a config that would compute something else.

    Args:
      stored: config of the checkpoint, nested JSON.
      current: config of this run, nested JSON.
      workdir: for the message.
      resumable: fields, or groups of them, that may differ.

    Raises:
      InputError: names every field that differs, with both values.
    """
    old, new = flat(stored), flat(current)
    differences = [
        f"{name} is {new.get(name)!r} but was {old.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not any(name == f or name.startswith(f + ".") for f in resumable)
    ]
    if differences:
        raise InputError(
            f"the checkpoint in {workdir} was made with another config: {'; '.join(differences)}. "
            "Use the old values to resume, or another --workdir to start anew."
        )
