"""What the loops take from their configs alike."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from usfmae_jax.data import duplicates
from usfmae_jax.data.table import Table, read_table
from usfmae_jax.errors import InputError


def on_first_process(action: Callable[[], None]) -> None:
    """Has process 0 write what all share; if it refuses to, all processes stop, and none waits for another.

    Raises:
      InputError: the action did, on process 0.
    """
    refusal: InputError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except InputError as error:
            refusal = error
    if multihost_utils.broadcast_one_to_all(np.bool_(refusal is not None)):
        raise refusal or InputError("process 0 of this job refuses to start; see what it says")


def read_frames(config: ml_collections.ConfigDict) -> Table:
    """All frames of `config.data.path`.

    Raises:
      InputError: there are none, with how to make some, or they cannot be used.
    """
    path = config.data.path
    last = path.rstrip("/").rpartition("/")[2]
    public = last if last.isidentifier() else "bus_bra"
    how_to = (
        "\n  Prepare your own:  python -m data_prep.build --dataset=folder --input=DIR --labels=parent --output=data"
        f"\n  or a public set:   python -m data_prep.build --dataset={public} --input=DIR --output=data"
    )
    if not path:
        raise InputError("config.data.path names no labelled shards." + how_to)
    try:
        return read_table(path, config.data.split)
    except InputError as error:
        text = str(error)
        raise InputError(f"config.data.path: {text}." + how_to if "no shards match" in text else text) from error


def known_duplicates(frames: Table, path: str) -> np.ndarray:
    """`duplicates.near_duplicates`, kept in the file `path` by process 0; int `[P, 2]`."""
    if jax.process_index():
        return duplicates.near_duplicates(frames, progress=False)
    return duplicates.cached_near_duplicates(frames, path)


def make_workdir(workdir: str) -> str:
    """Creates the working directory and returns its absolute path.

    Raises:
      InputError: it cannot be written.
    """
    path = epath.Path(workdir)
    try:
        path = path if "://" in workdir else path.resolve()
        path.mkdir(parents=True, exist_ok=True)
        trial = path / f".writable-{jax.process_index()}"
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from error
    return str(path)


def square(size: Any) -> tuple[int, int]:
    """`config.model.image_size` as (height, width); a single number stands for both.

    Raises:
      InputError: it is neither one number nor two.
    """
    size = tuple(size)
    if len(size) not in (1, 2) or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"config.model.image_size={size} must be one positive integer, or (height, width)")
    return size * 2 if len(size) == 1 else size


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(height, width) of the views; see `square`."""
    return square(config.model.image_size)


def check_computation(model: ml_collections.ConfigDict) -> None:
    """Raises InputError unless `config.model.dtype` and `.attention` name something that exists."""
    if model.dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.model.dtype={model.dtype!r} must be 'float32' or 'bfloat16'")
    if model.attention not in ("", "xla", "cudnn"):
        raise InputError(f"config.model.attention={model.attention!r} must be 'xla', 'cudnn' or '' for JAX's choice")


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises InputError unless counts are positive, and devices and micro-batches divide the batch."""
    for group, field in (("train", "batch_size"), ("train", "accumulate"), ("checkpoint", "every"), ("log", "every")):
        if config[group][field] < 1:
            raise InputError(f"config.{group}.{field}={config[group][field]} must be 1 or more")
    parts = mesh.size * config.train.accumulate
    if config.train.batch_size % parts:
        raise InputError(
            f"config.train.batch_size={config.train.batch_size} cannot be divided among {mesh.size} devices times "
            f"{config.train.accumulate} micro-batches; make it a multiple of {parts}"
        )
