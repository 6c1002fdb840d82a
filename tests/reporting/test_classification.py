"""The page that a clinician reads: honest sentences, nothing from outside, nothing that runs, any screen."""

import re

import numpy as np
import pytest

from tests.html_pages import Reader, layout, words
from usfmae_jax.evaluation import results
from usfmae_jax.evaluation.predictions import ClassPredictions
from usfmae_jax.reporting import classification, run
from usfmae_jax.reporting.classification import doubt, verdict

EVIL = '<script>alert("1")</script>\'"><img src=x onerror=alert(2)>'
CONTEXT = {
    "config": {"seed": 0, "model": {"arch": "tiny"}, "note": EVIL},
    "weights": {"source": "pretrain/encoder", "fingerprint": "feed12345678", "kind": "encoder"},
    "lineage": [{"job": "pretrain", "code": "usfmae_jax 9", "step": 7, "data": [{"dataset": "d0", "frames": 3}]}],
    "data": [{"dataset": "bus", "frames": 90, "licence": "CC BY 4.0", "citation": EVIL}],
    "fingerprint": "da7a",
    "warnings": ["pretrained on test frames"],
    "excluded": [{"frame": "f44", "patient": "44", "fold": "fold-1", "reason": "is f65 again"}],
    "command": "python -m usfmae_jax.finetune --config=configs/finetune.py:busbra",
}
EIGHT = ("Chocolate cyst", "Mucinous cystadenoma of a very long name", "Teratoma", "d", "e", "f", "g", EVIL)


