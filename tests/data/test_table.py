"""One table of the labelled frames of all sources, or one sentence that says why not."""

import json
import pickle

import numpy as np
import pytest

from tests.data.tables import made, table, write_classes, write_records
from usfmae_jax.data import augment, records
from usfmae_jax.data import table as labelled
from usfmae_jax.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 labelled frames in two splits, one without a label, one that is no record."""
    folder = tmp_path_factory.mktemp("labelled") / "made" / "1.0.0"
    write_records(folder, made(30), split="train")
    write_records(folder, [*made(10, 30), *made(1, 40, label=-1)], split="test")
    write_classes(folder, ["Benign", "malignant"])
    return folder


@pytest.fixture(scope="module")
def frames(folder):
    return labelled.read_labelled(str(folder))


def test_a_table_has_every_labelled_frame_with_its_ids(frames):
    assert len(frames) == 40
    assert (frames.unlabelled, frames.damaged) == (1, 0)
    assert frames.class_names == ("Benign", "malignant")
    for row in (0, 17, 39):
        record = labelled.read_row(frames, row)
        for name in ("dataset", "patient", "video", "frame", "source", "sha256", "label"):
            assert getattr(frames, name)[row] == record[name]
    assert frames.split.tolist() == ["test"] * 10 + ["train"] * 30  # files by name


def test_a_split_is_chosen_by_name(folder):
    frames = labelled.read_labelled(str(folder), "test")
    assert len(frames) == 10
    assert set(frames.split) == {"test"}


def test_a_damaged_record_is_left_out_and_counted(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "made-train.array_record-00000-of-00001"), "group_size:1")
    for data in (b"\xff\xff broken", *map(records.encode_record, made(8))):
        writer.write(data)
    writer.close()
    frames = labelled.read_labelled(str(tmp_path))
    assert (len(frames), frames.damaged) == (8, 1)
    assert frames.index.tolist() == list(range(1, 9))
    assert frames.class_names == ("0", "1")  # nothing beside the shards names them


def test_sources_are_joined_and_overlapping_ones_are_read_once(folder, tmp_path):
    other = write_records(tmp_path / "other", made(8, dataset="other"), "other")
    write_classes(other, ["Benign", "malignant"])
    frames = labelled.read_labelled(f"{folder}, {other},{folder}")
    assert len(frames) == 48
    assert len(set(frames.patient_key)) == 20 + 4
    assert frames.frame_key[0] == "made/v30/f30"  # neither the frame nor the video is unique over both


def test_unknown_patients_and_videos_are_their_own():
    frames = table(["p", "", "", ""], [0, 1, 0, 1], video=["", "v", "v", ""], source=["a", "b", "c", ""])
    assert frames.patient_key.tolist() == ["made/p", "made/v", "made/v", "made/#3"]
    assert frames.video_key.tolist() == ["made/a", "made/v", "made/v", "made/#3"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"frame": ["x", "y"], "video": ["v", "v"]}, ["x", "y"]),
        ({"frame": ["0", "0"], "video": ["v", "w"]}, ["v/0", "w/0"]),
        ({"frame": ["0", "0"], "video": ["v", "v"], "dataset": ["d", "e"]}, ["d/v/0", "e/v/0"]),
        ({"frame": ["", ""], "video": ["", ""]}, ["made///0", "made///1"]),
    ],
)
def test_every_row_has_a_name_of_its_own(columns, expected):
    assert table(["p", "q"], [0, 1], **columns).frame_key.tolist() == expected


def test_the_fingerprint_changes_with_labels_and_not_with_the_place(folder, frames, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert labelled.read_labelled(str(copy)).fingerprint == frames.fingerprint
    assert table("pq", [0, 1]).fingerprint != table("pq", [1, 0]).fingerprint != table("pr", [1, 0]).fingerprint


def test_class_names_may_come_from_the_manifest(tmp_path):
    write_records(tmp_path, made(8))
    (tmp_path / "manifest.json").write_text(json.dumps({"label_names": ["x", "y"]}))
    assert labelled.read_labelled(str(tmp_path)).class_names == ("x", "y")
    (tmp_path / "manifest.json").unlink()
    assert labelled.read_labelled(str(tmp_path), classes=("u", "v")).class_names == ("u", "v")


def test_expected_classes_do_not_mind_case(folder):
    assert labelled.read_labelled(str(folder), classes=("BENIGN", "Malignant")).class_names == ("Benign", "malignant")


@pytest.mark.parametrize("classes", [("malignant", "benign"), ("benign",), ("benign", "malignant", "normal")])
def test_other_classes_than_expected_are_refused(folder, classes):
    with pytest.raises(InputError, match=r"config.classes=.*" + classes[-1] + r".* but the shards have .*Benign,mal"):
        labelled.read_labelled(str(folder), classes=classes)


def test_data_without_labels_is_refused(tmp_path):
    write_records(tmp_path, made(4, label=-1))
    with pytest.raises(InputError, match="--labels"):
        labelled.read_labelled(str(tmp_path))


def test_one_class_only_is_refused(tmp_path):
    write_records(tmp_path, made(4, label=1))
    write_classes(tmp_path, ["a", "b"])
    with pytest.raises(InputError, match="one class only, 'b'"):
        labelled.read_labelled(str(tmp_path))


def test_a_label_outside_of_the_class_list_is_refused(tmp_path):
    write_records(tmp_path, [*made(4), *made(1, 4, label=2)])
    write_classes(tmp_path, ["a", "b"])
    with pytest.raises(InputError, match="label 2 is outside the class list, whose 2 names are a, b"):
        labelled.read_labelled(str(tmp_path))


def test_sources_with_different_classes_are_refused(folder, tmp_path):
    other = write_records(tmp_path, made(4), "other")
    with pytest.raises(InputError, match="some sources name their classes"):
        labelled.read_labelled(f"{folder},{other}")
    write_classes(other, ["no", "yes"])
    with pytest.raises(InputError, match="different classes: Benign, malignant and no, yes"):
        labelled.read_labelled(f"{folder},{other}")


@pytest.mark.parametrize(("threads", "batch_size"), [(1, 7), (3, 40), (2, 100)])
def test_images_come_whole_in_the_order_that_was_asked_for(frames, threads, batch_size):
    rows = np.random.default_rng(0).permutation(40)[:25]
    options = {"size": (16, 20), "channels": 3, "batch_size": batch_size, "threads": threads}
    batches = list(labelled.images(frames, rows, **options))
    assert [len(batch) for batch in batches] == [7, 7, 7, 4] if batch_size == 7 else [25]
    pixels = np.concatenate(batches)
    assert pixels.dtype == np.uint8
    for place in (0, 24):
        whole = records.decode_image(labelled.read_row(frames, rows[place])["image"], 3)
        np.testing.assert_array_equal(pixels[place], augment.resize(whole, (16, 20)))


def test_a_damaged_image_is_named(tmp_path):
    write_records(tmp_path, [*made(4), *made(1, 4, image=b"\xff\xd8\xff broken")])
    frames = labelled.read_labelled(str(tmp_path))
    with pytest.raises(InputError, match=r"record number 4 of .*made-train.array_record.* is damaged"):
        list(labelled.images(frames, range(5), size=(8, 8), channels=1, batch_size=2))


def test_a_table_travels_to_worker_processes(frames):
    frames.frame_key  # noqa: B018  cached values travel too
    copy = pickle.loads(pickle.dumps(frames))
    assert labelled.read_row(copy, 3) == labelled.read_row(frames, 3)
