"""Agreement of outlines: cases computed by hand, another library, and the rules for what is empty."""

import dataclasses

import cv2
import numpy as np
import pytest

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import comparison, intervals, predictions, segmentation, tables
from usfmae_jax.evaluation.segmentation import MaskPredictions, measure
from usfmae_jax.reporting import segmentation as reporting


def _square(top, left, side, size=40, number=1):
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + side, left : left + side] = number
    return mask


def _made(dice, patients, folds=None, seeds=None):
    """Predictions whose Dice `[N, C]` are given, and everything else follows from them."""
    dice = np.asarray(dice, float).reshape(len(patients), -1)
    n = len(patients)
    ids = {name: np.array([f"{name}{i}" for i in range(n)], object) for name in ("video", "frame")}
    ids |= {"dataset": np.full(n, "d", object), "patient": np.asarray(patients, object)}
    ids |= {"fold": np.asarray(folds if folds is not None else ["1"] * n, object)}
    ids |= {"seed": np.asarray(seeds if seeds is not None else [0] * n), "fraction": np.ones(n)}
    there = np.where(np.isfinite(dice), 100.0, 0.0)
    own = {"dice": dice, "iou": dice / 2, "boundary_f1": dice / 3, "hd95": 10 * (1 - dice)}
    own |= {"hd95_mm": np.full_like(dice, np.nan), "drawn": there, "predicted": there}
    names = tuple(f"c{i}" for i in range(dice.shape[1]))
    return MaskPredictions(**ids, classes=names, pixel_area=np.full(n, np.nan), **own)


def test_a_page_of_nothing_predicted_says_so_once(tmp_path):
    made = _made([0.0, 0.0, 0.0], ["a", "b", "c"])
    made = dataclasses.replace(made, predicted=np.zeros_like(made.drawn))
    drawn, whole = _square(4, 4, 8), np.zeros((40, 40, 3), np.uint8)
    examples = [
        {"whole": whole, "drawn": drawn, "map": drawn * 0, "group": group, "dice": 0.0, "frame": group}
        for group in ("worst", "middle", "best")
    ]
    reporting.finish(str(tmp_path), made, about={"title": "t"}, context={}, resamples=0, examples=examples)
    page = (tmp_path / "report.html").read_text()
    assert "Nothing was predicted on 3 frames of 3 patients: Dice is 0, and HD95 the frame&#39;s diagonal" in page
    assert "<h3>Nothing was predicted</h3>" in page
    assert not any(word in page for word in ("The worst", "The best", "half are above", "-100%", "nothing of it"))


def test_patients_that_nobody_names_are_not_counted_as_patients():
    made = _made([0.5, 0.6], ["", ""])
    assert tables.tested_on(made.counts()) == "2 frames (patients unknown)"
    files = np.array(["a.png", "b.png"], object)
    built = dataclasses.replace(made, patient=files, video=files, frame=files)
    assert tables.tested_on(built.counts()) == "2 frames (patients unknown)"
    assert tables.tested_on(_made([0.5, 0.6], ["a", "a"]).counts()) == "2 frames of 1 patient"


def test_two_squares_by_hand():
    # 10 x 10 at (10, 10), and the same moved by 4 columns: 60 of 100 pixels in common.
    found = measure(_square(10, 10, 10), _square(10, 14, 10), 1)
    assert found["dice"] == pytest.approx([0.6])
    assert found["iou"] == pytest.approx([60 / 140])
    assert (found["drawn"], found["predicted"]) == ([100], [100])
    # Of the 36 pixels of either boundary the far side is 4 columns off, and 9 others lie nearer than that.
    assert found["hd95"] == pytest.approx([4.0])
    assert np.isnan(found["hd95_mm"]).all()


