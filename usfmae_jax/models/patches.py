"""Images to patches and back, sin-cos position tables, and normalising and blurring of images."""

import jax
import jax.numpy as jnp
import numpy as np


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


def blurred(images: jax.Array, sigma: float) -> jax.Array:
    """Float images `[B, H, W, C]` blurred by a Gaussian of deviation `sigma` pixels; borders are edge-padded."""
    radius = max(1, round(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        widths = [(radius, radius) if one == axis else (0, 0) for one in range(4)]
        wide, size = jnp.pad(images, widths, mode="edge"), images.shape[axis]
        shifted = (jax.lax.slice_in_dim(wide, i, i + size, axis=axis) for i in range(len(weights)))
        images = sum(weight * one for weight, one in zip(weights, shifted, strict=True))
    return images


def sincos_table(grid: tuple[int, int], width: int) -> np.ndarray:
    """The 2-D sin-cos position table of the MAE code (He et al. 2022).

    The first half of the channels encodes the column (width first), the second half the row; each half holds the sines,
    then the cosines, of `position * 10000^(-2i/d)`, `d = width / 2`.

    Args:
      grid: patches down and across.
      width: channels, divisible by 4.

    Returns:
      float32 `[grid[0] * grid[1], width]`, patches in row-major order.
    """
    if width % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width divisible by 4, not {width}")
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))

    def encode(position: np.ndarray) -> np.ndarray:
        angles = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def resize_table(table: jax.Array | np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Bicubic interpolation of a position table `[old[0] * old[1], D]` to `[new[0] * new[1], D]`.

    Matches PyTorch's `interpolate(..., mode="bicubic", align_corners=False)`, with which the MAE code and Hugging Face
    resize their tables: not antialiased, so that a smaller grid samples the same function.
    """
    if old == new:
        return jnp.asarray(table)
    down, across = (_cubic_weights(*sizes) for sizes in zip(old, new, strict=True))
    # The matrices are small and the table goes into every token: avoid the TPU's default bfloat16 precision.
    resized = jnp.einsum(
        "ya,xb,abd->yxd", down, across, jnp.asarray(table).reshape(*old, -1), precision=jax.lax.Precision.HIGHEST
    )
    return resized.reshape(new[0] * new[1], -1)


def _cubic_weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Weights float32 `[new, old]` that interpolate along one axis: cubic convolution (Keys 1981), with PyTorch's `a`.

    JAX's own cubic interpolation uses a = -0.5. Beyond the border the last position is repeated.
    """
    place = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        neighbour = np.floor(place) + offset
        d = np.abs(place - neighbour)
        weight = np.where(d <= 1, ((a + 2) * d - (a + 3)) * d**2 + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)
        np.add.at(weights, (np.arange(new), np.clip(neighbour, 0, old - 1).astype(int)), weight)
    return weights.astype(np.float32)