def predict(classes, frames=96, folds=1, seeds=1, fractions=(1.0,), strength=2.0):
    rng = np.random.default_rng(0)
    label = np.arange(frames) % len(classes)
    rows = len(fractions) * seeds
    logits = rng.normal(size=(rows, frames, len(classes)))
    logits[:, np.arange(frames), label] += strength
    odds = np.exp(logits).reshape(-1, len(classes))
    patients = [f"p{i % 31}" for i in range(frames)]
    return ClassPredictions(
        classes=classes,
        dataset=np.array(["bus", "mmotu"] * (frames // 2) * rows),
        patient=np.array(patients * rows),
        video=np.array([f"v{i}" for i in range(frames)] * rows),
        frame=np.array([f"f{i}{EVIL}" for i in range(frames)] * rows),
        fold=np.array([f"fold-{i % 31 % folds + 1}" for i in range(frames)] * rows),
        label=np.tile(label, rows),
        probabilities=odds / odds.sum(axis=1, keepdims=True),
        seed=np.tile(np.repeat(np.arange(seeds), frames), len(fractions)),
        fraction=np.repeat(fractions, frames * seeds),
    )


def parts(predictions):
    """What a loop hands over beside the predictions."""
    rng = np.random.default_rng(1)
    first, second = predictions.classes[:2]
    example = {"label": first, "predicted": second, "probability": 0.999, "frame": EVIL}
    images = rng.integers(0, 256, (10, 40, 60, 3), dtype=np.uint8)
    maps = [None, *rng.random((9, 5, 5), dtype=np.float32)]
    examples = [example | {"image": image, "map": one} for image, one in zip(images, maps, strict=True)]
    examples[3]["image"] = images[3, :, :, :1]
    names = {"label": [predictions.classes[i] for i in predictions.label[:96]], "dataset": ["bus", "mmotu"] * 48}
    falling = {
        name: [0.9 - step * i for i in range(6)] for name, step in (("auroc", 0.01), ("balanced_accuracy", 0.02))
    }
    robustness = {"acoustic_shadow": falling, "speckle": falling}
    return {"embedding": {"points": rng.random((96, 2))} | names, "examples": examples, "robustness": robustness}


def write(folder, predictions, extra=None, **changes):
    folder.mkdir(exist_ok=True)
    found = results.summarise(predictions, resamples=50)
    found["task"] |= {"title": f"A model {EVIL}", "datasets": ["bus", "mmotu"], "split": "official"}
    found |= {"context": CONTEXT, "robustness": None} | changes
    return draw(folder / "report.html", found, predictions, **(extra or {}))


def draw(path, found, predictions, robustness=None, **extra):
    found = found | ({"robustness": robustness} if robustness else {})
    run.write_page(path, found, **classification.described(found, predictions, **extra))
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two classes with everything that a report can hold, eight classes with one fold, one class barely there."""
    root = tmp_path_factory.mktemp("pages")
    full = predict(("benign", "malignant"), folds=5, seeds=3, fractions=(0.1, 1.0))
    eight = predict(EIGHT)
    return {
        "full": write(root / "full", full, parts(full)),
        "eight": write(root / "eight", eight, parts(eight)),
        "bare": write(root / "bare", predict(("other", "GIST"), frames=8, strength=0)),
    }


def test_pages_load_nothing_run_nothing_and_escape_names(pages):
    for path in pages.values():
        reader = Reader(path)
        assert {"link", "script", "iframe", "object", "form", "base"}.isdisjoint(tag for tag, _ in reader.elements)
        assert not [one for _, attributes in reader.elements for one in attributes if one.startswith("on")]
        assert all(one["src"].startswith("data:image/jpeg;base64,") and one["alt"] for one in reader.all("img"))
        policy = [one["content"] for one in reader.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        assert EVIL in reader.text
        assert "url(" not in path.read_text(encoding="utf-8")


def test_every_chart_says_what_it_is_and_every_link_arrives(pages):
    for path in pages.values():
        reader = Reader(path)
        charts = [one for one in reader.all("svg") if "aria-hidden" not in one]
        assert charts
        assert all(one["role"] == "img" and len(one["aria-label"]) > 20 for one in charts)
        targets = {attributes.get("id") for _, attributes in reader.elements}
        assert {one["href"][1:] for one in reader.all("a")} <= targets


def test_a_full_report_has_everything(pages):
    text = words(pages["full"])
    for section in (
        "Right and wrong", "What is taken for what", "ROC curve", "Precision and recall", "Can its probabilities",
        "All numbers", "Confident errors", "Mean ± deviation", "seed 2", "Fewer labels", "Robustness",
        "acoustic shadow", "By class", "By dataset", "Where the weights come from", "CC BY 4.0", "feed12345678",
        "da7a", "is f65 again", "1 near-duplicate of tested frames", "pretrained on test frames",
        CONTEXT["command"], "model.arch",
    ):  # fmt: skip
        assert section in text, section
    reader = Reader(pages["full"])
    assert len(reader.all("img")) == 10 + 9  # one example has no map
    assert "10%" in text


def test_the_numbers_on_the_page_are_those_of_the_results(pages):
    predictions = predict(("benign", "malignant"), folds=5, seeds=3, fractions=(0.1, 1.0))
    found = results.summarise(predictions, resamples=50)
    text = words(pages["full"])
    for name in ("auroc", "sensitivity", "brier"):
        metric = found["metrics"][name]
        assert f"{metric['value']:.3f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]" in text


def test_what_was_not_run_leaves_no_empty_section(pages):
    text = words(pages["bare"])
    for absent in ("Confident errors", "Folds and seeds", "Fewer labels", "Robustness", "Map of the features"):
        assert absent not in text


@pytest.mark.parametrize("key", ["task", "counts", "metrics", "per_class", "confusion", "reliability", "folds",
                                 "fractions", "seeds", "context", "bootstrap", "fraction"])  # fmt: skip
def test_any_key_of_the_results_may_be_missing(tmp_path, key):
    predictions = predict(("benign", "malignant"), folds=2, seeds=2, fractions=(0.5, 1.0))
    found = results.summarise(predictions, resamples=20) | {"context": CONTEXT, "robustness": None}
    del found[key]
    draw(tmp_path / "report.html", found, predictions, **parts(predictions))
    assert "malignant" in words(tmp_path / "report.html")


def test_nothing_but_predictions_still_makes_a_page(tmp_path):
    draw(tmp_path / "report.html", {}, predict(("a", "b")))
    assert "Results" in words(tmp_path / "report.html")


def test_equal_results_give_equal_bytes(pages, tmp_path):
    full = predict(("benign", "malignant"), folds=5, seeds=3, fractions=(0.1, 1.0))
    assert write(tmp_path / "again", full, parts(full)).read_bytes() == pages["full"].read_bytes()


def test_the_verdict_says_how_good_and_on_what():
    found = results.summarise(predict(("benign", "malignant"), strength=3), resamples=100)
    first, second = verdict(found)
    value = found["metrics"]["auroc"]["value"]
    assert first.startswith("Shown a malignant and a benign frame, the model gives the malignant one")
    assert f"{100 * value:.0f} times of 100 (AUROC {value:.3f}, 95% interval" in first
    assert "96 frames of 62 patients" in first
    assert "of 48 malignant frames" in second
    assert not doubt(found)


def test_the_verdict_admits_guessing_and_little_data():
    guessing = results.summarise(predict(("benign", "malignant"), strength=0), resamples=100)
    assert "not clearly better than guessing" in doubt(guessing)
    wide = {"metrics": {"auroc": {"value": 0.8, "ci95": [0.6, 0.95]}}}
    assert "more patients" in doubt(wide)
    assert "no interval" in doubt({"metrics": {"auroc": {"value": 0.8, "ci95": None}}})
    assert verdict({}) == []
    assert doubt({}) == ""


def test_the_verdict_on_more_classes_names_the_best_and_the_worst():
    found = results.summarise(predict(("a", "b", "c")), resamples=50)
    first, second = verdict(found)
    assert "the right one of 3 classes" in first
    assert "guessing gives 0.333" in first
    assert re.match(r"It recognises [abc] best .* and [abc] least", second)


@pytest.mark.parametrize("classes", [("benign", "malignant"), ("a", "b", "c")])
def test_the_verdict_says_that_every_frame_is_called_the_same(classes):
    same = predict(classes)
    same.probabilities[:] = np.eye(len(classes))[1]
    assert verdict(results.summarise(same, resamples=20))[-1].startswith(f"It calls every frame {classes[1]}, and has")


def test_points_of_an_embedding_are_few_repeatable_and_part_groups(monkeypatch):
    monkeypatch.setattr(classification, "MOST_POINTS", 60)
    features = np.random.default_rng(0).normal(size=(100, 8))
    features[50:] += 20
    features[7] = np.nan
    rows, points = classification.embedding_points(features, seed=1)
    assert len(rows) == len(points) == 60
    assert 7 not in rows
    assert (np.diff(rows) > 0).all()
    assert points.min() == 0
    assert points.max() == 1
    near, far = points[rows < 50], points[rows >= 50]
    assert np.linalg.norm(near.mean(axis=0) - far.mean(axis=0)) > 2 * near.std()
    np.testing.assert_array_equal(classification.embedding_points(features, seed=1)[1], points)


@pytest.mark.parametrize("features", [np.zeros((0, 4)), np.eye(4), np.ones((50, 4)), np.full((50, 4), np.nan)])
def test_features_with_nothing_to_see_give_no_points(features):
    rows, points = classification.embedding_points(features)
    assert len(rows) == 0
    assert points.shape == (0, 2)


def test_a_map_of_one_kind_alone_is_left_out():
    at = np.random.default_rng(0).random((6, 2))
    two = {"points": at, "label": ["a", "b"] * 3, "dataset": ["one"] * 6}
    assert "By class" in classification._feature_map(two, ("a", "b"))
    assert "By dataset" not in classification._feature_map(two, ("a", "b"))
    assert not classification._feature_map(two | {"label": ["a"] * 6}, ("a", "b"))


def test_reports_fit_a_phone_and_a_desk_with_nothing_missing(pages, tmp_path):
    for found in layout(list(pages.values()), tmp_path):
        assert found["scrolled"] <= found["width"]
        assert (found["missing"], found["outside"], found["small"]) == (0, [], 0)
        assert found["images"] in (0, 19)
