"""Batches follow from (seed, step) and the rows alone, and every image keeps its label."""

import itertools

import cv2
import numpy as np
import pytest

from tests.data.tables import made, write_records
from tests.helpers import frame, write_shards
from usfmae_jax.data import augment, pipeline
from usfmae_jax.data.table import read_table, whole_image
from usfmae_jax.errors import InputError

WHOLE = augment.Augmentation(crop_scale=(1, 1), crop_ratio=(1.2, 1.2), hflip=0)  # what the frames are: 40 x 48
ROWS = np.asarray([0, 1, 2, 3, 8, 9, 10, 12, 13, 20])  # labels 0 0 1 1 0 0 1 0 0 0


def _dataset(sources, size=(16, 16), channels=1, how=augment.Augmentation(), **options):  # noqa: B008  it is frozen
    load = pipeline.LoadView(pipeline.all_rows(sources), size, channels, how)
    return pipeline.training_batches(load, **({"batch_size": 8, "seed": 0} | options))


def _labelled(frames, rows=ROWS, how=WHOLE, balanced=False, **options):
    label = frames.label[rows].astype(np.int32)
    source = pipeline.Rows(frames.shards, frames.index[rows], {"label": label})
    load = pipeline.LoadView((source,), (40, 48), 1, how)
    strata = label if balanced else None
    return pipeline.training_batches(load, strata=strata, **({"batch_size": 4, "seed": 0} | options))


@pytest.fixture(scope="module")
def sources(shards):
    return pipeline.open_sources(shards, "train")


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return read_table(str(write_records(tmp_path_factory.mktemp("made"), made(24))))


def _take(dataset, start, count, workers=0, threads=2):
    return [batch["image"] for batch in itertools.islice(pipeline.iterate(dataset, start, workers, threads), count)]


def test_a_batch_is_uint8_and_shaped(sources):
    batch = _dataset(sources)[0]
    assert batch["image"].shape == (8, 16, 16, 1)
    assert batch["image"].dtype == np.uint8
    assert _dataset(sources, channels=3, size=(8, 24))[0]["image"].shape == (8, 8, 24, 3)


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 4), (1, 1), (3, 1)])
def test_batches_do_not_depend_on_workers(sources, workers, threads):
    expected = [_dataset(sources)[step]["image"] for step in range(5, 11)]
    np.testing.assert_array_equal(_take(_dataset(sources), 5, 6, workers, threads), expected)


@pytest.mark.parametrize("hosts", [2, 4])
def test_batches_do_not_depend_on_hosts(sources, hosts):
    for step in (0, 7):
        rows = [_dataset(sources, host=host, hosts=hosts)[step]["image"] for host in range(hosts)]
        np.testing.assert_array_equal(np.concatenate(rows), _dataset(sources)[step]["image"])


def test_seeds_and_steps_differ(sources):
    first, second, other = _dataset(sources)[0], _dataset(sources)[1], _dataset(sources, seed=1)[0]
    assert not np.array_equal(first["image"], second["image"])
    assert not np.array_equal(first["image"], other["image"])


def _sequence(dataset, count):
    """The (source, record) pairs behind the first `count` places: what the views are made from."""
    rows = dataset.parents[0]
    assert isinstance(rows, pipeline.HostRows)
    order = rows.parents[0].parents[0]
    return [order[i] for i in range(count)]


def test_every_epoch_shows_every_record_once_in_a_new_order(sources):
    order = _sequence(_dataset(sources), 96)
    first, second = order[:48], order[48:]
    assert sorted(first) == sorted(second) == [(0, i) for i in range(48)]
    assert first != second


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_an_epoch_shows_every_record_once_to_whatever_number_of_hosts(sources, hosts):
    parts = [_dataset(sources, host=host, hosts=hosts) for host in range(hosts)]
    for epoch in (range(6), range(6, 12)):
        seen = [tuple(pair) for step in epoch for part in parts for pair in part[step]["record"].tolist()]
        assert sorted(seen) == [(0, number) for number in range(48)]


def test_a_mixture_follows_its_weights(sources, tmp_path):
    write_shards(tmp_path, 12)
    both = [*sources, *pipeline.open_sources(str(tmp_path), "train")]
    by_size = [source for source, _ in _sequence(_dataset(both), 600)]
    assert by_size.count(1) == pytest.approx(600 * 12 / 60, abs=3)
    weighted = [source for source, _ in _sequence(_dataset(both, weights=(1, 3)), 600)]
    assert weighted.count(1) == pytest.approx(450, abs=3)
    dataset = _dataset(both, weights=(1, 3))
    np.testing.assert_array_equal(_take(dataset, 3, 2), [dataset[3]["image"], dataset[4]["image"]])


