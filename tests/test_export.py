"""An encoder on request, from any checkpoint of a run, and used as the README says."""

import pathlib
import re

import numpy as np
import pytest

from tests.interop import made
from tests.interop.torch_models import declare_torchvision, need
from usfmae_jax import convert, export, load_encoder
from usfmae_jax.data import provenance, records
from usfmae_jax.interop.model import flatten, open_model, read_lineage
from usfmae_jax.pretraining.loop import pretrain


def test_the_export_of_a_checkpoint_is_the_encoder_of_that_step(config, tmp_path, capsys):
    config.train.steps = 4
    config.checkpoint.update(every=2)
    workdir = tmp_path / "run"
    assert pretrain(config, str(workdir))
    assert export.main([f"--checkpoint={workdir}", f"--output={tmp_path / 'again'}"]) == 0
    assert "after step 4" in capsys.readouterr().err
    final, again = (flatten(open_model(str(path)).params) for path in (workdir / "encoder", tmp_path / "again"))
    assert export.main([f"--checkpoint={workdir}", "--step=2", f"--output={tmp_path / 'early'}"]) == 0
    early = flatten(open_model(str(tmp_path / "early")).params)
    for name, value in final.items():
        np.testing.assert_array_equal(again[name], value)
    assert not np.array_equal(early["encoder.patch_embed.kernel"], final["encoder.patch_embed.kernel"])


def test_what_is_no_run_is_refused(config, tmp_path, capsys):
    assert export.main([f"--checkpoint={tmp_path}"]) == 2
    assert "holds neither an encoder or a classifier nor a finished checkpoint" in capsys.readouterr().err
    config.train.steps = 1
    pretrain(config, str(tmp_path / "run"))
    assert export.main([f"--checkpoint={tmp_path / 'run'}", "--step=7"]) == 2
    assert "has the checkpoints [1], not 7" in capsys.readouterr().err


def _readme_example(word: str) -> str:
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if word in block]
    assert len(example.splitlines()) <= 11
    return example


def test_the_readme_example_computes_features(config, tmp_path):
    config.train.steps = 1
    assert pretrain(config, str(tmp_path))
    names: dict = {}
    exec(_readme_example("load_encoder").replace("runs/pretrain-demo/encoder", str(tmp_path / "encoder")), names)
    assert names["features"].class_token.shape == (2, config.model.width)
    assert names["features"].patch_grid.shape == (2, 4, 4, config.model.width)


@pytest.mark.parametrize(("form", "package"), [("timm", "timm"), ("hf", "transformers")])
def test_the_readme_examples_of_other_libraries_compute_the_same_features(tmp_path, monkeypatch, form, package):
    need("torch", package)
    declare_torchvision()
    source = made.write(tmp_path / "w.safetensors", made.tensors())
    assert convert.main([f"--input={source}", f"--output={tmp_path / 'in'}", *made.HEADS]) == 0
    monkeypatch.chdir(tmp_path)
    assert export.main(["--checkpoint=in", f"--format={form}", f"--output=exports/{form}"]) == 0
    names: dict = {}
    exec(_readme_example(f"import {package}" if form == "timm" else "from transformers"), names)
    ours = load_encoder("in")(names["images"].numpy().astype(np.uint8))
    tokens = names["tokens"].detach().numpy()
    np.testing.assert_allclose(tokens[:, 0], ours.class_token, atol=1e-4)
    np.testing.assert_allclose(tokens[:, 1:].mean(axis=1), ours.mean_patch, atol=1e-4)


def test_weights_carry_where_they_come_from_and_a_continued_run_appends_to_it(config, shards, tmp_path):
    config.train.steps = 2
    assert pretrain(config, str(tmp_path / "first"))
    config.init = str(tmp_path / "first" / "encoder")
    assert pretrain(config, str(tmp_path / "second"))
    first, second = (read_lineage(str(tmp_path / name / "encoder")) for name in ("first", "second"))
    assert second[:1] == first
    assert [stage["job"] for stage in second] == ["pretrain", "pretrain"]
    (data,) = second[1]["data"]
    assert (data["dataset"], data["frames"], data["licence"]) == ("made", 48, "")
    assert str(tmp_path) not in (tmp_path / "second" / "encoder" / "lineage.json").read_text()
    sources = [records.open_shards(shards)]
    assert provenance.seen_in(second, sources) == {"made": ["pretrain"]}
    assert provenance.seen_in([], sources) == {}
