"""Schedule, decay mask and layer-wise scales of the MAE recipes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.helpers import tiny_config
from usfmae_jax.pretraining import build
from usfmae_jax.training import optimizers
from usfmae_jax.training.mesh import make_mesh, state_sharding


@pytest.fixture(scope="module")
def params():
    """Of the model of `tiny_config`, with numbers that cost no compilation."""
    model = nnx.eval_shape(lambda: build.objective(tiny_config("")).make(nnx.Rngs(0)))
    shapes, rng = nnx.to_pure_dict(nnx.state(model, nnx.Param)), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def _first(optimizer, gradients, params):
    """The first update, and the state that it leaves."""
    return jax.jit(lambda gradients, params: optimizer.update(gradients, optimizer.init(params), params))(
        gradients, params
    )


@pytest.mark.parametrize("total", [110, 120])
def test_schedule_warms_up_linearly_and_ends_at_the_floor(total):
    rate = functools.partial(optimizers.warmup_cosine, learning_rate=2.0, floor=0.1, warmup=0.1)
    rising = round(0.1 * total)
    expected = optax.warmup_cosine_decay_schedule(0.0, 2.0, rising, total, 0.1)
    steps = (0, 1, 5, rising, rising + 1, 60, total - 1, total, 200)
    np.testing.assert_allclose([rate(s, total) for s in steps], [expected(s) for s in steps], rtol=2e-5)
    np.testing.assert_allclose([rate(s, 110) for s in (0, 11, 110, 200)], [0, 2, 0.1, 0.1], rtol=1e-6)
    assert optimizers.warmup_cosine(0, 100, learning_rate=1.0, floor=0.1, warmup=0.0) == 1.0
    assert optimizers.warmup_cosine(7, 100, learning_rate=0.0, floor=0.0, warmup=0.0) == 0.0


def test_biases_norms_and_tokens_are_not_decayed(params):
    mask = {
        jax.tree_util.keystr(p, simple=True, separator="."): m
        for p, m in jax.tree.leaves_with_path(optimizers.decay_mask(params))
    }
    decayed = {name for name, decay in mask.items() if decay}
    assert decayed == {name for name in mask if name.endswith("kernel")}
    for name in ("encoder.cls_token", "decoder.mask_token", "encoder.norm.scale", "encoder.blocks.stack.fc1.bias"):
        assert name not in decayed


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_is_decoupled_and_follows_the_mask(params, decay_all):
    optimizer = optimizers.adamw(weight_decay=0.5, decay_all=decay_all)
    params = jax.tree.map(jnp.ones_like, params)
    updates, _ = _first(optimizer, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["encoder"]["patch_embed"]["kernel"], -0.5)
    np.testing.assert_allclose(updates["encoder"]["patch_embed"]["bias"], -0.5 if decay_all else 0.0)


def test_layer_scales_fall_by_depth(params):
    scales = optimizers.layer_scales(params, 0.5)
    depth = 2
    assert scales["encoder"]["cls_token"] == 0.5 ** (depth + 1)  # id 0
    assert scales["encoder"]["patch_embed"]["kernel"] == 0.5 ** (depth + 1)
    np.testing.assert_allclose(
        scales["encoder"]["blocks"]["stack"]["fc1"]["kernel"].ravel(), [0.5 ** (depth + 1 - i) for i in (1, 2)]
    )
    assert scales["encoder"]["norm"]["scale"] == 1.0  # id depth + 1
    assert scales["decoder"]["pred"]["kernel"] == 1.0


def test_layer_decay_scales_the_update(params):
    gradients = jax.tree.map(jnp.ones_like, params)

    def update(layer_decay):
        return _first(optimizers.adamw(layer_decay=layer_decay, weight_decay=0.0), gradients, params)[0]["encoder"]

    plain, scaled = update(1.0), update(0.5)
    np.testing.assert_allclose(scaled["cls_token"], 0.125 * plain["cls_token"], rtol=1e-6)
    ratio = scaled["blocks"]["stack"]["fc1"]["bias"] / plain["blocks"]["stack"]["fc1"]["bias"]
    np.testing.assert_allclose(ratio, [[0.25] * 128, [0.5] * 128], rtol=1e-6)


def test_clipping_bounds_the_gradient_norm(params):
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 1e3), params)
    optimizer = optimizers.adamw(clip_norm=1.0, b1=0.0, b2=0.0, weight_decay=0.0)
    first_moment = _first(optimizer, gradients, params)[1][1].mu
    squares = [np.square(np.asarray(moment)).sum() for moment in jax.tree.leaves(first_moment)]
    np.testing.assert_allclose(np.sqrt(sum(squares)), 1.0, rtol=1e-4)


def test_muon_makes_every_matrix_of_a_stack_orthogonal_by_itself(params):
    optimizer = optimizers.adamw(weight_decay=0.0, muon=True)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    updates, _ = _first(optimizer, gradients, params)
    plain, _ = _first(optimizers.adamw(weight_decay=0.0), gradients, params)
    chosen = optimizers.in_blocks(params)
    for path, update in jax.tree.leaves_with_path(updates):
        node, other = chosen, plain
        for key in path:
            node, other = node[key.key], other[key.key]
        if not node:  # as AdamW has it
            np.testing.assert_allclose(update, other, rtol=1e-5)
            continue
        parts = 3 if path[-2].key == "qkv" else 1
        _, inputs, outputs = update.shape
        for block in np.asarray(update):
            for one in block.reshape(inputs, parts, outputs // parts).swapaxes(0, 1):
                # Five steps of Newton and Schulz bring singular values near one, before they are scaled.
                values = np.linalg.svd(one, compute_uv=False) / (0.2 * np.sqrt(max(one.shape)))
                assert 0.3 < values.min() <= values.max() < 1.3
    names = {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, one in jax.tree.leaves_with_path(chosen) if one
    }
    assert "encoder.blocks.stack.attn.qkv.kernel" in names
    assert not [name for name in names if "patch_embed" in name or "pred" in name or "bias" in name]
    # A matrix of a stack gets what it would get alone.
    alone = jax.tree.map(lambda leaf: leaf[:1] if leaf.ndim == 3 else leaf, (gradients, params))
    first, _ = _first(optimizer, *alone)
    one, other = (tree["encoder"]["blocks"]["stack"]["attn"]["qkv"]["kernel"][0] for tree in (updates, first))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_muon_has_the_numbers_of_optax(rng):
    dimensions = optax.contrib.MuonDimensionNumbers(-2, -1)
    plain = optax.contrib.scale_by_muon(weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: dimensions, tree))
    ours = optimizers._muon()
    params = {"up": {"kernel": jnp.zeros((3, 16, 64))}, "down": {"kernel": jnp.zeros((3, 64, 16))}}
    state, other = ours.init(params), plain.init(params)
    for _ in range(3):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
        updates, state = ours.update(gradients, state)
        expected, other = plain.update(gradients, other)
        expected = jax.tree.map(lambda leaf: 0.2 * 64**0.5 * leaf, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_devices_share_the_matrices_of_muon_and_gather_none_that_is_split(data, fsdp, rng):
    mesh, optimizer = make_mesh(data, fsdp), optimizers._muon()
    gradients = {"stack": {"qkv": {"kernel": jnp.asarray(rng.normal(size=(12, 64, 384)), jnp.float32)}}}
    state = optimizer.init(gradients)
    expected, _ = jax.jit(optimizer.update)(gradients, state)
    sharded = state_sharding(mesh, (gradients, state))

    def update(gradients, state):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return optimizer.update(gradients, state)

    compiled = jax.jit(update, in_shardings=sharded, out_shardings=sharded).lower(gradients, state).compile()
    updates, _ = compiled(*jax.device_put((gradients, state), sharded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), updates, expected)
    assert tuple(sharded[0]["stack"]["qkv"]["kernel"].spec) == ((None, "fsdp") if fsdp > 1 else ())
    text = compiled.as_text()
    assert ("all-to-all(" in text, text.count("all-gather(")) == (fsdp > 1, fsdp == 1)  # not the momentum too
    # Queries, keys and values of the blocks of one device, of 12, padded to a multiple of them.
    share = -(-12 // (fsdp if fsdp > 1 else data)) * 3
    assert f"f32[{share},64,64]" in text
