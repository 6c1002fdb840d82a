"""A working directory that cannot be written, or goes away in the middle, ends a run with one sentence."""

import shutil
import subprocess
import time

import pytest

from data_prep import build
from data_prep.write import dataset, parts
from tests.helpers import tiny_config
from usfmae_jax import cli
from usfmae_jax.cli import load_config
from usfmae_jax.errors import BAD_INPUT, FAILED, answer
from usfmae_jax.finetuning.loop import finetune
from usfmae_jax.interop.model import open_model
from usfmae_jax.pretraining.loop import pretrain
from usfmae_jax.probing.loop import evaluate
from usfmae_jax.training import monitor


def run(config, workdir, loop=pretrain):
    def act():
        with cli.alone_in(str(workdir)):
            return cli.train(lambda: loop(config, str(workdir)), "")

    return answer(act)


def said(capfd):
    """The one sentence that a run ended with."""
    text = capfd.readouterr().err
    assert "Traceback" not in text
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return error


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    while not subprocess.run(["umount", "-l", folder], capture_output=True).returncode:
        pass


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    workdir, config = tmp_path_factory.mktemp("undisturbed"), tiny_config(shards)
    config.train.steps, config.checkpoint.every = 6, 2
    assert run(config, workdir) == 0
    return open_model(str(workdir)).fingerprint


def mount_read_only(folder):
    """From now on what is opened by its name in `folder` cannot be written; what was open before still can."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def at_step(monkeypatch, step, workdir, action):
    """Has something happen in the middle of a run: when it has made a step, and its first checkpoint is written."""
    update = monitor.Monitor.update

    def updated(self, number, metrics):
        if number == step:
            end = time.monotonic() + 60
            while not (workdir / "checkpoints" / "2").exists() and time.monotonic() < end:
                time.sleep(0.01)
            action()
        update(self, number, metrics)

    monkeypatch.setattr(monitor.Monitor, "update", updated)


def test_a_workdir_on_a_read_only_file_system_is_refused_by_every_door(disk, shards, config, capfd):
    mount_read_only(disk)
    finetuning, evaluation = load_config("configs/finetune.py:folder"), load_config("configs/evaluate.py:folder")
    evaluation.checkpoint = "pixels"
    for loop, how in ((pretrain, config), (finetune, finetuning), (evaluate, evaluation)):
        how.data.path = shards
        assert run(how, disk / "run", loop) == BAD_INPUT
        assert said(capfd) == f"error: --workdir={disk}/run cannot be written: Read-only file system"
    assert build.main(["--dataset=phantom", "--patients=4", f"--output={disk}/data"]) == BAD_INPUT
    assert said(capfd).startswith("error: Read-only file system")


@pytest.mark.slow
def test_a_workdir_that_becomes_read_only_ends_the_run_which_goes_on_later(
    disk, config, monkeypatch, capfd, undisturbed
):
    config.train.steps, config.checkpoint.every = 6, 2
    at_step(monkeypatch, 4, disk / "run", lambda: mount_read_only(disk))
    assert run(config, disk / "run") == BAD_INPUT
    assert said(capfd).startswith("error: Read-only file system")
    monkeypatch.undo()
    subprocess.run(["umount", "-l", disk], check=True)
    assert run(config, disk / "run") == 0
    assert "resuming after step 2" in capfd.readouterr().err
    assert open_model(str(disk / "run")).fingerprint == undisturbed


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("replaced", "unmounted")]


@pytest.mark.parametrize("how", ["removed", *SLOW])
def test_a_workdir_that_vanishes_ends_the_run_which_goes_on_when_it_is_back(
    disk, config, tmp_path, monkeypatch, capfd, undisturbed, how
):
    config.train.steps, config.checkpoint.every = 6, 2
    workdir, aside = disk / "run", tmp_path / "aside" if how == "unmounted" else disk / "aside"

    def move(there, here):
        if how == "unmounted":
            here.mkdir(exist_ok=True)
            subprocess.run(["mount", "--move", there, here], check=True)
        else:
            there.rename(here)

    def vanish():
        move(disk, aside) if how == "unmounted" else move(workdir, aside)
        if how == "replaced":
            workdir.mkdir()

    at_step(monkeypatch, 4, workdir, vanish)
    assert run(config, workdir) == FAILED
    assert said(capfd).startswith(f"error: --workdir={workdir} vanished while the run was at work, or another folder")
    monkeypatch.undo()
    shutil.rmtree(workdir, ignore_errors=True)
    move(aside, disk) if how == "unmounted" else move(aside, workdir)
    assert run(config, workdir) == 0
    assert "resuming after step" in capfd.readouterr().err
    assert open_model(str(workdir)).fingerprint == undisturbed


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "index.html", "config.json"])
def test_what_is_in_the_way_of_a_file_or_folder_is_one_sentence(config, tmp_path, capfd, name):
    config.train.steps, workdir = 2, tmp_path / "run"
    workdir.mkdir()
    (workdir / name).mkdir() if "." in name else (workdir / name).touch()
    assert run(config, workdir) == BAD_INPUT
    kind = ("folder", "file") if "." in name else ("file", "folder")
    assert f"{workdir / name} is a {kind[0]}, " in (text := said(capfd))
    assert f"a {kind[1]} " in text
    assert "move it away" in text


@pytest.mark.parametrize("how", ["removed", "read-only"])
def test_an_output_that_vanishes_ends_a_build_with_one_sentence(disk, monkeypatch, capfd, how):
    flags = ["--dataset=phantom", "--patients=8", "--frames=1", "--image_size=64", "--workers=1", f"--output={disk}/o"]
    made = parts.run_here

    def interrupted(*args, **kwargs):
        for number, one in enumerate(made(*args, **kwargs)):
            if number == 2:
                shutil.rmtree(disk / "o") if how == "removed" else mount_read_only(disk)
            yield one

    monkeypatch.setattr(dataset.parts, "run_here", interrupted)
    assert build.main(flags) == BAD_INPUT
    assert said(capfd)
    monkeypatch.undo()
    subprocess.run(["umount", "-l", disk], check=True) if how == "read-only" else None
    assert build.main(flags) == 0
