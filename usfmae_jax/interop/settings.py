"""What has to be known of a model beside its tensors, from the settings that its format keeps."""

import dataclasses
from typing import Any

from usfmae_jax.errors import InputError
from usfmae_jax.interop.model import Model, preprocessing
from usfmae_jax.interop.source import Source
from usfmae_jax.interop.tensors import Tensors
from usfmae_jax.models.layers import NORM_EPS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Beginnings of the original names of a classifier's head.
HEAD = ("head.", "fc_norm.")

#: Heads of the usual models, by width; the tensors do not tell.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {128: 4, 256: 8, 512: 16}


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


def read_settings(
    source: Source, found: Tensors, depth: int, decoder_depth: int, options: Options, notes: list[str]
) -> Model:
    """Collects them from shapes, from the JSON files beside the weights, and from what is usual.

    Args:
      source: the file.
      found: its tensors under the original names.
      depth: of the encoder.
      decoder_depth: 0 without a decoder.
      options: overrule the file.
      notes: receives what was assumed.

    Returns:
      the model without parameters and lineage.

    Raises:
      InputError: something has to be known and is not, or the model is of a kind that there is none of here.
    """
    config = source.settings.get("config", {})
    _check_kind(config)
    own = _own(source)
    width, channels, patch = (found["patch_embed.proj.weight"].shape[i] for i in (0, 1, 2))
    hidden = found["blocks.0.mlp.fc1.bias"].shape[0] if "blocks.0.mlp.fc1.bias" in found else 4 * width
    heads = _heads("num_heads", options.num_heads, width, _HEADS, own["architecture"], config, "num_attention_heads")
    size, used = _image_size(config, own, found, patch, options)
    architecture = {
        "image_size": size,
        "patch_size": patch,
        "channels": channels,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": hidden / width,
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
    if decoder_depth and "decoder_embed.weight" in found:
        narrow = found["decoder_embed.weight"].shape[0]
        own_decoder = own["decoder"] or {}
        description["decoder"] = {
            "decoder_width": narrow,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": _heads(
                "decoder_num_heads",
                options.decoder_num_heads,
                narrow,
                _DECODER_HEADS,
                own_decoder,
                config,
                "decoder_num_attention_heads",
            ),
        }
    if any(name.startswith(HEAD) for name in found):
        description["pool"] = "mean" if any(name.startswith("fc_norm.") for name in found) else "cls"
        description["classes"] = _classes(own, config, found)
    return Model({}, description, _preprocessing(source, own, channels, used, options, notes), [])


def _own(source: Source) -> dict[str, Any]:
    """What our own exports and directories say of the model."""
    export, about = source.settings.get("export", {}).get("model"), source.settings.get("architecture", {})
    own = {"architecture": about.get("encoder", about), "decoder": None, "classes": about.get("classes", ())}
    own |= export if isinstance(export, dict) else {}
    return own | {"image_size": source.settings.get("preprocessing", {}).get("image_size")}


def _check_kind(config: dict[str, Any]) -> None:
    for field, wanted in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(field, wanted) != wanted:
            raise InputError(f"config.json has {field}={config[field]!r}; only {field}={wanted!r} can be computed here")


def _heads(
    name: str, given: int, width: int, usual: dict[int, int], own: dict[str, Any], config: dict[str, Any], theirs: str
) -> int:
    arguments = config.get("model_args") or {}  # timm's
    heads = given or own.get(name) or config.get(theirs) or arguments.get(name) or usual.get(width, 0)
    if not isinstance(heads, int) or heads < 1:
        raise InputError(f"the file does not say how many attention heads share a width of {width}; add --{name}=N")
    if width % heads:
        raise InputError(f"{heads} attention heads do not divide a width of {width}; correct it with --{name}=N")
    return heads


def _image_size(
    config: dict[str, Any], own: dict[str, Any], found: Tensors, patch: int, options: Options
) -> tuple[list[int], list[int]]:
    """The size that the position table is made for, and the one that the file's table is for."""
    arguments, stated = config.get("model_args") or {}, own["architecture"].get("image_size")
    size = stated or config.get("image_size") or arguments.get("img_size")
    sides = [size, size] if isinstance(size, int) else list(size or ())
    table = found.get("pos_embed")
    if len(sides) != 2 or not all(isinstance(side, int) and side >= patch for side in sides):
        side = round((table.shape[1] - 1) ** 0.5) * patch if table and len(table.shape) == 3 else 0
        sides = [side, side] if side else list(options.image_size or (224, 224))
    return sides, list(own["image_size"] or sides)


def _preprocessing(
    source: Source, own: dict[str, Any], channels: int, size: list[int], options: Options, notes: list[str]
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
    named = list(own["classes"] or ())
    labels = config.get("id2label")
    if not named and isinstance(labels, dict):
        named = [labels[key] for key in sorted(labels, key=int)] if all(k.isdigit() for k in labels) else []
    return list(map(str, named if len(named) == count else range(count)))
