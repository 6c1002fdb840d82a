"""From somebody else's tensors to a `Model`, with an account of every one of them."""

import dataclasses
import json
import re
from typing import Any

import numpy as np

from usfmae_jax.errors import InputError
from usfmae_jax.interop import channels, layout, names, positions
from usfmae_jax.interop.model import Model
from usfmae_jax.interop.settings import Settings, read_settings
from usfmae_jax.interop.source import Source
from usfmae_jax.interop.tensors import Tensor, Tensors, from_array
from usfmae_jax.models.patches import resize_table

_LABELS: dict[names.Origin, str] = {
    "usfmae_jax": "usfmae_jax",
    "hf": "Hugging Face",
    "mae": "original MAE with decoder",
    "timm": "timm, or original MAE without decoder",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a file may not say, or is to be changed.

    Attributes:
      channels: 1 or 3 changes the patch kernel to as many; 0 leaves it.
      image_size: (height, width) that the model is to be used on; None = what the file says.
      num_heads, decoder_num_heads: 0 = what the file says, else what is usual for the width.
      mean, std: of the normalisation, one number per channel; () = what the file says, else ImageNet's.
      norm_eps: of the layer norms; 0 = what the file says, else 1e-6.
      allow_partial: go on without what is missing or not understood, where that can be.
    """

    channels: int = 0
    image_size: tuple[int, int] | None = None
    num_heads: int = 0
    decoder_num_heads: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    norm_eps: float = 0.0
    allow_partial: bool = False


@dataclasses.dataclass
class Account:
    """What became of the tensors of a file.

    Attributes:
      origin: whose names they had.
      used: for each part of the model how many tensors went into it.
      left: tensors that were left out, with the reason.
      unknown: tensors that mean nothing here.
      missing: parameters that the file does not have.
      notes: what was assumed.
    """

    origin: str
    used: dict[str, int] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def read_model(source: Source, options: Options) -> tuple[Model, Account]:
    """Recognises the format, checks every name and shape, and brings the parameters into our layout.

    Raises:
      InputError: no ViT encoder there; a tensor is of the wrong shape (both are named), unknown or missing; the file
        does not say something that has to be known.
    """
    origin = names.recognise(set(source.tensors))
    if origin is None:
        some = ", ".join(list(source.tensors)[:3]) or "nothing"
        raise InputError(f"{source.files[0]} holds no ViT encoder: no class token and blocks, but {some} ...")
    account = Account(_LABELS[origin])
    found = _original(source, origin, account)
    depth = _depth(found, "blocks")
    kernel = found.get("patch_embed.proj.weight")
    if kernel is None or len(kernel.shape) != 4 or 0 in kernel.shape or not depth:
        raise InputError(f"{source.files[0]} holds no whole encoder: patch_embed.proj.weight or all blocks are missing")
    settings = read_settings(source, found, depth, _depth(found, "decoder_blocks"), options, account.notes)
    head = _take_head(found, settings, account)
    settings = _take_tables(found, settings, options, account)
    found, decoder = _check(found, settings, options, account)
    params = layout.to_ours(found | head)
    _check_numbers(params)
    if options.channels and options.channels != settings.architecture["channels"]:
        params, settings = channels.change(params, settings, options.channels)
        account.notes.append(f"patch kernels changed to {options.channels} channels; grey images keep their features")
    pool = "" if not head else "mean" if "head_norm.scale" in params else "cls"
    classes = settings.classes if head else ()
    lineage = _lineage(source)
    return Model(params, settings.architecture, decoder, pool, classes, settings.preprocessing, lineage), account


def _original(source: Source, origin: names.Origin, account: Account) -> Tensors:
    if origin != "usfmae_jax":
        found, account.left, account.unknown = names.to_original(source.tensors, origin)
        return found
    whole = any(name.startswith("encoder.") for name in source.tensors)
    arrays = {("" if whole else "encoder.") + name: tensor.read() for name, tensor in source.tensors.items()}
    about = source.settings.get("architecture", {})
    about = about.get("encoder", about)
    if "patch_size" not in about or "channels" not in about:
        raise InputError(f"{source.files[0]} is in our format; name its directory, with the architecture.json in it")
    try:
        return layout.with_patch_kernel(layout.to_original(arrays), about["patch_size"], about["channels"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{source.files[0]} does not fit the architecture.json beside it: {error}") from error


def _depth(found: Tensors, blocks: str) -> int:
    return max((int(m[1]) + 1 for name in found if (m := re.match(rf"{blocks}\.(\d+)\.", name))), default=0)


def _take_head(found: Tensors, settings: Settings, account: Account) -> Tensors:
    """Takes a classifier's head out of `found`; checks its shapes."""
    head = {name: found.pop(name) for name in list(found) if name.startswith(("head.", "fc_norm."))}
    if not head:
        return {}
    width, classes = settings.architecture["width"], len(settings.classes)
    shapes = {"head.weight": (classes, width), "head.bias": (classes,)}
    if any(name.startswith("fc_norm.") for name in head):
        shapes |= {"fc_norm.weight": (width,), "fc_norm.bias": (width,)}
    _compare(head, shapes)
    missing = sorted(shapes.keys() - head.keys())
    account.unknown += sorted(head.keys() - shapes.keys())
    if missing:
        raise InputError(f"the head of the classifier lacks {', '.join(missing)}; the file is not whole")
    account.used["head"] = len(shapes)
    return {name: head[name] for name in shapes}


def _take_tables(found: Tensors, settings: Settings, options: Options, account: Account) -> Settings:
    """Takes the position tables out of `found` and finds the grid that the model's own table has to be made for."""
    if "position" in found:  # our own format
        settings = dataclasses.replace(settings, architecture=settings.architecture | {"learned_positions": True})
    for name in layout.TABLES:
        tensor = found.pop(name, None)
        if tensor is None:
            continue
        table = tensor.read()
        patch = settings.architecture["patch_size"]
        base = (settings.architecture["image_size"][0] // patch, settings.architecture["image_size"][1] // patch)
        grid = positions.find_grid(table.shape[1] - 1, settings.grid) if table.ndim == 3 else None
        others = sorted(
            found.keys() - layout.expected_shapes(settings.architecture, settings.decoder) - {*layout.TABLES}
        )
        if grid is None and others:  # such as tokens of its own, which the table has rows for
            raise InputError(
                f"the file holds {_some(others)}, which mean nothing here, and {name} is {table.shape}: not a class "
                "token and a square of patches"
            )
        if grid is None:
            raise InputError(f"{name} is {table.shape}: not a class token and a square of patches; give --image_size")
        # A resized table is the interpolation of one of the size that the model was made for, or exact for its own.
        bases = [base, grid] if base != grid else [grid]
        differences = {b: positions.difference(table, b, grid) for b in bases}
        best = min(bases, key=lambda b: differences[b])
        if name == "pos_embed" and differences[best] > positions.TOLERANCE:
            settings = _keep_table(found, table[0], settings, grid, account)
            continue
        if differences[best] > positions.TOLERANCE:
            raise InputError(
                f"{name} is off the sin-cos table of MAE by {differences[best]:.2g}; decoders here have that"
            )
        if name == "pos_embed" and best != base:
            settings = settings.with_image_size((best[0] * patch, best[1] * patch))
        account.left[name] = "the fixed sin-cos table, which is not stored here"
    if options.image_size:
        old, settings = settings, settings.used_on(options.image_size)
        if "position" in found:  # a parameter is resized once, so that what is exported is what is here
            _resize_position(found, old, options.image_size)
            settings = settings.with_image_size(options.image_size)
    return settings


def _resize_position(found: Tensors, settings: Settings, size: tuple[int, int]) -> None:
    patch, before = settings.architecture["patch_size"], settings.architecture["image_size"]
    old, new = ((height // patch, width // patch) for height, width in (before, size))
    position = found["position"]
    if position.shape[0] == old[0] * old[1]:  # else the shapes are compared later
        found["position"] = from_array(np.asarray(resize_table(position.read(), old, new)))


def _keep_table(
    found: Tensors, table: np.ndarray, settings: Settings, grid: tuple[int, int], account: Account
) -> Settings:
    """Makes a learned table a parameter; what it adds to the class token goes into the token."""
    if "cls_token" not in found or found["cls_token"].shape[-1] != table.shape[-1]:
        raise InputError(f"pos_embed is {table.shape[-1]} wide, and cls_token is not; the file is not whole")
    token = found["cls_token"].read()
    found["cls_token"] = from_array(token + table[0] if table[0].any() else token)
    found["position"] = from_array(table[1:])
    account.notes.append("the position table is a learned one, and is kept as a parameter")
    patch = settings.architecture["patch_size"]
    settings = settings.with_image_size((grid[0] * patch, grid[1] * patch))
    return dataclasses.replace(settings, architecture=settings.architecture | {"learned_positions": True})


def _check(
    found: Tensors, settings: Settings, options: Options, account: Account
) -> tuple[Tensors, dict[str, Any] | None]:
    """Compares what is there with what has to be there; returns what is to be used, and the decoder's arguments."""
    decoder = settings.decoder
    expected = layout.expected_shapes(settings.architecture, decoder)
    _compare(found, expected)
    missing = expected.keys() - found.keys()
    filled: dict[str, Tensor] = {}
    if {"norm.weight", "norm.bias"} <= missing and account.used.get("head") == 4:
        account.notes.append("the encoder's own norm is absent, as after MAE's fine-tuning: scale 1 and bias 0 for it")
        filled = _identity({"norm.weight", "norm.bias"}, expected)
    account.missing = sorted(missing - filled.keys())
    account.unknown += sorted(found.keys() - expected.keys())
    of_decoder = {name for name in expected if name.startswith("decoder_") or name == "mask_token"}
    if account.missing or account.unknown:
        _refuse_unless_partial(account, options, of_decoder)
    if decoder and of_decoder & set(account.missing):
        account.notes.append("the decoder is not whole and is left out")
        decoder, expected = None, {name: shape for name, shape in expected.items() if name not in of_decoder}
    filled |= _identity(set(account.missing) & expected.keys(), expected)
    account.used |= {"encoder": len(found.keys() & expected.keys() - of_decoder)}
    if decoder:
        account.used["decoder"] = len(found.keys() & of_decoder)
    return {name: (filled | found)[name] for name in expected}, decoder


def _refuse_unless_partial(account: Account, options: Options, of_decoder: set[str]) -> None:
    needed = [n for n in account.missing if n not in of_decoder and not n.endswith("bias") and "norm" not in n]
    if needed:
        raise InputError(f"the file lacks {_some(needed)}: there is no whole encoder in it")
    if not options.allow_partial:
        what = [f"lacks {_some(account.missing)}"] if account.missing else []
        what += [f"holds {_some(account.unknown)}, which mean nothing here"] if account.unknown else []
        raise InputError(f"the file {' and '.join(what)}; --allow_partial goes on without")


def _check_numbers(params: dict[str, np.ndarray]) -> None:
    for name, value in params.items():
        with np.errstate(invalid="ignore"):  # an infinite sum, or none, and no second array as large as this
            finite = np.isfinite(value.sum(dtype=np.float64))
        if not finite:
            raise InputError(f"{name} holds values that are not finite numbers: the training that made it diverged")


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _compare(found: Tensors, expected: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(found.keys() & expected.keys()):
        if found[name].shape != expected[name]:
            raise InputError(f"{name} is {found[name].shape} in the file and has to be {expected[name]}")


def _identity(missing: set[str], expected: dict[str, tuple[int, ...]]) -> Tensors:
    return {
        name: from_array((np.ones if name.endswith("weight") else np.zeros)(expected[name], np.float32))
        for name in missing
    }


def _lineage(source: Source) -> list[dict[str, Any]]:
    stages = source.settings.get("lineage", {}).get("stages")
    if stages is None:
        try:
            stages = json.loads(source.metadata.get("lineage", "[]"))
        except ValueError:
            stages = []
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
