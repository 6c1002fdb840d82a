"""What weights have seen is told from what the frames show, not from what their dataset is called."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from tests.data import tables
from tests.data_prep import builds
from usfmae_jax.data import provenance
from usfmae_jax.data.records import open_shards
from usfmae_jax.data.table import read_table
from usfmae_jax.interop import schema


def stage(path, job="pretrain"):
    return {"job": job, "data": provenance.describe_data([open_shards(str(path))], hashes=True)}


def sha(numbers):
    return [hashlib.sha256(f"{number}".encode()).hexdigest() for number in numbers]


def frames(numbers, dataset="mine"):
    count = len(numbers)
    table = tables.table([*range(count)], [0] * count, dataset=[dataset] * count)
    return dataclasses.replace(table, sha256=np.array(sha(numbers)))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One folder built as `first`, cleaned otherwise and with labels as `second`, and half of it with others."""
    root = tmp_path_factory.mktemp("built")
    for number in range(8):
        builds.write(root / f"one/{'ab'[number % 2]}/{number}.png", builds.picture(number))
    for number in range(4, 12):
        builds.write(root / f"other/{number}.png", builds.picture(number))
    quiet = ("--clean=off", "--deduplicate=off")
    assert builds.run("--name=first", *quiet, source=root / "one", output=root / "out") == 0
    assert builds.run("--name=second", "--labels=parent", source=root / "one", output=root / "out") == 0
    assert builds.run("--name=other", *quiet, source=root / "other", output=root / "out") == 0
    assert builds.run("--name=private", "--private", *quiet, source=root / "one", output=root / "out") == 0
    return root / "out"


def test_frames_are_recognised_under_another_name_with_labels_and_cleaned(built):
    lineage = [stage(built / "first")]
    schema.check_lineage(json.loads(json.dumps(lineage)))
    seen = {name: provenance.seen_in(lineage, read_table(str(built / name))) for name in ("first", "second", "other")}
    assert seen == {
        "first": {"first": {"pretrain": 8}},
        "second": {"second": {"pretrain": 8}},
        "other": {"other": {"pretrain": 4}},
    }
    (sentence,) = provenance.warn_of_seen(lineage, read_table(str(built / "other")))
    assert "pretrained, without labels, on 4 of the 8 frames of other" in sentence


def test_private_builds_do_not_tell_which_pictures_weights_have_seen(built):
    assert "frame_hashes" not in stage(built / "private")["data"][0]
    manifest = (built / "private/1.0.0/manifest.json").read_text()
    assert json.loads(manifest)["frame_hashes"] == {}


def test_only_the_splits_that_were_trained_on_count(tmp_path):
    rows = [("file", "split"), *((f"{number}.png", "train" if number < 6 else "test") for number in range(8))]
    for name, _ in rows[1:]:
        builds.write(tmp_path / "in" / name, builds.picture(int(name[0])))
    labels = f"--labels={builds.write_csv(tmp_path / 'labels.csv', *rows)}"
    assert builds.run("--clean=off", "--name=x", labels, source=tmp_path / "in", output=tmp_path / "out") == 0
    train = {
        "job": "pretrain",
        "data": provenance.describe_data([open_shards(str(tmp_path / "out"), "train")], hashes=True),
    }
    assert provenance.seen_in([train], read_table(str(tmp_path / "out"), "test")) == {"x": {"pretrain": 0}}
    assert provenance.seen_in([train], read_table(str(tmp_path / "out"), "train")) == {"x": {"pretrain": 6}}
    assert provenance.seen_in([stage(tmp_path / "out")], read_table(str(tmp_path / "out"))) == {"x": {"pretrain": 8}}


def test_other_frames_of_the_same_dataset_are_no_false_alarm():
    lineage = [
        {"job": "pretrain", "data": [{"dataset": "mine", "frame_hashes": provenance.hash_frames(sha(range(5)))}]}
    ]
    assert provenance.seen_in(lineage, frames(range(10, 20))) == {"mine": {"pretrain": 0}}
    (sentence,) = provenance.warn_of_seen(lineage, frames(range(10, 20)))
    assert "on frames of mine, none of them pixel by pixel one that is tested here" in sentence
    assert provenance.seen_in(lineage, frames(range(10, 20), dataset="theirs")) == {}


def test_without_hashes_the_name_decides():
    known = {"dataset": "mine", "frame_hashes": provenance.hash_frames(sha(range(5)))}
    table = frames(range(3))
    assert provenance.seen_in([], table) == {}
    assert provenance.seen_in([{"data": [{}, {"dataset": "mine"}]}], table) == {"mine": {"unknown": None}}
    assert provenance.seen_in([{"job": "a", "data": [known, {"dataset": "mine"}]}], table) == {"mine": {"a": 3}}
    other = frames(range(7, 9))
    assert provenance.seen_in([{"job": "a", "data": [known, {"dataset": "mine"}]}], other) == {"mine": {"a": None}}
    nameless = dataclasses.replace(frames(range(3)), sha256=np.array(["", "", ""]))
    assert provenance.seen_in([{"job": "a", "data": [known]}], nameless) == {"mine": {"a": None}}
    assert provenance.hash_frames(["", *sha([1])]) == ""


@pytest.mark.parametrize("bad", ["", "x", "AAAA", "ä" * 8, 3, None, ["AAAAAAAA"]])
def test_a_sample_that_is_none_means_unknown(bad):
    lineage = [{"job": "a", "data": [{"dataset": "mine", "frame_hashes": bad}]}]
    assert provenance.seen_in(lineage, frames(range(3))) == {"mine": {"a": None}}


def test_of_many_frames_a_sample_of_limited_size_estimates_how_many_were_seen():
    sample = provenance.hash_frames(sha(range(20_000)))
    assert len(sample) == 8 * 2049
    lineage = [{"job": "a", "data": [{"dataset": "theirs", "frame_hashes": sample}]}]
    assert provenance.seen_in(lineage, frames(range(19_000, 20_000))) == {"mine": {"a": 1000}}
    count = provenance.seen_in(lineage, frames(range(18_000, 22_000)))["mine"]["a"]
    assert count == pytest.approx(2000, rel=0.2)
    assert provenance.seen_in(lineage, frames(range(20_000, 30_000))) == {}


def test_a_person_reads_a_lineage_without_hashes():
    lineage = [{"job": "a", "data": [{"dataset": "mine", "frame_hashes": "AAAAAAAA"}], "code": "x"}, {"job": "b"}]
    assert provenance.without_hashes(lineage) == [
        {"job": "a", "data": [{"dataset": "mine"}], "code": "x"},
        {"job": "b"},
    ]
