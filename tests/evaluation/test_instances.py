"""Average precision of instances: by hand, against pycocotools' own sum, under resampling, and what is empty."""

import contextlib
import io

import numpy as np
import pytest

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import instances, predictions
from usfmae_jax.evaluation.instances import InstancePredictions
from usfmae_jax.tasks.instances import encoded


def box(top, left, height=10, width=10, c=0, **more):
    area = np.zeros((40, 60), bool)
    area[top : top + height, left : left + width] = True
    return {"class": c, "mask": encoded(area), **more}


def said(top, left, score, **more):
    return box(top, left, score=score, **more)


def made(truth, detections, classes=1, patients=None):
    count = len(truth)
    names = np.array([f"f{i}" for i in range(count)], object)
    ids = {"dataset": np.full(count, "made", object), "patient": np.array(patients or names, object), "video": names}
    ids |= {"frame": names, "fold": np.full(count, "single", object)}
    ids |= {"seed": np.zeros(count, int), "fraction": np.ones(count)}
    found = {"truth": instances.lists(truth), "detections": instances.match(truth, detections, classes)}
    return InstancePredictions(**ids, classes=tuple("abc"[:classes]), **found, **instances.counts(**found))


def scores(truth, detections, classes=1):
    found = instances.score(made(truth, detections, classes), np.ones((1, len(truth))))
    return tuple(float(found[name][0]) for name in instances.NAMES)


def test_what_is_drawn_alone_has_all_precision():
    assert scores([[box(2, 2), box(20, 30)]], [[said(2, 2, 0.9), said(20, 30, 0.3)]]) == pytest.approx((1, 1, 1))


def test_a_wrong_detection_between_two_right_ones_costs_the_second_half():
    found = scores([[box(2, 2)], [box(2, 2)]], [[said(2, 2, 0.9)], [said(20, 30, 0.8), said(2, 2, 0.7)]])
    assert found == pytest.approx([(51 + 50 * 2 / 3) / 101] * 3)  # the recalls up to 0.5, and those above


def test_a_detection_is_right_up_to_what_it_has_in_common():
    found = scores([[box(2, 2)]], [[said(2, 4, 0.9)]])  # 80 of 120 pixels: at 0.50, 0.55, 0.60 and 0.65
    assert found == pytest.approx((0.4, 1, 0))


def test_the_better_scored_of_two_takes_the_instance_and_the_other_is_wrong():
    case = made([[box(2, 2)], [box(2, 2)]], [[said(2, 2, 0.6), said(2, 3, 0.9)], [said(2, 2, 0.5)]])
    assert [(one["score"], one["right"] & 1) for one in case.detections[0]] == [(0.9, 1), (0.6, 0)]
    assert (case.drawn.tolist(), case.found.tolist(), case.matched.tolist()) == ([1, 1], [2, 1], [1, 1])
    assert case.f1() == pytest.approx([2 / 3, 1])
    found = instances.score(case, np.ones((1, 2)))["map50"]
    assert found == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_the_right_place_in_the_wrong_class_is_wrong_twice():
    assert scores([[box(2, 2, c=0)], [box(2, 2, c=1)]], [[said(2, 2, 0.9, c=1)], []], 2) == pytest.approx((0, 0, 0))


def test_an_empty_frame_without_detections_changes_nothing():
    truth, found = [[box(2, 2)]], [[said(2, 2, 0.5)]]
    assert scores([*truth, []], [*found, []]) == scores(truth, found)


def test_detections_on_an_empty_frame_are_wrong():
    found = scores([[box(2, 2)], []], [[said(2, 2, 0.5)], [said(2, 2, 0.9)]])
    assert found == pytest.approx((0.5, 0.5, 0.5))


def test_what_is_drawn_and_never_detected_has_none():
    assert scores([[box(2, 2)], []], [[], []]) == (0, 0, 0)


def test_a_class_that_is_not_drawn_is_no_part_of_the_mean():
    assert scores([[box(2, 2)]], [[said(2, 2, 0.5), said(20, 30, 0.9, c=1)]], 2) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("detections", [[], [said(2, 2, 0.9)]])
