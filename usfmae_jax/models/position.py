"""Fixed sin-cos position tables and their interpolation to other grids."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_table(grid: tuple[int, int], width: int) -> np.ndarray:
    """The 2-D sin-cos position table of the MAE code (He et al. 2022).

    The first half of the channels encodes the column (width first), the second the row; within a half, sines then
    cosines of `position * 10000^(-2i/d)`, `d = width / 2`.

    Args:
      grid: patches down and across.
      width: channels, divisible by 4.

    Returns:
      float32 `[grid[0] * grid[1], width]`, rows of patches first.
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
    """Bicubic interpolation of a position table `[old[0] * old[1], D]` to `[new[0] * new[1], D]`."""
    if old == new:
        return jnp.asarray(table)
    image = jnp.asarray(table).reshape(*old, -1)
    # Without antialiasing, as ViT and MAE fine-tuning do it: a smaller grid samples the same function.
    return jax.image.resize(image, (*new, image.shape[-1]), "bicubic", antialias=False).reshape(-1, image.shape[-1])
