"""Self-supervised pretraining objectives, one file each.

To add one, write a file here that implements `Objective`, and add an entry to `pretraining.build.OBJECTIVES` and a
variant to `configs/pretrain.py`; the loop, checkpoints, pictures and export then work as for the masked autoencoder.
"""

from typing import Any, Protocol

import jax
from flax import nnx

from usfmae_jax.interop.model import Model


class Objective(Protocol):
    """A pretraining objective: the model, its inputs and its loss.

    Attributes:
      mean: per channel, used to normalise the model's input (pixels in [0, 1]).
      std: likewise.
      teacher: a model that is not trained, whose parameters are passed to `teach`; None = there is none, or the teacher
        is the running average of the trained model.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher: Model | None = None

    def describe(self) -> dict[str, Any]:
        """The model description stored in checkpoints, JSON, from which `interop.model.build` rebuilds the model."""

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model, with a `ViT` as its `encoder`."""

    def prepare(self, images: jax.Array, rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Draws a batch's random numbers (such as masks) before it is split into micro-batches.

        Args:
          images: uint8 `[B, H, W, C]`.
          rng: key for this step.

        Returns:
          arrays with a first axis of B, including `image`, and the random key for `loss`.
        """
        return {"image": images}, rng

    def teach(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Adds the teacher's output to (part of) a batch from `prepare`; no gradient reaches the teacher.

        Args:
          params: of `teacher`; if that is None, the running average of the model's, if the run keeps one.
          batch: the arrays that `prepare` returns, or part of them.
        """
        return batch

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum, count) for (part of) a batch from `teach`; the loss is the total sum over the total count."""

    def pictures(self, model: nnx.Module, images: jax.Array, rng: jax.Array) -> dict[str, jax.Array] | None:
        """Columns of pictures that show what the model does: uint8 `[B, H, W, C]` by caption; None if there are none.

        Args:
          model: the model being trained.
          images: uint8 `[B, H, W, C]`.
          rng: the same key every time, so that pictures are comparable.
        """
        return None

    def flops(self) -> float:
        """Floating-point operations to train on one image once; backward counted as twice forward."""
