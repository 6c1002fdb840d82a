"""Multi-label classification metrics with confidence intervals over patients.

Each label is a separate binary problem, scored as in `evaluation.classification`; frames for which a label is unknown
are ignored for that label. Overall metrics are unweighted means over the labels that have both positive and negative
frames.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from usfmae_jax.evaluation import classification, intervals
from usfmae_jax.evaluation.predictions import Predictions

#: Display names of all metrics, in the order of tables.
NAMES = {
    "auroc": "AUROC (macro)",
    "average_precision": "Average precision (macro)",
    "f1": "F1 (macro)",
    "sensitivity": "Sensitivity (macro)",
    "specificity": "Specificity (macro)",
    "brier": "Brier score (macro)",
}
#: The metrics for which lower is better.
LOSSES = frozenset({"brier"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelPredictions(Predictions):
    """Predictions of C labels.

    Attributes:
      classes: names of the labels.
      truth: float64 `[N, C]`, 0 or 1; NaN if unknown.
      probabilities: float64 `[N, C]`, in [0, 1].
    """

    classes: tuple[str, ...]
    truth: np.ndarray
    probabilities: np.ndarray

    def __post_init__(self):
        super().__post_init__()
        for name in ("truth", "probabilities"):
            if getattr(self, name).shape != (len(self), len(self.classes)):
                raise ValueError(f"{name} is {getattr(self, name).shape}, not {(len(self), len(self.classes))}")
        if not (np.isnan(self.truth) | (self.truth == 0) | (self.truth == 1)).all():
            raise ValueError("labels must be 0 or 1, or empty")
        if not ((self.probabilities >= 0) & (self.probabilities <= 1 + 1e-6)).all():
            raise ValueError("probabilities must lie in [0, 1]")

    @classmethod
    def rows(cls) -> tuple[str, ...]:
        """See `Predictions`."""
        return tuple(name for name in super().rows() if name != "classes")

    def columns(self) -> dict[str, Sequence[Any]]:
        """`label:NAME`, 0, 1 or nan, and the probability `p:NAME`, for each label."""
        found: dict[str, Sequence[Any]] = {}
        for c, name in enumerate(self.classes):
            found |= {f"label:{name}": self.truth[:, c].tolist(), f"p:{name}": self.probabilities[:, c].tolist()}
        return found

    @classmethod
    def from_columns(cls, ids: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[str]]) -> "LabelPredictions":
        """See `Predictions`."""
        classes = tuple(name.removeprefix("p:") for name in columns if name.startswith("p:"))
        if not classes:
            raise KeyError("a column p:NAME for each label")
        truth, probabilities = (
            np.array([columns[f"{kind}:{one}"] for one in classes], np.float64).T.reshape(-1, len(classes))
            for kind in ("label", "p")
        )
        return cls(**ids, classes=classes, truth=truth, probabilities=probabilities)

    def both(self) -> np.ndarray:
        """Which labels have both positive and negative frames, bool `[C]`."""
        return (self.truth == 0).any(axis=0) & (self.truth == 1).any(axis=0)


def score(predictions: LabelPredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics of one member's predictions for each of R weightings of the frames.

    Args:
      predictions: N rows.
      weights: `[R, N]`.

    Returns:
      float64 `[R]` by the names in `NAMES`, and `class_NAME` `[R, C]`; NaN where undefined.
    """
    each = {name: np.full((len(weights), len(predictions.classes)), np.nan) for name in NAMES}
    for c in range(len(predictions.classes)):
        rows = np.flatnonzero(np.isfinite(predictions.truth[:, c]))
        if not len(rows):
            continue
        chance = predictions.probabilities[rows, c]
        of_label = np.asarray(weights[:, rows], np.float64)
        some = of_label.sum(axis=1) > 0  # a replicate may contain no frame for which the label is known
        truth, two = predictions.truth[rows, c].astype(int), np.stack([1 - chance, chance], axis=1)
        found = classification.metrics(truth, two, 1, of_label[some])
        for name in NAMES:
            each[name][some, c] = found[name]
    told = predictions.both()
    nothing = np.full(len(weights), np.nan)
    means = {name: one[:, told].mean(axis=1) if told.any() else nothing for name, one in each.items()}
    return means | {f"class_{name}": one for name, one in each.items()}


def summarise(predictions: LabelPredictions, resamples: int = 1000) -> dict[str, Any]:
    """The contents of results.json for multi-label predictions, see `evaluation.results`, with `per_class`."""
    found, each = intervals.summarise(predictions, score, [*NAMES], resamples, classes=predictions.classes)
    main = intervals.by_fraction(predictions)[-1]
    per_class = {}
    for c, name in enumerate(main.classes):
        known, there = (main.select(one).counts() for one in (np.isfinite(main.truth[:, c]), main.truth[:, c] == 1))
        counts = {"frames": known["frames"], "with_it": there["frames"], "patients": there["patients"]}
        per_class[name] = counts | each[name]
    return found | {"task": {"classes": list(main.classes)}, "per_class": per_class}
