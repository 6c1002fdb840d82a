"""Heads for pixels: shapes, what they look at, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from usfmae_jax.interop.model import flatten
from usfmae_jax.models.decoders import Segmenter, UNet, level_blocks, resized
from usfmae_jax.models.vit import ViT

SHAPE = {"image_size": (32, 48), "patch_size": 8, "channels": 1, "width": 16, "depth": 3, "num_heads": 2}


def _params(model):
    return flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("kind", ["linear", "decoder"])
@pytest.mark.parametrize("patch", [4, 8, 16])
def test_every_pixel_gets_logits(kind, patch):
    model = Segmenter(num_classes=3, kind=kind, decoder_width=32, rngs=nnx.Rngs(0), **SHAPE | {"patch_size": patch})
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 1))
    assert model(images).shape == (2, 32, 48, 3)
    assert model(images[:, :, :32]).shape == (2, 32, 32, 3)  # another size than the position table's
    assert model(images).dtype == jnp.float32
    assert model.features(images).shape == (2, 16)


def test_the_encoder_is_a_plain_one():
    model = Segmenter(num_classes=2, rngs=nnx.Rngs(0), **SHAPE)
    encoder = {name.removeprefix("encoder.") for name in _params(model) if name.startswith("encoder.")}
    assert encoder == set(_params(ViT(**SHAPE, rngs=nnx.Rngs(0))))
    assert {name.split(".")[0] for name in _params(model)} == {"encoder", "head"}


@pytest.mark.parametrize(("depth", "levels"), [(12, (2, 5, 8, 11)), (6, (1, 2, 3, 5)), (2, (0, 1)), (1, (0,))])
def test_a_decoder_looks_at_four_levels(depth, levels):
    assert level_blocks(depth) == levels


def test_levels_are_what_the_blocks_give_one_after_the_other(rng):
    model = ViT(**SHAPE, rngs=nnx.Rngs(0))
    images = jnp.asarray(rng.normal(size=(2, 32, 48, 1)), jnp.float32)
    every = model.levels(images, (0, 1, 2))
    assert (model(images, normalize=False)[:, 1:] == every[-1]).all()
    assert (model.levels(images, (1,))[0] == every[1]).all()
    stopped = model.levels(images, (0, 2), freeze=2)
    np.testing.assert_allclose(stopped[1], every[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("freeze", "moved"), [(0, {0, 1, 2}), (1, {1, 2}), (3, set())])
def test_frozen_blocks_get_no_gradient(freeze, moved):
    model = Segmenter(num_classes=2, freeze=freeze, drop_path=0.1, rngs=nnx.Rngs(0), **SHAPE)
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 1))
    state = nnx.grad(lambda m: (m(images, rng=jax.random.key(2), train=True) ** 2).sum())(model)
    gradients = flatten(nnx.to_pure_dict(state))
    blocks = np.asarray(gradients["encoder.blocks.stack.fc1.kernel"])
    assert {i for i in range(3) if np.abs(blocks[i]).max() > 0} == moved
    assert (np.abs(gradients["encoder.patch_embed.kernel"]).max() > 0) == (freeze == 0)
    assert np.abs(gradients["head.out.kernel"]).max() > 0


def test_the_decoder_sees_the_image_itself():
    model = Segmenter(num_classes=2, freeze=3, rngs=nnx.Rngs(0), **SHAPE)
    image = jnp.zeros((1, 32, 48, 1))
    gradient = jax.grad(lambda x: model(x)[0, 16, 24].sum())(image)
    assert np.abs(gradient).max() > 0  # though nothing comes through the encoder


def test_maps_are_resized_as_pixels_lie():
    ramp = jnp.arange(4, dtype=jnp.float32).reshape(1, 1, 4, 1)
    assert resized(ramp, (1, 8))[0, 0, :, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_a_unet_gives_logits_and_features():
    model = UNet(num_classes=4, channels=3, width=4, depth=2, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 24, 3))
    assert model(images).shape == (2, 16, 24, 4)
    assert model.features(images).shape == (2, 16)
    gradient = jax.grad(lambda x: model(x)[0, 8, 12].sum())(images)
    assert np.abs(gradient[0, 8, 20]).max() > 0  # through the lowest resolution


def test_kinds_and_depths_that_are_none_are_refused():
    with pytest.raises(ValueError, match="segmentation head 'other'"):
        Segmenter(num_classes=2, kind="other", rngs=nnx.Rngs(0), **SHAPE)
    with pytest.raises(ValueError, match="cannot freeze 4 of 3 blocks"):
        Segmenter(num_classes=2, freeze=4, rngs=nnx.Rngs(0), **SHAPE)
