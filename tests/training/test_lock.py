"""One run at a time in a workdir, whatever became of the one before."""

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest

from tests.pretraining.runs import command, environment
from usfmae_jax.errors import InputError
from usfmae_jax.training import lock


def hold(workdir, pipe):
    with lock.hold(workdir):
        pipe.send("held")
        pipe.recv()


def start(workdir):
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(str(workdir), there))
    process.start()
    assert here.recv() == "held"
    return process, here


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_RENEWED", 0.05)
    monkeypatch.setattr(lock, "_WATCHED", 0.5)


def test_a_second_run_is_refused_and_the_next_is_not_and_nothing_is_left(tmp_path):
    process, pipe = start(tmp_path / "a/b")
    begun = time.monotonic()
    with (
        pytest.raises(InputError, match=r"another run is at work in --workdir=.*a/b; wait"),
        lock.hold(f"{tmp_path}/a/b"),
    ):
        pass
    assert time.monotonic() - begun < 2
    pipe.send("done")
    process.join()
    assert not list(tmp_path.iterdir())
    with lock.hold(str(tmp_path)), pytest.raises(InputError), lock.hold(str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_holds_nobody_up_and_names_no_machine(tmp_path):
    process, _ = start(tmp_path)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = (tmp_path / lock.NAME).read_text()
    assert json.loads(left)["process"] == process.pid
    assert os.uname().nodename not in left
    begun = time.monotonic()
    with lock.hold(str(tmp_path)):
        assert time.monotonic() - begun < 2


def other_machine(path, stop, renew):
    """A run elsewhere, on a file system whose locks each machine has for itself."""
    renewed = 0
    while not stop.is_set():
        path.write_text(json.dumps({"machine": "another", "process": 1, "renewed": renewed}))
        renewed += renew
        time.sleep(0.05)


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_on_another_machine_is_told_from_what_it_left_by_its_note(tmp_path, quick, alive):
    stop = threading.Event()
    thread = threading.Thread(target=other_machine, args=(tmp_path / lock.NAME, stop, int(alive)))
    thread.start()
    time.sleep(0.2)
    if not alive:
        stop.set()
        thread.join()
    begun = time.monotonic()
    if alive:
        with pytest.raises(InputError, match="another run"), lock.hold(str(tmp_path)):
            pass
        stop.set()
        thread.join()
    else:
        with lock.hold(str(tmp_path)):
            assert time.monotonic() - begun >= 0.5


NOTES = ["", "{", "[1]", '{"machine": 1}', "\0" * 100, "[" * 100_000]
NOTES += [f'{{"machine": "{lock._machine()}", "process": {number}, "renewed": 0}}' for number in ('"1"', 10**30)]


@pytest.mark.parametrize("left", NOTES, ids=lambda left: left[:20])
def test_a_note_that_nobody_can_read_holds_nobody_up(tmp_path, left):
    (tmp_path / lock.NAME).write_text(left)
    begun = time.monotonic()
    with lock.hold(str(tmp_path)):
        assert time.monotonic() - begun < lock._WATCHED  # nobody is waited for
    assert not (tmp_path / lock.NAME).exists()


def test_where_nothing_can_be_locked_the_note_decides(tmp_path, quick, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with lock.hold(str(tmp_path)):
        time.sleep(0.2)
        monkeypatch.setattr(lock, "_ended", lambda _: False)
        with pytest.raises(InputError, match="another run"), lock.hold(str(tmp_path)):
            pass
        assert (tmp_path / lock.NAME).exists()


def test_buckets_and_folders_that_cannot_be_written_are_not_held(tmp_path):
    with lock.hold("gs://bucket/run"):
        assert not list(tmp_path.iterdir())
        with lock.hold(str(tmp_path)):
            assert (tmp_path / lock.NAME).exists()
    (tmp_path / "file").write_text("")
    with lock.hold(str(tmp_path / "file")):
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def door_words(door, shards, workdir):
    words = command(shards, workdir)
    if door == "main":
        return words
    config = {"finetune": "configs/finetune.py", "evaluate": "configs/evaluate.py"}[door]
    return [words[0], "-m", f"usfmae_jax.{door}", f"--config={config}", f"--workdir={workdir}"]


@pytest.mark.slow
@pytest.mark.parametrize("door", ["main", "finetune", "evaluate"])
def test_no_door_is_held_up_by_what_a_crash_left(tmp_path, door):
    process, _ = start(tmp_path)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / lock.NAME).exists()
    words = door_words(door, "/nonexistent", tmp_path)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert "another run" not in done.stderr
    assert done.returncode == 2  # there are no shards: that far it came


@pytest.mark.parametrize("door", ["main", "finetune", "evaluate"])
def test_every_door_refuses_a_workdir_that_is_held(tmp_path, shards, door):
    with lock.hold(str(tmp_path)):
        done = subprocess.run(
            door_words(door, shards, tmp_path), env=environment(), capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: another run is at work in --workdir=")
