"""Latent targets: a teacher sees the whole image and is not trained; runs resume, split and export as others do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import stopping
from usfmae_jax.errors import InputError
from usfmae_jax.export import export
from usfmae_jax.interop.model import Model, flatten, model_graph, open_model, preprocessing, save_model
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.models.vit import ViT
from usfmae_jax.pretraining import build
from usfmae_jax.pretraining.loop import pretrain
from usfmae_jax.training import checkpoints
from usfmae_jax.training import mesh as meshes
from usfmae_jax.training.state import init_state, teacher_state

#: Of another width, patch and image size than the model, and of colour.
OTHER = {"image_size": [64, 64], "patch_size": 16, "channels": 3, "width": 64, "depth": 1, "num_heads": 2}
OTHER |= {"mlp_ratio": 4.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A directory with an encoder."""
    encoder = ViT(**OTHER | {"image_size": (64, 64)}, rngs=nnx.Rngs(7))
    params = {"encoder": jax.device_get(nnx.to_pure_dict(nnx.state(encoder, nnx.Param)))}
    lineage = [{"job": "pretrain", "code": "elsewhere", "data": [{"dataset": "bus_bra"}]}]
    pixels = preprocessing((64, 64), 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    path = tmp_path_factory.mktemp("teacher")
    save_model(str(path), Model(params, {"model": "vit", "encoder": OTHER}, pixels, lineage))
    return str(path)


@pytest.fixture
def latent(config):
    config.objective = "latent"
    config.train.ema = 0.9
    return config


def _images(count=4):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 1), np.uint8))


