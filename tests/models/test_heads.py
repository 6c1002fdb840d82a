"""Classifiers: pooling, frozen blocks, stochastic depth; and the attentive probe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from usfmae_jax.interop.model import flatten
from usfmae_jax.models import vit
from usfmae_jax.models.heads import AttentivePool, Classifier

TINY = {"image_size": (32, 32), "patch_size": 8, "channels": 1, "width": 32, "depth": 3, "num_heads": 2}


def _classifier(**options):
    model = Classifier(**{"num_classes": 3, **TINY, "rngs": nnx.Rngs(0)} | options)
    model.head.kernel[...] = jax.random.normal(jax.random.key(7), (32, model.head.kernel.shape[1]))
    return model


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 32, 32, 1))


@nnx.jit
def _run(model, images):
    return model(images)


@nnx.jit
def _train(model, images, rng):
    return model(images, rng, train=True)


@nnx.jit
def _gradient(model, images, rng):
    return nnx.grad(lambda model: jnp.square(model(images, rng, train=True)).sum())(model)


def test_mean_pooling_is_the_mean_of_patches_before_the_norm_then_a_norm_of_its_own(images):
    model = _classifier(pool="mean")
    tokens, features = jax.jit(lambda m: (m.encoder(images, normalize=False), m.features(images)))(model)
    tokens = np.asarray(tokens)
    mean = tokens[:, 1:].mean(axis=1)
    normed = (mean - mean.mean(axis=1, keepdims=True)) / np.sqrt(mean.var(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(features, normed, atol=1e-5)
    np.testing.assert_allclose(_run(model, images), normed @ np.asarray(model.head.kernel[...]), atol=1e-4)


def test_class_token_pooling_takes_it_after_the_encoders_norm(images):
    model = _classifier(pool="cls")
    features, tokens = jax.jit(lambda m: (m.features(images), m.encoder(images)))(model)
    np.testing.assert_allclose(features, tokens[:, 0], atol=1e-6)
    assert "head_norm" not in nnx.to_pure_dict(nnx.state(model))


def test_the_head_starts_so_near_zero_that_predictions_are_even(images):
    model = Classifier(num_classes=3, **TINY, rngs=nnx.Rngs(0))
    assert 0 < np.abs(model.head.kernel[...]).max() < 1e-4
    assert not model.head.bias[...].any()
    np.testing.assert_allclose(jax.nn.softmax(_run(model, images)), 1 / 3, atol=1e-3)


def test_logits_are_float32_under_bfloat16(images):
    model = _classifier(dtype=jnp.bfloat16)
    logits = _run(model, images)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, _run(_classifier(), images), atol=0.3)


@pytest.mark.parametrize(("pool", "freeze"), [("mean", 1), ("cls", 3)])
def test_frozen_blocks_get_no_gradient_and_the_rest_gets_what_it_got(images, pool, freeze):
    free = flatten(nnx.to_pure_dict(_gradient(_classifier(pool=pool), images, jax.random.key(0))))
    frozen = flatten(nnx.to_pure_dict(_gradient(_classifier(pool=pool, freeze=freeze), images, jax.random.key(0))))
    for name, expected in free.items():
        if name.startswith("encoder.blocks."):
            assert not frozen[name][:freeze].any(), name
            np.testing.assert_allclose(frozen[name][freeze:], expected[freeze:], rtol=1e-4, atol=1e-5)
        elif name.startswith(("encoder.patch_embed", "encoder.cls_token")) or (
            freeze == 3 and name.startswith("encoder.")
        ):
            assert not frozen[name].any(), name
        else:
            np.testing.assert_allclose(frozen[name], expected, rtol=1e-4, atol=1e-5)


def test_no_backward_pass_is_computed_through_frozen_blocks(images):
    def products(freeze, differentiate=True):
        graph, params = nnx.split(_classifier(freeze=freeze))

        def loss(params):
            return nnx.merge(graph, params)(images, jax.random.key(0), train=True).sum()

        # Blocks are scanned over: a backward pass through some of them shows as one more loop body.
        return str(jax.make_jaxpr(jax.grad(loss) if differentiate else loss)(params)).count("dot_general[")

    forward = products(0, differentiate=False)
    # All frozen: beside the forward pass nothing but the head's own gradients.
    assert forward < products(3) <= forward + 2 < products(0)


def test_more_blocks_than_there_are_cannot_be_frozen(images):
    with pytest.raises(ValueError, match="cannot freeze 4 of 3 blocks"):
        _classifier(freeze=4)
    with pytest.raises(ValueError, match="cannot freeze -1 of 3 blocks"):
        _classifier().encoder(images, freeze=-1)
    with pytest.raises(ValueError, match="must be 'mean' or 'cls'"):
        _classifier(pool="max")


def test_drop_path_scales_rise_with_depth_and_keep_the_expectation():
    scales = np.asarray(vit.drop_path_scales(jax.random.key(0), 5, 20000, 0.4))
    assert scales.shape == (5, 2, 20000)
    for block, rate in enumerate([0, 0.1, 0.2, 0.3, 0.4]):
        np.testing.assert_allclose((scales[block] == 0).mean(axis=-1), rate, atol=0.02)
        kept = scales[block][scales[block] > 0]
        np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-6)
    # The branches of a block, and the blocks of a sample, are dropped independently.
    np.testing.assert_allclose(np.corrcoef(scales[1:].reshape(8, -1) == 0), np.eye(8), atol=0.03)


def test_drop_path_is_for_training_and_repeats_with_its_key(images):
    model, plain = _classifier(drop_path=0.9), _classifier()
    first, again, other = (_train(model, images, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    evaluated = _run(model, images)
    np.testing.assert_allclose(evaluated, _run(plain, images), atol=1e-6)
    unused = nnx.jit(lambda model: model(images, jax.random.key(0), train=False))(model)
    np.testing.assert_allclose(evaluated, unused, atol=1e-5)
    np.testing.assert_allclose(_train(plain, images, jax.random.key(0)), evaluated, atol=1e-5)


def test_a_dropped_block_is_skipped_for_its_sample_alone(images):
    block = vit.Block(32, 2, 4.0, dtype=jnp.float32, attention=None, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    scales = jnp.asarray([[0.0, 1.0], [0.0, 1.0]])
    dropped, whole = jax.jit(lambda block: (block(x, scales), block(x)))(block)
    np.testing.assert_array_equal(dropped[0], x[0])
    np.testing.assert_allclose(dropped[1], whole[1], atol=1e-6)


def test_frozen_blocks_drop_nothing(images):
    frozen = _classifier(drop_path=0.9, freeze=3)
    np.testing.assert_allclose(_train(frozen, images, jax.random.key(0)), _run(_classifier(), images), atol=1e-5)


def test_how_it_is_computed_does_not_change_what(images):
    shared = {"drop_path": 0.5, "freeze": 1}
    first = nnx.to_pure_dict(_gradient(_classifier(**shared), images, jax.random.key(0)))
    other = nnx.to_pure_dict(_gradient(_classifier(**shared, scan=False, remat="full"), images, jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, other)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 2.7), ("small", 21.6), ("base", 85.6), ("large", 303.1), ("huge", 630.4)]
)
def test_sizes_have_the_published_numbers_of_parameters(size, millions):
    model = nnx.eval_shape(lambda: vit.ViT(**vit.SIZES[size], rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.fixture(scope="module")
def probe():
    return AttentivePool(32, 4, 3, nnx.Rngs(0))


def test_attentive_pool_is_attention_of_one_query(probe):
    tokens = jax.random.normal(jax.random.key(2), (2, 9, 32)) * 3
    x = np.asarray(tokens)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    k, v = np.split(x @ np.asarray(probe.kv.kernel[...]), 2, axis=-1)
    query = np.asarray(probe.query[...])[0]
    pooled = np.zeros((2, 32))
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        scores = k[..., part] @ query[part] / np.sqrt(8)
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        pooled[:, part] = (weights[..., None] * v[..., part]).sum(axis=1)
    y = pooled @ np.asarray(probe.proj.kernel[...])
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    features, logits = jax.jit(lambda probe: (probe.features(tokens), probe(tokens)))(probe)
    np.testing.assert_allclose(features, y, atol=1e-4)
    np.testing.assert_allclose(logits, y @ np.asarray(probe.head.kernel[...]), atol=1e-4)


def test_attentive_pool_does_not_mind_the_order_of_tokens(probe):
    tokens = jax.random.normal(jax.random.key(2), (2, 9, 32))
    np.testing.assert_allclose(probe(tokens), probe(tokens[:, ::-1]), atol=1e-5)


def test_attentive_pool_needs_heads_that_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide a width of 32"):
        AttentivePool(32, 5, 3, nnx.Rngs(0))
