"""Builds a task from a config and a table: one function per task, with its entry in `TASKS`."""

from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from usfmae_jax.data.table import Table
from usfmae_jax.data.targets import Targets, known, read_targets
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.classification import NAMES, defined, positive_class
from usfmae_jax.tasks import Task, classification, instances, multilabel, regression, segmentation
from usfmae_jax.training import checks


def classify(config: ml_collections.ConfigDict, table: Table) -> tuple[Table, Task]:
    """Classification of the labelled frames.

    Raises:
      InputError: there are no such frames, or a field does not match their classes.
    """
    stop, regular, pool = config.stop, config.regularization, _pool(config)
    if stop.metric not in NAMES:
        raise InputError(f"config.stop.metric={stop.metric!r} must be one of {', '.join(NAMES)}")
    table = classification.select(table, checks.names(config.classes))
    classes = table.label_names
    try:
        two = positive_class(classes, config.positive) is not None
    except InputError as error:
        raise InputError(f"config.{error}") from error
    if stop.metric not in defined(two):
        raise InputError(
            f"config.stop.metric={stop.metric!r} is not defined for {len(classes)} classes; use one of "
            f"{', '.join(defined(two))}"
        )
    how = {name: regular[name] for name in ("smoothing", "mixup", "cutmix", "erasing")}
    how |= {"pool": pool, "positive": config.positive, "balanced": regular.class_weights == "balanced"}
    return table, classification.Classification(classes, **how)


def segment(config: ml_collections.ConfigDict, table: Table) -> tuple[Table, Task]:
    """Segmentation of the frames that have a mask.

    Raises:
      InputError: there are no such frames, or a field does not match their classes.
    """
    model = config.model
    if model.head not in ("linear", "decoder"):
        raise InputError(f"config.model.head={model.head!r} must be 'linear' or 'decoder'")
    return _masked(config, table, head=model.head, decoder_width=model.decoder_width, dice=config.dice)


def find_instances(config: ml_collections.ConfigDict, table: Table) -> tuple[Table, Task]:
    """Instance segmentation of the frames that have a mask.

    Raises:
      InputError: there are no such frames, or a field does not match their classes.
    """
    model, names = config.model, ("queries", "query_blocks", "decoder_width")
    if model.head != "queries":
        raise InputError(f"config.model.head={model.head!r} must be 'queries', which alone tells instances apart")
    if config.evaluate.flip:
        raise InputError("config.evaluate.flip must be False: what queries find on a mirrored frame has another order")
    checks.check_ranges(model.to_dict(), {"queries": (1, 255), "query_blocks": (1, np.inf)}, "model.")
    checks.check_ranges(config.to_dict(), {"min_pixels": (1, np.inf), "no_object": (1e-3, 1)})
    frames, masks = _masked(config, table)
    how = {name: model[name] for name in names} | {name: config[name] for name in ("min_pixels", "no_object", "dice")}
    most = instances.most_instances(frames, masks.classes, config.min_pixels, config.data.threads)
    if not most:
        raise InputError(f"config.min_pixels={config.min_pixels} leaves no instance: all areas in masks are smaller")
    return frames, instances.Instances(masks, most, **how)


def _masked(config: ml_collections.ConfigDict, table: Table, **how: Any) -> tuple[Table, segmentation.Segmentation]:
    """The frames with masks, and their segmentation task, with `how` as further fields.

    Raises:
      InputError: there are no such frames, or a field that all segmentation tasks share is invalid.
    """
    model = config.model
    _refuse_class_fields(config)
    if config.augment.randaugment_magnitude or config.augment.trivialaugment:
        raise InputError(
            "config.augment.randaugment_magnitude must be 0 and trivialaugment false: they move pixels away from their "
            "mask"
        )
    if not 8 <= model.decoder_width <= 2048:
        raise InputError(f"config.model.decoder_width={model.decoder_width} must lie between 8 and 2048")
    if config.unmasked not in segmentation.UNMASKED:
        raise InputError(f"config.unmasked={config.unmasked!r} must be one of {', '.join(segmentation.UNMASKED)}")
    if config.dice < 0:
        raise InputError(f"config.dice={config.dice:g} must not be negative")
    if config.mask_classes not in ("masks", "label"):
        raise InputError(f"config.mask_classes={config.mask_classes!r} must be 'masks' or 'label'")
    how |= {"by_label": config.mask_classes == "label"}
    return segmentation.of_table(table, checks.names(config.classes), config.unmasked, config.data.threads, **how)


def regress(config: ml_collections.ConfigDict, table: Table) -> tuple[Table, Task]:
    """Regression of a column of a table, for the frames that have a value.

    Raises:
      InputError: the table cannot be used, see `data.targets`, or a field is invalid for this task.
    """
    _refuse_class_fields(config)
    pool, found = _pool(config), _read_targets(config, table)
    if config.loss not in regression.KINDS:
        raise InputError(f"config.loss={config.loss!r} must be one of {', '.join(regression.KINDS)}")
    return regression.of_table(table, found, config.of_frame, pool=pool, kind=config.loss)


def label(config: ml_collections.ConfigDict, table: Table) -> tuple[Table, Task]:
    """Multi-label classification with the columns of a table, for the frames that have at least one label.

    Raises:
      InputError: the table cannot be used, see `data.targets`, or a field is invalid for this task.
    """
    _refuse_class_fields(config)
    pool, found = _pool(config), _read_targets(config, table, labels=True)
    table, found = known(table, found)
    for name, one in zip(found.names, found.values.T, strict=True):
        if len(there := np.unique(one[np.isfinite(one)])) < 2:
            said = f"{there[0]:g} for all frames" if len(there) else "empty"
            raise InputError(f"config.targets: the column {name!r} is {said}: leave it out with config.target")
    about: dict[str, Any] = {"fingerprint": found.fingerprint, "notes": found.notes}
    return table, multilabel.MultiLabel(found.names, found.values, pool, **about)


def _read_targets(config: ml_collections.ConfigDict, table: Table, labels: bool = False) -> Targets:
    if "targets" not in config:
        variant = "folder_multilabel" if labels else "folder_regression"
        raise InputError(
            f"config.task={config.task} needs the table of --config.targets, which --config=finetune:"
            f"{variant} has a field for"
        )
    return read_targets(config.targets, table, checks.names([config.target]), labels=labels)


def _pool(config: ml_collections.ConfigDict) -> str:
    pool = config.model.pool
    if pool not in ("mean", "cls"):
        raise InputError(f"config.model.pool={pool!r} must be 'mean' (of the patch tokens) or 'cls'")
    return pool


def _refuse_class_fields(config: ml_collections.ConfigDict) -> None:
    """Raises InputError if a field is set that only classification of whole frames uses."""
    regular = config.regularization
    for name in ("smoothing", "mixup", "cutmix", "erasing"):
        if regular[name]:
            raise InputError(
                f"config.regularization.{name}={regular[name]:g} is for classes of whole frames: set it to 0"
            )
    if regular.class_weights != "none" or config.positive:
        raise InputError("config.regularization.class_weights and config.positive are for classes of whole frames")


#: Functions from a config and the table of all frames to the table of usable frames and the task.
TASKS: dict[str, Callable[[ml_collections.ConfigDict, Table], tuple[Table, Task]]] = {
    "classification": classify,
    "segmentation": segment,
    "instances": find_instances,
    "regression": regress,
    "multilabel": label,
}
