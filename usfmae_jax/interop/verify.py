"""Verifies an export: runs the same images through a model and its export and measures the differences."""

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from usfmae_jax.errors import install
from usfmae_jax.interop.files import open_safetensors, open_torch
from usfmae_jax.interop.model import Model, build, flatten, model_graph
from usfmae_jax.interop.stablehlo import inference, run_stablehlo
from usfmae_jax.models.mae import mask_from_noise, masked_error, patch_targets
from usfmae_jax.models.patches import normalize_images

#: Largest absolute difference, float32, that an export may have: in features and probabilities, and in the loss.
LIMIT, LOSS_LIMIT = 1e-4, 1e-5
MASK_RATIO = 0.75

#: Modules to import instead of the package itself: transformers imports its parts lazily.
_IMPORTED = {"transformers": "transformers.models.vit_mae.modeling_vit_mae"}

Outputs = dict[str, np.ndarray]


class UnavailableError(Exception):
    """The runtime to compare with is not installed; the message tells how to install it."""


def sample_images(model: Model) -> np.ndarray:
    """Two fixed uint8 images `[2, H, W, C]`: one smooth, one of speckle."""
    (height, width), channels = model.preprocessing["image_size"], model.preprocessing["channels"]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    smooth = 127 + 120 * np.sin(rows / height * 7) * np.cos(columns / width * 5)
    speckle = np.random.default_rng(0).rayleigh(50, (height, width)).clip(0, 255)
    images = np.stack([smooth, speckle]).astype(np.uint8)
    return np.stack([np.roll(images, 3 * c, axis=2) for c in range(channels)], axis=-1)


def sample_noise(model: Model) -> np.ndarray:
    """Fixed noise from which masks are drawn: float32 `[2, N]`."""
    rows, columns = model.grid()
    return np.random.default_rng(1).random((2, rows * columns), np.float32)


def expected(model: Model, images: np.ndarray) -> Outputs:
    """Our model's outputs for the images: those of `inference` and, with a decoder, the pretraining loss."""
    used = model.encoder() if model.kind == "mae" else model
    outputs = dict(jax.jit(inference(used))(images, used.params))
    if model.kind == "mae":
        outputs["loss"] = jax.jit(_loss(model))(images, model.params, sample_noise(model))
    return jax.device_get(outputs)


def _loss(model: Model) -> Callable[[jax.Array, Any, jax.Array], jax.Array]:
    graph, patch_size = model_graph(build(model.description)), model.description["encoder"]["patch_size"]
    mean, std = tuple(model.preprocessing["mean"]), tuple(model.preprocessing["std"])

    def apply(images: jax.Array, params: Any, noise: jax.Array) -> jax.Array:
        x = normalize_images(images, mean, std)
        keep, restore, mask = mask_from_noise(noise, MASK_RATIO)
        predicted = nnx.merge(graph, params)(x, keep, restore)
        error, count = masked_error(predicted, patch_targets(x, patch_size, normalize=True), mask)
        return error / count

    return apply


def observed(form: str, model: Model, directory: str, images: np.ndarray) -> tuple[Outputs, str]:
    """The export's outputs for the images, computed from its files alone, and the runtime's versions.

    Raises:
      UnavailableError: the runtime is not installed.
    """
    runners: dict[str, tuple[Callable[[Model, str, np.ndarray], Outputs], tuple[str, ...]]] = {
        "timm": (_run_timm, ("timm", "torch")),
        "hf": (_run_hf, ("transformers", "torch")),
        "mae": (_run_mae, ("torch",)),
        "onnx": (_run_onnx, ("onnxruntime",)),
        "stablehlo": (lambda _, directory, images: run_stablehlo(directory, images), ("jax",)),
    }
    run, packages = runners[form]
    try:
        if form in ("timm", "hf"):
            declare_torchvision()
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        for name in packages:
            importlib.import_module(_IMPORTED.get(name, name))
    except ImportError as error:
        raise UnavailableError(f"{error.name or packages[0]} is not installed: {install('interop')}") from error
    except Exception as error:  # incompatible packages can raise anything
        raise UnavailableError(f"{' or '.join(packages)} cannot be imported: {str(error).splitlines()[0]}") from error
    return run(model, directory, images), versions


