"""ResNet-50 (He et al. 2016) in Flax NNX, the baseline: v1.5, for which torchvision and timm publish weights."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.layers import Chain

#: Number of stages, and so the maximum of `freeze`.
STAGES = 4


def resnet_flops(size: tuple[int, int], width: int, depths: Sequence[int]) -> float:
    """Approximate floating-point operations of a `ResNet` forward pass on one image of (height, width)."""
    # 4.1e9 multiply-adds at 224 pixels with a stem of 64 channels (He et al. 2016, table 1, and v1.5's stride).
    return 2 * 4.1e9 * (size[0] * size[1] / 224**2) * (width / 64) ** 2 * sum(depths) / 16


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) over all axes but the last, with torch's numerics.

    Statistics are at least float32. As in torch, the batch is normalised with its biased variance, while the running
    variance tracks the unbiased one. For a batch sharded over devices, the statistics are those of the whole batch.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: jax.Array, train: bool, momentum: float = 0.9, epsilon: float = 1e-5) -> jax.Array:
        """Normalises with the batch's statistics and updates the running ones (`train`), or with the running ones."""
        if train:
            pixels = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            axes = tuple(range(x.ndim - 1))
            mean, var = pixels.mean(axes), pixels.var(axes)
            count = x.size // x.shape[-1]
            unbiased = jax.lax.stop_gradient(var) * (count / max(count - 1, 1))
            self.mean[...] = momentum * self.mean[...] + (1 - momentum) * jax.lax.stop_gradient(mean)
            self.var[...] = momentum * self.var[...] + (1 - momentum) * unbiased
        else:
            mean, var = self.mean[...], self.var[...]
        factor = jax.lax.rsqrt(var + epsilon) * self.scale[...]
        return (x * factor + (self.bias[...] - mean * factor)).astype(x.dtype)


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions with a residual, `[B, H, W, I] -> [B, H/stride, W/stride, 4 * width]`."""

    def __init__(self, inputs: int, width: int, stride: int, *, dtype: Any, rngs: nnx.Rngs):
        outputs = 4 * width
        self.conv1, self.bn1 = conv(inputs, width, 1, dtype=dtype, rngs=rngs), BatchNorm(width, rngs=rngs)
        # v1.5 has the stride in the 3x3 convolution; the paper has it in the first 1x1.
        self.conv2, self.bn2 = conv(width, width, 3, stride, dtype=dtype, rngs=rngs), BatchNorm(width, rngs=rngs)
        self.conv3, self.bn3 = conv(width, outputs, 1, dtype=dtype, rngs=rngs), BatchNorm(outputs, rngs=rngs)
        self.projected = stride != 1 or inputs != outputs
        if self.projected:
            shortcut = conv(inputs, outputs, 1, stride, dtype=dtype, rngs=rngs)
            self.downsample = Chain([shortcut, BatchNorm(outputs, rngs=rngs)])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block."""
        y = jax.nn.relu(self.bn1(self.conv1(x), train))
        y = jax.nn.relu(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        if self.projected:
            shortcut, norm = self.downsample
            x = norm(shortcut(x), train)
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """Images `[B, H, W, C]` to logits `[B, num_classes]`.

    Args:
      num_classes: outputs.
      channels: 1 or 3.
      depths: blocks in each of the four stages; (3, 4, 6, 3) is ResNet-50.
      width: channels of the stem; the features have 32 times as many.
      freeze: number of leading stages that, together with the stem, are not trained and normalise with their running
        statistics, which stay fixed; with all four frozen, only the head trains.
      dtype: compute dtype; parameters and running statistics stay float32.
      rngs: for the initial parameters.

    Raises:
      ValueError: `freeze` is negative or more than four.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int = 3,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        freeze: int = 0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 0 <= freeze <= STAGES:
            raise ValueError(f"cannot freeze {freeze} of {STAGES} stages")
        self.freeze, self.dtype = freeze, dtype
        self.conv1, self.bn1 = conv(channels, width, 7, 2, dtype=dtype, rngs=rngs), BatchNorm(width, rngs=rngs)
        inputs = width
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Bottleneck(inputs, width * 2**stage, stride, dtype=dtype, rngs=rngs))
                inputs = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", Chain(blocks))
        # torch's default initialisation of a linear layer, uniform within 1 / sqrt(inputs).
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.head = nnx.Linear(
            inputs, num_classes, kernel_init=init, dtype=jnp.promote_types(dtype, jnp.float32), rngs=rngs
        )

    def __call__(self, images: jax.Array, rng: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Computes logits.

        Args:
          images: normalised, `[B, H, W, C]`.
          rng: unused, for a common signature; nothing here is random.
          train: normalise with the batch's statistics, and update the running ones in place.

        Returns:
          float32 `[B, num_classes]`.
        """
        return self.head(self.features(images, train))

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The head's input: the spatial mean, float32 `[B, 32 * width]`."""
        learn = train and not self.freeze
        x = jax.nn.relu(self.bn1(self.conv1(images.astype(self.dtype)), learn))
        x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in range(STAGES):
            for block in getattr(self, f"layer{stage + 1}"):
                x = block(x, train and stage >= self.freeze)
            if stage + 1 == self.freeze:
                x = jax.lax.stop_gradient(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(axis=(1, 2))


def conv(inputs: int, outputs: int, size: int, stride: int = 1, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution without bias, padded evenly on both sides as in torch, unlike "SAME" at stride 2."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        rngs=rngs,
    )
