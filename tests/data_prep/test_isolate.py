"""A pool of processes that outlives what its workers meet."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from data_prep import isolate
from tests.data_prep.builds import ROOT, refused
from usfmae_jax.errors import NO_GUARD, InputError


def run(function, tasks, workers=2, limit=30.0):
    return dict(isolate.isolated_map(function, tasks, workers, limit=limit, preload="data_prep.isolate"))


def double(task, given_up, begin):
    begin(0)
    return 2 * task


def dangerous(task, given_up, begin):
    """Inputs are words; answers which were read and which were given up."""
    read = []
    for number, word in enumerate(task):
        if number in given_up:
            continue
        begin(number)
        if word == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "exit":
            os._exit(3)
        if word == "stall":
            time.sleep(1000)
        read.append(word)
    return read, dict(given_up)


def fails(task, given_up, begin):
    raise OSError(28, "No space left on device")


def never_begins(task, given_up, begin):
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_answered_once(workers):
    assert run(double, range(20), workers) == {number: 2 * number for number in range(20)}


def test_no_task_is_no_work():
    assert run(double, []) == {}


def test_an_input_that_crashes_its_reader_is_given_up_by_name_and_the_rest_is_read():
    answers = run(dangerous, [["a", "crash", "b"], ["c", "exit"], ["d"]])
    assert answers == {
        0: (["a", "b"], {1: "crashed its reader (SIGSEGV)"}),
        1: (["c"], {1: "crashed its reader (status 3)"}),
        2: (["d"], {}),
    }


def test_an_input_that_stalls_is_given_up_after_the_limit():
    assert run(dangerous, [["a", "stall", "b"]], limit=1.0)[0] == (["a", "b"], {1: "took longer than 1 s"})


def test_an_error_of_the_machine_is_raised():
    with pytest.raises(OSError, match="No space left"):
        run(fails, [1])


def test_workers_that_die_before_they_begin_end_the_map():
    with pytest.raises(InputError, match="use fewer --workers"):
        run(never_begins, [1])


@pytest.mark.parametrize(
    "call",
    [
        "data_prep.isolate.isolated_map(len, ['a', 'b', 'c'], 2, limit=30, preload='data_prep.isolate')",
        pytest.param("[usfmae_jax.finetuning.side_by_side.train(print, [1, 2], 2)]", marks=pytest.mark.slow),
        pytest.param(
            "usfmae_jax.data.pipeline.iterate(grain.MapDataset.range(100).batch(2), 0, workers=1)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_script_without_a_main_guard_is_told_so_once(tmp_path, call):
    script, module = tmp_path / "script.py", call.strip("[").rpartition("(")[0].partition("(")[0].rpartition(".")[0]
    flags = "from absl import flags\nimport grain\nflags.FLAGS.mark_as_parsed()\n" * ("grain" in call)
    script.write_text(f"{flags}import {module}\nlist({call})\n")
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=there, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count(NO_GUARD) == 1
    assert done.stderr.splitlines()[-1].endswith(NO_GUARD)


def test_a_build_begins_nothing_where_a_process_still_imports_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    assert 'below `if __name__ == "__main__":`' in refused(capsys, dataset="phantom", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
