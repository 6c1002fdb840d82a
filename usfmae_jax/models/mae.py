"""Masked autoencoder (He et al. 2022): masking, decoder and loss."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.layers import (
    NORM_EPS,
    AttentionImplementation,
    Linear,
    Remat,
    attention,
    gelu,
    layer_norm,
    recomputed,
    spread,
)
from usfmae_jax.models.patches import patchify, resize_table, sincos_table, take_tokens
from usfmae_jax.models.vit import Block, Blocks, ViT, blocks_flops, vit_flops


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Number of patches that the encoder sees: `n - round(n * ratio)`.

    Raises:
      ValueError: the ratio leaves no patch visible or none hidden.
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
    """An independent random mask for every sample; see `mask_from_noise` for `inside` and the return values."""
    return mask_from_noise(jax.random.uniform(rng, (batch, num_patches)), mask_ratio, inside)


def block_noise(rng: jax.Array, batch: int, grid: tuple[int, int], block: int) -> jax.Array:
    """Noise for `mask_from_noise` that hides squares of `block` by `block` patches: float32 `[B, N]`, in [0, 1).

    The grid of squares is shifted at random for each image, so that no patch is always at a border of a square. The
    square in which the number of hidden patches is reached is hidden in part.
    """
    rows, columns = grid
    places, ties, shifts = jax.random.split(rng, 3)
    coarse = jax.random.uniform(places, (batch, -(-rows // block) + 1, -(-columns // block) + 1))
    wide = jnp.repeat(jnp.repeat(coarse, block, axis=1), block, axis=2)

    def cut(noise: jax.Array, shift: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(noise, shift, grid)

    found = jax.vmap(cut)(wide, jax.random.randint(shifts, (batch, 2), 0, block))
    # Orders the patches within a square; too small to change the order of squares.
    return (found + 1e-6 * jax.random.uniform(ties, found.shape)).reshape(batch, -1)


def mask_from_noise(
    noise: jax.Array, mask_ratio: float, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hides the patches whose noise is largest.

    With `inside`, only patches in the imaged sector are hidden, in the same ratio; patches from outside fill up the
    visible ones, so that shapes stay static.

    Args:
      noise: `[B, N]`, uniform in [0, 1).
      mask_ratio: share of patches to hide.
      inside: bool `[B, N]`, patches in the sector; None = all.

    Returns:
      keep: int `[B, K]`, the visible patches, `K = num_visible(N, mask_ratio)`.
      restore: int `[B, N]`, the index of each patch in `concatenate([visible, hidden])`.
      mask: float32 `[B, N]`, 1 = hidden, to be predicted.
    """
    n = noise.shape[1]
    visible = num_visible(n, mask_ratio)
    if inside is None:
        order = jnp.argsort(noise, axis=1)
        restore = jnp.argsort(order, axis=1)
        return order[:, :visible], restore, (restore >= visible).astype(jnp.float32)
    # Patches inside rank first; of M inside, the last round(M * ratio) are hidden and move behind those from outside.
    rank = jnp.argsort(jnp.argsort(jnp.where(inside, noise, 2.0), axis=1), axis=1)
    shown_of = jnp.asarray([m - round(m * mask_ratio) for m in range(n + 1)])
    shown = shown_of[inside.sum(axis=1)][:, None]
    hidden = inside & (rank >= shown)
    order = jnp.argsort(jnp.where(hidden, n, 0) + rank, axis=1)
    return order[:, :visible], jnp.argsort(order, axis=1), hidden.astype(jnp.float32)


def sector_patches(images: jax.Array, patch_size: int, threshold: int = 8) -> jax.Array:
    """Detects by brightness which patches lie in the imaged sector.

    A patch is lit if at least 1/64 of its pixels exceed the threshold. Dark patches between lit ones in the same row or
    column (cysts, shadows) count as inside too: a scan sector is convex and stays so under rotation.

    Args:
      images: uint8 `[B, H, W, C]`.
      patch_size: side of a patch.
      threshold: grey values up to this one are background; leaves room for JPEG noise.

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
    """The lightweight decoder: visible tokens `[B, 1 + K, E]` to pixels of all patches `[B, N, P*P*C]`."""

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
        remat: Remat,
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
        """Inserts mask tokens for hidden patches and predicts every patch; float32 `[B, N, P*P*C]`."""
        x = self.embed(latent)
        b, n = restore.shape
        hidden = jnp.broadcast_to(self.mask_token[...], (b, n + 1 - x.shape[1], self.width)).astype(x.dtype)
        tokens = take_tokens(jnp.concatenate([x[:, 1:], hidden], axis=1), restore)
        position = resize_table(sincos_table(self.grid, self.width), self.grid, grid)
        x = jnp.concatenate([x[:, :1], tokens + position.astype(x.dtype)], axis=1)
        return self.pred(self.norm(self.blocks(x))[:, 1:]).astype(jnp.float32)


def _of_encoder(encoder: ViT, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder that follow from its encoder, which was built with the arguments `given`."""
    return {
        "encoder_width": encoder.width,
        "outputs": encoder.patch_size**2 * given.get("channels", 3),
        "grid": encoder.grid,
        "mlp_ratio": given.get("mlp_ratio", 4.0),
        "norm_eps": given.get("norm_eps", NORM_EPS),
        "dtype": encoder.dtype,
        "scan": given.get("scan", True),
        "remat": given.get("remat", "none"),
    }


