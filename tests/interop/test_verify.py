"""An export that is not what it came from fails, leaves no weights, and says so."""

import json

import numpy as np
import pytest

from tests.interop import made
from tests.interop.torch_models import need
from usfmae_jax import convert, export
from usfmae_jax.interop import onnx, stablehlo, verify, writing
from usfmae_jax.interop.model import open_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    source = made.write(folder / "w.safetensors", made.tensors(decoder=False))
    assert convert.main([f"--input={source}", f"--output={folder / 'in'}", *made.HEADS]) == 0
    return folder / "in"


def test_an_export_that_differs_fails_and_leaves_no_weights(weights, tmp_path, capsys, monkeypatch):
    need("flatbuffers")
    write = stablehlo.write_stablehlo

    def wrong(model, directory):
        norm = model.params["encoder"]["norm"]
        norm["bias"] = norm["bias"] + 2e-4
        write(model, directory)

    monkeypatch.setitem(writing.WRITERS, "stablehlo", wrong)
    assert export.main([f"--checkpoint={weights}", "--format=stablehlo", f"--output={tmp_path / 'out'}"]) == 2
    assert "the export to stablehlo is 0.0002 off the model, more than 0.0001" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.stablehlo").exists()
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert 1e-4 < about["largest_difference"] < 3e-4


def test_what_is_no_number_or_of_another_shape_is_infinitely_far():
    ours = {"a": np.zeros(3), "b": np.zeros(3)}
    theirs = {"a": np.array([0, np.nan, 0]), "b": np.zeros((1, 3)), "c": np.zeros(1)}
    assert verify.largest_difference(ours, theirs) == {"a": np.inf, "b": np.inf, "c": np.inf}


def test_a_runtime_that_is_missing_is_said_in_export_json_and_on_the_card(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert export.main([f"--checkpoint={weights}", "--format=timm", f"--output={tmp_path / 'out'}"]) == 0
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["largest_difference"] is None
    assert "pip install" in about["not_compared"]
    assert "Not compared with another runtime" in (tmp_path / "out" / "README.md").read_text()


def test_onnx_without_its_package_is_refused_in_a_sentence(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert onnx.OPSET == 17
    assert export.main([f"--checkpoint={weights}", "--format=onnx", f"--output={tmp_path / 'out'}"]) == 2
    assert "needs the package onnx: pip install '.[interop]'" in capsys.readouterr().err


def test_stablehlo_without_its_package_is_refused_in_a_sentence(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stablehlo.importlib.util, "find_spec", lambda name: None)
    assert export.main([f"--checkpoint={weights}", "--format=stablehlo", f"--output={tmp_path / 'out'}"]) == 2
    assert "needs the package flatbuffers: pip install '.[interop]'" in capsys.readouterr().err


def test_a_head_for_another_task_gives_its_outputs_as_they_are(tmp_path, capsys):
    need("onnx", "onnxruntime", "flatbuffers")
    source = made.write(tmp_path / "w.safetensors", made.tensors(decoder=False, pool="mean", classes=1))
    assert convert.main([f"--input={source}", f"--output={tmp_path / 'in'}", *made.HEADS]) == 0
    about = tmp_path / "in" / "classifier" / "architecture.json"
    described = json.loads(about.read_text())
    del described["classes"]
    about.write_text(json.dumps(described | {"outputs": ["thickness in mm"]}))
    for form in ("safetensors", "onnx", "stablehlo"):
        arguments = [f"--checkpoint={tmp_path / 'in'}", f"--format={form}", f"--output={tmp_path / form}"]
        assert export.main(arguments) == 0
        assert "; it gives thickness in mm." in (tmp_path / form / "README.md").read_text()
        compared = json.loads((tmp_path / form / "export.json").read_text())["differences"].keys()
        assert form == "safetensors" or compared == {"outputs"}
    model = open_model(str(tmp_path / "safetensors"))
    images = verify.sample_images(model)
    outputs = stablehlo.run_stablehlo(str(tmp_path / "stablehlo"), images)["outputs"]
    assert outputs.shape == (2, 1)
    assert not np.isclose(outputs, 1).any()  # what a softmax would make of one output
    assert convert.main([f"--input={tmp_path / 'safetensors'}", f"--output={tmp_path / 'back'}"]) == 0
    assert open_model(str(tmp_path / "back")).description == model.description
    for form in ("timm", "hf", "mae"):
        arguments = [f"--checkpoint={tmp_path / 'in'}", f"--format={form}", f"--output={tmp_path / form}"]
        assert export.main(arguments) == 2
        assert f"another task than classification, which {form} has no place for" in capsys.readouterr().err
        assert not (tmp_path / form).exists()


def test_folders_that_cannot_be_exported_are_refused(weights, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    command = [f"--checkpoint={weights}", "--format=timm", f"--output={tmp_path / 'other'}"]
    assert export.main(command) == 2
    assert "holds something else (notes.txt)" in capsys.readouterr().err
    command = [f"--checkpoint={weights}", "--format=timm", f"--output={weights / 'encoder'}"]
    assert export.main(command) == 2
    assert "holds weights already (safetensors), not an export to timm" in capsys.readouterr().err
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "downloaded" / "model.safetensors").write_bytes(b"somebody's")
    assert export.main([f"--checkpoint={weights}", f"--output={tmp_path / 'downloaded'}"]) == 2
    assert "holds weights already (something else)" in capsys.readouterr().err
    assert export.main([f"--checkpoint={weights / 'encoder'}", "--step=3"]) == 2
    assert "has no steps to choose from" in capsys.readouterr().err
    assert export.main([f"--checkpoint={weights}", "--step=3", f"--output={tmp_path / 'x'}"]) == 2
    assert "has the checkpoints [0], not 3" in capsys.readouterr().err
