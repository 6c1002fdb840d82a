"""Attention rollout (Abnar & Zuidema 2020): which patches a ViT's answer draws on."""

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.heads import Pool
from usfmae_jax.models.vit import ViT


def attention_rollout(encoder: ViT, images: jax.Array, pool: Pool = "mean") -> jax.Array:
    """Follows attention from the pooled output back to the patches.

    In every block the attention is averaged over heads, mixed half and half with the identity for the residual, and
    multiplied onto that of the blocks before it. It tells where information may have come from, not what it was
    worth: an illustration, no evidence.

    Args:
      encoder: not trained while this looks at it; nothing is dropped.
      images: normalised, `[B, H, W, C]`.
      pool: whose attention: "cls" of the class token, "mean" of all patches on average.

    Returns:
      float32 `[B, H / patch, W / patch]`, each image's stretched to [0, 1]; all 0 where every patch counts the same.
    """
    graph, stacked = nnx.split(encoder.blocks.stack)

    def follow(carry: tuple[jax.Array, jax.Array], params: nnx.State) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, rolled = carry
        block = nnx.merge(graph, params)
        attention = block.attn.weights(block.norm1(x).astype(x.dtype)).mean(axis=1)
        mixed = (attention + jnp.eye(attention.shape[-1])) / 2  # rows still sum to 1
        return (block(x), mixed @ rolled), None

    x = encoder.embed(images)
    start = jnp.broadcast_to(jnp.eye(x.shape[1]), (x.shape[0], x.shape[1], x.shape[1]))
    rolled = jax.lax.scan(follow, (x, start), stacked)[0][1]
    patches = rolled[:, 0, 1:] if pool == "cls" else rolled[:, 1:, 1:].mean(axis=1)
    low, high = patches.min(axis=1, keepdims=True), patches.max(axis=1, keepdims=True)
    spread = high - low
    # Rounding alone makes a spread of some 1e-7; it must not be stretched to a picture.
    stretched = jnp.where(spread > 1e-5 * high, (patches - low) / jnp.maximum(spread, 1e-30), 0)
    return stretched.reshape(-1, images.shape[1] // encoder.patch_size, images.shape[2] // encoder.patch_size)
