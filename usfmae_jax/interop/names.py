"""Other people's names of a ViT's parameters, to and from those of the original MAE code (He et al. 2022).

The original names, which timm shares, are the common ground:

  cls_token  pos_embed  patch_embed.proj.{weight,bias}  norm.{weight,bias}
  blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.{weight,bias}
  decoder_embed  mask_token  decoder_pos_embed  decoder_blocks.N...  decoder_norm  decoder_pred    (pretraining)
  fc_norm  head                                                                                   (fine-tuned)

Hugging Face keeps query, key and value apart, and has two sets of names: that of files, and that of modules since
version 5, which files written with `torch.save` have.
"""

import re
from typing import Literal

import numpy as np

from usfmae_jax.errors import InputError
from usfmae_jax.interop.tensors import Tensor, Tensors

Origin = Literal["usfmae_jax", "hf", "mae", "timm"]

#: In a block: the original name, and Hugging Face's in files and in modules.
_HF_BLOCK = {
    "norm1": ("layernorm_before", "layernorm_before"),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
_HF_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
    "head": "classifier",
}
_FROM_HF_BLOCK = {theirs: ours for ours, pair in _HF_BLOCK.items() for theirs in pair}
_FROM_HF = {theirs: ours for ours, theirs in (_HF_ENCODER | _HF_DECODER).items()}
_BLOCK = re.compile(
    r"(?P<decoder>decoder\.)?(?:encoder\.layer|layers|decoder_encoder\.layer|decoder_layers)\.(?P<i>\d+)\."
)

#: What files may hold beside the parameters, and why it is left out.
_EXPLAINED = {
    r"pooler\.dense\.(weight|bias)": "the pooler, which MAE does not train",
    r"embeddings\.mask_token": "the mask token of another pretraining",
}


def recognise(names: set[str]) -> Origin | None:
    """Whose names these are; None when there is no ViT encoder of any kind among them."""
    plain = {_strip(name) for name in names}
    if any(name.startswith(("blocks.stack.", "encoder.blocks.stack.")) for name in names):
        return "usfmae_jax"
    if "embeddings.cls_token" in plain:
        return "hf"
    if "cls_token" in plain and any(name.startswith("blocks.") for name in plain):
        return "mae" if any(name.startswith("decoder_") for name in plain) else "timm"
    return None


def to_original(tensors: Tensors, origin: Origin) -> tuple[Tensors, dict[str, str], list[str]]:
    """Renames tensors.

    Args:
      tensors: under the names of `origin`, "hf", "mae" or "timm".
      origin: from `recognise`.

    Returns:
      the tensors under the original names; what was left out, with the reason; names that mean nothing here.
    """
    found: Tensors = {}
    left: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        plain = _strip(name)
        reason = next((why for pattern, why in _EXPLAINED.items() if re.fullmatch(pattern, plain)), "")
        new = _from_hf(plain) if origin == "hf" else plain
        if reason:
            left[name] = reason
        elif new is None:
            unknown.append(name)
        else:
            found[new] = tensor
    return (_join_qkv(found) if origin == "hf" else found), left, unknown


def to_hf(original: Tensors) -> Tensors:
    """Tensors under the original names, renamed to those of Hugging Face's files."""
    renamed: Tensors = {}
    for name, tensor in original.items():
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if not block:
            stem, dot, leaf = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
            theirs = "vit." + _HF_ENCODER[stem] if stem in _HF_ENCODER else _HF_DECODER[stem]
            renamed[theirs + dot + leaf] = tensor
            continue
        decoder, index, part, leaf = block.groups()
        prefix = f"decoder.decoder_encoder.layer.{index}." if decoder else f"vit.encoder.layer.{index}."
        parts = (
            dict(zip(("attn.q", "attn.k", "attn.v"), _split(tensor), strict=True))
            if part == "attn.qkv"
            else {part: tensor}
        )
        renamed |= {f"{prefix}{_HF_BLOCK[part][0]}.{leaf}": value for part, value in parts.items()}
    return renamed


def _strip(name: str) -> str:
    return re.sub(r"^(module\.)?(vit\.)?", "", name)


def _from_hf(name: str) -> str | None:
    block = _BLOCK.match(name)
    stem, dot, leaf = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    if not block:
        return _FROM_HF[stem] + dot + leaf if stem in _FROM_HF else None
    part = _FROM_HF_BLOCK.get(stem[block.end() :])
    return f"{'decoder_' if block['decoder'] else ''}blocks.{block['i']}.{part}.{leaf}" if part else None


def _join_qkv(tensors: Tensors) -> Tensors:
    joined = {}
    for name, tensor in tensors.items():
        which = re.search(r"\.attn\.([qkv])\.", name)
        trio = [name.replace(which[0], f".attn.{w}.") for w in "qkv"] if which else []
        if not trio or not all(other in tensors for other in trio):
            joined[name] = tensor  # a part without the others: reported as unknown, the whole as missing
        elif name == trio[0]:
            for other in trio[1:]:
                if tensors[other].shape != tensor.shape:
                    raise InputError(
                        f"{other} is {tensors[other].shape} and {name} is {tensor.shape}; they must be equal"
                    )
            joined[name.replace(".attn.q.", ".attn.qkv.")] = _concatenate([tensors[other] for other in trio])
    return joined


def _concatenate(parts: list[Tensor]) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    return Tensor((rows, *parts[0].shape[1:]), lambda: np.concatenate([part.read() for part in parts]))


def _split(tensor: Tensor) -> list[Tensor]:
    rows = tensor.shape[0] // 3

    def third(i: int) -> Tensor:
        return Tensor((rows, *tensor.shape[1:]), lambda: tensor.read()[i * rows : (i + 1) * rows])

    return [third(i) for i in range(3)]
