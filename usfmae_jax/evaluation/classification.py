"""Classification metrics with confidence intervals over patients; metrics are functions of frame weights.

The predicted class is the most probable one. Metrics agree with scikit-learn's, but are NaN if a class that they need
has no frames. The precision (and predictive value) of a class that was never predicted is also NaN; in means over
classes it counts as 0 (`zero_division=0`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import intervals
from usfmae_jax.evaluation.calibration import expected_calibration_error
from usfmae_jax.evaluation.intervals import Score
from usfmae_jax.evaluation.predictions import ClassPredictions

#: Display names of all metrics, in the order of tables.
NAMES = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "Positive predictive value",
    "npv": "Negative predictive value",
    "f1": "F1",
    "f1_macro": "F1 (macro)",
    "f1_weighted": "F1 (weighted)",
    "precision_macro": "Precision (macro)",
    "precision_weighted": "Precision (weighted)",
    "recall_macro": "Recall (macro)",
    "recall_weighted": "Recall (weighted)",
    "specificity_macro": "Specificity (macro)",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
    "log_loss": "Log loss",
}
#: The metrics for which lower is better.
LOSSES = frozenset({"ece", "brier", "log_loss"})
#: The metrics shown by fold, label fraction and seed.
MAIN = ("auroc", "average_precision", "balanced_accuracy", "sensitivity", "specificity", "f1", "f1_macro", "ece")
PER_CLASS = ("precision", "recall", "f1", "specificity", "auroc", "average_precision")

_GRID = np.linspace(0, 1, 251)  # of curves


def positive_class(classes: Sequence[str], positive: str = "") -> int | None:
    """Index of the positive class of a binary task, the last one unless named; None if there are more classes.

    Raises:
      InputError: `positive` is not one of the classes.
    """
    names = [name.casefold() for name in classes]
    if positive and positive.casefold() not in names:
        raise InputError(f"positive={positive!r} is no class; choose one of {', '.join(classes)}")
    if len(classes) != 2:
        return None
    return names.index(positive.casefold()) if positive else 1


def defined(two_classes: bool) -> list[str]:
    """The metrics in `NAMES` that exist for two classes, or for more."""
    absent = {"specificity_macro"} if two_classes else {"sensitivity", "specificity", "ppv", "npv", "f1"}
    return [name for name in NAMES if name not in absent]


def metrics(
    labels: np.ndarray, probabilities: np.ndarray, positive: int | None, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """All metrics for each of R weightings of the frames.

    Args:
      labels: int `[N]`, in [0, C).
      probabilities: float `[N, C]`.
      positive: index of the positive class of two, else None.
      weights: `[R, N]`, non-negative, with a positive sum; None = a single weighting of ones.

    Returns:
      float64 `[R]` by name (those of `NAMES` defined for the number of classes), and `class_NAME` `[R, C]` for each of
      `PER_CLASS`. Brier scores are in [0, 1] for two classes, in [0, 2] for more. NaN where undefined.
    """
    weights = np.ones((1, len(labels))) if weights is None else np.asarray(weights, np.float64)
    counts = confusion(labels, probabilities, weights)
    each = _by_class(counts) | _rankings(labels, probabilities, weights)
    total = weights.sum(axis=1)
    share = counts.sum(axis=2) / total[:, None]
    found = {
        "accuracy": np.trace(counts, axis1=1, axis2=2) / total,
        "balanced_accuracy": each["recall"].mean(axis=1),
        "ece": expected_calibration_error(labels, probabilities, weights),
    }
    for name in ("precision", "recall", "f1"):
        counted = np.where((counts.sum(axis=1) == 0) & (share > 0), 0.0, each[name])
        found[f"{name}_macro"] = counted.mean(axis=1)
        found[f"{name}_weighted"] = np.where(share > 0, share * counted, 0.0).sum(axis=1)
    of_label = probabilities[np.arange(len(labels)), labels]
    smallest = np.finfo(np.float64).eps
    found["log_loss"] = -(weights @ np.log(np.clip(of_label, smallest, 1 - smallest))) / total
    if positive is None:
        squares = np.square(probabilities).sum(axis=1) - 2 * of_label + 1
        found |= {name: each[name].mean(axis=1) for name in ("auroc", "average_precision")}
        found["specificity_macro"] = each["specificity"].mean(axis=1)
    else:
        squares = np.square((labels == positive) - probabilities[:, positive])
        names = {"sensitivity": "recall", "ppv": "precision"}
        for name in ("sensitivity", "specificity", "ppv", "f1", "auroc", "average_precision"):
            found[name] = each[names.get(name, name)][:, positive]
        found["npv"] = each["precision"][:, 1 - positive]
    found["brier"] = weights @ squares / total
    ordered = {name: found[name] for name in NAMES if name in found}
    return ordered | {f"class_{name}": each[name] for name in PER_CLASS}


def confusion(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Confusion matrices of frame weights, rows labels, columns predictions: float64 `[R, C, C]`; see `metrics`."""
    weights = np.ones((1, len(labels))) if weights is None else weights
    classes = probabilities.shape[1]
    cell = labels * classes + probabilities.argmax(axis=1)
    one_hot = sparse.csr_array((np.ones(len(cell)), cell, np.arange(len(cell) + 1)), (len(cell), classes**2))
    return np.asarray(weights @ one_hot, np.float64).reshape(-1, classes, classes)


