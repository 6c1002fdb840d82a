"""The outcome of an evaluation, and tests of the same models on corrupted images."""

import concurrent.futures
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from usfmae_jax.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from usfmae_jax.data.table import Table
from usfmae_jax.data.table import images as decode
from usfmae_jax.evaluation.classification import summarise
from usfmae_jax.evaluation.predictions import ClassPredictions, Predictions, concatenate, identify
from usfmae_jax.training.inspect import Attention

#: Metrics that are reported for each severity.
CURVES = ("auroc", "balanced_accuracy", "f1_macro", "ece")
#: Decoded images are kept in memory for all corruptions if they are at most this many bytes.
KEPT = 2**30

#: (batches, number of images, name for the bar) -> the probabilities for each foremost member's rows, in order.
Predict = Callable[[Iterator[np.ndarray], int, str], list[np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tested:
    """The test of one member.

    Attributes:
      fold, seed, fraction: identify the member, see `evaluation.predictions`.
      rows: int `[N]`, the rows of the table that it was tested on.
      predictions: predictions for these rows.
      validation: predictions for the validation rows, on which its settings were chosen; None if there are none.
      settings: the chosen settings; JSON.
    """

    fold: str
    seed: int
    fraction: float
    rows: np.ndarray
    predictions: Predictions
    validation: Predictions | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of an evaluation.

    Attributes:
      tested: one entry for each member.
      split: where the folds come from, in a few words.
      mapped: rows int `[M]` and features `[M, D]` for the map, and a few words on what they are.
      looks: by number of a foremost member: what is shown beside an example; None where there is nothing.
      image_format: (height, width) and channels of the models' input.
      predict: runs the foremost members on other images of their rows; None where that is not supported.
      excluded: near-duplicates removed from training parts; None where that is not known.
      warnings: sentences.
      features: `sha256` of frozen features, and whether they were `computed` now or before; empty if there are none.
    """

    tested: list[Tested]
    split: str
    mapped: tuple[np.ndarray, np.ndarray, str]
    looks: dict[int, Attention | None]
    image_format: tuple[tuple[int, int], int]
    predict: Predict | None = None
    excluded: list[dict[str, Any]] | None = None
    warnings: tuple[str, ...] = ()
    features: dict[str, str] = dataclasses.field(default_factory=dict)


def sweep(
    table: Table, tested: Sequence[Tested], outcome: Outcome, *, positive: str, seed: int, batch_size: int, threads: int
) -> dict[str, Any]:
    """Metrics on test images for every corruption and severity; nothing is fitted on corrupted images.

    Args:
      table: table of the frames.
      tested: the foremost members; the images of their rows are corrupted at the model's input size.
      outcome: outcome of the evaluation.
      positive: name of the positive class.
      seed: seed of the corruptions.
      batch_size: images per call.
      threads: threads that decode and corrupt.

    Returns:
      for each corruption and each metric of `CURVES`, the values at severity 0 (clean), 1, ..., 5.
    """
    rows = np.concatenate([member.rows for member in tested])
    said = [member.predictions for member in tested if isinstance(member.predictions, ClassPredictions)]
    (size, channels), predict = outcome.image_format, outcome.predict
    assert predict

    def clean() -> Iterator[np.ndarray]:
        return decode(table, rows, size=size, channels=channels, batch_size=batch_size, threads=threads)

    def score(probabilities: Sequence[np.ndarray]) -> dict[str, float | None]:
        parts = [
            dataclasses.replace(member, probabilities=found) for member, found in zip(said, probabilities, strict=True)
        ]
        metrics = summarise(concatenate(parts), positive, resamples=0)["metrics"]
        return {name: metrics[name]["value"] for name in CURVES}

    kept = list(clean()) if len(rows) * size[0] * size[1] * channels <= KEPT else None
    undamaged = score([member.probabilities for member in said])
    curves = {corruption: {name: [value] for name, value in undamaged.items()} for corruption in CORRUPTIONS}
    with tqdm(total=len(CORRUPTIONS) * len(SEVERITIES), desc="corruptions", unit="pass", leave=False) as bar:
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                images = corrupted(kept or clean(), rows, name, severity, seed, threads)
                for metric, value in score(predict(images, len(rows), name)).items():
                    curves[name][metric].append(value)
                bar.update()
    return curves


def corrupted(
    batches: Iterable[np.ndarray], rows: np.ndarray, name: str, severity: int, seed: int, threads: int = 2
) -> Iterator[np.ndarray]:
    """Yields batches with a corruption of that severity; the random draw for a frame depends on (seed, name, row).

    A frame has the same draw at all severities, so that a curve shows the effect of severity and not of chance.
    """

    def one(image: np.ndarray, row: int) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), int(row)])
        return corrupt(image, name, severity, rng)

    with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        start = 0
        for batch in batches:
            yield np.stack(list(pool.map(one, batch, rows[start : start + len(batch)])))
            start += len(batch)


def parted(found: np.ndarray, tested: Sequence[Tested]) -> list[np.ndarray]:
    """Splits an array over all members' rows, concatenated, into one array per member."""
    return np.split(found, np.cumsum([len(member.rows) for member in tested])[:-1])


def record(
    table: Table,
    rows: np.ndarray,
    ids: tuple[str, int, float],
    probabilities: np.ndarray,
    copied: Sequence[int] | np.ndarray = (),
) -> ClassPredictions:
    """Predictions for some rows by the member with that fold, seed and fraction; see `identify`."""
    return ClassPredictions(
        **identify(table, rows, *ids, copied),
        classes=table.label_names,
        label=table.label[rows],
        probabilities=probabilities,
    )
