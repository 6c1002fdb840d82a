"""What is said of a training step on hardware that is not here, and of what to do if it does not fit."""

import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests.helpers import tiny_config
from usfmae_jax import finetune, main
from usfmae_jax.errors import BAD_INPUT, DONE, InputError
from usfmae_jax.models import layers
from usfmae_jax.pretraining import build
from usfmae_jax.pretraining.loop import compile_for
from usfmae_jax.training import hardware, mesh


@pytest.mark.parametrize(
    ("name", "layout"),
    [("v5e:4x4", (4, 4)), ("v6e:2x4", (2, 4)), ("v5p:2x2x1", (2, 2, 1)), ("h100:8", (8,)), ("a100-80:1", (1,))],
)
def test_a_target_is_a_device_and_a_layout(name, layout):
    chip, found = hardware.parse_target(name)
    assert chip is hardware.CHIPS[name.partition(":")[0]]
    assert found == layout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:4x4", "devices are v5e, v5p, v6e, a100-80, h100, h200"),
        ("v5e", "must be a device and how many"),
        ("h100:0", "must be a device and how many"),
        ("v5e:8", "laid out in 2 axes, as v5e:4x4"),
        ("v5p:4x4", "laid out in 3 axes, as v5p:4x4x4"),
        ("h200:16", "h200:1 to h200:8 are the GPUs of one machine"),
        ("h100:2x4", "h100:1 to h100:8 are the GPUs of one machine"),
    ],
)
def test_what_is_no_target_is_refused_with_what_to_type(name, said):
    with pytest.raises(InputError) as error:
        hardware.devices_of(name)
    assert said in str(error.value)


