"""From a config to the parts of a fine-tuning run, refusing what cannot work before anything is compiled."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from usfmae_jax import __version__
from usfmae_jax.data import splits
from usfmae_jax.data import table as labelled
from usfmae_jax.data.provenance import describe_data, seen_in
from usfmae_jax.data.splits import Fold
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.classification import defined, positive_class
from usfmae_jax.finetuning import classifiers
from usfmae_jax.finetuning.members import Member, names, only_note, plan_members
from usfmae_jax.interop.model import Model
from usfmae_jax.tasks import classification
from usfmae_jax.training import checks as field_checks
from usfmae_jax.training import optimizers, outcomes
from usfmae_jax.training.common import known_duplicates, make_workdir, read_frames

#: Config fields that a continued run may change: they alter where and how fast it computes, which members it has, or
#: what is said of them, not what a member is.
RESUMABLE = (
    "mesh",
    "parallel",
    "log",
    "checkpoint",
    "evaluate",
    "init",  # the weights may have moved; their fingerprint is compared instead
    "data.path",  # likewise
    "data.workers",
    "data.threads",
    "data.max_damaged",
    "model.scan",
    "model.remat",
    "model.attention",
    "seeds",
    "fractions",
    "split.only",
    "split.path",  # what it says is compared
    "positive",
)

#: Decoded validation and test images are kept in memory up to this many bytes; more are decoded again every time.
KEPT_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run was found to be before it starts.

    Attributes:
      config: see `configs/finetune.py`.
      workdir: absolute.
      frames: all labelled frames.
      members: in the order in which they are trained.
      folds: of the whole split, also those that are not run.
      groups: int `[N]`, of the rows of `frames`.
      split: one phrase on where the split comes from.
      excluded: near-duplicates that were left out, see `splits.check`.
      description: of the model, see `interop.model`.
      preprocessing: how pixels become its input.
      weights: to start from; None = random.
      settings: the config as JSON, and what tells data and weights apart.
      lineage: of the weights that come out, JSON.
      warnings: sentences that belong beside the results.
    """

    config: ml_collections.ConfigDict
    workdir: str
    frames: Table
    members: tuple[Member, ...]
    folds: tuple[Fold, ...]
    groups: np.ndarray
    split: str
    excluded: list[dict[str, Any]]
    description: dict[str, Any]
    preprocessing: dict[str, Any]
    weights: Model | None
    settings: dict[str, Any]
    lineage: list[dict[str, Any]]
    warnings: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the views."""
        height, width = self.preprocessing["image_size"]
        return height, width


def prepare(config: ml_collections.ConfigDict, workdir: str) -> Job:
    """Reads data, weights and splits, and works out the members.

    Args:
      config: see `configs/finetune.py`.
      workdir: is created, unless there is nothing to leave in it because something given cannot be used.

    Raises:
      InputError: something given cannot be used.
    """
    field_checks.check_finetune(config)
    frames = classification.select(read_frames(config), names(config.classes))
    try:
        two = positive_class(frames.label_names, config.positive) is not None
    except InputError as error:
        raise InputError(f"config.{error}") from error
    if config.stop.metric not in defined(two):
        raise InputError(
            f"config.stop.metric={config.stop.metric!r} is not defined for {len(frames.label_names)} classes; use one "
            f"of {', '.join(defined(two))}"
        )
    weights = classifiers.read_init(config, frames.label_names)
    description, preprocessing = classifiers.describe_model(config, frames.label_names, weights)
    freeze = classifiers.trained_part(config, description)[0]
    if weights:
        make_model = classifiers.model_maker(config, description, freeze)
        classifiers.check_weights(make_model, classifiers.loadable(weights, description), config.init)
    pairs = np.zeros((0, 2), np.int64)
    if config.split.duplicates:
        pairs = known_duplicates(frames, f"{make_workdir(workdir)}/duplicates.csv")
    split = config.split
    folds, groups, excluded, note = splits.plan(
        frames,
        classification.strata(frames),
        kind=split.kind,
        path=split.path,
        folds=split.folds,
        validation=split.validation,
        test=split.test,
        seed=config.seed,
        pairs=pairs,
    )
    members = plan_members(config, frames, folds, groups)
    settings = field_checks.public_settings(config, ("init", "data.path", "split.path")) | {
        "data_fingerprint": frames.fingerprint,
        "init_fingerprint": weights.fingerprint if weights else "",
    }
    before = weights.lineage if weights else []
    stage = {"job": "finetune", "code": f"usfmae_jax {__version__}", "config": settings}
    return Job(
        config=config,
        workdir=make_workdir(workdir),
        frames=frames,
        members=members,
        folds=tuple(folds),
        groups=groups,
        split=note + only_note(config.split.only),
        excluded=excluded,
        description=description,
        preprocessing=preprocessing,
        weights=weights,
        settings=settings,
        lineage=[*before, stage | {"data": describe_data([frames.shards])}],
        warnings=find_warnings(config, frames, before),
    )


def find_warnings(config: ml_collections.ConfigDict, frames: Table, lineage: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the results has to know."""
    found = [
        f"the starting weights have seen {dataset}, whose frames are tested here ({', '.join(jobs)}): "
        "the results are no measure of new data"
        for dataset, jobs in seen_in(lineage, [frames.shards]).items()
    ]
    return found + outcomes.cautions(frames)


