"""The loop end to end: what it leaves, how it stops, and that a resumed run is the undisturbed run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from tests.helpers import write_shards
from usfmae_jax.errors import InputError
from usfmae_jax.interop.encoder import flatten, read_encoder
from usfmae_jax.training.monitor import DivergedError
from usfmae_jax.training.pretrain import pretrain

TINY = {
    "model.image_size": 32, "model.width": 32, "model.depth": 2, "model.num_heads": 2, "model.decoder_width": 16,
    "model.decoder_depth": 1, "model.decoder_num_heads": 2, "train.batch_size": 8, "train.steps": 12, "data.workers": 0,
    "checkpoint.every": 3, "log.every": 1, "log.pictures_every": 0, "probe.data.path": "",
}  # fmt: skip


def _command(shards, workdir, *flags, **overrides):
    fields = TINY | {"data.path": shards} | {k.replace("__", "."): v for k, v in overrides.items()}
    overriding = [f"--config.{name}={value}" for name, value in fields.items()]
    script = [sys.executable, "-m", "usfmae_jax.main", "--config=configs/pretrain.py:demo", f"--workdir={workdir}"]
    return [*script, *overriding, *flags]


def _environment(devices=1):
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def _run(shards, workdir, devices=1, **overrides):
    return subprocess.run(
        _command(shards, workdir, **overrides), env=_environment(devices), capture_output=True, text=True, timeout=300
    )


def _metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _losses(workdir):
    return {line["step"]: line["loss"] for line in _metrics(workdir) if "loss" in line}


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = _run(shards, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stderr


def _assert_bitwise_equal(workdir, other):
    ours, theirs = flatten(read_encoder(str(workdir / "encoder"))[0]), flatten(read_encoder(str(other / "encoder"))[0])
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert _losses(workdir) == _losses(other)


def test_a_run_leaves_an_encoder_logs_and_checkpoints(undisturbed):
    workdir, _ = undisturbed
    params, architecture, preprocessing = read_encoder(str(workdir / "encoder"))
    assert architecture["width"] == 32
    assert params["patch_embed"]["kernel"].shape == (64, 32)
    assert preprocessing["mean"]
    assert sorted(_losses(workdir)) == list(range(1, 13))
    names = set(_metrics(workdir)[-1])
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "images_per_second",
        "images_per_second_per_device",
        "input_wait",
    } <= names
    mean_loss = {last: np.mean([_losses(workdir)[last - i] for i in range(3)]) for last in (3, 6, 9, 12)}
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir()}
    assert kept == {9, 12, min(mean_loss, key=mean_loss.get)}  # the two latest and the best
    assert list((workdir / "tensorboard").glob("events.*"))


def test_the_terminal_says_what_a_person_wants_to_know(undisturbed):
    text = undisturbed[1]
    for expected in ("encoder/blocks/stack/fc1/kernel", "Total:", "compiling the training step took", "img/s", "loss="):
        assert expected in text


def test_no_absolute_path_leaks_into_what_a_run_leaves(undisturbed, shards):
    workdir, _ = undisturbed
    # Orbax writes where it is into its own marker of a complete checkpoint.
    files = [file for file in workdir.rglob("*") if file.is_file() and file.name != "commit_success.txt"]
    assert len(files) > 10
    for file in files:
        for path in (shards, workdir, os.path.expanduser("~")):
            assert str(path).encode() not in file.read_bytes(), file


def test_a_run_killed_again_and_again_ends_bitwise_as_the_undisturbed_run(undisturbed, shards, tmp_path):
    for after in (2, 4, 8):  # between, during and right after checkpoints at every third step
        process = subprocess.Popen(_command(shards, tmp_path), env=_environment(), stderr=subprocess.DEVNULL)
        while process.poll() is None and max(_losses_or_none(tmp_path)) < after:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = _run(shards, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    _assert_bitwise_equal(tmp_path, undisturbed[0])


def _losses_or_none(workdir):
    try:
        return [0, *_losses(workdir)]
    except (ValueError, OSError):  # half a line, or no file yet
        return [0]


def test_sigterm_saves_exits_75_and_resumes_bitwise(undisturbed, shards, tmp_path):
    process = subprocess.Popen(_command(shards, tmp_path), env=_environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and max(_losses_or_none(tmp_path)) < 1:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "stopped at step" in text
    stopped = int(text.split("stopped at step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
    assert _run(shards, tmp_path).returncode == 0
    _assert_bitwise_equal(tmp_path, undisturbed[0])


def test_a_checkpoint_opens_on_another_number_of_devices(undisturbed, shards, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    resumed = _run(shards, tmp_path, devices=8, mesh__fsdp=4)
    assert "resuming after step 9" in resumed.stderr
    expected, losses = _losses(undisturbed[0]), _losses(tmp_path)
    np.testing.assert_allclose([losses[s] for s in (10, 11, 12)], [expected[s] for s in (10, 11, 12)], rtol=1e-4)


def _start_two_processes(shards, workdir, **overrides):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    return [
        subprocess.Popen(
            _command(shards, workdir, *flags, f"--process_id={i}", mesh__fsdp=2, **overrides),
            env=_environment(2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def test_two_processes_compute_what_one_does(undisturbed, shards, tmp_path):
    processes = _start_two_processes(shards, tmp_path)
    texts = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    np.testing.assert_allclose(list(_losses(tmp_path).values()), list(_losses(undisturbed[0]).values()), rtol=1e-4)
    assert "step/s" not in texts[1]  # one bar, one table, from process 0
    _assert_close(tmp_path, undisturbed[0])


def _assert_close(workdir, other):
    ours, theirs = flatten(read_encoder(str(workdir / "encoder"))[0]), flatten(read_encoder(str(other / "encoder"))[0])
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-3, err_msg=name)


def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(shards, tmp_path):
    processes = _start_two_processes(shards, tmp_path, train__steps=100_000, checkpoint__every=100_000)
    while all(process.poll() is None for process in processes) and max(_losses_or_none(tmp_path)) < 2:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], texts
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert f"stopped at step {checkpoint.name} of 100000" in texts[0]


def test_non_finite_loss_names_the_step_and_keeps_the_last_good_checkpoint(config, tmp_path):
    config.optimizer.update(learning_rate=1e12, warmup=0.0)
    config.checkpoint.every = 1
    with pytest.raises(DivergedError, match=r"(loss|grad_norm) is (nan|inf) at step \d+"):
        pretrain(config, str(tmp_path))
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept
    assert all(np.isfinite(_losses(tmp_path)[step]) for step in kept)


def test_resuming_with_another_config_names_the_fields(config, tmp_path):
    config.train.steps = 2
    config.checkpoint.every = 2
    assert pretrain(config, str(tmp_path))
    config.optimizer.learning_rate = 0.5
    config.mask.ratio = 0.5
    config.mesh.fsdp = 2  # may change
    with pytest.raises(InputError) as error:
        pretrain(config, str(tmp_path))
    assert "mask.ratio is 0.5 but was 0.75" in str(error.value)
    assert "optimizer.learning_rate is 0.5 but was" in str(error.value)
    assert "mesh" not in str(error.value)


def test_a_finished_run_is_not_run_again(config, tmp_path, capfd):
    config.train.steps = 2
    assert pretrain(config, str(tmp_path))
    capfd.readouterr()
    assert pretrain(config, str(tmp_path))
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
    probes = {line["step"]: line for line in _metrics(tmp_path) if "probe/knn_auroc" in line}
    assert set(probes) == {0, 4}
    assert probes[4]["probe/logistic_auroc"] > 0.9  # a bright disc or none: even a small model's features tell
    assert probes[4]["probe/rankme"] >= 1


def test_pretraining_starts_from_an_encoder(config, tmp_path):
    config.train.steps = 2
    assert pretrain(config, str(tmp_path / "first"))
    config.init = str(tmp_path / "first" / "encoder")
    config.optimizer.learning_rate = 0.0
    assert pretrain(config, str(tmp_path / "second"))
    first, second = (flatten(read_encoder(str(tmp_path / run / "encoder"))[0]) for run in ("first", "second"))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)
    config.model.width = 64
    with pytest.raises(InputError, match=r"is .* there and .* in this config"):
        pretrain(config, str(tmp_path / "third"))


BAD = {
    "no path": ({"data.path": ""}, "names no shards"),
    "nothing there": ({"data.path": "/nonexistent/*"}, "no shards match"),
    "no such split": ({"data.split": "tset"}, "no split 'tset'"),
    "patch": ({"model.image_size": 30}, "not divisible by patch size 8"),
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
    "interpolation": ({"augment.interpolation": "sinc"}, "config.augment.interpolation"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_compiled(config, tmp_path, name, monkeypatch):
    import usfmae_jax.training.pretrain as module

    monkeypatch.setattr(module, "compile_step", lambda *a: pytest.fail("compiled before refusing"))
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


def test_the_door_exits_2_with_one_sentence(shards, tmp_path):
    done = _run(shards, tmp_path, model__image_size=30)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
