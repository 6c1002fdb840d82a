"""One table of the frames of all sources, or one sentence that says why not."""

import pickle

import numpy as np
import pytest

from tests.data.tables import made, table, write_classes, write_records
from usfmae_jax.data import augment, records
from usfmae_jax.data.table import images, names_beside, read_row, read_table
from usfmae_jax.errors import InputError
from usfmae_jax.tasks.classification import class_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 labelled frames in two splits, and one without a label."""
    folder = tmp_path_factory.mktemp("table") / "made" / "1.0.0"
    write_records(folder, made(30), split="train")
    write_records(folder, [*made(10, 30), *made(1, 40, label=-1)], split="test")
    write_classes(folder, ["Benign", "malignant"])
    return folder


@pytest.fixture(scope="module")
def frames(folder):
    return read_table(str(folder))


def test_one_id_of_very_many_letters_does_not_cost_as_much_for_every_record(tmp_path):
    records = made(30)
    records[7]["patient"] = "p" * 3_000_000  # of which an array for all would take 360 MB
    write_records(tmp_path / "made", records)
    with pytest.raises(InputError, match=r"patient of a record in .* has 3,000,000 letters"):
        read_table(str(tmp_path / "made"))


def test_a_table_has_every_frame_with_its_ids(frames):
    assert len(frames) == 41
    assert (frames.left_out, frames.damaged) == (0, 0)
    assert frames.label_names == ("Benign", "malignant")
    for row in (0, 10, 17, 39):
        record = read_row(frames, row)
        for name in ("dataset", "patient", "video", "frame", "source", "sha256", "label"):
            assert getattr(frames, name)[row] == record[name]
    assert frames.split.tolist() == ["test"] * 11 + ["train"] * 30  # files by name


def test_a_split_is_chosen_by_name(folder):
    frames = read_table(str(folder), "test")
    assert len(frames) == 11
    assert set(frames.split) == {"test"}


def test_a_damaged_record_is_left_out_and_counted(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "made-train.array_record-00000-of-00001"), "group_size:1")
    for data in (b"\xff\xff broken", *map(records.encode_record, made(8))):
        writer.write(data)
    writer.close()
    frames = read_table(str(tmp_path))
    assert (len(frames), frames.damaged) == (8, 1)
    assert frames.index.tolist() == list(range(1, 9))
    assert frames.label_names == ()  # nothing beside the shards names them
    assert frames.label_name.tolist() == ["0", "0", "1", "1"] * 2


def test_some_rows_are_a_table_too(frames):
    some = frames.take(np.asarray([40, 10, 3]))
    assert some.frame.tolist() == ["f29", "f40", "f33"]
    assert some.label_name.tolist() == ["Benign", "", "Benign"]
    assert (len(some), some.left_out) == (3, 38)
    assert read_row(some, 1) == read_row(frames, 10)
    assert len({frames.fingerprint, some.fingerprint, frames.take(np.asarray([40, 10])).fingerprint}) == 3


def test_sources_are_joined_and_overlapping_ones_are_read_once(folder, tmp_path):
    other = write_records(tmp_path / "other", made(8, dataset="other"), "other")
    write_classes(other, ["Benign", "malignant"])
    frames = read_table(f"{folder}, {other},{folder}")
    assert len(frames) == 49
    assert len(set(frames.patient_key)) == 21 + 4
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
    assert read_table(str(copy)).fingerprint == frames.fingerprint
    assert table("pq", [0, 1]).fingerprint != table("pq", [1, 0]).fingerprint != table("pr", [1, 0]).fingerprint


@pytest.mark.parametrize(("threads", "batch_size"), [(1, 7), (3, 40), (2, 100)])
def test_images_come_whole_in_the_order_that_was_asked_for(frames, threads, batch_size):
    rows = np.random.default_rng(0).permutation(41)[:25]
    options = {"size": (16, 20), "channels": 3, "batch_size": batch_size, "threads": threads}
    batches = list(images(frames, rows, **options))
    assert [len(batch) for batch in batches] == [7, 7, 7, 4] if batch_size == 7 else [25]
    pixels = np.concatenate(batches)
    assert pixels.dtype == np.uint8
    for place in (0, 24):
        whole = records.decode_image(read_row(frames, rows[place])["image"], 3)
        np.testing.assert_array_equal(pixels[place], augment.resize(whole, (16, 20)))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("label.labels.txt", b"\xff\xfe", "label.labels.txt is no text in UTF-8"),
        ("label.labels.txt", b"a\n" * 100_001, "names 100,001 classes, more than 100,000"),
        ("manifest.json", b'{"label_names": [' + b"1," * 100_000 + b"1]}", "names 100,001 classes"),
    ],
)
def test_a_list_of_classes_that_is_none_is_one_sentence(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        names_beside(str(tmp_path))


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"label_names": 5}', b'{"label_names": "ab"}', b"\xff"])
def test_a_manifest_that_says_nothing_of_classes_is_passed_over(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    assert names_beside(str(tmp_path)) == ()


def test_a_huge_label_costs_no_memory_and_is_no_class(tmp_path):
    frames = read_table(str(write_records(tmp_path, [*made(1, label=1 << 40), *made(1, 1, label=0)])))
    assert frames.label_name.tolist() == [str(1 << 40), "0"]
    with pytest.raises(InputError, match="has the label 1099511627776"):
        class_names(frames)


def test_a_damaged_image_is_named(tmp_path):
    write_records(tmp_path, [*made(4), *made(1, 4, image=b"\xff\xd8\xff broken")])
    frames = read_table(str(tmp_path))
    with pytest.raises(InputError, match=r"record number 4 of .*made-train.array_record.* is damaged"):
        list(images(frames, range(5), size=(8, 8), channels=1, batch_size=2))


def test_a_table_travels_to_worker_processes(frames):
    frames.frame_key  # noqa: B018  cached values travel too
    copy = pickle.loads(pickle.dumps(frames))
    assert read_row(copy, 3) == read_row(frames, 3)
