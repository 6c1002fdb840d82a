"""One process at a time in a folder."""

import multiprocessing
import os
import signal

import pytest

from data_prep import build, locks
from usfmae_jax.errors import InputError


def hold_and_die(folder):
    with locks.hold(folder, "taken"):
        os.kill(os.getpid(), signal.SIGKILL)


def hold_until_told(folder, pipe):
    with locks.hold(folder, "taken"):
        pipe.send("held")
        pipe.recv()


def test_a_folder_is_held_by_one_process_and_then_by_the_next_and_nothing_is_left(tmp_path):
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=hold_until_told, args=(tmp_path, there))
    process.start()
    assert here.recv() == "held"
    with pytest.raises(InputError, match="taken"), locks.hold(tmp_path, "taken"):
        pass
    here.send("done")
    process.join()
    with locks.hold(tmp_path, "taken"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_a_crash_left_holds_nobody_up(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with locks.hold(tmp_path, "taken"):
        pass
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_locked_work_goes_on(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with locks.hold(tmp_path, "taken"), locks.hold(tmp_path, "taken"):
        (tmp_path / "work").touch()
    assert (tmp_path / "work").exists()


def test_a_second_build_of_the_same_dataset_is_refused_and_what_a_crash_left_is_not_in_the_way(tmp_path, capsys):
    words = [
        "--dataset=phantom",
        "--patients=4",
        "--frames=1",
        "--image_size=32",
        "--workers=1",
        f"--output={tmp_path}",
    ]
    (tmp_path / "phantom").mkdir()
    with locks.hold(tmp_path / "phantom", "taken"):
        assert build.main(words) == 2
    assert "error: another build is writing to" in capsys.readouterr().err
    (tmp_path / "phantom" / ".lock").touch()
    assert build.main(words) == 0