@pytest.mark.parametrize("weights", [(1,), (1, -1), (0, 1)])
def test_weights_that_do_not_fit_are_refused(sources, weights):
    with pytest.raises(InputError, match=r"config\.data\.weights needs 2 positive numbers"):
        _dataset([*sources, *sources], weights=weights)


def test_hosts_must_divide_the_batch(sources):
    with pytest.raises(InputError, match="cannot be divided among 3 hosts"):
        _dataset(sources, hosts=3)


def test_array_record_and_tfrecord_give_the_same_batches(tmp_path):
    datasets = []
    for kind in ("array_record", "tfrecord"):
        (tmp_path / kind).mkdir()
        write_shards(tmp_path / kind, 20, kind=kind)
        datasets.append(_dataset(pipeline.open_sources(str(tmp_path / kind), "train")))
    for step in range(4):
        np.testing.assert_array_equal(datasets[0][step]["image"], datasets[1][step]["image"])


def test_damaged_records_are_replaced_counted_once_and_named(tmp_path):
    paths = write_shards(tmp_path, 20, damaged=(3, 8))
    sources = pipeline.open_sources(str(tmp_path), "train")
    dataset = _dataset(sources)
    report = pipeline.DamageReport(sources, limit=0.1)
    lines = [line for step in range(10) for line in report.update(dataset[step]["damaged"])]
    assert sorted(lines) == sorted(
        [f"damaged record skipped: number 1 of {paths[1]}", f"damaged record skipped: number 4 of {paths[0]}"]
    )
    assert report.found == {(0, 11), (0, 4)}
    for step in range(3):  # a replacement is as deterministic as the rest
        np.testing.assert_array_equal(dataset[step]["image"], _dataset(sources)[step]["image"])


def test_too_much_damage_is_fatal(tmp_path):
    write_shards(tmp_path, 20, damaged=(3, 8))
    sources = pipeline.open_sources(str(tmp_path), "train")
    report = pipeline.DamageReport(sources, limit=0.05)
    damaged = np.concatenate([_dataset(sources)[step]["damaged"] for step in range(10)])
    with pytest.raises(InputError, match=r"2 of 20 records are damaged, more than config\.data\.max_damaged=0\.05"):
        report.update(damaged)


def test_damage_known_before_a_restart_still_counts(tmp_path):
    write_shards(tmp_path, 20, damaged=(3, 8))
    sources = pipeline.open_sources(str(tmp_path), "train")
    report = pipeline.DamageReport(sources, limit=0.1, known=[[0, 4]])
    lines = [line for step in range(10) for line in report.update(_dataset(sources)[step]["damaged"])]
    assert len(lines) == 1


def test_all_damaged_ends_the_run(tmp_path):
    write_shards(tmp_path, 6, damaged=tuple(range(6)))
    with pytest.raises(InputError, match="8 records in a row are damaged"):
        _dataset(pipeline.open_sources(str(tmp_path), "train"))[0]


def test_shards_written_by_tensorflow_datasets_are_read(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Foreign(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(None, None, 1)), "label": tfds.features.ClassLabel(num_classes=2)}
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(12):
                path = tmp_path / f"{i}.png"
                cv2.imwrite(str(path), frame(i, i % 2))
                yield i, {"image": path, "label": i % 2}

    builder = Foreign(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    sources = pipeline.open_sources(str(tmp_path / "tfds"), "train")
    assert _dataset(sources)[3]["image"].max() > 0
    assert sorted(read_table(str(tmp_path / "tfds"), "train").label) == [0] * 6 + [1] * 6


def rows_of(frames, batch):
    """Which rows a batch shows, by their pixels; the labels must be those of the rows."""
    pictures = np.stack([whole_image(frames, row, (40, 48), 1) for row in range(len(frames))])
    differences = np.abs(batch["image"][:, None].astype(int) - pictures[None]).mean(axis=(2, 3, 4))
    assert (differences.min(axis=1) < 1).all()
    found = differences.argmin(axis=1)
    np.testing.assert_array_equal(batch["label"], frames.label[found])
    return found.tolist()


def test_every_epoch_shows_every_row_once_with_its_label(frames):
    data = _labelled(frames)
    assert data[0]["image"].dtype == np.uint8
    assert data[0]["label"].dtype == np.int32
    seen = [row for step in range(5) for row in rows_of(frames, data[step])]  # 20 places: two epochs
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(ROWS.tolist())
    assert seen[:10] != seen[10:]


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 3), (1, 1)])
def test_labelled_batches_do_not_depend_on_workers_or_where_they_start(frames, workers, threads):
    data = _labelled(frames, how=augment.Augmentation(brightness=(-0.1, 0.1), randaugment_magnitude=9))
    batches = list(itertools.islice(pipeline.iterate(data, 3, workers, threads), 3))
    for step, batch in enumerate(batches, start=3):
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name], data[step][name])


