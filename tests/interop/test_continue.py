"""Pretraining goes on from converted weights, with the decoder if they have one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from usfmae_jax import convert, export
from usfmae_jax.errors import InputError
from usfmae_jax.interop.checkpoint import load_parameters
from usfmae_jax.interop.model import flatten, read_lineage
from usfmae_jax.pretraining.build import with_weights
from usfmae_jax.pretraining.loop import pretrain


@pytest.mark.slow
def test_pretraining_starts_from_converted_weights_decoder_included(config, tmp_path, capsys):
    config.train.steps = 1
    config.optimizer.learning_rate = 0.0  # what it starts from is what it ends with
    assert pretrain(config, str(tmp_path / "first"))
    assert export.main([f"--checkpoint={tmp_path / 'first'}", "--format=mae", f"--output={tmp_path / 'mae'}"]) == 0
    assert convert.main([f"--input={tmp_path / 'mae'}", f"--output={tmp_path / 'back'}"]) == 0
    config.init, config.seed = str(tmp_path / "back"), 3
    assert pretrain(config, str(tmp_path / "second"))
    assert "starting from the encoder and decoder of" in capsys.readouterr().err
    first, second = (flatten(load_parameters(str(tmp_path / name))[0]) for name in ("first", "second"))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    lineage = read_lineage(str(tmp_path / "second" / "encoder"))
    assert [stage["job"] for stage in lineage] == ["pretrain", "convert", "pretrain"]

    config.model.decoder_width = 8
    with pytest.raises(InputError, match=r"decoder\..* there and .* in this config; to take the encoder alone, add"):
        pretrain(config, str(tmp_path / "third"))
    fresh = jax.tree.map(jnp.zeros_like, load_parameters(str(tmp_path / "first"))[0])
    config.model.num_heads = 4
    with pytest.raises(InputError, match=r"has 2 heads: add --config\.model\.num_heads=2"):
        with_weights({"params": fresh}, str(tmp_path / "back"), config.model)
    config.model.num_heads, config.model.mean = 2, (0.5,)
    state, _, said = with_weights({"params": fresh}, str(tmp_path / "back" / "encoder"), config.model)
    assert "warning: its pixels had another mean: (0.25,), here (0.5,)" in said
    assert "with a freshly initialised decoder" in said
    assert not any(leaf.any() for leaf in jax.tree.leaves(state["params"]["decoder"]))
    assert state["params"]["encoder"]["cls_token"].any()
