"""Calibration is measured as defined, and temperature scaling mends what a temperature spoilt."""

import numpy as np
import pytest

from tests.evaluation.made import predictions
from usfmae_jax.evaluation import calibration


def test_the_error_is_the_mean_gap_of_the_bins(rng):
    made = predictions(rng, classes=tuple("abc"), decimals=2)
    weights = rng.integers(0, 4, (3, len(made)))
    found = calibration.expected_calibration_error(made.label, made.probabilities, weights)
    for value, weight in zip(found, weights, strict=True):
        expected, confidence = 0.0, made.probabilities.max(axis=1)
        for i in range(15):
            rows = (confidence > i / 15) & (confidence <= (i + 1) / 15)
            correct = (made.predicted == made.label)[rows]
            expected += abs((weight[rows] * (correct - confidence[rows])).sum()) / weight.sum()
        assert value == pytest.approx(expected)


def test_the_curve_counts_every_frame_and_gives_the_error(rng):
    made = predictions(rng, patients=200)
    curve = calibration.reliability(made.label, made.probabilities)
    assert len(curve) == 15
    assert sum(one["frames"] for one in curve) == len(made)
    assert curve[0]["confidence"] is None  # of two classes the predicted one has half at least
    full = [one for one in curve if one["frames"]]
    assert all(one["low"] <= one["confidence"] <= one["high"] for one in full)
    gap = sum(one["frames"] * abs(one["accuracy"] - one["confidence"]) for one in full) / len(made)
    ones = np.ones((1, len(made)))
    assert gap == pytest.approx(calibration.expected_calibration_error(made.label, made.probabilities, ones)[0])


def test_the_most_certain_frames_are_in_the_last_bin():
    curve = calibration.reliability(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert curve[-1] == {"low": 14 / 15, "high": 1.0, "frames": 2, "confidence": 1.0, "accuracy": 0.5}


def test_a_temperature_is_found_again(rng):
    logits = rng.normal(size=(4000, 3)) * 2
    honest = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (honest.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    sharp = calibration.scale(honest, 1 / 3)  # three times too sure
    temperature = calibration.fit_temperature(labels, sharp)
    assert temperature == pytest.approx(3, rel=0.1)
    mended = calibration.scale(sharp, temperature)
    assert (mended.argmax(axis=1) == sharp.argmax(axis=1)).all()
    ones = np.ones((1, len(labels)))
    before, after = (calibration.expected_calibration_error(labels, p, ones)[0] for p in (sharp, mended))
    assert after < 0.03 < before


def test_certain_and_wrong_is_no_infinite_temperature():
    labels, probabilities = np.array([0, 1, 1]), np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    temperature = calibration.fit_temperature(labels, probabilities)
    assert 1 < temperature <= 20.001
    assert np.isfinite(calibration.scale(probabilities, temperature)).all()
