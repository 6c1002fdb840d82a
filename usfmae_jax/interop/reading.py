"""Converts tensors and settings from other formats to a `Model`, accounting for every tensor."""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from usfmae_jax import files
from usfmae_jax.errors import InputError, some
from usfmae_jax.interop import names, schema
from usfmae_jax.interop.files import Source, Tensors, from_array
from usfmae_jax.interop.model import Model, preprocessing, unflatten
from usfmae_jax.models.layers import NORM_EPS
from usfmae_jax.models.patches import resize_table

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_LABELS: dict[names.Origin, str] = {
    "usfmae_jax": "usfmae_jax",
    "hf": "Hugging Face",
    "mae": "original MAE with decoder",
    "timm": "timm, or original MAE without decoder",
}
#: Prefixes of the original names of a classifier's head.
_HEAD = ("head.", "fc_norm.")
#: Hugging Face's name of the setting, and the usual number of attention heads by width, which tensors do not show.
_USUAL = {
    "num_heads": ("num_attention_heads", {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}),
    "decoder_num_heads": ("decoder_num_attention_heads", {128: 4, 256: 8, 512: 16}),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings that a file may not state, or that should be changed.

    Attributes:
      channels: 1 or 3 converts the patch kernel to that many; 0 leaves it unchanged.
      image_size: (height, width) that the model will be used on; None = as stated in the file.
      num_heads, decoder_num_heads: 0 = as stated in the file, else the usual number for the width.
      mean, std: for normalisation, one number per channel; () = as stated in the file, else ImageNet's.
      norm_eps: of the layer norms; 0 = as stated in the file, else 1e-6.
      allow_partial: continue despite missing or unknown tensors, where possible.
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
    """What happened to the tensors of a file.

    Attributes:
      origin: the naming scheme.
      used: number of tensors used, by part of the model.
      left: tensors left out, with the reason.
      unknown: names of unknown tensors.
      missing: names of parameters that the file lacks.
      notes: assumptions made.
    """

    origin: str
    used: dict[str, int] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def read_model(source: Source, options: Options) -> tuple[Model, Account]:
    """Recognises the format, checks every name and shape, and converts the parameters to our layout.

    Raises:
      InputError: there is no ViT encoder; a tensor has the wrong shape (both shapes are given), is unknown or missing;
        or a necessary setting is not stated.
    """
    origin = names.recognise(set(source.tensors))
    if origin is None:
        held = some(list(source.tensors)) or "nothing"
        raise InputError(f"{source.files[0]} holds no ViT encoder: no class token and blocks, but {held}")
    account = Account(_LABELS[origin])
    if origin == "usfmae_jax":
        found = _from_own(source)
    else:
        found, account.left, account.unknown = names.from_others(source.tensors, origin)
    kernel = found.get("patch_embed.proj.weight")
    if kernel is None or len(kernel.shape) != 4 or 0 in kernel.shape or not _depth(found, "blocks"):
        raise InputError(f"{source.files[0]} holds no whole encoder: patch_embed.proj.weight or all blocks are missing")
    model = _settings(source, found, options, account.notes)
    head = _take_head(found, model.description, account)
    model = _take_tables(found, model, options, account)
    found, description = _check(found, model.description, options, account)
    params = names.to_ours(found | head)
    params = schema.as_float32(params)
    model = Model(unflatten(params), description, model.preprocessing, _lineage(source))
    if options.channels and options.channels != description["encoder"]["channels"]:
        model = _change_channels(model, options.channels)
        account.notes.append(f"patch kernels changed to {options.channels} channels; grey images keep their features")
    schema.check_description(model.description, source.files[0], decoder=True)
    schema.check_preprocessing(model.preprocessing, model.description, source.files[0])
    return model, account


def _from_own(source: Source) -> Tensors:
    whole = any(name.startswith("encoder.") for name in source.tensors)
    arrays = {("" if whole else "encoder.") + name: tensor.read() for name, tensor in source.tensors.items()}
    about = source.settings.get("architecture", {})
    about = about.get("encoder", about)
    if "patch_size" not in about or "channels" not in about:
        raise InputError(f"{source.files[0]} is in our format; name its directory, with the architecture.json in it")
    try:
        return names.to_original(arrays, about["patch_size"], about["channels"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{source.files[0]} does not fit the architecture.json beside it: {error}") from error


def _depth(found: Tensors, blocks: str) -> int:
    return max((int(m[1]) + 1 for name in found if (m := re.match(rf"{blocks}\.(\d+)\.", name))), default=0)


def _settings(source: Source, found: Tensors, options: Options, notes: list[str]) -> Model:
    """Settings of the model, from the shapes of its tensors, the JSON files next to them, and the usual values.

    Returns:
      the model without parameters and lineage.
    """
    config, own = source.settings.get("config", {}), _own_settings(source)
    for field, wanted in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(field, wanted) != wanted:
            raise InputError(f"config.json has {field}={config[field]!r}; only {field}={wanted!r} can be computed here")
    width, channels, patch = found["patch_embed.proj.weight"].shape[:3]
    hidden = found["blocks.0.mlp.fc1.bias"].shape[0] if "blocks.0.mlp.fc1.bias" in found else 4 * width
    heads = _heads("num_heads", options.num_heads, width, own["architecture"], config)
    size = _image_size(config, own, found, patch, options)
    architecture = {
        "image_size": size,
        "patch_size": patch,
        "channels": channels,
        "width": width,
        "depth": _depth(found, "blocks"),
        "num_heads": heads,
        "mlp_ratio": _ratio(hidden, width),
    }
    eps = options.norm_eps or own["architecture"].get("norm_eps") or config.get("layer_norm_eps", NORM_EPS)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise InputError(f"layer_norm_eps={eps!r} in config.json is no small positive number; add --norm_eps=1e-6")
    if eps != NORM_EPS:
        architecture["norm_eps"] = eps
        notes.append(
            f"layer norms add {eps:g} to the variance, as config.json says; the MAE code, timm and pretraining here "
            f"add {NORM_EPS:g}: --norm_eps={NORM_EPS:g} does as they do"
        )
    description: dict[str, Any] = {"model": "vit", "encoder": architecture}
    if "decoder_embed.weight" in found and (depth := _depth(found, "decoder_blocks")):
        narrow = found["decoder_embed.weight"].shape[0]
        heads = _heads("decoder_num_heads", options.decoder_num_heads, narrow, own["decoder"] or {}, config)
        description["decoder"] = {"decoder_width": narrow, "decoder_depth": depth, "decoder_num_heads": heads}
    if any(name.startswith(_HEAD) for name in found):
        description["pool"] = "mean" if any(name.startswith("fc_norm.") for name in found) else "cls"
        if own["outputs"]:  # for another task
            description["outputs"] = list(own["outputs"])
        else:
            description["classes"] = _classes(own, config, found)
    return Model({}, description, _preprocessing(source, channels, own["image_size"] or size, options, notes), [])


def _ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` whose product with the width, truncated to an integer as in `ViT`, is the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _own_settings(source: Source) -> dict[str, Any]:
    """Settings stated in our own exports and directories."""
    export, about = source.settings.get("export", {}).get("model"), source.settings.get("architecture", {})
    own = {"architecture": about.get("encoder", about), "decoder": None}
    own |= {name: about.get(name, ()) for name in ("classes", "outputs")}
    own |= export if isinstance(export, dict) else {}
    return own | {"image_size": source.settings.get("preprocessing", {}).get("image_size")}


def _heads(name: str, given: int, width: int, own: dict[str, Any], config: dict[str, Any]) -> int:
    theirs, usual = _USUAL[name]
    arguments = config.get("model_args") or {}  # timm's
    heads = given or own.get(name) or config.get(theirs) or arguments.get(name) or usual.get(width, 0)
    if not isinstance(heads, int) or heads < 1:
        raise InputError(f"the file does not say how many attention heads share a width of {width}; add --{name}=N")
    if width % heads:
        raise InputError(f"{heads} attention heads do not divide a width of {width}; correct it with --{name}=N")
    return heads


def _image_size(config: dict[str, Any], own: dict[str, Any], found: Tensors, patch: int, options: Options) -> list[int]:
    """The image size of the position table."""
    arguments, stated = config.get("model_args") or {}, own["architecture"].get("image_size")
    size = stated or config.get("image_size") or arguments.get("img_size")
    sides = [size, size] if isinstance(size, int) else list(size or ())
    if len(sides) == 2 and all(isinstance(side, int) and side >= patch for side in sides):
        return sides
    table = found.get("pos_embed")
    side = round((table.shape[1] - 1) ** 0.5) * patch if table and len(table.shape) == 3 else 0
    return [side, side] if side else list(options.image_size or (224, 224))


def _preprocessing(
    source: Source, channels: int, size: list[int], options: Options, notes: list[str]
) -> dict[str, Any]:
    theirs = source.settings.get("preprocessor_config", {})
    timm = source.settings.get("config", {}).get("pretrained_cfg") or {}
    ours = source.settings.get("preprocessing", {})
    mean = options.mean or ours.get("mean") or theirs.get("image_mean") or timm.get("mean")
    std = options.std or ours.get("std") or theirs.get("image_std") or timm.get("std")
    if not mean or not std:
        if channels != 3:
            raise InputError(
                f"the file does not say how its {channels}-channel images are normalised; add --mean and --std"
            )
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        notes.append(
            "normalisation: nothing is said of it, so that of ImageNet, which the published MAE weights expect"
        )
    if len(mean) != channels or len(std) != channels:
        raise InputError(
            f"mean {tuple(mean)} and std {tuple(std)} must have one number for each of {channels} channels"
        )
    return preprocessing(size, ours.get("channels", channels), mean, std)


def _classes(own: dict[str, Any], config: dict[str, Any], found: Tensors) -> list[str]:
    count = found["head.bias"].shape[0] if "head.bias" in found else 0
    named, labels = list(own["classes"] or ()), config.get("id2label")
    if not named and isinstance(labels, dict) and all(key.isdecimal() for key in labels):
        named = [labels[key] for key in sorted(labels, key=int)]
    return list(map(str, named if len(named) == count else range(count)))


def _take_head(found: Tensors, description: dict[str, Any], account: Account) -> Tensors:
    """Removes a classifier's head from `found` and returns it, with its shapes checked."""
    head = {name: found.pop(name) for name in list(found) if name.startswith(_HEAD)}
    if not head:
        return {}
    width, outputs = description["encoder"]["width"], len(description.get("outputs") or description["classes"])
    shapes = {"head.weight": (outputs, width), "head.bias": (outputs,)}
    if description["pool"] == "mean":
        shapes |= {"fc_norm.weight": (width,), "fc_norm.bias": (width,)}
    _compare(head, shapes)
    account.unknown += sorted(head.keys() - shapes.keys())
    if missing := sorted(shapes.keys() - head.keys()):
        raise InputError(f"the head of the classifier lacks {', '.join(missing)}; the file is not whole")
    account.used["head"] = len(shapes)
    return {name: head[name] for name in shapes}


def _take_tables(found: Tensors, model: Model, options: Options, account: Account) -> Model:
    """Removes the position tables from `found` and determines the grid of the model's own table."""
    if "position" in found:  # in our own format
        model = _with_encoder(model, learned_positions=True)
    for name in names.TABLES:
        if name in found:
            model = _take_table(found, name, model, account)
    if options.image_size:
        size, patch = options.image_size, model.description["encoder"]["patch_size"]
        if size[0] % patch or size[1] % patch:
            raise InputError(f"--image_size={size[0]},{size[1]} must be divisible by the patch size {patch}")
        model = dataclasses.replace(model, preprocessing=model.preprocessing | {"image_size": list(size)})
        if "position" in found:  # a parameter is resized here, once, so that exports match this model
            old, new, position = model.table_grid(), (size[0] // patch, size[1] // patch), found["position"]
            if position.shape[0] == old[0] * old[1]:  # otherwise the later check of shapes reports it
                found["position"] = from_array(np.asarray(resize_table(position.read(), old, new)))
            model = _with_encoder(model, image_size=list(size))
    return model


def _take_table(found: Tensors, name: str, model: Model, account: Account) -> Model:
    table = found.pop(name).read()
    about, base = model.description["encoder"], model.table_grid()
    patch = about["patch_size"]
    grid = names.find_grid(table.shape[1] - 1, model.grid()) if table.ndim == 3 else None
    if grid is None:
        known = names.expected_shapes(about, model.description.get("decoder"))
        if others := sorted(found.keys() - known - {*names.TABLES}):  # such as extra tokens with rows in the table
            raise InputError(
                f"the file holds {some(others)}, which mean nothing here, and {name} is {table.shape}: not a class "
                "token and a square of patches"
            )
        raise InputError(f"{name} is {table.shape}: not a class token and a square of patches; give --image_size")
    # A resized table was either interpolated from the model's base size or computed exactly for its own size.
    differences = {
        one: float(np.abs(table - names.stored_table(one, grid, table.shape[-1])).max()) for one in (base, grid)
    }
    best = min(differences, key=lambda one: differences[one])
    if differences[best] <= names.TOLERANCE:
        account.left[name] = "the fixed sin-cos table, which is not stored here"
        changed = name == "pos_embed" and best != base
        return _with_encoder(model, image_size=[best[0] * patch, best[1] * patch]) if changed else model
    if name != "pos_embed":
        raise InputError(f"{name} is off the sin-cos table of MAE by {differences[best]:.2g}; decoders here have that")
    # A learned table becomes a parameter; its row for the class token is added to that token.
    if "cls_token" not in found or found["cls_token"].shape[-1] != table.shape[-1]:
        raise InputError(f"pos_embed is {table.shape[-1]} wide, and cls_token is not; the file is not whole")
    token, first = found["cls_token"].read(), table[0, 0]
    found["cls_token"] = from_array(token + first if first.any() else token)
    found["position"] = from_array(table[0, 1:])
    account.notes.append("the position table is a learned one, and is kept as a parameter")
    return _with_encoder(model, image_size=[grid[0] * patch, grid[1] * patch], learned_positions=True)


def _with_encoder(model: Model, **changes: Any) -> Model:
    description = model.description | {"encoder": model.description["encoder"] | changes}
    return dataclasses.replace(model, description=description)


def _check(
    found: Tensors, description: dict[str, Any], options: Options, account: Account
) -> tuple[Tensors, dict[str, Any]]:
    """Compares the tensors found with those expected; returns those to use and the description of their model."""
    decoder = description.get("decoder")
    expected = names.expected_shapes(description["encoder"], decoder)
    of_decoder = expected.keys() - names.expected_shapes(description["encoder"], None)
    _compare(found, expected)
    missing = expected.keys() - found.keys()
    filled: Tensors = {}
    if {"norm.weight", "norm.bias"} <= missing and account.used.get("head") == 4:
        account.notes.append("the encoder's own norm is absent, as after MAE's fine-tuning: scale 1 and bias 0 for it")
        filled = _identity({"norm.weight", "norm.bias"}, expected)
    account.missing = sorted(missing - filled.keys())
    account.unknown += sorted(found.keys() - expected.keys())
    needed = [n for n in account.missing if n not in of_decoder and not n.endswith("bias") and "norm" not in n]
    if needed:
        raise InputError(f"the file lacks {some(needed)}: there is no whole encoder in it")
    if (account.missing or account.unknown) and not options.allow_partial:
        what = [f"lacks {some(account.missing)}"] if account.missing else []
        what += [f"holds {some(account.unknown)}, which mean nothing here"] if account.unknown else []
        raise InputError(f"the file {' and '.join(what)}; --allow_partial goes on without")
    if decoder and of_decoder & set(account.missing):
        account.notes.append("the decoder is not whole and is left out")
        description = {part: about for part, about in description.items() if part != "decoder"}
        expected = {name: shape for name, shape in expected.items() if name not in of_decoder}
    filled |= _identity(set(account.missing) & expected.keys(), expected)
    account.used |= {"encoder": len(found.keys() & expected.keys() - of_decoder)}
    if "decoder" in description:
        account.used["decoder"] = len(found.keys() & of_decoder)
    return {name: (filled | found)[name] for name in expected}, description


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

    An image with the same grey in all channels gets the same tokens as before: the average is weighted by the
    channels' normalisation and multiplied by their number; a repeated kernel is divided by it. The decoder predicts
    the average of the channels, or the same value for all.
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
            stages = files.parse(source.metadata.get("lineage", "[]"))
        except ValueError:
            stages = []
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    try:
        schema.check_lineage(stages)
    except InputError as error:
        raise InputError(f"{source.files[0]} does not say where it comes from as a lineage does: {error}") from error
    return stages
