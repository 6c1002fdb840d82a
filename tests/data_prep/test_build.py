"""The preparation door, from a folder or phantoms to shards."""

import json
import os
import socket
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep import build, plan, readers
from data_prep.find.files import Item
from tests.data_prep.builds import ROOT, content, picture, read, read_rejected, refused, run, write, write_csv
from usfmae_jax.data import records


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
def test_round_trip(tree, tmp_path, file_format, encoding):
    flags = f"--format={file_format}", f"--encoding={encoding}", "--image_size=0", "--anatomy=breast", "--clean=off"
    assert run(*flags, output=tmp_path / "out", source=tree) == 0
    version = tmp_path / "out/my_images_2/1.0.0"
    assert (version / f"my_images_2-train.{file_format}-00000-of-00001").is_file()
    found = read(tmp_path / "out/my_images_2", "train")
    sources = ["a/1.png", "a/2.TIF", "a/deep/3.png", "b/1.png", "b/2.jpg", "b/3.bmp"]
    assert [record["source"] for record in found] == sources
    for record in found:
        original = next(readers.read_frames(tree / record["source"])).pixels
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
    assert run("--encoding=png", "--clean=off", output=tmp_path / "out", source=tmp_path / "in") == 0
    images = [np.frombuffer(record["image"], np.uint8) for record in read(tmp_path / "out")]
    assert [cv2.imdecode(image, cv2.IMREAD_UNCHANGED).ndim for image in images] == [3, 2]
    builder = tfds.builder_from_directory(str(tmp_path / "out/in/1.0.0"))
    first, second = builder.as_data_source("train")
    assert tuple(first["image"][10, 10]) == (200, 0, 0)
    assert second["image"].shape == (48, 64, 3)


def test_the_page_of_ones_own_folder_has_a_tip_where_no_labels_were_given_and_no_licence(tree, tmp_path):
    pages = []
    for flags in ([], ["--labels=parent", "--overwrite"]):
        assert run(*flags, output=tmp_path / "out", source=tree) == 0
        pages.append((tmp_path / "out/my_images_2/1.0.0/report.html").read_text())
    assert ["Tip: --labels=parent or" in page for page in pages] == [True, False]
    for page in pages:
        for word in ("Known problems", "Licence", "Recipe checked", "1 frames"):
            assert word not in page


def test_parent_folders_are_labels(tree, tmp_path, capsys):
    write(tree / "top.png", picture(9))
    assert run("--labels=parent", output=tmp_path / "out", source=tree) == 0
    found = read(tmp_path / "out")
    names = (tmp_path / "out/my_images_2/1.0.0/label.labels.txt").read_text().split()
    assert names == ["a", "b", "deep"]
    assert [record["label"] for record in found] == [0, 0, 2, 1, 1, 1, -1]
    printed = capsys.readouterr().out
    assert "hidden files and folders (1), other files (1)" in printed
    assert "finetune --config=finetune:folder --config.data.path=" in printed
    assert "segment:folder" not in printed  # there are no masks


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
    assert "images not in the labels file (2)" in printed
    assert "--config.data.path='" + str(tmp_path / "out/my_images_2") in printed


def test_columns_of_a_labels_file_that_are_not_used_are_named(tree, tmp_path, capsys):
    labels = write_csv(
        tmp_path / "l.csv", ["file", "patient", "seen", ""], ["a/1.png", "p", "May", "1"], ["b/1.png", "p", "June", "2"]
    )
    assert run(f"--labels={labels}", output=tmp_path / "out", source=tree) == 0
    assert "l.csv has columns that are not used: seen\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "tip"),
    [
        (
            ["bus_0001-l", "bus_0001-r", "bus_0002-l"],
            "(?P<patient>[^/-]+)-[^/]*$' (bus_0001-l.png -> patient bus_0001)",
        ),
        (["7_1", "7_2", "8_1"], "(?P<patient>[^/_]+)_[^/]*$' (7_1.png -> patient 7)"),
        (["bus_0001-l", "bus_0002-l"], "..."),
        (["benign_1", "benign_2", "malignant_1"], "..."),
    ],
)
def test_a_pattern_is_suggested_where_it_tells_patients_apart(names, tip):
    said = plan._patient_tip([Item(f"{name}.png") for name in names], "", private=False)
    assert f"--pattern='{tip}" in said


