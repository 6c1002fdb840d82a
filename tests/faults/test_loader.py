"""What loads images is killed or hangs: the run ends in bounded time with one sentence, and goes on bitwise."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.pretraining.runs import command, environment, losses, losses_or_none, run
from usfmae_jax.data import augment, pipeline
from usfmae_jax.errors import FAILED, FaultError
from usfmae_jax.interop.model import open_model


def batches(shards, workers):
    sources = pipeline.open_sources(shards, "train")
    load = pipeline.LoadView(pipeline.all_rows(sources), (32, 32), 1, augment.Augmentation())
    return pipeline.iterate(pipeline.training_batches(load, batch_size=8, seed=0), 0, workers, threads=2)


def exhaust(iterator, seconds=60):
    """Takes what comes; returns what it ends with, in words."""
    end = time.monotonic() + seconds
    with pytest.raises(FaultError) as error:
        collections.deque(itertools.takewhile(lambda _: time.monotonic() < end, iterator), maxlen=0)
    assert time.monotonic() < end
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stalled"])
def test_a_worker_that_is_killed_or_stalled_ends_the_batches_and_no_worker_is_left(shards, monkeypatch, number):
    taken = batches(shards, 1)
    next(taken)
    monkeypatch.setattr(pipeline, "PATIENCE", 2.0)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, number)
    said = exhaust(taken)
    expected = r"was killed (status -9)" if number == signal.SIGKILL else "no images came for 2 s"
    assert expected in said
    assert "the same command goes on from the last checkpoint" in said
    worker.join(10)
    assert not multiprocessing.active_children()


def test_a_decoding_that_hangs_ends_the_batches(shards, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(pipeline, "PATIENCE", 0.3)
    monkeypatch.setattr(pipeline, "decode_image", lambda *_: release.wait())
    try:
        assert "no images came for 0.3 s" in exhaust(batches(shards, 0))
        assert "no images came for 0.3 s" in exhaust(pipeline.decode_ahead(lambda _: release.wait(), range(3), 1, 4))
    finally:
        release.set()


def test_a_time_out_of_what_is_loaded_is_not_taken_for_one_that_hangs():
    def load(_):
        raise TimeoutError("of the storage")

    with pytest.raises(TimeoutError, match="of the storage"):
        next(pipeline.decode_ahead(load, range(3), 1, 4))


#: A door with a short patience, slow enough to be hit in the middle; of decoding in threads, that hangs at some image.
IMPATIENT = """
import runpy, time
from usfmae_jax.data import pipeline
from usfmae_jax.training import monitor
decode, seen, update = pipeline.decode_image, [], monitor.Monitor.update
def hanging(*args):
    seen.append(1)
    if len(seen) > {most}:
        time.sleep(10_000)
    return decode(*args)
def slow(report, number, metrics):
    time.sleep(0.1)
    pipeline.PATIENCE = 6.0  # the start of the workers takes longer
    update(report, number, metrics)
pipeline.decode_image, monitor.Monitor.update = hanging, slow
runpy.run_module("usfmae_jax.main", run_name="__main__")
"""


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert run(shards, workdir, train__steps=40).returncode == 0
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stalled", "a thread hangs"])
def test_a_run_whose_loading_fails_ends_with_one_sentence_and_goes_on_bitwise(shards, undisturbed, tmp_path, how):
    in_thread = how == "a thread hangs"
    words = command(shards, tmp_path, data__workers=0 if in_thread else 2, train__steps=40)
    script = [sys.executable, "-c", IMPATIENT.format(most=60 if in_thread else 10**9), *words[3:]]
    process = subprocess.Popen(script, env=environment(), stderr=subprocess.PIPE, text=True)
    if not in_thread:
        while process.poll() is None and max(losses_or_none(tmp_path)) < 4:
            time.sleep(0.005)
        os.kill(worker_of(process.pid), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    text = process.communicate(timeout=90)[1]
    assert process.returncode == FAILED, text
    assert "Traceback" not in text
    assert "leaked semaphore" not in text
    (said,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "the same command goes on from the last checkpoint" in said
    again = run(shards, tmp_path, train__steps=40)
    assert "resuming after step" in again.stderr
    assert losses(tmp_path) == losses(undisturbed)
    ends = [open_model(str(workdir)).fingerprint for workdir in (tmp_path, undisturbed)]
    assert ends[0] == ends[1]


def worker_of(parent):
    """The number of a process that loads images for another."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            of = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if of == parent and b"spawn_main" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("no such process")
