"""Features of labelled frames from a frozen encoder, computed once and cached by all that determines them."""

import hashlib
import os
import pathlib
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from usfmae_jax.data.table import Table
from usfmae_jax.data.table import images as decode
from usfmae_jax.errors import InputError
from usfmae_jax.interop.model import Model
from usfmae_jax.models.patches import patchify
from usfmae_jax.training.forward import apply_batches, encoder_function
from usfmae_jax.training.mesh import replicated

Extractor = Callable[[Iterator[np.ndarray], int, str], np.ndarray]

#: To be changed when the same weights and frames would give different features.
FORMAT = 3
#: Side in pixels of the shrunk images whose pixels serve as baseline features.
PIXELS = 32
#: For the segmentation probe: number of patches along a side of the image, and the side of each in pixels.
PIXELS_GRID, PIXELS_PATCH = 12, 8
#: Patch tokens are kept in memory: if they are more than this many bytes, an error suggests another pooling.
MOST_TOKENS = 16 * 2**30


def image_format(weights: Model | None, pool: str = "mean") -> tuple[tuple[int, int], int]:
    """(height, width) and channels of the images that a model takes; None stands for raw pixels."""
    side = PIXELS if pool != "patches" else PIXELS_GRID * PIXELS_PATCH
    return weights.image_format if weights else ((side, side), 1)


def grid(weights: Model | None) -> tuple[int, int]:
    """Number of patches (down, across) of such images."""
    return weights.grid() if weights else (PIXELS_GRID, PIXELS_GRID)


def extractor(weights: Model | None, pool: str, *, mesh: Mesh, batch_size: int, dtype: Any = jnp.float32) -> Extractor:
    """Makes a function that computes features of batches uint8 `[n, H, W, C]` as in `image_format`; compiled once.

    Args:
      weights: a model with an encoder; None = the pixels of the shrunk image.
      pool: 'mean', 'cls' or 'patches', see `training.forward.encoder_function`.
      mesh: devices; they must divide `batch_size`.
      batch_size: images per call.
      dtype: compute dtype.

    Returns:
      `(batches, number of images, name for the bar) -> features`: float32 `[N, D]`; patches: float16 `[N, T, D]`.
    """
    if weights is None and pool == "patches":
        return lambda batches, total, name: np.concatenate(
            [np.asarray(patchify(jnp.asarray(batch) / 255, PIXELS_PATCH), np.float16) for batch in batches]
        )
    if weights is None:
        return lambda batches, total, name: np.concatenate(
            [batch.reshape(len(batch), -1).astype(np.float32) / 255 for batch in batches]
        )
    function, params = encoder_function(weights, pool, dtype=dtype)
    params = jax.device_put(params, replicated(mesh))
    return lambda batches, total, name: apply_batches(
        mesh, function, params, batches, batch_size=batch_size, total=total, desc=name
    )


def extract(
    run: Extractor,
    weights: Model | None,
    frames: Table,
    *,
    pool: str,
    batch_size: int,
    threads: int = 2,
    dtype: Any = jnp.float32,
    cache: str = "",
    reused: Callable[[], Any] = lambda: None,
) -> np.ndarray:
    """The features of all frames, read from the cache if they were computed before.

    Args:
      run: from `extractor`, with the same weights, pool, batch size and dtype.
      weights: see `extractor`.
      frames: table of the frames.
      pool: see `extractor`.
      batch_size: see `extractor`.
      dtype: see `extractor`.
      threads: decoding threads.
      cache: folder; "" = no cache. Its files are trusted only if nobody else can have written them.
      reused: called if the features come from the cache.
    """
    (height, width), channels = image_format(weights, pool)
    name = f"{frames.fingerprint}-{pool}-{height}x{width}x{channels}-{jnp.dtype(dtype).name}"
    path = pathlib.Path(cache, f"features-{weights.fingerprint if weights else 'pixels'}-{name}.npz")
    found = _read(path, len(frames)) if cache else None
    # Each host may have its own home directory: all compute unless all have the file.
    if np.all(multihost_utils.process_allgather(np.bool_(found is not None))) and found is not None:
        if jax.process_index() == 0:
            print(f"features: computed before, {path}", file=sys.stderr)
        reused()
        return found
    images = decode(
        frames, range(len(frames)), size=(height, width), channels=channels, batch_size=batch_size, threads=threads
    )
    features = run(images, len(frames), "features")
    if cache and jax.process_index() == 0:
        _write(path, features)
    return features


def check_tokens(weights: Model | None, frames: int) -> None:
    """Raises InputError if the patch tokens of that many frames do not fit into `MOST_TOKENS`."""
    if weights is None:
        return
    (height, width), _ = image_format(weights)
    architecture = weights.encoder().description["encoder"]
    size = 2 * frames * (height // architecture["patch_size"]) * (width // architecture["patch_size"])
    size *= architecture["width"]
    if size > MOST_TOKENS:
        raise InputError(
            f"the patch tokens of {frames} frames take {size / 2**30:.0f} GiB; use --config.protocol=logistic, or a "
            "smaller --config.data.split"
        )


def default_cache() -> str:
    """The default folder for features."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "usfmae_jax")


def _read(path: pathlib.Path, count: int) -> np.ndarray | None:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                print(f"warning: {path} could have been written by somebody else; it is not used", file=sys.stderr)
                return None
            with np.load(file, allow_pickle=False) as stored:
                features, known = stored["features"], str(stored["sha256"])
                fits = int(stored["format"]) == FORMAT and len(features) == count and known == digest(features)
                return features if fits else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent, damaged, or from another version: computed again


def digest(features: np.ndarray) -> str:
    """SHA-256 of features, including shape and dtype, as hex."""
    whole = hashlib.sha256(f"{features.shape}{features.dtype.str}".encode())
    whole.update(np.ascontiguousarray(features).view(np.uint8).data)
    return whole.hexdigest()


def _write(path: pathlib.Path, features: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".incomplete", delete=False) as file:
            np.savez(file, features=features, format=FORMAT, sha256=digest(features))
        os.replace(file.name, path)
    except OSError as error:
        print(f"warning: features are not kept for the next time: {error}", file=sys.stderr)
