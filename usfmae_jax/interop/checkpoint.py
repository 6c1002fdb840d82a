"""The parameters in a checkpoint, without the rest of the train state."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as orbax

from usfmae_jax import files
from usfmae_jax.errors import InputError

#: Bytes of a checkpoint in transit to or from the disk at any time.
CONCURRENT = 128 * 2**20


def save_parameters(workdir: str, params: dict[str, Any], about: dict[str, Any], config: dict[str, Any]) -> None:
    """Creates a workdir like that of a run before its first step, with these parameters.

    Args:
      workdir: where `checkpoints/0` and `config.json` are written.
      params: nested dict of arrays; `encoder`, and `decoder` if there is one.
      about: JSON: `kind`, `description` and `preprocessing` as in `interop.model.Model`.
      config: nested JSON, written to `config.json`; `model` and `data.channels` as in `configs/pretrain.py`.

    Raises:
      InputError: the workdir already holds checkpoints of a run.
    """
    root = epath.Path(workdir)
    root = root if "://" in workdir else root.resolve()
    folder = root / "checkpoints"
    if folder.exists():
        if {child.name for child in folder.iterdir()} - {"0"}:
            raise InputError(f"{workdir} holds the checkpoints of a run; name a new folder")
        folder.rmtree()
    context = orbax.Context()
    context.memory.deepcopy_host_arrays = False  # unmodified, and a large model should be in memory once
    context.memory.write_concurrent_bytes = CONCURRENT
    context.array.saving.use_compression = False  # float32 weights hardly shrink, and it takes most of the time
    with context:
        saver = _open(folder)
        metadata = signed({"position": {}, "config": config, "about": about})
        saver.save_async(0, {"params": params}, metrics={"loss": 0.0}, custom_metadata=metadata)
        saver.close()
        without_paths(folder)
    files.write(root / "config.json", json.dumps(config, indent=2) + "\n")


def load_parameters(
    workdir: str, step: int | None = None, check: Callable[[dict[str, Any], dict[str, Any]], None] | None = None
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Reads the parameters of one checkpoint as numpy arrays, on whatever devices it was trained.

    Args:
      workdir: of a run, with `checkpoints/` in it; or a folder of checkpoints.
      step: None = the newest.
      check: called before memory is allocated, with the metadata stored with the parameters and a nested dict of
        entries with `shape` and `dtype`; may raise an InputError whose message continues "checkpoint STEP in WORKDIR".

    Returns:
      the parameters; the metadata stored with them: `config` and, except in checkpoints of version 0.1, `about`, see
      `save_parameters`; and the step.

    Raises:
      InputError: no such checkpoint, or it cannot be read.
    """
    root = epath.Path(workdir)
    root = root if "://" in workdir else root.resolve()
    folder = next((one for one in (root / "checkpoints", root) if holds_checkpoints(one)), None)
    if folder is None:
        raise InputError(f"{workdir} has no checkpoints; give the workdir of a run or what usfmae_jax.convert wrote")
    try:
        saver = _open(folder)
    except Exception as error:
        raise InputError(f"a checkpoint in {workdir} cannot be read: {reason(error)}; remove it") from error
    try:
        steps = [checkpoint.step for checkpoint in saver.checkpoints]
        if not steps or (step is not None and step not in steps):
            raise InputError(f"{workdir} has the checkpoints {steps}" + (f", not {step}" if step is not None else ""))
        step = steps[-1] if step is None else step
        with quiet():
            metadata = saver.metadata(step)
        said = metadata.custom_metadata
        check_metadata(said)
        if metadata.metadata is None:
            raise ValueError(_DAMAGED)
        name = "ema" if "ema" in metadata.metadata else "params"  # the average is what is evaluated and exported
        stored = metadata.metadata[name]
        if check is not None:
            try:
                check(said, stored)
            except InputError as error:
                raise InputError(f"checkpoint {step} in {workdir} {error}") from error
        context = orbax.Context()
        context.memory.read_concurrent_bytes = CONCURRENT
        context.pytree.loading.partial_load = True  # the optimiser's moments are large and not needed
        with context, quiet():
            abstract = {name: jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored)}
            params = saver.load(step, abstract)[name]
        known = said.get("checksums")  # earlier versions wrote none
        if known is not None and _place(known, metadata.metadata, name) != list(map(checksum, jax.tree.leaves(params))):
            raise ValueError("its checksum is wrong")
        return params, said, step
    except InputError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise InputError(f"checkpoint {step} in {workdir} cannot be read: {reason(error)}; try another step") from error
    finally:
        saver.close()


