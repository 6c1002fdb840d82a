"""Models of the PyTorch sides: a careful implementation of the same vision transformer, and Hugging Face's.

Fused query-key-value projection, `scaled_dot_product_attention`, patch embedding as a strided convolution.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm block, `[B, N, D] -> [B, N, D]`; `drop_path` drops both branches per sample while training."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.num_heads, self.drop_path = num_heads, drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention, then MLP."""
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self._drop(self.proj(attended))
        return x + self._drop(self.fc2(functional.gelu(self.fc1(self.norm2(x)))))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class ViT(nn.Module):
    """Maps `[B, C, H, W]` to the mean of the patch tokens after the norm, or to logits if there are classes."""

    def __init__(self, architecture: dict[str, Any], classes: int = 0, drop_path: float = 0.0):
        super().__init__()
        size, patch = architecture["image_size"], architecture["patch_size"]
        width, depth = architecture["width"], architecture["depth"]
        self.register_buffer("position", torch.zeros(1, size[0] // patch * (size[1] // patch), width))
        self.patch_embed = nn.Conv2d(architecture["channels"], width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        rates = np.linspace(0, drop_path, depth)
        heads, ratio = architecture["num_heads"], architecture.get("mlp_ratio", 4.0)
        self.blocks = nn.ModuleList(Block(width, heads, ratio, float(rate)) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes) if classes else None
        if self.head is not None:
            nn.init.trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, or logits from the norm of the mean."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.position
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        if self.head is None:
            return self.norm(x)[:, 1:].mean(dim=1)
        return self.head(self.norm(x[:, 1:].mean(dim=1)))


def load_encoder(model: ViT, directory: str | pathlib.Path) -> ViT:
    """Loads the weights of an encoder directory, and the position table `position.npy` beside them, into a model."""
    flat = load_file(pathlib.Path(directory) / "model.safetensors")
    with torch.no_grad():
        model.position.copy_(torch.from_numpy(np.load(pathlib.Path(directory) / "position.npy")))
        for name, target in model.named_parameters():
            if not name.startswith("head."):
                target.copy_(torch.tensor(_translate(name, flat, target.shape)))
    return model


def _translate(name: str, flat: dict[str, np.ndarray], shape: Sequence[int]) -> np.ndarray:
    if name == "cls_token":
        return flat[name]
    module, _, kind = name.rpartition(".")
    leaf = {"weight": "scale" if "norm" in module else "kernel", "bias": "bias"}[kind]
    if module.startswith("blocks."):
        _, number, part = module.split(".")
        part = f"attn.{part}" if part in ("qkv", "proj") else part
        value = flat[f"blocks.stack.{part}.{leaf}"][int(number)]
    else:
        value = flat[f"{module}.{leaf}"]
    if module == "patch_embed" and leaf == "kernel":  # its rows are in row, column, channel order
        width, channels, height, _ = shape
        return value.reshape(height, height, channels, width).transpose(3, 2, 0, 1)
    return value.T if leaf == "kernel" else value


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Converts uint8 `[B, C, H, W]` to normalised float32; grey is repeated to the number of channels in `mean`."""
    shape = (1, -1, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def transformers() -> Any:
    """Hugging Face's package, without torchvision, which is not needed here and cannot be imported if it was built for
    another PyTorch.
    """
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    import transformers

    return transformers


def vit_mae(config: Any) -> Any:
    """Hugging Face's ViTMAE with the architecture of one of our configs and random weights."""
    model, library = config.model, transformers()
    shape = library.ViTMAEConfig(
        image_size=model.image_size[0],
        patch_size=model.patch_size,
        num_channels=model.channels,
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        intermediate_size=int(model.width * model.mlp_ratio),
        decoder_hidden_size=model.decoder_width,
        decoder_num_hidden_layers=model.decoder_depth,
        decoder_num_attention_heads=model.decoder_num_heads,
        decoder_intermediate_size=int(model.decoder_width * model.mlp_ratio),
        mask_ratio=config.mask.ratio,
        norm_pix_loss=config.loss.normalize_targets,
        layer_norm_eps=1e-6,
    )
    built = library.ViTMAEForPreTraining(shape)
    # A model built from a config has zero position tables; the published weights include them.
    for part in (built.vit.embeddings.patch_embeddings.projection, *built.parameters()):
        part._is_hf_initialized = False
    built.vit.embeddings.initialize_weights()
    built.decoder.initialize_weights(built.vit.embeddings.patch_embeddings.num_patches)
    return built
