"""The preparation door interrupted, repeated, crowded and short of disk: all or nothing."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tensorflow_datasets as tfds

from data_prep import build, shards
from tests.data_prep.builds import ROOT, content, picture, read, refused, run, write
from usfmae_jax.data import records
from usfmae_jax.errors import InputError


def test_shards_are_the_same_bytes_for_any_number_of_workers(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 5_000)
    (tree / "a/empty.png").touch()
    for workers in (1, 2):
        assert run("--name=same", output=tmp_path / f"out{workers}", source=tree, workers=workers) == 0
    one, two = content(tmp_path / "out1"), content(tmp_path / "out2")
    assert sum(".array_record-" in name for name in one) > 1
    assert one == two
    opened = records.open_shards(str(tmp_path / "out1"))
    assert len(opened) == 6
    info = tfds.builder_from_directory(str(tmp_path / "out1/same/1.0.0")).info
    assert info.splits["train"].num_shards == len(opened.paths)


def test_the_same_build_again_does_nothing(tree, tmp_path, capsys, monkeypatch):
    assert run(output=tmp_path / "out", source=tree) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(build, "_build", None)  # would fail if it were called
    assert run(output=tmp_path / "out", source=tree, workers=2) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_build_into_the_same_place_is_refused_until_overwrite(tree, tmp_path, capsys):
    assert run(output=tmp_path / "out", source=tree) == 0
    before = content(tmp_path / "out")
    sentence = refused(capsys, "--image_size=16", output=tmp_path / "out", source=tree)
    assert "image_size was 256 and is now 16" in sentence
    assert "--overwrite" in sentence
    write(tree / "new.png", picture(7))
    assert "built from other files" in refused(capsys, output=tmp_path / "out", source=tree)
    assert content(tmp_path / "out") == before
    assert run("--image_size=16", "--overwrite", output=tmp_path / "out", source=tree) == 0
    assert [record["height"] for record in read(tmp_path / "out")] == [16] * 7
    assert [path.name for path in (tmp_path / "out/my_images_2").iterdir()] == ["1.0.0"]


def test_a_lost_shard_is_noticed(tree, tmp_path, capsys):
    assert run(output=tmp_path / "out", source=tree) == 0
    next((tmp_path / "out").rglob("*array_record*")).unlink()
    assert "is missing or was changed" in refused(capsys, output=tmp_path / "out", source=tree)


def test_two_builds_at_once_do_not_mix(tmp_path):
    target = tmp_path / "out/name/1.0.0"
    with shards.all_or_nothing(target, overwrite=False) as folder:
        (folder / "x").touch()
        with pytest.raises(InputError, match="another build"), shards.all_or_nothing(target, overwrite=False):
            pass
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["x"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out/name/1.0.0"

    def build_while_another_finishes():
        with shards.all_or_nothing(target, overwrite=False) as folder:
            (folder / "mine").touch()
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(InputError, match="appeared"):
        build_while_another_finishes()
    assert [path.name for path in target.parent.rglob("*")] == ["1.0.0", "theirs"]


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tree, tmp_path, capsys, monkeypatch, file_format):
    opened = shards._open_shard
    monkeypatch.setattr(shards, "_open_shard", lambda _, form: opened(pathlib.Path("/dev/full"), form))
    sentence = refused(capsys, f"--format={file_format}", output=tmp_path / "out", source=tree)
    assert sentence == "error: nothing was built: No space left on device"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_leaves_nothing_that_opens_and_the_next_one_cleans_up(tmp_path, how):
    # TFRecord, because a part of such a file is readable.
    flags = ["--dataset=phantom", "--frames=1", "--image_size=64", "--format=tfrecord", f"--output={tmp_path / 'out'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.build", "--patients=100000", "--workers=2", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        eventually(lambda: any(path.stat().st_size for path in tmp_path.rglob("*-of-*")))
        process.send_signal(how)
        status = process.wait(20)
        eventually(lambda: not group_exists(process.pid))  # neither do its workers live on
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert status == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert (tmp_path / "out").exists() == (how == signal.SIGKILL)
    for path in (tmp_path / "out", tmp_path / "out/phantom"):
        with pytest.raises(InputError):
            records.open_shards(str(path))
    assert build.main(["--patients=2", "--workers=1", *flags]) == 0
    assert len(records.open_shards(str(tmp_path / "out"))) == 2
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name]


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
