"""Features over many images are those of each image alone, whatever the batches, and are computed once."""

import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.faults import processes
from usfmae_jax.data import table as labelled
from usfmae_jax.interop.model import Model, open_model, preprocessing, save_model
from usfmae_jax.models.vit import ViT
from usfmae_jax.probing import features
from usfmae_jax.training.forward import apply_batches, encoder_function
from usfmae_jax.training.mesh import make_mesh, one_device

ARCHITECTURE = {
    "image_size": (32, 32),
    "patch_size": 8,
    "channels": 1,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("encoder"))
    params = nnx.to_pure_dict(nnx.state(ViT(**ARCHITECTURE, rngs=nnx.Rngs(0)), nnx.Param))
    description = {"model": "vit", "encoder": ARCHITECTURE}
    save_model(directory, Model({"encoder": params}, description, preprocessing((32, 32), 1, [0.25], [0.2]), []))
    return open_model(directory)


def batches(images, size):
    return (images[start : start + size] for start in range(0, len(images), size))


def test_every_image_gets_its_own_result_and_padding_leaves_no_trace():
    images = np.arange(21, dtype=np.uint8).reshape(-1, 1, 1, 1)
    found = apply_batches(
        make_mesh(),
        lambda scale, x: {"sum": scale * x.sum(axis=(1, 2, 3))},
        np.float32(2),
        batches(images, 8),
        batch_size=8,
        total=21,
    )
    np.testing.assert_array_equal(found["sum"], 2 * np.arange(21))


def test_no_image_is_dropped_or_doubled_on_any_number_of_devices(weights, rng):
    function, params = encoder_function(weights)
    images = rng.integers(0, 255, (17, 32, 32, 1), np.uint8)
    alone = apply_batches(one_device(), function, params, batches(images, 1), batch_size=1, total=17)
    for devices in (1, 3, 8):
        axes = (AxisType.Auto, AxisType.Auto)
        mesh = jax.make_mesh((devices, 1), ("data", "fsdp"), axis_types=axes, devices=jax.devices()[:devices])
        for count in (1, 7, 17):
            some = batches(images[:count], 2 * devices)
            found = apply_batches(mesh, function, params, some, batch_size=2 * devices, total=count)
            np.testing.assert_allclose(found, alone[:count], atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "cls", "patches"])
def test_features_are_those_of_the_encoder(weights, pool, rng):
    images = rng.integers(0, 255, (5, 32, 32, 1), np.uint8)
    run = features.extractor(weights, pool, mesh=make_mesh(), batch_size=8)
    model = ViT(**ARCHITECTURE, rngs=nnx.Rngs(0))
    tokens = np.asarray(model((images / np.float32(255) - 0.25) / 0.2))
    expected = {"mean": tokens[:, 1:].mean(axis=1), "cls": tokens[:, 0], "patches": tokens[:, 1:]}[pool]
    np.testing.assert_allclose(run(batches(images, 8), 5, ""), expected, rtol=2e-3, atol=2e-3)


def test_features_are_computed_once_for_the_same_weights_and_frames(weights, shards, tmp_path):
    frames = labelled.read_table(shards)
    calls = []

    def run(images, total, name):
        calls.append(total)
        return np.concatenate([batch.reshape(len(batch), -1)[:, :4] for batch in images]).astype(np.float32)

    how = {"pool": "mean", "batch_size": 8, "cache": str(tmp_path)}
    first = features.extract(run, weights, frames, **how)
    np.testing.assert_array_equal(features.extract(run, weights, frames, **how), first)
    assert calls == [48]
    features.extract(run, weights, frames, **how | {"pool": "cls"})
    features.extract(run, None, frames, **how)
    assert len(calls) == 3
    (kept,) = tmp_path.glob("features-pixels-*")
    kept.write_bytes(b"damaged")
    features.extract(run, None, frames, **how)
    assert len(calls) == 4


@pytest.mark.parametrize("poison", ["open to others", "another owner", "other values"])
def test_features_that_somebody_else_may_have_written_are_not_believed(shards, tmp_path, monkeypatch, poison):
    frames = labelled.read_table(shards)

    def run(images, total, name):
        return np.arange(len(frames) * 2, dtype=np.float32).reshape(-1, 2)

    used, how = [], {"pool": "mean", "batch_size": 8, "cache": str(tmp_path), "reused": lambda: used.append(True)}
    first = features.extract(run, None, frames, **how)
    np.testing.assert_array_equal(features.extract(run, None, frames, **how), first)
    assert used == [True]
    (kept,) = tmp_path.glob("features-pixels-*")
    assert kept.stat().st_mode & 0o777 == 0o600
    if poison == "open to others":
        kept.chmod(0o666)
    elif poison == "another owner":
        monkeypatch.setattr("os.geteuid", lambda: kept.stat().st_uid + 1)
    else:
        np.savez(kept, features=first + 1, format=features.FORMAT, sha256=features.digest(first))
    np.testing.assert_array_equal(features.extract(run, None, frames, **how), first)
    assert used == [True]


def test_raw_pixels_are_the_shrunk_image(rng):
    images = rng.integers(0, 255, (3, 32, 32, 1), np.uint8)
    run = features.extractor(None, "mean", mesh=make_mesh(), batch_size=8)
    np.testing.assert_allclose(run(batches(images, 2), 3, ""), images.reshape(3, -1) / 255, rtol=1e-6)


def test_a_function_is_compiled_once_for_several_passes():
    traced = []

    def double(variables, images):
        traced.append(images.shape)
        return images * 2

    mesh, images = make_mesh(), np.ones((16, 2, 2, 1), np.uint8)
    for _ in range(2):
        apply_batches(mesh, double, {}, batches(images, 8), batch_size=8, total=16)
    assert len(traced) == 1
    assert jax.device_count() == mesh.size


_INTERLEAVED = """
import sys
import jax, numpy as np
from usfmae_jax.training.forward import apply_batches
address, count, number = sys.argv[1:]
coordinator, processes, process_id = (text.partition("=")[2] for text in (address, count, number))
jax.distributed.initialize(coordinator, int(processes), int(process_id))
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1)
mesh = jax.sharding.Mesh(devices, ("data", "fsdp"))
images = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1)
found = apply_batches(mesh, lambda _, x: x, {}, iter([images[:8], images[8:13]]), batch_size=8, total=13)
print(found.ravel().tolist())
"""


def test_results_keep_their_order_where_the_devices_of_a_process_are_not_neighbours_in_the_mesh(tmp_path):
    job = processes.finish([sys.executable, "-c", _INTERLEAVED], 2, tmp_path, devices=2)
    assert [job.printed(number).splitlines()[-1] for number in range(2)] == [str(list(range(13)))] * 2