def supervision(job: Job) -> classification.Classification:
    """How the model is taught."""
    regular = job.config.regularization
    return classification.Classification(
        num_classes=len(job.frames.label_names),
        mean=tuple(job.preprocessing["mean"]),
        std=tuple(job.preprocessing["std"]),
        smoothing=regular.smoothing,
        mixup=regular.mixup,
        cutmix=regular.cutmix,
        erasing=regular.erasing,
    )


def make_optimizer(config: ml_collections.ConfigDict, description: dict[str, Any]) -> optax.GradientTransformation:
    """AdamW with a learning rate of 1, for the part of a model that `config.mode` trains."""
    optimizer = config.optimizer
    vit_layers = description["model"] == "vit" and config.mode != "frozen"
    return optimizers.adamw(
        weight_decay=optimizer.weight_decay,
        b1=optimizer.b1,
        b2=optimizer.b2,
        clip_norm=optimizer.clip_norm,
        layer_decay=optimizer.layer_decay if vit_layers else 1.0,
        last_blocks=classifiers.trained_part(config, description)[2],
    )


def learning_rate(config: ml_collections.ConfigDict) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Learning rate by step and length of the run; the rate in the config is per 256 images."""
    optimizer = config.optimizer
    return functools.partial(
        optimizers.warmup_cosine,
        learning_rate=optimizer.learning_rate * config.train.batch_size / 256,
        floor=optimizer.floor,
        warmup=optimizer.warmup,
    )


def whole_images(job: Job) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
    """How validation and test images are had.

    They are decoded now, so that a damaged one is refused now, and kept, unless they are very many.

    Returns:
      Batches uint8 `[n, H, W, C]` of given rows of the table.

    Raises:
      InputError: an image is damaged; says which.
    """
    config = job.config
    batch_size = config.evaluate.batch_size

    def decode(rows: np.ndarray) -> Iterator[np.ndarray]:
        return labelled.images(
            job.frames,
            rows,
            size=job.size,
            channels=config.data.channels,
            batch_size=batch_size,
            threads=config.data.threads,
        )

    needed = np.unique(np.concatenate([rows for m in job.members for rows in (m.fold.validation, m.fold.test)]))
    if len(needed) * job.size[0] * job.size[1] * config.data.channels > KEPT_BYTES:
        return decode
    kept = np.concatenate(list(decode(needed)))

    def slices(rows: np.ndarray) -> Iterator[np.ndarray]:
        places = np.searchsorted(needed, rows)
        for start in range(0, len(rows), batch_size):
            yield kept[places[start : start + batch_size]]

    return slices