def test_the_same_outline_is_perfect_and_a_shift_of_less_than_the_tolerance_is_no_error_of_the_boundary():
    mask = _square(100, 100, 80, size=400)
    same = measure(mask, mask, 1, (0.5, 0.5))
    assert [float(same[name][0]) for name in segmentation.NAMES] == [1, 1, 1, 0, 0]
    moved = measure(mask, np.roll(mask, 4, axis=0), 1)  # 0.75% of the diagonal are 4.2 pixels
    assert moved["boundary_f1"] == 1
    assert moved["dice"] == pytest.approx(76 / 80)
    assert measure(mask, np.roll(mask, 5, axis=0), 1)["boundary_f1"] < 1


def test_distances_are_in_millimetres_of_each_direction():
    one, other = _square(10, 10, 10), _square(10, 14, 10)
    assert measure(one, other, 1, (0.2, 0.2))["hd95_mm"] == pytest.approx([0.8])
    assert measure(one, other, 1, (7.0, 0.5))["hd95_mm"] == pytest.approx([2.0])  # nearest across, though far down
    assert measure(one.T.copy(), other.T.copy(), 1, (0.5, 7.0))["hd95_mm"] == pytest.approx([2.0])


@pytest.mark.parametrize("spacing", [(0.0, 0.0), (0.3, 0.4)])
def test_what_is_missed_or_invented_is_as_bad_as_can_be_and_what_is_on_neither_does_not_count(spacing):
    nothing, square = np.zeros((30, 40), np.uint8), np.zeros((30, 40), np.uint8)
    square[5:10, 5:10] = 1
    for pair in ((nothing, square), (square, nothing)):
        found = measure(*pair, 1, spacing)
        assert [float(found[name][0]) for name in ("dice", "iou", "boundary_f1", "hd95")] == [0, 0, 0, 50]
        expected = np.hypot(30 * 0.3, 40 * 0.4) if any(spacing) else np.nan
        assert found["hd95_mm"] == pytest.approx([expected], nan_ok=True)
    found = measure(nothing, nothing, 1, spacing)
    assert all(np.isnan(found[name]).all() for name in segmentation.NAMES)
    assert (found["drawn"], found["predicted"]) == ([0], [0])


def test_classes_are_measured_apart():
    drawn = _square(2, 2, 10) + _square(20, 20, 10, number=2)
    predicted = _square(2, 2, 10) + _square(20, 20, 10, number=3)
    found = measure(drawn, predicted, 3)
    assert found["dice"].tolist() == [1, 0, 0]


def test_masks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        measure(_square(1, 1, 3, 20), _square(1, 1, 3, 21), 1)


def _blobs(rng, size):
    noise = rng.normal(size=(8, 8))
    return (cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC) > 0.6).astype(np.uint8)


@pytest.mark.parametrize("number", range(6))
def test_another_library_finds_the_same(number):
    """MONAI, on masks whose pixels have a known size."""
    monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(number)
    drawn, predicted = (_blobs(rng, (90, 120)) for _ in range(2))
    spacing = (0.5, 0.5) if number % 2 else (0.3, 0.7)
    found = measure(drawn, predicted, 1, spacing)
    pair = [torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (predicted, drawn)]
    assert found["dice"][0] == pytest.approx(float(monai.compute_dice(*pair)))
    theirs = monai.compute_hausdorff_distance(*pair, percentile=95, spacing=spacing)
    assert found["hd95_mm"][0] == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.parametrize("number", range(4))
def test_distances_are_those_of_all_pairs(number):
    rng = np.random.default_rng(number)
    drawn, predicted = (_blobs(rng, (40, 50)) for _ in range(2))
    edges = [segmentation.boundary(mask == 1) for mask in (drawn, predicted)]
    every = np.hypot(*(edges[0][:, None, :] - edges[1][None, :, :]).transpose(2, 0, 1))
    expected = max(np.percentile(every.min(axis=side), 95) for side in (0, 1))
    assert measure(drawn, predicted, 1)["hd95"][0] == pytest.approx(expected)


