"""Calibration of probabilities: reliability, calibration error, temperature scaling (Guo et al. 2017)."""

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

BINS = 15  # as in Guo et al.


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Accuracy of the predicted class by confidence (reliability diagram).

    Args:
      labels: int `[N]`.
      probabilities: float `[N, C]`.
      bins: number of bins of equal width over [0, 1]; a confidence on an edge belongs to the lower bin.

    Returns:
      for each bin `low`, `high`, `frames`, and the means `confidence` and `accuracy`, None for an empty bin.
    """
    confidence, correct, number = _top_label(labels, probabilities, bins)
    counts, sure, right = (np.bincount(number, w, minlength=bins) for w in (None, confidence, correct))
    return [
        {
            "low": i / bins,
            "high": (i + 1) / bins,
            "frames": int(counts[i]),
            "confidence": float(sure[i] / counts[i]) if counts[i] else None,
            "accuracy": float(right[i] / counts[i]) if counts[i] else None,
        }
        for i in range(bins)
    ]


def expected_calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, bins: int = BINS
) -> np.ndarray:
    """Expected calibration error: mean gap between confidence and accuracy over the bins of `reliability`, in [0, 1].

    Args:
      labels: int `[N]`.
      probabilities: float `[N, C]`.
      weights: `[R, N]`, non-negative frame weights.
      bins: number of bins.

    Returns:
      float64 `[R]`.
    """
    confidence, correct, number = _top_label(labels, probabilities, bins)
    gap = np.zeros((len(labels), bins))
    gap[np.arange(len(labels)), number] = correct - confidence
    return np.abs(weights @ gap).sum(axis=1) / weights.sum(axis=1)


def _top_label(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, whether the prediction is correct, and the bin, each `[N]`."""
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    return confidence, correct, np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature, between 1/20 and 20, that minimises the log loss on these frames.

    Fit it on validation frames. A value above 1 means that the model was overconfident.

    Args:
      labels: int `[N]`.
      probabilities: float `[N, C]`.
    """
    logits = _logits(probabilities)
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded").x))


def scale(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities `[N, C]` with their logits divided by a temperature; the ranking of classes is unchanged."""
    return softmax(_logits(probabilities) / temperature, axis=1)


def _logits(probabilities: np.ndarray) -> np.ndarray:
    # Logits up to a constant, which does not affect the softmax. A probability of 0 is an underflow of float32.
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
