"""The preparation door interrupted, repeated, crowded and short of disk: a dataset appears complete or not at all."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tensorflow_datasets as tfds

from data_prep import build, plan
from data_prep.find.files import Item
from data_prep.write import dataset, manifest, parts, shards
from tests.data_prep.builds import ROOT, content, picture, read, read_rejected, refused, run, write
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
    monkeypatch.setattr(dataset, "build", None)  # would fail if it were called
    assert run(output=tmp_path / "out", source=tree, workers=2) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_build_into_the_same_place_is_refused_until_overwrite(tree, tmp_path, capsys):
    assert run(output=tmp_path / "out", source=tree) == 0
    before = content(tmp_path / "out")
    sentence = refused(capsys, "--image_size=16", output=tmp_path / "out", source=tree)
    assert "was built with --image_size=256; add --overwrite, or choose another --name" in sentence
    said = refused(capsys, "--labels=parent", "--stride=2", output=tmp_path / "out", source=tree)
    assert "1.0.0 was built without --labels, with --stride=1; add --overwrite" in said
    write(tree / "new.png", picture(7))
    assert "built from other files" in refused(capsys, output=tmp_path / "out", source=tree)
    assert content(tmp_path / "out") == before
    assert run("--image_size=16", "--overwrite", output=tmp_path / "out", source=tree) == 0
    assert [record["height"] for record in read(tmp_path / "out")] == [16] * 7
    assert [path.name for path in (tmp_path / "out/my_images_2").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"labels": "", "clean": True, "thin": True}, {"labels": "sha256 a", "clean": False}, ["without --labels"]),
        ({"labels": "sha256 a"}, {"labels": "sha256 b"}, ["with another table of --labels"]),
        ({"labels": "parent"}, {"labels": "sha256 b"}, ["with --labels=parent"]),
        ({"encoding": "jpeg", "quality": 95}, {"encoding": "png"}, ["with --encoding=jpeg"]),
        ({"options": {"axis": 0}}, {"options": {"axis": None}}, ["with --axis=0"]),
        ({"clean": False, "whole_frames": True}, {"clean": True}, ["with --clean=off", "with --whole_frames"]),
        ({"salt": "", "entry": "a"}, {"salt": "1f", "entry": "hmac"}, ["without --private"]),
        ({"salt": "1f", "pattern": "f12"}, {"salt": "1f", "pattern": "f34"}, ["with another --pattern"]),
    ],
)
def test_what_another_build_was_given_is_said_as_it_was_typed(before, now, said):
    assert manifest._differences(before, now) == said


def test_a_lost_shard_is_noticed(tree, tmp_path, capsys):
    assert run(output=tmp_path / "out", source=tree) == 0
    next((tmp_path / "out").rglob("*array_record*")).unlink()
    assert "is missing or was changed" in refused(capsys, output=tmp_path / "out", source=tree)


def test_two_builds_at_once_do_not_mix(tmp_path):
    target = tmp_path / "out/name/1.0.0"
    with shards.workplace(target, "key") as folder:
        (folder / "stage").mkdir()
        (folder / "stage/x").touch()
        with pytest.raises(InputError, match="another build"), shards.workplace(target, "key"):
            pass
        assert not target.exists()
        shards.publish(folder / "stage", target, overwrite=False)
    assert [path.name for path in target.iterdir()] == ["x"]
    assert [path.name for path in target.parent.iterdir()] == ["1.0.0"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out/name/1.0.0"

    def build_while_another_finishes():
        with shards.workplace(target, "key") as folder:
            (folder / "stage").mkdir()
            target.mkdir()
            (target / "theirs").touch()
            shards.publish(folder / "stage", target, overwrite=False)

    with pytest.raises(InputError, match="appeared"):
        build_while_another_finishes()
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_a_dataset_that_cannot_be_replaced_is_still_there(tmp_path, monkeypatch):
    target, finished = tmp_path / "v", tmp_path / "stage/v"
    for folder, name in ((target, "old"), (finished, "new")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    rename = pathlib.Path.rename

    def full(path, to):
        if path == finished:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, to)

    monkeypatch.setattr(pathlib.Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        shards.publish(finished, target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["old"]


@pytest.mark.parametrize("damage", ["no index", "cut index", "cut part", "long part"])
def test_a_part_that_is_damaged_is_made_again(tree, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(dataset, "_gather", interrupt)
    assert run(output=tmp_path / "out", source=tree) == 130
    monkeypatch.undo()
    work = tmp_path / "out/my_images_2/.1.0.0.incomplete"
    index, part = work / "000002.json", work / "000002.part"
    if damage == "no index":
        index.unlink()
    elif damage == "cut index":
        index.write_bytes(index.read_bytes()[:40])
    elif damage == "cut part":
        part.write_bytes(part.read_bytes()[:-9])
    else:
        part.write_bytes(part.read_bytes() * 2)
    assert run(output=tmp_path / "out", source=tree) == 0
    assert run(output=tmp_path / "fresh", source=tree) == 0
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_parts_that_are_missing_after_the_run_end_it(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parts, "run_here", lambda *_: (one for one in ()))
    assert "6 of 6 parts are missing" in refused(capsys, output=tmp_path / "out", source=tree)


def test_a_replaced_dataset_is_there_until_the_new_one_is_complete(tree, tmp_path, monkeypatch):
    assert run(output=tmp_path / "out", source=tree) == 0
    before = content(tmp_path / "out")
    monkeypatch.setattr(dataset.pages, "write_page", interrupt)
    assert run("--overwrite", "--image_size=16", output=tmp_path / "out", source=tree) == 130
    assert content(tmp_path / "out/my_images_2/1.0.0") == before


def interrupt(*_):
    raise KeyboardInterrupt


def nothing_is_done_twice(missing, *_):
    assert not missing
    yield from ()


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tree, tmp_path, capsys, monkeypatch, file_format):
    opened = shards._open_shard
    monkeypatch.setattr(shards, "_open_shard", lambda _, form: opened(pathlib.Path("/dev/full"), form))
    sentence = refused(capsys, f"--format={file_format}", output=tmp_path / "out", source=tree)
    assert sentence == "error: No space left on device; make room, and the same command goes on from here"
    with pytest.raises(InputError, match="no shards match"):
        records.open_shards(str(tmp_path / "out"))
    monkeypatch.undo()
    monkeypatch.setattr(parts, "run_here", nothing_is_done_twice)
    assert run(f"--format={file_format}", output=tmp_path / "out", source=tree) == 0
    assert len(read(tmp_path / "out")) == 6
    assert [path.name for path in (tmp_path / "out/my_images_2").iterdir()] == ["1.0.0"]


#: TFRecord: a part of such a file is readable.
PHANTOMS = ["--dataset=phantom", "--frames=1", "--image_size=64", "--format=tfrecord", "--patients=384"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the files of a build of PHANTOMS hold that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert build.main([f"--output={folder}", *PHANTOMS]) == 0
    return content(folder)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_build_leaves_nothing_that_opens_and_the_next_one_goes_on(undisturbed, tmp_path, how):
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.build", "--workers=2", f"--output={tmp_path / 'out'}", *PHANTOMS],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A job in the background of a shell ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        eventually(lambda: len(list(tmp_path.rglob("*.json"))) > 1, seconds=120)
        os.killpg(process.pid, signal.SIGSTOP)  # it cannot be done before the signal comes
        process.send_signal(how)
        os.killpg(process.pid, signal.SIGCONT)
        status = process.wait(20)
        eventually(lambda: not group_exists(process.pid))  # neither do its workers live on
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert status == (130 if how == signal.SIGINT else -signal.SIGKILL)
    for path in (tmp_path / "out", tmp_path / "out/phantom"):
        with pytest.raises(InputError):
            records.open_shards(str(path))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.part")}
    finished = [path for path in kept if path.with_suffix(".json").exists()]
    assert finished
    shown = subprocess.run(
        [sys.executable, "-m", "data_prep.build", f"--output={tmp_path / 'out'}", *PHANTOMS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "going on after" in shown.stdout
    assert content(tmp_path / "out") == undisturbed
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name]


def test_work_on_something_else_is_not_gone_on_with(tmp_path):
    target = tmp_path / "out/name/1.0.0"
    found = []

    def interrupted(key):
        with shards.workplace(target, key) as folder:
            found.append([path.name for path in folder.iterdir() if path.name != "key"])
            (folder / "work").touch()
            raise KeyboardInterrupt

    for key in ("one", "one", "two"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(key)
    assert found == [[], ["work"], []]


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


def test_names_that_steer_a_terminal_stand_in_no_table_as_they_are(tmp_path, capsys):
    hostile = "\x1b]52;c;aGk=\x07\u202e"
    for name in (hostile, "b"):
        write(tmp_path / f"in/{name}/{name}.png", picture(len(name)))
    (tmp_path / f"in/b/{hostile} broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert run("--labels=parent", "--name=x", output=tmp_path / "out", source=tmp_path / "in") == 0
    printed = capsys.readouterr()
    texts = [
        (tmp_path / f"out/x/1.0.0/{name}").read_text() for name in ("rejected.csv", "label.labels.txt", "report.html")
    ]
    for text in (*texts, printed.out, printed.err.replace("\r", "").replace("\x1b[A", "")):
        assert not set("\x1b\x07\u202e") & set(text)
    assert r"\u001b]52" in texts[0]


def test_a_build_killed_between_the_two_renames_of_a_replacement_loses_nothing(tree, tmp_path, capsys, monkeypatch):
    assert run("--name=x", output=tmp_path / "out", source=tree) == 0
    before, rename = content(tmp_path / "out"), pathlib.Path.rename

    def killed(path, target):
        if path.name == "stage":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", killed)
        assert run("--name=x", "--image_size=16", "--overwrite", output=tmp_path / "out", source=tree) == 130
    assert not (tmp_path / "out/x/1.0.0").exists()
    assert run("--name=x", output=tmp_path / "out", source=tree) == 0
    assert "up to date" in capsys.readouterr().out
    for name, data in before.items():
        assert (tmp_path / "out/x/1.0.0" / name).read_bytes() == data


def test_folders_in_more_than_a_hundred_others_are_rejected_and_end_nothing(tree, tmp_path):
    here = os.getcwd()
    os.chdir(tree)
    for _ in range(1200):  # the whole path is longer than one may be
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)
    assert run("--name=x", output=tmp_path / "out", source=tree) == 0
    assert len(read(tmp_path / "out")) == 6
    (rejected,) = read_rejected(tmp_path / "out/x").values()
    assert rejected.startswith("folder in more than 100 others")
    while (tree / "d").exists():  # deepest first: removing a tree is recursive, too
        os.chdir(tree)
        depth = 0
        while os.path.isdir("d") and depth < 500:
            os.chdir("d")
            depth += 1
        os.chdir(tree)
        os.rename("d", "e")
        inner = tree / "/".join(["e"] + ["d"] * (depth - 1))
        if (inner / "d").exists():
            os.rename(inner / "d", tree / "d")
        shutil.rmtree(tree / "e")
    os.chdir(here)


def test_headers_of_volumes_are_found_their_data_without_a_search_each(tmp_path, monkeypatch):
    for name in ("a.mhd", "a.raw", "a.b.mhd", "a.b.raw", "b.raw"):
        (tmp_path / name).write_text(name)
    items = [Item("a.mhd"), Item("a.b.mhd"), Item("a.raw")]
    listed, listing = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listing(path))
    first = plan._with_data_files("f", tmp_path, items)
    assert len(listed) == 1
    (tmp_path / "b.raw").write_text("more")
    assert plan._with_data_files("f", tmp_path, items) == first
    (tmp_path / "a.b.raw").write_text("more")
    assert plan._with_data_files("f", tmp_path, items) != first
    assert plan._with_data_files("f", tmp_path, items[2:]) == "f"
