"""A new objective is one file and one entry: it trains, is saved, resumed and exported by a loop that does not know it.

The objective here predicts the mean brightness of an image from its class token.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.helpers import stopping
from tests.interop.torch_models import need
from usfmae_jax import load_encoder
from usfmae_jax.export import export
from usfmae_jax.interop.checkpoint import load_parameters
from usfmae_jax.interop.model import open_model
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.models.vit import ViT
from usfmae_jax.objectives import Objective
from usfmae_jax.pretraining import build
from usfmae_jax.pretraining.loop import pretrain


class Brightness(nnx.Module):
    def __init__(self, rngs, **encoder):
        self.encoder = ViT(**encoder, rngs=rngs)
        self.head = nnx.Linear(encoder["width"], 1, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class PredictBrightness(Objective):
    encoder: dict
    mean: tuple
    std: tuple

    def describe(self):
        return {"model": "vit", "encoder": self.encoder}

    def make(self, rngs):
        return Brightness(rngs, **self.encoder, dtype=jnp.float32)

    def loss(self, model, batch, rng):
        inputs = normalize_images(batch["image"], self.mean, self.std)
        target = inputs.mean(axis=(1, 2, 3))
        error = jnp.square(model.head(model.encoder(inputs)[:, 0])[:, 0] - target)
        return error.sum(), jnp.float32(len(error))

    def flops(self):
        return 1e6


def entry(config):
    return PredictBrightness(build.encoder(config), tuple(config.model.mean), tuple(config.model.std))


def test_a_new_objective_trains_resumes_and_exports(config, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(build.OBJECTIVES, "brightness", entry)
    config.objective = "brightness"
    config.train.accumulate = 1
    config.log.pictures_every = 4  # it has none to show
    config.probe.update(every=8, data={"path": shards, "split": ""})
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    assert pretrain(config, whole)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").open() if '"loss"' in line]
    assert losses[-1] < losses[0]
    assert load_parameters(whole)[1]["about"]["kind"] == "brightness"

    with stopping(3):
        assert not pretrain(config, stopped)
    assert pretrain(config, stopped)
    ends = [open_model(path) for path in (whole, stopped)]
    assert ends[0].fingerprint == ends[1].fingerprint

    fresh = {"params": jax.tree.map(jnp.asarray, load_parameters(whole)[0])}
    assert f"starting from the encoder and head of {whole}" in build.with_weights(fresh, whole, config.model)[2]

    export(whole, str(tmp_path / "safetensors"), None, "safetensors")
    images = np.zeros((2, 32, 32, 1), np.uint8)
    found = load_encoder(tmp_path / "safetensors")(images)
    np.testing.assert_allclose(found.class_token, load_encoder(whole)(images).class_token, rtol=1e-6)
    assert jax.tree.leaves(open_model(whole, 8).params)[0].dtype == np.float32
    need("flatbuffers")
    export(whole, str(tmp_path / "stablehlo"), None, "stablehlo")


def test_the_objective_is_short():
    import inspect

    assert len(inspect.getsource(Brightness).splitlines() + inspect.getsource(PredictBrightness).splitlines()) < 40
