"""Masked autoencoder (He et al. 2022): masking, decoder and loss."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.layers import NORM_EPS, AttentionImplementation, Linear, layer_norm
from usfmae_jax.models.patches import patchify, resize_table, sincos_table, take_tokens
from usfmae_jax.models.vit import Block, Blocks, ViT, blocks_flops, vit_flops


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """How many patches the encoder sees: `n - round(n * ratio)`.

    Raises:
      ValueError: the ratio leaves no patch to see or none to predict.
    """
    visible = num_patches - round(num_patches * mask_ratio)
    if not 0 < visible < num_patches:
        raise ValueError(
            f"mask ratio {mask_ratio} shows {visible} of {num_patches} patches; it must show some, hide some"
        )
    return visible


def random_masking(
    rng: jax.Array, batch: int, num_patches: int, mask_ratio: float, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An independent random subset for every sample; see `mask_from_noise` for `inside` and what it returns."""
    return mask_from_noise(jax.random.uniform(rng, (batch, num_patches)), mask_ratio, inside)


def mask_from_noise(
    noise: jax.Array, mask_ratio: float, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hides the patches whose noise is largest.

    With `inside`, only patches in the imaged sector are hidden, in the same ratio; the places that this leaves free
    among the visible ones are filled with patches from outside, so that shapes stay static.

    Args:
      noise: `[B, N]`, uniform in [0, 1).
      mask_ratio: share of patches to hide.
      inside: bool `[B, N]`, patches in the sector; None = all.

    Returns:
      keep: int `[B, K]`, the visible patches, `K = num_visible(N, mask_ratio)`.
      restore: int `[B, N]`, where each patch stands in `concatenate([visible, hidden])`.
      mask: float32 `[B, N]`, 1 = hidden, to be predicted.
    """
    n = noise.shape[1]
    visible = num_visible(n, mask_ratio)
    if inside is None:
        order = jnp.argsort(noise, axis=1)
        restore = jnp.argsort(order, axis=1)
        return order[:, :visible], restore, (restore >= visible).astype(jnp.float32)
    # Inside patches rank first; of M inside, the last round(M * ratio) are hidden and move behind those from outside.
    rank = jnp.argsort(jnp.argsort(jnp.where(inside, noise, 2.0), axis=1), axis=1)
    shown_of = jnp.asarray([m - round(m * mask_ratio) for m in range(n + 1)])
    shown = shown_of[inside.sum(axis=1)][:, None]
    hidden = inside & (rank >= shown)
    order = jnp.argsort(jnp.where(hidden, n, 0) + rank, axis=1)
    return order[:, :visible], jnp.argsort(order, axis=1), hidden.astype(jnp.float32)


def sector_patches(images: jax.Array, patch_size: int, threshold: int = 8) -> jax.Array:
    """Which patches lie in the imaged sector, told by brightness.

    A patch is lit when a 64th of its pixels exceeds the threshold; dark patches between lit ones, in their row or in
    their column, count too (cysts, shadows): a scan sector is convex, and stays so when it is rotated.

    Args:
      images: uint8 `[B, H, W, C]`.
      patch_size: side of a patch.
      threshold: grey values up to this are surround; leaves room for JPEG noise.

    Returns:
      bool `[B, N]`; all True for an image with no lit patch.
    """
    b, height, width, _ = images.shape
    bright = patchify(images.max(axis=-1, keepdims=True) > threshold, patch_size)
    lit = bright.mean(axis=-1).reshape(b, height // patch_size, width // patch_size) >= 1 / 64

    def between(lit: jax.Array, axis: int) -> jax.Array:
        seen = lit.astype(jnp.int32)
        return (jax.lax.cummax(seen, axis) & jax.lax.cummax(seen, axis, reverse=True)).astype(bool)

    inside = (between(lit, 1) | between(lit, 2)).reshape(b, -1)
    return inside | ~inside.any(axis=1, keepdims=True)


class Decoder(nnx.Module):
    """The light decoder: visible tokens `[B, 1 + K, E]` to pixels of all patches `[B, N, P*P*C]`."""

    def __init__(
        self,
        *,
        encoder_width: int,
        outputs: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        norm_eps: float = NORM_EPS,
        dtype: Any,
        attention: AttentionImplementation,
        scan: bool,
        remat: bool,
        rngs: nnx.Rngs,
    ):
        self.grid, self.width, self.dtype = grid, width, dtype

        def make(rngs: nnx.Rngs) -> Block:
            return Block(width, num_heads, mlp_ratio, norm_eps=norm_eps, dtype=dtype, attention=attention, rngs=rngs)

        self.embed = Linear(encoder_width, width, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))
        self.blocks = Blocks(depth, make, scan=scan, remat=remat, rngs=rngs)
        self.norm = layer_norm(width, norm_eps, rngs=rngs)
        self.pred = Linear(width, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, latent: jax.Array, restore: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Puts a mask token where a patch is hidden and predicts every patch; float32 `[B, N, P*P*C]`."""
        x = self.embed(latent)
        b, n = restore.shape
        hidden = jnp.broadcast_to(self.mask_token[...], (b, n + 1 - x.shape[1], self.width)).astype(x.dtype)
        tokens = take_tokens(jnp.concatenate([x[:, 1:], hidden], axis=1), restore)
        position = resize_table(sincos_table(self.grid, self.width), self.grid, grid)
        x = jnp.concatenate([x[:, :1], tokens + position.astype(x.dtype)], axis=1)
        return self.pred(self.norm(self.blocks(x))[:, 1:]).astype(jnp.float32)


class MAE(nnx.Module):
    """Encoder and decoder: images and a mask in, predicted patches out.

    Args:
      decoder_width, decoder_depth, decoder_num_heads: of the decoder.
      rngs: for the initial parameters.
      **encoder: arguments of `ViT`.
    """

    def __init__(
        self, *, decoder_width: int, decoder_depth: int, decoder_num_heads: int, rngs: nnx.Rngs, **encoder: Any
    ):
        self.encoder = ViT(**encoder, rngs=rngs)
        patch_size, channels = self.encoder.patch_size, encoder.get("channels", 3)
        self.decoder = Decoder(
            encoder_width=self.encoder.width,
            outputs=patch_size * patch_size * channels,
            grid=self.encoder.grid,
            width=decoder_width,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            mlp_ratio=encoder.get("mlp_ratio", 4.0),
            norm_eps=encoder.get("norm_eps", NORM_EPS),
            dtype=self.encoder.dtype,
            attention=encoder.get("attention"),
            scan=encoder.get("scan", True),
            remat=encoder.get("remat", False),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, keep: jax.Array, restore: jax.Array) -> jax.Array:
        """Normalised images `[B, H, W, C]`, visible patches `[B, K]`, order `[B, N]` -> `[B, N, P*P*C]`."""
        p = self.encoder.patch_size
        grid = (images.shape[1] // p, images.shape[2] // p)
        return self.decoder(self.encoder(images, keep), restore, grid)


def patch_targets(images: jax.Array, patch_size: int, normalize: bool) -> jax.Array:
    """What the decoder has to predict: float32 `[B, N, P*P*C]`, each patch standardised if `normalize`."""
    patches = patchify(images.astype(jnp.float32), patch_size)
    if not normalize:
        return patches
    mean, scale = patch_statistics(patches)
    return (patches - mean) / scale


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and scale `[B, N, 1]` that standardise patches `[B, N, D]`."""
    # Unbiased variance: torch's default, and what the published weights were trained with.
    scale = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + 1e-6)
    return patches.mean(axis=-1, keepdims=True), scale


def masked_error(predicted: jax.Array, target: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared error over hidden patches, as (sum of the patches' mean errors, number of hidden patches).

    Their quotient is the MAE loss; kept apart so that gradients of micro-batches add up to that of the whole.
    """
    error = jnp.square(predicted.astype(jnp.float32) - target).mean(axis=-1)
    return (error * mask).sum(), mask.sum()


def training_flops(
    *,
    num_patches: int,
    patch_dim: int,
    mask_ratio: float,
    width: int,
    depth: int,
    decoder_width: int,
    decoder_depth: int,
    mlp_ratio: float = 4.0,
) -> float:
    """Floating-point operations to train on one image once: matrix products only, backward counted as twice forward."""
    visible = num_visible(num_patches, mask_ratio)

    forward = (
        vit_flops(visible, patch_dim, width=width, depth=depth, mlp_ratio=mlp_ratio)
        + 2 * (visible + 1) * width * decoder_width
        + blocks_flops(num_patches + 1, width=decoder_width, depth=decoder_depth, mlp_ratio=mlp_ratio)
        + 2 * num_patches * decoder_width * patch_dim
    )
    return float(3 * forward)
