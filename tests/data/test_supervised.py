"""Labelled batches follow from (rows, seed, step) alone, and every image keeps its label."""

import itertools

import numpy as np
import pytest

from tests.data.tables import made, write_records
from usfmae_jax.data import augment, pipeline, supervised
from usfmae_jax.data.table import read_labelled, whole_image
from usfmae_jax.errors import InputError

WHOLE = augment.Augmentation(crop_scale=(1, 1), crop_ratio=(1.2, 1.2), hflip=0)  # what the frames are: 40 x 48
ROWS = np.asarray([0, 1, 2, 3, 8, 9, 10, 12, 13, 20])  # labels 0 0 1 1 0 0 1 0 0 0


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return read_labelled(str(write_records(tmp_path_factory.mktemp("made"), made(24))))


def dataset(frames, rows=ROWS, **options):
    defaults = {"size": (40, 48), "channels": 1, "batch_size": 4, "how": WHOLE, "seed": 0}
    return supervised.supervised_dataset(frames, rows, **(defaults | options))


def rows_of(frames, batch):
    """Which rows a batch shows, by their pixels; the labels must be those of the rows."""
    pictures = np.stack([whole_image(frames, row, (40, 48), 1) for row in range(len(frames))])
    differences = np.abs(batch["image"][:, None].astype(int) - pictures[None]).mean(axis=(2, 3, 4))
    assert (differences.min(axis=1) < 1).all()
    found = differences.argmin(axis=1)
    np.testing.assert_array_equal(batch["label"], frames.label[found])
    return found.tolist()


def test_every_epoch_shows_every_row_once_with_its_label(frames):
    data = dataset(frames)
    assert data[0]["image"].dtype == np.uint8
    assert data[0]["label"].dtype == np.int32
    seen = [row for step in range(5) for row in rows_of(frames, data[step])]  # 20 places: two epochs
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(ROWS.tolist())
    assert seen[:10] != seen[10:]


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 3), (1, 1)])
def test_batches_do_not_depend_on_workers_or_where_they_start(frames, workers, threads):
    data = dataset(frames, how=augment.Augmentation(brightness=(-0.1, 0.1), randaugment_magnitude=9))
    batches = list(itertools.islice(pipeline.iterate(data, 3, workers, threads), 3))
    for step, batch in enumerate(batches, start=3):
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name], data[step][name])


def test_hosts_divide_a_batch(frames):
    parts = [dataset(frames, host=host, hosts=2)[5] for host in range(2)]
    for name in ("image", "label"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), dataset(frames)[5][name])


def test_seeds_differ(frames):
    assert rows_of(frames, dataset(frames)[0]) != rows_of(frames, dataset(frames, seed=1)[0])


def test_a_balanced_set_shows_classes_equally_often(frames):
    data = dataset(frames, balanced=True)
    labels = np.concatenate([data[step]["label"] for step in range(15)])
    assert labels.mean() == pytest.approx(0.5, abs=0.02)
    assert set(itertools.chain(*(rows_of(frames, data[step]) for step in range(15)))) == set(ROWS.tolist())
    assert dataset(frames, [0, 1], balanced=True)[0]["label"].tolist() == [0] * 4  # one class is no reason to fail


def test_a_damaged_record_is_replaced_by_another_row_with_that_rows_label(tmp_path):
    written = made(12)
    written[4]["image"] = b"\xff\xd8\xff broken"
    frames = read_labelled(str(write_records(tmp_path, written)))
    data = dataset(frames, [2, 3, 4, 5, 6, 7], batch_size=6)
    report = pipeline.DamageReport([frames.shards], limit=0.5)
    for step in range(4):
        batch = data[step]
        report.update(batch["damaged"])
        for image, label in zip(batch["image"], batch["label"], strict=True):
            alike = [
                row
                for row in (2, 3, 5, 6, 7)
                if np.abs(image.astype(int) - whole_image(frames, row, (40, 48), 1)).mean() < 1
            ]
            assert [frames.label[row] for row in alike] == [label]
    assert report.found == {(0, 4)}


def test_what_cannot_be_trained_on_is_refused(frames):
    with pytest.raises(InputError, match="cannot be divided among 3 hosts"):
        dataset(frames, hosts=3)
    with pytest.raises(InputError, match="no frames to train on"):
        dataset(frames, [])
