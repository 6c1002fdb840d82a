"""CrossMAE (Fu et al. 2024, arXiv 2401.14391): predict a share of the hidden patches from the visible ones alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.mae import CrossMAE, masked_error, num_visible, patch_targets
from usfmae_jax.models.patches import normalize_images, take_tokens
from usfmae_jax.objectives.mae import MaskedAutoencoding


@dataclasses.dataclass(frozen=True)
class CrossMaskedAutoencoding(MaskedAutoencoding):
    """The masked autoencoder with a cross-attention decoder, which predicts only a share of the hidden patches.

    Attributes:
      share: share of the hidden patches that is predicted, in (0, 1]; drawn anew for each image and step.
    """

    share: float = 0.5

    def describe(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"model": "vit", "encoder": self.encoder, "decoder": self.decoder | {"kind": "cross"}}

    def make(self, rngs: nnx.Rngs) -> CrossMAE:  # type: ignore[override]
        """See `Objective`."""
        return CrossMAE(**self.encoder, **self.decoder, **self.computation, rngs=rngs)

    def prepare(self, images: jax.Array, rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Adds `keep` of `masks`; `chosen`, int `[B, M]`, the patches to predict; and `weight` `[B, M]`, 1 = hidden."""
        masks = self.masks(images, rng)
        order = jnp.argsort(masks["restore"], axis=1)
        # From the end: with fan-aware masks, the hidden patches come last.
        chosen = order[:, order.shape[1] - self._patches_predicted(*images.shape[1:3]) :]
        weight = jnp.take_along_axis(masks["mask"], chosen, axis=1)
        return {"image": images, "keep": masks["keep"], "chosen": chosen, "weight": weight}, rng

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The squared error of the chosen patches and their number; `rng` is unused."""
        inputs = normalize_images(batch["image"], self.mean, self.std)
        targets = patch_targets(inputs, self.encoder["patch_size"], self.normalize_targets)
        predicted = model(self.seen(inputs), batch["keep"], batch["chosen"])
        return masked_error(predicted, take_tokens(targets, batch["chosen"]), batch["weight"])

    def predicted(self, model: nnx.Module, inputs: jax.Array, masks: dict[str, jax.Array]) -> jax.Array:
        """Predictions for all patches, including the visible ones; see `MaskedAutoencoding`."""
        every = jnp.broadcast_to(jnp.arange(masks["restore"].shape[1]), masks["restore"].shape)
        return model(self.seen(inputs), masks["keep"], every)

    def _patches_predicted(self, height: int, width: int) -> int:
        patches = (height // self.encoder["patch_size"]) * (width // self.encoder["patch_size"])
        return max(1, round((patches - num_visible(patches, self.mask_ratio)) * self.share))
