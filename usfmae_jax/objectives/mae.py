"""The masked autoencoder (He et al. 2022): predict the pixels of hidden patches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.mae import (
    MAE,
    block_noise,
    mask_from_noise,
    masked_error,
    patch_statistics,
    patch_targets,
    random_masking,
    sector_patches,
    training_flops,
)
from usfmae_jax.models.patches import blurred, normalize_images, patchify, unpatchify
from usfmae_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoding(Objective):
    """Hides patches and trains the model to predict them.

    Attributes:
      encoder: arguments of `vit.ViT` that determine its parameters.
      decoder: `decoder_width`, `decoder_depth` and `decoder_num_heads` of `mae.MAE`.
      mask_ratio: share of patches to hide.
      mean: of the model's input, per channel.
      std: likewise.
      fan_aware: hide and predict only patches in the imaged sector.
      block: hide squares of `block` by `block` patches.
      blur: deviation in pixels of the Gaussian that blurs the model's input, while the targets stay sharp (Kang et
        al. 2023, arXiv 2306.08249); 0 = none.
      normalize_targets: predict standardised patches.
      computation: `dtype`, `attention`, `scan` and `remat` of `vit.ViT`.
    """

    encoder: dict[str, Any]
    decoder: dict[str, int]
    mask_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fan_aware: bool = False
    block: int = 1
    blur: float = 0.0
    normalize_targets: bool = True
    computation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"model": "vit", "encoder": self.encoder, "decoder": self.decoder}

    def make(self, rngs: nnx.Rngs) -> MAE:
        """See `Objective`."""
        return MAE(**self.encoder, **self.decoder, **self.computation, rngs=rngs)

    def prepare(self, images: jax.Array, rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Adds `masks`."""
        return {"image": images, **self.masks(images, rng)}, rng

    def masks(self, images: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """`keep`, `restore` and `mask` of `mae.mask_from_noise`."""
        b, height, width, _ = images.shape
        p = self.encoder["patch_size"]
        inside = sector_patches(images, p) if self.fan_aware else None
        grid = (height // p, width // p)
        if self.block > 1:
            keep, restore, mask = mask_from_noise(block_noise(rng, b, grid, self.block), self.mask_ratio, inside)
        else:
            keep, restore, mask = random_masking(rng, b, grid[0] * grid[1], self.mask_ratio, inside)
        return {"keep": keep, "restore": restore, "mask": mask}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The squared error of hidden patches and their number; `rng` is unused."""
        inputs = normalize_images(batch["image"], self.mean, self.std)
        targets = patch_targets(inputs, self.encoder["patch_size"], self.normalize_targets)
        return masked_error(model(self.seen(inputs), batch["keep"], batch["restore"]), targets, batch["mask"])

    def seen(self, inputs: jax.Array) -> jax.Array:
        """The model's input: normalised images, blurred if `blur`, `[B, H, W, C]`."""
        return blurred(inputs, self.blur) if self.blur else inputs

    def predicted(self, model: nnx.Module, inputs: jax.Array, masks: dict[str, jax.Array]) -> jax.Array:
        """Predictions for all patches of normalised images, `[B, N, P*P*C]`, for pictures."""
        return model(self.seen(inputs), masks["keep"], masks["restore"])

    def pictures(self, model: nnx.Module, images: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """The input, the encoder's view, the reconstruction, and the input with its hidden patches reconstructed.

        Standardised predictions are restored with each patch's own mean and scale, as in the MAE demo.
        """
        p = self.encoder["patch_size"]
        masks = self.masks(images, rng)
        inputs = normalize_images(images, self.mean, self.std)
        predicted = self.predicted(model, inputs, masks)
        if self.normalize_targets:
            center, scale = patch_statistics(patchify(inputs, p))
            predicted = predicted * scale + center
        grid = (images.shape[1] // p, images.shape[2] // p)
        pixels = unpatchify(predicted, grid, p) * jnp.asarray(self.std) + jnp.asarray(self.mean)
        if images.shape[-1] < pixels.shape[-1]:
            pixels = pixels.mean(axis=-1, keepdims=True)
        pixels = jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8)
        hidden = unpatchify(jnp.repeat(masks["mask"][..., None], p * p, axis=-1), grid, p) > 0
        return {
            "input": images,
            "masked": jnp.where(hidden, jnp.uint8(128), self._shown(inputs, images)),
            "reconstruction": pixels,
            "pasted": jnp.where(hidden, pixels, images),
        }

    def _shown(self, inputs: jax.Array, images: jax.Array) -> jax.Array:
        if not self.blur:
            return images
        pixels = (self.seen(inputs) * jnp.asarray(self.std) + jnp.asarray(self.mean))[..., : images.shape[-1]]
        return jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8)

    def flops(self) -> float:
        """See `Objective`."""
        height, width = self.encoder["image_size"]
        patch = self.encoder["patch_size"]
        return training_flops(
            num_patches=(height // patch) * (width // patch),
            patch_dim=patch**2 * self.encoder["channels"],
            mask_ratio=self.mask_ratio,
            width=self.encoder["width"],
            depth=self.encoder["depth"],
            decoder_width=self.decoder["decoder_width"],
            decoder_depth=self.decoder["decoder_depth"],
            mlp_ratio=self.encoder["mlp_ratio"],
            predicted=self._patches_predicted(height, width),
        )

    def _patches_predicted(self, height: int, width: int) -> int:
        return 0
