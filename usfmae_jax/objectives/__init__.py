"""What is learnt without labels: one file for each objective.

A new one is a file here that has what `Objective` names, an entry in `pretraining.build.OBJECTIVES` and a variant in
`configs/pretrain.py`; the loop, checkpoints, pictures and export take it as they take the masked autoencoder.
"""

from typing import Any, Protocol

import jax
from flax import nnx

from usfmae_jax.interop.model import Model


class Objective(Protocol):
    """What a model has to do to learn.

    Attributes:
      mean: of the model's input, per channel; pixels are in [0, 1] before.
      std: likewise.
      teacher: a model that is not trained, whose parameters `teach` takes; None = there is none, or it is the average
        of the one that is trained.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher: Model | None = None

    def describe(self) -> dict[str, Any]:
        """What tells a reader of a checkpoint how to build the model, JSON; see `interop.model.build`."""

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model, with a `ViT` as its `encoder`."""

    def prepare(self, images: jax.Array, rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Draws what is random in a batch, before it is cut into micro-batches.

        Args:
          images: uint8 `[B, H, W, C]`.
          rng: of this step.

        Returns:
          arrays with a first axis of B, `image` among them, and the random key that is left for `loss`.
        """
        return {"image": images}, rng

    def teach(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Adds to a batch from `prepare`, or a part of it, what a teacher makes of it; no gradient reaches the teacher.

        Args:
          params: of `teacher`; else the average of the model's, if the run has one.
          batch: what `prepare` returns.
        """
        return batch

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum, count) of a batch from `teach`, all or a part of it; the quotient of the parts' sums is the loss."""

    def pictures(self, model: nnx.Module, images: jax.Array, rng: jax.Array) -> dict[str, jax.Array] | None:
        """Columns of pictures that show what the model does: uint8 `[B, H, W, C]` by caption; None if there are none.

        Args:
          model: in training.
          images: uint8 `[B, H, W, C]`.
          rng: the same one every time, so that pictures can be compared.
        """
        return None

    def flops(self) -> float:
        """Floating-point operations to train on one image once; backward counted as twice forward."""
