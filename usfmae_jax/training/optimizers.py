"""AdamW with the schedule, decay mask and layer-wise scaling of the MAE recipes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from usfmae_jax.models.layers import split_axis


def warmup_cosine(
    step: jax.Array, total_steps: jax.Array, *, learning_rate: float, floor: float, warmup: float
) -> jax.Array:
    """Learning rate: linear from 0 to `learning_rate` over the warm-up, then half a cosine down to `floor` at the end.

    Args:
      step: int scalar.
      total_steps: int scalar; an array, so that runs of different lengths share one compiled program.
      learning_rate: peak.
      floor: at the last step.
      warmup: as a share of all steps.

    Returns:
      float32 scalar.
    """
    step, total = jnp.asarray(step, jnp.float32), jnp.asarray(total_steps, jnp.float32)
    rising = jnp.round(warmup * total)
    progress = jnp.clip((step - rising) / jnp.maximum(total - rising, 1), 0, 1)
    low = floor / learning_rate if learning_rate else 0.0
    falling = learning_rate * ((1 - low) * (0.5 * (1 + jnp.cos(jnp.pi * progress))) + low)
    return jnp.where(step < rising, learning_rate - learning_rate * (1 - step / jnp.maximum(rising, 1)), falling)


def decay_mask(params: Any) -> Any:
    """True for matrices: biases, norms and tokens are not decayed.

    Decided by name, since stacked biases have two axes like matrices.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def layer_scales(params: Any, decay: float) -> Any:
    """Layer-wise learning-rate decay for a ViT (Bao et al. 2022): `decay^(depth + 1 - id)`.

    Tokens and patch embedding have id 0, block i has id i + 1, all that follows the blocks (norm, head) `depth + 1`.

    Args:
      params: parameters of a model with an `encoder`; its blocks are stacked, `[depth, ...]`.
      decay: in (0, 1].

    Returns:
      a tree of the same structure, of scales that broadcast against the parameters.
    """
    depth = jax.tree.leaves(params["encoder"]["blocks"])[0].shape[0]

    def scale(path: tuple, leaf: Any) -> Any:
        names = [key.key for key in path]
        if names[:2] == ["encoder", "blocks"]:
            powers = decay ** (depth - jnp.arange(depth, dtype=jnp.float32))
            return powers.reshape(-1, *[1] * (len(leaf.shape) - 1))
        if names[0] == "encoder" and names[1] in ("cls_token", "position", "patch_embed"):
            return jnp.float32(decay ** (depth + 1))
        return jnp.float32(1.0)

    return jax.tree.map_with_path(scale, params)


