"""Probes tell good features from bad ones, never test on a patient they were fitted on, and follow their seed."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.classification import metrics
from usfmae_jax.training import probes


def _data(rng, classes=2, patients=60, frames=3, width=8):
    labels = np.repeat(np.arange(patients) % classes, frames)
    groups = [f"p{i}" for i in np.repeat(np.arange(patients), frames)]
    return rng.normal(size=(patients * frames, width)), labels, groups


@pytest.mark.parametrize("classes", [2, 4])
def test_informative_features_score_high_and_noise_scores_chance(rng, classes):
    features, labels, groups = _data(rng, classes)
    noise = probes.probe(features, labels, groups)
    features[np.arange(len(labels)), labels] += 6
    good = probes.probe(features, labels, groups)
    for name in ("knn", "logistic"):
        assert good[f"{name}_auroc"] > 0.98
        assert good[f"{name}_balanced_accuracy"] > 0.95
        assert abs(noise[f"{name}_auroc"] - 0.5) < 0.15
        assert abs(noise[f"{name}_balanced_accuracy"] - 1 / classes) < 0.15


def test_a_patient_is_never_on_both_sides(rng):
    _, labels, groups = _data(rng)
    folds = probes.group_folds(labels, groups)
    assert len(folds) == 5
    for train, test in folds:
        assert not {groups[i] for i in train} & {groups[i] for i in test}
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(labels)))


def test_features_that_only_recognise_the_patient_score_chance(rng):
    features, labels, groups = _data(rng, width=64)
    identity = {group: rng.normal(size=64) * 10 for group in sorted(set(groups))}
    features += np.stack([identity[group] for group in groups])
    # Were frames of one patient on both sides, k-NN would be perfect.
    assert probes.probe(features, labels, groups)["knn_auroc"] < 0.7


def test_fewer_patients_than_folds_make_fewer_folds():
    labels = np.array([0] * 6 + [1] * 6)
    groups = [f"a{i}" for i in range(6)] + [f"b{i % 3}" for i in range(6)]
    assert len(probes.group_folds(labels, groups)) == 3


def test_a_class_of_one_patient_is_refused():
    with pytest.raises(InputError, match="class 1 has frames of one patient only"):
        probes.group_folds(np.array([0, 0, 1, 1]), ["a", "b", "c", "c"])


def test_the_interval_holds_the_score_and_counts_patients_not_frames(rng):
    features, labels, groups = _data(rng, patients=40, frames=1)
    features[:, 0] += labels
    one = probes.probe(features, labels, groups)
    assert one["logistic_auroc_low"] < one["logistic_auroc"] < one["logistic_auroc_high"]
    copies = [np.repeat(x, 10, axis=0) for x in (features, labels, np.asarray(groups))]
    ten = probes.probe(*copies)
    widths = [scores["logistic_auroc_high"] - scores["logistic_auroc_low"] for scores in (one, ten)]
    assert 0.6 < widths[1] / widths[0] < 1.6  # ten copies of each frame are no more evidence


def test_rankme_counts_directions(rng):
    directions = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    for rank in (1, 4, 32):
        features = rng.choice([-1.0, 1.0], size=(4000, rank)) @ directions[:rank]
        assert probes.rankme(features) == pytest.approx(rank, rel=0.05)


def test_scores_are_deterministic(rng):
    features, labels, groups = _data(rng)
    assert probes.probe(features, labels, groups) == probes.probe(features, labels, groups)


def gaussian(count, seed, classes=2, width=12):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.normal(size=(count, width)).astype(np.float32)
    features[np.arange(count), labels] += 1.5
    return 3 + 10 * features, labels


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_is_scikit_learns_at_the_chosen_strength(classes):
    train, validation, test = (gaussian(count, seed, classes) for seed, count in enumerate((160, 80, 200)))
    found = probes.logistic(train, validation, classes)
    scaler = StandardScaler().fit(train[0])
    losses = {}
    for strength in probes.REGULARIZATION:
        model = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(scaler.transform(train[0]), train[1])
        losses[strength] = log_loss(validation[1], model.predict_proba(scaler.transform(validation[0])))
    best = min(losses, key=losses.get)
    assert found.settings["C"] == best
    assert found.settings["validation_log_loss"] == pytest.approx(losses[best], rel=1e-3)
    model = LogisticRegression(C=best, max_iter=5000, tol=1e-8).fit(scaler.transform(train[0]), train[1])
    np.testing.assert_allclose(found.predict(test[0]), model.predict_proba(scaler.transform(test[0])), atol=2e-3)


def test_fewer_frames_than_features_change_nothing_but_the_time():
    train, validation, test = (gaussian(count, seed, width=60) for seed, count in enumerate((24, 30, 50)))
    found = probes.logistic(train, validation, 2)
    scaler = StandardScaler().fit(train[0])
    model = LogisticRegression(C=found.settings["C"], max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(train[0]), train[1])
    np.testing.assert_allclose(found.predict(test[0]), model.predict_proba(scaler.transform(test[0])), atol=2e-3)


def test_ridge_regression_is_scikit_learns_at_the_chosen_penalty():
    rng = np.random.default_rng(3)
    for count, width in ((80, 12), (30, 60)):
        features = rng.normal(size=(count + 40, width)) * np.arange(1, width + 1) + 5
        values = features[:, :5] @ [1.0, -2, 0.5, 0, 0.3] + rng.normal(size=len(features)) + 100
        train, rest = (features[:count], values[:count]), (features[count:], values[count:])
        predict, settings = probes.ridge(train, rest)
        scaler = StandardScaler().fit(train[0])
        errors = {}
        for penalty in probes.PENALTIES:
            theirs = Ridge(alpha=penalty * count).fit(scaler.transform(train[0]), train[1])
            errors[penalty] = np.mean((theirs.predict(scaler.transform(rest[0])) - rest[1]) ** 2)
            if penalty == settings["penalty"]:
                np.testing.assert_allclose(predict(rest[0]), theirs.predict(scaler.transform(rest[0])), rtol=1e-8)
        assert settings["penalty"] == min(errors, key=errors.get)
        assert settings["validation_mse"] == pytest.approx(min(errors.values()))


def test_a_constant_feature_says_nothing():
    (features, labels), validation = gaussian(60, 0), gaussian(40, 1)
    constant = [np.concatenate([x, np.full((len(x), 1), 0.1, np.float32)], axis=1) for x in (features, validation[0])]
    with_it = probes.logistic((constant[0], labels), (constant[1], validation[1]), 2)
    without = probes.logistic((features, labels), validation, 2)
    moved = constant[1] + [*[0] * 12, 1e-3]  # must not be blown up by a deviation of nearly 0
    np.testing.assert_allclose(with_it.predict(moved), without.predict(validation[0]), atol=1e-2)


def test_neighbours_vote_by_similarity():
    known = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1]] * 5, np.float32)
    labels = np.array([0, 0, 1, 1] * 5)
    found = probes.knn((known, labels), (known, labels), 2)
    assert found.settings["k"] in (10, 20)
    probabilities = found.predict(np.array([[7, 0.5], [0.2, 3], [1, 1.001]], np.float32))
    assert probabilities.argmax(axis=1)[:2].tolist() == [0, 1]
    assert probabilities[:2].max() > 0.99
    assert probabilities[2].max() < 0.8
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_the_votes_are_those_of_the_definition():
    train, validation, test = (gaussian(count, seed, 3) for seed, count in enumerate((40, 30, 20)))
    found = probes.knn(train, validation, 3)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train[0], test[0])]
    votes = np.exp((unit[1] @ unit[0].T).astype(np.float64) / 0.07)
    kept = np.argsort(-votes, axis=1)[:, : found.settings["k"]]
    expected = np.zeros((20, 3))
    for row in range(20):
        for neighbour in kept[row]:
            expected[row, train[1][neighbour]] += votes[row, neighbour]
    np.testing.assert_allclose(found.predict(test[0]), expected / expected.sum(axis=1, keepdims=True), rtol=1e-3)


def linear_data(count, seed, classes=2):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.normal(size=(count, 16)).astype(np.float32)
    features[np.arange(count), labels] += 2
    return 100 + 5 * features, labels  # badly scaled: BatchNorm has to see to it


@pytest.mark.parametrize(("optimizer", "classes"), [("lars", 2), ("adamw", 3)])
def test_the_linear_probe_learns_what_is_linear(optimizer, classes):
    train, validation, test = (linear_data(count, seed, classes) for seed, count in enumerate((240, 90, 300)))
    fit = lambda: probes.linear(train, validation, classes, optimizer=optimizer, epochs=30, batch_size=64)  # noqa: E731
    probe = fit()
    probabilities = probe.predict(test[0])
    assert metrics(test[1], probabilities, 1 if classes == 2 else None)["auroc"] > 0.9
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(fit().predict(test[0]), probabilities)
    assert probe.settings["learning_rate"] in probes.RATES[optimizer]


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
    probe = probes.attentive(train, validation, 2, num_heads=2, epochs=20, batch_size=32)
    assert metrics(test[1], probe.predict(test[0]), 1)["auroc"] > 0.9
    assert 1 <= probe.settings["epoch"] <= 20


def test_the_order_goes_through_the_whole_data_in_every_epoch():
    order = probes._order(10, 5, 3, seed=0)
    assert order.shape == (6, 5)
    for epoch in range(3):
        assert sorted(order[2 * epoch : 2 * epoch + 2].ravel().tolist()) == list(range(10))
    assert probes._order(10, 4, 3, seed=0).shape == (6, 4)


@pytest.mark.parametrize("protocol", ["logistic", "knn", "linear", "attentive"])
def test_what_was_chosen_is_fitted_again_on_all_frames(protocol):
    tokens = protocol == "attentive"
    parts = [(token_data if tokens else linear_data)(count, seed) for seed, count in enumerate((96, 64, 128))]
    options = {"linear": {"epochs": 20, "batch_size": 32}, "attentive": {"epochs": 12, "batch_size": 32}}
    recipe = {"num_heads": 2, "seed": 0, "options": options}
    chosen = probes.fit(protocol, parts[0], parts[1], 2, **recipe)
    both = tuple(np.concatenate(one) for one in zip(*parts[:2], strict=True))
    again = probes.refit(protocol, chosen.settings, both, 2, **recipe)
    kept = {"logistic": "C", "knn": "k", "linear": "learning_rate", "attentive": "epoch"}[protocol]
    assert again.settings[kept] == chosen.settings[kept]
    found = again.predict(parts[2][0])
    assert not np.array_equal(found, chosen.predict(parts[2][0]))
    # On the training part alone it is what was chosen: nothing but the frames differs.
    same = probes.refit(protocol, chosen.settings, parts[0], 2, **recipe).predict(parts[2][0])
    np.testing.assert_allclose(same, chosen.predict(parts[2][0]), atol=2e-3)
    aurocs = [metrics(parts[2][1], one, 1)["auroc"][0] for one in (found, chosen.predict(parts[2][0]))]
    assert aurocs[0] > aurocs[1] - 0.05
