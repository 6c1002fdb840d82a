"""Writes `golden/hf_vit_mae.npz`: a small Hugging Face ViTMAE in PyTorch, its loss and gradients for one batch.

pip install torch transformers
python -m tests.models.make_golden
"""

import pathlib

import numpy as np

from usfmae_jax.interop.verify import declare_torchvision

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf_vit_mae.npz"
SIZE = {
    "image_size": (32, 32), "patch_size": 8, "channels": 3, "width": 32, "depth": 2, "num_heads": 4,
    "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip
MASK_RATIO = 0.75


def reference(seed: int = 0) -> dict[str, np.ndarray]:
    """Runs PyTorch; returns images `[B, H, W, C]`, noise `[B, N]`, loss, prediction, and parameters and their
    gradients under our names with the prefixes `params/` and `grads/`."""
    import torch

    declare_torchvision()
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(seed)
    config = ViTMAEConfig(
        hidden_size=SIZE["width"],
        num_hidden_layers=SIZE["depth"],
        num_attention_heads=SIZE["num_heads"],
        intermediate_size=4 * SIZE["width"],
        decoder_hidden_size=SIZE["decoder_width"],
        decoder_num_hidden_layers=SIZE["decoder_depth"],
        decoder_num_attention_heads=SIZE["decoder_num_heads"],
        decoder_intermediate_size=4 * SIZE["decoder_width"],
        image_size=SIZE["image_size"][0],
        patch_size=SIZE["patch_size"],
        num_channels=SIZE["channels"],
        layer_norm_eps=1e-6,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
        attn_implementation="eager",
    )
    model = ViTMAEForPreTraining(config).eval()
    # Built from a config the position tables are left at zero; the published weights come with them.
    for part in (model.vit.embeddings.patch_embeddings.projection, *model.parameters()):
        part._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(model.vit.embeddings.patch_embeddings.num_patches)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1, so that a mix-up shows
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(4, SIZE["channels"], *SIZE["image_size"])
    noise = torch.rand(4, (SIZE["image_size"][0] // SIZE["patch_size"]) ** 2)
    output = model(images, noise=noise)
    output.loss.backward()
    values = {k: v.detach().numpy() for k, v in model.named_parameters() if v.requires_grad}
    gradients = {k: v.grad.numpy() for k, v in model.named_parameters() if v.requires_grad}
    return {
        "images": images.permute(0, 2, 3, 1).numpy(),
        "noise": noise.numpy(),
        "loss": output.loss.detach().numpy(),
        "prediction": output.logits.detach().numpy(),
        "positions": model.vit.embeddings.position_embeddings[0, 1:].detach().numpy(),
        **{f"params/{k}": v for k, v in our_names(values).items()},
        **{f"grads/{k}": v for k, v in our_names(gradients).items()},
    }


def our_names(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's parameters under our names: `[in, out]` kernels, one qkv matrix, stacked layers."""

    def linear(prefix: str) -> dict[str, np.ndarray]:
        return {"kernel": hf[f"{prefix}.weight"].T, "bias": hf[f"{prefix}.bias"]}

    def norm(prefix: str) -> dict[str, np.ndarray]:
        return {"scale": hf[f"{prefix}.weight"], "bias": hf[f"{prefix}.bias"]}

    def block(prefix: str) -> dict[str, np.ndarray]:
        qkv = [linear(f"{prefix}.attention.{name}_proj") for name in "qkv"]
        parts = {
            "attn.qkv": {key: np.concatenate([part[key] for part in qkv], axis=-1) for key in ("kernel", "bias")},
            "attn.proj": linear(f"{prefix}.attention.o_proj"),
            "norm1": norm(f"{prefix}.layernorm_before"),
            "norm2": norm(f"{prefix}.layernorm_after"),
            "fc1": linear(f"{prefix}.mlp.fc1"),
            "fc2": linear(f"{prefix}.mlp.fc2"),
        }
        return {f"{part}.{key}": value for part, leaves in parts.items() for key, value in leaves.items()}

    def stack(prefix: str, depth: int) -> dict[str, np.ndarray]:
        blocks = [block(f"{prefix}.{i}") for i in range(depth)]
        return {f"blocks.stack.{key}": np.stack([b[key] for b in blocks]) for key in blocks[0]}

    patch = hf["vit.embeddings.patch_embeddings.projection.weight"]  # [D, C, P, P]
    encoder = {
        "cls_token": hf["vit.embeddings.cls_token"],
        "patch_embed.kernel": patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0]),
        "patch_embed.bias": hf["vit.embeddings.patch_embeddings.projection.bias"],
        **stack("vit.layers", SIZE["depth"]),
        **{f"norm.{k}": v for k, v in norm("vit.layernorm").items()},
    }
    decoder = {
        "mask_token": hf["decoder.mask_token"],
        **{f"embed.{k}": v for k, v in linear("decoder.decoder_embed").items()},
        **stack("decoder.decoder_layers", SIZE["decoder_depth"]),
        **{f"norm.{k}": v for k, v in norm("decoder.decoder_norm").items()},
        **{f"pred.{k}": v for k, v in linear("decoder.decoder_pred").items()},
    }
    return {f"encoder.{k}": v for k, v in encoder.items()} | {f"decoder.{k}": v for k, v in decoder.items()}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **reference())
    print(f"wrote {GOLDEN.name}, {GOLDEN.stat().st_size / 1e3:.0f} kB")
