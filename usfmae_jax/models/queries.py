"""Instance segmentation by queries: each of a fixed number of learned vectors predicts a class and a mask."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.decoders import Decoder
from usfmae_jax.models.layers import Chain, Linear, gelu, layer_norm
from usfmae_jax.models.vit import ViT

#: Doublings of the resolution from the patch grid to the masks.
DOUBLINGS = 2

#: Predictions of the queries: `classes`, logits float32 `[B, Q, 1 + C]`, index 0 being "no object"; `masks`, logits
#: float32 `[B, Q, h, w]`.
Answer = dict[str, jax.Array]


class MaskTransformer(nnx.Module):
    """A plain ViT as a mask classifier: the encoder-only mask transformer (EoMT; Kerssies et al. 2025).

    Learned queries join the tokens before the last blocks and are processed like any other token. A linear layer
    predicts the class of each query; its mask is the dot product of an MLP of the query with per-pixel features, which
    a few convolutions compute from the patch tokens (and from the image, since patch tokens locate borders only to
    within a few pixels). There are two differences from the published model. During training it restricts each query's
    attention to its predicted mask and anneals this away; here every query attends to everything from the start. And it
    computes pixel features after each block; here the queries of all blocks share those after the last, which is
    cheaper. All parameters outside the encoder are under `head`.

    Args:
      num_classes: C + 1 outputs per query, including "no object".
      queries: Q, the maximum number of instances per image.
      blocks: number of the encoder's last blocks that the queries pass through.
      decoder_width: channels of the pixel features at the patch grid, half as many after each doubling.
      drop_path: maximum stochastic depth rate of the encoder during training.
      freeze: number of leading blocks that are not trained, see `ViT`; with all of them frozen, only the head trains,
        whose queries then receive their gradient through the frozen blocks.
      rngs: for the initial parameters.
      **encoder: arguments of `ViT`.

    Raises:
      ValueError: `blocks` or `freeze` exceeds the number of blocks, or `blocks` is below 1.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        queries: int,
        blocks: int,
        decoder_width: int = 128,
        drop_path: float = 0.0,
        freeze: int = 0,
        rngs: nnx.Rngs,
        **encoder: Any,
    ):
        self.encoder = ViT(**encoder, rngs=rngs)
        depth = self.encoder.blocks.depth
        if not 0 <= freeze <= depth:
            raise ValueError(f"cannot freeze {freeze} of {depth} blocks")
        if not 1 <= blocks <= depth:
            raise ValueError(f"queries cannot go through {blocks} of {depth} blocks")
        self.drop_path, self.freeze, self.first = drop_path, freeze, depth - blocks
        self.head = QueryHead(
            self.encoder.width,
            decoder_width,
            num_classes,
            queries,
            patch_size=self.encoder.patch_size,
            channels=encoder.get("channels", 3),
            dtype=self.encoder.dtype,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, rng: jax.Array | None = None, train: bool = False) -> Answer:
        """The queries' final predictions.

        Args:
          images: normalised, `[B, H, W, C]`.
          rng: key for drop path; needed only while training.
          train: apply drop path.
        """
        return self.answers(images, rng, train)[-1]

    def answers(self, images: jax.Array, rng: jax.Array | None = None, train: bool = False) -> list[Answer]:
        """The queries' predictions after each block that they pass through; arguments as for `__call__`."""
        how: dict[str, Any] = {"rng": rng if train else None, "drop_path": self.drop_path, "freeze": self.freeze}
        blocks = self.encoder.blocks
        x = self.encoder.embed(images)
        if self.first:
            x = blocks.levels(x, (self.first - 1,), **how)[0]
        elif self.freeze:
            x = jax.lax.stop_gradient(x)
        queries = self.head.queries[...].astype(x.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(queries, (x.shape[0], *queries.shape[1:]))], axis=1)
        found = blocks.levels(x, range(self.first, blocks.depth), first=self.first, through=True, **how)
        return self.head(found, images)

    def features(self, images: jax.Array) -> jax.Array:
        """The mean patch token of normalised images `[B, H, W, C]`: float32 `[B, width]`."""
        return self.encoder(images)[:, 1:].mean(axis=1)


class QueryHead(nnx.Module):
    """The learned queries and the layers that turn query and patch tokens into class logits and mask logits.

    Args:
      width: of the tokens.
      decoder_width, num_classes, queries: see `MaskTransformer`.
      patch_size: of the encoder.
      channels: of the images.
      dtype: compute dtype; the outputs are float32.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        width: int,
        decoder_width: int,
        num_classes: int,
        queries: int,
        *,
        patch_size: int,
        channels: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.queries = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (1, queries, width)))
        self.norm = layer_norm(width, rngs=rngs)
        self.classes = Linear(width, num_classes, dtype=jnp.float32, rngs=rngs)
        embedding = max(decoder_width >> DOUBLINGS, 16)
        self.mask = Chain([Linear(width, one, dtype=dtype, rngs=rngs) for one in (width, width, embedding)])
        self.pixels = Decoder(
            width,
            decoder_width,
            embedding,
            patch_size=patch_size,
            channels=channels,
            levels=1,
            doublings=DOUBLINGS,
            dtype=dtype,
            rngs=rngs,
        )
        self.dtype, self.patch_size = dtype, patch_size

    def __call__(self, levels: list[jax.Array], images: jax.Array) -> list[Answer]:
        """The queries' predictions for each given level.

        Args:
          levels: `[B, 1 + N + Q, width]` each: class token, patches, queries.
          images: normalised, `[B, H, W, C]`.
        """
        b, height, width, _ = images.shape
        count, patch = self.queries.shape[1], self.patch_size
        patches = levels[-1][:, 1:-count].reshape(b, height // patch, width // patch, -1)
        pixels = self.pixels([patches], images)
        return [self._answer(self.norm(tokens[:, -count:]), pixels) for tokens in levels]

    def _answer(self, queries: jax.Array, pixels: jax.Array) -> Answer:
        mask = queries.astype(self.dtype)
        for i, layer in enumerate(self.mask):
            mask = layer(gelu(mask) if i else mask)
        masks = jnp.einsum("bqc,bhwc->bqhw", mask.astype(jnp.float32), pixels)
        return {"classes": self.classes(queries), "masks": masks}
