"""Multi-label classification: a frame may have any number of the labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from usfmae_jax.data.splits import Strata
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import multilabel as scoring
from usfmae_jax.evaluation import tables
from usfmae_jax.evaluation.multilabel import LOSSES, NAMES, LabelPredictions
from usfmae_jax.evaluation.predictions import Predictions, identify
from usfmae_jax.reporting import multilabel as reporting
from usfmae_jax.tasks import Arrays, Task

_LEAST = 10  # minimum number of patients per stratum


@dataclasses.dataclass(frozen=True, eq=False)
class MultiLabel(Task):
    """How labels are learnt, each as a binary problem; unknown labels are ignored.

    Attributes:
      outputs: names of the C labels.
      values: float64 `[N, C]`, for the rows of the table: 0, 1, or NaN for unknown.
      pool: pooling of a vision transformer's tokens, "mean" or "cls".
      fingerprint: of the tables that `values` come from.
      notes: see `Task`.
    """

    outputs: tuple[str, ...]
    values: np.ndarray
    pool: str = "mean"
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    metrics = tuple(NAMES)
    losses = LOSSES
    tie = "brier"
    predictions = LabelPredictions

    def strata(self, table: Table) -> Strata:
        """The rarest label of each frame, if at least ten patients have it; other frames form one stratum."""
        there = self.values == 1
        order = np.argsort(there.sum(axis=0), kind="stable")
        code, names = np.zeros(len(table), int), ["none of them"]
        taken = np.zeros(len(table), bool)
        for c in order.tolist():
            own = there[:, c] & ~taken
            if min(len(np.unique(table.patient_key[rows])) for rows in (own, ~(own | taken))) >= _LEAST:
                code[own] = len(names)
                names.append(self.outputs[c])
                taken |= own
        return Strata(code, tuple(names)) if len(names) > 1 else super().strata(table)

    def summary(self, table: Table) -> str:
        """The number of frames with each label."""
        counts = (self.values == 1).sum(axis=0)
        return ", ".join(f"{count} with {name}" for name, count in zip(self.outputs, counts, strict=True))

    def describe(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """A linear head whose outputs are log-odds."""
        pool = {"pool": self.pool} if backbone["model"] == "vit" else {}
        return {**backbone, **pool, "task": "multilabel", "outputs": list(self.outputs)}

    def targets(self, table: Table, rows: np.ndarray) -> Arrays:
        """`label` and `known` float32 `[R, C]`, 0 or 1."""
        values = self.values[rows]
        return {"label": np.nan_to_num(values).astype(np.float32), "known": np.isfinite(values).astype(np.float32)}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The binary cross-entropies, summed over known labels, and the number of known labels."""
        logits = model(batch["image"], rng=rng, train=True).astype(jnp.float32)
        each = optax.sigmoid_binary_cross_entropy(logits, batch["label"])
        return (each * batch["known"]).sum(), batch["known"].sum()

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """See `probabilities`."""
        return probabilities(model, images)

    def score(self, table: Table, rows: np.ndarray, predicted: Arrays) -> dict[str, float]:
        """See `evaluation.multilabel.score`.

        Raises:
          InputError: no label has both positive and negative frames among these rows.
        """
        made = self.record(identify(table, rows, "", 0, 1.0), table, rows, predicted)
        if not made.both().any():
            raise InputError(
                "no label has frames with and without it in the validation part of a fold: take fewer folds, or leave "
                "rare labels out with config.target"
            )
        found = scoring.score(made, np.ones((1, len(rows))))
        return {name: float(found[name][0]) for name in NAMES}

    def record(self, ids: Arrays, table: Table, rows: np.ndarray, predicted: Arrays) -> LabelPredictions:
        """Labels and probabilities."""
        probabilities = predicted["probabilities"].astype(np.float64)
        return LabelPredictions(**ids, classes=self.outputs, truth=self.values[rows], probabilities=probabilities)

    def examples(
        self, table: Table, tested: Sequence[tuple[np.ndarray, Predictions]], count: int
    ) -> list[dict[str, Any]]:
        """The errors, most confident first."""
        found: list[dict[str, Any]] = []
        for member, (rows, predictions) in enumerate(tested):
            assert isinstance(predictions, LabelPredictions)
            said, truth = predictions.probabilities, predictions.truth
            for place, c in np.argwhere(np.isfinite(truth) & ((said > 0.5) != (truth == 1))).tolist():
                words = ("no " + self.outputs[c], self.outputs[c])
                there = bool(truth[place, c])
                found.append(
                    {
                        "member": member,
                        "row": int(rows[place]),
                        "label": words[there],
                        "predicted": words[not there],
                        "probability": float(1 - said[place, c] if there else said[place, c]),
                    }
                )
        return sorted(found, key=lambda one: (-one["probability"], one["row"]))[:count]

    def finish(self, workdir: str, predictions: Predictions, validation: Predictions | None, **found: Any) -> Any:
        """See `reporting.multilabel.finish`."""
        assert isinstance(predictions, LabelPredictions)
        return reporting.finish(workdir, predictions, **found)

    def table(self, results: Mapping[str, Any]) -> str:
        """The results as text for a terminal."""
        return tables.overview(results, NAMES, "auroc")


def probabilities(model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
    """`probabilities` of each label, float32 `[B, C]`."""
    return {"probabilities": jax.nn.sigmoid(model(images).astype(jnp.float32))}
