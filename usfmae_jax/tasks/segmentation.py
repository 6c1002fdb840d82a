"""Semantic segmentation: the class of each pixel of a frame."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from usfmae_jax.data import annotations
from usfmae_jax.data.annotations import Classes
from usfmae_jax.data.pipeline import decode_ahead
from usfmae_jax.data.records import Record, decode_image
from usfmae_jax.data.splits import Strata
from usfmae_jax.data.table import Table, read_row
from usfmae_jax.errors import DamagedRecord, InputError
from usfmae_jax.evaluation import segmentation as scoring
from usfmae_jax.evaluation import tables
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.evaluation.segmentation import LOSSES, NAMES, MaskPredictions
from usfmae_jax.reporting import segmentation as reporting
from usfmae_jax.reporting.masks import areas
from usfmae_jax.tasks import Arrays, Task, classification

UNMASKED = ("drop", "background", "refuse")
#: Minimum number of patients for a class to be a stratum of its own in splits.
FEWEST = 10
#: Maximum number of examples in each group: best, middling and worst.
SHOWN = 3


def select(table: Table, found: annotations.Found, unmasked: str) -> np.ndarray:
    """The rows used for training and testing, int `[M]`.

    Args:
      table: all frames.
      found: survey of their masks.
      unmasked: treatment of frames without a mask: "drop" leaves them out, "background" takes every pixel as
        background, "refuse" raises an error.

    Raises:
      InputError: `unmasked` is "refuse" and a frame has no mask.
    """
    without = int((~found.there).sum())
    if unmasked == "refuse" and without:
        raise InputError(
            f"{without} of {len(table)} frames of config.data.path={table.path!r} have no mask; "
            "--config.unmasked=drop leaves them out, --config.unmasked=background takes them for empty ones"
        )
    return np.arange(len(table)) if unmasked == "background" else np.flatnonzero(found.there)


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation(Task):
    """How a segmenter is trained: cross-entropy over pixels plus soft Dice loss over classes.

    Attributes:
      classes: the classes in the masks.
      present: bool `[N, C]`, whether a frame of the table contains a class.
      head: "linear" or "decoder", see `models.decoders.Segmenter`.
      decoder_width: likewise.
      dice: weight of the soft Dice loss (Milletari et al. 2016) relative to the cross-entropy.
    """

    classes: Classes
    present: np.ndarray
    head: str = "decoder"
    decoder_width: int = 128
    dice: float = 1.0

    metrics = tuple(NAMES)
    losses = LOSSES
    tie = "iou"
    predictions = MaskPredictions

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes, without the background."""
        return self.classes.names

    def ordered(self, names: Sequence[str]) -> "Segmentation":
        """The task with the same classes in another order."""
        if tuple(names) == self.outputs:
            return self
        places = [self.outputs.index(name) for name in names]
        codes = self.classes.codes.copy()
        for number, place in enumerate(places, 1):
            codes[self.classes.codes == place + 1] = number
        classes = dataclasses.replace(self.classes, names=tuple(names), codes=codes)
        return dataclasses.replace(self, classes=classes, present=self.present[:, places])

    def strata(self, table: Table) -> Strata:
        """The rarest class of each frame; classes with too few patients are merged into the most common stratum."""
        patients = np.array([len(np.unique(table.patient_key[there])) for there in self.present.T])
        rarity = np.where(self.present, patients, np.iinfo(np.int64).max)
        which = np.where(self.present.any(axis=1), rarity.argmin(axis=1), len(self.outputs))
        counts = np.array([len(np.unique(table.patient_key[which == one])) for one in range(len(self.outputs) + 1)])
        kept = np.union1d(np.flatnonzero(counts >= FEWEST), counts.argmax())
        which = np.where(np.isin(which, kept), which, counts.argmax())
        names = (*self.outputs, "nothing")
        return Strata(np.searchsorted(kept, which), tuple(names[one] for one in kept.tolist()))

    def summary(self, table: Table) -> str:
        """The number of frames with each class."""
        counts = self.present.sum(axis=0)
        return ", ".join(f"{count} with {name}" for name, count in zip(self.outputs, counts, strict=True))

    def describe(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """A segmentation head; a U-Net has its own."""
        about = {**backbone, "task": "segmentation", "outputs": list(self.outputs)}
        if backbone["model"] == "vit":
            about["head"] = {"kind": self.head} | ({"width": self.decoder_width} if self.head == "decoder" else {})
        return about

    def targets(self, table: Table, rows: np.ndarray) -> Arrays:
        """No arrays: masks are read with the images."""
        return {}

    def mask(self, record: Record) -> np.ndarray:
        """Class of each pixel, uint8 `[H, W]`; all background for a frame without a mask."""
        if record["mask"]:
            return self.classes.read(record)
        height, width = record["height"], record["width"]
        return np.zeros((height, width) if height else decode_image(record["image"]).shape[:2], np.uint8)

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss summed over images, and their number."""
        logits = model(batch["image"], rng=rng, train=True)
        return pixel_loss(logits, batch["mask"], self.dice).sum(), jnp.float32(len(logits))

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """See `probabilities`."""
        return probabilities(model, images)

    def mirror(self, predicted: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """See `mirror`."""
        return mirror(predicted)

    def measure(self, table: Table, rows: np.ndarray, predicted: Arrays) -> Arrays:
        """`evaluation.segmentation.MEASURES`, float `[n, C]`, at the frames' own sizes, and `pixel_area`, `[n]`."""

        def one(place: int) -> Arrays:
            row = int(rows[place])
            try:
                record = read_row(table, row)
                drawn = self.mask(record)
            except DamagedRecord as error:
                path, number = table.shards.locate(int(table.index[row]))
                raise InputError(f"record number {number} of {path} is damaged: {error}; rebuild the shards") from error
            said = classes_of(predicted["probabilities"][place], drawn.shape)
            spacing = tuple(record.get("spacing") or (0.0, 0.0))
            area = np.asarray(np.prod(spacing) if min(spacing) > 0 else np.nan, np.float64)
            return scoring.measure(drawn, said, len(self.outputs), spacing) | {"pixel_area": area}

        with contextlib.closing(decode_ahead(one, range(len(rows)), 2, 64)) as found:
            frames = list(found)
        return {name: np.stack([frame[name] for frame in frames]) for name in (*scoring.MEASURES, "pixel_area")}

    def outlines(
        self, table: Table, rows: np.ndarray, predicted: Arrays
    ) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
        """The class map, and the connected areas of the classes as instances."""
        for place, row in enumerate(rows.tolist()):
            record = read_row(table, row)
            size = record["height"], record["width"]
            size = size if min(size) else decode_image(record["image"]).shape[:2]
            mask = classes_of(predicted["probabilities"][place], size)
            yield mask, areas(mask, len(self.outputs))

    def score(self, table: Table, rows: np.ndarray, predicted: Arrays) -> dict[str, float]:
        """See `evaluation.segmentation.score`."""
        ids = {name: getattr(table, name)[rows] for name in ("dataset", "patient", "video")}
        nothing = np.zeros(len(rows))
        ids |= {"frame": table.frame_name[rows], "fold": nothing.astype(str), "seed": nothing, "fraction": nothing + 1}
        made = self.record(ids, table, rows, predicted)
        found = {
            name: float(value[0])
            for name, value in scoring.score(made, np.ones((1, len(rows)))).items()
            if name in NAMES
        }
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def record(self, ids: Arrays, table: Table, rows: np.ndarray, predicted: Arrays) -> MaskPredictions:
        """The measures of each frame."""
        return MaskPredictions(**ids, classes=self.outputs, **predicted)

    def examples(
        self, table: Table, tested: Sequence[tuple[np.ndarray, Predictions]], count: int
    ) -> list[dict[str, Any]]:
        """The worst, middling and best frames by Dice, with the annotated mask."""
        dice, place = [], []
        for member, (rows, predictions) in enumerate(tested):
            assert isinstance(predictions, MaskPredictions)
            dice.append(predictions.mean("dice"))
            place += [(member, int(row)) for row in rows]
        every, found = np.concatenate(dice), []
        for group, i in thirds(every, count):
            member, row = place[i]
            record = read_row(table, row)
            found.append({"member": member, "row": row, "group": group, "dice": float(every[i])})
            found[-1] |= {"whole": decode_image(record["image"], 3), "drawn": self.mask(record)}
        return found

    def look(self, predict: Any, model: Any) -> Any:
        """Shows the predicted class map beside each example, uint8 `[n, H, W]` at the model's input size."""
        return lambda images: predict(images)["probabilities"].argmax(axis=-1).astype(np.uint8)

    def finish(self, workdir: str, predictions: Predictions, validation: Predictions | None, **found: Any) -> Any:
        """See `reporting.segmentation.finish`."""
        assert isinstance(predictions, MaskPredictions)
        return reporting.finish(workdir, predictions, **found)

    def table(self, results: Mapping[str, Any]) -> str:
        """The results as text for a terminal."""
        return tables.overview(results, NAMES, "dice")


def of_table(
    table: Table, names: Sequence[str], unmasked: str, threads: int, by_label: bool = False, **how: Any
) -> tuple[Table, Segmentation]:
    """The frames of a table used for training and testing, and the segmentation task on them.

    Args:
      table: all frames.
      names: of the classes, see `annotations.classes`; with `by_label` see `classification.class_names`.
      unmasked: see `select`.
      threads: number of decoding threads.
      by_label: give the foreground of a mask the class label of its frame.
      **how: the other fields of `Segmentation`.

    Raises:
      InputError: the masks cannot be used.
    """
    if by_label:
        table = classification.select(table, names)
    found = annotations.survey(table, threads)
    classes = (
        annotations.of_labels(table, found, table.label_names) if by_label else annotations.classes(table, found, names)
    )
    rows = select(table, found, unmasked)
    pixels = found.pixels[rows]
    if by_label:
        present = np.eye(len(classes.names), dtype=bool)[table.label[rows]] & (pixels[:, 1:].sum(axis=1) > 0)[:, None]
    else:
        numbers = [np.flatnonzero(classes.codes == c + 1) for c in range(len(classes.names))]
        present = np.stack([pixels[:, one].sum(axis=1) > 0 for one in numbers], axis=1)
    return table.take(rows), Segmentation(classes, present, **how)


def probabilities(model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
    """`probabilities` of background and classes in 255ths: uint8 `[B, H, W, 1 + C]`."""
    return {"probabilities": jnp.round(255 * jax.nn.softmax(model(images))).astype(jnp.uint8)}


def mirror(predicted: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Flips maps `[B, H, W, ...]` of mirrored images back."""
    return {name: maps[:, :, ::-1] for name, maps in predicted.items()}


def pixel_loss(logits: jax.Array, classes: jax.Array, dice: float) -> jax.Array:
    """Cross-entropy, averaged over pixels, plus `dice` times (1 - soft Dice), averaged over classes.

    Args:
      logits: `[B, H, W, 1 + C]`, the background first.
      classes: int `[B, H, W]`.
      dice: weight.

    Returns:
      float32 `[B]`.
    """
    logits = logits.astype(jnp.float32)
    truth = jax.nn.one_hot(classes, logits.shape[-1])
    entropy = -(truth * jax.nn.log_softmax(logits)).sum(axis=-1).mean(axis=(1, 2))
    if not dice:
        return entropy
    said, truth = jax.nn.softmax(logits)[..., 1:], truth[..., 1:]
    both, either = ((one).sum(axis=(1, 2)) for one in (said * truth, said + truth))
    # Smoothing by one, as is usual: a class neither annotated nor predicted has Dice 1.
    return entropy + dice * (1 - (2 * both + 1) / (either + 1)).mean(axis=-1)


def thirds(values: np.ndarray, count: int) -> list[tuple[str, int]]:
    """Picks the worst, middling and best values, at most a third of `count` each: list of (group, index).

    Args:
      values: float `[N]`, higher is better; NaN = missing.
      count: maximum number of picks.
    """
    order = [i for i in np.argsort(values, kind="stable").tolist() if np.isfinite(values[i])]
    third = min(count // 3, len(order) // 3, SHOWN) or min(len(order), count, 1)
    middle = (len(order) - third) // 2
    parts = {"worst": order[:third], "middle": order[middle : middle + third], "best": order[-third:][::-1]}
    return [(group, i) for group, chosen in parts.items() for i in chosen]


def classes_of(probabilities: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The most probable class of each pixel at the frame's own size.

    Args:
      probabilities: uint8 `[h, w, K]`, in the model's view of the frame; or float, the mean over several models.
      size: (height, width) of the frame.

    Returns:
      uint8 `[*size]`.
    """
    layers = [
        cv2.resize(layer, size[::-1], interpolation=cv2.INTER_LINEAR)
        for layer in np.moveaxis(probabilities.astype(np.float32), 2, 0)
    ]
    return np.argmax(layers, axis=0).astype(np.uint8)