def test_a_pattern_that_gives_one_patient_for_all_is_doubted(tmp_path, capsys):
    for number, name in enumerate(["bus_1-l", "bus_1-r", "bus_2-l"]):
        write(tmp_path / f"in/{name}.png", picture(number))
    flags = "--pattern=(?P<patient>[^/_]+)_[^/]*$", "--clean=off"
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in") == 0
    assert "--pattern gives all 3 files one patient, 'bus'" in capsys.readouterr().out


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_labels_file_may_come_from_excel_on_windows(tree, tmp_path, separator):
    rows = [["file", "label"], ["a\\1.png", "x, left"], [str(tree / "b" / "1.png"), "y"]]
    (tmp_path / "l.csv").write_bytes("\r\n".join(map(separator.join, rows)).encode("utf-8-sig"))
    assert run(f"--labels={tmp_path / 'l.csv'}", output=tmp_path / "out", source=tree) == 0
    assert [record["source"] for record in read(tmp_path / "out")] == ["a/1.png", "b/1.png"]
    assert (tmp_path / "out/my_images_2/1.0.0/label.labels.txt").read_text() == "x, left\ny\n"


def test_integer_labels_are_in_the_order_of_their_values(tree, tmp_path):
    rows = [["a/1.png", "10"], ["b/1.png", "9"], ["b/2.jpg", "-1"]]
    labels = write_csv(tmp_path / "l.csv", ["file", "label"], *rows)
    assert run(f"--labels={labels}", output=tmp_path / "out", source=tree) == 0
    assert [record["label"] for record in read(tmp_path / "out")] == [1, 0, -1]
    assert (tmp_path / "out/my_images_2/1.0.0/label.labels.txt").read_text().split() == ["9", "10"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([["image", "label"], ["a/1.png", "x"]], "has no column 'file', only image, label"),
        ([["file"], ["a/1.png"], ["gone.png"]], "names a file that is not below --input"),
        ([["file", "mask"], ["a/1.png", "gone.png"]], "not below --input="),
        ([["file"], ["a/1.png"], ["a/../a/1.png"]], "lists 'a/1.png' more than once"),
        ([["file"], ["../l.csv"]], "'../l.csv' is not a path below --input"),
        ([["file"], ["/etc/passwd"]], "'/etc/passwd' is not a path below --input"),
        ([["file", "split"], ["a/1.png", "dev"]], "split 'dev' of 'a/1.png' is none of train, val, test"),
        ([["file", "split", "patient"], ["a/1.png", "train", "p7"], ["b/1.png", "test", "p7"]], "patient 'p7' is in"),
        ([["file", "split", "video"], ["a/1.png", "train", "v"], ["b/1.png", "test", "v"]], "video 'v' is in"),
        ([["file"]], "lists no files"),
        (
            [["file", "diagnosis", "patient"], ["a/1.png", "x", "p"], ["b/1.png", "x", "q"]],
            "l.csv has no column 'label'; it has file, diagnosis, patient: call the one with the classes 'label'",
        ),
        ([["file", "Label"], ["a/1.png", "x"]], "l.csv has no column 'label'; it has file, Label"),
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
        (["--dataset=bus-bar"], "did you mean bus_bra"),
        (["--list", "--nonsense"], "unrecognized arguments"),
        (["--dataset=folder,phantom", "--input=.", "--name=x"], "--name is for one dataset"),
        (["--dataset=folder", "--input=.", "--beam_pipeline_options=runner=x"], "is for --runner=beam"),
        (["--dataset=cactus", "--input=."], "the layout of cactus is not known"),
        (["--dataset=us105", "--input=.", "--download"], "cannot be downloaded from here"),
        (["--dataset=folder", "--input=.", "--exclude=gone.csv"], "--exclude=gone.csv is not a file"),
        (["--dataset=phantom", "--input=x"], "--input has no meaning for --dataset=phantom"),
        (["--dataset=folder", "--input=.", "--seed=3"], "--seed has no meaning for --dataset=folder"),
        (["--dataset=phantom", "--image_size=8"], "give 32 or more"),
        (["--dataset=phantom", "--lesions=many"], "invalid choice: 'many'"),
        (["--dataset=folder", "--input=.", "--lesions=several"], "--lesions has no meaning for --dataset=folder"),
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
    assert captured.err.count("error: ") == 1
    assert sentence in captured.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    assert run(output=tmp_path / "out", source=tmp_path / "gone") == 2
    assert capsys.readouterr().err.splitlines() == [f"error: --input={tmp_path / 'gone'} is not a folder"]


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
        "a/text.jpg": "not a kind of file that can be read",
        "b/cut.png": "cannot be decoded",
    }
    assert "Rejected: 5 files" in printed
    for name, reason in rejected.items():
        assert f"{name}: {reason}" in printed
    assert len(read(tmp_path / "out")) == 6


