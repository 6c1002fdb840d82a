"""Two runs are compared on the frames that they share, with the same patients drawn for both."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from tests.evaluation.made import predictions
from usfmae_jax import evaluate
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import classification, comparison, instances, multilabel, regression
from usfmae_jax.evaluation.instances import InstancePredictions
from usfmae_jax.evaluation.multilabel import LabelPredictions
from usfmae_jax.evaluation.predictions import ClassPredictions, concatenate
from usfmae_jax.evaluation.regression import QuantityPredictions
from usfmae_jax.reporting.masks import encoded


@pytest.fixture
def runs(rng) -> tuple[ClassPredictions, ClassPredictions]:
    """A better one and a worse one on the same frames, in another order."""
    worse = predictions(rng, patients=80, skill=0.5)
    return predictions(rng, patients=80, skill=2.0), worse.select(rng.permutation(len(worse)))


def test_a_better_run_is_better_with_an_interval_that_says_so(runs):
    found = comparison.compare(*runs, resamples=300)
    assert (found["frames"], found["patients"], found["only_a"], found["only_b"]) == (160, 80, 0, 0)
    for name, one in found["metrics"].items():
        values = [classification.summarise(run, resamples=0)["metrics"][name]["value"] for run in runs]
        assert [one["a"], one["b"]] == pytest.approx(values)
        assert one["difference"] == pytest.approx(values[0] - values[1])
    auroc = found["metrics"]["auroc"]
    assert 0 < auroc["ci95"][0] < auroc["difference"] < auroc["ci95"][1]
    assert auroc["p"] < 0.02
    assert found["metrics"]["log_loss"]["ci95"][1] < 0
    assert found["mcnemar"]["only_a_right"] > found["mcnemar"]["only_b_right"]
    assert found["mcnemar"]["p"] < 0.01


def test_the_other_way_round_the_signs_turn(runs):
    one, other = (comparison.compare(*pair, resamples=100)["metrics"]["auroc"] for pair in (runs, runs[::-1]))
    assert one["ci95"] == pytest.approx([-end for end in other["ci95"][::-1]])
    assert one["p"] == other["p"]


def test_a_run_does_not_differ_from_itself(runs):
    found = comparison.compare(runs[0], runs[0], resamples=50)
    assert all(one["difference"] == 0 and one["ci95"] == [0, 0] and one["p"] == 1 for one in found["metrics"].values())
    assert found["mcnemar"]["p"] == 1


def test_runs_that_differ_by_chance_are_found_different_as_rarely_as_they_should(rng):
    p = [
        comparison.compare(
            predictions(rng, patients=40, frames=1), predictions(rng, patients=40, frames=1), resamples=99, seed=i
        )["metrics"]["accuracy"]["p"]
        for i in range(60)
    ]
    assert np.mean(np.array(p) < 0.05) < 0.17
    assert 0.3 < np.mean(p) < 0.75


def test_frames_of_one_run_alone_are_left_out_and_counted(runs):
    a, b = runs
    b = b.select(b.patient != "p0")
    found = comparison.compare(a, b, resamples=0)
    assert (found["frames"], found["only_a"], found["only_b"]) == (158, 2, 0)
    same = comparison.compare(a.select(a.patient != "p0"), b, resamples=0)
    assert found["metrics"] == same["metrics"]
    assert "2 frames of tiny alone are left out" in comparison.table(found, "tiny", "scratch")


def test_classes_are_told_by_name_whatever_their_order(runs):
    a, b = runs
    turned = dataclasses.replace(
        b, classes=b.classes[::-1], label=1 - b.label, probabilities=b.probabilities[:, ::-1].copy()
    )
    assert comparison.compare(a, turned, resamples=50) == comparison.compare(a, b, resamples=50)


def test_several_seeds_and_fractions_are_the_mean_of_the_largest(rng, runs):
    a, b = runs
    other = dataclasses.replace(predictions(rng, patients=80), seed=np.ones(160))
    less = dataclasses.replace(predictions(rng, patients=80), fraction=np.full(160, 0.1))
    found = comparison.compare(concatenate([a, other, less]), b, resamples=0)["metrics"]["auroc"]
    each = [comparison.compare(run, b, resamples=0)["metrics"]["auroc"]["a"] for run in (a, other)]
    assert found["a"] == pytest.approx(np.mean(each))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: dataclasses.replace(run, dataset=np.full(len(run), "else", object)), "share no frame"),
        (lambda run: dataclasses.replace(run, label=1 - run.label), "benign in one run and malignant in the other"),
        (lambda run: dataclasses.replace(run, classes=("cat", "dog")), "different classes: benign, malignant and cat"),
        (lambda run: run.select(np.zeros(0, int)), "without predictions"),
    ],
    ids=["frames", "labels", "classes", "none"],
)
def test_what_cannot_be_compared_is_refused(runs, change, message):
    with pytest.raises(InputError, match=message):
        comparison.compare(runs[0], change(runs[1]))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 9), (12, 12), (20, 5), (40, 19)])
def test_mcnemar_is_the_textbook_test(only_a, only_b):
    a = np.array([True] * only_a + [False] * only_b + [True] * 7 + [False] * 4)
    b = np.array([False] * only_a + [True] * only_b + [True] * 7 + [False] * 4)
    found = comparison.mcnemar(a, b)
    counts = [found[key] for key in ("both_right", "only_a_right", "only_b_right", "both_wrong")]
    assert counts == [7, only_a, only_b, 4]
    total = only_a + only_b
    if total < 25:
        tail = stats.binom.cdf(min(only_a, only_b), total, 0.5)
        assert found["test"] == "exact"
        assert found["p"] == pytest.approx(min(1, 2 * tail))
    else:
        assert found["test"] == "chi-square"
        assert found["p"] == pytest.approx(stats.chi2.sf((abs(only_a - only_b) - 1) ** 2 / total, 1))


def test_the_table_names_the_runs_and_what_it_rests_on(runs):
    text = comparison.table(comparison.compare(*runs, resamples=100), "tiny", "scratch")
    assert "160 shared frames of 80 patients; positive: malignant." in text
    assert "tiny - scratch" in text
    assert "| AUROC " in text
    assert "McNemar (" in text
    assert "takes frames of one patient for independent" in text


def _others(rng, skill):
    """Of each other task predictions of 40 patients, the better the more skill."""
    one = predictions(rng, patients=40)
    ids = {name: getattr(one, name) for name in ("dataset", "patient", "video", "frame", "fold", "seed", "fraction")}
    truth = np.repeat(np.arange(40) % 2, 2).astype(float)
    says = 1 / (1 + np.exp(-skill * (2 * truth - 1) - rng.normal(size=80)))
    label = {"truth": np.stack([truth, np.where(np.arange(80) < 4, np.nan, 1 - truth)], axis=1)}
    square = encoded(np.ones((4, 4), bool))
    drawn = [[{"class": 0, "mask": square}] for _ in range(80)]
    pairs = zip(says, truth, strict=True)
    found = [[{"class": 0, "mask": square, "score": float(p), "right": 1023 * int(t)}] for p, t in pairs]
    return {
        "numbers": QuantityPredictions(**ids, truth=10 * truth, value=10 * says),
        "labels": LabelPredictions(
            **ids, classes=("a", "b"), **label, probabilities=np.stack([says, 1 - says], axis=1)
        ),
        "instances": InstancePredictions(
            **ids, classes=("c",), truth=drawn, detections=found, drawn=np.ones(80), found=truth, matched=truth
        ),
    }


@pytest.mark.parametrize(("kind", "lead"), [("numbers", "mae"), ("labels", "auroc"), ("instances", "map50")])
def test_runs_of_every_task_are_compared_and_read_again(rng, tmp_path, kind, lead, capsys):
    good, bad = (_others(rng, skill)[kind] for skill in (3.0, 0.0))
    for name, run in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        run.write(tmp_path / name / "predictions.csv")
    read = [comparison.read(str(tmp_path / name)) for name in ("good", "bad")]
    assert [type(run) for run in read] == [type(good)] * 2
    if kind == "instances":
        (tmp_path / "bad" / "predictions.json").unlink()
        with pytest.raises(InputError, match=r"needs the file predictions\.json beside it"):
            comparison.read(str(tmp_path / "bad"))
    found = comparison.compare(*read, resamples=200)
    one = found["metrics"][lead]
    assert (one["ci95"][1] < 0) if lead == "mae" else (one["ci95"][0] > 0)
    value = {"numbers": regression, "labels": multilabel, "instances": instances}[kind].score(good, np.ones((1, 80)))
    assert one["a"] == pytest.approx(float(value[lead][0]))
    assert found["names"][lead] in comparison.table(found)
    if kind == "numbers":  # of which the table says in what they are
        (tmp_path / "good" / "results.json").write_text('{"task": {"quantity": "depth", "unit": "mm"}}')
        for place in ("good", "good/predictions.csv"):
            assert evaluate.compare([str(tmp_path / place), str(tmp_path / "bad"), "--resamples=20"]) == 0
            assert f"| {regression.titles('mm')['mae']} " in capsys.readouterr().out
    names = {"numbers": "truth", "labels": "truth", "instances": "drawn"}
    other = dataclasses.replace(bad, **{names[kind]: 1 - getattr(bad, names[kind])})
    with pytest.raises(InputError, match="something else is true of frame"):
        comparison.compare(good, other, resamples=0)
    with pytest.raises(InputError, match="the runs are of two tasks"):
        comparison.compare(good, predictions(rng, patients=40), resamples=0)