def adamw(
    *,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float = 0.0,
    layer_decay: float = 1.0,
    decay_all: bool = False,
    last_blocks: int = 0,
    muon: bool = False,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) with a learning rate of 1: `update.make_update` multiplies by the actual one.

    Args:
      weight_decay: decoupled, scaled by the learning rate, on matrices only.
      b1: decay of the first moment.
      b2: decay of the second moment.
      clip_norm: maximum global gradient norm; 0 = off.
      layer_decay: see `layer_scales`; 1 = off.
      decay_all: decay biases, norms and tokens as well, as the published USF-MAE run did.
      last_blocks: update only this many last blocks of the encoder; 0 = all.
      muon: update the matrices of the blocks with Muon instead (Jordan et al. 2024).
    """
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    mask = None if decay_all else decay_mask
    adam = optax.scale_by_adam(b1, b2)
    if muon:
        adam = optax.partition({True: _muon(), False: adam}, in_blocks)
    parts += [adam, optax.add_decayed_weights(weight_decay, mask)]
    if not math.isclose(layer_decay, 1.0):
        parts.append(_scale(lambda updates: layer_scales(updates, layer_decay)))
    if last_blocks:
        parts.append(_scale(lambda updates: _last_blocks(updates, last_blocks)))
    # A constant schedule keeps the step count that optimiser states have had since version 0.1.
    return optax.chain(*parts, optax.scale_by_learning_rate(lambda count: 1.0))


def in_blocks(params: Any) -> Any:
    """True for the matrices of transformer blocks, `[depth, I, O]`."""
    return jax.tree.map_with_path(
        lambda path, _: path[-1].key == "kernel" and any(key.key in ("blocks", "stack") for key in path), params
    )


#: Number of matrices concatenated in one kernel: queries, keys, values, see `layers.Attention`, `mae.CrossBlock`.
_SIDE_BY_SIDE = {"qkv": 3, "key_value": 2}


#: Muon's decay of the momentum, and the coefficients of its five steps of Newton and Schulz.
_MOMENTUM, _QUINTIC = 0.95, (3.4445, -4.7750, 2.0315)


def _muon() -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for stacked matrices: Nesterov momentum, orthogonalised matrix by matrix.

    Each block's matrix is treated separately, and so are queries, keys and values. Updates are scaled to the magnitude
    of Adam's (Liu et al. 2025, arXiv 2502.16982), so that learning rates and weight decay need not change. The numbers
    are those of `optax.contrib.scale_by_muon`, which gathers split matrices at each of its steps and has every device
    orthogonalise all of them; here each device takes some.
    """

    def apart(path: tuple, leaf: jax.Array) -> jax.Array:
        parts = _SIDE_BY_SIDE.get(path[-2].key, 1)
        return leaf.reshape(*leaf.shape[:-1], parts, leaf.shape[-1] // parts)

    def init(params: Any) -> Any:
        momentum = jax.tree.map_with_path(lambda path, leaf: jnp.zeros_like(apart(path, leaf)), params)
        return optax.contrib.MuonState(jnp.zeros((), jnp.int32), momentum, jnp.asarray(_QUINTIC))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients = jax.tree.map_with_path(apart, updates)
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(gradients, state.mu, _MOMENTUM, 1)
        ahead = jax.tree.map(
            lambda old, new: _MOMENTUM * old + (1 - _MOMENTUM) * new,
            optax.tree.bias_correction(momentum, _MOMENTUM, optax.safe_increment(count)),
            optax.tree.bias_correction(gradients, _MOMENTUM, count),
        )
        found = jax.tree.map(lambda leaf, old: _orthogonal(leaf).reshape(old.shape), ahead, updates)
        return found, state._replace(count=count, mu=momentum)

    return optax.GradientTransformation(init, update)


def _orthogonal(stack: jax.Array) -> jax.Array:
    """Every matrix `[I, O]` of a stack `[depth, I, parts, O]` with singular values near 0.2 max(I, O)^(1/2).

    Five steps of a quintic Newton-Schulz iteration (Jordan et al. 2024).
    """
    depth, inputs, parts, outputs = stack.shape
    mesh = jax.sharding.get_abstract_mesh()
    split = mesh.shape.get("fsdp", 1)
    if mesh.size > 1 and split == 1:  # or else the momentum too would be computed in parts, and gathered
        stack = jax.lax.with_sharding_constraint(stack, PartitionSpec())
    name = _sharing(mesh, depth)
    stack = stack.swapaxes(1, 2)
    if name:
        stack = jnp.pad(stack, [(0, -depth % mesh.shape[name]), (0, 0), (0, 0), (0, 0)])
        stack = jax.lax.with_sharding_constraint(stack, PartitionSpec(name))
    matrices = stack.reshape(-1, inputs, outputs)
    x = matrices if inputs <= outputs else matrices.mT
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    a, b, c = _QUINTIC
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + (c * square) @ square) @ x
    x = x if inputs <= outputs else x.mT
    x = 0.2 * math.sqrt(max(inputs, outputs)) * x.reshape(stack.shape)
    if name:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(name))
    if split_axis((inputs, parts * outputs), split) == 0:  # as the parameters are split, or some compilers gather
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, None, "fsdp"))
    return x.swapaxes(1, 2)[:depth]


def _sharing(mesh: Any, depth: int) -> str:
    """The mesh axis whose devices share the matrices of `depth` blocks, padded to a multiple of them; "" if none.

    That of `fsdp`, whose devices then exchange parts of matrices instead of gathering whole ones, or else of `data`;
    none of more devices than twice the depth, since padding then costs more than it saves.
    """
    return next((name for name in ("fsdp", "data") if 1 < mesh.shape.get(name, 1) <= 2 * depth), "")


def _last_blocks(params: Any, count: int) -> Any:
    """1 for the last `count` blocks of the encoder and for everything outside its blocks, 0 for the earlier blocks."""

    def scale(path: tuple, leaf: Any) -> Any:
        if [key.key for key in path[:2]] != ["encoder", "blocks"]:
            return jnp.float32(1.0)
        depth = leaf.shape[0]
        return (jnp.arange(depth) >= depth - count).astype(jnp.float32).reshape(-1, *[1] * (len(leaf.shape) - 1))

    return jax.tree.map_with_path(scale, params)


def _scale(scales: Callable[[Any], Any]) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, s: u * s, updates, scales(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
