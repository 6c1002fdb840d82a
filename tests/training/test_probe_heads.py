"""Linear and attentive probes learn what is linear, and what only some patches show; equal seeds give equal heads."""

import numpy as np
import pytest

from usfmae_jax.training import probe_heads
from usfmae_jax.training.probes import auroc


def linear_data(count, seed, classes=2):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.normal(size=(count, 16)).astype(np.float32)
    features[np.arange(count), labels] += 2
    return 100 + 5 * features, labels  # badly scaled: BatchNorm has to see to it


@pytest.mark.parametrize(("optimizer", "classes"), [("lars", 2), ("adamw", 3)])
def test_the_linear_probe_learns_what_is_linear(optimizer, classes):
    train, validation, test = (linear_data(count, seed, classes) for seed, count in enumerate((240, 90, 300)))
    fit = lambda: probe_heads.linear(train, validation, classes, optimizer=optimizer, epochs=30, batch_size=64)  # noqa: E731
    probe = fit()
    probabilities = probe.predict(test[0])
    assert auroc(test[1], probabilities) > 0.9
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(fit().predict(test[0]), probabilities)
    assert probe.settings["learning_rate"] in probe_heads.RATES[optimizer]


def token_data(count, seed):
    """One of 9 patches, not always the same, tells the class; their mean hides it."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    tokens = rng.normal(size=(count, 9, 8)).astype(np.float16)
    place = rng.integers(9, size=count)
    tokens[np.arange(count), place, 0] = 5
    tokens[np.arange(count), place, 1] = 6 * labels - 3
    return tokens, labels


def test_the_attentive_probe_finds_the_patch_that_matters():
    train, validation, test = (token_data(count, seed) for seed, count in enumerate((256, 64, 128)))
    probe = probe_heads.attentive(train, validation, 2, num_heads=2, epochs=20, batch_size=32)
    assert auroc(test[1], probe.predict(test[0])) > 0.9
    assert 1 <= probe.settings["epoch"] <= 20


def test_the_order_goes_through_the_whole_data_in_every_epoch():
    order = probe_heads._order(10, 5, 3, seed=0)
    assert order.shape == (6, 5)
    for epoch in range(3):
        assert sorted(order[2 * epoch : 2 * epoch + 2].ravel().tolist()) == list(range(10))
    assert probe_heads._order(10, 4, 3, seed=0).shape == (6, 4)