class MAE(nnx.Module):
    """Encoder and decoder: images and a mask in, predicted patches out.

    Args:
      decoder_width, decoder_depth, decoder_num_heads: of the decoder.
      outputs: number of values predicted per patch; 0 = its pixels.
      rngs: for the initial parameters.
      **encoder: arguments of `ViT`.
    """

    def __init__(
        self,
        *,
        decoder_width: int,
        decoder_depth: int,
        decoder_num_heads: int,
        outputs: int = 0,
        rngs: nnx.Rngs,
        **encoder: Any,
    ):
        self.encoder = ViT(**encoder, rngs=rngs)
        followed = _of_encoder(self.encoder, encoder)
        self.decoder = Decoder(
            width=decoder_width,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            attention=encoder.get("attention"),
            **followed | ({"outputs": outputs} if outputs else {}),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, keep: jax.Array, restore: jax.Array) -> jax.Array:
        """Normalised images `[B, H, W, C]`, visible patches `[B, K]`, order `[B, N]` -> `[B, N, outputs]`."""
        p = self.encoder.patch_size
        grid = (images.shape[1] // p, images.shape[2] // p)
        return self.decoder(self.encoder(images, keep), restore, grid)


class CrossBlock(nnx.Module):
    """Cross-attention from mask tokens to the encoder's tokens only, then an MLP. See `CrossDecoder`."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        encoder_width: int,
        levels: int,
        mlp_ratio: float,
        norm_eps: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.fuse = nnx.Param(nnx.initializers.normal(levels**-0.5)(rngs.params(), (levels,)))
        self.norm_seen = layer_norm(encoder_width, norm_eps, rngs=rngs)
        self.norm1, self.norm2 = (layer_norm(width, norm_eps, rngs=rngs) for _ in range(2))
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key_value = Linear(encoder_width, 2 * width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.fc1 = Linear(width, int(width * mlp_ratio), dtype=dtype, rngs=rngs)
        self.fc2 = Linear(int(width * mlp_ratio), width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, levels: jax.Array) -> jax.Array:
        """Applies the block.

        Args:
          x: mask tokens `[B, M, d]`.
          levels: outputs of the encoder's blocks, `[L, B, 1 + K, D]`.
        """
        weights = self.fuse[...].astype(levels.dtype)
        seen = self.norm_seen(jnp.tensordot(weights, levels, axes=1)).astype(x.dtype)
        b, m, width = x.shape
        size = (self.num_heads, width // self.num_heads)
        q = self.query(self.norm1(x).astype(x.dtype)).reshape(b, m, *size)
        k, v = jnp.moveaxis(self.key_value(seen).reshape(b, seen.shape[1], 2, *size), 2, 0)
        x = x + self.proj(attention(q, k, v).reshape(b, m, width))
        return x + self.fc2(gelu(self.fc1(self.norm2(x).astype(x.dtype))))


class CrossDecoder(nnx.Module):
    """The decoder of CrossMAE (Fu et al. 2024): predicts each hidden patch independently, from the visible ones.

    Mask tokens attend to the encoder's tokens and not to one another, so that any subset of the hidden patches can be
    predicted. Each block sees its own weighted sum of the outputs of the encoder's blocks (inter-block fusion).

    Args:
      encoder_width: of the encoder's tokens.
      levels: number of encoder outputs, the encoder's depth.
      outputs: number of values per patch.
      grid: (rows, columns) of the position table.
      width, depth, num_heads, mlp_ratio, norm_eps: of the blocks.
      dtype: compute dtype.
      scan, remat: see `vit.Blocks`.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        *,
        encoder_width: int,
        levels: int,
        outputs: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        norm_eps: float,
        dtype: Any,
        scan: bool,
        remat: Remat,
        rngs: nnx.Rngs,
    ):
        self.grid, self.width, self.dtype = grid, width, dtype
        self.scan, self.remat, self.depth = scan, remat, depth

        def make(rngs: nnx.Rngs) -> CrossBlock:
            how: dict[str, Any] = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dtype": dtype}
            return CrossBlock(width, num_heads, encoder_width=encoder_width, levels=levels, **how, rngs=rngs)

        self.mask_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))
        self.stack = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(depth))
        self.norm = layer_norm(width, norm_eps, rngs=rngs)
        self.pred = Linear(width, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, levels: jax.Array, chosen: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Predicts the patches `chosen`, int `[B, M]`, from `levels` `[L, B, 1 + K, D]`; float32 `[B, M, P*P*C]`."""
        position = resize_table(sincos_table(self.grid, self.width), self.grid, grid)
        x = (self.mask_token[...] + jnp.asarray(position)[chosen]).astype(self.dtype)
        graph, stacked = nnx.split(self.stack)

        def step(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, params)(spread(x), levels), None

        step = recomputed(step, self.remat, scan=self.scan)
        x = jax.lax.scan(step, x, stacked, unroll=1 if self.scan else self.depth)[0]
        return self.pred(self.norm(x)).astype(jnp.float32)


class CrossMAE(nnx.Module):
    """Encoder and `CrossDecoder`: images, visible patches and patches to predict in, predicted patches out.

    Args:
      decoder_width, decoder_depth, decoder_num_heads: of the decoder.
      rngs: for the initial parameters.
      **encoder: arguments of `ViT`.
    """

    def __init__(
        self, *, decoder_width: int, decoder_depth: int, decoder_num_heads: int, rngs: nnx.Rngs, **encoder: Any
    ):
        self.encoder = ViT(**encoder, rngs=rngs)
        self.decoder = CrossDecoder(
            levels=self.encoder.blocks.depth,
            width=decoder_width,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            **_of_encoder(self.encoder, encoder),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, keep: jax.Array, chosen: jax.Array) -> jax.Array:
        """Normalised images `[B, H, W, C]`, visible patches `[B, K]`, others `[B, M]` -> `[B, M, P*P*C]`."""
        encoder = self.encoder
        grid = (images.shape[1] // encoder.patch_size, images.shape[2] // encoder.patch_size)
        levels = encoder.blocks.levels(encoder.embed(images, keep), range(encoder.blocks.depth))
        # The last level goes through the norm that an exported encoder applies, which would otherwise not be trained.
        levels[-1] = encoder.norm(levels[-1]).astype(levels[-1].dtype)
        return self.decoder(jnp.stack(levels), chosen, grid)


def patch_targets(images: jax.Array, patch_size: int, normalize: bool) -> jax.Array:
    """The decoder's targets: float32 `[B, N, P*P*C]`, each patch standardised if `normalize`."""
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

    Their quotient is the MAE loss; they are kept separate so that gradients of micro-batches add up to that of the
    whole batch.
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
    predicted: int = 0,
) -> float:
    """Floating-point operations to train on one image once: matrix products only, backward counted as twice forward.

    `predicted` is the number of patches that a `CrossMAE` predicts; 0 = the model is an `MAE`.
    """
    visible = num_visible(num_patches, mask_ratio)
    if predicted:  # a CrossMAE
        inner = round(mlp_ratio * decoder_width)
        each = 2 * predicted * decoder_width * (2 * decoder_width + 2 * inner)  # queries, projection and MLP
        each += 2 * (visible + 1) * width * (2 * decoder_width + depth)  # keys and values, and the sum over levels
        each += 4 * predicted * (visible + 1) * decoder_width
        forward = vit_flops(visible, patch_dim, width=width, depth=depth, mlp_ratio=mlp_ratio)
        return float(3 * (forward + decoder_depth * each + 2 * predicted * decoder_width * patch_dim))
    forward = (
        vit_flops(visible, patch_dim, width=width, depth=depth, mlp_ratio=mlp_ratio)
        + 2 * (visible + 1) * width * decoder_width
        + blocks_flops(num_patches + 1, width=decoder_width, depth=decoder_depth, mlp_ratio=mlp_ratio)
        + 2 * num_patches * decoder_width * patch_dim
    )
    return float(3 * forward)
