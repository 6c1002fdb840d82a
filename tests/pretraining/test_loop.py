"""The loop: what it refuses before anything is compiled, and what it does with what it is given."""

import gzip
import json
import os
import pathlib
import shutil
import socket

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny_config, write_shards
from tests.pretraining.runs import losses, metrics
from usfmae_jax.errors import InputError
from usfmae_jax.interop.model import flatten, open_model
from usfmae_jax.objectives.mae import MaskedAutoencoding
from usfmae_jax.pretraining.loop import keep_lineage, pretrain
from usfmae_jax.training.monitor import _ABSOLUTE, DivergedError, Profile


def test_non_finite_loss_names_the_step_and_keeps_the_last_good_checkpoint(config, tmp_path):
    config.optimizer.update(learning_rate=1e12, warmup=0.0)
    config.checkpoint.every = 1
    with pytest.raises(DivergedError, match=r"(loss|grad_norm) is (nan|inf) at step \d+"):
        pretrain(config, str(tmp_path))
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept
    assert all(np.isfinite(losses(tmp_path)[step]) for step in kept)


def test_a_batch_that_is_no_number_is_named_or_skipped_up_to_a_limit(config, tmp_path, monkeypatch, capfd):
    black = cv2.imencode(".png", np.zeros((40, 48), np.uint8))[1].tobytes()
    paths = write_shards(tmp_path, 48, instead={13: black, 30: black})
    whole = MaskedAutoencoding.loss

    def loss(self, model, batch, rng):
        total, count = whole(self, model, batch, rng)
        return total * jnp.where(batch["image"].any(axis=(1, 2, 3)).all(), 1.0, jnp.nan), count

    monkeypatch.setattr(MaskedAutoencoding, "loss", loss)
    config.data.path = str(tmp_path)
    config.train.update(steps=6)  # every frame once
    config.checkpoint.every = 2
    with pytest.raises(DivergedError, match=r"loss is nan at step \d, whose batch is in diverged.csv \(shard,record: "):
        pretrain(config, str(tmp_path / "stops"))
    named = (tmp_path / "stops" / "diverged.csv").read_text().splitlines()
    assert named[0] == "shard,record"
    assert len(named) == 9
    suspects = {f"{pathlib.Path(paths[n % 2]).name},{n // 2}" for n in (13, 30)}
    assert suspects & set(named)
    config.train.skip_nonfinite = 2
    assert pretrain(config, str(tmp_path / "skips"))
    said = capfd.readouterr().err
    assert "which is skipped (1 of at most 2)" in said
    skipped = [line["skipped"] for line in metrics(tmp_path / "skips") if "skipped" in line]
    assert skipped in ([1], [1, 2])  # two black frames, perhaps of one batch
    assert all(np.isfinite(leaf).all() for leaf in flatten(open_model(str(tmp_path / "skips")).params).values())


