"""What weights have seen is told from what the frames show, not from what their dataset is called."""

import dataclasses
import hashlib
import json
import shutil

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


def told(lineage, table):
    """dataset -> job -> (number of frames seen, whether that is all)."""
    return {
        dataset: {job: (len(seen.rows), seen.certain) for job, seen in jobs.items()}
        for dataset, jobs in provenance.seen_in(lineage, table).items()
    }


def test_frames_are_recognised_under_another_name_with_labels_and_cleaned(built):
    lineage = [stage(built / "first")]
    schema.check_lineage(json.loads(json.dumps(lineage)))
    seen = {name: told(lineage, read_table(str(built / name))) for name in ("first", "second", "other")}
    assert seen == {
        "first": {"first": {"pretrain": (8, True)}},
        "second": {"second": {"pretrain": (8, True)}},
        "other": {"other": {"pretrain": (4, True)}},
    }
    (sentence,) = provenance.warn_of_seen(lineage, read_table(str(built / "other")))
    assert "pretrained, without labels, on 4 of the 8 frames of other that are tested here" in sentence
    assert told([*lineage, *lineage, stage(built / "second")], read_table(str(built / "other"))) == seen["other"]


def test_a_lineage_says_whether_marks_were_removed(built, tmp_path):
    shutil.copytree(built / "first", tmp_path / "first")
    assert "cleaned" not in stage(tmp_path / "first")["data"][0]
    path = tmp_path / "first/1.0.0/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cleaned": {"text": 120}}))
    found = stage(tmp_path / "first")
    schema.check_lineage([found])
    assert found["data"][0]["cleaned"] is True
    restricted = provenance.restrict(found["data"], read_table(str(built / "first")))
    assert restricted[0]["cleaned"] is True


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
    assert told([train], read_table(str(tmp_path / "out"), "test")) == {"x": {"pretrain": (0, True)}}
    assert told([train], read_table(str(tmp_path / "out"), "train")) == {"x": {"pretrain": (6, True)}}
    assert told([stage(tmp_path / "out")], read_table(str(tmp_path / "out"))) == {"x": {"pretrain": (8, True)}}


def test_a_part_of_a_split_has_no_hashes(built):
    (shard,) = (built / "first/1.0.0").glob("*array_record*")
    manifest = json.loads((shard.parent / "manifest.json").read_text())
    manifest["splits"]["train"]["frames"] = 9
    (shard.parent / "manifest.json").write_text(json.dumps(manifest))
    assert "frame_hashes" not in stage(built / "first")["data"][0]
    manifest["splits"]["train"]["frames"] = 8
    (shard.parent / "manifest.json").write_text(json.dumps(manifest))


def test_other_frames_of_the_same_dataset_are_no_false_alarm():
    known = [{"dataset": "mine", "frame_hashes": provenance.hash_frames(sha(range(5)))}]
    lineage = [{"job": "pretrain", "data": known}]
    assert told(lineage, frames(range(10, 20))) == {"mine": {"pretrain": (0, True)}}
    (sentence,) = provenance.warn_of_seen(lineage, frames(range(10, 20)))
    assert "on frames of mine, none of them pixel by pixel one that is tested here" in sentence
    assert told(lineage, frames(range(10, 20), dataset="theirs")) == {}


def test_without_hashes_the_name_decides():
    known = {"dataset": "mine", "frame_hashes": provenance.hash_frames(sha(range(5)))}
    table, other = frames(range(3)), frames(range(7, 9))
    assert told([], table) == {}
    assert told([{"data": [{}, {"dataset": "mine"}]}], table) == {"mine": {"unknown": (0, False)}}
    assert told([{"job": "a", "data": [known, {"dataset": "mine"}]}], table) == {"mine": {"a": (3, False)}}
    assert told([{"job": "a", "data": [known, {"dataset": "mine"}]}], other) == {"mine": {"a": (0, False)}}
    nameless = dataclasses.replace(frames(range(3)), sha256=np.array(["", "", ""]))
    assert told([{"job": "a", "data": [known]}], nameless) == {"mine": {"a": (0, False)}}
    assert provenance.hash_frames(["", *sha([1])]) == ""
    (sentence,) = provenance.warn_of_seen([{"job": "a\x1b" * 99, "data": [known, {"dataset": "mine"}]}], other)
    assert "\x1b" not in sentence
    assert len(sentence) < 200
    assert sentence.endswith("on frames of mine that are tested here: no held-out result")


@pytest.mark.parametrize("bad", ["", "x", "AAAA", "ä" * 8, 3, None, ["AAAAAAAA"]])
def test_a_sample_that_is_none_means_unknown(bad):
    lineage = [{"job": "a", "data": [{"dataset": "mine", "frame_hashes": bad}]}]
    assert told(lineage, frames(range(3))) == {"mine": {"a": (0, False)}}


def test_of_many_frames_a_sample_of_limited_size_recognises_some():
    sample = provenance.hash_frames(sha(range(100_000)))
    assert len(sample) == 8 * 16_385
    lineage = [{"job": "a", "data": [{"dataset": "theirs", "frame_hashes": sample}]}]
    count, certain = told(lineage, frames(range(99_000, 100_000)))["mine"]["a"]
    assert 100 < count < 230
    assert not certain
    (sentence,) = provenance.warn_of_seen(lineage, frames(range(99_000, 100_000)))
    assert f"at least {count} of the 1,000 frames of mine" in sentence
    assert told(lineage, frames(range(100_000, 101_000))) == {}
    # Of the same name, which frames were seen is not known.
    assert told(lineage, frames(range(100_000, 101_000), dataset="theirs")) == {"theirs": {"a": (0, False)}}


def test_a_member_has_learnt_from_its_own_training_frames_alone():
    data = [{"dataset": "mine", "frame_hashes": provenance.hash_frames(sha(range(9)))}, {"dataset": "private"}]
    own = provenance.restrict(data, frames(range(4)))
    assert own == [{"dataset": "mine", "frame_hashes": provenance.hash_frames(sha(range(4)))}, {"dataset": "private"}]
    assert told([{"job": "finetune", "data": own}], frames(range(3, 9))) == {"mine": {"finetune": (1, True)}}
    assert "frame_hashes" not in provenance.restrict(data, frames(range(4), dataset="other"))[0]


def test_a_person_reads_a_lineage_without_hashes():
    lineage = [{"job": "a", "data": [{"dataset": "mine", "frame_hashes": "AAAAAAAA"}], "code": "x"}, {"job": "b"}]
    assert provenance.without_hashes(lineage) == [
        {"job": "a", "data": [{"dataset": "mine"}], "code": "x"},
        {"job": "b"},
    ]
