"""Schedule, decay mask and layer-wise scales of the MAE recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_step import _mesh
from usfmae_jax.pretraining import build as setup
from usfmae_jax.training import optimizers
from usfmae_jax.training.state import init_state


@pytest.fixture
def params(config):
    return init_state(setup.model_maker(config), optimizers.adamw(lambda step: 0.0), _mesh(1), seed=0)[1]["params"]


def test_schedule_warms_up_linearly_and_ends_at_the_floor():
    schedule = optimizers.warmup_cosine(1.0, 0.1, 10, 110)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 60, 110, 200)], [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6)
    assert optimizers.warmup_cosine(1.0, 0.1, 0, 100)(0) == 1.0


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
    optimizer = optimizers.adamw(lambda step: 0.1, weight_decay=0.5, decay_all=decay_all)
    params = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["encoder"]["patch_embed"]["kernel"], -0.05)
    np.testing.assert_allclose(updates["encoder"]["patch_embed"]["bias"], -0.05 if decay_all else 0.0)


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
        optimizer = optimizers.adamw(lambda step: 0.1, layer_decay=layer_decay, weight_decay=0.0)
        return optimizer.update(gradients, optimizer.init(params), params)[0]["encoder"]

    plain, scaled = update(1.0), update(0.5)
    np.testing.assert_allclose(scaled["cls_token"], 0.125 * plain["cls_token"], rtol=1e-6)
    ratio = scaled["blocks"]["stack"]["fc1"]["bias"] / plain["blocks"]["stack"]["fc1"]["bias"]
    np.testing.assert_allclose(ratio, [[0.25] * 128, [0.5] * 128], rtol=1e-6)


def test_clipping_bounds_the_gradient_norm(params):
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 1e3), params)
    optimizer = optimizers.adamw(lambda step: 1.0, clip_norm=1.0, b1=0.0, b2=0.0, weight_decay=0.0)
    state = optimizer.update(gradients, optimizer.init(params), params)[1]
    first_moment = state[1].mu
    np.testing.assert_allclose(np.sqrt(sum(float((m**2).sum()) for m in jax.tree.leaves(first_moment))), 1.0, rtol=1e-4)
