"""The preparation door, from a folder or phantoms to shards."""

import csv
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep import build, readers, shards
from usfmae_jax.data import records
from usfmae_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]


def picture(seed, shape=(48, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return cv2.GaussianBlur(pixels, (5, 5), 2)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


@pytest.fixture
def tree(tmp_path):
    """Six images in two class folders, two of them in other formats, and files that are none."""
    root = tmp_path / "My Images-2"
    for number, name in enumerate(["b/1.png", "b/2.jpg", "b/3.bmp", "a/1.png", "a/2.TIF", "a/deep/3.png"]):
        write(root / name, picture(number))
    (root / "README.md").write_text("text")
    (root / "b/.hidden.png").write_text("text")
    return root


def run(*flags, output, source=None, dataset="folder", workers=1):
    source = [f"--input={source}"] if source else []
    return build.main([f"--dataset={dataset}", f"--output={output}", f"--workers={workers}", *source, *flags])


def read(path, split=None):
    opened = records.open_shards(str(path), split)
    return [records.decode_record(opened[i]) for i in range(len(opened))]


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def read_rejected(path):
    with (path / "1.0.0/rejected.csv").open() as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def refused(capsys, *flags, **options):
    """The one sentence on stderr of a build that must end with status 2."""
    assert run(*flags, **options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
def test_round_trip(tree, tmp_path, file_format, encoding):
    flags = f"--format={file_format}", f"--encoding={encoding}", "--image_size=0", "--anatomy=breast"
    assert run(*flags, output=tmp_path / "out", source=tree) == 0
    version = tmp_path / "out/my_images_2/1.0.0"
    assert (version / f"my_images_2-train.{file_format}-00000-of-00001").is_file()
    found = read(tmp_path / "out/my_images_2", "train")
    sources = ["a/1.png", "a/2.TIF", "a/deep/3.png", "b/1.png", "b/2.jpg", "b/3.bmp"]
    assert [record["source"] for record in found] == sources
    for record in found:
        original = readers.read_image(tree / record["source"])
        pixels = records.decode_image(record["image"])
        error = np.abs(pixels.astype(int) - original)
        assert error.max() == 0 if encoding != "jpeg" else 0 < error.mean() < 3
        assert (record["height"], record["width"]) == original.shape[:2] == (48, 64)
        assert (record["dataset"], record["anatomy"], record["label"]) == ("my_images_2", "breast", -1)
        assert record["patient"] == record["video"] == record["frame"] == record["source"]
        assert record["mask"] == b""
        assert record["sha256"] == records.pixel_hash(original)


def test_images_shrink_to_the_short_side_with_their_masks(tree, tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[12:36, 16:48] = 255
    write(tree / "masks/1.png", mask)
    labels = write_csv(tmp_path / "l.csv", ["file", "mask"], ["a/1.png", "masks/1.png"], ["b/1.png", ""])
    assert run(f"--labels={labels}", "--image_size=24", output=tmp_path / "out", source=tree) == 0
    first, second = read(tmp_path / "out")
    assert (first["height"], first["width"]) == (24, 32)
    small = records.decode_image(first["mask"])[:, :, 0]
    np.testing.assert_array_equal(small, mask[::2, ::2])
    assert second["mask"] == b""


def test_colour_is_stored_in_colour_and_grey_in_one_channel(tmp_path):
    colour = np.zeros((32, 32, 3), np.uint8)
    colour[8:16, 8:16, 2] = 200  # BGR
    write(tmp_path / "in/colour.png", colour)
    write(tmp_path / "in/grey.png", np.dstack([picture(0)] * 3))
    assert run("--encoding=png", output=tmp_path / "out", source=tmp_path / "in") == 0
    images = [np.frombuffer(record["image"], np.uint8) for record in read(tmp_path / "out")]
    assert [cv2.imdecode(image, cv2.IMREAD_UNCHANGED).ndim for image in images] == [3, 2]
    builder = tfds.builder_from_directory(str(tmp_path / "out/in/1.0.0"))
    first, second = builder.as_data_source("train")
    assert tuple(first["image"][10, 10]) == (200, 0, 0)
    assert second["image"].shape == (48, 64, 3)


def test_parent_folders_are_labels(tree, tmp_path, capsys):
    write(tree / "top.png", picture(9))
    assert run("--labels=parent", output=tmp_path / "out", source=tree) == 0
    found = read(tmp_path / "out")
    names = (tmp_path / "out/my_images_2/1.0.0/label.labels.txt").read_text().split()
    assert names == ["a", "b", "deep"]
    assert [record["label"] for record in found] == [0, 0, 2, 1, 1, 1, -1]
    assert "1 hidden files and folders, 1 other files" in capsys.readouterr().out


def test_a_labels_file_gives_everything_and_leaves_out_the_rest(tree, tmp_path, capsys):
    labels = write_csv(
        tmp_path / "l.csv",
        ["mask", "split", "file", "label", "patient", "video", "comment"],
        ["", "train", "b/1.png", " benign ", "p1", "v1", "x"],
        ["", "", "b/2.jpg", "malignant", "p1", "v1", "x"],
        ["", "val", "b/3.bmp", "", "p2", "", "x"],
        ["", "test", "a/1.png", "benign", "", "", "x"],
    )
    assert run(f"--labels={labels}", output=tmp_path / "out", source=tree) == 0
    found = {split: read(tmp_path / "out", split) for split in ("train", "validation", "test")}
    keys = "source", "label", "patient", "video"
    assert {split: [tuple(record[key] for key in keys) for record in found[split]] for split in found} == {
        "train": [("b/1.png", 0, "p1", "v1"), ("b/2.jpg", 1, "p1", "v1")],
        "validation": [("b/3.bmp", -1, "p2", "b/3.bmp")],
        "test": [("a/1.png", 0, "a/1.png", "a/1.png")],
    }
    printed = capsys.readouterr().out
    assert "Unknown patients: 1." in printed
    assert "2 images not in the labels file" in printed
    assert "--config.data.path='" + str(tmp_path / "out/my_images_2") in printed


def test_integer_labels_are_in_the_order_of_their_values(tree, tmp_path):
    rows = [["a/1.png", "10"], ["b/1.png", "9"], ["b/2.jpg", "-1"]]
    labels = write_csv(tmp_path / "l.csv", ["file", "label"], *rows)
    assert run(f"--labels={labels}", output=tmp_path / "out", source=tree) == 0
    assert [record["label"] for record in read(tmp_path / "out")] == [1, 0, -1]
    assert (tmp_path / "out/my_images_2/1.0.0/label.labels.txt").read_text().split() == ["9", "10"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([["image", "label"], ["a/1.png", "x"]], "has no column 'file', only ['image', 'label']"),
        ([["file"], ["a/1.png"], ["gone.png"]], "names 1 files that are not below --input"),
        ([["file", "mask"], ["a/1.png", "gone.png"]], "first 'gone.png'"),
        ([["file"], ["a/1.png"], ["a/../a/1.png"]], "lists 'a/1.png' more than once"),
        ([["file"], ["../l.csv"]], "'../l.csv' is not a path below --input"),
        ([["file"], ["/etc/passwd"]], "'/etc/passwd' is not a path below --input"),
        ([["file", "split"], ["a/1.png", "dev"]], "split 'dev' of 'a/1.png' is none of train, val, test"),
        ([["file", "split", "patient"], ["a/1.png", "train", "p7"], ["b/1.png", "test", "p7"]], "patient 'p7' is in"),
        ([["file"]], "lists no files"),
    ],
)
def test_a_labels_file_that_does_not_fit_is_refused(tree, tmp_path, capsys, rows, sentence):
    labels = write_csv(tmp_path / "l.csv", *rows)
    assert sentence in refused(capsys, f"--labels={labels}", output=tmp_path / "out", source=tree)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dataset=folder"], "needs --input"),
        (["--dataset=folder", "--input=gone"], "is not a folder"),
        (["--dataset=folder", "--input=.", "--labels=gone.csv"], "neither 'parent' nor a file"),
        (["--dataset=elsewhere"], "invalid choice"),
        (["--dataset=phantom", "--input=x"], "--input has no meaning for --dataset=phantom"),
        (["--dataset=folder", "--input=.", "--seed=3"], "--seed has no meaning for --dataset=folder"),
        (["--dataset=phantom", "--image_size=8"], "give 32 or more"),
        (["--dataset=phantom", "--name=a b"], "letters, digits and underscores"),
        (["--dataset=phantom", "--quality=90", "--encoding=png"], "--quality is for --encoding=jpeg"),
        (["--dataset=phantom", "--workers=0"], "0 is not in the range"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert build.main(["--output=out", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/notes.txt").write_text("text")
    assert "holds no images" in refused(capsys, output=tmp_path / "out", source=tmp_path / "in")


def test_damaged_files_are_counted_and_named_and_the_rest_is_built(tree, tmp_path, capsys):
    (tree / "a/empty.png").touch()
    (tree / "a/text.jpg").write_text("not an image")
    cut = (tree / "a/1.png").read_bytes()[:-200]
    (tree / "b/cut.png").write_bytes(cut)
    (tmp_path / "secret.png").write_bytes((tree / "a/1.png").read_bytes())
    (tree / "a/link.png").symlink_to(tmp_path / "secret.png")
    (tree / "a/broken.png").symlink_to("gone.png")
    assert run(output=tmp_path / "out", source=tree) == 0
    printed = capsys.readouterr().out
    rejected = read_rejected(tmp_path / "out/my_images_2")
    assert rejected == {
        "a/broken.png": "cannot be read: No such file or directory",
        "a/empty.png": "empty file",
        "a/link.png": "link that leaves the input folder",
        "a/text.jpg": "not a PNG, JPEG, TIFF or BMP",
        "b/cut.png": "cannot be decoded",
    }
    assert "Rejected: 5 files" in printed
    for name, reason in rejected.items():
        assert f"{name}: {reason}" in printed
    assert len(read(tmp_path / "out")) == 6


def test_a_mask_of_another_size_rejects_its_image(tree, tmp_path):
    write(tree / "m.png", picture(0, (10, 10)))
    rows = [["a/1.png", "m.png"], ["b/1.png", ""], ["b/2.jpg", ""]]
    labels = write_csv(tmp_path / "l.csv", ["file", "mask"], *rows)
    assert run(f"--labels={labels}", output=tmp_path / "out", source=tree) == 0
    assert read_rejected(tmp_path / "out/my_images_2") == {"a/1.png": "mask is 10 x 10 pixels, the image 64 x 48"}
    assert len(read(tmp_path / "out")) == 2


def test_more_than_half_rejected_is_refused_and_leaves_nothing(tmp_path, capsys):
    write(tmp_path / "in/good.png", picture(0))
    for name in "abc":
        (tmp_path / f"in/{name}.png").write_text("text")
    sentence = refused(capsys, output=tmp_path / "out", source=tmp_path / "in")
    assert "more than half of the 4 files cannot be used" in sentence
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_one_sentence(tree, tmp_path, capsys):
    (tmp_path / "out").write_text("a file where a folder should be")
    assert "error: nothing was built: " in refused(capsys, output=tmp_path / "out", source=tree)


def test_file_names_that_are_not_utf8_are_escaped(tmp_path):
    write(tmp_path / "in/x.png", picture(0))
    os.rename(tmp_path / "in/x.png", os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
    assert run(output=tmp_path / "out", source=tmp_path / "in") == 0
    assert [record["source"] for record in read(tmp_path / "out")] == ["caf\\xe9.png"]
    labels = tmp_path / "l.csv"
    labels.write_bytes(b"file,mask,label\ncaf\xe9.png,caf\xe9.png,\xe9\n")
    assert run(f"--labels={labels}", "--overwrite", output=tmp_path / "out", source=tmp_path / "in") == 0
    assert (tmp_path / "out/in/1.0.0/label.labels.txt").read_text() == "\\xe9\n"


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


def test_tensorflow_datasets_opens_it_without_tensorflow(tree, tmp_path):
    assert run("--labels=parent", output=tmp_path / "out", source=tree) == 0
    builder = tfds.builder_from_directory(str(tmp_path / "out/my_images_2/1.0.0"))
    assert (builder.name, str(builder.version)) == ("my_images_2", "1.0.0")
    assert builder.info.features["label"].names == ["a", "b", "deep"]
    assert set(builder.info.features) == set(records.FIELDS)
    assert builder.info.splits["train"].num_examples == 6
    source = builder.as_data_source("train")
    examples = [source[i] for i in range(len(source))]
    assert [example["image"].shape for example in examples] == [(48, 64, 1)] * 6
    assert [int(example["label"]) for example in examples] == [0, 0, 2, 1, 1, 1]
    assert "tensorflow" not in sys.modules


def test_no_output_byte_names_this_machine(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "peculiar-host")
    for variable in ("USER", "LOGNAME"):
        monkeypatch.setenv(variable, "peculiar-user")
    (tree / "a/bad.png").write_text("text")
    # TFRecord files are not compressed: what is in them can be searched.
    assert run("--labels=parent", "--format=tfrecord", output=tmp_path / "out", source=tree) == 0
    for data in content(tmp_path / "out").values():
        for secret in (str(tmp_path), str(ROOT), os.path.expanduser("~") + "/", "peculiar"):
            assert secret.encode() not in data


def test_phantom_patients_are_split_and_depend_on_the_seed_alone(tmp_path):
    flags = "--patients=10", "--frames=2", "--image_size=48"
    for output, more, workers in (("1", [], 1), ("2", [], 2), ("3", ["--seed=1"], 1)):
        assert run(*flags, *more, output=tmp_path / output, dataset="phantom", workers=workers) == 0
    one, two, three = (content(tmp_path / output) for output in "123")
    assert one == two != three
    train, test = (read(tmp_path / "1/phantom", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert not {record["patient"] for record in train} & {record["patient"] for record in test}
    assert len({record["frame"] for record in train + test}) == 20
    for record in train + test:
        image, mask = records.decode_image(record["image"]), records.decode_image(record["mask"])
        assert image.shape == mask.shape
        assert min(image.shape[:2]) == 48
        assert (record["label"] > 0) == bool(mask.any())
    manifest = json.loads((tmp_path / "1/phantom/1.0.0/build.json").read_text())
    assert manifest["splits"]["test"] == {"frames": 4, "patients": 2, "unknown_patients": 0}


def test_help_and_nothing_to_do_take_no_time(tree, tmp_path):
    slow = "{'tensorflow_datasets', 'grain', 'jax'} & set(sys.modules)"
    script = (
        f"import sys; from data_prep import build; status = build.main(sys.argv[1:]); sys.exit(status or len({slow}))"
    )
    flags = ["--dataset=folder", f"--input={tree}", f"--output={tmp_path / 'out'}", "--workers=1"]
    assert build.main(flags) == 0
    done = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "data_prep.build", "--help"], cwd=ROOT, capture_output=True, check=True
    )
    assert b"--labels=parent" in shown.stdout
