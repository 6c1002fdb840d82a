"""Parameter names: tables of the names used by others, and conversion to and from ours.

Files are read and checked under the names of the original MAE code (He et al. 2022), which timm shares. The tables
below map our names and Hugging Face's to them and back; `#` stands for the number of a block. Values are only
rearranged, never computed, so that a round trip is bitwise exact.

PyTorch's kernels are `[out, in]` or `[out, in, P, P]`. Ours are `[in, out]`, the patch kernel flattened to
`[P*P*C, D]` in row, column, channel order, and the blocks are stacked along a first axis.
"""

import collections
import math
import re
from typing import Any, Literal

import numpy as np

from usfmae_jax.errors import InputError
from usfmae_jax.interop.files import Tensor, Tensors, from_array
from usfmae_jax.models.patches import resize_table, sincos_table

Origin = Literal["usfmae_jax", "hf", "mae", "timm"]

#: Parts of a block: original name, our name, shape of the weight in PyTorch's layout.
_BLOCK = (
    ("norm1", "norm1", "D"),
    ("attn.qkv", "attn.qkv", "3D D"),
    ("attn.proj", "attn.proj", "D D"),
    ("norm2", "norm2", "D"),
    ("mlp.fc1", "fc1", "H D"),
    ("mlp.fc2", "fc2", "D H"),
)
#: The same for the whole model. D is the width and H that of the MLP; lower case is for the decoder.
_PARTS = (
    ("cls_token", "encoder.cls_token", "1 1 D"),
    ("position", "encoder.position", "N D"),  # only a learned table, without the class token's row
    ("patch_embed.proj", "encoder.patch_embed", "D C P P"),
    *((f"blocks.#.{theirs}", f"encoder.blocks.stack.{ours}", shape) for theirs, ours, shape in _BLOCK),
    ("norm", "encoder.norm", "D"),
    ("mask_token", "decoder.mask_token", "1 1 d"),
    ("decoder_embed", "decoder.embed", "d D"),
    *((f"decoder_blocks.#.{theirs}", f"decoder.blocks.stack.{ours}", shape.lower()) for theirs, ours, shape in _BLOCK),
    ("decoder_norm", "decoder.norm", "d"),
    ("decoder_pred", "decoder.pred", "PPC d"),
    ("fc_norm", "head_norm", "D"),
    ("head", "head", "classes D"),
)
#: Position tables, with a row for the class token. Ours are fixed, or the parameter `position` without that row.
TABLES = ("pos_embed", "decoder_pos_embed")
#: Tolerance when comparing a stored table with the exact one; a table stored in bfloat16 is off by up to 0.004.
TOLERANCE = 5e-3

#: Original name, Hugging Face's name in files, and that of modules since version 5, which `torch.save` writes.
#: Hugging Face keeps query, key and value separate.
_HF_BLOCK = (
    ("norm1", "layernorm_before"),
    ("attn.q", "attention.attention.query", "attention.q_proj"),
    ("attn.k", "attention.attention.key", "attention.k_proj"),
    ("attn.v", "attention.attention.value", "attention.v_proj"),
    ("attn.proj", "attention.output.dense", "attention.o_proj"),
    ("norm2", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
)
_HF_BLOCKS = (
    ("blocks", "encoder.layer", "layers"),
    (
        "decoder_blocks",
        "decoder.decoder_layers",  # in published files, which every version loads; the others are from version 5 on
        "decoder.decoder_encoder.layer",
        "decoder.encoder.layer",
        "decoder.layers",
    ),
)
_HF = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("norm", "layernorm"),
    ("mask_token", "decoder.mask_token"),
    *((name, f"decoder.{name}") for name in ("decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")),
    ("head", "classifier"),
    *(
        (f"{blocks}.#.{part}", f"{theirs}.#.{spelling}")
        for blocks, *places in _HF_BLOCKS
        for theirs in places
        for part, *spellings in _HF_BLOCK
        for spelling in spellings
    ),
)
_FROM_HF = {theirs: original for original, theirs in _HF}
_TO_HF = dict(reversed(_HF))  # the first of several spellings, the one used in files

#: Other tensors in files, and why they are left out.
_EXPLAINED = {
    r"pooler\.dense\.(weight|bias)": "the pooler, which MAE does not train",
    r"embeddings\.mask_token": "the mask token of another pretraining",
}


