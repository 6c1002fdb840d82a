"""ResNet-50 computes what torchvision's does, trains as it does, and freezes in stages."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tests.helpers import OPTIMIZED
from tests.models.make_resnet_golden import DEPTHS, GOLDEN, RESNET50, direction, images, names, reference, weights
from usfmae_jax.interop.model import flatten
from usfmae_jax.interop.resnet import architecture, read_resnet
from usfmae_jax.models.resnet import ResNet

SMALL = {"num_classes": 2, "channels": 1, "depths": (1, 1, 1, 1), "width": 8}


def _split(model):
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def _loaded(depths, folder):
    """Our network with the weights that the reference has."""
    path = folder / "resnet.safetensors"
    safetensors.numpy.save_file(weights(depths), path)
    params, stats = read_resnet(str(path), num_classes=1000)
    model = nnx.eval_shape(lambda: ResNet(num_classes=1000, **architecture(params), rngs=nnx.Rngs(0)))
    return nnx.graphdef(model), jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, stats)


def _torch_name(ours):
    parent, _, last = ours.rpartition(".")
    return f"{'fc' if parent == 'head' else parent}.{'bias' if last == 'bias' else 'weight'}"


def _step(graph, params, stats, pixels):
    """Loss, logits and new statistics, and gradients, of the golden file's objective."""

    def loss(params):
        model = nnx.merge(graph, params, stats)
        logits = model(pixels, train=True)
        return jnp.square(logits).mean(), (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return _loaded(DEPTHS, tmp_path_factory.mktemp("weights"))


def test_resnet50_has_torchvisions_names_and_shapes():
    model = nnx.eval_shape(lambda: ResNet(num_classes=1000, rngs=nnx.Rngs(0)))
    _, params, stats = _split(model)
    found = {}
    for name, leaf in flatten(params).items():
        shape = leaf.shape
        found[_torch_name(name)] = (shape[-1], shape[-2], *shape[:-2]) if len(shape) > 1 else shape
    for name, leaf in flatten(stats).items():
        parent, _, last = name.rpartition(".")
        found[f"{parent}.running_{last}"] = leaf.shape
    assert found == {name: shape for name, shape in names().items() if "num_batches" not in name}
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 25_557_032


def test_features_and_logits_equal_torchvisions(golden, ours):
    graph, params, stats = ours

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def run(params, stats, pixels):
        model = nnx.merge(graph, params, stats)
        return model.features(pixels), model(pixels)

    features, logits = run(params, stats, images())
    np.testing.assert_allclose(features, golden["features"], rtol=1e-4, atol=2e-4)  # of values up to 40
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=2e-4)


def test_a_training_step_equals_torchvisions(golden, ours):
    _, params, stats = ours
    with jax.enable_x64(True):  # see `reference`
        model = nnx.eval_shape(
            lambda: ResNet(num_classes=1000, **architecture(params), dtype=jnp.float64, rngs=nnx.Rngs(0))
        )
        doubled = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, stats, images()))
        run = jax.jit(functools.partial(_step, nnx.graphdef(model)), compiler_options=OPTIMIZED)
        (loss, (_, stats)), gradients = jax.device_get(run(*doubled))
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-9)
    for name, value in flatten(stats).items():
        parent, _, last = name.rpartition(".")
        np.testing.assert_allclose(value, golden[f"stats/{parent}.running_{last}"], rtol=1e-8, atol=1e-9, err_msg=name)
    for name, gradient in flatten(gradients).items():
        theirs = _torch_name(name)
        if gradient.ndim > 1:
            gradient = gradient.transpose(-1, -2, *range(gradient.ndim - 2))
        norm, product = golden[f"grads/{theirs}"]
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-8, err_msg=name)
        # The product of two vectors is only as exact as their norms allow.
        np.testing.assert_allclose(np.vdot(gradient, direction(theirs, gradient.shape)), product, atol=1e-8 * norm)


@pytest.mark.slow
def test_resnet50_equals_torchvisions_that_is_installed(tmp_path):
    missing = [name for name in ("torch", "torchvision") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"live comparison needs {' and '.join(missing)}: pip install torch torchvision")
    try:
        expected = reference(RESNET50, train=False)
    except RuntimeError as error:
        pytest.skip(f"the installed torchvision does not fit the installed torch: {error}")
    graph, params, stats = _loaded(RESNET50, tmp_path)
    features = jax.jit(
        lambda params, stats, pixels: nnx.merge(graph, params, stats).features(pixels), compiler_options=OPTIMIZED
    )
    np.testing.assert_allclose(
        features(params, stats, images()), expected["features"], rtol=1e-4, atol=1e-5 * expected["features"].max()
    )


@pytest.fixture(scope="module")
def pixels():
    return jax.random.normal(jax.random.key(0), (4, 32, 32, 1))


def test_freezing_stages_leaves_them_and_their_statistics_alone(pixels):
    graph, params, stats = _split(ResNet(**SMALL, freeze=3, rngs=nnx.Rngs(0)))
    (_, (_, new)), gradients = jax.jit(lambda *args: _step(graph, *args))(params, stats, pixels)
    frozen = ("conv1", "bn1", "layer1", "layer2", "layer3")
    for name, gradient in flatten(gradients).items():
        assert np.any(gradient) != name.startswith(frozen), name
    for (name, before), after in zip(flatten(stats).items(), flatten(new).values(), strict=True):
        assert np.array_equal(before, after) == name.startswith(frozen), name


def test_freezing_everything_trains_the_head_on_what_evaluation_sees(pixels):
    graph, params, stats = _split(ResNet(**SMALL, freeze=4, rngs=nnx.Rngs(0)))
    (_, (logits, new)), gradients = jax.jit(lambda *args: _step(graph, *args))(params, stats, pixels)
    assert {name.split(".")[0] for name, g in flatten(gradients).items() if np.any(g)} == {"head"}
    jax.tree.map(np.testing.assert_array_equal, stats, new)
    evaluated = jax.jit(lambda p, s, x: nnx.merge(graph, p, s)(x))(params, stats, pixels)
    np.testing.assert_allclose(logits, evaluated, rtol=1e-6)


def test_more_stages_than_there_are_cannot_be_frozen():
    with pytest.raises(ValueError, match="cannot freeze 5 of 4 stages"):
        ResNet(**SMALL, freeze=5, rngs=nnx.Rngs(0))


def test_bfloat16_convolves_in_bfloat16_and_keeps_float32_outside(pixels):
    graph, params, stats = _split(ResNet(**SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}

    def run(pixels):
        model = nnx.merge(graph, params, stats)
        return model(pixels, train=True), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    logits, new = jax.eval_shape(run, pixels)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, new))} == {jnp.dtype("float32")}
    lines = [line for line in str(jax.make_jaxpr(run)(pixels)).splitlines() if "conv_general_dilated[" in line]
    assert len(lines) == 1 + 4 * 4
    assert all(":bf16" in line for line in lines)
