"""Weights are found wherever a run leaves them, are the same ones, and say where they come from."""

import numpy as np
import pytest

from usfmae_jax.errors import InputError
from usfmae_jax.interop.encoder import flatten, read_encoder
from usfmae_jax.interop.weights import fingerprint, members, open_weights
from usfmae_jax.pretraining.loop import pretrain


@pytest.fixture(scope="module")
def run(request, tmp_path_factory, shards):
    """The workdir of a finished run of 4 steps with checkpoints after 2 and 4."""
    from tests.helpers import tiny_config

    config = tiny_config(shards)
    config.train.steps = 4
    config.checkpoint.every = 2
    workdir = tmp_path_factory.mktemp("run")
    assert pretrain(config, str(workdir))
    return workdir


@pytest.mark.parametrize("place", ["", "encoder", "checkpoints", "checkpoints/4"])
def test_a_run_and_all_its_parts_give_the_same_weights(run, place):
    weights = open_weights(str(run / place))
    reference = open_weights(str(run / "encoder"))
    assert weights.kind == "encoder"
    assert weights.fingerprint == reference.fingerprint
    assert weights.description == reference.description
    for name in ("image_size", "channels", "mean", "std"):
        assert list(np.ravel(weights.preprocessing[name])) == list(np.ravel(reference.preprocessing[name]))
    assert [stage["step"] for stage in weights.lineage] == [4]
    for name, value in flatten(read_encoder(str(run / "encoder"))[0]).items():
        np.testing.assert_array_equal(flatten(weights.params)[name], value)


def test_a_step_is_that_checkpoint(run):
    early = open_weights(str(run), step=2)
    assert early.fingerprint == open_weights(str(run / "checkpoints" / "2")).fingerprint
    assert early.fingerprint != open_weights(str(run)).fingerprint
    assert early.lineage[-1]["step"] == 2
    with pytest.raises(InputError, match=r"has the checkpoints \[2, 4\], not 3"):
        open_weights(str(run), step=3)


def test_the_fingerprint_tells_values_and_names_apart():
    params = {"a": {"kernel": np.zeros((2, 2), np.float32)}}
    assert fingerprint(params) == fingerprint({"a": {"kernel": np.zeros((2, 2))}})
    assert len({fingerprint(params), fingerprint({"b": params["a"]}), fingerprint(params, params)}) == 3


def test_what_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        open_weights(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds neither an encoder or a classifier nor a finished checkpoint"):
        open_weights(str(tmp_path))
    (tmp_path / "architecture.json").write_text("{")
    with pytest.raises(InputError, match="is not an encoder directory"):
        open_weights(str(tmp_path))


def test_a_damaged_checkpoint_is_refused_in_one_sentence(run, tmp_path):
    import shutil

    shutil.copytree(run / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    for file in (tmp_path / "checkpoints" / "4" / "state" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(b"")
    for file in (tmp_path / "checkpoints" / "4" / "state" / "d").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"checkpoint 4 in .* cannot be read"):
        open_weights(str(tmp_path))


def test_several_members_must_be_chosen_from(tmp_path):
    for name in ("fold-1", "fold-2"):
        (tmp_path / "members" / name / "classifier").mkdir(parents=True)
        (tmp_path / "members" / name / "classifier" / "architecture.json").write_text("{}")
    (tmp_path / "members" / "fold-3").mkdir()  # not finished
    assert [path[-6:] for path in members(str(tmp_path))] == ["fold-1", "fold-2"]
    with pytest.raises(InputError, match="holds 2 trained models; choose one"):
        open_weights(str(tmp_path))
