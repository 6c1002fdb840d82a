"""Validation of the JSON files of models and runs and of checkpoint metadata, which may come from untrusted sources.

All values are checked against bounds before anything is built from them, and must then match the tensors.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from usfmae_jax import files
from usfmae_jax.errors import InputError

_SIDE, _PATCHES, _CELLS = 4096, 1 << 14, 1 << 26  # limits: image side, number of patches, values in a position table
_WIDTH, _DEPTH, _OUTPUTS, _TEXT = 1 << 13, 256, 100_000, 1 << 20
_LARGER = 8  # maximum ratio of an image side to that of the position table

Check = Callable[[Any], bool]


def check_description(about: Any, where: str = "architecture.json", decoder: bool = False) -> None:
    """Raises InputError unless this is a valid description for `build`, of a model of reasonable size.

    Args:
      about: the description.
      where: its location, for the error.
      decoder: whether a decoder is allowed, as in pretraining runs.
    """
    _fields(
        about,
        where,
        {"model": _one_of(*_NETWORKS)},
        _HEAD | dict.fromkeys(("encoder", "resnet", "unet", *["decoder"] * decoder), _any),
    )
    name, fields = _NETWORKS[about["model"]]
    if name not in about:
        raise InputError(f"{where} lacks {name}")
    _fields(about[name], f"{name} of {where}", *fields)
    if "head" in about:
        _fields(about["head"], f"head of {where}", *_PIXELS)
    _check_scale(about, where)
    if name != "encoder":
        return
    encoder = about[name]
    if (head := about.get("head", {})).get("kind") == "queries":
        for field in ("width", "queries", "blocks"):
            if field not in head:
                raise InputError(f"head of {where} lacks {field}")
        if head["blocks"] > encoder["depth"]:
            raise InputError(f"{where}: queries through {head['blocks']} of {encoder['depth']} blocks")
    sides, patch, width = encoder["image_size"], encoder["patch_size"], encoder["width"]
    patches = math.prod(side // patch for side in sides)
    if any(side % patch for side in sides) or not 0 < patches <= _PATCHES or patches * width > _CELLS:
        raise InputError(f"{where}: images of {sides} in patches of {patch} are none that a model is for")
    if width % encoder["num_heads"] or width % 4:
        raise InputError(f"{where}: a width of {width} cannot be split among {encoder['num_heads']} heads")
    if "decoder" in about:
        _check_decoder(about["decoder"], patches, where)


def _check_decoder(decoder: Any, patches: int, where: str) -> None:
    _fields(decoder, f"decoder of {where}", *_DECODER)
    width, heads = decoder["decoder_width"], decoder["decoder_num_heads"]
    if width % heads or width % 4:
        raise InputError(f"decoder of {where}: a width of {width} cannot be split among {heads} heads")
    if patches * width > _CELLS:
        raise InputError(f"decoder of {where}: {patches} patches of a width of {width} are none that a model is for")
    if (decoder.get("kind") == "latent") != ("outputs" in decoder):
        raise InputError(f"decoder of {where}: outputs are of the kind latent, which needs them")
    if decoder.get("kind") == "cross" and not decoder["decoder_depth"]:
        raise InputError(f"decoder of {where}: one of the kind cross has a block")


def _check_scale(about: Mapping[str, Any], where: str) -> None:
    """Checks `scale`, which converts the outputs of a regression to their units."""
    if about.get("task") != "regression":
        if "scale" in about:
            raise InputError(f"{where} has a scale, which is for regression")
        return
    _fields(about, where, {"outputs": _any, "scale": _any}, {}, closed=False)
    _fields(about["scale"], f"scale of {where}", *_SCALE)
    lengths = {len(one) for one in about["scale"].values()}
    if lengths != {len(about["outputs"])}:
        raise InputError(f"scale of {where}: mean, deviation and unit are not one for each of outputs")


def check_preprocessing(pixels: Any, about: Mapping[str, Any], where: str = "preprocessing.json") -> None:
    """Raises InputError unless this is valid preprocessing for the model that `about` describes.

    Args:
      pixels: see `interop.model.preprocessing`.
      about: a description that has passed `check_description`.
      where: its location, for the error.
    """
    _fields(
        pixels,
        where,
        {"image_size": _sides, "channels": _one_of(1, 3), "mean": _numbers(-1e3, 1e3), "std": _numbers(1e-6, 1e3)},
        {"resize": _text, "scale": _number(0, 1e3)},
    )
    network = about[_NETWORKS[about["model"]][0]]
    channels = network.get("channels", 3)
    if pixels["channels"] not in (1, channels) or any(len(pixels[name]) != channels for name in ("mean", "std")):
        raise InputError(f"{where}: channels, mean and std are none for a model of {channels} channels")
    if about["model"] != "vit":
        return
    sides, patch = pixels["image_size"], network["patch_size"]
    if any(side % patch for side in sides) or math.prod(side // patch for side in sides) > _PATCHES:
        raise InputError(f"{where}: images of {sides} are none for patches of {patch}")
    if any(side > _LARGER * own for side, own in zip(sides, network["image_size"], strict=True)):
        raise InputError(f"{where}: images of {sides} are none for a model of images of {network['image_size']}")


def check_settings(name: str, said: Mapping[str, Any]) -> None:
    """Raises InputError unless the fields that are read from a JSON file next to third-party weights are valid.

    `name` is one of `config`, `preprocessor_config`, `export`, `architecture` and `preprocessing`.
    """
    if name == "export":
        said = said.get("model") or {}
        _fields(said, "model of export.json", {}, _SETTINGS["export"], closed=False)
        name, said = "architecture", said.get("architecture", {})
    _fields(said, f"{name}.json", {}, _SETTINGS.get(name, {}), closed=False)
    for group in ("model_args", "pretrained_cfg", "encoder"):
        if isinstance(said.get(group), Mapping):
            _fields(said[group], f"{group} of {name}.json", {}, _SETTINGS[name], closed=False)


def check_lineage(stages: Any) -> None:
    """Raises InputError unless these are valid stages of a lineage; only the fields that are read are checked."""
    if not isinstance(stages, list):
        raise InputError("lineage.json: stages is no list")
    for stage in stages:
        _fields(stage, "a stage of lineage.json", {}, _STAGE, closed=False)
        for data in stage.get("data", ()):
            _fields(data, "data of lineage.json", {}, _DATA, closed=False)
        if "source" in stage:
            wanted = {"files": _list(_text), "sha256": _text}
            _fields(stage["source"], "source of lineage.json", wanted, {}, closed=False)
        for name in ("mask", "train", "optimizer"):
            if not isinstance((stage.get("config") or {}).get(name, {}), Mapping):
                raise InputError(f"config of lineage.json: {name} is no object")


def read_run(path: epath.Path, about: Mapping[str, Any], pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Reads from `config.json` of a pretraining run how its model is used, and checks that it matches the checkpoint.

    Args:
      path: of the file.
      about: the description of the model, with a decoder of pixels, that has passed `check_description`.
      pixels: its preprocessing.

    Returns:
      `objective`, and `model`, `mask` and `loss` with those fields that are the same in files of all versions.

    Raises:
      InputError: it is not JSON, is invalid, or does not match the checkpoint.
    """
    try:
        said = files.parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); it is what the run left there") from error
    # Fields on how it was computed are not checked: they need not be usable here, and earlier versions named them
    # differently.
    model = about["encoder"] | about["decoder"] | {name: pixels[name] for name in ("mean", "std")}
    objective = "cross_mae" if model.pop("kind", "") == "cross" else "mae"
    sides = model["image_size"]
    same = {name: _one_of(value) for name, value in model.items()}
    same |= {"mlp_ratio": lambda value: value == model.get("mlp_ratio"), "dtype": _one_of("float32", "bfloat16")}
    same |= {"image_size": lambda value: value == sides or (value == sides[:1] and sides[0] == sides[1])}
    try:
        _fields(said, "config.json", {"model": _any}, {"objective": _one_of(objective)}, closed=False)
        found: dict[str, Any] = {}
        for group, fields in {"model": same, "mask": _MASK, "loss": _LOSS}.items():
            _fields(said.get(group, {}), f"{group} of config.json", {}, fields, closed=False)
            found[group] = {name: value for name, value in said.get(group, {}).items() if name in fields}
    except InputError as error:
        raise InputError(f"{path} does not belong to its checkpoint: {error}") from error
    return found | {"objective": objective, "model": found["model"] | model}


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Any],
    holder: str = "model.safetensors",
    where: str = "architecture.json",
) -> None:
    """Raises InputError unless the names and shapes of `tensors` are those `expected`.

    `holder` and `where` name, for the error, the locations of the tensors and of the description.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{holder} lacks {name}")
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{name} in {holder} is {list(tensors[name].shape)}, and {where} says {list(shape)}")
    if more := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{holder} holds {more[0][:80]!r}, which {where} knows nothing of")


def as_float32(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in float32; raises InputError unless all values are finite floating-point numbers there."""
    found = {}
    for name, value in tensors.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise InputError(f"{name} holds values of type {value.dtype}, where parameters are floating-point numbers")
        with np.errstate(invalid="ignore", over="ignore"):
            found[name] = np.asarray(value, np.float32)
            # Detects inf and NaN by the sum, without another array of this size.
            finite = np.isfinite(found[name].sum(dtype=np.float64))
        if not finite:
            raise InputError(
                f"{name} holds values that are not finite numbers: the training that made it diverged, or the file is "
                "damaged"
            )
    return found


