"""Vision transformer (Dosovitskiy et al. 2021) in Flax NNX, with the numerics of the MAE code (He et al. 2022)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.layers import (
    NORM_EPS,
    Attention,
    AttentionImplementation,
    Linear,
    Remat,
    gelu,
    layer_norm,
    recomputed,
    spread,
)
from usfmae_jax.models.patches import check_patches, patchify, resize_table, sincos_table, take_tokens

#: Architectures by name, as arguments of `ViT`; "small" to "huge" as in the ViT and MAE papers.
SIZES: dict[str, dict[str, Any]] = {
    name: {
        "image_size": image_size,
        "patch_size": patch_size,
        "channels": channels,
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": 4.0,
    }
    for name, image_size, patch_size, channels, width, depth, num_heads in (
        ("tiny", (96, 96), 8, 1, 192, 6, 3),
        ("small", (224, 224), 16, 3, 384, 12, 6),
        ("base", (224, 224), 16, 3, 768, 12, 12),
        ("large", (224, 224), 16, 3, 1024, 24, 16),
        ("huge", (224, 224), 14, 3, 1280, 32, 16),
    )
}


def blocks_flops(tokens: int, *, width: int, depth: int, mlp_ratio: float) -> float:
    """Floating-point operations of a forward pass through a stack of blocks on one image: matrix products only."""
    return depth * (2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens**2 * width)


def vit_flops(patches: int, patch_dim: int, *, width: int, depth: int, mlp_ratio: float) -> float:
    """Floating-point operations of a `ViT` forward pass on `patches` patches of `patch_dim` values each."""
    return 2 * patches * patch_dim * width + blocks_flops(patches + 1, width=width, depth=depth, mlp_ratio=mlp_ratio)


class Block(nnx.Module):
    """Pre-norm transformer block, `[B, N, D] -> [B, N, D]`."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        norm_eps: float = NORM_EPS,
        dtype: Any,
        attention: AttentionImplementation,
        lora: int = 0,
        rngs: nnx.Rngs,
    ):
        hidden = int(width * mlp_ratio)
        self.norm1 = layer_norm(width, norm_eps, rngs=rngs)
        self.attn = Attention(width, num_heads, dtype=dtype, implementation=attention, lora=lora, rngs=rngs)
        self.norm2 = layer_norm(width, norm_eps, rngs=rngs)
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """Attention, then MLP, each with a residual.

        Args:
          x: `[B, N, D]`.
          scale: `[2, B]`, factors for the two branches (drop path); None = 1.
        """
        x = x + _scaled(self.attn(self.norm1(x).astype(x.dtype)), scale, 0)
        return x + _scaled(self.fc2(gelu(self.fc1(self.norm2(x).astype(x.dtype)))), scale, 1)


def _scaled(branch: jax.Array, scale: jax.Array | None, which: int) -> jax.Array:
    return branch if scale is None else branch * scale[which][:, None, None].astype(branch.dtype)


def drop_path_scales(rng: jax.Array, depth: int, batch: int, rate: float) -> jax.Array:
    """Factors by which stochastic depth (Huang et al. 2016) multiplies the residual branches.

    The rate rises linearly from 0 at the first block to `rate` at the last; a branch that is kept is scaled up, so that
    its expectation is the same as without dropping.

    Args:
      rng: key.
      depth: number of blocks, of two branches each.
      batch: number of samples, each of which drops its own branches.
      rate: in [0, 1).

    Returns:
      float32 `[depth, 2, batch]`, 0 or `1 / (1 - rate of the block)`.
    """
    stay = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    return jax.random.bernoulli(rng, stay, (depth, 2, batch)) / stay


