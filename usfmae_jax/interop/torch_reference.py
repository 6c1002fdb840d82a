"""Reference implementation of MAE (He et al. 2022) in PyTorch, under the original names, to verify exports.

It shares no code with `models`, so that an error in either of them shows.
"""

from typing import Any


def encode(state: dict[str, Any], images: Any, heads: int, keep: Any = None) -> Any:
    """Tokens before the final norm.

    Args:
      state: tensors by the original names.
      images: normalised, `[B, C, H, W]`.
      heads: number of attention heads.
      keep: int `[B, K]`, the visible patches; None = all.

    Returns:
      `[B, 1 + K, D]`, the class token first.
    """
    import torch

    kernel = state["patch_embed.proj.weight"]
    x = torch.nn.functional.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    if keep is not None:
        x = torch.gather(x, 1, keep[:, :, None].expand(-1, -1, x.shape[-1]))
    cls = state["cls_token"] + state["pos_embed"][:, :1]
    return _blocks(state, "blocks", torch.cat([cls.expand(len(x), -1, -1), x], dim=1), heads)


def features(state: dict[str, Any], images: Any, heads: int) -> Any:
    """Tokens after the final norm, `[B, 1 + N, D]`."""
    return _norm(state, "norm", encode(state, images, heads))


def probabilities(state: dict[str, Any], images: Any, heads: int) -> Any:
    """Class probabilities of a fine-tuned model, `[B, classes]`."""
    x = encode(state, images, heads)
    x = _norm(state, "fc_norm", x[:, 1:].mean(dim=1)) if "fc_norm.weight" in state else _norm(state, "norm", x)[:, 0]
    return _linear(state, "head", x).softmax(dim=-1)


def loss(state: dict[str, Any], images: Any, heads: int, decoder_heads: int, noise: Any, ratio: float) -> Any:
    """The pretraining loss on normalised pixels; the patches with the largest noise `[B, N]` are hidden."""
    import torch

    n = noise.shape[1]
    order = noise.argsort(dim=1)
    visible = n - round(n * ratio)
    tokens = _norm(state, "norm", encode(state, images, heads, order[:, :visible]))
    x = _linear(state, "decoder_embed", tokens)
    patches = torch.cat([x[:, 1:], state["mask_token"].expand(len(x), n - visible, -1)], dim=1)
    restore = order.argsort(dim=1)
    patches = torch.gather(patches, 1, restore[:, :, None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([x[:, :1], patches], dim=1) + state["decoder_pos_embed"]
    x = _norm(state, "decoder_norm", _blocks(state, "decoder_blocks", x, decoder_heads))
    predicted = _linear(state, "decoder_pred", x)[:, 1:]
    p = state["patch_embed.proj.weight"].shape[-1]
    b, c, height, width = images.shape
    target = images.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, n, -1)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    hidden = restore >= visible
    return ((predicted - target) ** 2).mean(-1)[hidden].mean()


def _blocks(state: dict[str, Any], name: str, x: Any, heads: int) -> Any:
    import torch

    i = 0
    while f"{name}.{i}.norm1.weight" in state:
        block = f"{name}.{i}."
        qkv = _linear(state, block + "attn.qkv", _norm(state, block + "norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + _linear(state, block + "attn.proj", y)
        y = torch.nn.functional.gelu(_linear(state, block + "mlp.fc1", _norm(state, block + "norm2", x)))
        x = x + _linear(state, block + "mlp.fc2", y)
        i += 1
    return x


def _norm(state: dict[str, Any], name: str, x: Any) -> Any:
    import torch

    return torch.nn.functional.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)


def _linear(state: dict[str, Any], name: str, x: Any) -> Any:
    import torch

    return torch.nn.functional.linear(x, state[name + ".weight"], state[name + ".bias"])
