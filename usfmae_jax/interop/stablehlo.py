"""Export of a model to StableHLO with `jax.export`."""

import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import export

from usfmae_jax.errors import InputError, install
from usfmae_jax.interop import files
from usfmae_jax.interop.model import Model, build, flatten, model_graph, unflatten
from usfmae_jax.models.patches import normalize_images

FILE, WEIGHTS = "model.stablehlo", "model.safetensors"
_PLATFORMS = ("cpu", "cuda", "tpu")


def inference(model: Model) -> Callable[[jax.Array, Any], dict[str, jax.Array]]:
    """The inference function of a model: takes uint8 images `[B, H, W, C]` and the parameters.

    It returns, by kind of model, float32 except for `classes`:

    - encoder: `class_token` `[B, D]`, `mean_patch` `[B, D]` and `patch_grid` `[B, rows, columns, D]`
    - classifier, single- or multi-label: `probabilities` `[B, classes]`
    - segmenter: `classes`, uint8 `[B, H, W]`, and `probabilities` `[B, H, W, 1 + C]`, the background first
    - instance segmenter, for each query: `probabilities` of the classes `[B, Q, C]`, and `masks`, the probability of
      each pixel, `[B, Q, H, W]`
    - other heads: `outputs` `[B, outputs]`, for a regression in their units (see `Model`), else as computed
    """
    static = model_graph(build(model.description))
    mean, std = tuple(model.preprocessing["mean"]), tuple(model.preprocessing["std"])

    def apply(images: jax.Array, params: Any) -> dict[str, jax.Array]:
        network = nnx.merge(static, params["encoder"] if model.kind == "encoder" else params)
        x = normalize_images(images, mean, std)
        if model.kind == "classifier":
            return {"probabilities": jax.nn.softmax(network(x))}
        if model.segments:
            shares = jax.nn.softmax(network(x))
            return {"classes": shares.argmax(axis=-1).astype(jnp.uint8), "probabilities": shares}
        if model.task == "instances":
            said = network(x)
            masks = jax.nn.sigmoid(said["masks"])
            wide = jax.image.resize(masks, (*masks.shape[:2], *x.shape[1:3]), "linear")
            return {"probabilities": jax.nn.softmax(said["classes"])[..., 1:], "masks": wide}
        if model.task == "multilabel":
            return {"probabilities": jax.nn.sigmoid(network(x))}
        if scale := model.description.get("scale"):
            mean_of, deviation = (jnp.asarray(scale[name], jnp.float32) for name in ("mean", "deviation"))
            return {"outputs": network(x) * deviation + mean_of}
        if model.kind == "model":
            return {"outputs": network(x)}
        tokens = network(x)
        patches = tokens[:, 1:]
        return {
            "class_token": tokens[:, 0],
            "mean_patch": patches.mean(axis=1),
            "patch_grid": patches.reshape(-1, *model.grid(), tokens.shape[-1]),
        }

    return apply


def write_stablehlo(model: Model, directory: str) -> None:
    """Writes `model.stablehlo`: images to the outputs of `inference`, weights and preprocessing included.

    `jax.export.deserialize(bytearray(FILE's bytes)).call(images)` runs it on CPU, CUDA or TPU with any batch size;
    `.mlir_module()` is the program as text for other compilers. A large model's weights are in `model.safetensors`
    next to it and are passed as the second argument: a dict by name.

    Raises:
      InputError: the package flatbuffers, which jax.export needs to store programs, is missing.
    """
    if not importlib.util.find_spec("flatbuffers"):
        raise InputError(f"--format=stablehlo needs the package flatbuffers: {install('interop')}")
    apply, size, channels = inference(model), model.preprocessing["image_size"], model.preprocessing["channels"]
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *size, channels), jnp.uint8)
    path, flat = os.path.join(directory, FILE), flatten(model.params)
    if sum(value.nbytes for value in flat.values()) > files.EXTERNAL:
        # Constants of a program are copied several times before they are on disk.
        shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in flat.items()}
        function = jax.jit(lambda images, weights: apply(images, unflatten(weights)))
        exported = _exported(function, images, shapes)
        arrays = {name: files.from_array(value) for name, value in flat.items()}
        metadata = {"lineage": json.dumps(model.lineage)}
        files.write_safetensors(os.path.join(directory, WEIGHTS), arrays, metadata)
    else:
        exported = _exported(jax.jit(lambda images: apply(images, model.params)), images)
    with open(path + ".incomplete", "wb") as file:
        file.write(exported.serialize())
    os.replace(path + ".incomplete", path)


def _exported(function: Any, *arguments: Any) -> export.Exported:
    """Exports a program without source locations, which would contain paths of this machine."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        return export.export(function, platforms=_PLATFORMS)(*arguments)
    finally:
        jax.config.update(name, before)


def run_stablehlo(directory: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Runs the output of `write_stablehlo` on uint8 images `[B, H, W, C]`."""
    with open(os.path.join(directory, FILE), "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    beside = os.path.join(directory, WEIGHTS)
    weights = [safetensors.numpy.load_file(beside)] if os.path.exists(beside) else []
    return jax.device_get(exported.call(jnp.asarray(images), *weights))