class Blocks(nnx.Module):
    """A stack of blocks whose parameters are stacked too, `[depth, ...]`, `[B, N, D] -> [B, N, D]`.

    Args:
      depth: number of blocks.
      make: builds one block from its `nnx.Rngs`.
      scan: compile one block and loop over it; False unrolls the loop: slower to compile, sometimes faster to run,
        the same parameters and the same result.
      remat: what the backward pass recomputes, see `layers.recomputed`.
    """

    def __init__(self, depth: int, make: Callable[[nnx.Rngs], Block], *, scan: bool, remat: Remat, rngs: nnx.Rngs):
        self.depth, self.scan, self.remat = depth, scan, remat
        self.stack = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(depth))

    def __call__(
        self, x: jax.Array, *, rng: jax.Array | None = None, drop_path: float = 0.0, freeze: int = 0
    ) -> jax.Array:
        """Applies all blocks in order.

        Args:
          x: `[B, N, D]`.
          rng: key for drop path; None = nothing is dropped.
          drop_path: maximum rate, see `drop_path_scales`; frozen blocks drop nothing.
          freeze: number of leading blocks that get no gradient, nor does anything before them.
        """
        return self.levels(x, (self.depth - 1,), rng=rng, drop_path=drop_path, freeze=freeze)[0]

    def levels(
        self,
        x: jax.Array,
        after: Sequence[int],
        *,
        first: int = 0,
        rng: jax.Array | None = None,
        drop_path: float = 0.0,
        freeze: int = 0,
        through: bool = False,
    ) -> list[jax.Array]:
        """Outputs of selected blocks, `[B, N, D]` each; blocks after the last one selected are not run.

        Args:
          x: `[B, N, D]`.
          after: indices of the selected blocks, ascending, from 0.
          first: index of the block that `x` enters.
          rng: see `__call__`.
          drop_path: likewise.
          freeze: likewise.
          through: let the gradient reach `x` through frozen blocks, which themselves still get none.
        """
        graph, stacked = nnx.split(self.stack)
        scales = None
        if rng is not None and drop_path:
            scales = drop_path_scales(rng, self.depth, x.shape[0], drop_path)

        def apply(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
            params, scale = block
            return nnx.merge(graph, params)(spread(x), scale), None

        if tuple(after) == tuple(range(self.depth)) and not first and not freeze:  # one loop instead of one per block

            def kept(x: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
                x = apply(x, block)[0]
                return x, x

            step = recomputed(kept, self.remat, scan=self.scan)
            return list(jax.lax.scan(step, x, (stacked, scales), unroll=1 if self.scan else self.depth)[1])
        found, start = [], first
        for end in sorted({max(min(freeze, after[-1] + 1), first), *(one + 1 for one in after)} - {first}):
            frozen = end <= freeze
            part, scale = stacked, None if frozen else scales
            if end - start < self.depth:
                part, scale = jax.tree.map(lambda p, s=start, e=end: p[s:e], (part, scale))
            if frozen:
                # With gradients stopped, JAX derives no backward pass for these blocks and saves none of their values.
                part, x = jax.lax.stop_gradient(part), x if through else jax.lax.stop_gradient(x)
            step = recomputed(apply, self.remat, scan=self.scan) if through or not frozen else apply
            x = jax.lax.scan(step, x, (part, scale), unroll=1 if self.scan else end - start)[0]
            if end - 1 in after:
                found.append(x)
            start = end
        return found


class ViT(nnx.Module):
    """ViT encoder without a head: images `[B, H, W, C]` to tokens `[B, 1 + K, width]`, the class token first.

    Args:
      image_size: (height, width) of the position table, which is interpolated for other sizes.
      patch_size: side of a patch; must divide the image size.
      channels: 1 or 3.
      width, depth, num_heads, mlp_ratio: of the transformer.
      learned_positions: the position table is a parameter, as in ViT and after MAE's fine-tuning; else fixed sin-cos.
      norm_eps: of the layer norms; Hugging Face's configs often have 1e-12.
      dtype: compute dtype; parameters stay float32.
      attention: implementation for `jax.nn.dot_product_attention`: 'xla', 'cudnn', or None for the platform's default.
      scan, remat: see `Blocks`.
      lora: rank of the updates added to the attention matrices, see `layers.LowRank`; 0 = none.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        learned_positions: bool = False,
        norm_eps: float = NORM_EPS,
        dtype: Any = jnp.float32,
        attention: AttentionImplementation = None,
        scan: bool = True,
        remat: Remat = "none",
        lora: int = 0,
        rngs: nnx.Rngs,
    ):
        check_patches(image_size, patch_size)
        self.patch_size, self.width, self.dtype = patch_size, width, dtype
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)

        def make(rngs: nnx.Rngs) -> Block:
            how: dict[str, Any] = {"norm_eps": norm_eps, "dtype": dtype, "attention": attention, "lora": lora}
            return Block(width, num_heads, mlp_ratio, **how, rngs=rngs)

        self.patch_embed = Linear(patch_size * patch_size * channels, width, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))
        self.learned_positions = learned_positions
        if learned_positions:
            self.position = nnx.Param(jnp.asarray(sincos_table(self.grid, width)))
        self.blocks = Blocks(depth, make, scan=scan, remat=remat, rngs=rngs)
        self.norm = layer_norm(width, norm_eps, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        keep: jax.Array | None = None,
        *,
        normalize: bool = True,
        rng: jax.Array | None = None,
        drop_path: float = 0.0,
        freeze: int = 0,
    ) -> jax.Array:
        """Encodes all patches, or only those in `keep`.

        Args:
          images: normalised, `[B, H, W, C]`; height and width divisible by the patch size.
          keep: int `[B, K]`, the visible patches of each image.
          normalize: apply the final norm.
          rng: key for drop path; None = nothing is dropped.
          drop_path: maximum rate of drop path, see `drop_path_scales`.
          freeze: number of leading blocks that get no gradient, together with the patch embedding and the class
            token; freezing all blocks freezes the final norm too.

        Returns:
          float32 `[B, 1 + K, width]`, the class token first.

        Raises:
          ValueError: `freeze` is negative or exceeds the number of blocks.
        """
        if not 0 <= freeze <= self.blocks.depth:
            raise ValueError(f"cannot freeze {freeze} of {self.blocks.depth} blocks")
        x = self.blocks(self.embed(images, keep), rng=rng, drop_path=drop_path, freeze=freeze)
        x = self.norm(x) if normalize else x.astype(jnp.float32)
        return jax.lax.stop_gradient(x) if freeze == self.blocks.depth else x

    def levels(
        self,
        images: jax.Array,
        after: Sequence[int],
        *,
        rng: jax.Array | None = None,
        drop_path: float = 0.0,
        freeze: int = 0,
    ) -> list[jax.Array]:
        """Patch tokens after selected blocks, without the final norm: `[B, N, width]` each.

        Args:
          images: as in `__call__`.
          after: indices of the selected blocks, ascending, from 0.
          rng: see `__call__`.
          drop_path: likewise.
          freeze: likewise.
        """
        found = self.blocks.levels(self.embed(images), after, rng=rng, drop_path=drop_path, freeze=freeze)
        found = [tokens[:, 1:] for tokens in found]
        return jax.lax.stop_gradient(found) if freeze == self.blocks.depth else found

    def embed(self, images: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Input of the first block: class token and embedded patches with their positions, `[B, 1 + K, width]`."""
        b, height, width, _ = images.shape
        grid = (height // self.patch_size, width // self.patch_size)
        table = self.position[...] if self.learned_positions else sincos_table(self.grid, self.width)
        position = resize_table(table, self.grid, grid)
        patches = patchify(images, self.patch_size)
        position = jnp.broadcast_to(position, (b, *position.shape))
        if keep is not None:  # before the embedding, so that hidden patches cost nothing
            patches, position = take_tokens(patches, keep), take_tokens(position, keep)
        x = self.patch_embed(patches) + position.astype(self.dtype)
        cls = jnp.broadcast_to(self.cls_token[...], (b, 1, self.width)).astype(self.dtype)
        return jnp.concatenate([cls, x], axis=1)


def attention_rollout(encoder: ViT, images: jax.Array, pool: Literal["mean", "cls"] = "mean") -> jax.Array:
    """Attention rollout (Abnar & Zuidema 2020): which patches the pooled output draws on.

    In every block the attention is averaged over heads, mixed half and half with the identity for the residual, and
    multiplied by that of the blocks before it. It shows where information may have come from, not how much it mattered:
    an illustration, not evidence.

    Args:
      encoder: run in inference mode; nothing is dropped.
      images: normalised, `[B, H, W, C]`.
      pool: whose attention: "cls" for the class token, "mean" for the average over all patches.

    Returns:
      float32 `[B, H / patch, W / patch]`, rescaled to [0, 1] per image; all 0 if every patch counts the same.
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
    # Rounding alone causes a spread of about 1e-7, which must not be stretched to the full range.
    stretched = jnp.where(spread > 1e-5 * high, (patches - low) / jnp.maximum(spread, 1e-30), 0)
    return stretched.reshape(-1, images.shape[1] // encoder.patch_size, images.shape[2] // encoder.patch_size)
