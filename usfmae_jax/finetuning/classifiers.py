"""From a config and starting weights to the classifier that is fine-tuned; refuses what does not fit together."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from usfmae_jax.errors import InputError
from usfmae_jax.interop import resnet as resnet_files
from usfmae_jax.interop.model import Model, build, flatten, open_model, preprocessing, unflatten
from usfmae_jax.models.patches import check_patches
from usfmae_jax.models.resnet import STAGES
from usfmae_jax.models.vit import SIZES
from usfmae_jax.training.common import check_computation, square
from usfmae_jax.training.state import State

#: Mean and deviation of the input, by channels: of grey ultrasound frames; of ImageNet, which published weights expect.
_PIXELS = {1: ((0.25,), (0.2,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
#: Fields of `config.model` that fix parameters.
_SHAPE = ("patch_size", "channels", "width", "depth", "num_heads")
#: Suffixes of PyTorch's weight files.
_FILES = (".safetensors", ".pth", ".pt")


def read_init(config: ml_collections.ConfigDict, class_names: Sequence[str]) -> Model | None:
    """The weights of `config.init`; None for random ones.

    Raises:
      InputError: they cannot be read, or are a file and `config.model.arch` is not resnet50.
    """
    if not config.init:
        return None
    if not config.init.lower().endswith(_FILES):
        try:
            return open_model(config.init)
        except InputError as error:
            raise InputError(f"config.init: {error}") from error
    if config.model.arch != "resnet50":
        raise InputError(
            f"config.init={config.init} is a file: of a ResNet-50, add --config.model.arch=resnet50; of a ViT, convert "
            "it to an encoder directory first"
        )
    # A first convolution of three channels becomes one of one only on request: that changes what published weights see.
    params, stats = resnet_files.read_resnet(config.init, num_classes=len(class_names), grey=config.model.channels == 1)
    shape = resnet_files.architecture(params)
    # The statistics inside belong to ImageNet's normalisation, of which grey takes the average over channels.
    mean, std = _PIXELS[3] if shape["channels"] == 3 else tuple((sum(v) / 3,) for v in _PIXELS[3])
    pixels = preprocessing((224, 224), 1, mean, std)
    lineage = [{"job": "published weights", "file": os.path.basename(config.init)}]
    return Model(params, {"model": "resnet50", "resnet": shape}, pixels, lineage, stats)


def describe_model(
    config: ml_collections.ConfigDict, class_names: Sequence[str], weights: Model | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `interop.model.build` takes, and how pixels become the model's input.

    Raises:
      InputError: names the field that cannot be, or that contradicts the weights, with both values.
    """
    model = config.model
    check_computation(model)
    if model.arch not in ("", *SIZES, "resnet50"):
        raise InputError(f"config.model.arch={model.arch!r} must be one of {', '.join(SIZES)}, resnet50")
    if model.pool not in ("mean", "cls"):
        raise InputError(f"config.model.pool={model.pool!r} must be 'mean' (of the patch tokens) or 'cls'")
    if not 0 <= model.drop_path < 1:
        raise InputError(f"config.model.drop_path={model.drop_path} must lie in [0, 1)")
    kind = weights.description["model"] if weights else "vit"
    asked = {"": kind, "resnet50": "resnet50"}.get(model.arch, "vit")
    if weights and asked != kind:
        raise InputError(f"config.model.arch={model.arch} but config.init={config.init} holds a {kind}")
    before = weights.preprocessing if weights else {}
    if asked == "resnet50":
        shape = _resnet_shape(config, weights)
        size = square(model.image_size or before.get("image_size", (224, 224)))
        description = {"model": "resnet50", "resnet": shape}
    else:
        shape = _vit_shape(config, weights)
        size = square(model.image_size or before.get("image_size", shape["image_size"]))
        if not weights:
            shape["image_size"] = list(size)
        _check_vit(shape, size)
        description = {"model": "vit", "encoder": shape, "pool": model.pool}
    channels = shape["channels"]
    if channels not in _PIXELS or config.data.channels not in (1, channels):
        raise InputError(
            f"config.data.channels={config.data.channels} must be 1 or the model's {channels}, and those 1 or 3"
        )
    mean, std = (
        tuple(model[name] or before.get(name, default))
        for name, default in zip(("mean", "std"), _PIXELS[channels], strict=True)
    )
    if len(mean) != channels or len(std) != channels:
        raise InputError(f"config.model.mean={mean} and config.model.std={std} need {channels} entries, one a channel")
    description["classes"] = list(class_names)
    return description, preprocessing(size, config.data.channels, mean, std)


