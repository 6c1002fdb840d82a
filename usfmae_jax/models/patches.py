"""Images to patches and back; pixels to what a model sees."""

import jax
import jax.numpy as jnp


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