_DECLARED: list[Any] = []  # keeps the declarations alive


def declare_torchvision() -> None:
    """Makes timm and transformers importable if the installed torchvision was built for another PyTorch.

    Neither uses its operators for a ViT, but importing torchvision requires their declarations.

    Raises:
      ImportError: PyTorch is missing.
    """
    from torch import library

    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        if not _DECLARED:
            _DECLARED.append(library.Library("torchvision", "FRAGMENT"))
            for name in ("nms", "qnms"):
                _DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def compare_parameters(model: Model, directory: str) -> dict[str, Any]:
    """The comparison reported in `export.json` for an export in our own format: of every parameter."""
    stored = open_safetensors(os.path.join(directory, "model.safetensors"))[0]
    prefix = "encoder." if model.kind == "encoder" else ""
    mine, differences = flatten(model.params), dict[str, float]()
    for name in sorted(mine.keys() | {prefix + name for name in stored}):  # one by one: a large model is in memory once
        theirs = {name: stored[name.removeprefix(prefix)].read()} if name.removeprefix(prefix) in stored else {}
        differences |= largest_difference(mine, theirs) or {name: np.inf}
    return _measured(differences, dict.fromkeys(differences, 0.0), "its parameters, one by one", 0)


def compare_outputs(form: str, model: Model, directory: str, images: np.ndarray, ours: Outputs) -> dict[str, Any]:
    """The comparison reported in `export.json` for an export that can be run; `ours` are the model's own outputs."""
    try:
        theirs, runtime = observed(form, model, directory, images)
    except UnavailableError as error:
        return {"largest_difference": None, "not_compared": str(error)}
    differences = largest_difference(ours, theirs)
    limits = {name: LOSS_LIMIT if name == "loss" else LIMIT for name in differences}
    if scale := model.description.get("scale"):  # in units, plus the float32 resolution of their mean
        resolution = 4 * np.finfo(np.float32).eps * np.abs(scale["mean"])
        limits["outputs"] = float(np.max(LIMIT * np.asarray(scale["deviation"]) + resolution))
    return _measured(differences, limits, runtime, len(images))


def _measured(differences: dict[str, float], limits: dict[str, float], runtime: str, images: int) -> dict[str, Any]:
    return {
        "largest_difference": max(differences.values()),
        "limit": max(limits.values()),
        "limits": limits,
        "differences": differences,
        "runtime": runtime,
        "images": images,
    }