def _vit_shape(config: ml_collections.ConfigDict, weights: Model | None) -> dict[str, Any]:
    model = config.model
    named = SIZES[model.arch] if model.arch else {}
    if weights is None:
        shape = dict(named or SIZES["tiny"]) | {name: model[name] for name in _SHAPE if model[name]}
        return shape | {"image_size": list(shape["image_size"])}
    shape = dict(weights.encoder().description["encoder"])
    for name in _SHAPE:
        field = f"config.model.{name}" if model[name] else f"config.model.arch={model.arch}, whose {name}"
        wanted = model[name] or named.get(name, shape[name])
        if wanted != shape[name]:
            raise InputError(f"{field} is {wanted}, but {shape[name]} in config.init={config.init}; leave one out")
    return shape


def _check_vit(shape: dict[str, Any], size: tuple[int, int]) -> None:
    if shape["width"] % shape["num_heads"] or shape["width"] % 4:
        raise InputError(
            f"config.model.width={shape['width']} must be divisible by 4 and by "
            f"config.model.num_heads={shape['num_heads']}"
        )
    try:
        check_patches(size, shape["patch_size"])
    except ValueError as error:
        raise InputError(f"{error}: change config.model.image_size or config.model.patch_size") from error


def _resnet_shape(config: ml_collections.ConfigDict, weights: Model | None) -> dict[str, Any]:
    model = config.model
    found: dict[str, Any] = (
        weights.description["resnet"] if weights else {"channels": 3, "depths": (3, 4, 6, 3), "width": 64}
    )
    depths = (model.depth,) * STAGES if model.depth else tuple(found["depths"])
    shape = {"channels": model.channels or found["channels"], "depths": depths, "width": model.width or found["width"]}
    if weights:
        for name, field in (("channels", "channels"), ("depths", "depth"), ("width", "width")):
            there = tuple(found[name]) if name == "depths" else found[name]
            if shape[name] != there:
                raise InputError(f"config.model.{field} gives {shape[name]}, but {there} in config.init={config.init}")
    return shape | {"depths": list(depths)}


def trained_part(config: ml_collections.ConfigDict, description: dict[str, Any]) -> tuple[int, tuple[str, ...], int]:
    """What `config.mode` trains.

    Returns:
      `freeze` for `build`; the beginnings of the names of the trained parameters, () = all; how many blocks
      of the encoder's stack are updated, 0 = all.

    Raises:
      InputError: no such mode, or not so many blocks.
    """
    mode, last = config.mode, config.last_k
    if mode not in ("full", "frozen", "last_k"):
        raise InputError(f"config.mode={mode!r} must be 'full', 'frozen' (the head only) or 'last_k'")
    vit = description["model"] == "vit"
    depth = description["encoder"]["depth"] if vit else STAGES
    if mode == "full":
        return 0, (), 0
    if mode == "frozen":
        return depth, ("head.", "head_norm."), 0
    if not 1 <= last <= depth:
        raise InputError(
            f"config.last_k={last} must lie between 1 and the {depth} {'blocks' if vit else 'stages'} of the model"
        )
    freeze = depth - last
    if vit:
        return freeze, ("head.", "head_norm.", "encoder.norm.", "encoder.blocks."), last
    return freeze, ("head.", *(f"layer{stage + 1}." for stage in range(freeze, depth))), 0