_DAMAGED = "its metadata is missing or damaged"
_FIELDS = {"position", "config", "about", "checksums", "digest"}


def signed(metadata: dict[str, Any]) -> dict[str, Any]:
    """Adds a hash to a checkpoint's metadata: Orbax has none, and a resumed run depends on the metadata."""
    return metadata | {"digest": _digest(metadata)}


def check_metadata(stored: dict[str, Any] | None) -> None:
    """Raises ValueError unless metadata from `signed` are intact; earlier versions wrote no hash."""
    if not stored or not {"position", "config"} <= stored.keys() <= _FIELDS:
        raise ValueError(_DAMAGED)
    if "digest" in stored and stored["digest"] != _digest(stored):
        raise ValueError(_DAMAGED)


def _digest(metadata: dict[str, Any]) -> str:
    text = json.dumps({name: value for name, value in metadata.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _place(checksums: list[int], stored: dict[str, Any], name: str) -> list[int]:
    """Selects the checksums of one entry of a state from those of all its arrays, in the order of its leaves."""
    counts = {one: len(jax.tree.leaves(stored[one])) for one in stored}
    # Counted from the end: the optimiser's state, whose empty parts are not stored, comes before the parameters.
    end = len(checksums) - sum(count for one, count in counts.items() if one > name)
    start = 0 if name == min(stored) else end - counts[name]
    return checksums[start : start + counts[name]]


def checksum(array: np.ndarray) -> int:
    """Checksum of an array, sensitive to every bit; what `training.checkpoints` writes, computed on the host."""
    flat = np.ascontiguousarray(array).reshape(-1)
    bits, total = flat if flat.dtype == bool else flat.view(f"uint{8 * flat.dtype.itemsize}"), 0
    for start in range(0, len(bits), 1 << 22):
        part = bits[start : start + (1 << 22)].astype(np.uint32)
        place = np.arange(start, start + len(part)).astype(np.uint32)
        total += int((part * (2 * place + 1)).sum(dtype=np.uint32))
    return total % 2**32


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the lengthy messages about every array of a damaged checkpoint; `reason` gives a short one.

    Some arrays fail after the first failure has been reported, even while Python exits: their silencing is permanent.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unless_too_late
    try:
        yield
    finally:
        logging.disable(disabled)


def _unless_too_late(unraisable: Any) -> None:
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def reason(error: BaseException) -> str:
    """The root cause of an error from Orbax in a few words, without the pages of array names around it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if type(error).__name__ == "InvalidLayoutError":
        return "it is not complete"
    text = re.split(r" in OCDBT| at local file", str(error).strip() or type(error).__name__)[0]
    return textwrap.shorten(text, 160, placeholder=" ...")


def without_paths(folder: epath.Path) -> None:
    """Removes the absolute paths that Orbax writes into finished checkpoints, which may reveal a user's name."""
    if "://" in os.fspath(folder):
        return
    for marker in pathlib.Path(folder).rglob("commit_success.txt"):
        with contextlib.suppress(OSError):  # removed meanwhile, or not writable
            if b"/" in marker.read_bytes():
                marker.write_text("Checkpoint commit was successful")


def holds_checkpoints(folder: epath.Path) -> bool:
    """Whether a folder contains checkpoints, finished or not."""
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def _open(folder: epath.Path) -> orbax.training.Checkpointer:
    """Opens checkpoints without deleting any, since a run may be writing there."""
    keep = orbax.training.preservation_policies.PreserveAll()
    return orbax.training.Checkpointer(folder, preservation_policy=keep, cleanup_tmp_directories=False)
