"""Every shipped fine-tuning configuration builds, and the recipes are what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import finetune
from usfmae_jax.data import augment
from usfmae_jax.finetuning import build
from usfmae_jax.interop.model import model_graph
from usfmae_jax.tasks.classification import Classification
from usfmae_jax.training import checks
from usfmae_jax.training.mesh import make_mesh
from usfmae_jax.training.state import abstract_state
from usfmae_jax.training.update import make_update


@pytest.mark.parametrize("arch", ["", "base", "resnet50"])
@pytest.mark.parametrize("variant", ["folder", "mmotu_mae"])
def test_every_recipe_and_model_steps_under_eval_shape(variant, arch):
    config = finetune.get_config(variant)
    config.model.arch = arch
    build.check(config)
    mesh = make_mesh(**config.mesh)
    checks.check_batch(checks.flat(config.to_dict()), mesh.size)
    backbone, preprocessing = build.describe_backbone(config, None)
    channels = len(preprocessing["mean"])
    how = {name: config.regularization[name] for name in ("smoothing", "mixup", "cutmix", "erasing")}
    task = Classification(("a", "b", "c"), pool=config.model.pool, **how)
    description = task.describe(backbone)
    make = build.model_maker(config, description, 0)
    optimizer, rate = build.make_optimizer(config, description)
    state = abstract_state(make, optimizer, mesh)
    step = make_update(model_graph(make), task.prepare, task.loss, optimizer, rate, mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((config.train.batch_size, *preprocessing["image_size"], channels), "float32"),
        "label": jax.ShapeDtypeStruct((config.train.batch_size,), "int32"),
        "weight": jax.ShapeDtypeStruct((config.train.batch_size, 3), "float32"),
    }
    new, metrics = jax.eval_shape(step, state, batch, 10)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("variant", finetune.VARIANTS)
def test_every_variant_has_valid_values(variant):
    config = finetune.get_config(variant)
    build.check(config)
    how = augment.Augmentation(**config.augment)
    assert dataclasses.asdict(how) == {name: config.augment[name] for name in dataclasses.asdict(how)}


def test_the_mae_recipe_is_the_mae_recipe():
    config = finetune.get_config("busbra_mae")
    _, rate = build.make_optimizer(config, {"model": "vit", "encoder": {"depth": 12}})
    assert rate(jnp.int32(50), jnp.int32(1000)) == pytest.approx(5e-4 * 64 / 256)
    assert rate(jnp.int32(1000), jnp.int32(1000)) == pytest.approx(1e-6)
    optimizer, regular = config.optimizer, config.regularization
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.layer_decay) == (0.9, 0.999, 0.05, 0.65)
    assert (regular.mixup, regular.cutmix, regular.smoothing, regular.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (config.train.epochs, config.model.drop_path, config.model.pool) == (100, 0.1, "mean")
    assert config.augment.randaugment_magnitude == 9
    assert (config.data.path, config.positive) == ("data/bus_bra", "malignant")