def _fields(
    value: Any, where: str, needed: Mapping[str, Check], allowed: Mapping[str, Check], closed: bool = True
) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is no object")
    for name in needed:
        if name not in value:
            raise InputError(f"{where} lacks {name}")
    for name, one in value.items():
        check = needed.get(name) or allowed.get(name)
        if check is None and closed:
            raise InputError(f"{where} has {name[:80]!r}, which is not known here")
        if check is not None and not check(one):
            raise InputError(f"{where}: {name} is {str(one)[:80]!r}, which is none that can be")


def _any(value: Any) -> bool:
    return True


def _object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _TEXT


def _one_of(*values: Any) -> Check:
    return lambda value: type(value) in map(type, values) and value in values


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Check:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _list(check: Check, most: int = _OUTPUTS) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _numbers(low: float, high: float) -> Check:
    return lambda value: _list(_number(low, high), 3)(value) and len(value) in (1, 3)


def _sides(value: Any) -> bool:
    return _list(_whole(1, _SIDE), 2)(value) and len(value) == 2


_HEAD: dict[str, Check] = {
    "pool": _one_of("mean", "cls"),
    "head": _any,
    "task": _text,
    "classes": _list(_text),
    "outputs": _list(_text),
    "scale": _any,
}
_PIXELS: tuple[dict[str, Check], dict[str, Check]] = (
    {"kind": _one_of("linear", "decoder", "queries")},
    {"width": _whole(1, _WIDTH), "queries": _whole(1, 1 << 10), "blocks": _whole(1, _DEPTH)},
)
_SCALE: tuple[dict[str, Check], dict[str, Check]] = (
    {
        "mean": _list(_number(-1e15, 1e15)),
        "deviation": _list(_number(1e-15, 1e15)),
        "unit": _list(_text),
        "of_frame": _list(_one_of(True, False)),
    },
    {},
)
_VIT: tuple[dict[str, Check], dict[str, Check]] = (
    {
        "image_size": _sides,
        "patch_size": _whole(1, _SIDE),
        "channels": _one_of(1, 3),
        "width": _whole(1, _WIDTH),
        "depth": _whole(1, _DEPTH),
        "num_heads": _whole(1, _WIDTH),
    },
    {"mlp_ratio": _number(1 / 64, 64), "learned_positions": _one_of(True, False), "norm_eps": _number(0, 1)},
)
_DECODER: tuple[dict[str, Check], dict[str, Check]] = (
    {
        "decoder_width": _whole(1, _WIDTH),
        "decoder_depth": _whole(0, _DEPTH),
        "decoder_num_heads": _whole(1, _WIDTH),
    },
    {"kind": _one_of("cross", "latent"), "outputs": _whole(1, _WIDTH)},
)
_RESNET: tuple[dict[str, Check], dict[str, Check]] = (
    {},
    {"width": _whole(1, _WIDTH), "depths": _list(_whole(1, _DEPTH), 4), "channels": _one_of(1, 3)},
)
_UNET: tuple[dict[str, Check], dict[str, Check]] = (
    {"channels": _one_of(1, 3), "width": _whole(1, 256), "depth": _whole(1, 6)},
    {},
)
_NETWORKS = {"vit": ("encoder", _VIT), "resnet50": ("resnet", _RESNET), "unet": ("unet", _UNET)}
#: The fields that `reading` uses in the files next to third-party weights, and in the objects inside them.
_SETTINGS: dict[str, dict[str, Check]] = {
    "config": {
        **dict.fromkeys(("model_args", "pretrained_cfg"), _or_none(_object)),
        **dict.fromkeys(("image_size", "img_size"), lambda value: value is None or type(value) in (int, list)),
        **dict.fromkeys(("mean", "std"), _or_none(_numbers(-1e3, 1e3))),
    },
    "preprocessor_config": dict.fromkeys(("image_mean", "image_std"), _or_none(_numbers(-1e3, 1e3))),
    "export": {"architecture": _object, "decoder": _or_none(_object)}
    | dict.fromkeys(("classes", "outputs"), _or_none(_list(_text))),
    "architecture": {
        "encoder": _object,
        "image_size": _sides,
        "patch_size": _whole(1, _SIDE),
        "channels": _one_of(1, 3),
        **dict.fromkeys(("classes", "outputs"), _or_none(_list(_text))),
    },
    "preprocessing": {"image_size": _sides, "channels": _one_of(1, 3)}
    | dict.fromkeys(("mean", "std"), _numbers(-1e3, 1e3)),
}
_MASK: dict[str, Check] = {
    "ratio": _number(0, 1),
    "fan_aware": _one_of(True, False),
    "block": _whole(1, _SIDE),
    "blur": _number(0, 32),
    "share": _number(0, 1),
}
_LOSS: dict[str, Check] = {"normalize_targets": _one_of(True, False)}
_STAGE: dict[str, Check] = {
    **dict.fromkeys(("job", "code", "file", "member", "licence"), _text),
    "step": lambda value: value is None or _whole(0, 1 << 62)(value),
    "config": lambda value: value is None or isinstance(value, Mapping),
    "data": _list(lambda value: isinstance(value, Mapping)),
}
_DATA: dict[str, Check] = {
    **dict.fromkeys(("dataset", "licence", "citation"), _text),
    "frame_hashes": lambda value: isinstance(value, str),  # whose length has no meaning for memory
    "frames": lambda value: value is None or _whole(0, 1 << 62)(value),
}
