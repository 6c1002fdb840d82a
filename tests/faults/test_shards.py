"""Shards that change between two starts of a run are noticed, whatever the run is."""

import json
import os
import pathlib
import shutil

import cv2
import numpy as np
import pytest

from data_prep import build
from data_prep.write import dataset
from tests.data_prep.builds import content
from tests.helpers import frame, tiny_config, write_shards
from usfmae_jax.cli import load_config
from usfmae_jax.data import records
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError
from usfmae_jax.finetuning import build as finetuning
from usfmae_jax.finetuning import results
from usfmae_jax.pretraining import loop
from usfmae_jax.pretraining.loop import pretrain
from usfmae_jax.probing import features


def flip(path, place=3000):
    """Flips a bit; the default lies in a record, where shards are padded behind."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def replace(folder):
    """Other frames under the same names, as many as there were."""
    shutil.rmtree(folder)
    folder.mkdir()
    others = {number: cv2.imencode(".png", frame(100 + number, 0))[1].tobytes() for number in range(24)}
    write_shards(folder, 24, instead=others)


CHANGES = {
    "one byte": lambda paths: flip(paths[0]),
    "one is missing": lambda paths: paths[1].unlink(),
    "replaced": lambda paths: replace(paths[0].parent),
    "reordered": lambda paths: swap(*paths),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with shards and a run of two steps on it, and its config."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "data").mkdir()
    write_shards(folder / "data", 24)
    config = tiny_config(f"{folder}/data")
    config.train.steps = config.checkpoint.every = 2
    assert pretrain(config, str(folder / "run"))
    return folder, config


@pytest.fixture
def copied(begun, tmp_path):
    folder, config = shutil.copytree(begun[0], tmp_path, dirs_exist_ok=True), begun[1].copy_and_resolve_references()
    config.data.path = f"{folder}/data"
    return folder, config, sorted((folder / "data").iterdir())


@pytest.mark.parametrize("change", CHANGES)
def test_pretraining_is_not_continued_on_other_shards(copied, monkeypatch, change):
    folder, config, paths = copied
    monkeypatch.setattr(loop, "compile_update", lambda *_: pytest.fail("compiled before refusing"))
    assert pretrain(config, str(folder / "run"))  # as they were, elsewhere
    CHANGES[change](paths)
    with pytest.raises(InputError) as error:
        pretrain(config, str(folder / "run"))
    expected = (
        "are missing, first number 1; build it again" if "missing" in change else "and the shards as they were to"
    )
    assert expected in str(error.value)
    config.data.path = f"{folder}/data/*0-of*"  # chosen by a person: whether others are missing is not asked
    with pytest.raises(InputError, match="data_fingerprint is"):
        pretrain(config, str(folder / "run"))


def test_a_run_of_a_version_that_knew_no_content_is_continued(copied, capfd):
    folder, config, _ = copied
    said = folder / "run" / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    stored = json.loads(said.read_text())
    del stored["custom_metadata"]["config"]["data_content"]
    del stored["custom_metadata"]["digest"]  # which they did not write either
    said.write_text(json.dumps(stored))
    assert pretrain(config, str(folder / "run"))
    assert "already finished" in capfd.readouterr().err


@pytest.mark.parametrize("change", CHANGES)
def test_fine_tuning_is_not_continued_on_other_shards_and_no_features_of_others_are_used(tmp_path, change):
    (tmp_path / "data").mkdir()
    paths = list(map(pathlib.Path, write_shards(tmp_path / "data", 24)))
    config = load_config("configs/finetune.py:folder")
    config.data.path = f"{tmp_path}/data"
    config.split.update(kind="group", folds=2, duplicates=False)
    used, how = [], {"pool": "mean", "batch_size": 8, "cache": f"{tmp_path}/cache", "reused": lambda: used.append(1)}

    def run(images, total, name):
        return np.concatenate([batch.reshape(len(batch), -1) for batch in images])

    for _ in range(2):
        results.start(finetuning.prepare(config, f"{tmp_path}/run"))
        features.extract(run, None, read_table(config.data.path), **how)
    assert used == [1]
    CHANGES[change](paths)
    if change == "one is missing":
        config.data.path = str(paths[0])
    with pytest.raises(InputError, match=r"data_fingerprint is .* and the shards as they were to resume"):
        results.start(finetuning.prepare(config, f"{tmp_path}/run"))
    features.extract(run, None, read_table(config.data.path), **how)
    assert used == [1]


def test_of_large_shards_blocks_are_hashed_and_checksums_find_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK", 64)
    monkeypatch.setattr(records, "_HASHED", 64 * 20)
    paths = list(map(pathlib.Path, write_shards(tmp_path, 24)))
    shards = records.open_shards(str(tmp_path))
    before = shards.content()
    for place in (0, -1):
        flip(paths[0], place)
        assert shards.content() != before
        flip(paths[0], place)
    assert shards.content() == before
    flip(paths[0])
    assert shards.content() == before
    with pytest.raises(records.DamagedRecord):
        _ = [shards[number] for number in range(len(shards))]
    os.truncate(paths[0], paths[0].stat().st_size - 1)
    assert shards.content() != before


PARTS = {
    "a record": lambda folder: flip(folder / "000002.part", 800),
    "an index": lambda folder: flip(folder / "000002.json", 200),
    "a part's order": lambda folder: [
        swap(folder / f"000001.{kind}", folder / f"000002.{kind}") for kind in ("part", "json")
    ],
    "a part's records": lambda folder: swap(folder / "000001.part", folder / "000002.part"),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Folders with a finished build and with one whose parts are finished, and its flags."""
    flags = ["--dataset=phantom", "--patients=4", "--frames=1", "--image_size=32", "--encoding=raw", "--workers=1"]
    folder = tmp_path_factory.mktemp("builds")
    assert build.main([*flags, f"--output={folder}/whole"]) == 0

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_gather", interrupt)
        assert build.main([*flags, f"--output={folder}/begun"]) == 130
    return folder, flags


@pytest.mark.parametrize("change", PARTS)
def test_parts_of_a_build_that_changed_are_made_again(interrupted, tmp_path, capsys, change):
    folder, flags = interrupted
    shutil.copytree(folder / "begun", tmp_path / "out")
    PARTS[change](tmp_path / "out/phantom/.1.0.0.incomplete")
    assert build.main([*flags, f"--output={tmp_path}/out"]) == 0
    again = 2 if change.startswith("a part's") else 1
    assert f"going on after {4 - again} of 4 sources" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(folder / "whole")
