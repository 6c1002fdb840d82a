"""Checks of the user's settings, and what artefacts may reveal of them."""

import functools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from usfmae_jax.data import augment
from usfmae_jax.data.records import NoShardsError
from usfmae_jax.data.table import Table, read_table
from usfmae_jax.errors import InputError

Fields = Mapping[str, Any]


#: Minimum and maximum values of fields that training with and without labels share.
RANGES = {
    "seed": (0, 2**31 - 1),
    "optimizer.learning_rate": (0, np.inf),
    "optimizer.floor": (0, np.inf),
    "optimizer.warmup": (0, 1),
    "optimizer.weight_decay": (0, np.inf),
    "optimizer.b1": (0, 0.9999),
    "optimizer.b2": (0, 0.999999),
    "optimizer.clip_norm": (0, np.inf),
    "optimizer.layer_decay": (1e-3, 1),
    "data.max_damaged": (0, 1),
    "train.epochs": (0, np.inf),
    "train.steps": (0, np.inf),
    "train.skip_nonfinite": (0, np.inf),
}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to a dict by dotted names."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        found |= flat(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return found


def check_ranges(fields: Fields, ranges: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Raises InputError for the first field outside its range (lowest, highest)."""
    for name, (low, high) in ranges.items():
        if not low <= fields[name] <= high:
            bound = "at least {}" if high == np.inf else "between {} and {}"
            raise InputError(f"config.{prefix}{name}={fields[name]:.10g} must be {bound.format(low, high)}")


def check_least(fields: Fields, least: Mapping[str, int], prefix: str = "") -> None:
    """Raises InputError for the first count below its minimum."""
    for name, value in least.items():
        if fields[name] < value:
            raise InputError(f"config.{prefix}{name}={fields[name]} must be {value} or more")


def check_augmentation(fields: Mapping[str, Any]) -> None:
    """Raises InputError for the first field of `config.augment` that `augment.Augmentation` cannot use."""
    for name, pair in fields.items():
        if not isinstance(pair, tuple):
            continue
        if len(pair) != 2 or not all(isinstance(bound, float | int) for bound in pair) or not pair[0] <= pair[1]:
            raise InputError(f"config.augment.{name}={pair} must be two numbers, the lower one first")
        if name in ("crop_ratio", "contrast", "gamma") and pair[0] <= 0:
            raise InputError(f"config.augment.{name}={pair} must be two positive numbers")
    low, high = fields["crop_scale"]
    # The upper bound may exceed 1, as in the published recipe: crops that do not fit are rejected.
    if not 0 < low <= 1:
        pair = f"({low:g}, {high:g})"
        raise InputError(f"config.augment.crop_scale={pair} must be two shares of the area, the lower one up to 1")
    check_ranges(fields, dict.fromkeys(("hflip", "vflip"), (0, 1)), "augment.")
    if fields["interpolation"] not in augment.INTERPOLATION:
        raise InputError(f"config.augment.interpolation must be one of {', '.join(augment.INTERPOLATION)}")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises InputError unless `config.seeds` are distinct integers from 0 on."""
    whole = all(isinstance(seed, int) for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"config.seeds={tuple(seeds)} must be one or more different numbers from 0 on")


def check_batch(fields: Fields, devices: int) -> None:
    """Raises InputError unless counts are positive and the batch is divisible by devices times micro-batches."""
    check_least(fields, dict.fromkeys(("train.batch_size", "train.accumulate", "checkpoint.every", "log.every"), 1))
    batch_size, accumulate = fields["train.batch_size"], fields["train.accumulate"]
    parts = devices * accumulate
    if batch_size % parts:
        raise InputError(
            f"config.train.batch_size={batch_size} cannot be divided among {devices} devices times {accumulate} "
            f"micro-batches; make it a multiple of {parts}"
        )


def check_computation(dtype: str, attention: str, remat: str) -> None:
    """Raises InputError unless `config.model.dtype`, `.attention` and `.remat` have known values."""
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.model.dtype={dtype!r} must be 'float32' or 'bfloat16'")
    if attention not in ("", "xla", "cudnn"):
        raise InputError(f"config.model.attention={attention!r} must be 'xla', 'cudnn' or '' for JAX's choice")
    if remat not in ("none", "dots", "full"):
        raise InputError(f"config.model.remat={remat!r} must be 'none', 'dots' or 'full'")


def square(size: Any) -> tuple[int, int]:
    """`config.model.image_size` as (height, width); a single number means both.

    Raises:
      InputError: it is not one or two positive integers.
    """
    size = tuple(size)
    if len(size) not in (1, 2) or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"config.model.image_size={size} must be one positive integer, or (height, width)")
    return size * 2 if len(size) == 1 else size


def names(values: Sequence[Any]) -> tuple[str, ...]:
    """Parses names as typed by a user: `('a', 'b')`, `a,b`, or numbers."""
    return tuple(name.strip() for value in values for name in str(value).split(",") if name.strip())


def make_workdir(workdir: str) -> str:
    """Creates the working directory and returns its absolute path.

    Raises:
      InputError: it is not writable.
    """
    path = epath.Path(workdir)
    if "://" not in workdir and path.is_file():
        raise InputError(f"--workdir={workdir} cannot be written: it is a file, not a folder")
    try:
        path = path if "://" in workdir else path.resolve()
        path.mkdir(parents=True, exist_ok=True)
        trial = path / f".writable-{jax.process_index()}"
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from error
    return str(path)


def read_frames(path: str, split: str) -> Table:
    """All frames of `config.data.path` in the TFDS split `config.data.split`, "" = all.

    Raises:
      InputError: there are none (the message tells how to make some), or they cannot be used.
    """
    how_to = (
        "\n  Prepare your own:  python -m data_prep.build --dataset=folder --input=DIR --labels=parent --output=data"
        "\n  or a public set:   python -m data_prep.build --list"
    )
    if not path:
        raise InputError("config.data.path names no labelled shards." + how_to)
    try:
        return read_table(path, split)
    except NoShardsError as error:
        raise InputError(f"config.data.path: {error}" + ("" if error.advised else "." + how_to)) from error


def public_settings(settings: str, paths: tuple[str, ...]) -> dict[str, Any]:
    """A run's settings, with paths shortened by `public_paths`.

    Args:
      settings: JSON.
      paths: dotted names of the fields, such as `data.path`, that hold comma-separated paths.
    """
    public = json.loads(settings)
    for name in paths:
        *groups, field = name.split(".")
        node = functools.reduce(operator.getitem, groups, public)
        node[field] = public_paths(node[field])
    return public


def public_paths(paths: str) -> str:
    """Comma-separated paths as artefacts may show them: only the last part of any path that leaves the working folder.

    The rest would reveal who ran it and where. This covers absolute paths of all operating systems, home folders
    (`~name/x`) and parent folders (`../../home/name/x`), wherever in a text they begin.
    """

    def public(path: str) -> str:
        begins = r"(^|[\s'\"=(\[:])(/|~|\\\\|[A-Za-z]:[/\\])"
        leaves = re.search(begins, path) or ".." in re.split(r"[/\\\s]", path)
        remote = re.match(r"[a-z][a-z0-9+.-]+://", path)
        return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if leaves and not remote else path

    return ",".join(public(path.strip()) for path in paths.split(","))
