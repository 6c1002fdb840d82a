"""Writes `golden/resnet50_names.txt`, torchvision's names and shapes, and `golden/resnet.npz`, what it computes.

pip install torch torchvision
python -m tests.models.make_resnet_golden
"""

import pathlib
import zlib

import numpy as np

from usfmae_jax.interop.verify import declare_torchvision

NAMES = pathlib.Path(__file__).parent / "golden" / "resnet50_names.txt"
GOLDEN = pathlib.Path(__file__).parent / "golden" / "resnet.npz"
DEPTHS = (1, 2, 1, 1)  # of the golden file: blocks with and without a stride and a projection
RESNET50 = (3, 4, 6, 3)


def names() -> dict[str, tuple[int, ...]]:
    """The committed list: torchvision's names of a ResNet-50 and their shapes."""
    lines = [line.split() for line in NAMES.read_text().splitlines()]
    return {name: tuple(map(int, shape)) for name, *shape in lines}


def weights(depths: tuple[int, ...] = DEPTHS) -> dict[str, np.ndarray]:
    """Weights under torchvision's names that depend on the name only, so that no file has to hold them."""
    return {name: _weight(name, shape) for name, shape in names().items() if _belongs(name, depths)}


def _belongs(name: str, depths: tuple[int, ...]) -> bool:
    return not name.startswith("layer") or int(name.split(".")[1]) < depths[int(name[5]) - 1]


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
    return (rng.standard_normal(shape, np.float32) * scale).astype(np.float32)


def images(count: int = 4, side: int = 64) -> np.ndarray:
    """float32 `[count, side, side, 3]`."""
    return np.random.default_rng(0).standard_normal((count, side, side, 3), np.float32)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a gradient is multiplied with to be stored as one number; `name` and shape are torch's."""
    return np.random.default_rng(zlib.crc32(name.encode()) + 1).standard_normal(shape, np.float32)


def reference(depths: tuple[int, ...] = DEPTHS, train: bool = True) -> dict[str, np.ndarray]:
    """Runs torchvision's network.

    Returns:
      `features` and `logits` of evaluation; with `train` also one training step's `loss` (mean squared logit, scaled),
      running statistics (`stats/...`) and, for every parameter's gradient, its norm and its product with `direction`
      (`grads/...`), all of them in float64: normalising over a batch of four turns the last bits of float32 into 0.3%
      of a product, in PyTorch too.
    """
    import torch

    declare_torchvision()
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, list(depths))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights(depths).items()})
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2)
    seen = []
    model.fc.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().numpy()))
    with torch.no_grad():
        logits = model.eval()(pixels).numpy()
    found = {"features": seen[0], "logits": logits}
    if not train:
        return found
    loss = model.double().train()(pixels.double()).square().mean()
    loss.backward()
    found["loss"] = loss.detach().numpy()
    found |= {f"stats/{k}": v.numpy() for k, v in model.state_dict().items() if "running" in k}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        product = np.vdot(gradient, direction(name, gradient.shape))
        found[f"grads/{name}"] = np.asarray([np.linalg.norm(gradient), product])
    return found


if __name__ == "__main__":
    declare_torchvision()
    from torchvision.models import resnet50

    GOLDEN.parent.mkdir(exist_ok=True)
    state = resnet50().state_dict()
    NAMES.write_text("".join(" ".join(map(str, (name, *value.shape))) + "\n" for name, value in state.items()))
    np.savez_compressed(GOLDEN, **reference())
    print(f"wrote {NAMES.name}, and {GOLDEN.name} with {GOLDEN.stat().st_size / 1e3:.0f} kB")