def test_where_masks_are_required_one_of_another_shape_rejects_its_image(tree, tmp_path):
    write(tree / "m.png", picture(0, (10, 10)))
    rows = [["a/1.png", "m.png"], ["b/1.png", ""], ["b/2.jpg", ""]]
    labels = write_csv(tmp_path / "l.csv", ["file", "mask"], *rows)
    assert run(f"--labels={labels}", "--masks=required", output=tmp_path / "out", source=tree) == 0
    assert read_rejected(tmp_path / "out/my_images_2") == {
        "a/1.png": "mask m.png: is 10 x 10 pixels, the image 64 x 48"
    }
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
    assert "error: Not a directory" in refused(capsys, output=tmp_path / "out", source=tree)


def test_file_names_that_are_not_utf8_are_escaped(tmp_path):
    write(tmp_path / "in/x.png", picture(0))
    os.rename(tmp_path / "in/x.png", os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
    assert run(output=tmp_path / "out", source=tmp_path / "in") == 0
    assert [record["source"] for record in read(tmp_path / "out")] == ["caf\\xe9.png"]
    labels = tmp_path / "l.csv"
    labels.write_bytes(b"file,mask,label\ncaf\xe9.png,caf\xe9.png,\xe9\n")
    assert run(f"--labels={labels}", "--overwrite", output=tmp_path / "out", source=tmp_path / "in") == 0
    assert (tmp_path / "out/in/1.0.0/label.labels.txt").read_text(encoding="utf-8") == "é\n"


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
    manifest = json.loads((tmp_path / "1/phantom/1.0.0/manifest.json").read_text())
    assert (manifest["kept"], manifest["splits"]["test"]["frames"], manifest["splits"]["test"]["patients"]) == (
        20,
        4,
        2,
    )


def test_phantoms_of_several_lesions_have_masks_of_named_classes(tmp_path):
    flags = "--patients=5", "--frames=1", "--image_size=48"
    assert run(*flags, "--lesions=several", output=tmp_path, dataset="phantom") == 0
    manifest = json.loads((tmp_path / "phantom/1.0.0/manifest.json").read_text())
    names = {one["class"]: one["name"] for one in manifest["mask_colours"]}
    assert names == {1: "cyst", 2: "solid_regular", 3: "solid_irregular"}
    held = {
        number for one in read(tmp_path / "phantom", "train") for number in np.unique(records.decode_image(one["mask"]))
    }
    assert held <= {0, 1, 2, 3}
    assert run(*flags, output=tmp_path, dataset="phantom") == 2  # another dataset than the one that is there


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