def test_an_evaluation_set_is_not_trained_on_unless_asked_for(config, tmp_path):
    config.data.exclude = ("made",)  # what the shards of the tests are called
    with pytest.raises(InputError, match="nothing but what is excluded: made") as error:
        pretrain(config, str(tmp_path))
    assert "--config.data.exclude='()'" in str(error.value)
    assert "data_prep.build" not in str(error.value)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run of two steps, and its config."""
    workdir, config = tmp_path_factory.mktemp("finished"), tiny_config(shards)
    config.train.steps = config.checkpoint.every = 2
    assert pretrain(config, str(workdir))
    return workdir, config


def test_resuming_with_another_config_names_the_fields(finished):
    workdir, config = finished[0], finished[1].copy_and_resolve_references()
    config.optimizer.learning_rate = 0.5
    config.mask.ratio = 0.5
    config.mesh.fsdp = 2  # may change
    with pytest.raises(InputError) as error:
        pretrain(config, str(workdir))
    assert "mask.ratio is 0.5 but was 0.75" in str(error.value)
    assert "optimizer.learning_rate is 0.5 but was" in str(error.value)
    assert "mesh" not in str(error.value)


def test_checkpoints_are_kept_by_policy(config, tmp_path):
    config.train.steps = 7
    config.checkpoint.update(every=1)
    config.checkpoint.keep.update(keep_latest=1, keep_every=3, keep_best=0)
    assert pretrain(config, str(tmp_path))
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == {3, 6, 7}


def test_a_finished_run_is_not_run_again(finished, capfd):
    workdir, config = finished
    assert pretrain(config, str(workdir))
    assert "already finished" in capfd.readouterr().err


def test_damaged_records_are_named_and_skipped_up_to_the_limit(config, tmp_path, capfd):
    paths = write_shards(tmp_path, 48, damaged=(5, 20))
    config.data.update(path=str(tmp_path), max_damaged=0.05)
    config.train.steps = 6
    assert pretrain(config, str(tmp_path / "run"))
    text = capfd.readouterr().err
    assert f"damaged record skipped: number 2 of {paths[1]}" in text
    assert f"damaged record skipped: number 10 of {paths[0]}" in text
    config.data.max_damaged = 0.01
    with pytest.raises(InputError, match=r"records are damaged, more than config\.data\.max_damaged=0\.01"):
        pretrain(config, str(tmp_path / "strict"))


def test_pictures_and_probe_appear_in_the_logs(config, tmp_path, shards):
    config.train.steps = 4
    config.log.pictures_every = 4
    config.probe.update(every=4)
    config.probe.data.path = shards
    assert pretrain(config, str(tmp_path))
    picture = cv2.imread(str(tmp_path / "reconstructions" / "step_0000004.png"))
    assert picture.shape[1] > 4 * 32
    probes = {line["step"]: line for line in metrics(tmp_path) if "probe/knn_auroc" in line}
    assert set(probes) == {0, 4}
    assert probes[4]["probe/logistic_auroc"] > 0.9  # a bright disc or none: even a small model's features tell
    assert probes[4]["probe/rankme"] >= 1


def test_some_steps_are_traced_without_a_word_of_the_machine(config, tmp_path):
    config.train.steps = 4
    config.log.profile = (2, 2)
    assert pretrain(config, str(tmp_path))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-2-3.json.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    names = {event.get("name", "") for event in json.loads(text)["traceEvents"]}
    assert any("fusion" in name or "dot" in name for name in names)
    for private in (
        socket.gethostname(),
        str(tmp_path),
        str(pathlib.Path(__file__).parents[2]),
        os.path.expanduser("~"),
    ):
        assert private not in text


def test_of_the_steps_to_trace_those_that_a_start_does_are_and_none_are_told_of(config, tmp_path, capsys):
    config.train.steps = 3
    config.log.profile = (2, 5)
    assert pretrain(config, str(tmp_path / "cut"))
    assert [path.name for path in (tmp_path / "cut/profile").iterdir()] == ["steps-2-3.json.gz"]
    resumed = Profile(str(tmp_path), (2, 5))
    assert resumed.between(4, 8) == ""
    for step in range(5, 9):
        resumed.begin(step)
        resumed.end(step, jnp.zeros(step) + 1)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-5-6.json.gz"]
    capsys.readouterr()
    config.log.profile = (4, 2)
    assert pretrain(config, str(tmp_path / "none"))
    assert "log.profile=(4, 2) traces nothing: this start does steps 1 to 3" in capsys.readouterr().err
    assert pretrain(config, str(tmp_path / "none"))
    assert "traces nothing" not in capsys.readouterr().err  # it was finished


@pytest.mark.parametrize("steps", [(2,), (-1, 2), (1.5, 2), (0, 2), (3, 0)])
def test_a_profile_is_of_a_step_and_a_number_of_steps(config, tmp_path, steps):
    with config.unlocked():
        config.log = {**config.log, "profile": steps}
    with pytest.raises(InputError, match=r"config\.log\.profile=.* must be the first step and a number of steps"):
        pretrain(config, str(tmp_path))


def test_paths_in_a_trace_keep_their_last_part():
    text = '{"source":"/home/someone/code/vit.py:12","name":"jit(update)/vit/dot","other":"\\/a\\/b\\/c.py"}'
    assert _ABSOLUTE.sub("", text) == '{"source":"vit.py:12","name":"jit(update)/vit/dot","other":"c.py"}'


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_models_train_on_views_that_are_not_square(config, tmp_path, channels):
    config.model.update(image_size=(32, 48), channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    config.data.channels = channels  # 1: grey frames, repeated on the device
    config.train.steps = 2
    config.log.pictures_every = 2
    assert pretrain(config, str(tmp_path))
    params = open_model(str(tmp_path / "encoder")).params
    assert params["encoder"]["patch_embed"]["kernel"].shape == (8 * 8 * 3, 32)
    assert cv2.imread(str(tmp_path / "reconstructions" / "step_0000002.png")) is not None


def test_pretraining_starts_from_an_encoder(finished, config, tmp_path):
    config.train.steps = 2
    config.init = str(finished[0] / "encoder")
    config.optimizer.learning_rate = 0.0
    assert pretrain(config, str(tmp_path / "second"))
    first, second = (flatten(open_model(str(run / "encoder")).params) for run in (finished[0], tmp_path / "second"))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)
    config.model.width = 64
    config.model.depth = 3
    with pytest.raises(InputError, match=r"another size: add --config\.model\.width=32 --config\.model\.depth=2$"):
        pretrain(config, str(tmp_path / "third"))


BAD = {
    "no path": ({"data.path": ""}, "names no shards"),
    "nothing there": ({"data.path": "/nonexistent/*"}, "no shards match"),
    "no such split": ({"data.split": "tset"}, "no split 'tset'"),
    "patch": ({"model.image_size": (30, 32)}, "not divisible by patch size 8"),
    "image size": ({"model.image_size": (32, 32, 1)}, "one positive integer"),
    "no batch": ({"train.batch_size": 0}, "config.train.batch_size=0 must be 1 or more"),
    "no micro-batches": ({"train.accumulate": 0}, "config.train.accumulate=0 must be 1 or more"),
    "negative depth": ({"model.depth": -1}, "config.model.depth=-1 must be 1 or more"),
    "negative heads": ({"model.num_heads": -3}, "config.model.num_heads=-3 must be 1 or more"),
    "half a range": ({"augment.crop_scale": (0.5,)}, r"config.augment.crop_scale=\(0.5,\) must be two numbers"),
    "never saved": ({"checkpoint.every": 0}, "config.checkpoint.every=0 must be 1 or more"),
    "never logged": ({"log.every": 0}, "config.log.every=0 must be 1 or more"),
    "batch": ({"train.batch_size": 12}, "cannot be divided among 8 devices"),
    "mesh": ({"mesh.fsdp": 3}, "does not lay out 8 devices"),
    "heads": ({"model.num_heads": 5}, "config.model.num_heads=5"),
    "ratio": ({"mask.ratio": 1.0}, "config.mask.ratio"),
    "channels": ({"model.channels": 3}, "config.model.mean"),
    "dtype": ({"model.dtype": "float8"}, "config.model.dtype"),
    "weights": ({"data.weights": (1.0, 2.0)}, "config.data.weights"),
    "no steps": ({"train.steps": 0, "train.epochs": 0}, "0 steps"),
    "probe": ({"probe.data.path": "/nonexistent"}, "config.probe.data.path"),
    "init": ({"init": "/nonexistent"}, "is not an encoder directory"),
    "seed": ({"seed": -1}, "config.seed=-1 must be between 0 and 2147483647"),
    "rate": ({"optimizer.learning_rate": -1.0}, "config.optimizer.learning_rate=-1 must be at least 0"),
    "clipping": ({"optimizer.clip_norm": -1.0}, "config.optimizer.clip_norm=-1 must be at least 0"),
    "warmup": ({"optimizer.warmup": 5.0}, "config.optimizer.warmup=5 must be between 0 and 1"),
    "skipped": ({"train.skip_nonfinite": -1}, "config.train.skip_nonfinite=-1 must be at least 0"),
    "pictures": ({"log.pictures_every": -3}, "config.log.pictures_every=-3 must be at least 0"),
    "steps": ({"train.steps": -5}, "config.train.steps=-5 must be at least 0"),
    "average": ({"train.ema": 1.0}, "config.train.ema=1 must be 0 or a decay below 1"),
    "no decoder": ({"model.decoder_depth": 0}, "config.model.decoder_depth=0 must be 1 or more"),
    "no MLP": ({"model.mlp_ratio": 0.0}, "config.model.mlp_ratio=0 must be larger"),
    "no deviation": ({"model.std": (0.0,)}, r"config.model.std=\(0.0,\) must be above 0"),
    "teacher unused": ({"latent.teacher": "usfmae-tiny"}, "add --config.objective=latent, or leave it out"),
    "share unused": ({"mask.share": 0.1}, "add --config.objective=cross_mae, or leave it out"),
    "teacher": ({"objective": "latent", "latent.teacher": "EMA"}, "or 'ema', the average of the model itself"),
    "interpolation": ({"augment.interpolation": "sinc"}, "config.augment.interpolation"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_compiled(config, tmp_path, name, monkeypatch):
    import usfmae_jax.pretraining.loop as module

    monkeypatch.setattr(module, "compile_update", lambda *a: pytest.fail("compiled before refusing"))
    changes, message = BAD[name]
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        pretrain(config, str(tmp_path / "run"))


def test_a_workdir_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        pretrain(config, str(tmp_path / "file" / "run"))


def test_shards_of_another_schema_are_refused(config, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["text"].bytes_list.value.append(b"hello")
    writer = ArrayRecordWriter(str(tmp_path / "x-train.array_record-00000-of-00001"), "group_size:1")
    writer.write(example.SerializeToString())
    writer.close()
    config.data.path = str(tmp_path)
    with pytest.raises(InputError, match=r"another schema: expected an encoded 'image', found \['text'\]"):
        pretrain(config, str(tmp_path / "run"))


def _halve(step):
    file = max((step / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _turn_a_bit(step):
    file = max((step / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def _metadata(old, new):
    def change(step):
        file = step / "_CHECKPOINT_METADATA"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


DAMAGE = {
    "a bit of the place in the data": (_metadata('"next_batch": 4', '"next_batch": 6'), "its metadata is missing or"),
    "a bit of the seed": (_metadata('"seed": 0', '"seed": 8'), "its metadata is missing or damaged"),
    "a bit of the hash's name": (_metadata('"digest"', '"digesu"'), "its metadata is missing or damaged"),
    "a bit of a name of Orbax's": (_metadata('"item_handlers"', '"item_handlars"'), "its metadata is missing or"),
    "a bit of a parameter": (_turn_a_bit, "its checksum is wrong"),
    "no metadata": (lambda step: (step / "_CHECKPOINT_METADATA").unlink(), "its metadata is missing or damaged"),
    "empty metadata": (lambda step: (step / "_CHECKPOINT_METADATA").write_text(""), "its metadata is missing or"),
    "half of the metadata": (lambda step: (step / "_CHECKPOINT_METADATA").write_text('{"item'), "its metadata is"),
    "nothing in it": (lambda step: (shutil.rmtree(step), step.mkdir()), "it is not complete"),
    "half of the data": (_halve, "OUT_OF_RANGE"),
    "no manifest": (lambda step: (step / "state" / "manifest.ocdbt").unlink(), "NOT_FOUND"),
}


@pytest.fixture(scope="module")
def twice_saved(shards, tmp_path_factory):
    """A run of four steps with checkpoints of two and four, and its config."""
    workdir, config = tmp_path_factory.mktemp("saved"), tiny_config(shards)
    config.train.steps, config.checkpoint.every = 4, 2
    assert pretrain(config, str(workdir))
    return workdir, config


QUICK = ("no metadata", "half of the data", "a bit of a parameter", "a bit of the seed", "a bit of a name of Orbax's")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in DAMAGE if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_a_damaged_checkpoint_is_named_in_one_sentence_with_the_remedy(twice_saved, tmp_path, name):
    damage, reason = DAMAGE[name]
    workdir = shutil.copytree(twice_saved[0], tmp_path / "run")
    damage(workdir / "checkpoints" / "4")
    with pytest.raises(InputError) as error:
        pretrain(twice_saved[1], str(workdir))
    text = str(error.value)
    assert f"checkpoint 4 in {workdir}/checkpoints cannot be loaded: {reason}" in text
    assert "remove that checkpoint to resume from the one before, or add --config.checkpoint.fallback=true" in text
    assert len(text.replace(str(tmp_path), "")) < 400
    if name == "a bit of a parameter":
        return
    shutil.rmtree(workdir / "encoder")
    with pytest.raises(InputError, match=r"checkpoint 4 in .* cannot be read") as error:
        open_model(str(workdir))
    assert len(str(error.value).replace(str(tmp_path), "")) < 400


def test_a_model_is_not_opened_with_a_bit_turned(twice_saved, tmp_path):
    workdir = shutil.copytree(twice_saved[0], tmp_path / "run")
    shutil.rmtree(workdir / "encoder")
    whole = open_model(str(workdir)).fingerprint
    file = max(
        (workdir / "checkpoints" / "4" / "state" / "ocdbt.process_0" / "d").iterdir(),
        key=lambda path: path.stat().st_size,
    )
    data, found = file.read_bytes(), []
    for place in np.linspace(0, len(data) - 1, 40).astype(int):
        damaged = bytearray(data)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        try:
            assert open_model(str(workdir)).fingerprint == whole  # a bit of the optimiser's
        except InputError as error:
            found.append("its checksum is wrong" in str(error))
    assert any(found)


def test_a_run_goes_on_before_a_damaged_checkpoint_if_asked_to(twice_saved, tmp_path, capfd):
    workdir, config = twice_saved[0], twice_saved[1].copy_and_resolve_references()
    config.checkpoint.fallback = True
    copy = shutil.copytree(workdir, tmp_path / "run")
    _halve(copy / "checkpoints" / "4")
    shutil.rmtree(copy / "encoder")
    assert pretrain(config, str(copy))
    said = capfd.readouterr().err
    assert "warning: checkpoint 4 could not be loaded and was moved to damaged_checkpoints/" in said
    assert "resuming after step 2" in said
    assert [path.name for path in (copy / "damaged_checkpoints").iterdir()] == ["4-0"]
    assert open_model(str(copy), 4).fingerprint == open_model(str(workdir), 4).fingerprint
    _halve(copy / "checkpoints" / "4")
    _halve(copy / "checkpoints" / "2")
    with pytest.raises(InputError, match=r"checkpoint 2 in .* there is no earlier one; remove it to start anew"):
        pretrain(config, str(copy))


@pytest.mark.parametrize(
    "damaged", [b"", b'{"stages": [\xff]}', b'{"stages": [5]}', b'{"stages": []}', b"[" * 100_000, None]
)
def test_a_damaged_lineage_is_written_anew_or_refused_when_other_weights_came_before(
    twice_saved, tmp_path, damaged, monkeypatch, capfd
):
    copy = shutil.copytree(twice_saved[0], tmp_path / "run")
    before, lineage = open_model(str(copy)).lineage, copy / "lineage.json"
    lineage.unlink() if damaged is None else lineage.write_bytes(damaged)
    shutil.rmtree(copy / "encoder")
    assert pretrain(twice_saved[1], str(copy))
    assert "warning: lineage.json was missing or damaged and is written anew" in capfd.readouterr().err
    assert open_model(str(copy)).lineage == before
    lineage.unlink() if damaged is None else lineage.write_bytes(damaged)
    with pytest.raises(
        InputError, match=r"lineage\.json, which says where encoder came from, is missing or damaged; put"
    ):
        keep_lineage(str(copy), "encoder", before)


@pytest.mark.parametrize("damaged", ["", "{", "3", '{"loss": "x"}', '{"other": 1}'])
def test_a_damaged_loss_costs_a_checkpoint_its_rank_only(twice_saved, tmp_path, damaged, capfd):
    copy = shutil.copytree(twice_saved[0], tmp_path / "run")
    (copy / "checkpoints" / "2" / "metrics" / "metrics").write_text(damaged)
    assert pretrain(twice_saved[1], str(copy))
    assert "already finished" in capfd.readouterr().err
