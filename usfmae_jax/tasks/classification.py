"""Classification: each frame belongs to one of several classes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from usfmae_jax.data.pipeline import decode_ahead
from usfmae_jax.data.splits import Strata
from usfmae_jax.data.table import MAX_CLASSES, Table, folders, names_beside, whole_image
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import results as scoring
from usfmae_jax.evaluation.classification import LOSSES, NAMES, defined, metrics, positive_class
from usfmae_jax.evaluation.predictions import ClassPredictions, Predictions
from usfmae_jax.reporting import classification as reporting
from usfmae_jax.tasks import Arrays, Task


def select(table: Table, classes: Sequence[str] = ()) -> Table:
    """The labelled frames, with labels in [0, C) and C names in `label_names`.

    Args:
      table: all frames.
      classes: expected class names, in order, case-insensitive; empty = those of the shards.

    Raises:
      InputError: no labels, only one class, or see `class_names`.
    """
    labelled = table.take(np.flatnonzero(table.label >= 0))
    if not len(labelled):
        raise InputError(
            f"config.data.path={table.path!r} has no labels in {len(table.shards)} records; build it with --labels"
        )
    names = class_names(labelled, classes)
    if len(np.unique(labelled.label)) < 2:
        raise InputError(
            f"config.data.path={table.path!r} has labelled frames of one class only, {names[labelled.label[0]]!r}; "
            "two or more are needed"
        )
    return dataclasses.replace(labelled, label_names=names)


def class_names(labelled: Table, expected: Sequence[str] = ()) -> tuple[str, ...]:
    """The list of class names on which all folders of shards, and `expected` if given, agree.

    Args:
      labelled: frames that have a label.
      expected: see `select`.

    Raises:
      InputError: sources (or `expected`) disagree about the classes, or a label is outside the class list.
    """
    lists = {folder: names_beside(folder) for folder in folders(labelled)}
    named = {folder: names for folder, names in lists.items() if names}
    first = next(iter(named.values()), ())
    for names in named.values():
        if names != first:
            raise InputError(
                f"sources have different classes: {', '.join(first)} and {', '.join(names)}; name one of them only in "
                "config.data.path, or build them with the same labels"
            )
    if named and len(named) < len(lists) and not expected:
        raise InputError(
            "some sources name their classes and others do not; say with config.classes what all of them have: "
            f"{', '.join(first)}?"
        )
    if named and expected and [name.casefold() for name in first] != [name.casefold() for name in expected]:
        raise InputError(
            f"config.classes={','.join(expected)} but the shards have the classes {','.join(first)}; they must be the "
            "same in the same order"
        )
    highest = int(labelled.label.max())
    if highest >= MAX_CLASSES:
        raise InputError(f"config.data.path={labelled.path!r} has the label {highest}; build the shards again")
    names = first or tuple(expected) or tuple(map(str, range(highest + 1)))
    if highest >= len(names):
        raise InputError(
            f"label {highest} is outside the class list, whose {len(names)} names are {', '.join(names)} (0 to "
            f"{len(names) - 1}); build the shards again, or set config.classes"
        )
    return names


def strata(table: Table) -> Strata:
    """Strata of a table from `select`: its classes."""
    return Strata(table.label, table.label_names)


def labelled_images(table: Table, *, size: tuple[int, int], channels: int, limit: int) -> dict[str, Any]:
    """Decodes whole labelled frames for a probe: at most `limit`, evenly spaced; damaged ones are skipped.

    Returns:
      `image` uint8 `[N, H, W, C]`, `label` int `[N]`, `patient` list of N ids (unique across datasets).

    Raises:
      InputError: fewer than two classes are labelled.
    """
    rows = np.flatnonzero(table.label >= 0)
    rows = rows[:: max(1, -(-len(rows) // limit))]

    def load(row: int) -> np.ndarray | None:
        try:
            return whole_image(table, row, size, channels)
        except InputError:  # damaged
            return None

    decoded = list(decode_ahead(load, rows.tolist(), threads=2, ahead=limit))
    rows = rows[[image is not None for image in decoded]]
    if len(np.unique(table.label[rows])) < 2:
        raise InputError("config.probe.data.path holds fewer than two labelled classes; build it with --labels")
    return {
        "image": np.stack([image for image in decoded if image is not None]),
        "label": table.label[rows],
        "patient": table.patient_key[rows].tolist(),
    }


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """How a classifier is trained and evaluated.

    Attributes:
      outputs: names of the classes.
      pool: pooling of a vision transformer's tokens, "mean" or "cls".
      positive: name of the positive one of two classes; "" = the last.
      smoothing: label smoothing, in [0, 1).
      mixup: see `mix`; 0 = off.
      cutmix: see `mix`; 0 = off.
      erasing: probability, see `erase`.
      balanced: weight the loss so that all classes count equally, however many frames they have.
    """

    outputs: tuple[str, ...]
    pool: str = "mean"
    positive: str = ""
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    balanced: bool = False

    losses = LOSSES
    tie = "log_loss"
    predictions = ClassPredictions

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics defined for this number of classes."""
        return tuple(defined(len(self.outputs) == 2))

    def strata(self, table: Table) -> Strata:
        """The classes."""
        return strata(table)

    def summary(self, table: Table) -> str:
        """The number of frames of each class."""
        counts = np.bincount(table.label, minlength=len(self.outputs))
        return ", ".join(f"{count} {name}" for name, count in zip(self.outputs, counts, strict=True))

    def describe(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """A linear head for the classes; a ResNet has its own pooling."""
        pool = {"pool": self.pool} if backbone["model"] == "vit" else {}
        return {**backbone, **pool, "classes": list(self.outputs)}

    def targets(self, table: Table, rows: np.ndarray) -> Arrays:
        """`label` int32 `[R]`, and `weight` float32 `[R, C]`, the class weights of the loss, the same in every row."""
        label, classes = table.label[rows].astype(np.int32), len(self.outputs)
        weights = np.ones(classes, np.float32)
        if self.balanced:  # inverse class frequencies
            counts = np.bincount(label, minlength=classes)
            weights = (counts.sum() / (classes * np.maximum(counts, 1))).astype(np.float32)
        return {"label": label, "weight": np.broadcast_to(weights, (len(rows), classes))}

    def prepare(self, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Applies random erasing, mixup and CutMix, and turns the labels into `target` `[B, C]`."""
        mix_rng, erase_rng, model_rng = jax.random.split(rng, 3)
        targets = smoothed_targets(batch["label"], len(self.outputs), self.smoothing)
        inputs = erase(erase_rng, batch["image"], self.erasing)  # before mixing, as in MAE's recipe
        inputs, targets = mix(mix_rng, inputs, targets, mixup=self.mixup, cutmix=self.cutmix)
        return {"image": inputs, "target": targets, "weight": batch["weight"]}, model_rng

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weighted cross-entropy, summed, and the sum of the weights."""
        return cross_entropy(model(batch["image"], rng=rng, train=True), batch["target"], batch["weight"])

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """See `probabilities`."""
        return probabilities(model, images)

    def score(self, table: Table, rows: np.ndarray, predicted: Arrays) -> dict[str, float]:
        """See `evaluation.classification.metrics`."""
        probabilities = predicted["probabilities"].astype(np.float64)
        found = metrics(table.label[rows], probabilities, positive_class(self.outputs, self.positive))
        values = {name: float(found[name][0]) for name in NAMES if name in found}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def record(self, ids: Arrays, table: Table, rows: np.ndarray, predicted: Arrays) -> ClassPredictions:
        """Labels and probabilities."""
        return ClassPredictions(
            **ids, classes=self.outputs, label=table.label[rows], probabilities=predicted["probabilities"]
        )

    def examples(
        self, table: Table, tested: Sequence[tuple[np.ndarray, Predictions]], count: int
    ) -> list[dict[str, Any]]:
        """The errors, most confident first."""
        return errors(tested, count)

    def finish(self, workdir: str, predictions: Predictions, validation: Predictions | None, **found: Any) -> Any:
        """See `reporting.classification.finish`."""
        assert isinstance(predictions, ClassPredictions)
        assert isinstance(validation, ClassPredictions | None)
        return reporting.finish(workdir, predictions, validation=validation, positive=self.positive, **found)

    def table(self, results: Mapping[str, Any]) -> str:
        """See `evaluation.results.table`."""
        return scoring.table(results)


def probabilities(model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
    """`probabilities` float32 `[B, C]`."""
    return {"probabilities": jax.nn.softmax(model(images))}


def errors(tested: Sequence[tuple[np.ndarray, Predictions]], count: int) -> list[dict[str, Any]]:
    """At most `count` wrong predictions with their probability, most confident first; see `Task.examples`."""
    found = []
    for member, (rows, predictions) in enumerate(tested):
        assert isinstance(predictions, ClassPredictions)
        names = predictions.classes
        for place in np.flatnonzero(predictions.predicted != predictions.label):
            predicted = int(predictions.predicted[place])
            found.append(
                {
                    "member": member,
                    "row": int(rows[place]),
                    "label": names[predictions.label[place]],
                    "predicted": names[predicted],
                    "probability": float(predictions.probabilities[place, predicted]),
                }
            )
    return sorted(found, key=lambda one: (-one["probability"], one["row"]))[:count]


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in float32 as (weighted sum, sum of weights); their quotient is the loss.

    They are kept separate so that gradients of micro-batches add up to that of the whole batch.

    Args:
      logits: `[B, C]`.
      targets: `[B, C]`, rows sum to 1.
      weights: class weights, `[C]` or `[B, C]`.
    """
    weighted = targets * weights
    return -(weighted * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(), weighted.sum()


def smoothed_targets(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Label smoothing (Szegedy et al. 2016): int `[B]` to float32 `[B, C]`, rows sum to 1.

    The labelled class gets `1 - smoothing + smoothing / C`, every other class `smoothing / C`.
    """
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def mix(
    rng: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with itself in reverse order.

    One weight is drawn for the whole batch, from Beta(a, a); if both are enabled, each batch uses one of them at
    random, as in MAE's recipe.

    Args:
      rng: a key.
      images: float `[B, H, W, C]`.
      targets: float `[B, classes]`.
      mixup: a of mixup; 0 = off.
      cutmix: a of CutMix; 0 = off.

    Returns:
      mixed images and targets; the targets' weights are the shares of pixels.
    """
    if not mixup and not cutmix:
        return images, targets
    coin, weight, place = jax.random.split(rng, 3)
    height, width = images.shape[1:3]
    cut = jax.random.bernoulli(coin, 0.5) if mixup and cutmix else jnp.asarray(bool(cutmix))
    a = jnp.where(cut, cutmix or 1.0, mixup or 1.0)
    kept = jax.random.beta(weight, a, a)
    box = _box(place, kept, height, width).astype(images.dtype)
    partner = jnp.where(cut, box, 1 - kept)  # share of the other image at each pixel, [H, W]
    images = images * (1 - partner[..., None]) + images[::-1] * partner[..., None]
    share = partner.mean()
    return images, targets * (1 - share) + targets[::-1] * share


def _box(rng: jax.Array, kept: jax.Array, height: int, width: int) -> jax.Array:
    """A rectangle covering a share of `1 - kept`, around a random centre and clipped at the border: bool `[H, W]`."""
    centre_y, centre_x = jax.random.uniform(rng, (2,)) * jnp.asarray([height, width])
    side = jnp.sqrt(1 - kept)

    def inside(size: int, centre: jax.Array) -> jax.Array:
        half = jnp.floor(size * side) // 2
        position = jnp.arange(size)
        return (position >= jnp.floor(centre) - half) & (position < jnp.floor(centre) + half)

    return inside(height, centre_y)[:, None] & inside(width, centre_x)[None, :]


def erase(rng: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Random erasing (Zhong et al. 2020): replaces a rectangle with Gaussian noise in randomly chosen images.

    Its area is 2% to a third of the image, its aspect ratio 0.3 to 3.3; the first of ten candidates that fits is used.

    Args:
      rng: a key.
      images: float `[B, H, W, C]`, normalised.
      probability: per image; 0 = off.
    """
    if not probability:
        return images
    b, height, width, _ = images.shape
    coin, areas, aspects, places, noise = jax.random.split(rng, 5)
    area = height * width * jax.random.uniform(areas, (b, 10), minval=0.02, maxval=1 / 3)
    aspect = jnp.exp(jax.random.uniform(aspects, (b, 10), minval=math.log(0.3), maxval=-math.log(0.3)))
    h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (h < height) & (w < width)
    first = fits.argmax(axis=1)[:, None]
    h, w = (jnp.take_along_axis(side, first, axis=1) for side in (h, w))  # [B, 1]
    chosen = jax.random.bernoulli(coin, probability, (b, 1)) & fits.any(axis=1, keepdims=True)
    y, x = jax.random.uniform(places, (2, b, 1))
    top, left = jnp.floor(y * (height - h + 1)), jnp.floor(x * (width - w + 1))
    rows, columns = jnp.arange(height), jnp.arange(width)
    row = (rows >= top) & (rows < top + h) & chosen
    column = (columns >= left) & (columns < left + w)
    hole = (row[:, :, None] & column[:, None, :])[..., None]
    return jnp.where(hole, jax.random.normal(noise, images.shape, images.dtype), images)
