"""A number of each frame: its metrics against other libraries, its unit through training, files and exports."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sk

from configs.finetune import get_config
from tests.data.tables import made, table, write_records
from tests.helpers import evaluated
from tests.interop.torch_models import need
from usfmae_jax import cli
from usfmae_jax.data.table import read_table, whole_image
from usfmae_jax.data.targets import read_targets
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import regression as scoring
from usfmae_jax.evaluation.predictions import read
from usfmae_jax.evaluation.regression import QuantityPredictions
from usfmae_jax.export import export
from usfmae_jax.finetuning import build
from usfmae_jax.finetuning.loop import finetune
from usfmae_jax.interop.model import open_model
from usfmae_jax.interop.stablehlo import inference, run_stablehlo
from usfmae_jax.reporting import regression as reporting
from usfmae_jax.tasks.regression import Regression, extents


def predictions(truth, value, patients=None):
    count = len(truth)
    names = np.array([f"f{i}" for i in range(count)], object)
    patients = names if patients is None else np.array(patients, object)
    ids = {"dataset": np.full(count, "d"), "patient": patients, "video": names, "frame": names}
    ids |= {"fold": np.full(count, "1"), "seed": np.zeros(count, int), "fraction": np.ones(count)}
    return QuantityPredictions(**ids, truth=np.array(truth, float), value=np.array(value, float))


def scores(one, weights=None):
    weights = np.ones((1, len(one))) if weights is None else weights
    return {name: float(value[0]) for name, value in scoring.score(one, weights).items()}


def test_metrics_by_hand():
    found = scores(predictions([10, 20, 30, 40], [11, 19, 33, 41]))  # errors 1, -1, 3, 1
    deviation = np.sqrt((0 + 4 + 4 + 0) / 3)  # around 1
    assert found == pytest.approx(
        {
            "mae": 1.5,
            "rmse": np.sqrt(3),
            "r2": 1 - 12 / 500,
            "pearson": scipy.stats.pearsonr([10, 20, 30, 40], [11, 19, 33, 41])[0],
            "bias": 1,
            "limits_low": 1 - 1.96 * deviation,
            "limits_high": 1 + 1.96 * deviation,
        }
    )


@pytest.mark.parametrize("shift", [0, 1e6])
@pytest.mark.parametrize("scale", [1e-9, 1, 1e6])
def test_metrics_are_those_of_other_libraries_frames_of_a_patient_sharing_its_weight(rng, scale, shift):
    count = 60
    truth = scale * (rng.normal(100, 20, count) + shift)
    value = truth + scale * rng.normal(3, 8, count)
    patients = np.array([f"p{i}" for i in rng.integers(25, size=count)])
    for whose in (None, patients):
        one = predictions(truth, value, whose)
        _, member, frames = np.unique(one.patient_key, return_inverse=True, return_counts=True)
        weight = 1 / frames[member]
        found = scores(one)
        expected = {
            "mae": sk.mean_absolute_error(truth, value, sample_weight=weight),
            "rmse": np.sqrt(sk.mean_squared_error(truth, value, sample_weight=weight)),
            "r2": sk.r2_score(truth, value, sample_weight=weight),
            "bias": np.average(value - truth, weights=weight),
            "pearson": (np.corrcoef if whose is None else _weighted(weight))(truth, value)[0, 1],
        }
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        if whose is None:
            half = 1.96 * np.std(value - truth, ddof=1)
            assert found["limits_high"] - found["bias"] == pytest.approx(half, rel=1e-6)
            assert found["bias"] - found["limits_low"] == pytest.approx(half, rel=1e-6)


def _weighted(weight):
    def correlation(*columns):
        cov = np.cov(np.stack(columns), aweights=weight)
        return cov / np.sqrt(np.outer(np.diag(cov), np.diag(cov)))

    return correlation


def test_a_patient_that_is_drawn_twice_counts_twice():
    one = predictions([1, 2, 3, 5], [1, 4, 3, 9], ["a", "b", "b", "c"])
    twice = predictions([1, 2, 3, 5, 5], [1, 4, 3, 9, 9], ["a", "b", "b", "c", "d"])
    assert scores(one, np.array([[1, 1, 1, 2]])) == pytest.approx(scores(twice))


def test_what_is_not_defined_is_no_number():
    found = scores(predictions([5, 5, 5], [1, 2, 6]))
    assert np.isnan([found["r2"], found["pearson"]]).all()
    assert np.isnan(scores(predictions([1, 2, 3], [4, 4, 4]))["pearson"])
    found = scores(predictions([1, 2, 3], [1, 3, 3], ["a", "a", "a"]))  # one patient
    assert np.isnan([found["limits_low"], found["limits_high"]]).all()
    assert found["mae"] == pytest.approx(1 / 3)
    perfect = scores(predictions([5, 5], [5, 5]))
    assert (perfect["mae"], perfect["bias"]) == (0, 0)


def test_intervals_are_over_patients_and_may_be_negative(rng):
    truth = rng.normal(50, 10, 80)
    one = predictions(truth, truth - 2 + rng.normal(0, 1, 80), [f"p{i // 2}" for i in range(80)])
    found = scoring.summarise(one, "angle", "degrees", resamples=200)
    for metric in found["metrics"].values():
        assert metric["ci95"][0] < metric["value"] < metric["ci95"][1]
    low, high = found["metrics"]["bias"]["ci95"]
    assert low < -2 < high < 0
    assert found["task"] == {"quantity": "angle", "unit": "degrees"}
    assert "angle is 1.9" in reporting.verdict(found)[0] or "angle is 2" in reporting.verdict(found)[0]
    assert "too small on the whole" in reporting.verdict(found)[1]
    assert reporting.doubt(found) == ""
    guess = scoring.summarise(predictions(truth, np.full(80, truth.mean())), "angle", "", resamples=50)
    assert "not clearly better than naming the mean" in reporting.doubt(guess)


def quantity(values, **how):
    values = np.array(values, float)
    return Regression("x", "mm", values, how.pop("extent", np.ones(len(values))), **how)


def test_a_member_learns_the_number_standardised_by_its_training_part_alone():
    task, rows = quantity([1, 3, 100, 5], extent=np.array([1, 2, 1, 1])), np.array([0, 1, 3])
    fitted = task.fitted(None, rows)
    shares = np.array([1, 1.5, 5])
    assert (fitted.mean, fitted.deviation) == pytest.approx((shares.mean(), shares.std()))
    given = fitted.targets(None, rows)["value"]
    assert given.dtype == np.float32
    assert (given.mean(), given.std()) == pytest.approx((0, 1), abs=1e-6)
    assert fitted.measure(None, rows, {"value": given})["value"] == pytest.approx([1, 3, 5])
    scale = fitted.describe({"model": "vit", "encoder": {}})["scale"]
    assert scale == {"mean": [fitted.mean], "deviation": [fitted.deviation], "unit": ["mm"], "of_frame": [True]}
    same = quantity([7, 7, 7]).fitted(None, np.arange(3))
    assert (same.mean, same.deviation) == (7, 1)


@pytest.mark.parametrize(("kind", "expected"), [("smooth_l1", 0.125 + 1.5), ("mse", 0.25 + 4)])
def test_the_loss_is_what_it_is_called(kind, expected):
    found, count = quantity([0, 0], kind=kind).loss(
        lambda images, **_: jnp.array([[0.5], [-2.0]]), {"image": None, "value": jnp.zeros(2)}, None
    )
    assert (float(found), float(count)) == (pytest.approx(expected), 2)


def test_models_of_different_scales_are_averaged_in_the_unit():
    task = quantity([10.0, 20.0])
    models = [{"scale": {"mean": [mean], "deviation": [2.0]}} for mean in (10.0, 14.0)]
    said = task.together([{"value": np.float32([1, 2])}, {"value": np.float32([-1, 0])}], models)
    assert task.measure(None, np.arange(2), said)["value"].tolist() == [12.0, 14.0]


def test_strata_are_quantiles_of_as_many_patients_as_splits_need():
    def names(count):
        values = np.arange(count)
        return quantity(values).strata(table([f"p{i}" for i in values], [0] * count))

    four = names(48)
    assert four.names == ("below 11.75 mm", "11.75 to 23.5 mm", "23.5 to 35.25 mm", "35.25 or more mm")
    assert np.bincount(four.code).tolist() == [12] * 4
    assert len(names(33).names) == 3
    assert names(12).names == ("all",)
    assert quantity([1] * 40).strata(table(range(40), [0] * 40)).names == ("all",)


def test_lengths_are_shares_of_the_side_of_the_frame(tmp_path):
    write_records(tmp_path, made(2, spacing=(0.5, 0.125)))
    assert extents(read_table(str(tmp_path))) == pytest.approx([np.sqrt(0.5 * 40 * 0.125 * 48)] * 2)
    write_records(tmp_path, made(1, 2), "other")
    with pytest.raises(InputError, match=r"config\.of_frame=true needs .* 1 of 3 frames do not have, first 'f2'"):
        extents(read_table(str(tmp_path)))


VALUE = {i: 100.0 + 40 * ((i // 2) % 2) + i % 7 for i in range(48)}


@pytest.fixture
def config(shards, tmp_path):
    with (tmp_path / "t.csv").open("w") as file:
        rows = [[f"{i}.png", "" if i < 4 else VALUE[i], "a"] for i in range(48)]
        csv.writer(file).writerows([["source", "size [mm]", "note"], *rows, ["gone.png", 1, ""]])
    config = get_config("folder_regression")
    config.data.path, config.targets, config.target = shards, str(tmp_path / "t.csv"), "size"
    config.model.update(image_size=(32, 32), patch_size=8, width=32, depth=1, num_heads=2, drop_path=0.0)
    config.split.update(kind="single", duplicates=False)
    config.train.update(batch_size=16, steps=8)
    config.evaluate.update(batch_size=16, bootstrap=20)
    config.stop.every, config.parallel = 2.0, 1
    return config


def test_it_is_fine_tuned_scored_reported_and_exported_in_its_unit(config, tmp_path):
    workdir = tmp_path / "run"
    assert finetune(config, str(workdir))
    results = json.loads((workdir / "results.json").read_text())
    assert list(results["metrics"]) == list(scoring.NAMES)
    assert results["metrics"]["mae"]["value"] < 40
    notes = results["context"]["warnings"]
    assert any("1 of 49 rows of t.csv name no frame of the data, first 'gone.png'" in note for note in notes)
    assert any("4 of 48 frames have no value of size in config.targets" in note for note in notes)
    assert str(tmp_path) not in (workdir / "results.json").read_text()
    page = (workdir / "report.html").read_text()
    for said in ("Mean absolute error (mm)", "Predicted against true", "Bland-Altman", "Farthest off", "is <b>1"):
        assert said in page
    said = read(workdir, QuantityPredictions)
    assert said.truth.tolist() == [VALUE[int(video[1:])] for video in said.video]
    model = open_model(str(workdir))
    assert model.description["scale"]["unit"] == ["mm"]
    trained = [VALUE[int(row["video"][1:])] for row in splits(workdir) if row["part"] == "train"]
    assert model.description["scale"]["mean"] == pytest.approx([np.mean(trained)])
    frames = read_table(config.data.path)
    rows = [int(np.flatnonzero(frames.video == video)[0]) for video in said.video]
    images = np.stack([whole_image(frames, row, (32, 32), 1) for row in rows])
    np.testing.assert_allclose(inference(model)(images, model.params)["outputs"][:, 0], said.value, rtol=1e-5)
    table = {"targets": config.targets, "target": "size"}
    evaluated(workdir, config.data.path, tmp_path / "tested", **table)
    again = read(tmp_path / "tested", QuantityPredictions)
    assert again.truth.tolist() == said.truth.tolist()
    np.testing.assert_allclose(again.value, said.value, rtol=1e-5)
    (tmp_path / "cm.csv").write_text((tmp_path / "t.csv").read_text().replace("[mm]", "[cm]"))
    with pytest.raises(InputError, match=r"the model gives mm, but the column of config\.targets is in cm"):
        evaluated(workdir, config.data.path, tmp_path / "cm", **table | {"targets": str(tmp_path / "cm.csv")})
    with pytest.raises(InputError, match=r"the table of numbers is missing: --config\.targets=FILE\.csv"):
        evaluated(workdir, config.data.path, tmp_path / "none")
    need("flatbuffers", "onnx", "onnxruntime")
    for form in ("stablehlo", "onnx"):
        export(str(workdir), str(tmp_path / form), form=form)
        about = json.loads((tmp_path / form / "export.json").read_text())
        assert about["largest_difference"] < about["limit"]
        assert "size (mm)" in (tmp_path / form / "README.md").read_text()
    found = run_stablehlo(str(tmp_path / "stablehlo"), images)["outputs"][:, 0]
    np.testing.assert_allclose(found, said.value, rtol=1e-5)
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace("140.0", "141.0"))
    with pytest.raises(InputError, match="targets_fingerprint is"):
        finetune(config, str(workdir))


def splits(workdir):
    with (workdir / "splits" / "splits.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target": ""}, None),  # the only column of numbers
        ({"target": "size, note"}, r"t\.csv, line 2, column 'note': 'a' is no number"),
        ({"target": "weight"}, r"config\.target='weight' is no column of t\.csv; there are 'size', 'note'"),
        ({"targets": ""}, r"config\.targets names no table"),
        ({"loss": "l1"}, r"config\.loss='l1' must be one of smooth_l1, mse"),
        ({"stop.metric": "r2"}, r"config\.stop\.metric='r2' must be one of mae, rmse"),
        ({"of_frame": True}, "which 44 of 44 frames do not have"),
        ({"regularization.smoothing": 0.1}, "is for classes of whole frames: set it to 0"),
        ({"model.pool": "max"}, r"config\.model\.pool='max' must be 'mean'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(config, tmp_path, change, says):
    for name, value in change.items():
        *group, field = name.split(".")
        (config[group[0]] if group else config)[field] = value
    if says:
        with pytest.raises(InputError, match=says):
            build.prepare(config, str(tmp_path / "run"))
    else:
        assert build.prepare(config, str(tmp_path / "run")).task.outputs == ("size",)


def test_names_with_blanks_are_typed_as_they_are():
    flags = cli.parse(["finetune", "--config=configs/finetune.py:hc18", "--config.target=ejection fraction"], "", "")
    assert flags.config.target == "ejection fraction"


def test_a_task_without_its_fields_says_which_variant_has_them(shards, tmp_path):
    config = get_config("folder")
    config.data.path, config.task, config.regularization.smoothing = shards, "regression", 0.0
    with pytest.raises(InputError, match=r"needs the table of --config\.targets, .*finetune:folder_regression"):
        build.prepare(config, str(tmp_path))


@pytest.mark.parametrize("gain", [1e-3, 1e-6, 1e-9])
def test_pearson_does_not_care_how_much_predictions_vary(gain):
    truth = np.linspace(220, 280, 30)
    found = scores(predictions(truth, 200 + gain * (truth - 250)))
    assert found["pearson"] == pytest.approx(1, abs=1e-4)
    assert np.isnan(scores(predictions(truth, np.full(30, 200.0)))["pearson"])


def test_a_cell_of_text_is_named_though_no_column_is(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    table_of = read_table(str(write_records(folder, made(3))))
    (tmp_path / "t.csv").write_text("frame,area\nf0,1.5\nf1,about 3\nf2,2\n")
    with pytest.raises(InputError, match=r"'about 3' stands in line 3 of t\.csv, column 'area'"):
        read_targets(str(tmp_path / "t.csv"), table_of)