def _by_class(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each class, `[R, C]`, from the confusion matrices `[R, C, C]`; NaN for 0 / 0."""
    right = np.diagonal(counts, axis1=1, axis2=2)
    actual, called = counts.sum(axis=2), counts.sum(axis=1)
    others = actual.sum(axis=1, keepdims=True) - actual
    there = np.where(actual > 0, 1.0, np.nan)
    return {
        "precision": np.where(called > 0, there * right / np.maximum(called, 1e-300), np.nan),
        "recall": there * right / np.maximum(actual, 1e-300),
        "f1": there * 2 * right / np.maximum(actual + called, 1e-300),
        "specificity": np.where(others > 0, (others - (called - right)) / np.maximum(others, 1e-300), np.nan),
    }


def _rankings(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC and average precision of each class against the rest: `[R, C]`."""
    classes = probabilities.shape[1]
    found = {name: np.full((len(weights), classes), np.nan) for name in ("auroc", "average_precision")}
    for c in range(classes):
        hits, alarms = _passed(labels == c, probabilities[:, c], weights)
        positives, negatives = hits[:, -1], alarms[:, -1]
        gained = np.diff(hits, axis=1, prepend=0)
        passed = hits + alarms
        precision = np.divide(hits, passed, out=np.zeros_like(hits), where=passed > 0)
        fine = (positives > 0) & (negatives > 0)
        # A hit outranks the negatives below it and half of those with the same score.
        outranked = negatives[:, None] - alarms + np.diff(alarms, axis=1, prepend=0) / 2
        area = (gained * outranked).sum(axis=1)
        found["auroc"][fine, c] = area[fine] / (positives * negatives)[fine]
        any_hit = positives > 0
        found["average_precision"][any_hit, c] = (gained * precision).sum(axis=1)[any_hit] / positives[any_hit]
    return found


def _passed(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives at each of T distinct thresholds, from the highest: weights `[R, T]` each."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores pass the threshold together
    hits = np.asarray(weights[:, order], np.float64)
    alarms = hits * ~truth[order]
    hits -= alarms
    hits, alarms = (np.cumsum(one, axis=1, out=one)[:, last] for one in (hits, alarms))
    return hits, alarms


def scored(positive: int | None) -> Score[ClassPredictions]:
    """`metrics` as a `Score`, a function of predictions and weights."""
    return lambda predictions, weights: metrics(predictions.label, predictions.probabilities, positive, weights)


def summarise(
    predictions: ClassPredictions, positive: str = "", resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All metrics with 95% percentile intervals over patients.

    Args:
      predictions: for one label fraction, at least one row.
      positive: name of the positive class of two; "" = the last.
      resamples: number of bootstrap replicates; 0 = no intervals.
      seed: of the bootstrap.

    Returns:
      `metrics`, by name `{"value", "ci95"}`, None where undefined, such as an interval over one patient; with
      `"left_out"`, the number of replicates in which the metric was undefined, if any; and `per_class`, by class and
      name. The interval of `ece` is centred on its value, since resampling biases it upwards.

    Raises:
      InputError: `positive` is not one of the classes.
    """
    score = scored(positive_class(predictions.classes, positive))
    value, drawn = intervals.draw(predictions, score, resamples, seed)
    found: dict[str, Any] = {
        "metrics": {
            name: intervals.metric(value[name], drawn.get(name), name == "ece") for name in NAMES if name in value
        },
        "per_class": {},
    }
    for c, label in enumerate(predictions.classes):
        keys = {name: f"class_{name}" for name in PER_CLASS}
        found["per_class"][label] = {
            name: intervals.metric(value[key][c], drawn[key][:, c] if drawn else None) for name, key in keys.items()
        }
    return found


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve over a fixed grid.

    Attributes:
      x: float `[G]`, rising from 0 to 1.
      y: float `[G]`; NaN where the curve is undefined.
      low: lower edge of the pointwise 95% band, float `[G]`; empty without a band.
      high: upper edge of the band.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def roc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray, x: np.ndarray = _GRID) -> np.ndarray:
    """Sensitivity at given false-positive rates.

    Args:
      truth: bool `[N]`, whether a frame belongs to the class.
      scores: float `[N]`, predicted probability of the class.
      weights: `[R, N]`, how often each replicate contains a frame.
      x: false-positive rates `[G]`.

    Returns:
      float `[R, G]`, interpolated linearly between thresholds, consistent with the AUROC; NaN for replicates with only
      one class.
    """
    hits, alarms = (np.pad(one, ((0, 0), (1, 0))) for one in _passed(truth, scores, weights))  # from (0, 0)
    y = np.full((len(weights), len(x)), np.nan)
    for i in np.flatnonzero((hits[:, -1] > 0) & (alarms[:, -1] > 0)):
        y[i] = np.interp(x, alarms[i] / alarms[i, -1], hits[i] / hits[i, -1])
    return y


def precision_recall(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray, x: np.ndarray = _GRID) -> np.ndarray:
    """Precision at given recalls, at the highest threshold that reaches the recall; arguments and result as for `roc`.

    Not interpolated, since a straight line between two thresholds would be too optimistic (Davis & Goadrich 2006).
    """
    hits, alarms = (np.pad(one, ((0, 0), (1, 0))) for one in _passed(truth, scores, weights))  # from (0, 0)
    y = np.full((len(weights), len(x)), np.nan)
    for i in np.flatnonzero(hits[:, -1] > 0):
        first = np.searchsorted(hits[i], np.maximum(x * hits[i, -1] - 1e-9, 1e-9))
        y[i] = hits[i, first] / (hits[i, first] + alarms[i, first])
    return y


def with_band(
    curve: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    truth: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    seeds: np.ndarray,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Curve:
    """A curve averaged over seeds (vertical averaging, Fawcett 2006), with a confidence band over resampled patients.

    Args:
      curve: `roc` or `precision_recall`.
      truth: bool `[N]`.
      scores: float `[N]`.
      patients: str `[N]`.
      seeds: int `[N]`, of the member that predicted the score.
      resamples: number of bootstrap replicates; 0 = no band.
      seed: of the bootstrap.
    """
    groups = [np.flatnonzero(seeds == one) for one in np.unique(seeds)]

    def mean(weights: np.ndarray) -> np.ndarray:
        return np.mean([curve(truth[rows], scores[rows], weights[:, rows]) for rows in groups], axis=0)

    y = mean(np.ones((1, len(truth))))[0]
    if not resamples or len(np.unique(patients)) < 2:
        return Curve(_GRID, y, np.zeros(0), np.zeros(0))
    drawn = np.concatenate([mean(weights) for weights in intervals.bootstrap_chunks(patients, resamples, seed)])
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    if len(drawn) < 20:  # nearly every replicate lacks a class: too few for a band
        return Curve(_GRID, y, np.zeros(0), np.zeros(0))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return Curve(_GRID, y, low, high)
