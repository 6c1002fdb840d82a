"""Metrics under weights are scikit-learn's under sample weights; intervals are over patients."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
import sklearn.metrics as sk

from tests.evaluation.made import bootstrap_weights, predictions
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import classification, comparison, intervals
from usfmae_jax.evaluation.predictions import ClassPredictions, concatenate


def _expected(labels, probabilities, positive, weight):
    """The same numbers by scikit-learn, which takes one weighting at a time."""
    predicted, classes = probabilities.argmax(axis=1), np.arange(probabilities.shape[1])
    some = {"sample_weight": weight, "zero_division": 0, "labels": classes}
    found = {
        "accuracy": sk.accuracy_score(labels, predicted, sample_weight=weight),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted, sample_weight=weight),
        "log_loss": sk.log_loss(labels, probabilities, sample_weight=weight, labels=classes),
    }
    for name, score in {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}.items():
        for average in ("macro", "weighted"):
            found[f"{name}_{average}"] = score(labels, predicted, average=average, **some)
        found[f"class_{name}"] = score(labels, predicted, average=None, **some)
    found["class_precision"] = sk.precision_score(labels, predicted, average=None, **(some | {"zero_division": np.nan}))
    each = [(labels == c, probabilities[:, c], predicted == c) for c in classes]
    found["class_auroc"] = [sk.roc_auc_score(y, p, sample_weight=weight) for y, p, _ in each]
    found["class_average_precision"] = [sk.average_precision_score(y, p, sample_weight=weight) for y, p, _ in each]
    found["class_specificity"] = [sk.recall_score(~y, ~d, sample_weight=weight) for y, _, d in each]
    if positive is None:
        found["auroc"] = sk.roc_auc_score(labels, probabilities, multi_class="ovr", sample_weight=weight)
        found["average_precision"] = np.mean(found["class_average_precision"])
        found["specificity_macro"] = np.mean(found["class_specificity"])
        found["brier"] = sk.brier_score_loss(labels, probabilities, sample_weight=weight, labels=classes)
    else:
        y, p, d = each[positive]
        one = {"sample_weight": weight, "zero_division": 0}
        found["auroc"] = sk.roc_auc_score(y, p, sample_weight=weight)
        found["average_precision"] = sk.average_precision_score(y, p, sample_weight=weight)
        found["sensitivity"], found["specificity"] = sk.recall_score(y, d, **one), sk.recall_score(~y, ~d, **one)
        found["ppv"], found["npv"] = sk.precision_score(y, d, **one), sk.precision_score(~y, ~d, **one)
        found["f1"] = sk.f1_score(y, d, **one)
        found["brier"] = sk.brier_score_loss(y, p, sample_weight=weight)
    return found


@pytest.mark.parametrize("decimals", [8, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize(("classes", "positive"), [(2, 1), (2, 0), (4, None)])
def test_weighted_metrics_are_those_of_scikit_learn(rng, classes, positive, decimals):
    made = predictions(rng, classes=tuple("abcd"[:classes]), decimals=decimals)
    weights = np.concatenate([np.ones((1, len(made))), bootstrap_weights(made.patient_key, 5)])
    found = classification.metrics(made.label, made.probabilities, positive, weights)
    assert set(found) - {"ece"} == set(_expected(made.label, made.probabilities, positive, weights[0]))
    for i, weight in enumerate(weights):
        for name, value in _expected(made.label, made.probabilities, positive, weight).items():
            np.testing.assert_allclose(found[name][i], value, atol=1e-12, err_msg=f"{name} of weighting {i}")


def test_confusion_matrices_are_those_of_scikit_learn(rng):
    made = predictions(rng, classes=tuple("abc"))
    weights = bootstrap_weights(made.patient_key, 3)
    found = classification.confusion(made.label, made.probabilities, weights)
    for matrix, weight in zip(found, weights, strict=True):
        assert (matrix == sk.confusion_matrix(made.label, made.predicted, sample_weight=weight)).all()


def test_a_weight_of_two_is_a_frame_that_occurs_twice(rng):
    made = predictions(rng, classes=tuple("abc"), decimals=1)
    weights = bootstrap_weights(made.patient_key, 4, seed=3)
    found = classification.metrics(made.label, made.probabilities, None, weights)
    for i, weight in enumerate(weights):
        drawn = made.select(np.repeat(np.arange(len(made)), weight))
        for name, value in classification.metrics(drawn.label, drawn.probabilities, None).items():
            np.testing.assert_allclose(found[name][i], value[0], atol=1e-12, err_msg=name)


def test_a_metric_that_needs_an_absent_class_is_not_defined():
    labels, probabilities = np.array([0, 0, 1]), np.array([[0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.2, 0.7, 0.1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classification.metrics(labels, probabilities, None)
    undefined = {name for name, value in found.items() if not name.startswith("class_") and np.isnan(value[0])}
    assert undefined == {f"{n}_macro" for n in ("precision", "recall", "f1")} | {
        "auroc", "average_precision", "balanced_accuracy"
    }  # fmt: skip
    assert found["class_recall"][0] == pytest.approx([0.5, 1, np.nan], nan_ok=True)
    assert found["recall_weighted"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_what_is_never_predicted_has_no_precision(rng):
    made = predictions(rng, patients=30)
    none = dataclasses.replace(made, probabilities=np.tile([0.9, 0.1], (len(made), 1)))
    found = classification.summarise(none, resamples=50)
    for undefined in (found["metrics"]["ppv"], found["per_class"]["malignant"]["precision"]):
        assert undefined == {"value": None, "ci95": None, "left_out": 50}
    assert found["metrics"]["sensitivity"]["value"] == found["metrics"]["f1"]["value"] == 0
    assert found["metrics"]["npv"]["value"] == pytest.approx(np.mean(made.label == 0))
    assert found["metrics"]["precision_macro"]["value"] == pytest.approx(np.mean(made.label == 0) / 2)
    for a, b in ((none, made), (made, none)):
        compared = comparison.compare(a, b, resamples=50)
        assert [compared["metrics"]["ppv"][key] for key in ("difference", "ci95", "p")] == [None] * 3
        assert re.search(r"Positive predictive value +\|.* - \|.* - \|.* - \| +- \|", comparison.table(compared))
    undefined = classification.metrics(made.label, none.probabilities[:, ::-1], 1)
    assert np.isnan(undefined["npv"][0])


def test_one_class_alone_has_accuracy_but_no_auroc():
    found = classification.metrics(np.array([1, 1]), np.array([[0.4, 0.6], [0.7, 0.3]]), 1)
    assert found["accuracy"] == found["sensitivity"] == 0.5
    assert np.isnan(found["auroc"])
    assert np.isnan(found["specificity"])


def test_bootstrap_draws_as_many_patients_as_there_are_and_all_their_frames():
    patients = np.array(["b", "a", "b", "c", "c", "c"])
    weights = bootstrap_weights(patients, 200, seed=1)
    assert weights.shape == (200, 6)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 3:] == weights[:, 3:4]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert abs(weights.mean() - 1) < 0.1


def test_bootstrap_chunks_do_not_change_the_draws(monkeypatch):
    patients = np.arange(50) % 20
    whole = bootstrap_weights(patients, 30)
    monkeypatch.setattr(intervals, "_AT_ONCE", 200)
    parts = list(intervals.bootstrap_chunks(patients, 30))
    assert [len(part) for part in parts] == [4] * 7 + [2]
    assert (np.concatenate(parts) == whole).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # Five frames a patient, all right or all wrong: an interval over frames would cover the truth half as often.
    rng, covered = np.random.default_rng(0), 0
    base = predictions(rng, patients=40, frames=5)
    for _ in range(80):
        right = np.repeat(rng.random(40) < 0.7, 5)
        truth = np.where(right, base.label, 1 - base.label)
        made = dataclasses.replace(base, probabilities=np.eye(2)[truth] * 0.8 + 0.1)
        low, high = classification.summarise(made, resamples=150)["metrics"]["accuracy"]["ci95"]
        covered += low <= 0.7 <= high
    assert 70 <= covered <= 79


def test_several_seeds_give_the_mean_and_no_more_evidence(rng):
    parts = [predictions(rng, seed=seed) for seed in range(3)]
    alone = [classification.summarise(part, resamples=200)["metrics"] for part in parts]
    together = classification.summarise(concatenate(parts), resamples=200)["metrics"]
    for name, metric in together.items():
        assert metric["value"] == pytest.approx(np.mean([one[name]["value"] for one in alone]))
    same = concatenate([dataclasses.replace(parts[0], seed=np.full(len(parts[0]), seed)) for seed in range(3)])
    repeated = classification.summarise(same, resamples=200)["metrics"]
    for name, metric in repeated.items():
        assert metric["ci95"] == pytest.approx(alone[0][name]["ci95"])


def test_the_interval_of_the_calibration_error_is_around_its_value(rng):
    # Each replicate of a well calibrated model is worse calibrated than the frames that it is drawn from.
    made = predictions(rng, patients=60, frames=1)
    weights = bootstrap_weights(made.patient_key, 200)
    drawn = classification.metrics(made.label, made.probabilities, 1, weights)["ece"]
    metric = classification.summarise(made, resamples=200)["metrics"]["ece"]
    assert metric["value"] < drawn.mean()
    assert metric["ci95"][0] < metric["value"] < metric["ci95"][1]


def test_replicates_without_a_class_are_left_out_and_counted(rng):
    made = predictions(rng, patients=4, frames=3)
    found = classification.summarise(made, resamples=400)["metrics"]
    weights = bootstrap_weights(made.patient_key, 400)
    absent = sum(not (weight[made.label == 0].any() and weight[made.label == 1].any()) for weight in weights)
    assert found["auroc"]["left_out"] == absent > 20
    assert "left_out" not in found["accuracy"]


def test_one_patient_has_no_interval_and_an_absent_class_no_value(rng):
    one = predictions(rng, patients=1, frames=4)
    found = classification.summarise(one)["metrics"]
    assert found["auroc"]["value"] is None
    assert found["auroc"]["ci95"] is None
    assert found["accuracy"]["value"] is not None
    assert found["accuracy"]["ci95"] is None


def test_folds_are_scored_each_for_itself(rng):
    made = predictions(rng, patients=60, folds=3)
    found = intervals.by_fold(made, classification.scored(1), [*classification.NAMES])
    assert found["names"] == ["1", "2", "3"]
    values = [
        sk.roc_auc_score(made.label[made.fold == name], made.probabilities[made.fold == name, 1])
        for name in found["names"]
    ]
    auroc = found["metrics"]["auroc"]
    assert auroc["values"] == pytest.approx(values)
    assert (auroc["mean"], auroc["std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (
        intervals.by_fold(made.select(made.fold == "1"), classification.scored(1), ["auroc"])["metrics"]["auroc"]["std"]
        is None
    )


def test_the_positive_class_is_the_last_unless_named():
    assert classification.positive_class(("benign", "malignant")) == 1
    assert classification.positive_class(("malignant", "benign"), "Malignant") == 0
    assert classification.positive_class(tuple("abc")) is None
    with pytest.raises(InputError, match="'cancer' is no class; choose one of benign, malignant"):
        classification.positive_class(("benign", "malignant"), "cancer")


def test_summaries_are_deterministic(rng):
    made: ClassPredictions = predictions(rng)
    assert classification.summarise(made, resamples=50) == classification.summarise(made, resamples=50)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_metrics_said_to_be_defined_are(rng, classes):
    probabilities = rng.dirichlet(np.ones(classes), 30)
    found = classification.metrics(np.arange(30) % classes, probabilities, 1 if classes == 2 else None)
    assert classification.defined(classes == 2) == [name for name in found if not name.startswith("class_")]
