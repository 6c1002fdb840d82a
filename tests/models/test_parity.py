"""Loss and gradients equal those of the PyTorch MAE that Hugging Face ships."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import OPTIMIZED
from tests.models.make_golden import GOLDEN, MASK_RATIO, SIZE, reference
from usfmae_jax.interop.model import flatten, unflatten
from usfmae_jax.models import mae, patches


@pytest.fixture(scope="module", params=["golden", pytest.param("live", marks=pytest.mark.slow)])
def torch_run(request):
    if request.param == "golden":
        return dict(np.load(GOLDEN))
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"live comparison needs {' and '.join(missing)}: pip install torch==2.13.0 transformers")
    return reference(seed=1)


def _prefixed(run, prefix):
    return {name.removeprefix(prefix): value for name, value in run.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def ours(torch_run):
    model = mae.MAE(**SIZE, rngs=nnx.Rngs(0))
    graph, own = nnx.split(model)
    params = unflatten(_prefixed(torch_run, "params/"))
    assert {k: v.shape for k, v in flatten(nnx.to_pure_dict(own)).items()} == {
        k: v.shape for k, v in flatten(params).items()
    }
    images, noise = torch_run["images"], torch_run["noise"]

    def loss(params):
        keep, restore, mask = mae.mask_from_noise(jnp.asarray(noise), MASK_RATIO)
        predicted = nnx.merge(graph, params)(images, keep, restore)
        error, count = mae.masked_error(predicted, mae.patch_targets(images, SIZE["patch_size"], True), mask)
        return error / count, predicted

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=OPTIMIZED)
    (value, predicted), gradient = run(jax.tree.map(jnp.asarray, params))
    return value, predicted, flatten(gradient)


def test_loss_equals_the_pytorch_mae(torch_run, ours):
    np.testing.assert_allclose(ours[0], torch_run["loss"], rtol=1e-5)


def test_prediction_equals_the_pytorch_mae(torch_run, ours):
    np.testing.assert_allclose(ours[1], torch_run["prediction"], atol=1e-4)


def test_gradients_equal_the_pytorch_mae(torch_run, ours):
    expected = _prefixed(torch_run, "grads/")
    assert ours[2].keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(ours[2][name], gradient, atol=2e-6, rtol=1e-3, err_msg=name)


def test_position_table_equals_the_pytorch_mae(torch_run):
    table = patches.sincos_table((4, 4), SIZE["width"])
    np.testing.assert_allclose(table, torch_run["positions"], atol=1e-6)
