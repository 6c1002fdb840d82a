"""What the JSON files of an encoder or classifier directory may say: they may be a stranger's.

Whatever they declare is bounded before anything is built from it, and then has to fit the tensors.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from usfmae_jax.errors import InputError

_SIDE, _PATCHES, _CELLS = 4096, 1 << 14, 1 << 26  # of the position table: images, patches, numbers
_WIDTH, _DEPTH, _OUTPUTS, _TEXT = 1 << 13, 256, 100_000, 1 << 20

Check = Callable[[Any], bool]


def check_description(about: Any) -> None:
    """Raises InputError unless this is a description that `build` takes, of a model of a usual size."""
    _fields(
        about,
        "architecture.json",
        {"model": _one_of(*_NETWORKS)},
        _HEAD | dict.fromkeys(("encoder", "resnet", "unet"), _any),
    )
    name, fields = _NETWORKS[about["model"]]
    if name not in about:
        raise InputError(f"architecture.json lacks {name}")
    _fields(about[name], f"{name} of architecture.json", *fields)
    if "head" in about:
        _fields(about["head"], "head of architecture.json", *_PIXELS)
    _check_scale(about)
    if name != "encoder":
        return
    encoder = about[name]
    if (head := about.get("head", {})).get("kind") == "queries":
        for field in ("width", "queries", "blocks"):
            if field not in head:
                raise InputError(f"head of architecture.json lacks {field}")
        if head["blocks"] > encoder["depth"]:
            raise InputError(f"architecture.json: queries through {head['blocks']} of {encoder['depth']} blocks")
    sides, patch, width = encoder["image_size"], encoder["patch_size"], encoder["width"]
    patches = math.prod(side // patch for side in sides)
    if any(side % patch for side in sides) or not 0 < patches <= _PATCHES or patches * width > _CELLS:
        raise InputError(f"architecture.json: images of {sides} in patches of {patch} are none that a model is for")
    if width % encoder["num_heads"] or width % 4:
        raise InputError(f"architecture.json: a width of {width} cannot be split among {encoder['num_heads']} heads")


def _check_scale(about: Mapping[str, Any]) -> None:
    """What gives the outputs of a regression their units: a mean and a deviation of each."""
    if about.get("task") != "regression":
        if "scale" in about:
            raise InputError("architecture.json has a scale, which is for regression")
        return
    _fields(about, "architecture.json", {"outputs": _any, "scale": _any}, {}, closed=False)
    _fields(about["scale"], "scale of architecture.json", *_SCALE)
    lengths = {len(one) for one in about["scale"].values()}
    if lengths != {len(about["outputs"])}:
        raise InputError("scale of architecture.json: mean, deviation and unit are not one for each of outputs")


def check_preprocessing(pixels: Any, about: Mapping[str, Any]) -> None:
    """Raises InputError unless this says how pixels become the input of the model that `about` describes."""
    _fields(
        pixels,
        "preprocessing.json",
        {"image_size": _sides, "channels": _one_of(1, 3), "mean": _numbers(-1e3, 1e3), "std": _numbers(1e-6, 1e3)},
        {"resize": _text, "scale": _number(0, 1e3)},
    )
    sides, patch = pixels["image_size"], about.get("encoder", {}).get("patch_size", 1)
    if "encoder" in about and (any(s % patch for s in sides) or math.prod(s // patch for s in sides) > _PATCHES):
        raise InputError(f"preprocessing.json: images of {sides} are none for patches of {patch}")


def check_lineage(stages: Any) -> None:
    """Raises InputError unless these are stages of a lineage, as far as they are looked at."""
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


def check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]) -> None:
    """Raises InputError unless the tensors are those of the network, by name and shape."""
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"model.safetensors lacks {name}")
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"{name} in model.safetensors is {list(tensors[name].shape)}, and architecture.json says {list(shape)}"
            )
    if more := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"model.safetensors holds {more[0][:80]!r}, which architecture.json knows nothing of")


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
_RESNET: tuple[dict[str, Check], dict[str, Check]] = (
    {},
    {"width": _whole(1, _WIDTH), "depths": _list(_whole(1, _DEPTH), 4), "channels": _one_of(1, 3)},
)
_UNET: tuple[dict[str, Check], dict[str, Check]] = (
    {"channels": _one_of(1, 3), "width": _whole(1, 256), "depth": _whole(1, 6)},
    {},
)
_NETWORKS = {"vit": ("encoder", _VIT), "resnet50": ("resnet", _RESNET), "unet": ("unet", _UNET)}
_STAGE: dict[str, Check] = {
    **dict.fromkeys(("job", "code", "file", "member", "licence"), _text),
    "step": lambda value: value is None or _whole(0, 1 << 62)(value),
    "config": lambda value: value is None or isinstance(value, Mapping),
    "data": _list(lambda value: isinstance(value, Mapping)),
}
_DATA: dict[str, Check] = {
    **dict.fromkeys(("dataset", "licence", "citation"), _text),
    "frames": lambda value: value is None or _whole(0, 1 << 62)(value),
}
