"""One update of a masked autoencoder, and the forward passes that look at one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.models.mae import (
    masked_error,
    patch_statistics,
    patch_targets,
    random_masking,
    sector_patches,
)
from usfmae_jax.models.patches import normalize_images, patchify, unpatchify
from usfmae_jax.training.mesh import batch_sharding
from usfmae_jax.training.state import State

Masks = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a masked autoencoder has to do, and how it sees pixels.

    Attributes:
      patch_size: of the model.
      mask_ratio: share of patches to hide.
      fan_aware: hide and predict only patches in the imaged sector.
      normalize_targets: predict standardised patches.
      mean: per channel of the model's input.
      std: per channel.
    """

    patch_size: int
    mask_ratio: float
    fan_aware: bool
    normalize_targets: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


def draw_masks(rng: jax.Array, images: jax.Array, objective: Objective) -> Masks:
    """Masks for uint8 images `[B, H, W, C]`; see `mae.mask_from_noise`."""
    b, height, width, _ = images.shape
    p = objective.patch_size
    inside = sector_patches(images, p) if objective.fan_aware else None
    return random_masking(rng, b, (height // p) * (width // p), objective.mask_ratio, inside)


def make_train_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    objective: Objective,
    accumulate: int = 1,
) -> Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """Builds the update `(state, images uint8 [B, H, W, C]) -> (state, metrics)`.

    Args:
      graph: of the model, from `state.init_state`.
      optimizer: what `state["opt_state"]` belongs to.
      schedule: learning rate per step, for the log.
      mesh: the batch is spread over it.
      objective: see there.
      accumulate: micro-batches per update; the update is that of the whole batch.
    """
    sharding = batch_sharding(mesh)

    def summed_error(params: Any, images: jax.Array, masks: Masks) -> tuple[jax.Array, jax.Array]:
        keep, restore, mask = masks
        inputs = normalize_images(images, objective.mean, objective.std)
        predicted = nnx.merge(graph, params)(inputs, keep, restore)
        return masked_error(predicted, patch_targets(inputs, objective.patch_size, objective.normalize_targets), mask)

    gradient = jax.value_and_grad(summed_error, has_aux=True)

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that every micro-batch is spread over all devices and nothing moves.
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def train_step(state: State, images: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        masks = draw_masks(rng, images, objective)
        masks = jax.lax.with_sharding_constraint(masks, sharding)
        params = state["params"]
        if accumulate == 1:
            (error, count), gradients = gradient(params, images, masks)
        else:

            def add(total: Any, micro: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient(params, *micro)), None

            zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
            ((error, count), gradients), _ = jax.lax.scan(add, zero, jax.tree.map(split, (images, masks)))
        # The count does not depend on the parameters: dividing last gives the gradient of the mean.
        gradients = jax.tree.map(lambda g: g / count, gradients)
        updates, opt_state = optimizer.update(gradients, state["opt_state"], params)
        metrics = {
            "loss": error / count,
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
            "grad_norm": optax.tree.norm(gradients),
        }
        params = optax.apply_updates(params, updates)
        return state | {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return train_step


def make_reconstruct(
    graph: Any, objective: Objective
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds `(params, images uint8 [B, H, W, C], rng) -> (predicted uint8 [B, H, W, C], hidden bool [B, H, W])`.

    Standardised predictions are put back with each patch's own mean and scale, as the MAE demonstration does.
    """
    mean, std, p = objective.mean, objective.std, objective.patch_size

    def reconstruct(params: Any, images: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        keep, restore, mask = draw_masks(rng, images, objective)
        inputs = normalize_images(images, mean, std)
        predicted = nnx.merge(graph, params)(inputs, keep, restore)
        if objective.normalize_targets:
            center, scale = patch_statistics(patchify(inputs, p))
            predicted = predicted * scale + center
        grid = (images.shape[1] // p, images.shape[2] // p)
        pixels = unpatchify(predicted, grid, p) * jnp.asarray(std) + jnp.asarray(mean)
        if images.shape[-1] < pixels.shape[-1]:
            pixels = pixels.mean(axis=-1, keepdims=True)
        hidden = unpatchify(jnp.repeat(mask[..., None], p * p, axis=-1), grid, p)[..., 0]
        return jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8), hidden > 0

    return reconstruct


def make_features(graph: Any, objective: Objective) -> Callable[[Any, jax.Array], jax.Array]:
    """Builds `(params, images uint8 [B, H, W, C]) -> float32 [B, D]`: the mean of unmasked patch tokens."""

    def features(params: Any, images: jax.Array) -> jax.Array:
        inputs = normalize_images(images, objective.mean, objective.std)
        return nnx.merge(graph, params).encoder(inputs)[:, 1:].mean(axis=1)

    return features
