"""What a run writes: complete, true to its predictions, and without a path of the machine."""

import dataclasses
import json

import numpy as np
import pytest

from tests.evaluation.made import predictions
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import calibration, classification, results
from usfmae_jax.evaluation.predictions import concatenate, read
from usfmae_jax.reporting import run as report

TASK = {"title": "Fine-tuned tiny ViT on made", "protocol": "finetune", "datasets": ["made"], "split": "official"}
CONTEXT = {
    "config": {"init": "/home/someone/runs/encoder", "rates": (1e-3, np.float32(0.5)), "nothing": float("nan")},
    "weights": {"source": "encoder", "fingerprint": "0123456789ab", "kind": "encoder"},
    "lineage": [{"job": "pretrain", "data": [{"dataset": "other", "frames": 1234, "licence": "CC BY 4.0"}]}],
    "data": [{"dataset": "made", "frames": 80, "licence": ""}],
    "fingerprint": ["aa11"],
    "warnings": ["no licence in /home/someone/made/manifest.json, see https://example.org/a/b"],
    "excluded": [{"dataset": "made", "frame": "7", "reason": "same picture as 9"}],
    "command": "python -m usfmae_jax.finetune --config=configs/finetune.py:busbra",
}


@pytest.fixture
def run(rng):
    """Two label fractions, two seeds, three folds."""
    parts = []
    for fraction, skill in ((0.1, 0.5), (1.0, 1.5)):
        for seed in (0, 1):
            part = predictions(rng, patients=40, folds=3, seed=seed, skill=skill)
            parts.append(dataclasses.replace(part, fraction=np.full(len(part), fraction)))
    return concatenate(parts)


def test_everything_is_written_and_follows_the_schema(tmp_path, run):
    found = results.finish(str(tmp_path), run, task=TASK, positive="", context=CONTEXT, resamples=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "predictions.csv", "report.html", "results.json", "results.md"
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert list(found) == [
        "format", "task", "counts", "fraction", "bootstrap", "metrics", "per_class", "confusion", "reliability",
        "calibrated", "folds", "fractions", "seeds", "robustness", "context",
    ]  # fmt: skip
    assert all(f"\n    {key} " in results.__doc__ for key in found)
    assert found["task"] == TASK | {"classes": ["benign", "malignant"], "positive": "malignant"}
    assert found["counts"] == {"frames": 80, "patients": 40, "videos": 80, "folds": 3, "seeds": 2}
    assert all(name in results.__doc__ for name in found["metrics"])
    for metric in found["metrics"].values():
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
    assert len(read(tmp_path)) == len(run)


def test_the_numbers_are_those_of_the_predictions(run):
    found = results.summarise(run, resamples=30)
    main = run.select(run.fraction == 1)
    assert found["metrics"] == classification.summarise(main, resamples=30)["metrics"]
    assert found["folds"] == classification.by_fold(main)
    assert [one["fraction"] for one in found["fractions"]] == [0.1, 1.0]
    assert found["fractions"][1]["metrics"] == found["metrics"]
    assert found["metrics"]["auroc"]["value"] == pytest.approx(
        np.mean([one["metrics"]["auroc"] for one in found["seeds"]])
    )
    assert np.sum(found["confusion"]) == 80  # not the 160 of two seeds
    assert found["per_class"]["malignant"]["frames"] == 40
    assert found["per_class"]["malignant"]["recall"] == found["metrics"]["sensitivity"]


def test_absolute_paths_are_cut_and_numbers_become_json(tmp_path, run):
    found = results.finish(str(tmp_path), run, task=TASK, positive="", context=CONTEXT, resamples=0)
    written = "".join((tmp_path / name).read_text() for name in ("results.json", "results.md"))
    assert "someone" not in written
    assert str(tmp_path) not in written
    context = found["context"]
    assert context["config"] == {"init": "encoder", "rates": [0.001, 0.5], "nothing": None}
    assert context["warnings"] == ["no licence in manifest.json, see https://example.org/a/b"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/a,/data/b/", "a,b"),
        ("data/a/b", "data/a/b"),
        ("gs://bucket/a/b", "gs://bucket/a/b"),
        ("benign and/or malignant, 5/10/20", "benign and/or malignant, 5/10/20"),
        ("'/tmp/x/y.csv' is late", "'y.csv' is late"),
        ("--config.init=/tmp/x/encoder --a=b", "--config.init=encoder --a=b"),
        ("doi 10.1000/a/b", "doi 10.1000/a/b"),
    ],
)
def test_only_absolute_paths_are_cut(text, shown):
    assert results._public({"text": text}) == {"text": shown}


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


