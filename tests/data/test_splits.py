"""No patient, video or picture is on two sides of a split; a split in a file is the same split."""

import csv
import itertools
import tracemalloc

import numpy as np
import pytest

from tests.data.tables import made, table, write_records
from usfmae_jax.data import splits
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError
from usfmae_jax.tasks.classification import select, strata


def many(patients: int = 60, classes: int = 2, seed: int = 0, **columns):
    """Patients with 1 to 4 frames of one class each; later classes are rarer."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, patients)
    labels = rng.choice(classes, patients, p=np.arange(classes, 0, -1) / sum(range(classes + 1)))
    labels[: 8 * classes] = np.arange(8 * classes) % classes
    return table(np.repeat([f"p{i}" for i in range(patients)], sizes), np.repeat(labels, sizes), classes, **columns)


def plan(frames, **options):
    return splits.plan(frames, strata(frames), **options)


def sides(fold, key):
    return [set(key[rows].tolist()) for rows in fold.parts().values()]


def same(one, other):
    return [fold.name for fold in one] == [fold.name for fold in other] and all(
        np.array_equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x.parts().values(), y.parts().values(), strict=True)
    )


PAIRS = np.asarray([[0, 30], [30, 60], [5, 100]])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{"kind": "group"}, {"kind": "group", "folds": 3}, {"kind": "single"}])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_group_is_never_on_two_sides(options, seed, classes):
    frames = many(classes=classes, seed=seed)
    folds, groups, excluded, _ = plan(frames, seed=seed, pairs=PAIRS, **options)
    assert not excluded
    for one, other in PAIRS:
        assert groups[one] == groups[other]
    for fold in folds:
        for key in (frames.patient_key, frames.video_key, groups, np.arange(len(frames))):
            for a, b in itertools.combinations(sides(fold, key), 2):
                assert not a & b
        for rows in fold.parts().values():
            assert set(frames.label[rows]) == set(range(classes))
            assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize("kind", ["group", "single"])
def test_without_classes_patients_alone_are_split(kind):
    frames = many()
    one = splits.Strata(np.zeros(len(frames), np.int64), ("",))
    folds, groups, *_ = splits.plan(frames, one, kind=kind)
    for fold in folds:
        assert sum(len(set(groups[rows].tolist())) for rows in fold.parts().values()) == 60
    part = splits.take_fraction(one, folds[0], groups, 0.1, seed=0)
    count = len(np.unique(groups[folds[0].train]))
    assert len(np.unique(groups[part.train])) == round(0.1 * count)
    with pytest.raises(InputError, match=r"config.split.folds=61 needs .* groups: the data has 60 patients"):
        splits.plan(frames, one, kind="group", folds=61)


def test_every_frame_is_tested_once_and_draws_follow_the_seed():
    frames = many()
    folds, *_ = plan(frames, kind="group", seed=1)
    assert [fold.name for fold in folds] == ["1", "2", "3", "4", "5"]
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(frames)))
    for fold in folds:
        assert sum(map(len, fold.parts().values())) == len(frames)
        assert len(fold.validation) == pytest.approx(0.2 * (len(frames) - len(fold.test)), rel=0.3)
    assert same(folds, plan(frames, kind="group", seed=1)[0])
    assert not same(folds, plan(frames, kind="group", seed=2)[0])


def test_patients_of_one_video_and_videos_of_one_patient_belong_together():
    frames = table(
        ["p", "p", "q", "r", "", ""], [0, 1] * 3, video=["a", "b", "b", "c", "d", "d"], source=list("uvwxyz")
    )
    assert splits.groups(frames).tolist() == [0, 0, 0, 1, 2, 2]
    assert splits.groups(frames, np.asarray([[1, 3]])).tolist() == [0, 0, 0, 0, 1, 1]


def test_fractions_are_nested_and_have_every_class():
    frames = many(100, classes=3)
    fold = plan(frames, kind="single")[0][0]
    groups = splits.groups(frames)
    shares = [
        splits.take_fraction(strata(frames), fold, groups, fraction, seed=3) for fraction in (0.01, 0.05, 0.1, 0.25, 1)
    ]
    counts = [len(np.unique(groups[share.train])) for share in shares]
    assert counts[0] == 3  # one of each class
    assert counts[3] == pytest.approx(0.25 * counts[4], abs=2)
    for small, large in itertools.pairwise(shares):
        assert set(small.train) <= set(large.train)
        assert not set(groups[small.train]) & set(groups[np.setdiff1d(large.train, small.train)])
    for share in shares:
        assert set(frames.label[share.train]) == {0, 1, 2}
        assert share.validation is fold.validation
        assert share.test is fold.test
    assert shares[4] is fold
    other = splits.take_fraction(strata(frames), fold, groups, 0.25, seed=4)
    assert set(other.train) != set(shares[3].train)


def test_classes_that_no_frame_has_cost_nothing_and_change_no_draw():
    frames = many(100, classes=3)
    groups, few = splits.groups(frames), strata(frames)
    (fold,) = splits.single(few, groups, 0.2, 0.2, seed=3)
    absent = splits.Strata(few.code, (*few.names, *map(str, range(50_000))))
    tracemalloc.start()
    try:
        assert same(splits.single(absent, groups, 0.2, 0.2, seed=3), [fold])
        with pytest.raises(InputError, match="class '0' has 0 patients"):
            splits.group_folds(absent, groups, 2, 0.2, seed=3)
        assert tracemalloc.get_traced_memory()[1] < 2e6  # bytes; a number for every group and class takes 40e6
    finally:
        tracemalloc.stop()


def test_a_class_that_is_always_a_minority_is_drawn_too():
    frames = table(np.repeat(list("abcdefghij"), 3), [0, 0, 1] * 2 + [0, 0, 0] * 8)
    rows = np.arange(30)
    fold = splits.Fold("1", rows, rows[:0], rows[:0])
    for seed in range(5):
        part = splits.take_fraction(strata(frames), fold, splits.groups(frames), 0.1, seed)
        assert set(frames.label[part.train]) == {0, 1}


@pytest.mark.parametrize("fraction", [0, -1, 1.5])
def test_a_fraction_is_a_share(fraction):
    frames = many()
    fold = plan(frames, kind="single")[0][0]
    with pytest.raises(InputError, match=r"config\.fractions"):
        splits.take_fraction(strata(frames), fold, splits.groups(frames), fraction, 0)


def test_what_is_written_is_read_again(tmp_path):
    frames = many(frame=[str(i % 3) for i in range(len(many()))])  # names that only videos tell apart
    folds, groups, *_ = plan(frames, kind="group", seed=5)
    path = tmp_path / "splits" / "splits.csv"
    splits.write_splits(path, frames, folds, groups)
    assert same(splits.read_splits(path, frames), folds)
    assert same(splits.read_splits(path.parent, frames), folds)
    assert same(plan(frames, path=str(path))[0], folds)
    with path.open() as file:
        row = next(csv.DictReader(file))
    assert list(row) == ["dataset", "patient", "video", "frame", "group", "label", "fold", "part"]


def test_rows_without_a_name_of_their_own_survive_a_file(tmp_path):
    frames = table(list("abcdefgh"), [0, 1] * 4, frame=[""] * 8, video=[""] * 8)
    fold = splits.Fold("single", np.asarray([0, 1]), np.asarray([2, 3]), np.asarray([4, 5]))
    splits.write_splits(tmp_path / "s.csv", frames, [fold], splits.groups(frames))
    assert same(splits.read_splits(tmp_path / "s.csv", frames), [fold])


def ten():
    return table(list("aabbccddee"), [0, 1] * 5)


GOOD = "frame,part\n" + "".join(f"f{i},{('train', 'val', 'TEST')[i // 2]}\n" for i in range(6))


def test_a_file_of_frames_and_parts_is_one_fold(tmp_path):
    (tmp_path / "mine.csv").write_text("\ufeff" + GOOD.replace("frame,part", " Frame ,Part,x").replace("\n", "\r\n"))
    (fold,) = splits.read_splits(tmp_path / "mine.csv", ten())
    assert [rows.tolist() for rows in fold.parts().values()] == [[0, 1], [2, 3], [4, 5]]
    assert fold.name == "single"
    _, _, _, note = plan(ten(), path=str(tmp_path / "mine.csv"))
    assert "mine.csv: 1 fold" in note
    assert "4 frames are in no part" in note


def test_files_of_a_folder_are_folds_of_their_names(tmp_path):
    for name in ("10", "9", "b"):
        (tmp_path / f"{name}.csv").write_text(GOOD)
    assert [fold.name for fold in splits.read_splits(tmp_path, ten())] == ["9", "10", "b"]


def test_frames_may_be_named_by_their_source(tmp_path):
    frames = table(list("aabbcc"), [0, 1] * 3, source=[f"dir/{i}.png" for i in range(6)])
    (tmp_path / "s.csv").write_text("frame,part\n" + "".join(f"dir/{i}.png,train\n" for i in range(6)))
    assert len(splits.read_splits(tmp_path / "s.csv", frames)[0].train) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "needs the columns frame and part.*nothing"),
        ("name,part\nf0,train\n", "needs the columns frame and part.*not name, part"),
        (GOOD + "f77,test\nf78,test\nf77,train\n", "names 2 frames that are not in the data, first 'f77'.*like 'f0'"),
        (GOOD + "f7,both\n", "part 'both'; write train, validation or test"),
        (GOOD + "f0,test\n", "fold single has frame 'f0' in two parts"),
        ("frame,part,fold\nf0,train,a/b\n", "fold 'a/b' needs a name of letters"),
        (GOOD.replace("f1,train", "f1,test"), "patient made/a is in train and in test"),
        (GOOD.replace("f5,TEST\n", ""), "fold single has no frame of class 'b' in test"),
        (GOOD.replace("TEST", "train"), "no frame of class 'a' in test"),
    ],
    ids=["absent", "empty", "columns", "frames", "part", "twice", "name", "patient", "class", "test"],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "s.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        plan(ten(), path=str(path))
    assert "\n" not in str(caught.value)


def test_a_name_of_several_frames_is_refused(tmp_path):
    frames = table(list("aabb"), [0, 1] * 2, frame=["0", "1", "0", "1"], source=[""] * 4)
    (tmp_path / "s.csv").write_text("frame,part\n0,train\n1,test\n")
    with pytest.raises(InputError, match="add the columns dataset and video"):
        splits.read_splits(tmp_path / "s.csv", frames)


def test_a_video_on_two_sides_is_refused():
    frames = table(list("abcdef"), [0, 1] * 3, video=list("uvwxyu"))
    fold = splits.Fold("7", np.asarray([0, 1]), np.asarray([2, 3]), np.asarray([4, 5]))
    with pytest.raises(InputError, match="fold 7: video made/u is in train and in test"):
        splits.check([fold], frames, strata(frames), splits.groups(frames))


def test_copies_of_tested_pictures_leave_train_with_their_patient():
    frames = table(list("aabbccddee"), [0, 1] * 5)
    fold = splits.Fold("1", np.asarray([0, 1, 2, 3]), np.asarray([4, 5, 6, 7]), np.asarray([8, 9]))
    pairs = np.asarray([[0, 8], [2, 4], [7, 7]])
    (checked,), excluded = splits.check([fold], frames, strata(frames), splits.groups(frames), pairs[:1])
    assert [rows.tolist() for rows in checked.parts().values()] == [[2, 3], [4, 5, 6, 7], [8, 9]]
    assert [(one["frame"], one["part"], one["of"]) for one in excluded] == [
        ("f0", "train", "f8"),
        ("f1", "train", "f8"),
    ]
    assert excluded[0]["reason"] == "the same picture as f8 in test"
    assert "of a patient" in excluded[1]["reason"]
    assert checked.copied.tolist() == [8]  # as the split was given
    with pytest.raises(InputError, match="fold 1 has no frame of class 'a' in train"):
        splits.check([fold], frames, strata(frames), splits.groups(frames), pairs)


def test_copies_stay_where_a_split_is_to_stay_as_it_was_published():
    frames = table(list("aabbccddee"), [0, 1] * 5)
    fold = splits.Fold("1", np.asarray([0, 1, 2, 3]), np.asarray([4, 5, 6, 7]), np.asarray([8, 9]))
    pairs = np.asarray([[0, 2], [3, 9], [5, 8], [8, 9]])
    (kept,), excluded = splits.check([fold], frames, strata(frames), splits.groups(frames), pairs, keep=True)
    assert not excluded
    assert [rows.tolist() for rows in kept.parts().values()] == [rows.tolist() for rows in fold.parts().values()]
    assert kept.copied.tolist() == [8, 9]
    part = splits.take_fraction(strata(frames), kept, splits.groups(frames), 0.5, 0)
    assert part.copied.tolist() == [8, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "group", "folds": 6}, "config.split.folds=6 needs .* class 'a' has 5 patients"),
        ({"kind": "group", "folds": 1}, "config.split.folds=1"),
        ({"kind": "single", "validation": 0.0}, "config.split.validation=0"),
        ({"kind": "single", "test": 1.0}, "config.split.test=1"),
        ({"kind": "official"}, "there is no official split"),
        ({"kind": "shards"}, "no test split, only train"),
        ({"kind": "random"}, "config.split.kind='random' is not known"),
        ({"kind": "group", "path": "x.csv"}, "config.split.kind=auto"),
        ({"path": "x.csv"}, "'x.csv' cannot be read"),
    ],
)
def test_a_split_that_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        plan(ten(), **options)


def test_the_splits_of_shards_are_honoured_and_validation_is_carved_out_of_train():
    number = [int(patient[1:]) for patient in many().patient]
    frames = many(split=np.where(np.asarray(number) % 3 == 0, "test", "train"))
    (fold,), _, _, note = plan(frames)
    assert note.startswith("train and test splits of the shards")
    assert fold.test.tolist() == np.flatnonzero(frames.split == "test").tolist()
    assert len(fold.validation) == pytest.approx(0.2 * (frames.split == "train").sum(), rel=0.3)
    three = many(split=np.asarray(["train", "val", "test"])[np.asarray(number) % 3])
    (fold,), *_ = plan(three)
    assert fold.validation.tolist() == np.flatnonzero(three.split == "val").tolist()


@pytest.fixture
def built(tmp_path):
    """A build of 40 frames of 20 patients with two official tables: of 5 folds, and of 2 without a validation part."""
    write_records(tmp_path, [*made(40), *made(1, 40, label=-1)])
    (tmp_path / "splits").mkdir()
    for name, count, rest in (("five", 5, ("validation", "train")), ("two", 2, ("train",))):
        lines = ["frame,fold,part"]
        for fold in range(count):
            for i in range(41):  # the one without a label, too
                part = "test" if i // 4 % count == fold else rest[i // 4 // count % len(rest)]
                lines.append(f"f{i},{fold},{part}")
        (tmp_path / "splits" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return select(read_table(str(tmp_path)))


def test_official_folds_are_found_beside_the_shards(built):
    folds, _, _, note = plan(built)
    assert note.startswith("official split two: 2 folds; validation is 20%")
    assert [fold.name for fold in folds] == ["0", "1"]
    assert all(len(fold.validation) for fold in folds)
    five, _, _, note = plan(built, kind="official", path="five")
    assert note == "official split five: 5 folds"
    assert [len(fold.test) for fold in five] == [8] * 5
    with pytest.raises(InputError, match="no official split 'ten', only five, two"):
        plan(built, kind="official", path="ten")


def test_an_official_validation_that_shares_patients_with_train_is_drawn_anew_and_test_stays(built, tmp_path):
    rows = [f"f{i},1,{'test' if i < 12 else ('train', 'validation')[i % 2]}" for i in range(40)]
    for table_ in (tmp_path / "splits").iterdir():
        table_.unlink()
    (tmp_path / "splits" / "mixed.csv").write_text("\n".join(["frame,fold,part", *rows]))
    (fold,), _, _, note = plan(built)
    assert "shares 14 patients with train and is drawn anew" in note
    assert fold.test.tolist() == list(range(12))
    with pytest.raises(InputError, match="in train and in validation, and so are 13 others"):
        plan(built, path=str(tmp_path / "splits" / "mixed.csv"))
