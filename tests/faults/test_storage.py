"""A disk that is full or gone ends a run with one sentence, and the run goes on when there is room again."""

import os
import subprocess

import pytest

from usfmae_jax import cli, files
from usfmae_jax.errors import BAD_INPUT, answer, storage_fault
from usfmae_jax.interop.model import open_model
from usfmae_jax.pretraining.loop import pretrain


def run(config, workdir):
    return answer(lambda: cli.train(lambda: pretrain(config, str(workdir)), ""))


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for logs, and not for checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_at_a_checkpoint_is_one_sentence_and_the_run_goes_on(config, small_disk, tmp_path, capfd):
    config.train.steps, config.checkpoint.every = 6, 2
    assert run(config, small_disk / "run") == BAD_INPUT
    said = capfd.readouterr().err
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: No space left on device (")
    assert errors[0].endswith("make room, and the same command goes on from what was saved last")
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert run(config, small_disk / "run") == 0
    assert run(config, tmp_path / "undisturbed") == 0
    ends = [open_model(str(path)).fingerprint for path in (small_disk / "run", tmp_path / "undisturbed")]
    assert ends[0] == ends[1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_disk_that_is_full_at_a_small_file_is_one_sentence(config, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.incomplete").symlink_to("/dev/full")
    assert run(config, tmp_path / "run") == BAD_INPUT
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: No space left on device")
    assert not (tmp_path / "run" / "config.json").exists()  # a later start would read what there is of it


def test_a_file_is_written_whole_or_stays_what_it_was(tmp_path):
    path = tmp_path / "config.json"
    files.write(path, "before")
    (tmp_path / "config.json.incomplete").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.write(path, "after")
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "a/b"), "No space left on device (a/b); make room"),
        (OSError(30, "Read-only file system", "a"), "Read-only file system (a); make it writable again"),
        (OSError(116, "Stale file handle"), "Stale file handle; make it writable again"),
        (ValueError('RESOURCE_EXHAUSTED: Failed writing: "x/2": No space left on device [os]'), "device (x/2); make"),
        (OSError(2, "No such file or directory", "a"), ""),
        (ValueError("something else"), ""),
    ],
    ids=str,
)
def test_faults_of_disks_are_told_from_others(error, said):
    outer = RuntimeError("saving failed")
    outer.__cause__ = error
    assert said in storage_fault(outer)
    assert bool(said) == bool(storage_fault(outer))