def test_hosts_divide_a_labelled_batch(frames):
    parts = [_labelled(frames, host=host, hosts=2)[5] for host in range(2)]
    for name in ("image", "label"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), _labelled(frames)[5][name])


def test_seeds_differ(frames):
    assert rows_of(frames, _labelled(frames)[0]) != rows_of(frames, _labelled(frames, seed=1)[0])


def test_a_balanced_set_shows_classes_equally_often(frames):
    data = _labelled(frames, balanced=True)
    labels = np.concatenate([data[step]["label"] for step in range(15)])
    assert labels.mean() == pytest.approx(0.5, abs=0.02)
    assert set(itertools.chain(*(rows_of(frames, data[step]) for step in range(15)))) == set(ROWS.tolist())
    assert _labelled(frames, [0, 1], balanced=True)[0]["label"].tolist() == [0] * 4  # one class is no reason to fail


def test_a_damaged_record_is_replaced_by_another_row_with_that_rows_label(tmp_path):
    written = made(12)
    written[4]["image"] = b"\xff\xd8\xff broken"
    frames = read_table(str(write_records(tmp_path, written)))
    data = _labelled(frames, [2, 3, 4, 5, 6, 7], batch_size=6)
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


def test_without_rows_there_is_nothing_to_train_on(frames):
    with pytest.raises(InputError, match="no frames to train on"):
        _labelled(frames, ROWS[:0])


def test_batches_are_those_of_earlier_versions(tmp_path):
    """A run that is continued after an update sees what it would have seen. Grey levels tell records apart."""
    written = made(24)
    for i, one in enumerate(written):
        one["image"] = cv2.imencode(".png", np.full((40, 48), 60 + 5 * i, np.uint8))[1].tobytes()
    written[9]["image"] = b"\xff\xd8\xff broken"
    paths = str(write_records(tmp_path, written))
    how = augment.Augmentation(crop_scale=(0.5, 0.9), brightness=(-0.1, 0.1))
    options = {"how": how, "batch_size": 12, "seed": 3}
    mixed = _dataset(pipeline.open_sources(paths, "train") * 2, weights=(1, 2), **options)
    balanced = _labelled(read_table(paths), balanced=True, **options)
    assert [dataset[step]["image"][:, 1, 2, 0].tolist() for dataset in (mixed, balanced) for step in (0, 7)] == [
        [85, 41, 85, 195, 100, 178, 150, 147, 167, 114, 138, 152],
        [169, 90, 125, 127, 71, 193, 148, 130, 151, 99, 98, 72],
        [125, 51, 175, 135, 65, 78, 110, 87, 137, 94, 165, 82],  # the last but one replaces the damaged record
        [64, 105, 110, 92, 86, 88, 73, 60, 151, 89, 45, 107],
    ]
    assert balanced[0]["damaged"][:, 0].tolist() == [[-1, -1]] * 10 + [[0, 9], [-1, -1]]


@pytest.mark.parametrize(("threads", "ahead"), [(1, 0), (3, 50), (2, 1000)])
def test_what_is_loaded_ahead_comes_in_order_and_an_error_in_its_place(threads, ahead):
    assert list(pipeline.decode_ahead(lambda i: i * i, range(100), threads, ahead)) == [i * i for i in range(100)]
    loaded = pipeline.decode_ahead(lambda i: 1 / (40 - i), range(100), threads, ahead)
    assert list(itertools.islice(loaded, 32)) == [1 / (40 - i) for i in range(32)]  # threads take 16 at a time
    with pytest.raises(ZeroDivisionError):
        next(loaded)


def test_loading_ahead_ends_when_it_is_closed():
    loaded = []
    ahead = pipeline.decode_ahead(loaded.append, range(10_000), 2, 64)
    next(ahead)
    ahead.close()
    assert len(loaded) <= 64 + 2 * 16