def model_maker(
    config: ml_collections.ConfigDict, description: dict[str, Any], freeze: int
) -> Callable[[nnx.Rngs], nnx.Module]:
    """What builds the model, computing as the config says."""
    model = config.model
    how = {"attention": model.attention or None, "scan": model.scan, "remat": model.remat}
    return build(
        description,
        dtype=jnp.dtype(model.dtype),
        drop_path=model.drop_path,
        freeze=freeze,
        **(how if description["model"] == "vit" else {}),
    )


def count_parameters(make_model: Callable[[nnx.Rngs], nnx.Module]) -> int:
    """Numbers that a model learns, without making it."""
    shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make_model(nnx.Rngs(0)), nnx.Param)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def loadable(weights: Model, description: dict[str, Any]) -> dict[str, Any]:
    """What weights have for a model: `params`, and `stats` if any.

    An encoder fills the encoder. A classifier fills all but its head, and the head too if it is for the same classes.

    Args:
      weights: from `read_init`.
      description: of the model.
    """
    params = dict(weights.params)
    if weights.description.get("classes", description["classes"]) != description["classes"]:
        params.pop("head", None)
    if weights.description.get("pool") != description.get("pool"):
        params.pop("head", None)
        params.pop("head_norm", None)
    return {"params": params, "stats": weights.stats} if weights.stats else {"params": params}


def check_weights(make_model: Callable[[nnx.Rngs], nnx.Module], loaded: dict[str, Any], source: str) -> None:
    """Refuses weights that do not fill a model but for its head.

    Args:
      make_model: builds the model.
      loaded: from `loadable`.
      source: the person's name for the weights.

    Raises:
      InputError: names the first parameter that is unknown, missing or of another shape.
    """
    for group, kind in (("params", nnx.Param), ("stats", nnx.BatchStat)):
        own = jax.eval_shape(lambda kind=kind: nnx.to_pure_dict(nnx.state(make_model(nnx.Rngs(0)), kind)))
        new, old = flatten(loaded.get(group, {})), flatten(own)
        unknown = new.keys() - old.keys()
        if unknown:
            raise InputError(f"config.init={source} has the parameter {min(unknown)}, which this model has not")
        absent = {name for name in old.keys() - new.keys() if not name.startswith(("head.", "head_norm."))}
        if absent:
            raise InputError(f"config.init={source} lacks the parameter {min(absent)} of this model")
        for name, leaf in new.items():
            if leaf.shape != old[name].shape:
                raise InputError(
                    f"config.init={source}: {name} is {leaf.shape} there and {old[name].shape} in this config"
                )


def with_weights(state: State, loaded: dict[str, Any]) -> State:
    """Puts what `loadable` gave into a fresh state, on the devices that its arrays are on."""
    filled = {}
    for group, new in loaded.items():
        old = flatten(state[group])
        placed = {name: jax.device_put(leaf, old[name].sharding) for name, leaf in flatten(new).items()}
        filled[group] = unflatten(old | placed)
    return state | filled


def training_flops(description: dict[str, Any], size: tuple[int, int]) -> float:
    """Floating-point operations to train on one image once, all parameters; backward counted as twice forward."""
    if description["model"] == "resnet50":
        # 4.1e9 multiply-adds at 224 pixels and a stem of 64 channels (He et al. 2016, table 1, and v1.5's stride).
        share = size[0] * size[1] / 224**2 * (description["resnet"]["width"] / 64) ** 2
        return 3 * 2 * 4.1e9 * share * sum(description["resnet"]["depths"]) / 16
    encoder = description["encoder"]
    width, patch = encoder["width"], encoder["patch_size"]
    tokens = (size[0] // patch) * (size[1] // patch) + 1
    block = 2 * tokens * width**2 * (4 + 2 * encoder["mlp_ratio"]) + 4 * tokens**2 * width
    return 3 * (2 * (tokens - 1) * patch**2 * encoder["channels"] * width + encoder["depth"] * block)
