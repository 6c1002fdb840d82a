"""Every shipped configuration builds, and its documented figures are those of its model."""

import jax
import numpy as np
import pytest

from configs import pretrain
from usfmae_jax.interop.model import model_graph
from usfmae_jax.pretraining import build
from usfmae_jax.training import checks
from usfmae_jax.training import mesh as meshes
from usfmae_jax.training.state import abstract_state


@pytest.mark.parametrize("variant", pretrain.VARIANTS)
def test_every_variant_builds_and_steps_under_eval_shape(variant):
    config = pretrain.get_config(variant)
    mesh = meshes.make_mesh(**config.mesh)
    checks.check_batch(checks.flat(config.to_dict()), mesh.size)
    checks.check_augmentation(config.augment)
    objective = build.objective(config)
    state = abstract_state(objective.make, build.make_optimizer(config)[0], mesh, ema=config.train.ema > 0)
    step = build.make_step(config, objective, model_graph(objective.make), mesh)
    shape = (config.train.batch_size, *checks.square(config.model.image_size), config.data.channels)
    new_state, metrics = jax.eval_shape(step, state, jax.ShapeDtypeStruct(shape, "uint8"), 1000)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


def _parameters(variant):
    config = pretrain.get_config(variant)
    mesh = meshes.make_mesh(-1, 1)
    state = abstract_state(build.objective(config).make, build.make_optimizer(config)[0], mesh)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state["params"]["encoder"]))


@pytest.mark.parametrize(
    ("variant", "millions"), [("base", 86), ("small", 22), ("large", 303), ("huge", 631), ("gigantic", 1844)]
)
def test_models_have_the_published_sizes(variant, millions):
    assert round(_parameters(variant) / 1e6) == pytest.approx(millions, rel=0.01)


def test_the_relative_arithmetic_in_the_docstring_is_true():
    variants = ("base", "small", "large", "huge", "cross")
    flops = {variant: build.objective(pretrain.get_config(variant)).flops() for variant in variants}
    ratios = {variant: round(value / flops["base"], 1) for variant, value in flops.items()}
    assert ratios == {"base": 1.0, "small": 0.2, "large": 2.1, "huge": 5.0, "cross": 0.6}
    assert f"{flops['base'] * 360_000 * 100:.1e}" == "2.1e+18"


def test_the_published_recipe_is_the_published_recipe():
    config = pretrain.get_config("paper")
    _, rate = build.make_optimizer(config)
    assert rate(100, 1000) == pytest.approx(1.5e-4)  # 3e-4 x 128 / 256, after 10% of the steps
    assert rate(1000, 1000) == pytest.approx(1e-5)
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.999)
    assert not config.loss.normalize_targets
    assert config.train.batch_size == 64