def test_frames_are_averaged_within_their_patient_and_patients_alike():
    made = _made([1.0, 0.0, 0.0, 0.0, 0.8], ["a", "b", "b", "b", "c"])
    found = segmentation.summarise(made, resamples=200)
    dice = found["metrics"]["dice"]
    assert dice["value"] == pytest.approx((1 + 0 + 0.8) / 3)
    assert dice["ci95"][0] < dice["value"] < dice["ci95"][1]
    assert found["counts"]["patients"] == 3
    assert "hd95_mm" not in found["metrics"]


def test_frames_that_have_nothing_to_measure_do_not_count():
    made = _made([[0.5, np.nan], [np.nan, 0.9], [0.7, np.nan]], ["a", "b", "b"])
    found = segmentation.summarise(made, resamples=0)
    assert found["per_class"]["c0"]["dice"]["value"] == pytest.approx(0.6)
    assert found["per_class"]["c1"]["dice"]["value"] == pytest.approx(0.9)
    assert found["metrics"]["dice"]["value"] == pytest.approx(0.75)
    assert (found["per_class"]["c1"]["frames"], found["per_class"]["c1"]["missed"]) == (1, 0)


def test_a_class_that_no_frame_has_leaves_the_mean_to_the_others():
    found = segmentation.summarise(_made([[0.5, np.nan], [0.7, np.nan]], ["a", "b"]), resamples=20)
    assert found["metrics"]["dice"]["value"] == pytest.approx(0.6)
    assert found["per_class"]["c1"]["dice"]["value"] is None


def test_seeds_and_folds_are_the_mean_of_their_runs():
    made = _made([0.2, 0.4, 0.6, 0.8], ["a", "b", "a", "b"], folds=["1", "2", "1", "2"], seeds=[0, 0, 1, 1])
    found = segmentation.summarise(made, resamples=0)
    assert found["metrics"]["dice"]["value"] == pytest.approx(0.5)
    assert [one["metrics"]["dice"] for one in found["seeds"]] == pytest.approx([0.3, 0.7])
    assert found["folds"]["metrics"]["dice"]["values"] == pytest.approx([0.4, 0.6])


def test_predictions_are_read_as_they_were_written(tmp_path):
    made = _made([[0.1, np.nan], [1 / 3, 0.5]], ["a", "b"])
    made.write(tmp_path / "predictions.csv")
    again = predictions.read(tmp_path, MaskPredictions)
    assert again.classes == ("c0", "c1")
    for name in MaskPredictions.rows():
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))


def test_the_mean_over_patients_is_the_plain_one_under_equal_weights(rng):
    values, patients = rng.random(50), np.array([f"p{i}" for i in rng.integers(12, size=50)])
    expected = np.mean([values[patients == name].mean() for name in np.unique(patients)])
    weights = np.stack([np.ones(50), np.where(patients == "p1", 0, 2)])
    found = intervals.patient_mean(values, patients, weights)
    others = np.mean([values[patients == name].mean() for name in np.unique(patients) if name != "p1"])
    assert found == pytest.approx([expected, others])


def test_two_runs_are_compared_on_the_same_patients(tmp_path):
    rng = np.random.default_rng(1)
    patients = [f"p{i // 2}" for i in range(80)]
    worse = rng.uniform(0.3, 0.7, 80)
    one, other = _made(worse + 0.1, patients), _made(worse, patients)
    for name, run in (("a", one), ("b", other.select(rng.permutation(80)))):
        run.write(tmp_path / f"{name}.csv")
    found = comparison.compare(*(comparison.read(str(tmp_path / f"{name}.csv")) for name in "ab"), resamples=200)
    dice = found["metrics"]["dice"]
    assert (dice["difference"], *dice["ci95"]) == pytest.approx((0.1, 0.1, 0.1))
    assert dice["p"] < 0.02
    assert "mcnemar" not in found
    assert "| Dice " in comparison.table(found)
    other.drawn[3] = 7
    with pytest.raises(InputError, match=r"something else is true of frame d/video3/frame3"):
        comparison.compare(one, other)
    with pytest.raises(InputError, match="different classes: c0 and c0, c1"):
        comparison.compare(one, _made(np.zeros((80, 2)), patients))
