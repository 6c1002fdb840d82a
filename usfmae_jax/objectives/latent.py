"""Latent targets: predict a teacher's features of hidden patches instead of their pixels.

The teacher sees the whole image. It is either a fixed encoder, as in MILAN (Hou et al. 2022, arXiv 2208.06049), BEiT v2
(Peng et al. 2022, arXiv 2208.06366) and EVA (Fang et al. 2023, arXiv 2211.07636); or the running average of the model
being trained, as in data2vec (Baevski et al. 2022, arXiv 2202.03555) and I-JEPA (Assran et al. 2023, arXiv 2301.08243).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.interop.model import Model, build, model_graph
from usfmae_jax.models.mae import MAE, masked_error, sector_patches
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.models.vit import vit_flops
from usfmae_jax.objectives.mae import MaskedAutoencoding


@dataclasses.dataclass(frozen=True, eq=False)
class LatentPrediction(MaskedAutoencoding):
    """The masked autoencoder, predicting the patch tokens of the teacher's last block, each standardised.

    If the running average is the teacher, it is also what is probed and exported. Nothing of a fixed teacher is.

    Attributes:
      teacher: a vision transformer that is not trained; None = the running average of the model's own encoder.
        Images are resized so that the teacher has as many patches as the model.
      everywhere: predict the visible patches too; with `fan_aware`, all those in the imaged sector.
    """

    teacher: Model | None = None
    everywhere: bool = False

    def describe(self) -> dict[str, Any]:
        """See `Objective`."""
        outputs = self._teacher["encoder"]["width"]
        return super().describe() | {"decoder": self.decoder | {"kind": "latent", "outputs": outputs}}

    def make(self, rngs: nnx.Rngs) -> MAE:
        """See `Objective`."""
        outputs = self._teacher["encoder"]["width"]
        return MAE(**self.encoder, **self.decoder, outputs=outputs, **self.computation, rngs=rngs)

    def teach(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Adds `target`, float32 `[B, N, D]`: the teacher's features of all patches, each standardised."""
        encoder = nnx.merge(model_graph(build(self._teacher, **self.computation)), params["encoder"])
        mean, std = self.mean, self.std
        if self.teacher:
            mean, std = (tuple(self.teacher.preprocessing[name]) for name in ("mean", "std"))
        images = normalize_images(batch["image"], mean, std)
        size = [side // self.encoder["patch_size"] * encoder.patch_size for side in images.shape[1:3]]
        if list(images.shape[1:3]) != size:
            images = jax.image.resize(images, (images.shape[0], *size, images.shape[3]), "linear")
        features = encoder(images, normalize=False)[:, 1:]
        return batch | {"target": jax.nn.standardize(features, epsilon=1e-6)}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The squared error of the features of hidden (or all) patches and their number; `rng` is unused."""
        inputs = normalize_images(batch["image"], self.mean, self.std)
        weight = batch["mask"]
        if self.everywhere:
            patch, ones = self.encoder["patch_size"], jnp.ones_like(weight)
            weight = sector_patches(batch["image"], patch).astype(weight.dtype) if self.fan_aware else ones
        return masked_error(model(self.seen(inputs), batch["keep"], batch["restore"]), batch["target"], weight)

    def pictures(self, model: nnx.Module, images: jax.Array, rng: jax.Array) -> None:  # type: ignore[override]
        """None: features cannot be shown as images."""

    def flops(self) -> float:
        """See `Objective`; the teacher's forward pass is included."""
        (height, width), patch = self.encoder["image_size"], self.encoder["patch_size"]
        patches, about = (height // patch) * (width // patch), self._teacher["encoder"]
        shape = {name: about[name] for name in ("width", "depth", "mlp_ratio")}
        last = about["width"] - patch**2 * self.encoder["channels"]  # more outputs than for pixels
        taught = vit_flops(patches, about["patch_size"] ** 2 * about["channels"], **shape)
        return super().flops() + 6.0 * patches * self.decoder["decoder_width"] * last + taught

    @property
    def _teacher(self) -> dict[str, Any]:
        return self.teacher.description if self.teacher else {"model": "vit", "encoder": self.encoder}