def _parameters() -> list[tuple[str, str, list[str]]]:
    rows = []
    for original, ours, shape in _PARTS:
        sizes = shape.split()
        if original.endswith(("token", "position")):
            rows.append((original, ours, sizes))
        else:
            kind = "scale" if len(sizes) == 1 else "kernel"
            rows += [(f"{original}.weight", f"{ours}.{kind}", sizes), (f"{original}.bias", f"{ours}.bias", sizes[:1])]
    return rows


#: All parameters: original name, our name, original shape.
_PARAMETERS = _parameters()
_OURS = {original: ours for original, ours, _ in _PARAMETERS}
_ORIGINAL = {ours: original for original, ours in _OURS.items()}


#: Beginnings of names once the prefixes of wrappers are removed.
_FIRST = "|".join(
    [
        r"(cls_token|pos_embed|mask_token|decoder_pos_embed)$",
        r"(patch_embed|blocks|norm|fc_norm|head|decoder|decoder_\w+|embeddings|layers|layernorm|pooler|classifier)\.",
        r"encoder\.layer\.",
    ]
)


def recognise(names: set[str]) -> Origin | None:
    """The naming scheme of these parameters; None if they include no known ViT encoder."""
    plain = {_strip(name) for name in names}
    if any(name.startswith(("blocks.stack.", "encoder.blocks.stack.")) for name in names):
        return "usfmae_jax"
    if "embeddings.cls_token" in plain:
        return "hf"
    if "cls_token" in plain and any(name.startswith("blocks.") for name in plain):
        return "mae" if any(name.startswith("decoder_") for name in plain) else "timm"
    return None


