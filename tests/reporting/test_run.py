"""What a run writes: complete, true to its predictions, without a path of the machine, and of any task."""

import dataclasses
import json
import re

import numpy as np
import pytest

from tests.evaluation.made import predictions, several
from tests.html_pages import Reader, words
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import results, tables
from usfmae_jax.evaluation.predictions import ClassPredictions, concatenate, read
from usfmae_jax.reporting import classification, run

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
def made(rng):
    return several(rng)


def test_everything_is_written_and_follows_the_schema(tmp_path, made):
    found = classification.finish(str(tmp_path), made, about=TASK, positive="", context=CONTEXT, resamples=50)
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
    assert len(read(tmp_path, ClassPredictions)) == len(made)


def test_absolute_paths_are_cut_and_numbers_become_json(tmp_path, made):
    found = classification.finish(str(tmp_path), made, about=TASK, positive="", context=CONTEXT, resamples=0)
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
    assert run.public({"text": text}) == {"text": shown}


def test_a_reader_is_warned_of_few_patients_and_of_frames_that_count_twice(tmp_path, rng):
    few = predictions(rng, patients=8, frames=3)
    again = concatenate([few, dataclasses.replace(few, fold=np.full(len(few), "2", object))])
    found = classification.finish(str(tmp_path), again, about={}, positive="", context={}, resamples=20)
    first, second = found["context"]["warnings"]
    assert "Few patients are tested of benign (4), malignant (4)" in first
    assert "24 predictions are of frames that other folds test too" in second
    assert second in (tmp_path / "results.md").read_text()
    assert second in results.table(found)


def test_one_of_a_thing_is_no_plural():
    assert [tables.counted(n, what) for n in (1, 2000) for what in ("device", "process")] == [
        "1 device", "1 process", "2,000 devices", "2,000 processes"
    ]  # fmt: skip


def test_the_tables_say_what_a_reader_needs(tmp_path, made):
    robustness = {"speckle": {"auroc": [0.9, 0.8, 0.7, 0.6, 0.5, None]}}
    found = classification.finish(
        str(tmp_path), made, about=TASK, positive="benign", context=CONTEXT, robustness=robustness, resamples=20
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
    eight = predictions(rng, patients=80, classes=tuple("abcdefgh"))
    eight = eight.select(eight.label != 7)
    found = classification.finish(str(tmp_path), eight, about={}, positive="", context={}, resamples=20)
    assert found["metrics"]["auroc"]["value"] is None
    assert found["metrics"]["accuracy"]["value"] is not None
    assert found["per_class"]["h"]["recall"] == {"value": None, "ci95": None, "left_out": 20}
    assert found["task"]["positive"] == ""
    assert found["folds"]["metrics"]["accuracy"]["std"] is None
    assert "Accuracy 0." in results.table(found).splitlines()[0]


def test_an_unknown_positive_class_is_refused(tmp_path, made):
    with pytest.raises(InputError, match="'cancer' is no class"):
        classification.finish(str(tmp_path), made, about={}, positive="cancer", context={})


def test_the_page_shows_what_the_results_are_of(made, rng):
    found = results.summarise(made, resamples=20)
    largest = made.select(made.fraction == 1)
    parts = {
        "embedding": {"points": rng.random((9, 2)), "label": ["benign", *["malignant"] * 8], "dataset": ["made"] * 9},
        "examples": [{"image": np.zeros((9, 9), np.uint8), "label": "benign", "predicted": "malignant"}],
    }
    sections = classification.described(found, made, **parts)["sections"]
    assert sections == classification.described(found, largest, **parts)["sections"]
    assert {name for name, content in sections.items() if not content} == {"Robustness"}


def regression(**changes):
    """Results of a task without classes: how far a measured length is off."""

    def metrics(mae, r2):
        return {"mae": {"value": mae, "ci95": [0.9 * mae, 1.1 * mae]}, "r2": {"value": r2, "ci95": [r2 - 0.1, r2]}}

    found = {
        "format": 1,
        "counts": {"frames": 1200, "patients": 40, "videos": 50, "folds": 2, "seeds": 2},
        "fraction": 1.0,
        "bootstrap": {"resamples": 100, "unit": "patient", "seed": 0},
        "metrics": metrics(12.5, 0.8),
        "folds": {
            "names": ["1", "2"],
            "metrics": {name: {"mean": 12.5, "std": 0.7, "values": [12.0, 13.0]} for name in ("mae", "r2")},
        },
        "fractions": [
            {"fraction": 0.1, "metrics": metrics(31.0, 0.2)},
            {"fraction": 1.0, "metrics": metrics(12.5, 0.8)},
        ],
        "seeds": [{"seed": seed, "metrics": {"mae": 12.5 + seed, "r2": 0.8}} for seed in (0, 1)],
    }
    return found | changes


MEASURES = {
    "mae": run.Measure("Mean absolute error", "in millimetres; 0 is best", short="MAE"),
    "r2": run.Measure("R²", "share of the variance that is explained", bounded=True),
}


def test_a_task_without_classes_has_complete_results(tmp_path):
    task = {"title": "Length of the femur on made", "datasets": ["made"], "split": "official"}
    found = run.finish(
        str(tmp_path), regression(), task=task, context=CONTEXT, measures=MEASURES, headline=("mae", "r2")
    )
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert found["task"] == task
    assert found["robustness"] is None
    page, text = words(tmp_path / "report.html"), (tmp_path / "results.md").read_text()
    first = "ested on 1,200 frames of 40 patients in 2 folds, the mean of 2 seeds; "
    first += "Mean absolute error 12.500, 95% interval over patients 11.250 to 13.750. Split: official."
    assert f"T{first}" in page
    assert text.startswith(f"# {task['title']}\n\n{task['title']}: t{first}\n")
    for part in (
        "12.500 Mean absolute error 11.250 to 13.750", "in millimetres; 0 is best", "By fold", "12.500 ± 0.700",
        "seed 1", "By share of the training patients", "10% 31.000 [27.900, 34.100]", "All settings", "0123456789ab",
        "same picture as 9", CONTEXT["command"],
    ):  # fmt: skip
        assert part in page, part
    for head in ("Metrics", "By label fraction", "By seed", "Weights", "Data", "Repeat it"):
        assert f"\n## {head}\n" in text
    for written in (page, text, (tmp_path / "results.json").read_text()):
        assert not re.search("(?i)class|positive|malignant|confusion|auroc|sensitivity|calibra", written)


def test_a_measure_without_bounds_has_a_chart_and_no_bar(tmp_path):
    measures = {"mae": MEASURES["mae"]}
    results = regression(metrics={"mae": {"value": 1250.0, "ci95": None}})
    run.finish(str(tmp_path), results, task={}, context={}, measures=measures, headline=("mae",))
    text = words(tmp_path / "report.html")
    assert "the bars run from 0 to 1" not in text
    assert "Value and 95% interval over 100 draws of patients." in text
    assert len([one for one in Reader(tmp_path / "report.html").all("svg") if "role" in one]) == 1


def test_sections_of_a_task_come_first_and_replace_the_usual_ones(tmp_path):
    own = {"": run.part("sentences", ["It works."]), "Outliers": run.part("notice", "a", ["b"])}
    own["Fewer labels"] = run.part("notice", "c", ["d"])
    path = tmp_path / "report.html"
    run.write_page(path, regression(), MEASURES, ("mae",), ("mae",), own)
    links = [one["href"] for one in Reader(path).all("a")]
    assert links == ["#outliers", "#fewer-labels", "#all-numbers", "#folds-and-seeds"]
    assert "It works." in words(path)
    assert "By share" not in words(path)
