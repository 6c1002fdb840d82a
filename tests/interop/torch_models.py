"""Models of other libraries with random weights in the true names, for live comparisons; skips where there are none."""

import importlib.util
import pathlib
from typing import Any

import pytest

from usfmae_jax.interop.verify import declare_torchvision

#: Small, and nothing in it equal to something else, so that a mix-up shows.
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}
IMAGES = {"image_size": 32, "patch_size": 8, "num_channels": 3, "layer_norm_eps": 1e-6}


def need(*packages: str) -> None:
    """Skips the test unless the packages are installed."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: pip install -r requirements-interop.txt")


def randomise(model: Any, seed: int = 0) -> Any:
    """Moves every trainable parameter away from where it starts, so that a mix-up shows."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def vit_mae(seed: int = 0, **changes: Any) -> Any:
    """Hugging Face's ViTMAE with its fixed position tables."""
    need("torch", "transformers")
    declare_torchvision()
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZE | DECODER | IMAGES | {"norm_pix_loss": True} | changes))
    # Built from a config the position tables are left at zero; the published weights come with them.
    for part in (model.vit.embeddings.patch_embeddings.projection, *model.parameters()):
        part._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(model.vit.embeddings.patch_embeddings.num_patches)
    return randomise(model, seed)


def original_state(model: Any) -> dict[str, Any]:
    """The state dict of a `vit_mae` under the names of the original code, written down by hand."""
    import torch

    # What version 4 of transformers calls differently from version 5, which is written down below.
    newer = {"attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    newer |= {f"attention.attention.{name}": f"attention.{name[0]}_proj" for name in ("query", "key", "value")}
    newer |= {"vit.encoder.layer.": "vit.layers."}
    old = {}
    for name, value in model.state_dict().items():
        for theirs, ours in newer.items():
            name = name.replace(theirs, ours)
        old[name] = value

    def block(theirs: str) -> dict[str, Any]:
        parts = {
            "norm1": "layernorm_before", "attn.proj": "attention.o_proj", "norm2": "layernorm_after",
            "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        }  # fmt: skip
        new = {f"{a}.{leaf}": old[f"{theirs}.{b}.{leaf}"] for a, b in parts.items() for leaf in ("weight", "bias")}
        for leaf in ("weight", "bias"):
            new[f"attn.qkv.{leaf}"] = torch.cat([old[f"{theirs}.attention.{x}_proj.{leaf}"] for x in "qkv"])
        return new

    pairs = {
        "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "norm.weight": "vit.layernorm.weight", "norm.bias": "vit.layernorm.bias",
        "mask_token": "decoder.mask_token", "decoder_pos_embed": "decoder.decoder_pos_embed",
    }  # fmt: skip
    for name in ("decoder_embed", "decoder_norm", "decoder_pred"):
        pairs |= {f"{name}.{leaf}": f"decoder.{name}.{leaf}" for leaf in ("weight", "bias")}
    new = {name: old[theirs] for name, theirs in pairs.items()}
    for kind, theirs, depth in (("blocks", "vit.layers", 2), ("decoder_blocks", "decoder.decoder_layers", 1)):
        for i in range(depth):
            new |= {f"{kind}.{i}.{k}": v for k, v in block(f"{theirs}.{i}").items()}
    return {name: value.clone() for name, value in new.items()}


def saved(model: Any, folder: pathlib.Path) -> str:
    """Saves it as its own library does; returns the folder."""
    model.save_pretrained(folder)
    return str(folder)