def test_a_reader_is_warned_of_few_patients_and_of_frames_that_count_twice(tmp_path, rng):
    few = predictions(rng, patients=8, frames=3)
    again = concatenate([few, dataclasses.replace(few, fold=np.full(len(few), "2", object))])
    found = results.finish(str(tmp_path), again, task={}, positive="", context={}, resamples=20)
    first, second = found["context"]["warnings"]
    assert "Few patients are tested of benign (4), malignant (4)" in first
    assert "24 predictions are of frames that other folds test too" in second
    assert second in (tmp_path / "results.md").read_text()
    assert second in results.table(found)


def test_the_tables_say_what_a_reader_needs(tmp_path, run):
    robustness = {"speckle": {"auroc": [0.9, 0.8, 0.7, 0.6, 0.5, None]}}
    found = results.finish(
        str(tmp_path), run, task=TASK, positive="benign", context=CONTEXT, robustness=robustness, resamples=20
    )
    text = results.table(found)
    assert text.startswith("Fine-tuned tiny ViT on made: tested on 80 frames of 40 patients in 3 folds, ")
    assert ", the mean of 2 seeds; AUROC" in text
    assert "; positive: benign. Split: official.\n" in text
    metric = found["metrics"]["auroc"]
    assert f"{metric['value']:.3f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]" in text
    page = (tmp_path / "results.md").read_text()
    for head in ("Metrics", "By class", "Confusion matrix", "By label fraction", "By seed", "Under corruption"):
        assert f"\n## {head}\n" in page
    for part in ("other (1,234 frames, licence CC BY 4.0)", "fingerprint aa11", "| speckle |", "| 10% ", "1 frame"):
        assert part in page
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_eight_classes_one_fold_and_a_class_that_is_not_there(tmp_path, rng):
    made = predictions(rng, patients=80, classes=tuple("abcdefgh"))
    made = made.select(made.label != 7)
    found = results.finish(str(tmp_path), made, task={}, positive="", context={}, resamples=20)
    assert found["metrics"]["auroc"]["value"] is None
    assert found["metrics"]["accuracy"]["value"] is not None
    assert found["per_class"]["h"]["recall"] == {"value": None, "ci95": None, "left_out": 20}
    assert found["task"]["positive"] == ""
    assert found["folds"]["metrics"]["accuracy"]["std"] is None
    assert "Accuracy 0." in results.table(found).splitlines()[0]


def test_an_unknown_positive_class_is_refused(tmp_path, run):
    with pytest.raises(InputError, match="'cancer' is no class"):
        results.finish(str(tmp_path), run, task={}, positive="cancer", context={})


def test_the_page_gets_what_the_results_are_of(tmp_path, run, monkeypatch):
    seen = {}

    def write_report(path, found, rows, **more):
        path.write_text("page")
        seen.update(more, rows=rows)

    monkeypatch.setattr(report, "write_report", write_report)
    results.finish(
        str(tmp_path), run, task={}, positive="", context={}, embedding={"points": 1}, examples=[{}], resamples=0
    )
    assert (tmp_path / "report.html").read_text() == "page"
    assert (seen["rows"].fraction == 1).all()
    assert seen["embedding"] == {"points": 1}
    assert seen["examples"] == [{}]
    assert seen["robustness"] is None
