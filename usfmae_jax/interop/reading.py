"""From somebody else's tensors to a `Model`, with an account of every one of them."""

import dataclasses
import json
import re
from typing import Any

import numpy as np

from usfmae_jax.errors import InputError
from usfmae_jax.interop import layout, names, positions
from usfmae_jax.interop.model import Model, preprocessing, unflatten
from usfmae_jax.interop.settings import HEAD, Options, read_settings
from usfmae_jax.interop.source import Source
from usfmae_jax.interop.tensors import Tensor, Tensors, from_array
from usfmae_jax.models.patches import resize_table

_LABELS: dict[names.Origin, str] = {
    "usfmae_jax": "usfmae_jax",
    "hf": "Hugging Face",
    "mae": "original MAE with decoder",
    "timm": "timm, or original MAE without decoder",
}


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
    model = read_settings(source, found, depth, _depth(found, "decoder_blocks"), options, account.notes)
    head = _take_head(found, model.description, account)
    model = _take_tables(found, model, options, account)
    found, description = _check(found, model.description, options, account)
    params = layout.to_ours(found | head)
    _check_numbers(params)
    model = Model(unflatten(params), description, model.preprocessing, _lineage(source))
    if options.channels and options.channels != description["encoder"]["channels"]:
        model = _change_channels(model, options.channels)
        account.notes.append(f"patch kernels changed to {options.channels} channels; grey images keep their features")
    return model, account


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


def _take_head(found: Tensors, description: dict[str, Any], account: Account) -> Tensors:
    """Takes a classifier's head out of `found`; checks its shapes."""
    head = {name: found.pop(name) for name in list(found) if name.startswith(HEAD)}
    if not head:
        return {}
    width, classes = description["encoder"]["width"], len(description["classes"])
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


