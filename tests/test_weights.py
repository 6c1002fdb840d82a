"""Weights by name: found by every door without a path, and what comes along is small and says where it is from."""

import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from tests.helpers import tiny_config
from usfmae_jax import api, export, load_encoder, weights
from usfmae_jax.errors import InputError
from usfmae_jax.interop.card import citations, licences
from usfmae_jax.interop.files import open_source
from usfmae_jax.interop.model import open_model, read_lineage

NAME, SHIPPED = "usfmae-tiny", weights.FOLDER / "usfmae-tiny"
LIMIT = 12 * 2**20


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, shards):
    """A stand-in, made as the weights that are included are: two steps, and an export."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny_config(shards)
    config.train.steps = 2
    run = api.pretrain(config, workdir=str(folder / "run"))
    assert export.main([f"--checkpoint={run}/encoder", f"--output={folder / NAME}"]) == 0
    return folder / NAME


@pytest.fixture(autouse=True)
def shipped(encoder, tmp_path, monkeypatch):
    """The stand-in comes along; the current directory is empty."""
    shutil.copytree(encoder, tmp_path / "weights" / NAME)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "weights" / NAME


def test_a_name_is_an_encoder_without_a_path(shipped):
    images = np.zeros((2, 40, 50, 1), np.uint8)
    by_name, by_path = load_encoder(NAME)(images), load_encoder(shipped)(images)
    np.testing.assert_array_equal(by_name.class_token, by_path.class_token)
    assert open_source(NAME).files == ("model.safetensors",)


def test_every_door_that_takes_a_checkpoint_takes_the_name(shards, tmp_path):
    config = tiny_config(shards)
    config.train.steps = 1
    run = api.pretrain(config, init=NAME, workdir="pretrained")
    assert [stage["job"] for stage in read_lineage(run)] == ["pretrain", "pretrain"]
    how = {"data": {"path": shards}, "split": {"kind": "single", "duplicates": False}}
    taught = api.finetune(init=NAME, train={"steps": 1, "batch_size": 8}, evaluate={"bootstrap": 20}, **how)
    assert taught["task"]["title"].startswith("Fine-tuned")
    probed = api.evaluate(checkpoint=NAME, bootstrap=20, cache="cache", **how)
    assert probed["task"]["protocol"] == "logistic"
    assert api.embed(NAME, shards)["features"].shape == (48, 32)
    assert export.main([f"--checkpoint={NAME}"]) == 0
    assert open_model(f"{NAME}-safetensors").fingerprint == open_model(NAME).fingerprint


def test_a_folder_of_that_name_comes_first(shipped):
    assert load_encoder(NAME).architecture["width"] == 32
    pathlib.Path(NAME, "checkpoints").mkdir(parents=True)  # as the workdir of a run that starts from the weights
    assert load_encoder(NAME).architecture["width"] == 32
    pathlib.Path(NAME, "model.safetensors").touch()
    with pytest.raises(InputError, match=r"usfmae-tiny (holds no encoder|is not an encoder directory)"):
        load_encoder(NAME)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("usfmae-base", r"download the checkpoint .* https://github\.com/Yusufii9/USF-MAE .* --output=usfmae-base"),
        ("mae-base", r"mae_pretrain_vit_base_full\.pth .*python -m usfmae_jax\.convert --input=FILE --output=mae-base"),
        ("usfmae_tiny", "included is usfmae-tiny; for usfmae-base or mae-base, that name says where"),
        ("tiny", "included is usfmae-tiny"),
        ("usfmae-bse", "included is usfmae-tiny; for usfmae-base or mae-base"),
        (
            "runs/usfmae-tiny",
            "'runs/usfmae-tiny' is no folder; the name usfmae-tiny alone stands for the included weights",
        ),
        ("quite other", "'quite other' is no folder; give the workdir of a run"),
        ("mae_base.pth", r"'mae_base\.pth' is no folder; give the workdir of a run"),
    ],
)
def test_other_names_say_what_to_do(name, says, shards):
    with pytest.raises(InputError, match=says):
        load_encoder(name)
    if not says.startswith("'"):
        with pytest.raises(InputError, match=says):
            api.pretrain(tiny_config(shards), init=name, workdir="run")
        with pytest.raises(InputError, match=says):
            open_source(name)


def test_an_installation_without_the_file_says_so(shipped):
    (shipped / "model.safetensors").unlink()
    with pytest.raises(InputError, match="usfmae-tiny is missing from the installed usfmae_jax: install the package"):
        load_encoder(NAME)


def test_a_file_that_is_not_there_is_no_misspelt_name():
    with pytest.raises(InputError, match=r"--input=mae_base\.pth does not exist; give a file of weights"):
        open_source("mae_base.pth")


def test_what_convert_writes_under_the_name_of_published_weights_is_found_by_it(shipped):
    shutil.copytree(shipped, "mae-base/encoder")
    assert load_encoder("mae-base").architecture["width"] == 32


def test_a_card_cites_what_has_a_citation():
    stages = [{"job": "pretrain", "data": [{"dataset": "a", "citation": "A 2020"}, {"dataset": "b", "citation": ""}]}]
    assert citations(stages) == [("a", "A 2020")]


@pytest.mark.skipif(not SHIPPED.exists(), reason="no weights come along in this checkout")
def test_what_comes_along_is_small_and_says_where_it_is_from():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= LIMIT
    model, card = open_model(str(SHIPPED)), (SHIPPED / "README.md").read_text()
    assert model.kind == "encoder"
    digest = hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (SHIPPED.parent / "README.md").read_text()
    assert model.lineage == json.loads((SHIPPED / "lineage.json").read_text())["stages"]
    named = {data["dataset"] for stage in model.lineage for data in stage["data"]}
    assert named == {"aul", "hc", "ccaui", "timtrack_muscle", "usgra_nerve", "phantom"}
    for what, terms in licences(model.lineage):
        assert f"| {what}".replace("_", "\\_") in card or f"| {what}" in card
        assert terms
        assert terms in card
    for _, source in citations(model.lineage):
        assert source in card
    for beside in ("random", "pixels", "demo"):
        assert beside in card
