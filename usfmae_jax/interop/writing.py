"""Writes a `Model` in other formats: timm, Hugging Face and the original MAE code; and the table of all writers."""

import json
import os
from collections.abc import Callable
from typing import Any

from usfmae_jax.errors import InputError
from usfmae_jax.interop import names
from usfmae_jax.interop.files import Tensors, from_array, write_safetensors
from usfmae_jax.interop.model import Model, flatten, save_model
from usfmae_jax.interop.onnx import write_onnx
from usfmae_jax.interop.stablehlo import write_stablehlo
from usfmae_jax.models.layers import NORM_EPS

#: timm's models by width; everything else is set by arguments.
_TIMM = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
_HF = {"encoder": "ViTModel", "mae": "ViTMAEForPreTraining", "classifier": "ViTForImageClassification"}


def original_tensors(model: Model) -> Tensors:
    """All parameters under the original names, with position tables for the image size that the model is used on.

    For a classifier that pools patches, the encoder's final norm is left out, as in MAE's fine-tuning and in timm.
    """
    about = model.description["encoder"]
    tensors = names.to_original(flatten(model.params), about["patch_size"], about["channels"])
    tensors.pop("position", None)
    tensors["pos_embed"] = from_array(model.stored_positions())
    if model.kind == "mae":
        narrow = model.description["decoder"]["decoder_width"]
        tensors["decoder_pos_embed"] = from_array(names.stored_table(model.table_grid(), model.grid(), narrow))
    if model.description.get("pool") == "mean":
        del tensors["norm.weight"], tensors["norm.bias"]
    return tensors


def write_timm(model: Model, directory: str) -> None:
    """Writes `model.safetensors` and `config.json` for timm: `create_model("local-dir:DIRECTORY", pretrained=True)`."""
    size, decoded = model.preprocessing["image_size"], model.preprocessing
    about, classes = model.description["encoder"], model.description.get("classes", [])
    pool = "avg" if model.description.get("pool") == "mean" else "token"
    arguments = {
        "img_size": size,
        "patch_size": about["patch_size"],
        "in_chans": about["channels"],
        "embed_dim": about["width"],
        "depth": about["depth"],
        "num_heads": about["num_heads"],
        "mlp_ratio": about["mlp_ratio"],
        "global_pool": pool,
    }
    config = {
        "architecture": _TIMM.get(about["width"], "vit_base_patch16_224"),
        "num_classes": len(classes),
        "num_features": about["width"],
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [about["channels"], *size],
            "fixed_input_size": True,
            "interpolation": "box",  # area averaging
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": decoded["mean"],
            "std": decoded["std"],
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "label_names": classes or None,
        },
    }
    write_json(directory, "config.json", config)
    _write(model, directory, original_tensors(model))


def write_hf(model: Model, directory: str) -> None:
    """Writes a directory for `from_pretrained`: ViTMAE with a decoder, ViT without one, or ViT with a classifier.

    Raises:
      InputError: Hugging Face has no such model.
    """
    if model.description.get("pool") == "mean":
        raise InputError(
            "Hugging Face's ViT classifies by its class token, and this model by the mean of its patches; "
            "use --format=timm, which has both"
        )
    height, width = model.preprocessing["image_size"]
    if model.kind == "mae" and height != width:
        raise InputError(f"Hugging Face's ViTMAE is made for square images, not {height}x{width}; use --format=mae")
    about = model.description["encoder"]
    config: dict[str, Any] = {
        "model_type": "vit_mae" if model.kind == "mae" else "vit",
        "architectures": [_HF[model.kind]],
        "dtype": "float32",
        "image_size": height if height == width else [height, width],
        "patch_size": about["patch_size"],
        "num_channels": about["channels"],
        "hidden_size": about["width"],
        "num_hidden_layers": about["depth"],
        "num_attention_heads": about["num_heads"],
        "intermediate_size": int(about["width"] * about["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": about.get("norm_eps", NORM_EPS),
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
    if model.kind == "mae":
        decoder = model.description["decoder"]
        trained = model.lineage[-1].get("config", {}) if model.lineage else {}
        config |= {
            "decoder_hidden_size": decoder["decoder_width"],
            "decoder_num_hidden_layers": decoder["decoder_depth"],
            "decoder_num_attention_heads": decoder["decoder_num_heads"],
            "decoder_intermediate_size": int(decoder["decoder_width"] * about["mlp_ratio"]),
            "mask_ratio": trained.get("mask", {}).get("ratio", 0.75),
            "norm_pix_loss": trained.get("loss", {}).get("normalize_targets", True),
        }
    if model.kind == "classifier":
        config["id2label"] = {str(i): name for i, name in enumerate(model.description["classes"])}
        config["label2id"] = {name: i for i, name in enumerate(model.description["classes"])}
    write_json(directory, "config.json", config)
    tensors = names.to_hf(original_tensors(model))
    _write(model, directory, tensors)


def write_mae(model: Model, directory: str) -> None:
    """Writes `model.safetensors` under the names of the original MAE code."""
    _write(model, directory, original_tensors(model))


def add_pth(directory: str) -> None:
    """Adds `mae.pth`, nested as the original code expects, to the output of `write_mae`; skipped without PyTorch."""
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError:
        return
    path = os.path.join(directory, "mae.pth")
    torch.save({"model": load_file(os.path.join(directory, "model.safetensors"))}, path + ".incomplete")
    os.replace(path + ".incomplete", path)


def _write(model: Model, directory: str, tensors: Tensors) -> None:
    # transformers requires the format entry.
    metadata = {"format": "pt", "lineage": json.dumps(model.lineage)}
    write_safetensors(os.path.join(directory, "model.safetensors"), tensors, metadata)


def write_preprocessing(model: Model, directory: str) -> None:
    """Writes the preprocessing, as our `preprocessing.json` and as Hugging Face's `preprocessor_config.json`."""
    about = model.preprocessing
    network = model.description.get("encoder") or model.description["unet"]
    write_json(directory, "preprocessing.json", about)
    height, width = about["image_size"]
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": network["channels"] == 3,  # a grey image is repeated
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 4,  # box: area averaging, like ours
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": about["mean"],
        "image_std": about["std"],
    }
    write_json(directory, "preprocessor_config.json", config)


def write_json(directory: str, name: str, value: dict[str, Any]) -> None:
    """Writes one of the JSON files of an export."""
    with open(os.path.join(directory, name), "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")


#: Functions that write an export into a directory, by format.
WRITERS: dict[str, Callable[[Model, str], None]] = {
    "safetensors": lambda model, directory: save_model(directory, model),
    "timm": write_timm,
    "hf": write_hf,
    "mae": write_mae,
    "onnx": write_onnx,
    "stablehlo": write_stablehlo,
}
