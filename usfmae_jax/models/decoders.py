"""Segmentation models, which predict the class of every pixel: heads on a plain ViT, and a U-Net without one."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from usfmae_jax.models.heads import linear_head
from usfmae_jax.models.layers import Chain, Linear, gelu, layer_norm
from usfmae_jax.models.vit import ViT

Kind = Literal["linear", "decoder"]


class Segmenter(nnx.Module):
    """A ViT with a segmentation head: images `[B, H, W, C]` to logits float32 `[B, H, W, num_classes]`.

    Args:
      num_classes: outputs per pixel, including the background.
      kind: "linear", one linear layer on the last patch tokens, whose logits are resized (the probe of a frozen
        encoder); or "decoder", see `Decoder`.
      decoder_width: channels of the decoder at its widest.
      drop_path: maximum stochastic depth rate of the encoder during training.
      freeze: number of leading blocks that are not trained, see `ViT`; with all of them frozen, only the head trains.
      rngs: for the initial parameters.
      **encoder: arguments of `ViT`.

    Raises:
      ValueError: unknown kind, or `freeze` exceeds the number of blocks.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        kind: Kind = "decoder",
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
        if kind not in ("linear", "decoder"):
            raise ValueError(f"segmentation head {kind!r} must be 'linear' or 'decoder'")
        self.kind, self.drop_path, self.freeze = kind, drop_path, freeze
        self.head: Any
        if kind == "linear":
            self.head = linear_head(self.encoder.width, num_classes, std=0.01, rngs=rngs)
        else:
            self.head = Decoder(
                self.encoder.width,
                decoder_width,
                num_classes,
                patch_size=self.encoder.patch_size,
                channels=encoder.get("channels", 3),
                levels=len(level_blocks(depth)),
                dtype=self.encoder.dtype,
                rngs=rngs,
            )

    def __call__(self, images: jax.Array, rng: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Computes the logits of all pixels.

        Args:
          images: normalised, `[B, H, W, C]`.
          rng: key for drop path; needed only while training.
          train: apply drop path.
        """
        b, height, width, _ = images.shape
        grid = (height // self.encoder.patch_size, width // self.encoder.patch_size)
        how: dict[str, Any] = {"rng": rng if train else None, "drop_path": self.drop_path, "freeze": self.freeze}
        if self.kind == "linear":
            logits = self.head(self.encoder(images, **how)[:, 1:]).reshape(b, *grid, -1)
        else:
            levels = self.encoder.levels(images, level_blocks(self.encoder.blocks.depth), **how)
            logits = self.head([tokens.reshape(b, *grid, -1) for tokens in levels], images)
        return resized(logits, (height, width))

    def features(self, images: jax.Array) -> jax.Array:
        """The mean patch token of normalised images `[B, H, W, C]`: float32 `[B, width]`."""
        return self.encoder(images)[:, 1:].mean(axis=1)


def level_blocks(depth: int) -> tuple[int, ...]:
    """The blocks whose outputs a decoder uses: four, evenly spaced up to the last (2, 5, 8 and 11 of twelve)."""
    return tuple(sorted({round(depth * (i + 1) / 4) - 1 for i in range(4)} - {-1}))


def resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes maps `[B, h, w, C]` to `size` bilinearly; float32."""
    x = x.astype(jnp.float32)
    return x if x.shape[1:3] == size else jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear")


class Decoder(nnx.Module):
    """Convolutions from the patch tokens of up to four levels to pixels, as in UNETR (Hatamizadeh et al. 2022).

    It starts from the last level. Each doubling of the resolution halves the channels and adds an earlier level; the
    last one also adds the image itself, since patch tokens locate borders only to within a few pixels.

    Args:
      width: of the tokens.
      channels_out: channels at the patch grid; half as many after each doubling, but no fewer than 16.
      num_classes: outputs per pixel.
      patch_size: of the encoder.
      channels: of the images.
      levels: number of levels, 1 to 4.
      doublings: maximum number of doublings; also limited by how often the patch size can be halved.
      dtype: compute dtype; the logits are float32.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        width: int,
        channels_out: int,
        num_classes: int,
        *,
        patch_size: int,
        channels: int,
        levels: int,
        doublings: int = 3,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        doublings = max(d for d in range(doublings + 1) if patch_size % 2**d == 0)
        widths = [max(channels_out >> i, min(channels_out, 16)) for i in range(doublings + 1)]
        self.stride, self.dtype = patch_size >> doublings, dtype
        self.norms = Chain([layer_norm(width, rngs=rngs) for _ in range(levels)])
        # Stage at which each level is added, last level first; surplus levels are all added at the last stage.
        self.at = tuple(min(i, doublings) for i in range(levels))
        self.project = Chain([Linear(width, widths[at], dtype=dtype, rngs=rngs) for at in self.at])
        self.image = conv3(channels, widths[-1], self.stride, dtype=dtype, rngs=rngs)
        self.stages = Chain([Stage(widths[max(i - 1, 0)], one, dtype=dtype, rngs=rngs) for i, one in enumerate(widths)])
        self.out = nnx.Conv(widths[-1], num_classes, (1, 1), dtype=jnp.float32, rngs=rngs)

    def __call__(self, levels: list[jax.Array], images: jax.Array) -> jax.Array:
        """Computes logits.

        Args:
          levels: `[B, h, w, D]` each, from first to last.
          images: normalised, `[B, H, W, C]`.

        Returns:
          float32 `[B, H / stride, W / stride, num_classes]`.
        """
        beside: dict[int, jax.Array] = {}
        for tokens, norm, project, at in zip(reversed(levels), self.norms, self.project, self.at, strict=True):
            projected = enlarged(project(norm(tokens).astype(self.dtype)), 2**at)
            beside[at] = beside[at] + projected if at in beside else projected
        last = self.stages.length - 1
        beside[last] = self.image(images.astype(self.dtype)) + beside.get(last, 0)
        x = jnp.zeros((), self.dtype)
        for i, stage in enumerate(self.stages):
            x = stage(enlarged(x, 2) if i else x, beside.get(i, 0))
        return self.out(x.astype(jnp.float32))


class Stage(nnx.Module):
    """Two 3x3 convolutions, `[B, H, W, I] -> [B, H, W, O]`; `beside` is added after the first."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        self.first = conv3(inputs, outputs, dtype=dtype, rngs=rngs) if inputs != outputs else None
        self.norm1, self.norm2 = layer_norm(outputs, rngs=rngs), layer_norm(outputs, rngs=rngs)
        self.second = conv3(outputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, beside: jax.Array | int) -> jax.Array:
        """Applies the stage."""
        x = (self.first(x) if self.first is not None else x) + beside
        x = gelu(self.norm1(x).astype(self.second.dtype))
        return gelu(self.norm2(self.second(x)).astype(self.second.dtype))


def enlarged(x: jax.Array, times: int) -> jax.Array:
    """Nearest-neighbour upsampling of `[B, h, w, C]` by an integer factor: `[B, h * times, w * times, C]`."""
    return x if times == 1 else jnp.repeat(jnp.repeat(x, times, axis=1), times, axis=2)


def conv3(inputs: int, outputs: int, stride: int = 1, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
    """A 3x3 convolution with He initialisation; a stride above 3 also sets the kernel size."""
    side = max(3, stride)
    init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
    return nnx.Conv(inputs, outputs, (side, side), stride, padding="SAME", kernel_init=init, dtype=dtype, rngs=rngs)


class UNet(nnx.Module):
    """U-Net, the baseline without pretraining: images `[B, H, W, C]` to logits float32 `[B, H, W, num_classes]`.

    Convolutional encoder and decoder with skip connections (Ronneberger et al. 2015). As in nnU-Net, the channels
    double at each halving of the resolution and every convolution is normalised, here over channels.

    Args:
      num_classes: outputs per pixel, including the background.
      channels: of the images.
      width: channels at full resolution.
      depth: number of halvings of the resolution; 2^depth must divide height and width of the images.
      dtype: compute dtype.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int = 1,
        width: int = 16,
        depth: int = 4,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = [width << i for i in range(depth + 1)]
        self.down = Chain(
            [
                Stage(before, one, dtype=dtype, rngs=rngs)
                for before, one in zip([channels, *widths], widths, strict=False)
            ]
        )
        self.up = Chain([Stage(widths[i + 1], widths[i], dtype=dtype, rngs=rngs) for i in reversed(range(depth))])
        self.across = Chain([conv3(widths[i], widths[i], dtype=dtype, rngs=rngs) for i in reversed(range(depth))])
        self.head = nnx.Conv(width, num_classes, (1, 1), dtype=jnp.float32, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: jax.Array, rng: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits of all pixels of normalised images; `rng` and `train` are unused, for a common signature."""
        levels = self._down(images)
        x = levels.pop()
        for stage, across in zip(self.up, self.across, strict=True):
            x = stage(enlarged(x, 2), across(levels.pop()))
        return self.head(x.astype(jnp.float32))

    def features(self, images: jax.Array) -> jax.Array:
        """Spatial mean at the lowest resolution: float32 `[B, width * 2^depth]`."""
        return self._down(images)[-1].astype(jnp.float32).mean(axis=(1, 2))

    def _down(self, images: jax.Array) -> list[jax.Array]:
        x, levels = images.astype(self.dtype), []
        for i, stage in enumerate(self.down):
            x = stage(nnx.max_pool(x, (2, 2), (2, 2)) if i else x, 0)
            levels.append(x)
        return levels


def unet_flops(size: tuple[int, int], channels: int, width: int, depth: int) -> float:
    """Floating-point operations of a `UNet` forward pass on one image: convolutions only."""
    total, before = 0.0, channels
    for i in range(depth + 1):
        pixels, one = math.prod(size) / 4**i, width << i
        total += 18 * pixels * one * (before + one)
        total += 18 * pixels * one * (4 * one if i < depth else 0)  # upsampled, skip, and the second convolution
        before = one
    return total


def decoder_flops(size: tuple[int, int], patch_size: int, width: int, channels_out: int) -> float:
    """Approximate floating-point operations of a `Decoder` forward pass on one image: convolutions and projections."""
    doublings = max(d for d in range(4) if patch_size % 2**d == 0)
    total, patches = 0.0, math.prod(size) / patch_size**2
    for i in range(doublings + 1):
        one, before = (max(channels_out >> max(j, 0), min(channels_out, 16)) for j in (i, i - 1))
        total += 18 * patches * 4**i * one * (one + before * (one != before)) + 2 * patches * width * one
    return total
