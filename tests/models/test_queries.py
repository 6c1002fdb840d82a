"""Queries on a plain ViT: what they say, that the encoder stays an encoder, and what freezing leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from usfmae_jax.interop.model import flatten
from usfmae_jax.models.queries import MaskTransformer
from usfmae_jax.models.vit import ViT

TINY = {"image_size": (32, 32), "patch_size": 8, "channels": 1, "width": 32, "depth": 3, "num_heads": 2}
HEAD = {"num_classes": 4, "queries": 5, "blocks": 2, "decoder_width": 32}


def _model(**options):
    return MaskTransformer(**{**HEAD, **TINY, "rngs": nnx.Rngs(0)} | options)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 32, 40, 1))


@nnx.jit
def _answers(model, images):
    return model.answers(images)


@nnx.jit
def _gradient(model, images):
    def loss(model):
        return sum(jnp.square(leaf).mean() for leaf in jax.tree.leaves(model.answers(images)))

    return nnx.grad(loss)(model)


def test_every_query_has_classes_and_a_mask_after_each_block_it_goes_through(images):
    answers = nnx.eval_shape(lambda: _model(dtype=jnp.bfloat16).answers(images))
    assert len(answers) == 2
    for answer in answers:
        assert {name: (one.shape, one.dtype) for name, one in answer.items()} == {
            "classes": ((2, 5, 4), jnp.float32),
            "masks": ((2, 5, 16, 20), jnp.float32),  # two doublings of a grid of 4 x 5
        }


def test_parameters_of_the_encoder_are_those_of_the_encoder_alone():
    own = flatten(nnx.to_pure_dict(nnx.state(_model(), nnx.Param)))
    alone = flatten(nnx.to_pure_dict(nnx.state(ViT(**TINY, rngs=nnx.Rngs(0)), nnx.Param)))
    below = {name.removeprefix("encoder."): leaf for name, leaf in own.items() if name.startswith("encoder.")}
    assert {name: leaf.shape for name, leaf in below.items()} == {name: leaf.shape for name, leaf in alone.items()}
    assert all(name.startswith(("encoder.", "head.")) for name in own)


@pytest.mark.parametrize("blocks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_queries_go_through_the_last_blocks_as_tokens_do(images, blocks):
    model = _model(blocks=blocks)

    @nnx.jit
    def by_hand(model):
        graph, stacked = nnx.split(model.encoder.blocks.stack)
        x, found = model.encoder.embed(images), []
        for i in range(3):
            if i == 3 - blocks:
                x = jnp.concatenate([x, jnp.repeat(model.head.queries[...], len(x), axis=0)], axis=1)
            x = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], stacked))(x)
            found.append(x)
        return model.head(found[3 - blocks :], images)

    for one, other in zip(_answers(model, images), by_hand(model), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one, other)


@pytest.mark.parametrize("freeze", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_frozen_blocks_get_no_gradient_and_queries_learn_through_them(images, freeze):
    free, frozen = (flatten(nnx.to_pure_dict(_gradient(_model(freeze=count), images))) for count in (0, freeze))
    for name, expected in free.items():
        if name.startswith("encoder.blocks."):
            assert not frozen[name][:freeze].any(), name
            np.testing.assert_allclose(frozen[name][freeze:], expected[freeze:], rtol=1e-3, atol=1e-5)
        elif name.startswith("head."):
            np.testing.assert_allclose(frozen[name], expected, rtol=1e-3, atol=1e-5)
        else:
            assert not frozen[name].any(), name
    assert np.abs(frozen["head.queries"]).max() > 0


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(ValueError, match="cannot go through 4 of 3"):
        _model(blocks=4)
    with pytest.raises(ValueError, match="cannot freeze 4 of 3"):
        _model(freeze=4)
