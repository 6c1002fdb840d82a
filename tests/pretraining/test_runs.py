"""Whole runs through the door: what they leave, and that however they are interrupted, nothing changes."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.pretraining.runs import command, environment, losses, losses_or_none, metrics, run
from usfmae_jax.interop.model import flatten, open_model


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = run(shards, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stderr


def _assert_bitwise_equal(workdir, other):
    ours, theirs = (flatten(open_model(str(run / "encoder")).params) for run in (workdir, other))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert losses(workdir) == losses(other)


def test_a_run_leaves_an_encoder_logs_and_checkpoints(undisturbed):
    workdir, _ = undisturbed
    model = open_model(str(workdir / "encoder"))
    assert model.description["encoder"]["width"] == 32
    assert model.params["encoder"]["patch_embed"]["kernel"].shape == (64, 32)
    assert model.preprocessing["mean"]
    assert sorted(losses(workdir)) == list(range(1, 13))
    names = set(metrics(workdir)[-1])
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "images_per_second",
        "images_per_second_per_device",
        "input_wait",
    } <= names
    mean_loss = {last: np.mean([losses(workdir)[last - i] for i in range(3)]) for last in (3, 6, 9, 12)}
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir()}
    assert kept == {9, 12, min(mean_loss, key=mean_loss.get)}  # the two latest and the best
    assert list((workdir / "tensorboard").glob("events.*"))


def test_the_terminal_says_what_a_person_wants_to_know(undisturbed):
    text = undisturbed[1]
    for expected in ("Total: ", " parameters\n", "compiling the training step took", "img/s", "loss="):
        assert expected in text
    assert "encoder/blocks" not in text  # the total is enough: no table of every array


def test_no_absolute_path_leaks_into_what_a_run_leaves(undisturbed, shards):
    workdir, _ = undisturbed
    files = [file for file in workdir.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        for path in (shards, workdir, os.path.expanduser("~")):
            assert str(path).encode() not in file.read_bytes(), file


@pytest.mark.parametrize("kills", [(8,), pytest.param((2, 4, 8), marks=pytest.mark.slow)], ids=len)
def test_a_run_killed_again_and_again_ends_bitwise_as_the_undisturbed_run(undisturbed, shards, tmp_path, kills):
    for after in kills:  # between, during and right after checkpoints at every third step
        process = subprocess.Popen(command(shards, tmp_path), env=environment(), stderr=subprocess.DEVNULL)
        while process.poll() is None and max(losses_or_none(tmp_path)) < after:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(shards, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    _assert_bitwise_equal(tmp_path, undisturbed[0])


def test_sigterm_saves_exits_75_and_resumes_bitwise(undisturbed, shards, tmp_path):
    process = subprocess.Popen(command(shards, tmp_path), env=environment(), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "compiling the training step ..." in line:  # before the first step: too early to be too late
            break
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 75, text
    stopped = int(text.split("stopped at step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
    assert run(shards, tmp_path).returncode == 0
    _assert_bitwise_equal(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_worker_processes_change_nothing_and_leave_nothing(undisturbed, shards, tmp_path):
    done = run(shards, tmp_path, data__workers=2)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    _assert_bitwise_equal(tmp_path, undisturbed[0])


def test_a_checkpoint_opens_on_another_number_of_devices(undisturbed, shards, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    resumed = run(shards, tmp_path, devices=8, mesh__fsdp=4)
    assert "resuming after step 9" in resumed.stderr
    expected, found = losses(undisturbed[0]), losses(tmp_path)
    np.testing.assert_allclose([found[s] for s in (10, 11, 12)], [expected[s] for s in (10, 11, 12)], rtol=1e-4)


def test_the_door_exits_2_with_one_sentence(shards, tmp_path):
    done = run(shards, tmp_path, model__image_size=30)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
