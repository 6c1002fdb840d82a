"""An encoder on request, from any checkpoint of a run, and used as docs/pytorch.md says."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

from tests.interop import made
from tests.interop.torch_models import declare_torchvision, need
from usfmae_jax import convert, export, load_encoder
from usfmae_jax.data import provenance, records
from usfmae_jax.interop import verify
from usfmae_jax.interop.model import Model, build, flatten, open_model, preprocessing, read_lineage, save_model
from usfmae_jax.pretraining.loop import pretrain
from usfmae_jax.tasks.instances import answers
from usfmae_jax.training.forward import model_function


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
    assert "holds no encoder, no classifier and no finished checkpoint" in capsys.readouterr().err
    config.train.steps = 1
    pretrain(config, str(tmp_path / "run"))
    assert export.main([f"--checkpoint={tmp_path / 'run'}", "--step=7"]) == 2
    assert "has the checkpoints [1], not 7" in capsys.readouterr().err


def _example(word: str) -> str:
    page = (pathlib.Path(__file__).parents[1] / "docs" / "pytorch.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if word in block]
    assert len(example.splitlines()) <= 11
    return example


def test_the_example_computes_features(config, tmp_path):
    config.train.steps = 1
    assert pretrain(config, str(tmp_path))
    names: dict = {}
    exec(_example("load_encoder").replace("usfmae-tiny", str(tmp_path / "encoder")), names)
    assert names["features"].class_token.shape == (2, config.model.width)
    assert names["features"].patch_grid.shape == (2, 4, 4, config.model.width)
    assert names["maps"].shape == (2, 4, 4)


@pytest.mark.parametrize(("form", "package"), [("timm", "timm"), ("hf", "transformers")])
def test_the_examples_of_other_libraries_compute_the_same_features(tmp_path, monkeypatch, form, package):
    need("torch", package)
    declare_torchvision()
    source = made.write(tmp_path / "w.safetensors", made.tensors())
    assert convert.main([f"--input={source}", f"--output={tmp_path / 'in'}", *made.HEADS]) == 0
    monkeypatch.chdir(tmp_path)
    assert export.main(["--checkpoint=in", f"--format={form}", f"--output=exports/{form}"]) == 0
    names: dict = {}
    exec(_example(f"import {package}" if form == "timm" else "from transformers"), names)
    ours = load_encoder("in")(names["images"].numpy().astype(np.uint8))
    tokens = names["tokens"].detach().numpy()
    np.testing.assert_allclose(tokens[:, 0], ours.class_token, atol=1e-4)
    np.testing.assert_allclose(tokens[:, 1:].mean(axis=1), ours.mean_patch, atol=1e-4)


def _segmenter(directory, description):
    """Random weights, whose head tells classes apart; saved as a fine-tuning run does."""
    network = build(description)(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    params = jax.tree.map(lambda value: value + 0.2 * rng.standard_normal(value.shape, np.float32), params)
    size = description.get("encoder", _VIT)["image_size"]
    save_model(str(directory), Model(params, description, preprocessing(size, 1, [0.25], [0.2]), []))
    return open_model(str(directory))


_VIT = {"image_size": [16, 24], "patch_size": 8, "channels": 1, "width": 16, "depth": 2, "num_heads": 2}
_OUTPUTS = {"task": "segmentation", "outputs": ["head", "rest"]}


_LINEAR = {"model": "vit", "encoder": _VIT, "head": {"kind": "linear"}}
# Levels at four resolutions, what comes out at half of that of the image, and another epsilon in the encoder.
_DECODER = {
    "model": "vit",
    "encoder": _VIT | {"image_size": [16, 32], "patch_size": 16, "depth": 4, "norm_eps": 1e-3},
    "head": {"kind": "decoder", "width": 32},
}
_UNET = {"model": "unet", "unet": {"channels": 1, "width": 4, "depth": 2}}


@pytest.mark.parametrize(
    ("form", "description"),
    [("onnx", _LINEAR), ("onnx", _DECODER), ("onnx", _UNET), ("stablehlo", _DECODER)],
    ids=["onnx of a linear head", "onnx of a decoder", "onnx of a U-Net", "stablehlo"],
)
def test_an_exported_segmenter_gives_the_class_and_the_probabilities_of_each_pixel(tmp_path, form, description):
    need("onnx", "onnxruntime", "flatbuffers")
    model = _segmenter(tmp_path / "in", description | _OUTPUTS)
    out = str(tmp_path / "out")
    assert export.main([f"--checkpoint={tmp_path / 'in'}", f"--format={form}", f"--output={out}"]) == 0
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["differences"].keys() == {"classes", "probabilities"}
    assert about["largest_difference"] < 1e-4
    images = np.random.default_rng(1).integers(0, 256, (3, *model.image_format[0], 1), np.uint8)
    outputs, _ = verify.observed(form, model, out, images)  # three of them: the batch is free
    assert outputs["classes"].dtype == np.uint8
    assert outputs["classes"].shape == images.shape[:3]
    assert outputs["probabilities"].shape == (*images.shape[:3], 3)
    np.testing.assert_allclose(outputs["probabilities"].sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(outputs["classes"], outputs["probabilities"].argmax(axis=-1))
    assert len(np.unique(outputs["classes"])) > 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "it tells for every pixel whether it is of head, rest (1 to 2) or of the background (0)" in card
    assert ("# U-Net" if description["model"] == "unet" else "# ViT") in card


@pytest.mark.parametrize("form", ["onnx", "stablehlo"])
def test_an_exported_model_of_instances_gives_classes_and_masks_of_each_query(tmp_path, form):
    need("onnx", "onnxruntime", "flatbuffers")
    encoder = _VIT | {"image_size": [16, 32], "depth": 3, "norm_eps": 1e-3}
    head = {"kind": "queries", "width": 64, "queries": 5, "blocks": 2}
    description = {"model": "vit", "encoder": encoder, "task": "instances", "outputs": ["head", "rest"], "head": head}
    model = _segmenter(tmp_path / "in", description)
    out = str(tmp_path / "out")
    assert export.main([f"--checkpoint={tmp_path / 'in'}", f"--format={form}", f"--output={out}"]) == 0
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["differences"].keys() == {"probabilities", "masks"}
    assert about["largest_difference"] < 1e-4
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 32, 1), np.uint8)
    outputs, _ = verify.observed(form, model, out, images)
    assert outputs["probabilities"].shape == (3, 5, 2)
    assert outputs["masks"].shape == (3, 5, 16, 32)
    ours = model_function(model, answers)
    said = ours[0](ours[1], images)  # what predict makes of the same images, before it is enlarged
    np.testing.assert_allclose(outputs["probabilities"], said["classes"], atol=1e-4)
    assert np.ptp(outputs["masks"]) > 0.1
    assert "each of its 5 queries finds an instance of head, rest, or none" in (tmp_path / "out/README.md").read_text()


def test_other_formats_have_no_place_for_masks_and_safetensors_keeps_them(tmp_path, capsys):
    unet = {"model": "unet", "unet": {"channels": 1, "width": 4, "depth": 1}} | _OUTPUTS
    _segmenter(tmp_path / "unet", unet)
    model = _segmenter(tmp_path / "vit", {"model": "vit", "encoder": _VIT, "head": {"kind": "linear"}} | _OUTPUTS)
    for form in ("timm", "hf", "mae"):
        assert export.main([f"--checkpoint={tmp_path / 'vit'}", f"--format={form}"]) == 2
        assert f"another task than classification, which {form} has no place for" in capsys.readouterr().err
        assert export.main([f"--checkpoint={tmp_path / 'unet'}", f"--format={form}"]) == 2
        assert "a U-Net to safetensors, onnx and stablehlo" in capsys.readouterr().err
    for name in ("unet", "vit"):
        assert export.main([f"--checkpoint={tmp_path / name}", f"--output={tmp_path / name}-again"]) == 0
    assert open_model(f"{tmp_path / 'vit'}-again").fingerprint == model.fingerprint


def test_a_class_that_is_as_probable_is_no_difference():
    shares = np.array([[[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]], np.float32)
    ours = {"classes": np.array([[0, 1]], np.uint8), "probabilities": shares}
    for said, difference in (([[1, 1]], 0), ([[0, 0]], 0.6)):
        found = verify.largest_difference(ours, {"classes": np.array(said, np.uint8)})
        assert found["classes"] == pytest.approx(difference)
    for wrong in (np.array([[3, 1]], np.uint8), np.zeros((1, 1), np.uint8)):
        assert verify.largest_difference(ours, {"classes": wrong}) == {"classes": np.inf}


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
    manifest = pathlib.Path(sources[0].paths[0]).parent / "manifest.json"
    before = manifest.read_bytes() if manifest.exists() else None
    for content in ('{"licence": [1], "citation": 2}', "[" * 100_000):  # a stranger's: no lineage could be read again
        manifest.write_text(content)
        assert [(one["licence"], one["citation"]) for one in provenance.describe_data(sources)] == [("", "")]
    manifest.unlink() if before is None else manifest.write_bytes(before)
