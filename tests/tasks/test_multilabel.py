"""Several labels of a frame: metrics against scikit-learn, what is not known, training, files and exports."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from configs.finetune import get_config
from tests.data.tables import table
from tests.helpers import evaluated
from tests.interop.torch_models import need
from usfmae_jax.data.table import read_table, whole_image
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import multilabel as scoring
from usfmae_jax.evaluation.multilabel import LabelPredictions
from usfmae_jax.evaluation.predictions import read
from usfmae_jax.export import export
from usfmae_jax.finetuning import build
from usfmae_jax.finetuning.loop import finetune
from usfmae_jax.interop.model import open_model
from usfmae_jax.interop.stablehlo import inference
from usfmae_jax.tasks.multilabel import MultiLabel


def predictions(truth, probabilities, patients=None):
    truth, probabilities = np.array(truth, float), np.array(probabilities, float)
    count = len(truth)
    names = np.array([f"f{i}" for i in range(count)], object)
    patients = names if patients is None else np.array(patients, object)
    ids = {"dataset": np.full(count, "d"), "patient": patients, "video": names, "frame": names}
    ids |= {"fold": np.full(count, "1"), "seed": np.zeros(count, int), "fraction": np.ones(count)}
    classes = tuple("abcdef"[: truth.shape[1]])
    return LabelPredictions(**ids, classes=classes, truth=truth, probabilities=probabilities)


def some(rng, count=80, labels=3, missing=0.2):
    truth = (rng.random((count, labels)) < 0.4).astype(float)
    truth[rng.random(truth.shape) < missing] = np.nan
    return predictions(truth, rng.random((count, labels)), [f"p{i // 2}" for i in range(count)])


def test_metrics_of_each_label_are_those_of_scikit_learn_over_frames_where_it_is_known(rng):
    one = some(rng)
    weights = rng.integers(0, 3, (2, len(one)))
    found = scoring.score(one, weights)
    for c in range(3):
        known = np.isfinite(one.truth[:, c])
        truth, said = one.truth[known, c], one.probabilities[known, c]
        for r in range(2):
            weight = weights[r, known]
            how = {"sample_weight": weight}
            expected = {
                "auroc": sk.roc_auc_score(truth, said, **how),
                "average_precision": sk.average_precision_score(truth, said, **how),
                "f1": sk.f1_score(truth, said > 0.5, **how),
                "sensitivity": sk.recall_score(truth, said > 0.5, **how),
                "specificity": sk.recall_score(1 - truth, said <= 0.5, **how),
                "brier": sk.brier_score_loss(truth, said, **how),
            }
            assert {name: found[f"class_{name}"][r, c] for name in expected} == pytest.approx(expected)
    for name in scoring.NAMES:
        assert found[name] == pytest.approx(found[f"class_{name}"].mean(axis=1))


def test_a_label_that_all_have_or_none_is_left_out_of_the_means(rng):
    one = some(rng, labels=3, missing=0)
    one.truth[:, 1] = 0
    one.truth[:, 2] = np.nan
    found = scoring.summarise(one, resamples=50)
    for name, metric in found["metrics"].items():
        assert metric["value"] == pytest.approx(found["per_class"]["a"][name]["value"])
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
    assert found["per_class"]["b"]["auroc"] == {"value": None, "ci95": None, "left_out": 50}
    assert [found["per_class"][name]["frames"] for name in "abc"] == [80, 80, 0]
    assert found["per_class"]["b"]["with_it"] == 0


def test_few_known_frames_leave_replicates_without_any(rng):
    one = some(rng, missing=0)
    one.truth[2:, 0] = np.nan
    one.truth[:2, 0] = 0, 1
    found = scoring.summarise(one, resamples=60)
    assert 0 < found["per_class"]["a"]["brier"]["left_out"] < 60


def test_predictions_are_read_as_they_were_written(tmp_path, rng):
    one = some(rng)
    one.write(tmp_path / "predictions.csv")
    again = read(tmp_path, LabelPredictions)
    assert again.classes == one.classes
    np.testing.assert_array_equal(again.truth, one.truth)
    np.testing.assert_array_equal(again.probabilities, one.probabilities)


def test_the_loss_is_the_mean_over_what_is_known():
    task = MultiLabel(("a", "b"), np.array([[1, np.nan], [0, 1]]))
    given = task.targets(None, np.array([0, 1]))
    logits = jnp.array([[2.0, 5.0], [-1.0, 0.5]])
    found, count = task.loss(lambda images, **_: logits, given | {"image": None}, None)
    expected = -np.log(jax.nn.sigmoid(2.0)) - np.log(jax.nn.sigmoid(1.0)) - np.log(jax.nn.sigmoid(0.5))
    assert (float(found), float(count)) == (pytest.approx(float(expected), rel=1e-5), 3)


def test_strata_are_the_rarest_labels_that_ten_patients_have():
    values = np.zeros((60, 3))
    values[:20, 0] = values[10:24, 1] = values[:3, 2] = 1
    found = MultiLabel(("a", "b", "c"), values).strata(table(range(60), [0] * 60))
    assert found.names == ("none of them", "b", "a")
    assert np.bincount(found.code).tolist() == [36, 14, 10]
    assert MultiLabel(("a", "b", "c"), values[:12]).strata(table(range(12), [0] * 12)).names == ("all",)


@pytest.fixture
def config(shards, tmp_path):
    with (tmp_path / "t.csv").open("w") as file:
        rows = [[f"{i}.png", (i // 2) % 2, "" if i % 5 == 0 else i % 3 // 2, i] for i in range(2, 48)]
        csv.writer(file).writerows([["file", "disc", "odd", "number"], *rows])
    config = get_config("folder_multilabel")
    config.data.path, config.targets = shards, str(tmp_path / "t.csv")
    config.model.update(image_size=(32, 32), patch_size=8, width=32, depth=1, num_heads=2, drop_path=0.0)
    config.split.update(kind="single", duplicates=False)
    config.train.update(batch_size=16, steps=8)
    config.evaluate.update(batch_size=16, bootstrap=20)
    config.stop.every, config.parallel = 2.0, 1
    return config


def test_it_is_fine_tuned_scored_reported_and_exported(config, tmp_path):
    workdir = tmp_path / "run"
    assert finetune(config, str(workdir))
    results = json.loads((workdir / "results.json").read_text())
    assert list(results["metrics"]) == list(scoring.NAMES)
    assert list(results["per_class"]) == ["disc", "odd"]
    page = (workdir / "report.html").read_text()
    for said in ("AUROC (macro)", "ROC curves", "By label", "Called <b>"):
        assert said in page
    said, frames = read(workdir, LabelPredictions), read_table(config.data.path)
    rows = [int(np.flatnonzero(frames.video == video)[0]) for video in said.video]
    numbers = [int(video[1:]) for video in said.video]
    assert said.truth[:, 0].tolist() == [(i // 2) % 2 for i in numbers]
    assert np.isnan(said.truth[:, 1]).tolist() == [i % 5 == 0 for i in numbers]
    model = open_model(str(workdir))
    assert (model.kind, model.description["task"], model.description["outputs"]) == (
        "model",
        "multilabel",
        ["disc", "odd"],
    )
    images = np.stack([whole_image(frames, row, (32, 32), 1) for row in rows])
    found = inference(model)(images, model.params)["probabilities"]
    np.testing.assert_allclose(found, said.probabilities, atol=1e-5)
    evaluated(workdir, config.data.path, tmp_path / "tested", targets=config.targets)
    again = read(tmp_path / "tested", LabelPredictions)
    np.testing.assert_allclose(again.probabilities, said.probabilities, atol=1e-6)
    need("onnx", "onnxruntime")
    export(str(workdir), str(tmp_path / "onnx"), form="onnx")
    about = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert set(about["differences"]) == {"probabilities"}
    assert about["largest_difference"] < 1e-4
    assert "# probabilities" in (tmp_path / "onnx" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target": "number"}, "'2' is neither 0 nor 1"),
        ({"target": "disc,heart"}, r"config\.target='heart' is no column of t\.csv"),
        ({"stop.metric": "mae"}, r"config\.stop\.metric='mae' must be one of auroc"),
        ({"regularization.mixup": 0.8}, r"config\.regularization\.mixup=0\.8 is for classes of whole frames"),
    ],
)
def test_what_does_not_fit_is_one_sentence(config, tmp_path, change, says):
    for name, value in change.items():
        *group, field = name.split(".")
        (config[group[0]] if group else config)[field] = value
    with pytest.raises(InputError, match=says):
        build.prepare(config, str(tmp_path / "run"))


def test_a_label_of_one_kind_has_nothing_to_teach(config, tmp_path):
    (tmp_path / "t.csv").write_text("file,a\n1.png,1\n2.png,1\n")
    with pytest.raises(InputError, match="the column 'a' is 1 for all frames: leave it out"):
        build.prepare(config, str(tmp_path / "run"))


def test_a_validation_part_that_tells_nothing_is_said():
    task = MultiLabel(("a",), np.array([[0.0], [0.0], [1.0]]))
    with pytest.raises(InputError, match="no label has frames with and without it in the validation part"):
        task.score(table("pqr", [0] * 3), np.array([0, 1]), {"probabilities": np.array([[0.1], [0.2]])})
