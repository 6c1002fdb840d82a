"""PyTorch files: tensors are read, and nothing that they hold is executed."""

import argparse
import os
import pathlib
import pickle
import sys
import zipfile

import numpy as np
import pytest

from tests.interop import made
from tests.interop.torch_models import need
from usfmae_jax import convert
from usfmae_jax.errors import InputError
from usfmae_jax.interop.files import open_torch


class Attack:
    """Unpickled, it would create a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_without_pytorch_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"anything")
    assert convert.main([f"--input={tmp_path / 'weights.pth'}", f"--output={tmp_path / 'out'}"]) == 2
    assert "needs PyTorch: pip install '.[interop]'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bare pickle", "other pickle", "torch.save", "among tensors", "old format"])
def test_code_in_a_file_does_not_run(tmp_path, kind, capsys):
    need("torch")
    import torch

    attack, path = Attack(tmp_path / "ran"), tmp_path / "weights.pth"
    if kind.endswith("pickle"):  # torch.save writes protocol 2, and nothing else is even looked into
        path.write_bytes(pickle.dumps({"model": attack}, protocol=2 if kind == "bare pickle" else 4))
    else:
        content = {"model": {"cls_token": torch.zeros(1, 1, 4)}, "args": attack} if kind == "among tensors" else attack
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old format")
    assert convert.main([f"--input={path}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    said = (
        "is no whole PyTorch file"
        if kind == "other pickle"
        else "holds code (posix.mkdir) beside tensors, which is not"
    )
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(attack))  # it is an attack: where pickles are run, it works
    assert (tmp_path / "ran").exists()


def test_files_that_are_not_whole_are_refused(tmp_path):
    need("torch")
    import torch

    path = tmp_path / "weights.pth"
    torch.save({"model": {"a": torch.ones(1000)}}, path)
    whole = path.read_bytes()
    for content in (whole[:-200], whole[:100], b"", b"\x80\x02garbage", bytes(reversed(whole))):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no whole PyTorch file of tensors"):
            open_torch(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not weights")
    with pytest.raises(InputError, match="is no whole PyTorch file of tensors"):
        open_torch(str(path))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": "text"}}, {1: 2}], ids=str)
def test_files_without_tensors_are_refused(tmp_path, content):
    need("torch")
    import torch

    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="holds no tensors by name"):
        open_torch(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("nested", ["", "model", "state_dict"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_state_dicts_are_found_and_become_float32(tmp_path, nested, dtype):
    need("torch")
    import torch

    values = torch.arange(6, dtype=getattr(torch, dtype)).reshape(2, 3)
    state = {
        "weight": values,
        "transposed": values.T,
        "parameter": torch.nn.Parameter(values),
        "steps": torch.ones(1).int(),
    }
    # What training scripts keep; holds no code.
    about = {"optimizer": {}, "args": argparse.Namespace(lr=1e-3), "best": np.float64(0.5), "step": np.int64(3)}
    torch.save({nested: state, **about} if nested else state, tmp_path / "weights.pt")
    found, _ = open_torch(str(tmp_path / "weights.pt"))
    assert found.keys() == {"weight", "transposed", "parameter"}
    for name, expected in (("weight", np.arange(6).reshape(2, 3)), ("transposed", np.arange(6).reshape(2, 3).T)):
        value = found[name].read()
        assert value.dtype == np.float32
        assert found[name].shape == value.shape
        np.testing.assert_array_equal(value, expected)


def test_a_pytorch_file_and_a_safetensors_file_give_the_same_bits(tmp_path):
    need("torch")
    import torch

    from usfmae_jax.interop.checkpoint import load_parameters
    from usfmae_jax.interop.model import flatten

    found = made.tensors()
    made.write(tmp_path / "a.safetensors", found)
    # As DistributedDataParallel leaves the names.
    state = {f"module.{name}": torch.from_numpy(tensor.read().copy()) for name, tensor in found.items()}
    torch.save({"model": state, "epoch": 799}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        assert convert.main([f"--input={tmp_path / name}", f"--output={tmp_path / name[0]}", *made.HEADS]) == 0
    first, second = (flatten(load_parameters(str(tmp_path / name))[0]) for name in "ab")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


FRAMES = {
    "lightning": (lambda plain, ema: {"state_dict": {f"model.{k}": v for k, v in plain.items()}, "epoch": 1}, ".ckpt"),
    "compiled": (lambda plain, ema: {"model": {f"_orig_mod.module.{k}": v for k, v in plain.items()}}, ".pth.tar"),
    "around": (lambda plain, ema: {f"encoder.{k}": v for k, v in plain.items()}, ".bin"),
    "both": (lambda plain, ema: {"state_dict": plain, "state_dict_ema": ema}, ".pth.tar"),
    "wrapped twice": (lambda plain, ema: {"model": plain, "ema": {"decay": 0.9, "module": ema}}, ".pt"),
    "average alone": (lambda plain, ema: {"model_ema": ema}, ".pth"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_files_of_training_scripts_are_read_as_they_are(tmp_path, name, capsys):
    need("torch")
    import torch

    from usfmae_jax.interop.model import flatten, open_model

    plain = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in made.tensors().items()}
    ema = {name: value + (not name.endswith("pos_embed")) for name, value in plain.items()}
    frame, suffix = FRAMES[name]
    path = tmp_path / f"weights{suffix}"
    torch.save(frame(plain, ema), path)

    def convert_it(*flags):
        status = convert.main([f"--input={path}", f"--output={tmp_path / 'out'}", *made.HEADS, *flags])
        return status, capsys.readouterr().err

    def bias():
        return flatten(open_model(str(tmp_path / "out")).params)["encoder.norm.bias"]

    status, said = convert_it()
    assert status == 0, said
    assert "not understood" not in said
    alone = name == "average alone"
    np.testing.assert_array_equal(bias(), (ema if alone else plain)["norm.bias"])
    status, said = convert_it("--ema")
    if name in ("both", "wrapped twice", "average alone"):
        assert status == 0
        assert "the averaged weights in it are taken (" in said
        np.testing.assert_array_equal(bias(), ema["norm.bias"])
        if not alone:
            assert "the plain weights in it are taken (" in convert_it()[1]
    else:
        assert (status, "holds no averaged weights" in said) == (2, True)
