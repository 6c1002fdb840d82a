"""A few hundred mutated files of every kind, and that the fuzzer would notice."""

import os
import time

import numpy as np
import pytest

from data_prep.readers import Frame, UnreadableError
from tests.data_prep.readers import fuzz, samples

CASES_PER_FILE = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("av")
    pytest.importorskip("h5py")
    return [str(path) for path in samples.write_all(tmp_path_factory.mktemp("files"))]


def test_mutated_files_of_every_kind_end_in_frames_or_in_one_reason(files):
    cases = [(path, seed) for path in files for seed in range(CASES_PER_FILE)]
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


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (50, "hang: more than 0.5 s"),
        (500, "crash: exit status -6"),
        (1500, "printed: chatter"),
        (2500, "a reason that cannot be stored"),
        (3500, "KeyError"),
        (4500, "frame 0 after -1 is float32"),
    ],
)
def test_what_no_reader_should_do_is_noticed_and_the_next_case_runs(tmp_path, monkeypatch, length, expected):
    path, good = tmp_path / "x.png", tmp_path / "y.png"
    path.write_bytes(bytes(length))
    good.write_bytes(bytes(20_000))
    seed = next(seed for seed in range(1000) if len(fuzz.mutate(bytes(length), seed)) == length)
    failure, after = fuzz.run([(str(path), seed), (str(good), seed)], limit=0.5, read=misbehave)
    assert expected in failure.what
    assert f"--seed={seed} '{path}'" in str(failure)
    assert after == "frames"
