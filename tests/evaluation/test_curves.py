"""Curves agree with scikit-learn's, ties and weights included."""

import numpy as np
import pytest
from sklearn import metrics

from usfmae_jax.evaluation import classification


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.3
    return truth, np.round(rng.normal(size=300) + truth, 1), rng.integers(0, 4, (5, 300))  # rounded: many ties


def test_roc_is_scikit_learns_under_weights(scored):
    truth, scores, weights = scored
    x = np.linspace(0, 1, 101)
    found = classification.roc(truth, scores, weights, x)
    for row, weight in zip(found, weights, strict=True):
        rates, hits, _ = metrics.roc_curve(truth, scores, sample_weight=weight, drop_intermediate=False)
        np.testing.assert_allclose(row, np.interp(x, rates, hits), atol=1e-12)


def test_the_area_under_the_curve_is_the_auroc(scored):
    truth, scores, weights = scored
    x = np.linspace(0, 1, 20001)
    area = np.trapezoid(classification.roc(truth, scores, weights, x), x, axis=1)
    expected = [metrics.roc_auc_score(truth, scores, sample_weight=weight) for weight in weights]
    np.testing.assert_allclose(area, expected, atol=1e-4)


def test_precision_and_recall_are_scikit_learns_under_weights(scored):
    truth, scores, weights = scored
    for weight in weights:
        precision, recall, _ = metrics.precision_recall_curve(truth, scores, sample_weight=weight)
        # Of equal recalls the first threshold that reaches it; scikit-learn lists thresholds rising.
        keep = np.unique(recall, return_index=True)[0]
        keep = keep[keep > 0]
        expected = [precision[np.flatnonzero(recall == one).max()] for one in keep]
        np.testing.assert_allclose(classification.precision_recall(truth, scores, weight[None], keep)[0], expected)


def test_a_curve_is_not_defined_for_one_class():
    ones = np.ones((1, 4), int)
    assert np.isnan(classification.roc(np.ones(4, bool), np.arange(4.0), ones)).all()
    assert np.isnan(classification.precision_recall(np.zeros(4, bool), np.arange(4.0), ones)).all()


def test_a_band_holds_the_curve_and_several_seeds_are_averaged(scored):
    truth, scores, _ = scored
    patients = np.array([f"p{i // 3}" for i in range(300)])
    one = classification.with_band(classification.roc, truth, scores, patients, np.zeros(300, int), resamples=100)
    assert (one.low <= one.y + 0.02).all()
    assert (one.high >= one.y - 0.02).all()
    assert (one.high - one.low).max() > 0.02
    noise = scores + np.random.default_rng(1).normal(size=300)
    both = [np.concatenate(pair) for pair in ((truth, truth), (scores, noise), (patients, patients))]
    seeds = np.repeat([0, 1], 300)
    mean = classification.with_band(classification.roc, *both, seeds, resamples=0)
    other = classification.with_band(classification.roc, truth, noise, patients, seeds[:300], resamples=0)
    np.testing.assert_allclose(mean.y, (one.y + other.y) / 2)
    assert not len(mean.low)


def test_one_patient_gives_no_band(scored):
    truth, scores, _ = scored
    alone = classification.with_band(classification.roc, truth, scores, np.full(300, "p"), np.zeros(300, int))
    assert not len(alone.low)
