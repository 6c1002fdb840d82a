"""Forward passes over many images: padded to one shape, sharded over the mesh, with the host working ahead."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from usfmae_jax.errors import InputError
from usfmae_jax.interop.model import Model, build, model_graph
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.training.mesh import batch_sharding, replicated

#: Seconds after which a pass shows a progress bar.
PATIENCE = 2.0
_PIECE = 1024

Forward = Callable[[Any, jax.Array], Any]


def fitting_batch(asked: int, mesh: Mesh, field: str) -> int:
    """Number of images per call; 0 = a default that suits the devices.

    A CPU is fastest with few images, whose activations stay in its cache (measured: batches of 16 take a fifth less
    time than batches of 64); an accelerator needs many.

    Args:
      asked: the user's setting.
      mesh: the setting must be divisible by its number of devices.
      field: name of the setting, for the error.

    Raises:
      InputError: the setting is negative, or not divisible by the number of devices.
    """
    if not asked:
        return mesh.size * (16 if jax.default_backend() == "cpu" else 128)
    if asked < 0 or asked % mesh.size:
        raise InputError(f"{field}={asked} must be a multiple of the {mesh.size} devices, or 0 for what suits them")
    return asked


def fitted(
    function: Forward, variables: Any, shape: tuple[int, ...], mesh: Mesh, asked: int, field: str
) -> tuple[Forward, int]:
    """Compiles a function for as many images per call as suit the devices and fit into their memory.

    Args:
      function: `(variables, images uint8 [B, *shape])`.
      variables: on the mesh.
      shape: of an image.
      mesh: batches are sharded over it.
      asked: the user's batch size; 0 = what fits.
      field: see `fitting_batch`.

    Returns:
      the compiled program, for images from `global_batch` and variables sharded like these; and B.

    Raises:
      InputError: see `fitting_batch`.
    """
    size = fitting_batch(asked, mesh, field)
    compiled = jax.jit(function, out_shardings=replicated(mesh))
    while True:
        images = jax.ShapeDtypeStruct((size, *shape), np.uint8, sharding=batch_sharding(mesh))
        program = compiled.lower(variables, images).compile()
        memory = program.memory_analysis()
        needed = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0
        if asked or size == mesh.size or needed < _free(mesh):
            return program, size
        size = max(size // 2 // mesh.size, 1) * mesh.size


def _free(mesh: Mesh) -> float:
    """Bytes per device that a program may use."""
    said = mesh.local_devices[0].memory_stats() or {}
    if "bytes_limit" in said:
        return 0.9 * (said["bytes_limit"] - said.get("bytes_in_use", 0))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4 / mesh.size  # shared with others


def apply_batches(
    mesh: Mesh,
    function: Forward,
    variables: Any,
    batches: Iterator[np.ndarray],
    *,
    batch_size: int,
    total: int,
    desc: str = "",
) -> Any:
    """Applies `function(variables, images uint8 [B, H, W, C])` to batches and concatenates the results.

    Every batch is padded to `batch_size` rows, so that only one program is compiled; the padding is removed from the
    results. The host prepares a batch while the devices compute the previous one.

    Args:
      mesh: batches are sharded over it; its number of devices must divide `batch_size`.
      function: returns an array or a dict of arrays, with images along the first axis.
      variables: parameters (and statistics) for `function`; arrays already on the mesh keep their sharding.
      batches: uint8 `[n, H, W, C]`, or other arrays for `function`, n <= `batch_size`; the same in all processes.
      batch_size: rows per call.
      total: total number of images, for the progress bar.
      desc: label of the progress bar.

    Returns:
      numpy array `[N, ...]`, or a dict of them, as `function` returns.
    """
    run = _compiled(function, mesh)
    if not all(_lies_on(mesh, leaf) for leaf in jax.tree.leaves(variables)):
        variables = jax.device_put(variables, replicated(mesh))
    sharding = batch_sharding(mesh)
    found: list[Any] = []
    pending: list[tuple[Any, int]] = []

    def collect(keep: int) -> None:
        while len(pending) > keep:
            result, count = pending.pop(0)
            found.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], result))

    with _bar(total, desc) as bar:
        for images in batches:
            count = len(images)
            if count < batch_size:
                padding = np.zeros((batch_size - count, *images.shape[1:]), images.dtype)
                images = np.concatenate([images, padding])
            # By place in the batch, not by process: on a TPU the mesh follows the wiring of the chips, and the devices
            # of a process need not be consecutive in it.
            there = jax.make_array_from_callback(images.shape, sharding, images.__getitem__)
            pending.append((run(variables, there), count))
            collect(1)  # the previous batch, while the devices compute this one
            bar.update(count)
        collect(0)
    if not found:
        raise ValueError("no images")
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def in_pieces(rows: np.ndarray, work: Callable[[np.ndarray], Any], desc: str = "") -> Any:
    """Concatenates `work(piece)` over pieces of rows, for what takes too much memory for all rows together.

    Args:
      rows: `[N]`.
      work: returns a dict of arrays, with the rows along the first axis.
      desc: label of the progress bar; "" = there is none.
    """
    starts = range(0, len(rows), _PIECE)
    bar = tqdm(starts, desc, unit="piece", delay=PATIENCE, leave=False, disable=not desc)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *[work(rows[start : start + _PIECE]) for start in bar])


def _lies_on(mesh: Mesh, leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(mesh.devices.flat)


@functools.lru_cache(16)  # applying the same function to other images does not recompile it
def _compiled(function: Forward, mesh: Mesh) -> Forward:
    return jax.jit(function, out_shardings=replicated(mesh))


def _bar(total: int, desc: str) -> tqdm:
    return tqdm(
        total=total,
        desc=desc,
        unit="img",
        delay=PATIENCE,
        leave=False,
        mininterval=0.5,
        file=sys.stderr,
        disable=jax.process_index() > 0,
    )


def encoder_function(weights: Model, pool: str = "mean", *, dtype: Any = jnp.float32) -> tuple[Forward, Any]:
    """The function `(params, images uint8 [B, H, W, c]) -> features float32` of an encoder, and its parameters.

    Args:
      weights: of an encoder, or of a model that contains one.
      pool: 'mean' of the patch tokens or 'cls', `[B, D]`; 'patches', all patch tokens, float16 `[B, N, D]`.
      dtype: compute dtype.
    """
    encoder = weights.encoder()
    mean, std = tuple(weights.preprocessing["mean"]), tuple(weights.preprocessing["std"])
    graph = model_graph(build(encoder.description, dtype=dtype))

    def features(params: Any, images: jax.Array) -> jax.Array:
        tokens = nnx.merge(graph, params)(normalize_images(images, mean, std))
        if pool == "patches":
            return tokens[:, 1:].astype(jnp.float16)
        return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(axis=1)

    return features, encoder.params["encoder"]


def model_function(weights: Model, apply: Callable[..., Any], *, dtype: Any = jnp.float32) -> tuple[Forward, Any]:
    """The function `(variables, images uint8 [B, H, W, C])` that returns `apply(network, normalised images)`.

    Models of equal architecture, such as the members of a run, share one function, so that it is compiled once.

    Args:
      weights: of any kind of model.
      apply: part of the cache key, so pass the same function every time, not a new lambda.
      dtype: compute dtype.

    Returns:
      the function and the variables.
    """
    mean, std = tuple(weights.preprocessing["mean"]), tuple(weights.preprocessing["std"])
    return _function(model_graph(build(weights.description, dtype=dtype)), mean, std, apply), (
        weights.params,
        weights.stats,
    )


@functools.lru_cache(16)
def _function(graph: Any, mean: tuple[float, ...], std: tuple[float, ...], apply: Callable[..., Any]) -> Forward:
    def run(variables: Any, images: jax.Array) -> Any:
        network = nnx.merge(graph, *[part for part in variables if part])
        return apply(network, normalize_images(images, mean, std))

    return run


def mean_of_two(one: jax.Array, other: jax.Array) -> jax.Array:
    """Mean of two predictions, such as for an image and its mirror image; rounded for integer dtypes."""
    mean = (one.astype(jnp.float32) + other.astype(jnp.float32)) / 2
    return jnp.round(mean).astype(one.dtype) if jnp.issubdtype(one.dtype, jnp.integer) else mean.astype(one.dtype)


def with_mirror(function: Forward, mirror: Callable[[Any], Any]) -> Forward:
    """A function that averages the predictions for images `[B, H, W, C]` and for their mirror images.

    Args:
      function: `(variables, images)` -> predictions by name.
      mirror: maps predictions for mirror images back to the original ones.
    """

    def both(variables: Any, images: jax.Array) -> Any:
        mirrored = mirror(function(variables, images[:, :, ::-1]))
        return jax.tree.map(mean_of_two, function(variables, images), mirrored)

    return both


def features_of(network: Any, images: jax.Array) -> jax.Array:
    """The input of a network's head, float32 `[B, D]`; for `model_function`."""
    return network.features(images)
