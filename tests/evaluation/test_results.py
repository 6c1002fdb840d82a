"""The numbers of a run: true to its predictions, and calibrated without a look at the test labels."""

import dataclasses

import numpy as np
import pytest

from tests.evaluation.made import predictions, several
from usfmae_jax.evaluation import calibration, classification, intervals, results, tables
from usfmae_jax.evaluation.predictions import ClassPredictions, concatenate, read


@pytest.fixture
def run(rng):
    return several(rng)


def test_the_numbers_are_those_of_the_predictions(run):
    found = results.summarise(run, resamples=30)
    main = run.select(run.fraction == 1)
    assert found["metrics"] == classification.summarise(main, resamples=30)["metrics"]
    assert found["folds"] == intervals.by_fold(main, classification.scored(1), [*classification.NAMES])
    assert [one["fraction"] for one in found["fractions"]] == [0.1, 1.0]
    assert found["fractions"][1]["metrics"] == found["metrics"]
    assert found["metrics"]["auroc"]["value"] == pytest.approx(
        np.mean([one["metrics"]["auroc"] for one in found["seeds"]])
    )
    assert np.sum(found["confusion"]) == 80  # not the 160 of two seeds
    assert found["per_class"]["malignant"]["frames"] == 40
    assert found["per_class"]["malignant"]["recall"] == found["metrics"]["sensitivity"]


def test_every_metric_is_given_without_copied_frames_too(run, tmp_path):
    assert "without_copies" not in results.summarise(run, resamples=0)
    copied = np.isin(run.frame_key, np.unique(run.frame_key)[:6])
    marked = dataclasses.replace(run, copied=copied)
    found = results.summarise(marked, resamples=30)
    main = run.select((run.fraction == 1) & ~copied)
    assert found["without_copies"] == {
        "frames": main.counts()["frames"],
        "patients": main.counts()["patients"],
        "metrics": classification.summarise(main, resamples=30)["metrics"],
    }
    assert found["metrics"] == results.summarise(run, resamples=30)["metrics"]
    assert f"Without {found['counts']['frames'] - found['without_copies']['frames']} copied frames" in tables.overview(
        found | {"context": {}}, classification.NAMES, "auroc"
    )
    marked.write(tmp_path / "predictions.csv")
    assert read(tmp_path, ClassPredictions).copied.tolist() == copied.tolist()
    run.write(tmp_path / "predictions.csv")
    assert not read(tmp_path, ClassPredictions).copied.any()


def test_all_tested_frames_may_be_copies(run):
    marked = dataclasses.replace(run, copied=np.ones(len(run), bool))
    assert results.summarise(marked, resamples=0)["without_copies"] == {"frames": 0, "patients": 0, "metrics": {}}


def test_calibration_after_scaling_is_fitted_on_validation_alone(rng, run):
    assert results.summarise(run, resamples=0)["calibrated"] is None
    validation = predictions(rng, patients=300, folds=3, skill=1.5)
    validation = concatenate([dataclasses.replace(validation, seed=np.full(600, seed)) for seed in (0, 1)])
    sure, same = (
        dataclasses.replace(part, probabilities=calibration.scale(part.probabilities, 1 / 10))
        for part in (run, validation)
    )
    found = results.summarise(sure, validation=same, resamples=20)
    after = found["calibrated"]
    assert 4 < after["temperature"]["min"] <= after["temperature"]["mean"] <= after["temperature"]["max"] < 12
    for name in ("brier", "log_loss"):
        assert after[name]["value"] < found["metrics"][name]["value"]
    other = dataclasses.replace(sure, label=1 - sure.label)  # test labels have no say
    assert results.summarise(other, validation=same, resamples=0)["calibrated"]["temperature"] == after["temperature"]
    one_fold = same.select(same.fold == "1")
    assert results.summarise(sure, validation=one_fold, resamples=0)["calibrated"] is None
