"""What an evaluation found, and the same models on images made worse."""

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

#: Metrics whose curve over severities is kept.
CURVES = ("auroc", "balanced_accuracy", "f1_macro", "ece")
#: Decoded images are kept for all corruptions up to this many bytes.
KEPT = 2**30

#: (batches, number of images, name for the bar) to the probabilities of each foremost member's rows, in order.
Predict = Callable[[Iterator[np.ndarray], int, str], list[np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tested:
    """One member that was tested.

    Attributes:
      fold, seed, fraction: which one; see `evaluation.predictions`.
      rows: int `[N]` of the table, that it was tested on.
      predictions: of these rows.
      validation: of the rows that its settings were chosen by; None if there are none.
      settings: what was chosen; JSON.
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
    """All that an evaluation found.

    Attributes:
      tested: one entry for each member.
      split: where the folds come from, a few words.
      mapped: rows int `[M]` and features `[M, D]` for the map, and what these are, a few words.
      looks: what is shown beside an example, of the foremost members, by their number; None where there is nothing.
      image_format: (height, width) and channels of the models' input.
      predict: asks the foremost members again, about other images of their rows; None where that is not done.
      excluded: near-duplicates taken out of training parts; None where that is not known.
      warnings: sentences.
      features: `sha256` of frozen ones, and whether they were `computed` now or before; empty where there are none.
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
    """Metrics on test images under every corruption at every severity; nothing is fitted on corrupted images.

    Args:
      table: of the frames.
      tested: the foremost members; the images of their rows are corrupted as the model gets them.
      outcome: of the evaluation.
      positive: name of the positive class.
      seed: of the corruptions.
      batch_size: images at a time.
      threads: that decode and corrupt.

    Returns:
      for each corruption, for each of `CURVES`, its values at severity 0 (clean), 1, ..., 5.
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
    """Batches with a corruption of that severity; what is drawn for a frame follows from (seed, corruption, row).

    Frames keep their draw over severities, so that a curve shows the severity and not the luck.
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
    """What was found of the members' rows, one after the other, cut into that of each."""
    return np.split(found, np.cumsum([len(member.rows) for member in tested])[:-1])


def record(
    table: Table,
    rows: np.ndarray,
    ids: tuple[str, int, float],
    probabilities: np.ndarray,
    copied: Sequence[int] | np.ndarray = (),
) -> ClassPredictions:
    """Predictions of some rows by the member of that fold, seed and fraction; see `identify`."""
    return ClassPredictions(
        **identify(table, rows, *ids, copied),
        classes=table.label_names,
        label=table.label[rows],
        probabilities=probabilities,
    )
