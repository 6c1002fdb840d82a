"""ROC and precision-recall curves with bands: what a threshold would give, and how sure that is."""

import dataclasses
from collections.abc import Callable

import numpy as np

from usfmae_jax.evaluation.classification import bootstrap_chunks

_GRID = np.linspace(0, 1, 251)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve over a fixed grid.

    Attributes:
      x: float `[G]`, rising from 0 to 1.
      y: float `[G]`; NaN where the curve is not defined.
      low: lower edge of the pointwise 95% band, float `[G]`; empty without one.
      high: upper edge of it.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def roc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray, x: np.ndarray = _GRID) -> np.ndarray:
    """Sensitivity at given false-positive rates.

    Args:
      truth: bool `[N]`, whether a frame is of the class.
      scores: float `[N]`, its probability for the class.
      weights: `[R, N]`, how often each replicate holds a frame.
      x: false-positive rates `[G]`.

    Returns:
      float `[R, G]`: between thresholds on a straight line, as the area under the curve is defined; NaN for
      replicates of one class only.
    """
    hits, alarms = _counts(truth, scores, weights)
    y = np.full((len(weights), len(x)), np.nan)
    for i in np.flatnonzero((hits[:, -1] > 0) & (alarms[:, -1] > 0)):
        y[i] = np.interp(x, alarms[i] / alarms[i, -1], hits[i] / hits[i, -1])
    return y


def precision_recall(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray, x: np.ndarray = _GRID) -> np.ndarray:
    """Precision at given recalls, as `roc`: that of the highest threshold that reaches the recall.

    Nothing is interpolated, as a straight line between two thresholds would be too good (Davis & Goadrich 2006).
    """
    hits, alarms = _counts(truth, scores, weights)
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
    """A curve, the mean over seeds (Fawcett 2006, vertical averaging), with a band over resampled patients.

    Args:
      curve: `roc` or `precision_recall`.
      truth: bool `[N]`.
      scores: float `[N]`.
      patients: str `[N]`.
      seeds: int `[N]`, of the member that gave the score.
      resamples: bootstrap replicates; 0 = no band.
      seed: of the replicates.
    """
    groups = [np.flatnonzero(seeds == one) for one in np.unique(seeds)]

    def mean(weights: np.ndarray) -> np.ndarray:
        return np.mean([curve(truth[rows], scores[rows], weights[:, rows]) for rows in groups], axis=0)

    y = mean(np.ones((1, len(truth))))[0]
    if not resamples or len(np.unique(patients)) < 2:
        return Curve(_GRID, y, np.zeros(0), np.zeros(0))
    drawn = np.concatenate([mean(weights) for weights in bootstrap_chunks(patients, resamples, seed)])
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    if len(drawn) < 20:  # nearly every replicate lacks a class: there is no band to speak of
        return Curve(_GRID, y, np.zeros(0), np.zeros(0))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return Curve(_GRID, y, low, high)


def _counts(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the class, and how many others, lie at or above each distinct score: `[R, T + 1]`, from none up."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # equal scores pass together
    chosen, is_class = weights[:, order].astype(np.float64), truth[order]
    start = np.zeros((len(weights), 1))
    hits = np.concatenate([start, np.cumsum(chosen * is_class, axis=1)[:, last]], axis=1)
    alarms = np.concatenate([start, np.cumsum(chosen * ~is_class, axis=1)[:, last]], axis=1)
    return hits, alarms