def _take_tables(found: Tensors, model: Model, options: Options, account: Account) -> Model:
    """Takes the position tables out of `found` and finds the grid that the model's own table has to be made for."""
    if "position" in found:  # our own format
        model = _with_encoder(model, learned_positions=True)
    for name in layout.TABLES:
        tensor = found.pop(name, None)
        if tensor is None:
            continue
        table = tensor.read()
        about, decoder = model.description["encoder"], model.description.get("decoder")
        patch = about["patch_size"]
        base = (about["image_size"][0] // patch, about["image_size"][1] // patch)
        grid = positions.find_grid(table.shape[1] - 1, model.grid()) if table.ndim == 3 else None
        others = sorted(found.keys() - layout.expected_shapes(about, decoder) - {*layout.TABLES})
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
            model = _keep_table(found, table[0], model, grid, account)
            continue
        if differences[best] > positions.TOLERANCE:
            raise InputError(
                f"{name} is off the sin-cos table of MAE by {differences[best]:.2g}; decoders here have that"
            )
        if name == "pos_embed" and best != base:
            model = _with_encoder(model, image_size=[best[0] * patch, best[1] * patch])
        account.left[name] = "the fixed sin-cos table, which is not stored here"
    if options.image_size:
        size, patch = options.image_size, model.description["encoder"]["patch_size"]
        if size[0] % patch or size[1] % patch:
            raise InputError(f"--image_size={size[0]},{size[1]} must be divisible by the patch size {patch}")
        model = dataclasses.replace(model, preprocessing=model.preprocessing | {"image_size": list(size)})
        if "position" in found:  # a parameter is resized once, so that what is exported is what is here
            _resize_position(found, model.description["encoder"], size)
            model = _with_encoder(model, image_size=list(size))
    return model


def _with_encoder(model: Model, **changes: Any) -> Model:
    description = model.description | {"encoder": model.description["encoder"] | changes}
    return dataclasses.replace(model, description=description)


def _resize_position(found: Tensors, architecture: dict[str, Any], size: tuple[int, int]) -> None:
    patch, before = architecture["patch_size"], architecture["image_size"]
    old, new = ((height // patch, width // patch) for height, width in (before, size))
    position = found["position"]
    if position.shape[0] == old[0] * old[1]:  # else the shapes are compared later
        found["position"] = from_array(np.asarray(resize_table(position.read(), old, new)))


def _keep_table(found: Tensors, table: np.ndarray, model: Model, grid: tuple[int, int], account: Account) -> Model:
    """Makes a learned table a parameter; what it adds to the class token goes into the token."""
    if "cls_token" not in found or found["cls_token"].shape[-1] != table.shape[-1]:
        raise InputError(f"pos_embed is {table.shape[-1]} wide, and cls_token is not; the file is not whole")
    token = found["cls_token"].read()
    found["cls_token"] = from_array(token + table[0] if table[0].any() else token)
    found["position"] = from_array(table[1:])
    account.notes.append("the position table is a learned one, and is kept as a parameter")
    patch = model.description["encoder"]["patch_size"]
    return _with_encoder(model, image_size=[grid[0] * patch, grid[1] * patch], learned_positions=True)


def _check(
    found: Tensors, description: dict[str, Any], options: Options, account: Account
) -> tuple[Tensors, dict[str, Any]]:
    """Compares what is there with what has to be there; returns what is to be used, and of what model it is."""
    decoder = description.get("decoder")
    expected = layout.expected_shapes(description["encoder"], decoder)
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
        description = {part: about for part, about in description.items() if part != "decoder"}
        expected = {name: shape for name, shape in expected.items() if name not in of_decoder}
    filled |= _identity(set(account.missing) & expected.keys(), expected)
    account.used |= {"encoder": len(found.keys() & expected.keys() - of_decoder)}
    if "decoder" in description:
        account.used["decoder"] = len(found.keys() & of_decoder)
    return {name: (filled | found)[name] for name in expected}, description


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


def _change_channels(model: Model, channels: int) -> Model:
    """Averages the patch kernels of three channels to one, or repeats one three times.

    An image that shows the same grey in all channels gets the tokens that it got before: the average is weighted by
    the channels' normalisation and multiplied by their number, a repeated kernel is divided by it. The decoder
    predicts the average of the channels, or the same for all.
    """
    old, pixels = model.description["encoder"]["channels"], model.preprocessing
    if {old, channels} != {1, 3}:
        raise InputError(f"--channels={channels}: patch kernels of {old} channels can be changed from 1 to 3 or back")
    mean, std = (np.asarray(pixels[name], np.float64) for name in ("mean", "std"))
    new_mean, new_std = (
        (mean.mean(keepdims=True), std.mean(keepdims=True)) if channels == 1 else (mean[[0] * 3], std[[0] * 3])
    )
    embed = model.params["encoder"]["patch_embed"]
    by_channel = embed["kernel"].reshape(-1, old, embed["kernel"].shape[1]).astype(np.float64)  # [P*P, C, D]
    bias = embed["bias"].astype(np.float64)
    if channels == 1:
        # (grey - mean_c) / std_c is linear in (grey - new_mean) / new_std: slope into the kernel, rest into the bias.
        bias = bias + (by_channel * ((new_mean - mean) / std)[None, :, None]).sum(axis=(0, 1))
        changed = (by_channel * (new_std / std)[None, :, None]).sum(axis=1, keepdims=True)
    else:
        changed = np.repeat(by_channel / 3, 3, axis=1)
    changed = changed.reshape(-1, embed["kernel"].shape[1])
    embed |= {"kernel": changed.astype(np.float32), "bias": bias.astype(np.float32)}
    predicted = model.params.get("decoder", {}).get("pred", {})
    for name, value in predicted.items():
        value = value.reshape(*value.shape[:-1], -1, old)
        value = value.mean(axis=-1, keepdims=True) if channels == 1 else np.repeat(value, 3, axis=-1)
        predicted[name] = np.ascontiguousarray(value.reshape(*value.shape[:-2], -1), np.float32)
    pixels = preprocessing(pixels["image_size"], channels, new_mean.tolist(), new_std.tolist())
    return _with_encoder(dataclasses.replace(model, preprocessing=pixels), channels=channels)


def _lineage(source: Source) -> list[dict[str, Any]]:
    stages = source.settings.get("lineage", {}).get("stages")
    if stages is None:
        try:
            stages = json.loads(source.metadata.get("lineage", "[]"))
        except ValueError:
            stages = []
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
