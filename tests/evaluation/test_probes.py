"""Probes tell good features from bad ones, and never test on a patient they were fitted on."""

import numpy as np
import pytest

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import probes


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
    identity = {group: rng.normal(size=64) * 10 for group in set(groups)}
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
