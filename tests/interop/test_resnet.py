"""ResNet weights come out of PyTorch's formats, or one sentence says why they do not."""

import builtins
import importlib.util
import pickle

import numpy as np
import pytest
import safetensors.numpy

from tests.models.make_resnet_golden import weights
from usfmae_jax.errors import InputError
from usfmae_jax.interop.model import flatten
from usfmae_jax.interop.resnet import architecture, read_resnet

DEPTHS = (1, 1, 1, 1)


@pytest.fixture(scope="module")
def state():
    return weights(DEPTHS)


def _save(tmp_path, state):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(state, path)
    return str(path)


def test_kernels_are_turned_and_statistics_set_apart(tmp_path, state):
    params, stats = read_resnet(_save(tmp_path, state), num_classes=1000)
    assert architecture(params) == {"channels": 3, "depths": [1, 1, 1, 1], "width": 64}
    np.testing.assert_array_equal(params["conv1"]["kernel"][2, 5, 1], state["conv1.weight"][:, 1, 2, 5])
    np.testing.assert_array_equal(params["head"]["kernel"], state["fc.weight"].T)
    assert set(stats["bn1"]) == {"mean", "var"}
    assert set(params["bn1"]) == {"scale", "bias"}


@pytest.mark.parametrize("classes", [0, 2])
def test_a_head_of_other_classes_is_left_out(tmp_path, state, classes):
    assert "head" not in read_resnet(_save(tmp_path, state), num_classes=classes)[0]


def test_one_channel_answers_as_three_equal_ones_do(tmp_path, state):
    path = _save(tmp_path, state)
    three, one = (read_resnet(path, grey=grey)[0]["conv1"]["kernel"] for grey in (False, True))
    assert (three.shape[2], one.shape[2]) == (3, 1)
    grey = np.random.default_rng(0).normal(size=(7, 7, 1))
    answer = np.tensordot(np.repeat(grey, 3, axis=2), three, 3)
    np.testing.assert_allclose(np.tensordot(grey, one, 3), answer, rtol=1e-4, atol=1e-4)


def test_other_networks_are_named(tmp_path, state):
    path = _save(tmp_path, {name: value for name, value in state.items() if "conv3" not in name})
    with pytest.raises(InputError, match="does not hold a ResNet with bottleneck blocks"):
        read_resnet(path)
    path = _save(tmp_path, {name: value for name, value in state.items() if name != "layer2.0.bn2.running_var"})
    with pytest.raises(InputError, match=r"layer2\.0\.bn2\.var is missing there"):
        read_resnet(path)
    path = _save(tmp_path, state | {"layer1.0.se.fc1.weight": np.zeros((4, 256), np.float32)})
    with pytest.raises(InputError, match=r"layer1\.0\.se\.fc1\.kernel is \(256, 4\) there and not part of"):
        read_resnet(path)


def test_files_that_are_no_weights_get_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist; give a"):
        read_resnet(str(tmp_path / "none.pth"))
    for name in ("broken.safetensors", "weights.h5"):
        (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(InputError, match="is no whole safetensors file"):
        read_resnet(str(tmp_path / "broken.safetensors"))
    with pytest.raises(InputError, match=r"give a \.safetensors, \.pth or \.pt file"):
        read_resnet(str(tmp_path / "weights.h5"))
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(
        InputError,
        match=r"needs PyTorch: pip install '.\[interop\]' in the folder of usfmae_jax, or convert it to safetensors",
    ):
        read_resnet(str(tmp_path / "weights.pth"))


class _Harm:
    def __reduce__(self):
        return (print, ("executed",))


def test_pytorch_files_are_read_and_nothing_in_them_is_executed(tmp_path, state, capsys):
    if not importlib.util.find_spec("torch"):
        pytest.skip("reading .pth needs torch: pip install torch")
    import torch

    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": torch.from_numpy(v) for k, v in state.items()}}, path)
    expected = read_resnet(_save(tmp_path, state), num_classes=1000)
    for a, b in zip(read_resnet(str(path), num_classes=1000), expected, strict=True):
        a, b = flatten(a), flatten(b)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)
    for content, message in ((pickle.dumps(_Harm(), 2), "holds code"), (b"no weights", "is no whole PyTorch file")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_resnet(str(path))
    assert capsys.readouterr().out == ""
    torch.save(torch.zeros(3), path)
    with pytest.raises(InputError, match="holds no tensors by name"):
        read_resnet(str(path))
