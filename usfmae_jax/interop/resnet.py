"""ResNet-50 weights from PyTorch files under torchvision's names, which timm shares."""

import os
import re
from typing import Any

import numpy as np
from flax import nnx

from usfmae_jax.errors import InputError
from usfmae_jax.interop.files import TORCH, Tensors, open_safetensors, open_torch
from usfmae_jax.interop.model import flatten, unflatten
from usfmae_jax.models.resnet import STAGES, ResNet

RUNNING = {"running_mean": "mean", "running_var": "var"}


def read_resnet(path: str, *, num_classes: int = 0, grey: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the weights of a ResNet with bottleneck blocks.

    Args:
      path: a `.safetensors` file, or a PyTorch file (`files.TORCH`), which requires PyTorch; no code in it is executed.
      num_classes: the head is kept only if it has that many outputs; 0 = always left out.
      grey: convert a first convolution of three channels to grey images by summing its kernels: with the same mean
        and deviation for all channels, the result equals that for the grey image repeated three times.

    Returns:
      parameters and running statistics of a `models.resnet.ResNet`, float32, without `head` if it is left out.

    Raises:
      InputError: no such file, PyTorch is required but missing, or the weights are not those of such a ResNet.
    """
    params: dict[str, np.ndarray] = {}
    stats: dict[str, np.ndarray] = {}
    for name, lazy in _read_tensors(path).items():
        plain = re.sub(r"^((module|_orig_mod|model|net|backbone|encoder)\.)+(?=(conv1|bn1|layer\d|fc)\.)", "", name)
        parent, _, last = plain.rpartition(".")
        parent = "head" if parent == "fc" else parent
        tensor = np.array(lazy.read())  # a copy, since the file may be memory-mapped
        if last in RUNNING:
            stats[f"{parent}.{RUNNING[last]}"] = tensor
        elif last == "weight" and tensor.ndim == 1:
            params[f"{parent}.scale"] = tensor
        elif last == "weight":  # [out, in, ...] there, [..., in, out] here
            params[f"{parent}.kernel"] = tensor.transpose(*range(2, tensor.ndim), 1, 0)
        elif last != "num_batches_tracked":  # stored as a floating-point number in some files
            params[f"{parent}.{last}"] = tensor
    if params.get("head.bias", np.zeros(0)).shape != (num_classes,) or not num_classes:
        params = {name: value for name, value in params.items() if not name.startswith("head.")}
    _check(path, params, stats)
    if grey and params["conv1.kernel"].shape[2] == 3:
        params["conv1.kernel"] = params["conv1.kernel"].sum(axis=2, keepdims=True)
    return unflatten(params), unflatten(stats)


def architecture(params: Any) -> dict[str, Any]:
    """The arguments of `ResNet` that determine the shapes of these parameters: channels, depths and width."""
    channels, width = params["conv1"]["kernel"].shape[2:]
    depths = [len(params[f"layer{stage + 1}"]) for stage in range(STAGES)]
    return {"channels": channels, "depths": depths, "width": width}


def _read_tensors(path: str) -> Tensors:
    """The floating-point tensors of a file, by name."""
    if not os.path.isfile(path):
        raise InputError(f"{path} does not exist; give a .safetensors, .pth or .pt file")
    if path.endswith(".safetensors"):
        return open_safetensors(path)[0]
    if not path.endswith(TORCH):
        raise InputError(f"{path} has an unknown kind of weights; give a .safetensors, .pth or .pt file")
    return open_torch(path)[0]


def _check(path: str, params: dict[str, np.ndarray], stats: dict[str, np.ndarray]) -> None:
    """Raises InputError unless names and shapes are those of a ResNet with bottleneck blocks."""
    depths = [
        len({match[1] for name in params if (match := re.match(rf"layer{stage + 1}\.(\d+)\.conv3\.", name))})
        for stage in range(STAGES)
    ]
    stem = params.get("conv1.kernel", np.zeros(0)).shape
    if len(stem) != 4 or not all(depths):
        raise InputError(f"{path} does not hold a ResNet with bottleneck blocks such as ResNet-50")

    def build() -> ResNet:
        return ResNet(num_classes=1, channels=stem[2], depths=depths, width=stem[3], rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    expected = {
        name: leaf.shape
        for kind in (nnx.Param, nnx.BatchStat)
        for name, leaf in flatten(nnx.to_pure_dict(nnx.state(model, kind))).items()
        if not name.startswith("head.")
    }
    found = {name: value.shape for name, value in (params | stats).items() if not name.startswith("head.")}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"{path} does not hold a plain ResNet: {name} is {found.get(name, 'missing')} there "
                f"and {expected.get(name, 'not part')} of a ResNet with {'-'.join(map(str, depths))} blocks"
            )
    if "head.kernel" in params and params["head.kernel"].shape != (32 * stem[3], *params["head.bias"].shape):
        raise InputError(f"{path} has a head of {params['head.kernel'].shape} where {32 * stem[3]} features come in")