def expected_shapes(architecture: dict[str, Any], decoder: dict[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of an encoder, and of a decoder unless it is None, under the original names.

    Args:
      architecture: arguments of `vit.ViT`.
      decoder: `decoder_width`, `decoder_depth` and so on, arguments of `mae.MAE`.
    """
    width, patch, channels = architecture["width"], architecture["patch_size"], architecture["channels"]
    ratio, depth = architecture["mlp_ratio"], {"blocks": architecture["depth"]}
    sizes = {"1": 1, "C": channels, "P": patch, "D": width, "3D": 3 * width, "H": int(width * ratio)}
    if architecture.get("learned_positions"):
        sizes["N"] = math.prod(side // patch for side in architecture["image_size"])
    if decoder is not None:
        narrow, depth["decoder_blocks"] = decoder["decoder_width"], decoder["decoder_depth"]
        sizes |= {"PPC": patch * patch * channels, "d": narrow, "3d": 3 * narrow, "h": int(narrow * ratio)}
    return {
        original.replace("#", str(i)): tuple(sizes[size] for size in shape)
        for original, ours, shape in _PARAMETERS
        if not ours.startswith("head") and sizes.keys() >= set(shape)
        for i in range(depth[original.split(".")[0]] if "#" in original else 1)
    }


def to_ours(original: Tensors) -> dict[str, np.ndarray]:
    """Converts parameters from the original names to ours, under `encoder.`, `decoder.`, `head_norm.` and `head.`.

    Tensors are read one at a time into the stacked arrays, so that the parameters are in memory only once.
    """
    depths = collections.Counter(_pattern(name)[0] for name in original)
    ours: dict[str, np.ndarray] = {}
    for name, tensor in original.items():
        pattern, block = _pattern(name)
        new, value = _OURS[pattern], tensor.read()
        if new.endswith(".kernel"):
            value = value.transpose(*range(2, value.ndim), 1, 0).reshape(-1, len(value))
        if block is None:
            ours[new] = np.array(value, np.float32, order="C")  # a copy, since the file may be memory-mapped
            continue
        if new not in ours:
            ours[new] = np.empty((depths[pattern], *value.shape), np.float32)
        ours[new][block] = value
    return ours


def to_original(ours: dict[str, np.ndarray], patch_size: int, channels: int) -> Tensors:
    """The inverse of `to_ours`; values are rearranged lazily, when they are read.

    Raises:
      KeyError, ValueError: a name is not one of ours, or the patch kernel has another size.
    """
    original: Tensors = {}
    for name, array in ours.items():
        theirs = _ORIGINAL[name]
        if name.endswith(".kernel"):
            array = array.swapaxes(-1, -2)
        if name == "encoder.patch_embed.kernel":
            array = array.reshape(-1, patch_size, patch_size, channels).transpose(0, 3, 1, 2)
        for i, value in enumerate(array if "#" in theirs else [array]):
            original[theirs.replace("#", str(i))] = from_array(value)
    return original


def from_others(tensors: Tensors, origin: Origin) -> tuple[Tensors, dict[str, str], list[str]]:
    """Renames tensors to the original names.

    Args:
      tensors: under the names of `origin`, "hf", "mae" or "timm".
      origin: from `recognise`.

    Returns:
      the tensors under the original names; names left out, with the reason; unknown names.

    Raises:
      InputError: query, key and value of a block differ in shape.
    """
    found: Tensors = {}
    left: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        plain = _strip(name)
        stem, leaf = _split_leaf(plain)
        pattern, block = _pattern(stem)
        if reason := next((why for left_out, why in _EXPLAINED.items() if re.fullmatch(left_out, plain)), ""):
            left[name] = reason
        elif origin != "hf":
            found[plain] = tensor
        elif pattern in _FROM_HF:
            found[_FROM_HF[pattern].replace("#", str(block)) + leaf] = tensor
        else:
            unknown.append(name)
    return (_join_qkv(found) if origin == "hf" else found), left, unknown


def to_hf(original: Tensors) -> Tensors:
    """Renames tensors from the original names to those in Hugging Face's files."""
    renamed: Tensors = {}
    for name, tensor in original.items():
        stem, leaf = _split_leaf(name)
        pattern, block = _pattern(stem)
        parts = {pattern: tensor}
        if pattern.endswith(".qkv"):
            rows = tensor.shape[0] // 3
            parts = {pattern[:-3] + which: _rows(tensor, i * rows, rows) for i, which in enumerate("qkv")}
        for part, value in parts.items():
            theirs = _TO_HF[part].replace("#", str(block)) + leaf
            renamed[theirs if theirs.startswith(("decoder.", "classifier.")) else f"vit.{theirs}"] = value
    return renamed


def stored_table(
    base: tuple[int, int], grid: tuple[int, int], width: int, learned: np.ndarray | None = None
) -> np.ndarray:
    """A position table as stored in files: float32 `[1, 1 + N, width]`, zeros for the class token, then the table.

    Args:
      base: grid of the model's table.
      grid: grid of the stored table, interpolated as in the model.
      width: channels.
      learned: the model's table `[base[0] * base[1], width]`; None = the sin-cos table.
    """
    table = np.asarray(resize_table(sincos_table(base, width) if learned is None else learned, base, grid), np.float32)
    return np.concatenate([np.zeros((1, width), np.float32), table])[None]


def find_grid(patches: int, hint: tuple[int, int] | None) -> tuple[int, int] | None:
    """Grid (rows, columns) of a table for that many patches: the hint if it fits, else a square; None if neither."""
    if hint and hint[0] * hint[1] == patches:
        return hint
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def _strip(name: str) -> str:
    """A name without the prefixes added by parallel training, compilation and wrapping models."""
    around = rf"((module|_orig_mod|model|net|backbone|encoder|vit)\.)+(?={_FIRST})"
    return re.sub(rf"^({around}|((module|_orig_mod)\.)+)", "", name)


def _pattern(name: str) -> tuple[str, int | None]:
    """`blocks.3.norm1.bias` as `blocks.#.norm1.bias` and 3; a name without a block number is unchanged, with None."""
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name[: found.start()] + "#" + name[found.end() :], int(found[0])) if found else (name, None)


def _split_leaf(name: str) -> tuple[str, str]:
    found = re.search(r"\.(weight|bias)$", name)
    return (name[: found.start()], found[0]) if found else (name, "")


def _rows(tensor: Tensor, start: int, count: int) -> Tensor:
    return Tensor((count, *tensor.shape[1:]), lambda: tensor.read()[start : start + count])


def _join_qkv(tensors: Tensors) -> Tensors:
    joined = {}
    for name, tensor in tensors.items():
        which = re.search(r"\.attn\.([qkv])\.", name)
        trio = [name.replace(which[0], f".attn.{w}.") for w in "qkv"] if which else []
        if not trio or not all(other in tensors for other in trio):
            joined[name] = tensor  # one without the others: reported as unknown, and the joint matrix as missing
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
