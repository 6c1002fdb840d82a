"""Members in processes of their own: what becomes of them when one of them, or the parent, comes to an end."""

import functools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from tests.pretraining.runs import environment
from usfmae_jax.errors import InputError
from usfmae_jax.finetuning import side_by_side
from usfmae_jax.training.monitor import DivergedError, Preemption


def work(folder, members, line):
    """Does what the members are named after."""
    with Preemption() as preemption:
        for member in members:
            pathlib.Path(folder, f"{member.name}-{os.environ['NPROC']}").write_text(str(os.getpid()))
            while member.name in ("diverge", "die") and not list(pathlib.Path(folder).glob("wait*")):
                time.sleep(0.05)
            if member.name == "diverge":
                raise DivergedError("loss is nan at step 3")
            if member.name == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            while member.name == "wait" and not preemption.requested():
                time.sleep(0.05)
            if preemption.requested():
                pathlib.Path(folder, "saved").touch()
                return False
    return True


@pytest.fixture
def quick_start(monkeypatch):
    """Processes from one that has imported JAX, rather than each importing it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)


def _members(names):
    return [types.SimpleNamespace(name=name) for name in names]


def _done(folder):
    return {file.name for file in folder.iterdir()}


def test_a_member_has_the_same_threads_after_a_restart(quick_start, tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "_cores", lambda: 6)
    assert side_by_side.train(functools.partial(work, tmp_path), _members("abc"), 3)
    assert _done(tmp_path) == {"a-2", "b-2", "c-2"}
    assert side_by_side.train(functools.partial(work, tmp_path), _members("d"), 3)
    assert "d-2" in _done(tmp_path)


@pytest.mark.parametrize(
    ("members", "cores", "processes"), [(5, 1, 1), (4, 2, 2), (5, 2, 3), (5, 4, 5), (5, 16, 5), (1, 8, 1), (10, 4, 5)]
)
def test_the_fewest_processes_that_keep_all_cores_busy(members, cores, processes):
    assert side_by_side.quickest(members, cores) == processes


def test_an_error_of_one_process_is_raised_and_the_others_save(quick_start, tmp_path):
    with pytest.raises(DivergedError, match="nan at step 3"):
        side_by_side.train(functools.partial(work, tmp_path), _members(["wait", "diverge"]), 2)
    assert "saved" in _done(tmp_path)


def test_a_process_that_dies_is_spoken_of(quick_start, tmp_path):
    with pytest.raises(RuntimeError, match=r"status -9.*config\.parallel=1"):
        side_by_side.train(functools.partial(work, tmp_path), _members(["wait", "die"]), 2)
    assert "saved" in _done(tmp_path)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGINT, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow),
    ],
)
def test_whatever_ends_the_parent_has_the_others_save(tmp_path, number, code):
    script = (
        "import functools\n"
        "from tests.finetuning import test_side_by_side as t\n"
        "if __name__ == '__main__':\n"
        f"    work = functools.partial(t.work, {str(tmp_path)!r})\n"
        "    done = t.side_by_side.train(work, t._members(['wait', 'wait']), 2)\n"
        "    raise SystemExit(0 if done else 75)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=environment() | {"PYTHONPATH": "."}, start_new_session=True
    )
    _wait_for(lambda: any(name.startswith("wait") for name in _done(tmp_path)))
    (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
    assert parent.wait(timeout=60) == code
    _wait_for(lambda: "saved" in _done(tmp_path))


def test_several_at_a_time_need_one_cpu_device():
    mesh = types.SimpleNamespace(size=8)
    with pytest.raises(InputError, match=r"config\.parallel=2 is for a CPU"):
        side_by_side.check(2, mesh)
    side_by_side.check(0, mesh)


def _wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