def largest_difference(ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """The largest absolute difference of every output; infinite if shapes differ or a value is not finite.

    For `classes`, by how much the named class is less probable than the most probable one, since there may be ties.
    """
    differences = {}
    for name, value in theirs.items():
        if name == "classes":
            differences[name] = _less_probable(ours, value)
            continue
        same = name in ours and ours[name].shape == value.shape
        difference = _farthest(np.atleast_1d(ours[name]), np.atleast_1d(value)) if same else np.inf
        differences[name] = difference if np.isfinite(difference) else np.inf
    return differences


def _less_probable(ours: Outputs, classes: np.ndarray) -> float:
    shares = ours["probabilities"]
    if classes.shape != shares.shape[:-1] or classes.max() >= shares.shape[-1]:
        return np.inf
    said = np.take_along_axis(shares, classes[..., None].astype(np.int64), axis=-1)[..., 0]
    difference = float((shares.max(axis=-1) - said).max())
    return difference if np.isfinite(difference) else np.inf


def _farthest(ours: np.ndarray, theirs: np.ndarray) -> float:
    # Row by row: for a stack of blocks, the difference would take a third of the model's memory.
    return float(np.max([np.abs(np.subtract(a, b, dtype=np.float64)).max() for a, b in zip(ours, theirs, strict=True)]))


def share(params: dict[str, Any]) -> None:
    """Replaces the arrays of a nested dict, one by one, with ones whose memory JAX can share on the CPU."""
    for name, value in params.items():
        if isinstance(value, dict):
            share(value)
        else:
            params[name] = np.asarray(jnp.asarray(value))


def _normalised(model: Model, images: np.ndarray) -> Any:
    """Normalised images, float32 `[B, C, H, W]`, for PyTorch."""
    import torch

    mean, std = tuple(model.preprocessing["mean"]), tuple(model.preprocessing["std"])
    x = np.asarray(normalize_images(jnp.asarray(images), mean, std))
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def _features(model: Model, tokens: Any) -> Outputs:
    values = tokens.numpy()
    patches = values[:, 1:]
    grid = patches.reshape(-1, *model.grid(), values.shape[-1])
    return {"class_token": values[:, 0], "mean_patch": patches.mean(axis=1), "patch_grid": grid}


def _run_timm(model: Model, directory: str, images: np.ndarray) -> Outputs:
    import json

    import timm
    import torch
    from safetensors.torch import load_file

    with open(os.path.join(directory, "config.json")) as file:
        config = json.load(file)
    network = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    network.load_state_dict(load_file(os.path.join(directory, "model.safetensors")), strict=True, assign=True)
    with torch.inference_mode():
        x = _normalised(model, images)
        if model.kind == "classifier":
            return {"probabilities": network.eval()(x).softmax(dim=-1).numpy()}
        return _features(model, network.eval().forward_features(x))


def _run_hf(model: Model, directory: str, images: np.ndarray) -> Outputs:
    import torch
    from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        place = {"pretrained_model_name_or_path": os.path.abspath(directory), "local_files_only": True}
        x = _normalised(model, images)
        with torch.inference_mode():
            if model.kind == "classifier":
                classifier = ViTForImageClassification.from_pretrained(**place).eval()
                return {"probabilities": classifier(x).logits.softmax(dim=-1).numpy()}
            encoder, report = ViTModel.from_pretrained(**place, add_pooling_layer=False, output_loading_info=True)
            if report["missing_keys"]:
                raise AssertionError(f"Hugging Face misses {sorted(report['missing_keys'])[:3]}")
            outputs = _features(model, encoder.eval()(x).last_hidden_state)
            del encoder
            if model.kind == "mae":
                settings = {"norm_pix_loss": True, "mask_ratio": MASK_RATIO}
                mae = ViTMAEForPreTraining.from_pretrained(**place, **settings).eval()
                outputs["loss"] = mae(x, noise=torch.from_numpy(sample_noise(model))).loss.numpy()
            return outputs
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _run_mae(model: Model, directory: str, images: np.ndarray) -> Outputs:
    import torch

    from usfmae_jax.interop import torch_reference

    path = os.path.join(directory, "mae.pth")
    tensors = open_torch(path)[0] if os.path.exists(path) else open_safetensors(path[:-7] + "model.safetensors")[0]
    state = {name: torch.from_numpy(tensor.read()) for name, tensor in tensors.items()}
    heads = model.description["encoder"]["num_heads"]
    with torch.inference_mode():
        x = _normalised(model, images)
        if model.kind == "classifier":
            return {"probabilities": torch_reference.probabilities(state, x, heads).numpy()}
        outputs = _features(model, torch_reference.features(state, x, heads))
        if model.kind == "mae":
            noise = torch.from_numpy(sample_noise(model))
            decoder_heads = model.description["decoder"]["decoder_num_heads"]
            outputs["loss"] = torch_reference.loss(state, x, heads, decoder_heads, noise, MASK_RATIO).numpy()
        return outputs


def _run_onnx(model: Model, directory: str, images: np.ndarray) -> Outputs:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.path.join(directory, "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))
