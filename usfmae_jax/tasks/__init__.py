"""What is learnt with labels: one file for each task.

A new one is a file here that has what `Task` names, an entry in `finetuning.tasks.TASKS` and a variant in
`configs/finetune.py`; table, splits, members, loop, resuming and report take it as they take classification.
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
    """What a model learns from labels, and how good it is at it.

    Attributes:
      outputs: names of what the model puts out, in order: classes, or quantities.
      metrics: names of what `score` gives, one of which chooses the best evaluation.
      losses: those of them of which less is better.
      tie: the metric that decides between evaluations that are equally good; "" = the earlier one is kept.
      predictions: the type of what is written of every frame that is tested.
      mask: from a record to the class of each of its pixels, uint8 `[H, W]`, which go through the same augmentation as
        the image and stand in a batch as `mask`; None = the task has no use for them. Several numbers of a pixel are
        several layers, `[H, W, L]`.
      mask_layers: (L,) then, else ().
      fingerprint: changes with what is learnt and is no part of the shards; "" = there is no such thing.
      notes: sentences on what was found, for the person and the report.
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
        """What every part of a split has some of; without classes one stratum for all."""
        return Strata(np.zeros(len(table), int), ("all",))

    def summary(self, table: Table) -> str:
        """What the table holds of each output, a few words; "" = nothing to say."""
        return ""

    def fitted(self, table: Table, rows: np.ndarray) -> "Task":
        """The task of a member, with what is computed from its training rows alone, such as a scale."""
        return self

    def describe(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """The model of this task on a backbone, or on a model of this task, JSON; see `interop.model.build`."""
        return {**backbone, "pool": "mean", "outputs": list(self.outputs)}

    def targets(self, table: Table, rows: np.ndarray) -> Arrays:
        """What goes beside the images of a member's training rows: arrays `[R, ...]` by name."""

    def prepare(self, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Draws what is random in a batch, before it is cut into micro-batches.

        Args:
          batch: `image` float32 `[B, H, W, C]`, normalised, and the targets.
          rng: of this step.

        Returns:
          arrays with a first axis of B, and the random key that is left for `loss`.
        """
        return batch, rng

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum, count) of a batch from `prepare` or of a part of it; the quotient of the parts' sums is the loss."""

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """Normalised images `[B, H, W, C]` to arrays `[B, ...]` by name."""

    def mirror(self, predicted: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What `predict` says of mirrored images, as it is of the images; the same but for maps."""
        return predicted

    def measure(self, table: Table, rows: np.ndarray, predicted: Arrays) -> Arrays:
        """What is kept of predictions `[n, ...]` of some rows, where they are too large to be kept themselves."""
        return predicted

    def outlines(
        self, table: Table, rows: np.ndarray, predicted: Arrays
    ) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
        """Of predictions `[n, ...]` of some rows the masks, if there are any.

        Yields:
          the class of each pixel in the frame's own size, uint8 `[H, W]`; and each instance, see
          `evaluation.instances.Instance`.
        """
        return iter(())

    def score(self, table: Table, rows: np.ndarray, predicted: Arrays) -> dict[str, float]:
        """Metrics of what `measure` kept of some rows, by name, those that are defined there; to choose by."""

    def record(self, ids: Arrays, table: Table, rows: np.ndarray, predicted: Arrays) -> Predictions:
        """What is written of tested rows; `ids` are those of `evaluation.predictions.identify`."""

    def examples(
        self, table: Table, tested: Sequence[tuple[np.ndarray, Predictions]], count: int
    ) -> list[dict[str, Any]]:
        """At most `count` tested frames worth a look, in the order in which they are shown.

        Args:
          table: of the frames.
          tested: of some members, the rows that were tested and what was predicted of them.
          count: how many.

        Returns:
          of each `member` (its place in `tested`) and `row`, and what `finish` wants to show of it.
        """
        return []

    def look(self, predict: Callable[[np.ndarray], Arrays], model: Model) -> Callable[[np.ndarray], np.ndarray] | None:
        """What is shown beside an example, from images uint8 `[n, H, W, C]`: where the model looks, as a rule.

        Args:
          predict: the images to what `predict` says of them.
          model: that is asked.
        """
        return inspect.rollout(model, model.description.get("pool", "mean"))

    def finish(
        self, workdir: str, predictions: Predictions, validation: Predictions | None, **found: Any
    ) -> dict[str, Any]:
        """Scores the predictions of all members with intervals over patients, and writes results and report.

        Args:
          workdir: receives them; see `reporting.run.finish`.
          predictions: of the test parts.
          validation: of the validation parts.
          **found: `about`, what was done: title, protocol, datasets and split; `context`, what the results come from;
            `embedding`, a map of features or None; `examples`, from the method of that name, with `image` uint8
            `[H, W, C]` and `map`, what `look` gives or None; `resamples`, bootstrap replicates.

        Returns:
          what results.json holds.
        """

    def table(self, results: Mapping[str, Any]) -> str:
        """The results for a terminal."""
        names = {name: name for name in results["metrics"]}
        return tables.overview(results, names, next(iter(names)))
