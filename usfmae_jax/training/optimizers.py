"""AdamW with the schedule, decay mask and layer-wise scaling of the MAE recipes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(learning_rate: float, floor: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear from 0 to `learning_rate` over the warm-up, half a cosine down to `floor` at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else learning_rate, learning_rate, warmup_steps, max(total_steps, warmup_steps + 1), floor
    )


def decay_mask(params: Any) -> Any:
    """True for the matrices: biases, norms and tokens are not decayed.

    Goes by name, since stacked biases have two axes like matrices.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def layer_scales(params: Any, decay: float) -> Any:
    """Layer-wise learning-rate decay for a ViT (Bao et al. 2022): `decay^(depth + 1 - id)`.

    Id 0 is for tokens and patch embedding, block i has id i + 1, whatever follows the blocks (norm, head) `depth + 1`.

    Args:
      params: parameters of a model with an `encoder`; its blocks are stacked, `[depth, ...]`.
      decay: in (0, 1].

    Returns:
      the same tree of scales that broadcast against the parameters.
    """
    depth = jax.tree.leaves(params["encoder"]["blocks"])[0].shape[0]

    def scale(path: tuple, leaf: Any) -> Any:
        names = [key.key for key in path]
        if names[:2] == ["encoder", "blocks"]:
            powers = decay ** (depth - jnp.arange(depth, dtype=jnp.float32))
            return powers.reshape(-1, *[1] * (len(leaf.shape) - 1))
        if names[0] == "encoder" and names[1] in ("cls_token", "patch_embed"):
            return jnp.float32(decay ** (depth + 1))
        return jnp.float32(1.0)

    return jax.tree.map_with_path(scale, params)


def adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float = 0.0,
    layer_decay: float = 1.0,
    decay_all: bool = False,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019).

    Args:
      schedule: learning rate per step.
      weight_decay: decoupled, scaled by the learning rate, on matrices only.
      b1: decay of the first moment.
      b2: decay of the second moment.
      clip_norm: global gradient norm is clipped to this; 0 = off.
      layer_decay: see `layer_scales`; 1 = off.
      decay_all: decay biases, norms and tokens as well, as the published USF-MAE run did.
    """
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    mask = None if decay_all else decay_mask
    parts += [optax.scale_by_adam(b1, b2), optax.add_decayed_weights(weight_decay, mask)]
    if not math.isclose(layer_decay, 1.0):
        parts.append(_scale_layers(layer_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def _scale_layers(decay: float) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, s: u * s, updates, layer_scales(updates, decay)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
