"""Small files in the names of the original MAE code, with random weights; no PyTorch needed."""

import pathlib
from typing import Any

import numpy as np

from usfmae_jax.interop.files import Tensors, from_array, write_safetensors
from usfmae_jax.interop.names import expected_shapes, stored_table

ARCHITECTURE: dict[str, Any] = {
    "image_size": [32, 32], "patch_size": 8, "channels": 3, "width": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 4.0,
}  # fmt: skip
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
#: What tensors of these widths do not tell.
HEADS = ("--num_heads=4", "--decoder_num_heads=2")


def tensors(*, decoder: bool = True, pool: str = "", classes: int = 3, seed: int = 0, **changes: Any) -> Tensors:
    """All of a model; `pool` "mean" or "cls" makes it a classifier, "" none."""
    rng = np.random.default_rng(seed)
    about = ARCHITECTURE | changes
    width, grid = about["width"], (4, 4)
    shapes: dict[str, tuple[int, ...]] = expected_shapes(about, DECODER if decoder else None)
    if pool:
        shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    if pool == "mean":
        shapes |= {"fc_norm.weight": (width,), "fc_norm.bias": (width,)}
        del shapes["norm.weight"], shapes["norm.bias"]
    found = {name: from_array(rng.normal(0, 0.2, shape).astype(np.float32)) for name, shape in shapes.items()}
    found["pos_embed"] = from_array(stored_table(grid, grid, width))
    if decoder:
        found["decoder_pos_embed"] = from_array(stored_table(grid, grid, DECODER["decoder_width"]))
    return found


def write(path: pathlib.Path, found: Tensors, metadata: dict[str, str] | None = None) -> str:
    """Writes them; returns the path."""
    write_safetensors(path, found, metadata or {})
    return str(path)
