"""Configs: which fields are out of their range, as far as the config alone tells; what artefacts may show of them."""

import functools
import json
import operator
import os
from typing import Any

import ml_collections
import numpy as np

from usfmae_jax.data import augment
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.classification import NAMES
from usfmae_jax.training import probes

PROTOCOLS = ("auto", "logistic", "knn", "linear", "attentive", "finetuned")
#: Smallest values of config fields.
LEAST = {
    "bootstrap": 1,
    "examples": 0,
    "step": 0,
    "data.threads": 1,
    "linear.epochs": 1,
    "linear.batch_size": 1,
    "attentive.epochs": 1,
    "attentive.batch_size": 1,
    "attentive.patience": 1,
}

#: Config fields, and their defaults, that mean nothing for a classifier that is tested as it is.
PROBES_ONLY = {"seeds": (0,), "fractions": (1.0,), "split.only": (), "pool": "mean", "step": 0}


def check_finetune(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for single fields that are out of their range."""
    regular, stop = config.regularization, config.stop
    for name, value, low, high in (
        ("regularization.smoothing", regular.smoothing, 0, 0.99),
        ("regularization.erasing", regular.erasing, 0, 1),
        ("regularization.mixup", regular.mixup, 0, np.inf),
        ("regularization.cutmix", regular.cutmix, 0, np.inf),
        ("optimizer.warmup", config.optimizer.warmup, 0, 1),
        ("optimizer.layer_decay", config.optimizer.layer_decay, 1e-3, 1),
        ("optimizer.learning_rate", config.optimizer.learning_rate, 0, np.inf),
        ("optimizer.floor", config.optimizer.floor, 0, np.inf),
        ("optimizer.weight_decay", config.optimizer.weight_decay, 0, np.inf),
        ("optimizer.b1", config.optimizer.b1, 0, 0.9999),
        ("optimizer.b2", config.optimizer.b2, 0, 0.999999),
        ("augment.hflip", config.augment.hflip, 0, 1),
        ("augment.vflip", config.augment.vflip, 0, 1),
        ("data.max_damaged", config.data.max_damaged, 0, 1),
        ("train.epochs", config.train.epochs, 0, np.inf),
        ("train.steps", config.train.steps, 0, np.inf),
        ("stop.patience", stop.patience, 0, np.inf),
        ("parallel", config.parallel, 0, np.inf),
        ("evaluate.bootstrap", config.evaluate.bootstrap, 1, np.inf),
        ("train.min_steps", config.train.min_steps, 0, np.inf),
    ):
        if not low <= value <= high:
            bound = "at least {}" if high == np.inf else "between {} and {}"
            raise InputError(f"config.{name}={value:g} must be {bound.format(low, high)}")
    low, high = config.augment.crop_scale
    if not 0 < low <= high <= 1:
        raise InputError(f"config.augment.crop_scale=({low:g}, {high:g}) must be two shares of the area, up to 1")
    if stop.every <= 0:
        raise InputError(f"config.stop.every={stop.every:g} must be more than 0 epochs")
    if stop.metric not in NAMES:
        raise InputError(f"config.stop.metric={stop.metric!r} must be one of {', '.join(NAMES)}")
    if regular.class_weights not in ("none", "balanced"):
        raise InputError(f"config.regularization.class_weights={regular.class_weights!r} must be 'none' or 'balanced'")
    if config.augment.interpolation not in augment.INTERPOLATION:
        raise InputError(f"config.augment.interpolation must be one of {', '.join(augment.INTERPOLATION)}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise InputError(f"config.seeds={tuple(config.seeds)} must be one or more different numbers from 0 on")
    if not config.fractions or not all(0 < fraction <= 1 for fraction in config.fractions):
        raise InputError(
            f"config.fractions={tuple(config.fractions)} must be shares of the training patients in (0, 1]"
        )


def check_evaluate(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for a field that cannot be, as far as the config alone tells."""
    if config.protocol not in PROTOCOLS:
        raise InputError(f"config.protocol={config.protocol!r} must be one of {', '.join(PROTOCOLS)}")
    if config.pool not in ("mean", "cls"):
        raise InputError(f"config.pool={config.pool!r} must be 'mean' or 'cls'")
    if config.linear.optimizer not in probes.RATES:
        raise InputError(f"config.linear.optimizer={config.linear.optimizer!r} must be 'lars' or 'adamw'")
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.dtype={config.dtype!r} must be 'float32' or 'bfloat16'")
    if not config.fractions or not all(0 < fraction <= 1 for fraction in config.fractions):
        raise InputError(f"config.fractions={tuple(config.fractions)} must be shares above 0 and up to 1")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise InputError(f"config.seeds={tuple(config.seeds)} must be one or more different numbers from 0 on")
    for name, least in LEAST.items():
        value = functools.reduce(operator.getitem, name.split("."), config)
        if value < least:
            raise InputError(f"config.{name}={value} must be {least} or more")
    if not config.checkpoint:
        raise InputError(
            "config.checkpoint is missing: the workdir of a run, one of its checkpoints, an encoder or classifier "
            "directory, or 'pixels' for the raw pixels that an encoder has to beat"
        )


def check_finetuned(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for a field that only probes have, where a classifier is tested as it is."""
    for name, default in PROBES_ONLY.items():
        value = functools.reduce(operator.getitem, name.split("."), config)
        if (tuple(value) if isinstance(default, tuple) else value) != default:
            raise InputError(
                f"config.{name} is for probes, and this checkpoint is a classifier that is tested as it was trained: "
                "leave it out, or name a protocol such as --config.protocol=logistic"
            )


def public_settings(config: ml_collections.ConfigDict, paths: tuple[str, ...]) -> dict[str, Any]:
    """The config as JSON, with paths as `public_paths` has them.

    Args:
      config: of a run.
      paths: names of the fields, such as `data.path`, that hold paths, several separated by commas.
    """
    public = json.loads(config.copy_and_resolve_references().to_json_best_effort())
    for name in paths:
        *groups, field = name.split(".")
        node = functools.reduce(operator.getitem, groups, public)
        node[field] = public_paths(node[field])
    return public


def public_paths(paths: str) -> str:
    """Paths separated by commas as artefacts may show them: of an absolute one only the last part.

    The rest would tell who ran where.
    """

    def public(path: str) -> str:
        return os.path.basename(path.rstrip("/")) if os.path.isabs(path) else path

    return ",".join(public(path.strip()) for path in paths.split(","))
