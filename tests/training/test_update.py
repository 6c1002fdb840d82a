"""The update is the same however many devices, shards or micro-batches compute it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import frame, tiny_config
from usfmae_jax.models import layers
from usfmae_jax.models.patches import unpatchify
from usfmae_jax.pretraining import build
from usfmae_jax.training import mesh as meshes
from usfmae_jax.training import optimizers
from usfmae_jax.training.state import abstract_state, init_state
from usfmae_jax.training.update import make_update


def _mesh(devices, fsdp=1):
    axes = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=axes, devices=jax.devices()[:devices])


@functools.cache
def _images():
    return np.stack([frame(i, i % 2, (32, 32)) for i in range(16)])[..., None]


@pytest.fixture(autouse=True)
def _split_small_arrays(monkeypatch):
    monkeypatch.setattr(layers, "MIN_SPLIT_SIZE", 64)  # so that even the tiny model is really split


def _objective(fan_aware=False, mean=0.5, std=0.25):
    config = tiny_config("")
    config.mask.fan_aware = fan_aware
    config.model.update(mean=(mean,), std=(std,))
    return build.objective(config)


@functools.cache
def _start(devices, fsdp):
    return init_state(_objective().make, optimizers.adamw(clip_norm=1.0), _mesh(devices, fsdp), seed=0)


@functools.cache
def _update(devices, fsdp, accumulate, fan_aware):
    mesh, optimizer, objective = _mesh(devices, fsdp), optimizers.adamw(clip_norm=1.0), _objective(fan_aware)
    graph, state = _start(devices, fsdp)
    rate = lambda step, rate: rate  # noqa: E731  takes the place of the length, so that all rates share a program
    update = make_update(graph, objective.prepare, objective.loss, optimizer, rate, mesh, accumulate=accumulate)
    return jax.jit(update, out_shardings=(meshes.state_sharding(mesh, state), meshes.replicated(mesh)))


@functools.cache
def train(devices=1, fsdp=1, steps=3, accumulate=1, fan_aware=False, learning_rate=1e-2):
    """Updates on the same 16 images: losses, gradient norms and the last state."""
    images = meshes.global_batch(_mesh(devices, fsdp), _images())
    update, (_, state) = _update(devices, fsdp, accumulate, fan_aware), _start(devices, fsdp)
    metrics = []
    for _ in range(steps):
        state, values = update(state, images, learning_rate)
        metrics.append(jax.device_get(values))
    return [m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], state


@pytest.mark.parametrize("fsdp", [4, *(pytest.param(fsdp, marks=pytest.mark.slow) for fsdp in (1, 8))])
def test_eight_devices_compute_what_one_does(fsdp):
    single = train()
    losses, norms, state = train(8, fsdp)
    np.testing.assert_allclose(losses, single[0], rtol=2e-5)
    np.testing.assert_allclose(norms, single[1], rtol=2e-4)
    kernel = state["params"]["encoder"]["blocks"]["stack"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * fsdp == kernel.size  # it was really split


@pytest.mark.parametrize(
    ("fan_aware", "accumulate"),
    [(False, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(False, 2), (True, 2), (True, 4)])],
)
def test_accumulated_micro_batches_give_the_update_of_the_large_batch(fan_aware, accumulate):
    whole = train(fan_aware=fan_aware)
    parts = train(fan_aware=fan_aware, accumulate=accumulate)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-4)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(parts[2]["opt_state"]), jax.tree.leaves(whole[2]["opt_state"]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-3, err_msg=str(path))


@pytest.mark.slow
def test_accumulation_on_eight_devices():
    losses, _, _ = train(8, 2, accumulate=2)
    np.testing.assert_allclose(losses, train()[0], rtol=2e-5)


def test_overfits_one_batch():
    losses, _, _ = train(steps=300, learning_rate=3e-3)
    assert losses[-1] < 0.5 * losses[0]


def test_every_step_draws_new_masks():
    frozen = train(learning_rate=0.0)[0]
    assert len(set(np.asarray(frozen).tolist())) == 3


def test_state_is_born_in_its_shards():
    _, state = _start(8, 4)
    abstract = abstract_state(_objective().make, optimizers.adamw(clip_norm=1.0), _mesh(8, 4))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )
    assert set(state) == {"step", "params", "opt_state", "rng"}
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}


def test_pictures_show_visible_pixels_where_nothing_is_hidden():
    objective = _objective(mean=0.2, std=0.2)
    graph, state = _start(1, 1)
    images = jnp.asarray(_images())
    draw = jax.jit(lambda params: objective.pictures(nnx.merge(graph, params), images, jax.random.key(0)))
    shown = jax.device_get(draw(state["params"]))
    assert set(shown) == {"input", "masked", "reconstruction", "pasted"}
    assert {(column.dtype, column.shape) for column in shown.values()} == {(np.dtype(np.uint8), (16, 32, 32, 1))}
    batch, _ = objective.prepare(images, jax.random.key(0))
    hidden = np.asarray(unpatchify(jnp.repeat(batch["mask"][..., None], 64, axis=-1), (4, 4), 8)) > 0
    assert hidden.mean() == 0.75
    np.testing.assert_array_equal(shown["input"], images)
    np.testing.assert_array_equal(shown["masked"], np.where(hidden, 128, images))
    np.testing.assert_array_equal(shown["pasted"], np.where(hidden, shown["reconstruction"], images))


def test_a_step_that_is_no_number_changes_nothing_if_such_are_skipped():
    mesh, objective = _mesh(1), _objective()

    def loss(model, batch, rng):
        total, count = objective.loss(model, batch, rng)
        return total * jnp.where(batch["image"].any(), 1.0, jnp.nan), count

    optimizer, rate = optimizers.adamw(clip_norm=1.0), lambda step, rate: rate
    graph, state = _start(1, 1)
    update = jax.jit(make_update(graph, objective.prepare, loss, optimizer, rate, mesh, skip=True))
    after, metrics = update(state, np.zeros_like(_images()), 1e-2)
    assert (float(metrics["skipped"]), int(after.pop("step"))) == (1.0, 1)
    jax.tree.map(np.testing.assert_array_equal, after, {name: state[name] for name in after})
    after, metrics = update(state, _images(), 1e-2)
    assert float(metrics["skipped"]) == 0.0
    np.testing.assert_allclose(metrics["loss"], train()[0][0], rtol=1e-5)
    assert not np.array_equal(*(s["params"]["encoder"]["norm"]["bias"] for s in (after, state)))


@pytest.mark.parametrize("fsdp", [1, 2])
def test_the_average_of_the_parameters_is_a_decaying_one(fsdp):
    mesh, optimizer, objective = _mesh(2, fsdp), optimizers.adamw(), _objective()
    graph, state = init_state(objective.make, optimizer, mesh, 0, ema=True)
    abstract = abstract_state(objective.make, optimizer, mesh, ema=True)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    expected = jax.tree.map(np.asarray, state["params"])
    update = jax.jit(make_update(graph, objective.prepare, objective.loss, optimizer, lambda *_: 1e-2, mesh, ema=0.2))
    for step in range(4):
        state, _ = update(state, jnp.asarray(_images()), 10)
        decay = min(0.2, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda old, now, d=decay: d * old + (1 - d) * np.asarray(now), expected, state["params"]
        )
    for one, other in zip(jax.tree.leaves(state["ema"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
