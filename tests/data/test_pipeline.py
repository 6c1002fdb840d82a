"""Batches follow from (seed, step) and the shards alone."""

import itertools

import cv2
import numpy as np
import pytest

from tests.helpers import frame, write_shards
from usfmae_jax.data import augment, pipeline, records
from usfmae_jax.errors import InputError


def _dataset(sources, **options):
    defaults = {"size": (16, 16), "channels": 1, "batch_size": 8, "how": augment.Augmentation(), "seed": 0}
    return pipeline.training_dataset(sources, **(defaults | options))


@pytest.fixture(scope="module")
def sources(shards):
    return pipeline.open_sources(shards, "train")


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
    labelled = pipeline.load_labelled(sources[0], size=(16, 16), channels=1, limit=100)
    assert sorted(labelled["label"]) == [0] * 6 + [1] * 6


def test_labelled_frames_are_spread_over_the_shards(sources):
    found = pipeline.load_labelled(sources[0], size=(16, 24), channels=1, limit=16)
    assert found["image"].shape == (16, 16, 24, 1)
    assert len(set(found["patient"])) == 8
    assert set(found["label"]) == {0, 1}


def test_a_probe_needs_two_classes(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    from tests.helpers import record

    writer = ArrayRecordWriter(str(tmp_path / "x-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(6):
        writer.write(records.encode_record(record(i, label=-1 if i % 2 else 1)))
    writer.close()
    with pytest.raises(InputError, match="fewer than two labelled classes"):
        pipeline.load_labelled(records.open_shards(str(tmp_path)), size=(16, 16), channels=1, limit=100)
