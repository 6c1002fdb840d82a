"""A few hundred mutated files of every kind, and that the fuzzer would notice."""

import os
import time

import numpy as np
import pytest

from data_prep.readers import Frame, UnreadableError
from tests.data_prep.readers import fuzz, samples


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("av")
    pytest.importorskip("h5py")
    return [str(path) for path in samples.write_all(tmp_path_factory.mktemp("files"))]


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 12), marks=pytest.mark.slow)], ids=len)
def test_mutated_files_of_every_kind_end_in_frames_or_in_one_reason(files, seeds):
    cases = [(path, seed) for path in files for seed in seeds]
    ended = list(fuzz.run(cases))
    failures = [str(one) for one in ended if isinstance(one, fuzz.Failure)]
    assert not failures, "\n".join(failures)
    frames = sum(one == "frames" for one in ended)
    assert len(ended) / 10 < frames < len(ended) * 9 / 10  # both ends are reached


def test_a_seed_always_makes_the_same_file_and_another_seed_another():
    data = bytes(range(256)) * 20
    assert fuzz.mutate(data, 3) == fuzz.mutate(data, 3)
    assert len({fuzz.mutate(data, seed) for seed in range(50)}) > 45
    assert fuzz.mutate(b"", 1) == b""


def misbehave(path, options):
    """A reader that does with the length of a file what no reader should do."""
    length = os.path.getsize(path)
    if length < 100:
        time.sleep(60)
    if length < 1000:
        os.abort()
    if length < 2000:
        print("chatter", flush=True)
    if length < 3000:
        raise UnreadableError(f"{path} is damaged")
    if length < 4000:
        raise KeyError("x")
    yield Frame(np.zeros((4, 4, 1), np.float32 if length < 5000 else np.uint8))


def test_what_no_reader_should_do_is_noticed_and_the_next_case_runs(tmp_path):
    expected = {
        50: "hang: more than 0.5 s",
        500: "crash: exit status -6",
        1500: "printed: chatter",
        2500: "a reason that cannot be stored",
        3500: "KeyError",
        4500: "frame 0 after -1 is float32",
    }
    cases = []
    for length in (*expected, 20_000):
        path = tmp_path / f"{length}.png"
        path.write_bytes(bytes(length))
        # One that leaves the length as it is.
        cases.append((str(path), next(seed for seed in range(1000) if len(fuzz.mutate(bytes(length), seed)) == length)))
    good = cases.pop()
    ended = list(fuzz.run([case for bad in cases for case in (bad, good)], limit=0.5, read=misbehave))
    for (path, seed), what, failure, after in zip(cases, expected.values(), ended[::2], ended[1::2], strict=True):
        assert what in failure.what
        assert f"--seed={seed} '{path}'" in str(failure)
        assert after == "frames"
