"""Weights on their way between formats: parameters and everything that has to travel with them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from usfmae_jax.interop.encoder import Lineage, unflatten
from usfmae_jax.interop.positions import stored_table
from usfmae_jax.models.heads import Classifier
from usfmae_jax.models.mae import MAE
from usfmae_jax.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class Model:
    """A vision transformer with what else its file holds.

    Attributes:
      params: float32 arrays by our names: `encoder.`, and `decoder.`, or `head.` and `head_norm.`.
      architecture: arguments of `vit.ViT`.
      decoder: `decoder_width`, `decoder_depth` and `decoder_num_heads` of `mae.MAE`; None without a decoder.
      pool: "mean" or "cls" of `heads.Classifier`; "" without a head.
      classes: names, in the order of the logits; () without a head.
      preprocessing: `image_size`, `channels` as decoded, `mean`, `std`.
      lineage: where the weights come from, oldest stage first.
    """

    params: dict[str, np.ndarray]
    architecture: dict[str, Any]
    decoder: dict[str, Any] | None
    pool: str
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    lineage: Lineage

    def without_decoder(self) -> "Model":
        """The same for use rather than for more pretraining."""
        kept = {name: value for name, value in self.params.items() if not name.startswith("decoder.")}
        return dataclasses.replace(self, params=kept, decoder=None)

    def grid(self) -> tuple[int, int]:
        """Patches down and across of the images that it is used on."""
        height, width = self.preprocessing["image_size"]
        return height // self.architecture["patch_size"], width // self.architecture["patch_size"]

    def stored_positions(self) -> np.ndarray:
        """The position table for these images as files hold it: float32 `[1, 1 + N, width]`, see `positions`."""
        about = self.architecture
        base = (about["image_size"][0] // about["patch_size"], about["image_size"][1] // about["patch_size"])
        return stored_table(base, self.grid(), about["width"], self.params.get("encoder.position"))

    def description(self) -> dict[str, Any]:
        """What tells a reader of the weights alone how to build the model; JSON."""
        return {
            "architecture": self.architecture,
            "decoder": self.decoder,
            "pool": self.pool,
            "classes": list(self.classes),
        }


def graph(model: Model) -> Any:
    """The static part of the `ViT`, `MAE` or `Classifier` that the parameters belong to."""
    encoder = {"dtype": jnp.float32} | model.architecture
    encoder["image_size"] = tuple(encoder["image_size"])

    def make() -> nnx.Module:
        rngs = nnx.Rngs(0)
        if model.pool:
            pool: Any = model.pool
            return Classifier(num_classes=len(model.classes), pool=pool, rngs=rngs, **encoder)
        return MAE(rngs=rngs, **encoder, **model.decoder) if model.decoder else ViT(rngs=rngs, **encoder)

    return nnx.graphdef(nnx.eval_shape(make))


def nested(model: Model, params: dict[str, Any] | None = None) -> dict[str, Any]:
    """The parameters, or others by the same names, as `nnx.merge(graph(model), ...)` takes them."""
    tree = unflatten(model.params if params is None else params)
    return tree if model.pool or model.decoder else tree["encoder"]
