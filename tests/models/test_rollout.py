"""Attention rollout against its definition, written out block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from usfmae_jax.models.rollout import attention_rollout
from usfmae_jax.models.vit import ViT

TINY = {"patch_size": 8, "channels": 1, "width": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def encoder():
    encoder = ViT(image_size=(32, 32), **TINY, rngs=nnx.Rngs(0))
    qkv = encoder.blocks.stack.attn.qkv
    qkv.kernel[...] = 3 * qkv.kernel[...]  # attention that prefers some patches
    return encoder


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _by_hand(encoder, images, pool):
    graph, stacked = nnx.split(encoder.blocks.stack)
    x = encoder.embed(images)
    rolled = np.eye(x.shape[1])
    for index in range(3):
        block = nnx.merge(graph, jax.tree.map(lambda p, i=index: p[i], stacked))
        q, k, _ = np.split(np.asarray(block.attn.qkv(block.norm1(x))), 3, axis=-1)
        heads = [_softmax(q[..., h] @ k[..., h].swapaxes(1, 2) / 4) for h in (slice(0, 16), slice(16, 32))]
        mixed = np.mean(heads, axis=0) + np.eye(x.shape[1])
        rolled = mixed / mixed.sum(axis=-1, keepdims=True) @ rolled
        x = block(x)
    patches = rolled[:, 0, 1:] if pool == "cls" else rolled[:, 1:, 1:].mean(axis=1)
    patches = patches - patches.min(axis=1, keepdims=True)
    return (patches / patches.max(axis=1, keepdims=True)).reshape(-1, *[s // 8 for s in images.shape[1:3]])


@pytest.mark.parametrize(("pool", "shape"), [("cls", (2, 32, 32, 1)), ("mean", (2, 32, 48, 1))])
def test_rollout_is_its_definition(encoder, pool, shape):
    images = jax.random.normal(jax.random.key(0), shape)
    found = jax.jit(attention_rollout, static_argnums=2)(encoder, images, pool)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, _by_hand(encoder, images, pool), atol=1e-4)


def test_each_map_reaches_from_0_to_1(encoder):
    maps = np.asarray(attention_rollout(encoder, jax.random.normal(jax.random.key(0), (3, 32, 32, 1)), "cls"))
    np.testing.assert_array_equal(maps.min(axis=(1, 2)), 0)
    np.testing.assert_allclose(maps.max(axis=(1, 2)), 1, atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_even_attention_is_no_picture(encoder, pool):
    even = nnx.clone(encoder)
    even.blocks.stack.attn.qkv.kernel[...] = jnp.zeros_like(even.blocks.stack.attn.qkv.kernel[...])
    assert not attention_rollout(even, jax.random.normal(jax.random.key(0), (2, 32, 32, 1)), pool).any()


def test_bfloat16_follows_the_same_paths(encoder):
    half = ViT(image_size=(32, 32), **TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(encoder))
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))
    maps = [np.asarray(attention_rollout(model, images, "cls")).ravel() for model in (half, encoder)]
    assert np.corrcoef(maps)[0, 1] > 0.98
