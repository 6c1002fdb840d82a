"""Classification heads: on a ViT trained with the head, and on the tokens of a frozen one."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.layers import Linear, layer_norm
from usfmae_jax.models.vit import ViT

Pool = Literal["mean", "cls"]


class Classifier(nnx.Module):
    """A ViT with pooling and a linear head: images `[B, H, W, C]` to logits `[B, num_classes]`.

    Mean pooling is what MAE uses for fine-tuning (He et al. 2022): the mean of the patch tokens before the encoder's
    norm, followed by a separate norm, `head_norm`; the encoder's norm is then unused. Class-token pooling takes the
    class token after the encoder's norm. The head starts near zero, so that the first predictions are uniform.

    Args:
      num_classes: outputs.
      pool: "mean" or "cls".
      drop_path: maximum stochastic depth rate during training, see `vit.drop_path_scales`.
      freeze: number of leading blocks that are not trained, see `ViT`; with all of them frozen, only the head trains.
      rngs: for the initial parameters.
      **encoder: arguments of `ViT`.

    Raises:
      ValueError: `pool` is neither of the two, or `freeze` exceeds the number of blocks.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        pool: Pool = "mean",
        drop_path: float = 0.0,
        freeze: int = 0,
        rngs: nnx.Rngs,
        **encoder: Any,
    ):
        if pool not in ("mean", "cls"):
            raise ValueError(f"pooling {pool!r} must be 'mean' or 'cls'")
        self.encoder = ViT(**encoder, rngs=rngs)
        if not 0 <= freeze <= self.encoder.blocks.depth:
            raise ValueError(f"cannot freeze {freeze} of {self.encoder.blocks.depth} blocks")
        self.pool, self.drop_path, self.freeze = pool, drop_path, freeze
        if pool == "mean":
            self.head_norm = layer_norm(self.encoder.width, rngs=rngs)
        self.head = linear_head(self.encoder.width, num_classes, std=2e-5, rngs=rngs)

    def __call__(self, images: jax.Array, rng: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Computes logits.

        Args:
          images: normalised, `[B, H, W, C]`.
          rng: key for drop path; needed only while training.
          train: apply drop path.

        Returns:
          float32 `[B, num_classes]`.
        """
        return self.head(self._pooled(images, rng if train else None))

    def features(self, images: jax.Array) -> jax.Array:
        """The head's input for normalised images `[B, H, W, C]`: float32 `[B, width]`."""
        return self._pooled(images, None)

    def _pooled(self, images: jax.Array, rng: jax.Array | None) -> jax.Array:
        mean = self.pool == "mean"
        tokens = self.encoder(images, normalize=not mean, rng=rng, drop_path=self.drop_path, freeze=self.freeze)
        return self.head_norm(tokens[:, 1:].mean(axis=1)) if mean else tokens[:, 0]


class AttentivePool(nnx.Module):
    """Attentive probe: tokens `[B, N, width]` of a frozen encoder to logits `[B, num_classes]`.

    One learned query attends to all tokens, as in the probes of CAE (Chen et al. 2024) and V-JEPA (Bardes et al. 2024);
    a norm and a linear layer follow. Unlike a linear probe, it can select the patches that matter.

    Args:
      width: of the tokens.
      num_heads: attention heads; must divide the width.
      num_classes: outputs.
      rngs: for the initial parameters.

    Raises:
      ValueError: `num_heads` does not divide the width.
    """

    def __init__(self, width: int, num_heads: int, num_classes: int, rngs: nnx.Rngs):
        if width % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {width}")
        self.num_heads = num_heads
        self.norm = layer_norm(width, rngs=rngs)
        # A learned vector times a learned matrix is a learned vector: the query needs no projection of its own.
        self.query = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, width)))
        self.kv = Linear(width, 2 * width, dtype=jnp.float32, rngs=rngs)
        self.proj = Linear(width, width, dtype=jnp.float32, rngs=rngs)
        self.head_norm = layer_norm(width, rngs=rngs)
        self.head = linear_head(width, num_classes, std=0.01, rngs=rngs)

    def __call__(self, tokens: jax.Array, rng: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits, float32 `[B, num_classes]`; `rng` and `train` are unused, for a common signature."""
        return self.head(self.features(tokens))

    def features(self, tokens: jax.Array) -> jax.Array:
        """The linear layer's input: float32 `[B, width]`."""
        b, n, d = tokens.shape
        shape = (self.num_heads, d // self.num_heads)
        k, v = jnp.moveaxis(self.kv(self.norm(tokens)).reshape(b, n, 2, *shape), 2, 0)
        q = jnp.broadcast_to(self.query[...].reshape(1, 1, *shape), (b, 1, *shape))
        attended = jax.nn.dot_product_attention(q, k, v).reshape(b, d)
        return self.head_norm(self.proj(attended))


def linear_head(inputs: int, num_classes: int, *, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    """A float32 linear layer; the kernel is initialised from a truncated normal of deviation `std`, the bias to 0."""
    init = nnx.initializers.truncated_normal(std)
    return nnx.Linear(inputs, num_classes, kernel_init=init, dtype=jnp.float32, rngs=rngs)
