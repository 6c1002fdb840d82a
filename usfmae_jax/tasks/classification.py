"""Classification: which of some classes a frame is of."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from usfmae_jax.data.pipeline import decode_ahead
from usfmae_jax.data.splits import Strata
from usfmae_jax.data.table import Table, folders, names_beside, whole_image
from usfmae_jax.errors import InputError
from usfmae_jax.models.patches import normalize_images


@dataclasses.dataclass(frozen=True)
class Classification:
    """How a classifier is taught, and how it sees pixels.

    Attributes:
      num_classes: outputs of the model.
      mean: per channel of the model's input.
      std: per channel.
      smoothing: of the labels, in [0, 1).
      mixup: see `mix`; 0 = off.
      cutmix: see `mix`; 0 = off.
      erasing: probability, see `erase`.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0

    def prepare(self, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Normalises, erases and mixes `image` uint8 `[B, H, W, c]`, and makes a `target` `[B, C]` of `label`."""
        mix_rng, erase_rng, model_rng = jax.random.split(rng, 3)
        inputs = normalize_images(batch["image"], self.mean, self.std)
        targets = smoothed_targets(batch["label"], self.num_classes, self.smoothing)
        inputs = erase(erase_rng, inputs, self.erasing)  # before they are mixed, as MAE's recipe has it
        inputs, targets = mix(mix_rng, inputs, targets, mixup=self.mixup, cutmix=self.cutmix)
        return {"image": inputs, "target": targets, "weight": batch["weight"]}, model_rng

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The cross entropy weighted by `weight` `[B, C]`, and the sum of the weights."""
        return cross_entropy(model(batch["image"], rng=rng, train=True), batch["target"], batch["weight"])

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """uint8 `[B, H, W, c]` to `probabilities` float32 `[B, C]`."""
        return {"probabilities": jax.nn.softmax(model(normalize_images(images, self.mean, self.std)))}


def select(table: Table, classes: Sequence[str] = ()) -> Table:
    """The frames that have a label; all their labels are in [0, C), and `label_names` are C names.

    Args:
      table: all frames.
      classes: the class names that are expected, in order; empty takes what is there. Case does not count.

    Raises:
      InputError: no labels, one class only, or see `class_names`.
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
    """The one list of names that all folders of shards agree on, and the person, if they said.

    Args:
      labelled: frames that have a label.
      expected: see `select`.

    Raises:
      InputError: sources (or `expected`) that disagree about the classes, or a label outside of the class list.
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
    names = first or tuple(expected) or tuple(map(str, range(highest + 1)))
    if highest >= len(names):
        raise InputError(
            f"label {highest} is outside the class list, whose {len(names)} names are {', '.join(names)} (0 to "
            f"{len(names) - 1}); build the shards again, or set config.classes"
        )
    return names


def strata(table: Table) -> Strata:
    """The classes of a table from `select`: every part of a split has some of each."""
    return Strata(table.label, table.label_names)


def labelled_images(table: Table, *, size: tuple[int, int], channels: int, limit: int) -> dict[str, Any]:
    """Decodes labelled frames whole, for a probe: at most `limit`, spread evenly; damaged ones are passed over.

    Returns:
      `image` uint8 `[N, H, W, C]`, `label` int `[N]`, `patient` list of N ids (made unique by their dataset).

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


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy in float32 as (weighted sum, sum of weights); their quotient is the loss.

    Kept apart so that gradients of micro-batches add up to that of the whole batch.

    Args:
      logits: `[B, C]`.
      targets: `[B, C]`, rows add up to 1.
      weights: of the classes, `[C]` or `[B, C]`.
    """
    weighted = targets * weights
    return -(weighted * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(), weighted.sum()


def smoothed_targets(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Label smoothing (Szegedy et al. 2016): int `[B]` to float32 `[B, C]`, rows add up to 1.

    The label has `1 - smoothing + smoothing / C`, every other class `smoothing / C`.
    """
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def mix(
    rng: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with itself in reverse order.

    One weight is drawn for the whole batch, from Beta(a, a); with both switched on a coin decides, as in MAE's recipe.

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
    """A bool `[H, W]`: a rectangle of area `1 - kept` around a random centre, cut off at the border."""
    centre_y, centre_x = jax.random.uniform(rng, (2,)) * jnp.asarray([height, width])
    side = jnp.sqrt(1 - kept)

    def inside(size: int, centre: jax.Array) -> jax.Array:
        half = jnp.floor(size * side) // 2
        position = jnp.arange(size)
        return (position >= jnp.floor(centre) - half) & (position < jnp.floor(centre) + half)

    return inside(height, centre_y)[:, None] & inside(width, centre_x)[None, :]


def erase(rng: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Random erasing (Zhong et al. 2020): a rectangle of some normalised images becomes Gaussian noise.

    Its area is 2% to a third of the image, its aspect 0.3 to 3.3; of ten rectangles the first that fits is taken.

    Args:
      rng: a key.
      images: float `[B, H, W, C]`, standardised.
      probability: for each image; 0 = off.
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
