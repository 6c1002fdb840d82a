"""Supervised tasks, one file each.

To add one, write a file here that implements `Task`, and add an entry to `finetuning.tasks.TASKS` and a variant to
`configs/finetune.py`; table, splits, members, loop, resuming and report then work as for classification.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from usfmae_jax.data.records import Record
from usfmae_jax.data.splits import Strata
from usfmae_jax.data.table import Table
from usfmae_jax.evaluation import tables
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.interop.model import Model
from usfmae_jax.training import inspect

Arrays = dict[str, np.ndarray]


class Task(Protocol):
    """A supervised task: what a model learns from labels, and how it is evaluated.

    Attributes:
      outputs: names of the model's outputs, in order: classes or quantities.
      metrics: names of the metrics that `score` returns, one of which selects the best evaluation.
      losses: the metrics for which lower is better.
      tie: the metric that decides between otherwise equal evaluations; "" = the earlier one is kept.
      predictions: the type that holds the predictions of all tested frames.
      mask: maps a record to the class of each pixel, uint8 `[H, W]`, or `[H, W, L]` if a pixel has several values.
        Masks get the same augmentation as the image and are in the batch as `mask`. None = the task uses no masks.
      mask_layers: (L,) for masks `[H, W, L]`, else ().
      fingerprint: identifies target data that are not part of the shards; "" = there are none.
      notes: sentences about the data, for the terminal and the report.
    """

    outputs: tuple[str, ...]
    losses: frozenset[str]
    tie: str
    predictions: type[Predictions]
    mask: Callable[[Record], np.ndarray] | None = None
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    mask_layers: tuple[int, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """See above."""

    def strata(self, table: Table) -> Strata:
        """The strata by which splits are stratified; a single one for tasks without classes."""
        return Strata(np.zeros(len(table), int), ("all",))

    def summary(self, table: Table) -> str:
        """A few words on what the table holds for each output; "" = nothing to report."""
        return ""

    def fitted(self, table: Table, rows: np.ndarray) -> "Task":
        """The task with whatever is estimated from a member's training rows alone, such as a scale."""
        return self

    def describe(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """This task's model on a backbone or on a model of this task, as JSON for `interop.model.build`."""
        return {**backbone, "pool": "mean", "outputs": list(self.outputs)}

    def targets(self, table: Table, rows: np.ndarray) -> Arrays:
        """The training targets of a member's training rows: arrays `[R, ...]` by name."""

    def prepare(self, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Draws a batch's random numbers before it is split into micro-batches.

        Args:
          batch: `image` float32 `[B, H, W, C]`, normalised, and the targets.
          rng: key for this step.

        Returns:
          arrays with a first axis of B, and the random key for `loss`.
        """
        return batch, rng

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum, count) for (part of) a batch from `prepare`; the loss is the total sum over the total count."""

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """Normalised images `[B, H, W, C]` to arrays `[B, ...]` by name."""

    def mirror(self, predicted: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Maps predictions for mirrored images back to the original images; the identity except for pixel maps."""
        return predicted

    def together(self, predicted: Sequence[Arrays], models: Sequence[Mapping[str, Any]]) -> Arrays:
        """The joint prediction of trained models, for `measure`: the mean.

        Args:
          predicted: the result of `predict` of each model, for the same images.
          models: their descriptions, see `interop.model.Model`.
        """
        if len(predicted) == 1:
            return predicted[0]
        sums = {name: value.astype(np.float32) for name, value in predicted[0].items()}
        for one in predicted[1:]:
            for name, value in one.items():
                sums[name] += value
        return {name: value / np.float32(len(predicted)) for name, value in sums.items()}

    def measure(self, table: Table, rows: np.ndarray, predicted: Arrays) -> Arrays:
        """Reduces predictions `[n, ...]` of some rows to what is kept, where they are too large to keep."""
        return predicted

    def outlines(
        self, table: Table, rows: np.ndarray, predicted: Arrays
    ) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
        """The predicted masks for predictions `[n, ...]` of some rows, if the task has any.

        Yields:
          for each row, the class of each pixel at the frame's own size, uint8 `[H, W]`, and its instances, see
          `evaluation.instances.Instance`.
        """
        return iter(())

    def score(self, table: Table, rows: np.ndarray, predicted: Arrays) -> dict[str, float]:
        """Metrics by name, those that are defined, from what `measure` kept for some rows; used to select the best."""

    def record(self, ids: Arrays, table: Table, rows: np.ndarray, predicted: Arrays) -> Predictions:
        """The predictions of tested rows as they are written; `ids` come from `evaluation.predictions.identify`."""

    def examples(
        self, table: Table, tested: Sequence[tuple[np.ndarray, Predictions]], count: int
    ) -> list[dict[str, Any]]:
        """At most `count` tested frames worth showing, in display order.

        Args:
          table: of the frames.
          tested: for each member, the tested rows and their predictions.
          count: maximum number of examples.

        Returns:
          for each example its `member` (index into `tested`), its `row`, and whatever `finish` needs to show it.
        """
        return []

    def look(self, predict: Callable[[np.ndarray], Arrays], model: Model) -> Callable[[np.ndarray], np.ndarray] | None:
        """A function from images uint8 `[n, H, W, C]` to the maps shown beside examples, usually where the model looks.

        Args:
          predict: maps such images to their predictions.
          model: the model to be explained.
        """
        return inspect.rollout(model, model.description.get("pool", "mean"))

    def finish(
        self, workdir: str, predictions: Predictions, validation: Predictions | None, **found: Any
    ) -> dict[str, Any]:
        """Scores the predictions of all members, with intervals over patients, and writes results and report.

        Args:
          workdir: output folder; see `reporting.run.finish`.
          predictions: on the test parts.
          validation: on the validation parts.
          **found: `about`, a summary of the run: title, protocol, datasets and split; `context`, their provenance;
            `embedding`, a map of features or None; `examples`, from the method of that name, with `image` uint8
            `[H, W, C]` and `map`, from `look` or None; `resamples`, the number of bootstrap replicates.

        Returns:
          the contents of results.json.
        """

    def table(self, results: Mapping[str, Any]) -> str:
        """The results as text for a terminal."""
        names = {name: name for name in results["metrics"]}
        return tables.overview(results, names, next(iter(names)))
