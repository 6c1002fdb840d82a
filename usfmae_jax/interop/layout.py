"""Between the original MAE parameters, in PyTorch's layout, and ours.

Ours: kernels `[in, out]`; the patch kernel flattened to `[P*P*C, D]` in row, column, channel order; the blocks stacked
along a first axis. Everything is moved, nothing is computed: there and back is bitwise the same.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from usfmae_jax.interop.tensors import Tensor, Tensors

#: Parts of a block, and what stands outside the blocks: the original name and ours.
_BLOCK = {
    "norm1": "norm1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "norm2", "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}  # fmt: skip
_OUTSIDE = {
    "cls_token": "encoder.cls_token",
    "position": "encoder.position",  # only of a learned table; see `reading`
    "patch_embed.proj": "encoder.patch_embed",
    "norm": "encoder.norm",
    "mask_token": "decoder.mask_token",
    "decoder_embed": "decoder.embed",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "decoder.pred",
    "fc_norm": "head_norm",
    "head": "head",
}
_ORIGINAL_BLOCK = {ours: theirs for theirs, ours in _BLOCK.items()}
_ORIGINAL_OUTSIDE = {ours: theirs for theirs, ours in _OUTSIDE.items()}
_TOKENS = ("cls_token", "mask_token", "position")
#: Position tables, with a row for the class token. Ours: fixed, or the parameter `encoder.position` without that row.
TABLES = ("pos_embed", "decoder_pos_embed")


def expected_shapes(architecture: dict[str, Any], decoder: dict[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of an encoder, and of a decoder unless it is None, under the original names.

    Args:
      architecture: arguments of `vit.ViT`.
      decoder: `decoder_width`, `decoder_depth` and so on, as arguments of `mae.MAE`.
    """
    width, patch, channels = architecture["width"], architecture["patch_size"], architecture["channels"]
    ratio = architecture["mlp_ratio"]
    shapes = {"cls_token": (1, 1, width), **_linear("patch_embed.proj", (width, channels, patch, patch))}
    shapes |= _blocks("blocks", width, architecture["depth"], ratio) | _norm("norm", width)
    if architecture.get("learned_positions"):
        rows, columns = (side // patch for side in architecture["image_size"])
        shapes["position"] = (rows * columns, width)
    if decoder is None:
        return shapes
    narrow = decoder["decoder_width"]
    shapes |= {"mask_token": (1, 1, narrow), **_linear("decoder_embed", (narrow, width))}
    shapes |= _blocks("decoder_blocks", narrow, decoder["decoder_depth"], ratio) | _norm("decoder_norm", narrow)
    return shapes | _linear("decoder_pred", (patch * patch * channels, narrow))


def _linear(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(name: str, width: int, depth: int, ratio: float) -> dict[str, tuple[int, ...]]:
    hidden = int(width * ratio)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        block = f"{name}.{i}."
        shapes |= _norm(block + "norm1", width) | _linear(block + "attn.qkv", (3 * width, width))
        shapes |= _linear(block + "attn.proj", (width, width)) | _norm(block + "norm2", width)
        shapes |= _linear(block + "mlp.fc1", (hidden, width)) | _linear(block + "mlp.fc2", (width, hidden))
    return shapes


def to_ours(original: Tensors) -> dict[str, np.ndarray]:
    """Parameters under our names, `encoder.`, `decoder.`, `head_norm.` and `head.`, from the original ones.

    Tensors are read one at a time into the stacked arrays, so that the parameters are in memory once.
    """
    depths: dict[str, int] = {}
    for name in original:
        if match := re.match(r"((?:decoder_)?blocks)\.(\d+)\.", name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    ours: dict[str, np.ndarray] = {}
    for name, tensor in original.items():
        new, index = _our_name(name)
        value = _to_ours(name, tensor.read())
        if index is None:
            ours[new] = np.array(value, np.float32, order="C")  # a copy: the file may be mapped into memory
            continue
        if new not in ours:
            depth = depths["decoder_blocks" if new.startswith("decoder") else "blocks"]
            ours[new] = np.empty((depth, *value.shape), np.float32)
        ours[new][index] = value
    return ours


def to_original(ours: dict[str, np.ndarray]) -> Tensors:
    """The inverse of `to_ours`; values are laid out when they are read."""
    original: Tensors = {}
    for name, array in ours.items():
        stem, _, leaf = name.rpartition(".")
        token = name.endswith(_TOKENS)
        leaf = leaf if leaf == "bias" else "weight"
        match = re.fullmatch(r"(encoder|decoder)\.blocks\.stack\.(.+)", stem)
        if not match:
            new = _ORIGINAL_OUTSIDE[name] if token else f"{_ORIGINAL_OUTSIDE[stem]}.{leaf}"
            original[new] = _laid_out(name, array)
            continue
        blocks = "blocks" if match[1] == "encoder" else "decoder_blocks"
        for i, layer in enumerate(array):
            original[f"{blocks}.{i}.{_ORIGINAL_BLOCK[match[2]]}.{leaf}"] = _laid_out(name, layer)
    return original


def with_patch_kernel(original: Tensors, patch_size: int, channels: int) -> Tensors:
    """Gives the patch kernel, which ours holds flattened, its shape `[D, C, P, P]`."""
    kernel = original["patch_embed.proj.weight"]
    width = kernel.shape[0]

    def read() -> np.ndarray:
        return kernel.read().reshape(width, patch_size, patch_size, channels).transpose(0, 3, 1, 2)

    return original | {"patch_embed.proj.weight": Tensor((width, channels, patch_size, patch_size), read)}


def _our_name(name: str) -> tuple[str, int | None]:
    if name in _TOKENS:
        return _OUTSIDE[name], None
    stem, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", stem)
    part = match[3] if match else stem
    leaf = (
        leaf
        if leaf == "bias"
        else "scale"
        if part.rpartition(".")[2].endswith(("norm", "norm1", "norm2"))
        else "kernel"
    )
    if not match:
        return f"{_OUTSIDE[stem]}.{leaf}", None
    return f"{'decoder' if match[1] else 'encoder'}.blocks.stack.{_BLOCK[part]}.{leaf}", int(match[2])


def _to_ours(name: str, value: np.ndarray) -> np.ndarray:
    if name == "patch_embed.proj.weight":  # [D, C, P, P]
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.T if value.ndim == 2 and name.endswith("weight") else value


def _laid_out(name: str, array: np.ndarray) -> Tensor:
    layout: Callable[[np.ndarray], np.ndarray] = np.transpose if name.endswith("kernel") else np.asarray
    return Tensor(layout(array).shape, lambda: layout(array))
