"""Vision transformer (Dosovitskiy et al. 2021) in Flax NNX, with the numerics of the MAE code (He et al. 2022)."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.position import resize_table, sincos_table

AttentionImplementation = Literal["xla", "cudnn"] | None

xavier = nnx.initializers.xavier_uniform()


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x * Phi(x)` with the Gaussian CDF (Hendrycks & Gimpel 2016); any shape."""
    return x * 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # The derivative Phi(x) + x phi(x) shares the erf with the value and is all that the backward pass keeps;
    # derived automatically it was the dearest part of a small model on a CPU.
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    pdf = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, (cdf + x * pdf) * dx


class Linear(nnx.Linear):
    """`[..., I] -> [..., O]`, computed as one 2-D product.

    XLA on the CPU runs a 3-D by 2-D product up to three times slower than the same product with tokens flattened.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, dtype=dtype, kernel_init=xavier, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """`x @ kernel + bias` in the compute dtype."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def layer_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with eps 1e-6, in float32 whatever comes in."""
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017), `[B, N, D] -> [B, N, D]`.

    Query, key and value come from one matrix; the softmax is float32 whatever the compute dtype.
    """

    def __init__(
        self, width: int, num_heads: int, *, dtype: Any, implementation: AttentionImplementation, rngs: nnx.Rngs
    ):
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Every token attends to every token."""
        b, n, d = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads), 2, 0)
        x = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)  # [B, N, H, D/H]
        return self.proj(x.reshape(b, n, d))


class Block(nnx.Module):
    """Pre-norm transformer block, `[B, N, D] -> [B, N, D]`."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        dtype: Any,
        attention: AttentionImplementation,
        rngs: nnx.Rngs,
    ):
        hidden = int(width * mlp_ratio)
        self.norm1 = layer_norm(width, rngs=rngs)
        self.attn = Attention(width, num_heads, dtype=dtype, implementation=attention, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attention, then MLP, each with a residual."""
        x = x + self.attn(self.norm1(x).astype(x.dtype))
        return x + self.fc2(gelu(self.fc1(self.norm2(x).astype(x.dtype))))


class Blocks(nnx.Module):
    """A stack of blocks whose parameters are stacked too, `[depth, ...]`, `[B, N, D] -> [B, N, D]`.

    Args:
      depth: number of blocks.
      make: builds one block from its `nnx.Rngs`.
      scan: compile one block and loop over it; False unrolls the loop: slower to compile, sometimes faster to run,
        the same parameters and the same result.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, depth: int, make: Callable[[nnx.Rngs], Block], *, scan: bool, remat: bool, rngs: nnx.Rngs):
        self.depth, self.scan, self.remat = depth, scan, remat
        self.stack = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(depth))

    def __call__(self, x: jax.Array) -> jax.Array:
        """All blocks, one after the other."""
        graph, stacked = nnx.split(self.stack)

        def apply(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, params)(x), None

        if self.remat:
            apply = jax.checkpoint(apply, prevent_cse=not self.scan)
        return jax.lax.scan(apply, x, stacked, unroll=1 if self.scan else self.depth)[0]


class ViT(nnx.Module):
    """ViT encoder without a head: images `[B, H, W, C]` to tokens `[B, 1 + K, width]`, the class token first.

    Args:
      image_size: (height, width) that the position table is made for; other sizes get it interpolated.
      patch_size: side of a patch; must divide the image size.
      channels: 1 or 3.
      width, depth, num_heads, mlp_ratio: of the transformer.
      dtype: compute dtype; parameters stay float32.
      attention: implementation for `jax.nn.dot_product_attention`: 'xla', 'cudnn', or None for its own choice.
      scan, remat: see `Blocks`.
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
        dtype: Any = jnp.float32,
        attention: AttentionImplementation = None,
        scan: bool = True,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        check_patches(image_size, patch_size)
        self.patch_size, self.width, self.dtype = patch_size, width, dtype
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)

        def make(rngs: nnx.Rngs) -> Block:
            return Block(width, num_heads, mlp_ratio, dtype=dtype, attention=attention, rngs=rngs)

        self.patch_embed = Linear(patch_size * patch_size * channels, width, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))
        self.blocks = Blocks(depth, make, scan=scan, remat=remat, rngs=rngs)
        self.norm = layer_norm(width, rngs=rngs)

    def __call__(self, images: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Encodes all patches, or only those that `keep` `[B, K]` names.

        Args:
          images: normalised, `[B, H, W, C]`; height and width divisible by the patch size.
          keep: int `[B, K]`, the visible patches of each image.

        Returns:
          float32 `[B, 1 + K, width]` after the final norm.
        """
        b, height, width, _ = images.shape
        grid = (height // self.patch_size, width // self.patch_size)
        position = resize_table(sincos_table(self.grid, self.width), self.grid, grid)
        patches = patchify(images, self.patch_size)
        position = jnp.broadcast_to(position, (b, *position.shape))
        if keep is not None:  # before the embedding: hidden patches cost nothing
            patches, position = take_tokens(patches, keep), take_tokens(position, keep)
        x = self.patch_embed(patches) + position.astype(self.dtype)
        cls = jnp.broadcast_to(self.cls_token[...], (b, 1, self.width)).astype(self.dtype)
        return self.norm(self.blocks(jnp.concatenate([cls, x], axis=1)))


def check_patches(image_size: tuple[int, int], patch_size: int) -> None:
    """Raises ValueError unless the patch size divides the image size."""
    if image_size[0] % patch_size or image_size[1] % patch_size:
        raise ValueError(f"image size {image_size[0]}x{image_size[1]} is not divisible by patch size {patch_size}")


def take_tokens(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Picks tokens per sample: `[B, N, D]`, int `[B, K]` -> `[B, K, D]`."""
    return jnp.take_along_axis(tokens, index[:, :, None], axis=1)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """`[B, H, W, C] -> [B, N, P*P*C]`: patches row by row, each in row, column, channel order.

    Raises:
      ValueError: the patch size does not divide the image size.
    """
    b, height, width, c = images.shape
    check_patches((height, width), patch_size)
    x = images.reshape(b, height // patch_size, patch_size, width // patch_size, patch_size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch_size * patch_size * c)


def unpatchify(patches: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """The inverse of `patchify`: `[B, N, P*P*C] -> [B, H, W, C]` for a grid of patches down and across."""
    b, _, d = patches.shape
    c = d // (patch_size * patch_size)
    x = patches.reshape(b, *grid, patch_size, patch_size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, grid[0] * patch_size, grid[1] * patch_size, c)


def normalize_images(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 `[B, H, W, c]` to float32 `[B, H, W, C]`, `(x / 255 - mean) / std`.

    Grey input (c = 1) is repeated to as many channels as `mean` has.
    """
    x = images.astype(jnp.float32) / 255
    return (x - jnp.asarray(mean)) / jnp.asarray(std)
