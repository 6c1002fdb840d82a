"""The classifier directory holds all that is needed to use a classifier."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from usfmae_jax.errors import InputError
from usfmae_jax.interop.classifier import make_classifier, read_classifier, save_classifier
from usfmae_jax.interop.encoder import save_encoder
from usfmae_jax.models.heads import Classifier
from usfmae_jax.models.resnet import ResNet

ENCODER = {
    "image_size": (32, 32), "patch_size": 8, "channels": 1, "width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0,
}  # fmt: skip
VIT = {"model": "vit", "encoder": ENCODER, "pool": "cls", "classes": ["benign", "malignant"]}
RESNET = {
    "model": "resnet50",
    "resnet": {"channels": 1, "depths": (1, 1, 1, 1), "width": 8},
    "classes": ["benign", "malignant", "normal"],
}
PREPROCESSING = {"image_size": [32, 32], "channels": 1, "mean": [0.25], "std": [0.2]}
LINEAGE = [{"job": "finetune", "step": 3}]


def _save(folder, description):
    graph, params, stats = nnx.split(make_classifier(description)(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    stats = jax.tree.map(lambda s: s + 0.5, stats)  # as after some training
    save_classifier(str(folder), params, stats, description, PREPROCESSING, LINEAGE)
    return graph, params, stats


@pytest.mark.parametrize(("description", "kind"), [(VIT, Classifier), (RESNET, ResNet)])
def test_what_is_written_is_read_and_answers_the_same(tmp_path, description, kind):
    graph, params, stats = _save(tmp_path, description)
    read, read_stats, found, preprocessing, lineage = read_classifier(str(tmp_path))
    assert found == json.loads(json.dumps(description))
    assert (preprocessing, lineage) == (PREPROCESSING, LINEAGE)
    jax.tree.map(np.testing.assert_array_equal, params, read)
    jax.tree.map(np.testing.assert_array_equal, stats, read_stats)
    model = nnx.eval_shape(lambda: make_classifier(found)(nnx.Rngs(0)))
    assert isinstance(model, kind)
    assert jax.tree.structure(nnx.graphdef(model)) == jax.tree.structure(graph)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))
    run = jax.jit(lambda params, stats: nnx.merge(graph, params, stats)(images))
    logits = run(read, read_stats)
    assert logits.shape == (2, len(description["classes"]))
    np.testing.assert_array_equal(logits, run(params, stats))


def test_the_weights_carry_their_lineage(tmp_path):
    _save(tmp_path, VIT)
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["lineage"]) == LINEAGE
    assert not list(tmp_path.glob("*.incomplete"))


def test_how_it_is_computed_is_chosen_when_it_is_built():
    model = make_classifier(VIT, dtype=jnp.bfloat16, drop_path=0.1, freeze=1, attention="xla", scan=False, remat=True)(
        nnx.Rngs(0)
    )
    assert (model.drop_path, model.freeze, model.encoder.dtype) == (0.1, 1, jnp.bfloat16)
    assert (model.encoder.blocks.scan, model.encoder.blocks.remat) == (False, True)
    frozen = make_classifier(RESNET, freeze=4, attention="xla", scan=False)(nnx.Rngs(0))
    assert frozen.freeze == 4


def test_what_is_no_classifier_gets_one_sentence(tmp_path):
    with pytest.raises(InputError, match="is not a classifier directory"):
        read_classifier(str(tmp_path / "none"))
    save_encoder(str(tmp_path / "encoder"), {"norm": {"bias": np.zeros(2)}}, ENCODER, PREPROCESSING, [])
    with pytest.raises(InputError, match="holds no classifier but other weights, such as an encoder's"):
        read_classifier(str(tmp_path / "encoder"))
    _save(tmp_path, VIT)
    (tmp_path / "architecture.json").write_text(json.dumps({"format": 2, **VIT}))
    with pytest.raises(InputError, match="another classifier format than 1; update"):
        read_classifier(str(tmp_path))
    (tmp_path / "architecture.json").write_text(json.dumps({"format": 1, **VIT}))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a classifier directory"):
        read_classifier(str(tmp_path))