def _standardised(tokens):
    tokens = np.asarray(tokens, np.float64)[:, 1:]
    return (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_loss_is_that_of_features_of_the_whole_sharp_image(latent, everywhere):
    latent.latent.everywhere = everywhere
    latent.mask.update(blur=1.0, block=2)
    learn = build.objective(latent)
    model, other = learn.make(nnx.Rngs(0)), learn.make(nnx.Rngs(1))
    batch, rng = learn.prepare(_images(), jax.random.key(0))
    total, count = learn.loss(model, learn.teach(nnx.to_pure_dict(nnx.state(other)), batch), rng)
    inputs = normalize_images(_images(), learn.mean, learn.std)
    target = _standardised(other.encoder(inputs, normalize=False))
    error = np.square(model(learn.seen(inputs), batch["keep"], batch["restore"]) - target).mean(-1)
    mask = np.ones((4, 16)) if everywhere else np.asarray(batch["mask"])
    assert count == mask.sum() == (64 if everywhere else 48)
    np.testing.assert_allclose(total, (error * mask).sum(), rtol=1e-4)


def test_of_the_visible_patches_too_those_in_the_sector(latent):
    latent.latent.everywhere = True
    latent.mask.fan_aware = True
    learn = build.objective(latent)
    images = _images().at[:, :16].set(0)
    batch, rng = learn.prepare(images, jax.random.key(0))
    batch["target"] = jnp.zeros((4, 16, 32))
    assert learn.loss(learn.make(nnx.Rngs(0)), batch, rng)[1] == 32


def test_a_teacher_with_other_patches_sees_the_image_in_its_own_size_and_colours(latent, teacher):
    latent.latent.teacher = teacher
    learn = build.objective(latent)
    found = learn.teach(learn.teacher.params, {"image": _images()})["target"]
    encoder = nnx.merge(
        model_graph(lambda rngs: ViT(**OTHER | {"image_size": (64, 64)}, rngs=rngs)), learn.teacher.params["encoder"]
    )
    large = jax.image.resize(normalize_images(_images(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.2)), (4, 64, 64, 3), "linear")
    np.testing.assert_allclose(found, _standardised(encoder(large, normalize=False)), atol=1e-4)
    model = learn.make(nnx.Rngs(0))
    assert model.decoder.pred.kernel.shape == (16, 64)
    plain = latent.copy_and_resolve_references()
    plain.objective, plain.latent.teacher = "mae", "ema"
    assert learn.flops() > build.objective(plain).flops()


def _train(config, devices=1, fsdp=1, steps=3):
    learn = build.objective(config)
    mesh = meshes.make_mesh(-1, fsdp, devices=jax.devices()[:devices])
    graph, state = init_state(learn.make, build.make_optimizer(config)[0], mesh, 0, config.train.ema > 0)
    if learn.teacher:
        state |= teacher_state(learn.teacher.params, mesh)
    update, states, losses = jax.jit(build.make_step(config, learn, graph, mesh)), [jax.device_get(state)], []
    for _ in range(steps):
        state, metrics = update(state, meshes.global_batch(mesh, np.asarray(_images(16))), 10)
        losses.append(float(metrics["loss"]))
        states.append(state)
    return losses, states


def test_a_fixed_teacher_is_neither_trained_nor_decayed(latent, teacher):
    latent.latent.teacher, latent.train.ema = teacher, 0.0
    _, (first, *_, last) = _train(latent)
    assert "ema" not in last
    for before, after in zip(*(jax.tree.leaves(state["teacher"]) for state in (first, last)), strict=True):
        np.testing.assert_array_equal(before, after)
    moments = [leaf.shape for leaf in jax.tree.leaves(last["opt_state"]) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(last["params"]))


def test_the_average_that_teaches_gets_no_gradient(latent):
    _, (_, before, after) = _train(latent, steps=2)
    decay = np.float32(2 / 11)  # of the second step
    for old, now, found in zip(*map(jax.tree.leaves, (before["ema"], after["params"], after["ema"])), strict=True):
        np.testing.assert_allclose(found, old + (1 - decay) * (now - old), atol=1e-6)


@pytest.mark.parametrize("fixed", [False, True])
def test_eight_devices_that_split_it_compute_what_one_does_in_parts_too(latent, teacher, fixed):
    latent.model.update(width=64)
    if fixed:
        latent.latent.teacher = teacher
    single = _train(latent)[0]
    latent.train.accumulate = 2
    losses, states = _train(latent, 8, 4)
    np.testing.assert_allclose(losses, single, rtol=2e-4)
    kernel = states[-1]["teacher" if fixed else "ema"]["encoder"]["blocks"]["stack"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


@pytest.mark.parametrize("fixed", [False, True])
def test_it_trains_is_resumed_bitwise_and_exported(latent, shards, teacher, tmp_path, capsys, fixed):
    if fixed:
        latent.latent.teacher, latent.train.ema = teacher, 0.0
    latent.log.pictures_every = 4  # there are none
    latent.probe.update(every=8, data={"path": shards, "split": ""})
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    assert pretrain(latent, whole)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").open() if '"loss"' in line]
    assert np.isfinite(losses).all()
    with stopping(3):
        assert not pretrain(latent, stopped)
    if fixed:  # the teacher has moved
        save_model(str(tmp_path / "moved"), open_model(teacher))
        latent.latent.teacher = str(tmp_path / "moved")
    assert pretrain(latent, stopped)
    ends = [open_model(path, whole=True) for path in (whole, stopped)]
    assert ends[0].fingerprint == ends[1].fingerprint
    # The average where that is the teacher, else what was trained.
    assert open_model(f"{whole}/encoder").fingerprint == ends[0].encoder().fingerprint
    saver = checkpoints.open_checkpoints(f"{whole}/checkpoints")
    assert set(saver.metadata(8).metadata) == {"step", "params", "opt_state", "rng"} | ({"ema"} - {"ema" * fixed})
    saver.close()
    stages = open_model(f"{whole}/encoder").lineage
    assert [stage.get("role") for stage in stages] == (["teacher", None] if fixed else [None])
    assert stages[-1]["config"].get("teacher_fingerprint") == (open_model(teacher).fingerprint if fixed else None)
    with pytest.raises(InputError, match="was pretrained with a latent decoder, which hf has no place for"):
        export(whole, str(tmp_path / "hf"), None, "hf")
    latent.latent.teacher = whole
    with pytest.raises(
        InputError, match=r"fingerprint of config\.latent\.teacher is" if fixed else "made with another config"
    ):
        pretrain(latent, stopped)
    capsys.readouterr()
    latent.init, latent.latent.teacher = f"{whole}/encoder", f"{whole}/encoder"
    assert pretrain(latent, str(tmp_path / "more"))
    assert "with a freshly initialised decoder" in capsys.readouterr().err
    assert flatten(open_model(str(tmp_path / "more"), whole=True).params)["decoder.pred.kernel"].shape == (16, 32)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"train.ema": 0.0}, r"teacher=ema is the average of the model itself: add --config\.train\.ema=0\.996"),
        ({"latent.teacher": "nowhere"}, r"config\.latent\.teacher: checkpoint 'nowhere' is no folder"),
    ],
)
def test_teachers_that_cannot_be_are_refused(latent, fields, says):
    latent.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=says):
        build.objective(latent)


def test_a_grey_teacher_of_colour_images_is_refused(latent, tmp_path):
    about = OTHER | {"channels": 1}
    encoder = ViT(**about | {"image_size": (64, 64)}, rngs=nnx.Rngs(7))
    params = {"encoder": jax.device_get(nnx.to_pure_dict(nnx.state(encoder, nnx.Param)))}
    pixels = preprocessing((64, 64), 1, (0.5,), (0.2,))
    save_model(str(tmp_path), Model(params, {"model": "vit", "encoder": about}, pixels, []))
    latent.latent.teacher, latent.data.channels = str(tmp_path), 3
    latent.model.update(channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(InputError, match="is for images of 1 channels, not 3"):
        build.objective(latent)
