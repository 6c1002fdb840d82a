"""Position tables in other people's files: ours are not stored, theirs are."""

import math

import numpy as np

from usfmae_jax.models.patches import resize_table, sincos_table

#: How far a stored table may be from the exact one; a table kept in bfloat16 is off by up to 0.004.
TOLERANCE = 5e-3


def stored_table(
    base: tuple[int, int], grid: tuple[int, int], width: int, learned: np.ndarray | None = None
) -> np.ndarray:
    """What goes into a file: float32 `[1, 1 + N, width]`, zeros for the class token, then the table.

    Args:
      base: the grid that the model's table is made for.
      grid: the grid that the file is for; the table is interpolated as the model does it.
      width: channels.
      learned: the model's table `[base[0] * base[1], width]`; None = the sin-cos table.
    """
    table = np.asarray(resize_table(sincos_table(base, width) if learned is None else learned, base, grid), np.float32)
    return np.concatenate([np.zeros((1, width), np.float32), table])[None]


def find_grid(patches: int, hint: tuple[int, int] | None) -> tuple[int, int] | None:
    """Patches down and across of a table for that many patches: what the hint says, else a square; None if neither."""
    if hint and hint[0] * hint[1] == patches:
        return hint
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def difference(table: np.ndarray, base: tuple[int, int], grid: tuple[int, int]) -> float:
    """Largest difference between a file's table `[1, 1 + N, D]` and the one that the model would use."""
    return float(np.abs(table - stored_table(base, grid, table.shape[-1])).max())
