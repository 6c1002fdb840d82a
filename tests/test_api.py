"""The doors as functions: what they return, one after the other, and mistakes as one sentence."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from tests.helpers import tiny_config
from usfmae_jax import api, cli
from usfmae_jax.errors import InputError

MODEL = {"image_size": (32, 32), "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2}


def test_from_a_dataset_to_predictions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = api.build_dataset("phantom", output="data", patients=24, frames=1, image_size=48, workers=1)
    assert (tmp_path / data / "1.0.0" / "features.json").exists()
    assert api.build_dataset("phantom", output="data", patients=24, frames=1, image_size=48, workers=1) == data

    config = tiny_config(data)
    config.train.steps = 2
    run = api.pretrain(config, workdir="runs/encoder", log={"every": 1})
    assert run == "runs/encoder"
    images = np.zeros((2, 40, 50, 1), np.uint8)
    assert api.load_encoder(run)(images).class_token.shape == (2, config.model.width)

    found = api.embed(run, data, batch_size=8)
    assert found["features"].shape == (24, config.model.width)
    api.embed(run, data, "kept.npz", batch_size=8)
    np.testing.assert_array_equal(np.load("kept.npz")["features"], found["features"])

    split = {"kind": "group", "folds": 2, "duplicates": False}
    probed = api.evaluate(
        checkpoint=run, data={"path": data}, split=split, protocol="knn", batch_size=8, bootstrap=20, cache="cache"
    )
    assert probed["task"]["protocol"] == "knn"
    assert (tmp_path / "runs" / "evaluate-folder" / "report.html").exists()

    results = api.finetune(
        "finetune:folder",
        workdir="runs/taught",
        init=run,
        data={"path": data},
        split=split | {"only": ["1"]},  # a list is as good as a tuple
        train={"steps": 2, "batch_size": 8},
        evaluate={"bootstrap": 20, "batch_size": 8},
        stop={"metric": "accuracy"},
    )
    assert results == json.loads((tmp_path / "runs" / "taught" / "results.json").read_text())
    rows = api.predict("runs/taught", data, "out", batch_size=8)
    assert len(rows) == 24
    assert {"file", "frame", "predicted"} <= set(rows[0])
    assert {name: type(value) for name, value in rows[0].items()} == {
        name: {"file": str, "predicted": str, "frame": int}.get(name, float) for name in rows[0]
    }


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: api.pretrain("pretrain:tny"), "tny"),
        (lambda: api.pretrain("pretrein"), "nearest is --config=pretrain"),
        (lambda: api.pretrain(data={"pat": "x"}), r"config\.data\.pat is no field of pretrain:tiny; nearest are"),
        (lambda: api.pretrain(train={"steps": "many"}), r"config\.train\.steps='many': a whole number is wanted"),
        (lambda: api.pretrain(train={"ema": "no"}), r"config\.train\.ema='no': a number is wanted"),
        (lambda: api.pretrain(model={"remat": True}), r"config\.model\.remat=True: a text is wanted"),
        (lambda: api.pretrain(train={"steps": True}), r"config\.train\.steps=True: a number is wanted"),
        (lambda: api.finetune(data=3), r"config\.data is no field"),
        (lambda: api.evaluate(checkpoint=""), r"config\.checkpoint is missing"),
        (lambda: api.embed("nothing", "data", "x.csv"), r"must end in \.npz"),
        (lambda: api.build_dataset("fantom"), "fantom"),
        (lambda: api.build_dataset("folder", input="nothing"), "is not a folder"),
        (lambda: api.build_dataset("phantom", patient=3), "nearest is --patients"),
        (lambda: api.embed("usfmae-tiny", "data", batchsize=3), "no argument 'batchsize'; did you mean batch_size?"),
        (lambda: api.embed("usfmae-tiny", "data", batch_size="3"), "batch_size='3' must be of type int"),
        (lambda: api.predict("run", "data", "out", colour=1), "no argument 'colour'; known are overlays, flip, stride"),
        (lambda: api.predict("run", [], "out"), "data names no file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        call()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("config", "fields", "flag"),
    [
        ("pretrain:tiny", {"model": {"image_size": 64}}, "--config.model.image_size=64"),
        ("pretrain:tiny", {"model": {"image_size": "64,96"}}, "--config.model.image_size=64,96"),
        ("pretrain:tiny", {"train": {"steps": np.int64(7)}}, "--config.train.steps=7"),
        ("pretrain:tiny", {"optimizer": {"learning_rate": np.float64(0.5)}}, "--config.optimizer.learning_rate=0.5"),
        ("finetune", {"split": {"only": 1}}, "--config.split.only=1"),
        ("finetune", {"split": {"only": "a,b"}}, "--config.split.only=a,b"),
    ],
)
def test_a_keyword_takes_the_values_that_the_command_line_takes(config, fields, flag):
    chosen, _ = api.configured(config.partition(":")[0], config, fields, "")
    typed = cli.parse(["door", f"--config={config}", flag], "", f"configs/{config.partition(':')[0]}.py").config
    assert chosen.to_dict() == typed.to_dict() != cli.load_config(config).to_dict()


def test_the_config_that_is_given_stays_as_it_is(tmp_path):
    config = tiny_config("")
    chosen, workdir = api.configured("pretrain", config, {"train": {"steps": 7}}, "")
    assert (chosen.train.steps, workdir) == (7, "runs/run-base")
    assert config.train.steps != 7


@pytest.mark.parametrize(
    ("function", "config", "says"),
    [
        (api.finetune, "pretrain:tiny", "is for python -m usfmae_jax.main; here try --config=finetune"),
        (api.pretrain, "finetune:folder", "is for python -m usfmae_jax.finetune; here try --config=pretrain"),
        (api.evaluate, "segment:folder", "is for python -m usfmae_jax.finetune; here try --config=evaluate"),
        (api.finetune, "suite", "is for python -m usfmae_jax.evaluate; here try --config=finetune"),
    ],
)
def test_a_config_of_another_function_is_refused(function, config, says):
    with pytest.raises(InputError, match=re.escape(says)):
        function(config)


def test_a_field_is_not_none():
    with pytest.raises(InputError, match=r"config.init=None: leave the field out"):
        api.pretrain("pretrain:tiny", init=None)


def test_paths_may_be_path_objects(shards, tmp_path):
    chosen, workdir = api.configured(
        "pretrain", pathlib.Path("pretrain"), {"data": {"path": tmp_path}}, tmp_path / "run"
    )
    assert (chosen.data.path, workdir) == (str(tmp_path), str(tmp_path / "run"))
    with pytest.raises(InputError, match="is no folder; give the workdir"):
        api.embed(tmp_path / "none", tmp_path, tmp_path / "features.npz")
    assert len(list(api.read_dataset(pathlib.Path(shards)))) == 48


def test_frames_can_be_read_back_as_they_were_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = api.build_dataset("phantom", output="data", patients=20, frames=1, image_size=48, workers=1)
    frames = list(api.read_dataset(data))
    assert len(frames) == 20
    assert all(min(frame["image"].shape) == 48 and frame["image"].dtype == np.uint8 for frame in frames)
    assert {frame["label"] for frame in frames} <= {"none", "cyst", "solid_regular", "solid_irregular"}
    masks = [frame for frame in frames if frame["mask"] is not None]
    assert masks
    assert all(frame["mask"].shape == frame["image"].shape for frame in masks)
    assert next(api.read_dataset(data, colour=True))["image"].shape == (*frames[0]["image"].shape, 3)
    split = [frame["patient"] for frame in api.read_dataset(data, "train")]
    assert 0 < len(split) < 20
    with pytest.raises(InputError, match="no shards match 'nothing'"):
        next(api.read_dataset("nothing"))


def test_a_run_reconstructs_images_of_any_size(shards, tmp_path, rng):
    config = tiny_config(shards)
    config.train.steps = 1
    run = api.pretrain(config, workdir=str(tmp_path / "run"))
    images = [rng.integers(0, 256, (40, 50), np.uint8), rng.integers(0, 256, (64, 32, 1), np.uint8)]
    found = api.reconstruct(run, images)
    assert {name: (one.shape, one.dtype) for name, one in found.items()} == dict.fromkeys(
        ("input", "masked", "reconstruction", "pasted"), ((2, 32, 32, 1), np.uint8)
    )
    hidden = (found["masked"] == 128) & (found["input"] != 128)
    assert 0.7 < hidden.mean() < 0.8
    np.testing.assert_array_equal(found["pasted"][hidden], found["reconstruction"][hidden])
    visible = found["masked"] != 128
    np.testing.assert_array_equal(found["pasted"][visible], found["input"][visible])
    assert (api.reconstruct(run, images, seed=1)["masked"] != found["masked"]).any()
    np.testing.assert_array_equal(api.reconstruct(f"{run}/checkpoints/1", images)["pasted"], found["pasted"])
    with pytest.raises(InputError, match="has no decoder"):
        api.reconstruct(f"{run}/encoder", images)
    for nothing in (lambda: api.reconstruct(run, []), lambda: api.load_encoder(run).attention([])):
        with pytest.raises(InputError, match="there are no images"):
            nothing()
    with pytest.raises(InputError, match="pool='max' must be"):
        api.load_encoder(run).attention(images, pool="max")
    with pytest.raises(InputError, match="pool='max' must be"):
        api.embed(run, shards, pool="max")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        api.reconstruct(f"{run}/checkpoints", images)


def test_a_run_of_version_0_1_which_said_otherwise_how_it_computes_reconstructs():
    old = pathlib.Path(__file__).parent / "interop" / "version_0_1" / "run"
    assert api.reconstruct(str(old), np.zeros((1, 8, 8), np.uint8))["pasted"].shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda said: "", "cannot be read as JSON"),
        (lambda said: "[" * 100_000, "cannot be read as JSON"),
        (lambda said: [1], "is no object"),
        (lambda said: {}, "lacks model"),
        (lambda said: said | {"model": [1]}, "model of config.json is no object"),
        (lambda said: said | {"model": said["model"] | {"image_size": [1 << 15, 1 << 15]}}, "image_size is"),
        (lambda said: said | {"model": said["model"] | {"width": "x"}}, "width is 'x'"),
        (lambda said: said | {"model": said["model"] | {"width": 32}}, "width is '32'"),
        (lambda said: said | {"model": said["model"] | {"dtype": ["x"]}}, "dtype is"),
        (lambda said: said | {"mask": 5}, "mask of config.json is no object"),
        (lambda said: said | {"mask": {"ratio": "x"}}, "ratio is 'x'"),
        (lambda said: said | {"mask": {"ratio": 1}}, "mask.ratio"),
        (lambda said: said | {"mask": {"block": 10**9}}, "block is"),
        (lambda said: said | {"loss": {"normalize_targets": "x"}}, "normalize_targets is 'x'"),
        (lambda said: said | {"objective": ["x"]}, "objective is"),
        (lambda said: said | {"objective": "latent"}, "objective is 'latent'"),
    ],
)
def test_what_a_strangers_run_says_of_its_model_is_that_of_its_checkpoint(tmp_path, change, sentence):
    shutil.copytree(pathlib.Path(__file__).parent / "interop" / "version_0_1" / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    said = change(json.loads(config.read_text()))
    config.write_text(said if isinstance(said, str) else json.dumps(said))
    with pytest.raises(InputError, match=sentence):
        api.reconstruct(str(tmp_path / "run"), np.zeros((1, 8, 8), np.uint8))


def test_a_run_that_predicts_features_has_nothing_to_reconstruct(shards, tmp_path):
    config = tiny_config(shards)
    config.update(objective="latent")
    run = api.pretrain(config, train={"steps": 1, "ema": 0.9}, workdir=str(tmp_path / "run"))
    with pytest.raises(InputError, match="features and no pixels"):
        api.reconstruct(run, np.zeros((1, 32, 32), np.uint8))


def test_an_export_is_a_folder_that_can_be_loaded(shards, tmp_path):
    config = tiny_config(shards)
    config.train.steps = 1
    run = api.pretrain(config, workdir=str(tmp_path / "run"))
    folder = api.export(run, str(tmp_path / "out"))
    images = np.zeros((1, 32, 32), np.uint8)
    np.testing.assert_array_equal(
        api.load_encoder(folder)(images).class_token, api.load_encoder(run)(images).class_token
    )
    with pytest.raises(InputError, match="format='timmm' must be one of"):
        api.export(run, str(tmp_path / "out"), format="timmm")