def test_where_nothing_is_drawn_there_is_nothing_to_measure(detections):
    assert np.isnan(scores([[]], [detections])).all()
    found = instances.summarise(made([[]], [detections]), resamples=0)
    assert found["metrics"]["map"] == {"value": None, "ci95": None}
    assert found["per_class"]["a"] == {
        **{"frames": 0, "patients": 0, "drawn": 0, "found": len(detections), "matched": 0},
        **{name: {"value": None, "ci95": None} for name in instances.NAMES},
    }


def _random(rng, frames, classes=3):
    truth, detections = [], []
    for _ in range(frames):
        drawn = [
            box(10 * int(rng.integers(3)), 15 * i, *map(int, rng.integers(6, 12, 2)), c=int(rng.integers(classes)))
            for i in range(int(rng.integers(4)))
        ]
        truth.append(drawn)
        guesses = []
        for _ in range(int(rng.integers(6))):
            top, left = int(rng.integers(30)), int(15 * rng.integers(4))
            guesses.append(said(top // 5 * 5, left, float(rng.integers(1, 20)) / 20, c=int(rng.integers(classes))))
        guesses += [{**one, "score": float(rng.random())} for one in drawn if rng.random() < 0.6]
        detections.append(guesses)
    return truth, detections


def _pycocotools(truth, detections, classes):
    drawn, found = (
        [{**one, "frame": n} for n, some in enumerate(part) for one in some] for part in (truth, detections)
    )
    judge = instances.coco(drawn, found, len(truth), classes)
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, -1]  # [T, R, C]
    at = np.where(precision < 0, np.nan, precision).mean(axis=1)
    return np.nanmean(at), np.nanmean(at[0]), np.nanmean(at[5])


@pytest.mark.parametrize("number", range(3))
def test_it_is_what_pycocotools_adds_up_of_the_frames_as_often_as_they_are_drawn(number):
    rng = np.random.default_rng(number)
    truth, detections = _random(rng, 14)
    times = rng.integers(0, 4, 14)
    found = instances.score(made(truth, detections, 3), np.stack([np.ones(14, int), times]))
    assert [found[name][0] for name in instances.NAMES] == pytest.approx(_pycocotools(truth, detections, 3))
    repeated = [[part[n] for n in np.repeat(np.arange(14), times)] for part in (truth, detections)]
    assert [found[name][1] for name in instances.NAMES] == pytest.approx(_pycocotools(*repeated, 3))


def test_intervals_are_over_patients():
    truth, detections = _random(np.random.default_rng(5), 12)
    patients = [f"p{i // 2}" for i in range(12)]
    found = instances.summarise(made(truth, detections, 3, patients), resamples=60)
    for name in instances.NAMES:
        low, high = found["metrics"][name]["ci95"]
        assert low < found["metrics"][name]["value"] < high
    assert found["bootstrap"]["unit"] == "patient"
    assert sum(one["drawn"] for one in found["per_class"].values()) == sum(map(len, truth))


def test_predictions_are_read_as_they_were_written(tmp_path):
    truth, detections = _random(np.random.default_rng(0), 5)
    case = made(truth, detections, 3)
    case.write(tmp_path / "predictions.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.csv", "predictions.json"]
    again = predictions.read(tmp_path, InstancePredictions)
    assert again.classes == case.classes
    for name in InstancePredictions.rows():
        assert getattr(again, name).tolist() == getattr(case, name).tolist()
    two = predictions.concatenate([case, again])
    assert len(two) == 10
    assert two.truth.tolist() == [*truth, *truth]


@pytest.mark.parametrize(
    ("beside", "match"),
    [(None, r"needs the file predictions\.json beside it"), ("[]", "is no object"), ("{", "damaged"), ("{}", "needs")],
)
def test_what_lies_beside_predictions_has_to_be_theirs(tmp_path, beside, match):
    made([[box(2, 2)]], [[]]).write(tmp_path / "predictions.csv")
    (tmp_path / "predictions.json").unlink() if beside is None else (tmp_path / "predictions.json").write_text(beside)
    with pytest.raises(InputError, match=match):
        predictions.read(tmp_path, InstancePredictions)
