"""The cross decoder: what it predicts depends on visible patches alone; it trains, resumes and exports as others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf, softmax

from tests.helpers import stopping
from tests.interop.torch_models import need
from usfmae_jax.errors import InputError
from usfmae_jax.export import export
from usfmae_jax.interop.model import flatten, open_model
from usfmae_jax.models import mae
from usfmae_jax.models.patches import patchify, sincos_table
from usfmae_jax.pretraining import build
from usfmae_jax.pretraining.loop import pretrain

SIZE = {"image_size": (32, 32), "patch_size": 8, "channels": 1, "width": 16, "depth": 3, "num_heads": 2}
DECODER = {"decoder_width": 8, "decoder_depth": 2, "decoder_num_heads": 2}


def _model(**how):
    return mae.CrossMAE(**SIZE, **DECODER, **how, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    keep, restore, mask = mae.random_masking(jax.random.key(0), 3, 16, 0.75)
    return rng.normal(size=(3, 32, 32, 1)).astype(np.float32), keep, restore, mask


def _norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def _reference(p, levels, chosen):
    """The decoder of the paper, one image and one query after the other, in float64."""
    width, heads = DECODER["decoder_width"], DECODER["decoder_num_heads"]
    table, found = sincos_table((4, 4), width), []
    for b, places in enumerate(chosen):
        x = p["mask_token"][0, 0] + table[places]
        for i in range(DECODER["decoder_depth"]):
            q = {name.removeprefix("stack."): value[i] for name, value in p.items() if name.startswith("stack.")}
            seen = sum(weight * level[b] for weight, level in zip(q["fuse"], levels, strict=True))
            seen = _norm(seen, q["norm_seen.scale"], q["norm_seen.bias"])
            keys, values = np.split(seen @ q["key_value.kernel"] + q["key_value.bias"], 2, axis=-1)
            asked = _norm(x, q["norm1.scale"], q["norm1.bias"]) @ q["query.kernel"] + q["query.bias"]
            answers = np.zeros_like(asked)
            for h in range(heads):
                part = slice(h * width // heads, (h + 1) * width // heads)
                for n, one in enumerate(asked):
                    shares = softmax(keys[:, part] @ one[part] / np.sqrt(width // heads))
                    answers[n, part] = shares @ values[:, part]
            x = x + answers @ q["proj.kernel"] + q["proj.bias"]
            inner = _norm(x, q["norm2.scale"], q["norm2.bias"]) @ q["fc1.kernel"] + q["fc1.bias"]
            x = x + (inner * 0.5 * (1 + erf(inner / np.sqrt(2)))) @ q["fc2.kernel"] + q["fc2.bias"]
        found.append(_norm(x, p["norm.scale"], p["norm.bias"]) @ p["pred.kernel"] + p["pred.bias"])
    return np.stack(found)


def test_the_decoder_is_the_papers(inputs):
    images, keep, *_ = inputs
    model = _model()
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda v: v + 0.1 * rng.normal(size=v.shape).astype(np.float32), nnx.state(model))
    nnx.update(model, noisy)
    chosen = np.array([[0, 5, 9], [3, 3, 1], [15, 2, 7]])
    encoder, levels = model.encoder, []
    x = encoder.embed(images, keep)
    graph, stacked = nnx.split(encoder.blocks.stack)
    for i in range(SIZE["depth"]):
        x = nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], stacked))(x)
        levels.append(x)
    levels[-1] = encoder.norm(x)
    params = {name: np.float64(v) for name, v in flatten(nnx.to_pure_dict(nnx.state(model.decoder))).items()}
    expected = _reference(params, [np.float64(one) for one in levels], chosen)
    np.testing.assert_allclose(model(images, keep, jnp.asarray(chosen)), expected, atol=2e-5)


@pytest.mark.parametrize("how", [{"scan": False}, {"remat": "full"}, {"scan": False, "remat": "dots"}])
def test_how_it_is_computed_does_not_change_what(inputs, how):
    images, keep, *_ = inputs
    chosen = jnp.asarray([[1, 2]] * 3)

    def gradient(model):
        graph, state = nnx.split(model)
        return jax.grad(lambda state: jnp.square(nnx.merge(graph, state)(images, keep, chosen)).sum())(state)

    for one, other in zip(*map(jax.tree.leaves, (gradient(_model()), gradient(_model(**how)))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_patch_is_predicted_from_the_visible_ones_whatever_else_is_asked_for(inputs):
    images, keep, *_ = inputs
    model = _model()
    every = np.asarray(model(images, keep, jnp.broadcast_to(jnp.arange(16), (3, 16))))
    np.testing.assert_allclose(model(images, keep, jnp.asarray([[4, 11]] * 3)), every[:, [4, 11]], atol=1e-6)
    hidden = patchify(images, 8).copy()
    for b, places in enumerate(np.asarray(keep)):
        hidden[b, np.setdiff1d(np.arange(16), places)] = 7
    assert not np.array_equal(hidden, patchify(images, 8))
    other = hidden.reshape(3, 4, 4, 8, 8, 1).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    np.testing.assert_array_equal(model(other, keep, jnp.broadcast_to(jnp.arange(16), (3, 16))), every)


def _objective(config, **mask):
    config.objective = "cross_mae"
    config.mask.update(**mask)
    return build.objective(config)


@pytest.mark.parametrize("fan_aware", [False, True])
def test_what_is_predicted_is_a_share_of_the_hidden_patches(config, fan_aware):
    learn = _objective(config, share=0.5, fan_aware=fan_aware)
    images = np.full((4, 32, 32, 1), 90, np.uint8)
    images[:, :, 16:] = 0  # half of it is no sector
    batch, _ = learn.prepare(jnp.asarray(images), jax.random.key(0))
    patches = (32 // learn.encoder["patch_size"]) ** 2
    count = round((patches - mae.num_visible(patches, learn.mask_ratio)) * 0.5)
    assert batch["chosen"].shape == (4, count)
    for keep, chosen in zip(np.asarray(batch["keep"]), np.asarray(batch["chosen"]), strict=True):
        assert len(set(chosen.tolist())) == count
        assert not set(keep.tolist()) & set(chosen.tolist())
    inside = np.asarray(mae.sector_patches(images, learn.encoder["patch_size"]))
    asked = np.take_along_axis(inside, np.asarray(batch["chosen"]), axis=1)
    np.testing.assert_array_equal(np.asarray(batch["weight"]) > 0, asked if fan_aware else np.ones_like(asked))
    again, _ = learn.prepare(jnp.asarray(images), jax.random.key(1))
    assert not np.array_equal(batch["chosen"], again["chosen"])


def test_its_loss_is_that_of_the_chosen_patches(config):
    learn = _objective(config, share=1.0)
    model = learn.make(nnx.Rngs(0))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8))
    batch, rng = learn.prepare(images, jax.random.key(0))
    total, count = learn.loss(model, batch, rng)
    inputs = images / 255.0 / learn.std[0] - learn.mean[0] / learn.std[0]
    target = np.asarray(mae.patch_targets(inputs, learn.encoder["patch_size"], True))
    every = jnp.broadcast_to(jnp.arange(target.shape[1]), target.shape[:2])
    error = np.square(model(inputs, batch["keep"], every) - target).mean(-1)
    mask = np.asarray(learn.masks(images, jax.random.key(0))["mask"])
    assert count == mask.sum()
    np.testing.assert_allclose(total, (error * mask).sum(), rtol=1e-4)


def test_it_is_cheaper_than_the_decoder_that_looks_at_everything(config):
    config.model.update(image_size=(224, 224), patch_size=16, width=768, depth=12, num_heads=12, channels=3)
    config.model.update(mean=(0.5,) * 3, std=(0.25,) * 3, decoder_width=512, decoder_depth=8, decoder_num_heads=16)
    config.mask.ratio = 0.75
    whole = build.objective(config).flops()
    assert _objective(config, share=1 / 3).flops() / whole == pytest.approx(0.56, abs=0.04)  # a quarter of all patches


def test_it_trains_is_resumed_shown_probed_and_exported(config, shards, tmp_path, capsys):
    config.objective = "cross_mae"
    config.mask.update(share=0.5, block=2, blur=0.8)
    config.train.ema = 0.9
    config.optimizer.muon = True
    config.log.pictures_every = 4
    config.probe.update(every=8, data={"path": shards, "split": ""})
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    assert pretrain(config, whole)
    assert list((tmp_path / "whole" / "reconstructions").glob("*.png"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").open() if '"loss"' in line]
    assert np.isfinite(losses).all()
    with stopping(3):
        assert not pretrain(config, stopped)
    assert pretrain(config, stopped)
    ends = [open_model(path, whole=True) for path in (whole, stopped)]
    assert ends[0].fingerprint == ends[1].fingerprint
    assert ends[0].description["decoder"]["kind"] == "cross"
    # What is opened is the average, which is what was exported.
    assert open_model(f"{whole}/encoder").fingerprint == open_model(whole, whole=True).encoder().fingerprint
    with pytest.raises(InputError, match="was pretrained with a cross decoder, which hf has no place for"):
        export(whole, str(tmp_path / "hf"), None, "hf")
    config.init, config.train.steps = whole, 1
    assert pretrain(config, str(tmp_path / "more"))
    assert f"starting from the encoder and decoder of {whole}" in capsys.readouterr().err
    need("flatbuffers")
    export(whole, str(tmp_path / "stablehlo"), None, "stablehlo")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mask.share": 0.0}, r"config\.mask\.share=0 must be more than 0"),
        ({"mask.block": 0}, r"config\.mask\.block=0 must be between 1"),
        ({"mask.blur": -1.0}, r"config\.mask\.blur=-1 must be between 0"),
        ({"model.decoder_depth": 0}, r"config\.model\.decoder_depth=0 must be 1 or more"),
    ],
)
def test_fields_that_cannot_be_are_refused(config, fields, says):
    config.objective = "cross_mae"
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=says):
        build.objective(config)
