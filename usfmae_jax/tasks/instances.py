"""Instance segmentation: each connected area of a class in a frame's mask is an instance.

A set of queries predicts instances. The best one-to-one matching of predictions to annotated instances determines the
target of each query (DETR, Carion et al. 2020; weights from Mask2Former, Cheng et al. 2022); unmatched queries learn
"no object".
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from pycocotools import mask as coding

from usfmae_jax.data.annotations import Classes
from usfmae_jax.data.pipeline import decode_ahead
from usfmae_jax.data.records import Record, decode_image
from usfmae_jax.data.splits import Strata
from usfmae_jax.data.table import Table, read_row
from usfmae_jax.errors import DamagedRecord, InputError
from usfmae_jax.evaluation import instances as scoring
from usfmae_jax.evaluation import tables
from usfmae_jax.evaluation.instances import LOSSES, NAMES, Instance, InstancePredictions
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.models.queries import MaskTransformer
from usfmae_jax.reporting import instances as reporting
from usfmae_jax.reporting.masks import encoded
from usfmae_jax.tasks import Arrays, Task
from usfmae_jax.tasks.segmentation import Segmentation, thirds

#: Weights of the terms of the loss and of the matching cost, those of Mask2Former.
CLASS, PIXELS, DICE = 2.0, 5.0, 5.0
#: Lowest score of a detection that is kept: below it, a query effectively predicts "no object".
LEAST = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Instances(Task):
    """How an instance segmenter is trained and evaluated.

    Attributes:
      masks: the segmentation task that reads the masks.
      most: the largest number of instances in a frame of the table; in frames with more than `queries`, the smallest
        are not trained on and count as missed in tests.
      queries: see `models.queries.MaskTransformer`.
      query_blocks: likewise.
      decoder_width: likewise.
      min_pixels: smaller areas are not instances, in a frame as well as in its augmented view.
      no_object: weight of "no object" in the cross-entropy of the classes.
      dice: weight of the Dice loss of the masks, relative to the default.
    """

    masks: Segmentation
    most: int
    queries: int = 20
    query_blocks: int = 3
    decoder_width: int = 128
    min_pixels: int = 10
    no_object: float = 0.1
    dice: float = 1.0

    metrics = tuple(NAMES)
    losses = LOSSES
    tie = "map50"
    predictions = InstancePredictions
    mask_layers = (2,)

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes."""
        return self.masks.outputs

    def strata(self, table: Table) -> Strata:
        """The strata of the segmentation task."""
        return self.masks.strata(table)

    def summary(self, table: Table) -> str:
        """The number of frames with each class, and the largest number of instances."""
        each = self.masks.summary(table)
        beyond = f", of which the {self.queries} largest are learnt" if self.most > self.queries else ""
        return f"{each}; at most {tables.counted(self.most, 'instance')} a frame{beyond}"

    def describe(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """A query head."""
        head = {"kind": "queries", "width": self.decoder_width, "queries": self.queries, "blocks": self.query_blocks}
        return {**backbone, "task": "instances", "outputs": list(self.outputs), "head": head}

    def targets(self, table: Table, rows: np.ndarray) -> Arrays:
        """No arrays: masks are read with the images."""
        return {}

    def mask(self, record: Record) -> np.ndarray:
        """Class and instance number of each pixel, both from 1, largest first: uint8 `[H, W, 2]`; 0 = none."""
        return numbered(self.masks.mask(record), len(self.outputs), self.min_pixels)

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss, averaged over the blocks that queries pass through and summed over images; and their number."""
        assert isinstance(model, MaskTransformer)
        answers = model.answers(batch["image"], rng, train=True)
        most = max(1, min(self.most, self.queries))
        _, _, height, width = answers[-1]["masks"].shape
        drawn, classes = drawn_masks(batch["mask"], most, (height, width), self.min_pixels)
        said = jax.tree.map(lambda *each: jnp.concatenate(each), *answers)  # one matching call for all of them
        drawn, classes = (jnp.concatenate([one] * len(answers)) for one in (drawn, classes))
        errors = set_loss(said, drawn, classes, no_object=self.no_object, dice=self.dice)
        return errors.sum() / len(answers), jnp.float32(len(batch["image"]))

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """See `answers`."""
        return answers(model, images)

    def together(self, predicted: Sequence[Arrays], models: Sequence[Mapping[str, Any]]) -> Arrays:
        """The predictions of all models, `[n, M, ...]`, which `measure` merges frame by frame, see `merged`."""
        return {name: np.stack([one[name] for one in predicted], axis=1) for name in predicted[0]}

    def measure(self, table: Table, rows: np.ndarray, predicted: Arrays) -> Arrays:
        """`truth` and `detections`, object `[n]`: lists of `evaluation.instances.Instance` at the frames' own sizes."""

        def one(place: int) -> tuple[list[Instance], list[Instance]]:
            try:
                drawn = self.mask(read_row(table, int(rows[place])))
            except DamagedRecord as error:
                path, number = table.shards.locate(int(table.index[rows[place]]))
                raise InputError(f"record number {number} of {path} is damaged: {error}; rebuild the shards") from error
            classes, masks = (predicted[name][place] for name in ("classes", "masks"))
            find = merged if classes.ndim == 3 else detections
            return instances_of(drawn), find(classes, masks, drawn.shape[:2])

        with contextlib.closing(decode_ahead(one, range(len(rows)), 2, 64)) as found:
            truth, said = zip(*found, strict=True)
        return {"truth": scoring.lists(truth), "detections": scoring.match(truth, said, len(self.outputs))}

    def outlines(
        self, table: Table, rows: np.ndarray, predicted: Arrays
    ) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
        """The class map of the detections that count as found, and all detections."""
        for place, row in enumerate(rows.tolist()):
            size = self.masks.mask(read_row(table, row)).shape[:2]
            found = detections(predicted["classes"][place], predicted["masks"][place], size)
            yield painted(found, size), found

    def score(self, table: Table, rows: np.ndarray, predicted: Arrays) -> dict[str, float]:
        """See `evaluation.instances.score`; 0 for metrics undefined for lack of annotated instances."""
        ids = {name: getattr(table, name)[rows] for name in ("dataset", "patient", "video")}
        nothing = np.zeros(len(rows))
        ids |= {"frame": table.frame_name[rows], "fold": nothing.astype(str), "seed": nothing, "fraction": nothing + 1}
        found = scoring.score(self.record(ids, table, rows, predicted), np.ones((1, len(rows))))
        return {name: float(np.nan_to_num(found[name][0])) for name in NAMES}

    def record(self, ids: Arrays, table: Table, rows: np.ndarray, predicted: Arrays) -> InstancePredictions:
        """Annotated and detected instances of each frame."""
        return InstancePredictions(**ids, classes=self.outputs, **predicted, **scoring.counts(**predicted))

    def examples(
        self, table: Table, tested: Sequence[tuple[np.ndarray, Predictions]], count: int
    ) -> list[dict[str, Any]]:
        """The best, middling and worst frames by F1 at an intersection over union of 0.5, a third each."""
        values, place = [], []
        for member, (rows, predictions) in enumerate(tested):
            assert isinstance(predictions, InstancePredictions)
            values.append(predictions.f1())
            place += [(member, int(row), n) for n, row in enumerate(rows)]
        every, found = np.concatenate(values), []
        for group, i in thirds(every, count):
            member, row, n = place[i]
            predictions = tested[member][1]
            assert isinstance(predictions, InstancePredictions)
            found.append({"member": member, "row": row, "group": group, "f1": float(every[i])})
            found[-1] |= {"whole": decode_image(read_row(table, row)["image"], 3), "drawn": predictions.truth[n]}
            found[-1] |= {"detections": predictions.detections[n]}
        return found

    def look(self, predict: Any, model: Any) -> Any:
        """None: the detections are already in the predictions."""
        return None

    def finish(self, workdir: str, predictions: Predictions, validation: Predictions | None, **found: Any) -> Any:
        """See `reporting.instances.finish`."""
        assert isinstance(predictions, InstancePredictions)
        return reporting.finish(workdir, predictions, **found)

    def table(self, results: Mapping[str, Any]) -> str:
        """The results as text for a terminal."""
        return tables.overview(results, NAMES, "map")


def most_instances(table: Table, classes: Classes, min_pixels: int, threads: int = 2) -> int:
    """The largest number of instances in a frame of a table."""

    def one(row: int) -> int:
        record = read_row(table, row)
        return int(numbered(classes.read(record), len(classes.names), min_pixels).max()) if record["mask"] else 0

    with contextlib.closing(decode_ahead(one, range(len(table)), threads, 64)) as found:
        return max(found, default=0)


def numbered(classes: np.ndarray, count: int, min_pixels: int) -> np.ndarray:
    """Numbers the connected areas of all classes from 1, largest first.

    Args:
      classes: class of each pixel, uint8 `[H, W]`, 0 = background.
      count: number of classes, without background.
      min_pixels: smaller areas become background; diagonal neighbours are connected.

    Returns:
      uint8 `[H, W, 2]`: class and number; areas beyond the 255th become background.
    """
    found: list[tuple[int, int, np.ndarray]] = []
    for c in range(1, count + 1):
        _, areas, stats, _ = cv2.connectedComponentsWithStats((classes == c).astype(np.uint8), connectivity=8)
        sizes = stats[1:, cv2.CC_STAT_AREA].tolist()
        found += [(size, c, areas == number) for number, size in enumerate(sizes, 1) if size >= min_pixels]
    found.sort(key=lambda one: -one[0])
    result = np.zeros((*classes.shape, 2), np.uint8)
    for number, (_, c, area) in enumerate(found[:255], 1):
        result[area] = c, number
    return result


def instances_of(drawn: np.ndarray) -> list[Instance]:
    """The instances of a frame, from the output of `numbered`."""
    found = []
    for number in range(1, int(drawn[:, :, 1].max(initial=0)) + 1):
        area = drawn[:, :, 1] == number
        found.append({"class": int(drawn[:, :, 0][area][0]) - 1, "mask": encoded(area)})
    return found


def answers(model: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Predictions of the queries of a `MaskTransformer` for normalised images `[B, H, W, C]`.

    Returns:
      `classes`, probabilities float32 `[B, Q, C]`; `masks`, probabilities in 255ths, uint8 `[B, Q, h, w]`.
    """
    said = model(images)
    return {
        "classes": jax.nn.softmax(said["classes"])[..., 1:],
        "masks": jnp.round(255 * jax.nn.sigmoid(said["masks"])).astype(jnp.uint8),
    }


def painted(found: Sequence[Instance], size: tuple[int, int]) -> np.ndarray:
    """Class map, uint8 `[H, W]`, of the detections that count as found; higher scores are painted on top."""
    shown = np.zeros(size, np.uint8)
    for one in sorted(found, key=lambda one: one["score"]):
        if one["score"] >= scoring.FOUND:
            shown[coding.decode(one["mask"]) > 0] = one["class"] + 1
    return shown


def merged(classes: np.ndarray, masks: np.ndarray, size: tuple[int, int]) -> list[Instance]:
    """Merges the detections of M models on a frame.

    In order of descending score, detections of the same class with an intersection over union of at least 0.5 are
    merged, at most one per model. The merged score is the mean over all models, counting 0 for those that did not find
    it; the merged mask holds the pixels on which at least half of the models that found it agree.

    Args:
      classes: float `[M, Q, C]`, see `detections`.
      masks: uint8 `[M, Q, h, w]`, likewise.
      size: (height, width) of the frame.

    Returns:
      list of `Instance`, highest score first, each with `spread`, the standard deviation of the score over the models.
    """
    every = sorted(
        ((one, member) for member in range(len(classes)) for one in detections(classes[member], masks[member], size)),
        key=lambda pair: -pair[0]["score"],
    )
    found: list[dict[int, Instance]] = []
    for one, member in every:
        for group in found:
            first = next(iter(group.values()))
            if member in group or first["class"] != one["class"]:
                continue
            if coding.iou([one["mask"]], [first["mask"]], [0])[0, 0] >= 0.5:
                group[member] = one
                break
        else:
            found.append({member: one})
    said = []
    for group in found:
        scores = np.array([group[member]["score"] if member in group else 0.0 for member in range(len(classes))])
        share = np.mean([coding.decode(one["mask"]) for one in group.values()], axis=0)
        first = next(iter(group.values()))
        one = {"class": first["class"], "score": round(float(scores.mean()), 5)}
        said.append(one | {"mask": encoded(share >= 0.5), "spread": float(scores.std())})
    return sorted(said, key=lambda one: -one["score"])


def detections(classes: np.ndarray, masks: np.ndarray, size: tuple[int, int]) -> list[Instance]:
    """The detections on a frame, at most one per query.

    The score is the probability of the query's best class times the mean probability inside its mask.

    Args:
      classes: probabilities, float `[Q, C]`.
      masks: probabilities of the pixels in 255ths, uint8 `[Q, h, w]`, in the model's view of the frame.
      size: (height, width) of the frame.
    """
    found = []
    for shares, mask in zip(classes, masks, strict=True):
        c = int(shares.argmax())
        inside = mask > 127
        if shares[c] < LEAST or not inside.any():
            continue
        score = float(shares[c]) * float(mask[inside].mean()) / 255
        area = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR) > 127.5
        if score >= LEAST and area.any():
            found.append({"class": c, "score": round(score, 5), "mask": encoded(area)})
    return found


def drawn_masks(masks: jax.Array, most: int, size: tuple[int, int], min_pixels: int) -> tuple[jax.Array, jax.Array]:
    """The annotated instances in training views.

    Args:
      masks: class and number of each pixel, uint8 `[B, H, W, 2]`.
      most: M, number of instances per view that are learnt: those with the lowest numbers.
      size: (h, w) of the predicted masks; divides (H, W).
      min_pixels: see `Instances`.

    Returns:
      float32 `[B, M, h, w]`, the share of each pixel that the instance covers; int32 `[B, M]`, its class from 1, 0 = no
      instance.
    """
    b, height, width, _ = masks.shape
    own = masks[..., 1][:, None] == jnp.arange(1, most + 1)[:, None, None]
    classes = jnp.where(own, masks[..., 0][:, None], 0).max(axis=(2, 3)).astype(jnp.int32)
    classes = jnp.where(own.sum(axis=(2, 3)) >= min_pixels, classes, 0)
    cells = own.reshape(b, most, size[0], height // size[0], size[1], width // size[1])
    return cells.mean(axis=(3, 5), dtype=jnp.float32), classes


def set_loss(
    said: dict[str, jax.Array], drawn: jax.Array, classes: jax.Array, *, no_object: float, dice: float
) -> jax.Array:
    """Loss under the best matching of queries to instances.

    The sum of the cross-entropy of the classes, a weighted mean over queries, and the cross-entropy and Dice loss of
    the masks, means over instances.

    Args:
      said: see `models.queries.Answer`.
      drawn: from `drawn_masks`, `[B, M, h, w]` with M <= Q.
      classes: likewise, `[B, M]`.
      no_object: weight of unmatched queries in the cross-entropy of the classes.
      dice: factor of the Dice loss.

    Returns:
      float32 `[B]`.
    """
    b, queries, _ = said["classes"].shape
    x = said["masks"].reshape(b, queries, -1).astype(jnp.float32)
    t = drawn.reshape(*drawn.shape[:2], -1)
    # For all pairs [B, M, Q], as matrix products: softplus(x) - x t is the cross-entropy of a pixel.
    entropy = (jax.nn.softplus(x).sum(axis=-1)[:, None] - jnp.einsum("bmp,bqp->bmq", t, x)) / x.shape[-1]
    share = jax.nn.sigmoid(x)
    both, either = jnp.einsum("bmp,bqp->bmq", t, share), t.sum(axis=-1)[:, :, None] + share.sum(axis=-1)[:, None]
    apart = PIXELS * entropy + dice * DICE * (1 - (2 * both + 1) / (either + 1))
    logs = jax.nn.log_softmax(said["classes"].astype(jnp.float32))
    there = classes > 0
    belief = jnp.take_along_axis(jnp.exp(logs), classes[:, None], axis=2).swapaxes(1, 2)  # [B, M, Q]
    chosen = matched(apart - CLASS * belief, there)
    wanted = jnp.zeros((b, queries), jnp.int32).at[jnp.arange(b)[:, None], chosen].max(jnp.where(there, classes, 0))
    weight = jnp.where(wanted > 0, 1.0, no_object)
    errors = -jnp.take_along_axis(logs, wanted[:, :, None], axis=2)[:, :, 0]
    about = (weight * errors).sum(axis=1) / weight.sum(axis=1)
    masks = jnp.take_along_axis(apart, chosen[:, :, None], axis=2)[:, :, 0]
    return CLASS * about + jnp.where(there, masks, 0).sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)


def matched(cost: jax.Array, there: jax.Array) -> jax.Array:
    """The query assigned to each instance by the matching of lowest total cost.

    Args:
      cost: `[B, M, Q]`, M <= Q; gets no gradient.
      there: bool `[B, M]`, False for padding, which gets the remaining queries.

    Returns:
      int32 `[B, M]`.
    """
    # With NaN or infinite costs the algorithm would never terminate.
    cost = jnp.nan_to_num(jax.lax.stop_gradient(cost), nan=1e6, posinf=1e6, neginf=-1e6)

    def one(cost: jax.Array) -> jax.Array:
        rows, columns = optax.assignment.hungarian_algorithm(cost)
        return jnp.zeros(len(cost), jnp.int32).at[rows].set(columns.astype(jnp.int32))

    return jax.vmap(one)(jnp.where(there[:, :, None], cost, 0))
