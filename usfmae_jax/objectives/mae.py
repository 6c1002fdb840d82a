"""The masked autoencoder (He et al. 2022): predict the pixels of hidden patches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.mae import (
    MAE,
    masked_error,
    patch_statistics,
    patch_targets,
    random_masking,
    sector_patches,
    training_flops,
)
from usfmae_jax.models.patches import normalize_images, patchify, unpatchify
from usfmae_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoding(Objective):
    """Hides patches and has the model predict them.

    Attributes:
      encoder: arguments of `vit.ViT` that fix its parameters.
      decoder: `decoder_width`, `decoder_depth` and `decoder_num_heads` of `mae.MAE`.
      mask_ratio: share of patches to hide.
      mean: of the model's input, per channel.
      std: likewise.
      fan_aware: hide and predict only patches in the imaged sector.
      normalize_targets: predict standardised patches.
      computation: `dtype`, `attention`, `scan` and `remat` of `vit.ViT`.
    """

    encoder: dict[str, Any]
    decoder: dict[str, int]
    mask_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fan_aware: bool = False
    normalize_targets: bool = True
    computation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"model": "vit", "encoder": self.encoder, "decoder": self.decoder}

    def make(self, rngs: nnx.Rngs) -> MAE:
        """See `Objective`."""
        return MAE(**self.encoder, **self.decoder, **self.computation, rngs=rngs)

    def prepare(self, images: jax.Array, rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Adds masks: `keep`, `restore` and `mask` of `mae.mask_from_noise`."""
        b, height, width, _ = images.shape
        p = self.encoder["patch_size"]
        inside = sector_patches(images, p) if self.fan_aware else None
        keep, restore, mask = random_masking(rng, b, (height // p) * (width // p), self.mask_ratio, inside)
        return {"image": images, "keep": keep, "restore": restore, "mask": mask}, rng

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The squared error of hidden patches and their number; nothing more is drawn."""
        inputs = normalize_images(batch["image"], self.mean, self.std)
        targets = patch_targets(inputs, self.encoder["patch_size"], self.normalize_targets)
        return masked_error(model(inputs, batch["keep"], batch["restore"]), targets, batch["mask"])

    def pictures(self, model: nnx.Module, images: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """Input, what the encoder sees, what comes back, and that pasted into what was seen.

        Standardised predictions are put back with each patch's own mean and scale, as the MAE demonstration does.
        """
        p = self.encoder["patch_size"]
        batch, _ = self.prepare(images, rng)
        inputs = normalize_images(images, self.mean, self.std)
        predicted = model(inputs, batch["keep"], batch["restore"])
        if self.normalize_targets:
            center, scale = patch_statistics(patchify(inputs, p))
            predicted = predicted * scale + center
        grid = (images.shape[1] // p, images.shape[2] // p)
        pixels = unpatchify(predicted, grid, p) * jnp.asarray(self.std) + jnp.asarray(self.mean)
        if images.shape[-1] < pixels.shape[-1]:
            pixels = pixels.mean(axis=-1, keepdims=True)
        pixels = jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8)
        hidden = unpatchify(jnp.repeat(batch["mask"][..., None], p * p, axis=-1), grid, p) > 0
        return {
            "input": images,
            "masked": jnp.where(hidden, jnp.uint8(128), images),
            "reconstruction": pixels,
            "pasted": jnp.where(hidden, pixels, images),
        }

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
        )