@pytest.mark.parametrize(("name", "package"), [("v5e:4x4", "tpu"), ("h100:8", "cuda13")])
def test_without_the_compiler_one_sentence_says_what_to_install(name, package, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"pip install 'jax\[{package}\]'"):
        _door(main, tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


PROGRAM = """HloModule jit_update, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: bf16[64,32]) -> bf16[8,32] {
  %p = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %s = bf16[8,32]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={8,32}
}

%async_collective_fusion.1 (p: bf16[4,8]) -> bf16[32,8] {
  %g.1 = bf16[32,8] all-gather(%p), channel_id=78, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, attributes={chain_id="0"}
}

%async_collective_fusion.2 (p: bf16[4,8]) -> bf16[32,8] {
  %g.2 = bf16[32,8] all-gather(%p), channel_id=78, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, attributes={chain_id="0"}
}

%body (c: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %f.1 = (bf16[4,8]{1,0}, u32[]) fusion(%c), kind=kCustom, calls=%async_collective_fusion.1
  %f.2 = (bf16[4,8]{1,0}, u32[]) fusion(%f.1), kind=kCustom, calls=%async_collective_fusion.2
  %f.3 = bf16[8,32]{1,0} fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (c: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%known (c: (s32[], f32[10])) -> (s32[], f32[10]) {
  %r.2 = (f32[10]{0}, /*index=1*/f32[]) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main.1 (a: f32[10]) -> f32[10] {
  %w.1 = (s32[], bf16[4,8]{1,0}) while(%t), condition=%condition, body=%body
  %w.2 = (s32[], f32[10]{0}) while(%u), condition=%other, body=%known, backend_config={"known_trip_count":{"n":"3"}}
  %g.3 = (f32[2]{0}, f32[16]{0}) all-gather-start(%a), replica_groups={}, dimensions={0}
  %g.4 = f32[16]{0} all-gather-done(%g.3)
  %r.3 = ((bf16[64,8]{1,0}, bf16[8]{0}), (bf16[8,8]{1,0}, bf16[1]{0})) reduce-scatter-start(%b, %c), replica_groups={}
  %r.4 = ((f32[20]{0}), f32[20]{0}) all-reduce-start(%wide), replica_groups=[1,8]<=[8], to_apply=%add
  %q = f32[2]{0} reduce-scatter(%g.4), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %c.1 = (s8[100]{0}, s8[100]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
  ROOT %alone = f32[10]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_what_devices_send_is_read_from_a_program_and_counted_as_often_as_its_loops_turn():
    assert hardware.count_collectives(PROGRAM, 8) == {
        # in the loop of 12: 32 x 8 bf16 once, however many pieces; outside 16 f32
        "all-gather": {"count": 13, "bytes": 12 * 512 + 64, "sent": 12 * 448 + 56},
        "reduce-scatter": {"count": 14, "bytes": 12 * 4096 + 1040 + 16, "sent": 12 * 3584 + 910 + 8},
        "all-reduce": {"count": 4, "bytes": 3 * 44 + 80, "sent": 3 * 66 + 140},
        "collective-permute": {"count": 1, "bytes": 100, "sent": 100},
    }


def test_what_is_read_from_a_compiled_scan_is_what_it_does():
    eight = mesh.make_mesh()
    over = PartitionSpec("data")

    def step(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.tanh(c + jax.lax.psum(c, "data")), None), x, length=5)[0]

    function = jax.jit(jax.shard_map(step, mesh=eight, in_specs=over, out_specs=over))
    text = function.lower(jnp.zeros((8, 30))).compile().as_text()
    assert hardware.count_collectives(text, 8) == {"all-reduce": {"count": 5, "bytes": 5 * 120, "sent": 5 * 210}}


def _said(needed, **memory):
    return {"fits": needed <= 100, "devices": 8, "mesh": {"data": 8, "fsdp": 1}} | {
        "memory": {"available": 100, "needed": needed, "arguments": 10, "temporary": needed - 10} | memory,
        "estimate": None,
    }


FIELDS = {"model.remat": "none", "train.accumulate": 1, "train.batch_size": 64}


def test_activations_are_recomputed_first_and_then_the_batch_is_cut():
    tried = []

    def attempt(settings):
        tried.append(dict(settings))
        return _said(500 - 100 * len(tried) if "train.accumulate" not in settings else 80)

    found = hardware.fit(attempt, FIELDS)
    full = {"model.remat": "full"}
    assert tried == [{}, {"model.remat": "dots"}, full, full | {"train.accumulate": 4}]
    assert found["memory"]["needed"] == 400
    assert not found["fits"]
    assert found["remedy"]["settings"] == tried[-1]
    assert found["remedy"]["memory"]["needed"] == 80


def test_a_state_that_fills_the_device_is_split():
    assert hardware.remedy(_said(150, arguments=90), FIELDS) == {"mesh.data": -1, "mesh.fsdp": 2}
    assert hardware.remedy(_said(150, arguments=1000), FIELDS) == {"mesh.data": -1, "mesh.fsdp": 8}


def test_where_nothing_is_left_to_try_that_is_said():
    fields = FIELDS | {"model.remat": "full", "train.batch_size": 8}  # one image a device
    found = hardware.fit(lambda settings: _said(150), fields)
    assert found["remedy"] is None
    assert hardware.remedy(_said(150), fields) == {}


def _door(door, workdir, target, config=None):
    return door.main(config or tiny_config(""), str(workdir), types.SimpleNamespace(compile_for=target))


@pytest.fixture
def here(monkeypatch):
    """The eight devices of the tests in place of a slice of eight."""
    monkeypatch.setattr(hardware, "devices_of", lambda name: jax.devices())


def test_the_door_says_what_a_step_takes_and_wants_no_data(here, tmp_path, capsys):
    assert _door(main, tmp_path, "v5e:2x4") == DONE
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "compiled_for_v5e_2x4.json").read_text())
    assert found["fits"]
    assert found["memory"]["available"] == 15.75 * 2**30
    assert 0 < found["memory"]["arguments"] < found["memory"]["needed"]
    assert found["collectives"]["all-reduce"]["sent"] > 0
    assert found["estimate"]["step"] == found["estimate"][found["estimate"]["bound"]] > 0
    assert "of 15.75 GiB: fits" in said
    assert "estimate from published peaks, not measured" in said
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_that_does_not_fit_ends_with_status_2_and_with_settings_that_do(here, tmp_path, capsys, monkeypatch):
    config = tiny_config("")
    config.train.batch_size = 64
    needed = compile_for(config, "v5e:2x4", jax.devices())["memory"]["needed"]
    chip = hardware.dataclasses.replace(hardware.CHIPS["v5e"], memory=needed - 1)
    monkeypatch.setitem(hardware.CHIPS, "v5e", chip)
    assert _door(main, tmp_path, "v5e:2x4", config=config) == BAD_INPUT
    said = capsys.readouterr().out
    remedy = json.loads((tmp_path / "compiled_for_v5e_2x4.json").read_text())["remedy"]
    remat = remedy["settings"]["model.remat"]
    assert remat in ("dots", "full")
    assert remedy["memory"]["needed"] < needed
    assert "does not fit" in said
    assert f"with --config.model.remat={remat}" in said


def test_a_compiler_that_gives_up_for_want_of_memory_says_that_it_does_not_fit(here, monkeypatch):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.50G of 15.75G hbm.")

    monkeypatch.setattr(hardware, "compile_update", refuse)
    monkeypatch.setattr(hardware, "ATTEMPTS", 0)
    found = compile_for(tiny_config(""), "v5e:2x4", jax.devices())
    assert not found["fits"]
    assert found["memory"]["needed"] == 17.5 * 2**30
    assert found["memory"]["arguments"] > 0
    assert "in all 17.50 GiB of 15.75 GiB: does not fit" in hardware.describe(found)


def test_the_step_of_a_fine_tuning_run_is_compiled_too(here, shards, tmp_path, capsys):
    from configs.finetune import get_config

    config = get_config("folder")
    config.data.path = shards
    config.model.update(image_size=(32, 32), patch_size=8, width=32, depth=2, num_heads=2)
    assert _door(finetune, tmp_path, "h100:8", config=config) == DONE
    found = json.loads((tmp_path / "compiled_for_h100_8.json").read_text())
    assert found["images"] == config.train.batch_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiled_for_h100_8.json"]


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install 'jax[tpu]'")
def test_a_tiny_step_compiles_for_a_tpu_and_fits(monkeypatch):
    config = tiny_config("")
    found = compile_for(config, "v5e:2x2", hardware.devices_of("v5e:2x2"))
    assert found["fits"]
    assert found["devices"] == 4
    assert found["collectives"]["all-reduce"]["count"] > 0


def test_devices_that_split_parameters_send_each_other_matrices_and_their_gradients_and_nothing_else(monkeypatch):
    """ZeRO-3 (Rajbhandari et al. 2020): what is split is gathered twice and its gradient reduced in parts."""
    monkeypatch.setattr(layers, "MIN_SPLIT_SIZE", 64)
    config = tiny_config("")
    config.mesh.update(data=1, fsdp=8)
    config.model.scan = True
    config.train.batch_size = 64  # activations are larger than parameters
    sent = compile_for(config, "v5e:2x4", jax.devices())["collectives"]
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(build.objective(config).make(nnx.Rngs(0)), nnx.Param)))
    places = jax.tree.leaves_with_path(params)
    split = [leaf for path, leaf in places if mesh.place_to_split(path, leaf, 8) is not None]
    matrices = sum(4 * leaf.size for leaf in split)
    assert sent["all-gather"]["bytes"] < 2.1 * matrices
    assert sent["reduce-scatter"]["bytes"] > 0.8 * matrices
    assert sent.keys() <= {"all-gather", "reduce-scatter", "all-reduce"}
    assert sent["all-reduce"]["bytes"] < 0.2 * matrices
