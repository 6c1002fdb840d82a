"""`load_encoder`: an encoder directory as a function of images."""

import numbers
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from usfmae_jax.data.augment import resize
from usfmae_jax.errors import InputError
from usfmae_jax.interop.model import Model, build, model_graph, open_model
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.training.forward import apply_batches
from usfmae_jax.training.mesh import one_device, replicated


class Features(NamedTuple):
    """Features of B images, float32.

    Attributes:
      class_token: `[B, D]`.
      mean_patch: the mean of the patch tokens, `[B, D]`.
      patch_grid: the patch tokens as a grid, `[B, rows, columns, D]`.
    """

    class_token: np.ndarray
    mean_patch: np.ndarray
    patch_grid: np.ndarray


class Encoder:
    """A trained encoder, ready to use.

    Attributes:
      architecture: the arguments of `models.vit.ViT`.
      preprocessing: how pixels are turned into its input.
    """

    def __init__(self, model: Model):
        self.architecture, self.preprocessing, self._model = model.description["encoder"], model.preprocessing, model
        graph, patch = model_graph(build(model.description)), self.architecture["patch_size"]
        mean, std = tuple(self.preprocessing["mean"]), tuple(self.preprocessing["std"])

        def apply(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
            tokens = nnx.merge(graph, params)(normalize_images(images, mean, std))
            grid = (images.shape[1] // patch, images.shape[2] // patch)
            patches = tokens[:, 1:]
            return tokens[:, 0], patches.mean(axis=1), patches.reshape(len(images), *grid, -1)

        self._mesh, self._apply = one_device(), apply
        self._params = jax.device_put(model.params["encoder"], replicated(self._mesh))

    def __repr__(self) -> str:
        about, (height, width) = self.architecture, self.preprocessing["image_size"]
        count = sum(leaf.size for leaf in jax.tree.leaves(self._params))
        return (
            f"Encoder: a ViT of width {about['width']} and depth {about['depth']} for {height}x{width} images, patches "
            f"of {about['patch_size']}; {count / 1e6:.1f} M parameters"
        )

    def __call__(
        self, images: np.ndarray | Sequence[np.ndarray], *, resized: bool = True, batch_size: int = 64
    ) -> Features:
        """Computes the features of images.

        Args:
          images: uint8 `[B, H, W, C]` or `[B, H, W]`; or a list of `[H, W, C]` or `[H, W]` of different sizes. One or
            three channels, converted to those of the model.
          resized: resize to the size that the model was trained on; False keeps the size and interpolates the position
            embeddings; height and width must then be divisible by the patch size.
          batch_size: images per call; the last batch is padded, so that only one shape is compiled.

        Raises:
          InputError: images of another shape or dtype, or no batch size.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r} must be a whole number of 1 or more")
        prepared = self.batch(images, resized)
        batch_size = min(int(batch_size), len(prepared))
        batches = (prepared[start : start + batch_size] for start in range(0, len(prepared), batch_size))
        how: dict[str, Any] = {"batch_size": batch_size, "total": len(prepared), "desc": "features"}
        return Features(*apply_batches(self._mesh, self._apply, self._params, batches, **how))

    def attention(
        self, images: np.ndarray | Sequence[np.ndarray], *, pool: Literal["mean", "cls"] = "mean"
    ) -> np.ndarray:
        """Which patches the features of images draw on, by attention rollout (Abnar & Zuidema 2020).

        Args:
          images: as for `__call__`; they are resized.
          pool: the feature to explain: "cls" (`class_token`) or "mean" (`mean_patch`).

        Returns:
          float32 `[B, rows, columns]`, each map scaled to [0, 1].

        Raises:
          InputError: there is no such feature, no image, or images of another shape or dtype.
        """
        if pool not in ("mean", "cls"):
            raise InputError(f"pool={pool!r} must be 'mean' or 'cls'")
        from usfmae_jax.training.inspect import rollout  # it imports scikit-learn

        follow = rollout(self._model, pool)
        assert follow is not None  # always set for a vision transformer
        return follow(self.batch(images))

    def batch(self, images: np.ndarray | Sequence[np.ndarray], resized: bool = True) -> np.ndarray:
        """Images in the size and channels of the model: uint8 `[B, H, W, C]`.

        Args:
          images: as for `__call__`.
          resized: False keeps the size.

        Raises:
          InputError: there are none, or they are of different sizes, or of another shape or dtype.
        """
        shape: tuple[int, ...] = getattr(images, "shape", ())
        if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)):
            raise InputError(f"an array of shape {shape} is one image; put it into a list: [image]")
        if not np.iterable(images):
            raise InputError(f"images must be uint8 [B, H, W, C] or a list, not {type(images).__name__}")
        prepared = [self.prepared(image, resized) for image in images]
        if not prepared:
            raise InputError("there are no images; give uint8 [B, H, W, C]")
        if len({image.shape for image in prepared}) > 1:
            raise InputError("images of different sizes have to be resized: leave out resized=False")
        return np.stack(prepared)

    def prepared(self, image: np.ndarray, resized: bool = True) -> np.ndarray:
        """An image in the size and channels of the model: uint8 `[H, W, C]`.

        Args:
          image: uint8 `[H, W, C]` or `[H, W]`.
          resized: False keeps the size.

        Raises:
          InputError: an image of another shape or dtype.
        """
        image = np.asarray(image)
        image = image[..., None] if image.ndim == 2 else image
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
            raise InputError(f"images must be uint8 with 1 or 3 channels, not {image.dtype} {image.shape} each")
        channels = self.preprocessing["channels"]
        if image.shape[2] == 3 and channels == 1:  # the same luma as decoding to grey
            image = np.round(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
        elif image.shape[2] != channels:
            image = np.repeat(image, channels, axis=2)
        if resized:
            return resize(image, tuple(self.preprocessing["image_size"]))
        patch = self.architecture["patch_size"]
        if image.shape[0] % patch or image.shape[1] % patch:
            raise InputError(f"images of {image.shape[0]}x{image.shape[1]} are not divisible by the patch size {patch}")
        return image


def load_encoder(directory: str | os.PathLike) -> Encoder:
    """Loads an encoder from any checkpoint that `interop.model.open_model` accepts, including a classifier's.

    Raises:
      InputError: there is none.
    """
    return Encoder(open_model(os.fspath(directory)).encoder())
