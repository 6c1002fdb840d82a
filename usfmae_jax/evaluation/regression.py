"""Regression metrics with confidence intervals over patients.

With the error e = predicted - true, in the unit of the quantity; all patients have equal weight, which a patient's
frames share:

    mae          mean of |e|
    rmse         root of the mean of e squared
    r2           1 - sum of e squared / sum of squared deviations of the truth from its mean: 0 is as good as always
                 predicting the mean, negative is worse
    pearson      correlation of predicted and true
    bias         mean of e
    limits_low, limits_high
                 bias - and + 1.96 standard deviations of e, between which 95% of the errors are expected (Bland &
                 Altman 1986); of the sample, with one degree of freedom fewer than patients
"""

import dataclasses
from typing import Any

import numpy as np

from usfmae_jax.evaluation import intervals
from usfmae_jax.evaluation.predictions import Predictions

#: Display names of all metrics, in the order of tables.
NAMES = {
    "mae": "Mean absolute error",
    "rmse": "Root mean squared error",
    "r2": "R²",
    "pearson": "Pearson correlation",
    "bias": "Bias",
    "limits_low": "Lower limit of agreement",
    "limits_high": "Upper limit of agreement",
}
#: The metrics that can select the best evaluation; lower is better for both.
LOSSES = frozenset({"mae", "rmse"})
#: The metrics without a unit.
BARE = frozenset({"r2", "pearson"})
_LIMITS = 1.96  # deviations


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantityPredictions(Predictions):
    """Predictions of a quantity, in its unit.

    Attributes:
      truth: float `[N]`, as measured.
      value: float `[N]`, as predicted.
    """

    truth: np.ndarray
    value: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """Predicted minus true, float `[N]`."""
        return self.value - self.truth


def titles(unit: str) -> dict[str, str]:
    """Display names of the metrics, with the unit."""
    return {name: title if name in BARE or not unit else f"{title} ({unit})" for name, title in NAMES.items()}


def score(predictions: QuantityPredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics for each of R weightings of the frames.

    Args:
      predictions: N rows of one member.
      weights: `[R, N]`, equal for all frames of a patient.

    Returns:
      float64 `[R]` by the names in `NAMES`; NaN where undefined.
    """
    _, member, frames = np.unique(predictions.patient_key, return_inverse=True, return_counts=True)
    share = weights / frames[member]
    total = share.sum(axis=1)
    truth, value, error = predictions.truth, predictions.value, predictions.error
    # Centred and divided by the range, so that rounding errors are small whatever the unit.
    scale = max(np.ptp(truth), np.abs(error).max()) or 1.0
    # Predictions are divided by their own range: they may hardly vary and still be correlated with the truth.
    own = np.ptp(value) if np.ptp(value) > 1e-12 * np.abs(value).max(initial=0) else np.inf
    truth, value, error = (truth - truth.mean()) / scale, (value - value.mean()) / own, error / scale
    moments = {
        name: _over(share @ one, total)
        for name, one in {
            "abs": np.abs(error), "e": error, "ee": error**2, "t": truth, "tt": truth**2, "v": value, "vv": value**2,
            "tv": truth * value,
        }.items()
    }  # fmt: skip
    spread = {name: np.maximum(moments[name] - moments[name[0]] * moments[name[1]], 0) for name in ("ee", "tt", "vv")}
    bias = scale * moments["e"]
    deviation = scale * np.sqrt(_over(spread["ee"] * total, total - 1))
    return {
        "mae": scale * moments["abs"],
        "rmse": scale * np.sqrt(moments["ee"]),
        "r2": 1 - _over(moments["ee"], spread["tt"]),
        "pearson": np.clip(
            _over(moments["tv"] - moments["t"] * moments["v"], np.sqrt(spread["tt"] * spread["vv"])), -1, 1
        ),
        "bias": bias,
        "limits_low": bias - _LIMITS * deviation,
        "limits_high": bias + _LIMITS * deviation,
    }


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A quotient; NaN if the denominator is 0 up to rounding."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 1e-12)


def summarise(predictions: QuantityPredictions, name: str, unit: str, resamples: int = 1000) -> dict[str, Any]:
    """The contents of results.json for a predicted quantity, see `evaluation.results`.

    Args:
      predictions: on the test parts of all members; at least one row.
      name: of the quantity.
      unit: of the quantity; "" = none.
      resamples: number of bootstrap replicates; 0 = no intervals.
    """
    found, _ = intervals.summarise(predictions, score, [*NAMES], resamples, floor=-np.inf)
    return found | {"task": {"quantity": name, "unit": unit}}
