"""Whether probabilities mean what they say: reliability, calibration error, temperature scaling (Guo et al. 2017)."""

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

BINS = 15  # as Guo et al.


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """How often the predicted class is right, by how sure the model is.

    Args:
      labels: int `[N]`.
      probabilities: float `[N, C]`.
      bins: of equal width over [0, 1]; a confidence on an edge belongs to the bin below.

    Returns:
      for each bin `low`, `high`, `frames`, and the means `confidence` and `accuracy`, None in an empty bin.
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
    """Mean distance between confidence and accuracy over the bins of `reliability`, in [0, 1].

    Args:
      labels: int `[N]`.
      probabilities: float `[N, C]`.
      weights: `[R, N]` of the frames, not negative.
      bins: of equal width.

    Returns:
      float64 `[R]`.
    """
    confidence, correct, number = _top_label(labels, probabilities, bins)
    gap = np.zeros((len(labels), bins))
    gap[np.arange(len(labels)), number] = correct - confidence
    return np.abs(weights @ gap).sum(axis=1) / weights.sum(axis=1)


def _top_label(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, whether it is right and the bin, each `[N]`."""
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    return confidence, correct, np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature at which the log loss of these frames is least, between 1/20 and 20.

    Fit it on validation frames. Above 1 the model was too sure.

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
    """Probabilities `[N, C]` with their logits divided by a temperature; the order of the classes stays."""
    return softmax(_logits(probabilities) / temperature, axis=1)


def _logits(probabilities: np.ndarray) -> np.ndarray:
    # Logits are known but for a constant, which the softmax does not see. A probability of 0 is one that float32 lost.
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
