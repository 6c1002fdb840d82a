"""The evaluation door: every protocol from an encoder directory to a report, and what it refuses."""

import collections
import csv
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from flax import nnx

from configs.evaluate import VARIANTS, get_config
from tests.data import tables
from usfmae_jax import evaluate as door
from usfmae_jax.data import provenance
from usfmae_jax.data.corruptions import CORRUPTIONS
from usfmae_jax.data.splits import Fold
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import predictions
from usfmae_jax.interop.model import Model, build, open_model, save_model
from usfmae_jax.models.vit import ViT
from usfmae_jax.probing import build as build_probe
from usfmae_jax.probing import finetuned
from usfmae_jax.probing.loop import evaluate

ARCHITECTURE = {
    "image_size": [32, 32],
    "patch_size": 8,
    "channels": 1,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
}
VIT = {"model": "vit", "encoder": ARCHITECTURE}
PREPROCESSING = {"image_size": [32, 32], "channels": 1, "mean": [0.25], "std": [0.2]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder directory with random weights, pretrained on data of another name."""
    directory = str(tmp_path_factory.mktemp("encoder"))
    arguments = ARCHITECTURE | {"image_size": (32, 32)}
    params = nnx.to_pure_dict(nnx.state(ViT(**arguments, rngs=nnx.Rngs(0)), nnx.Param))
    lineage = [{"job": "pretrain", "data": [{"dataset": "other"}]}]
    save_model(directory, Model({"encoder": params}, VIT, PREPROCESSING, lineage))
    return directory


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def _settings(shards, encoder, cache):
    """Three folds by patient of 24 patients; their small pictures look alike, so copies are not looked for."""
    config = get_config()
    config.checkpoint, config.data.path, config.cache = encoder, shards, cache
    config.split.update(folds=3, duplicates=False)
    config.update(batch_size=16, bootstrap=20, examples=2)
    config.linear.update(epochs=30)
    config.attentive.update(epochs=2)
    return config


@pytest.fixture
def settings(shards, encoder, cache):
    return _settings(shards, encoder, cache)


@pytest.fixture(scope="module")
def probed(shards, encoder, cache, tmp_path_factory):
    """What an evaluation with these settings left."""
    workdir = tmp_path_factory.mktemp("probed")
    evaluate(_settings(shards, encoder, cache), str(workdir))
    return workdir


@pytest.mark.parametrize("protocol", ["logistic", "knn", "linear", "attentive"])
def test_every_protocol_tests_every_frame_once_and_leaves_its_results(settings, protocol, tmp_path):
    settings.protocol = protocol
    results = evaluate(settings, str(tmp_path))
    found = predictions.read(tmp_path, predictions.ClassPredictions)
    assert len(found.label) == 48
    assert len(np.unique(found.frame_key)) == 48
    assert sorted(set(found.fold)) == ["1", "2", "3"]
    assert results["task"]["protocol"] == protocol
    assert 0.5 < results["metrics"]["auroc"]["value"] <= 1  # a bright disc: also random features see it
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == results["metrics"]
    for name in ("results.md", "report.html", "config.json", "splits/splits.csv"):
        assert (tmp_path / name).stat().st_size > 0
    for text in ((tmp_path / "results.json").read_text(), (tmp_path / "config.json").read_text()):
        assert str(tmp_path.parent) not in text, "an absolute path tells who ran it"
    patients = {}
    for row in csv.DictReader((tmp_path / "splits" / "splits.csv").open()):
        patients.setdefault((row["fold"], row["patient"]), set()).add(row["part"])
    assert all(len(parts) == 1 for parts in patients.values())


def test_the_same_evaluation_gives_the_same_bytes(probed, settings, tmp_path):
    evaluate(settings, str(tmp_path))
    assert (tmp_path / "predictions.csv").read_bytes() == (probed / "predictions.csv").read_bytes()


def test_the_split_that_one_run_leaves_is_the_split_of_another(probed, settings, tmp_path, capsys):
    settings.split.path = str(probed / "splits" / "splits.csv")
    settings.checkpoint = "pixels"
    evaluate(settings, str(tmp_path / "b"))
    both = [predictions.read(run, predictions.ClassPredictions) for run in (probed, tmp_path / "b")]
    folds = [dict(zip(found.frame_key, found.fold, strict=True)) for found in both]
    assert folds[0] == folds[1]
    told = json.loads((tmp_path / "b" / "results.json").read_text()) | {"warnings": ["it has seen them"]}
    (tmp_path / "b" / "results.json").write_text(json.dumps(told))
    assert door.compare([str(probed), str(tmp_path / "b"), f"--output={tmp_path / 'c.json'}"]) == 0
    shown = capsys.readouterr()
    assert f" {probed.name} - b " in shown.out
    assert f"warning on {tmp_path / 'b'}: it has seen them" in shown.err
    assert json.loads((tmp_path / "c.json").read_text())["frames"] == 48


def test_the_last_fit_takes_training_and_validation_frames_unless_it_is_told_not_to(settings, tmp_path):
    found = {}
    for refit in (True, False):
        settings.refit = refit
        found[refit] = evaluate(settings, str(tmp_path / str(refit)))
        assert ("training and validation frames together" in found[refit]["task"]["split"]) == refit
    with_them, without = (
        {m["fold"]: m["training_frames"] for m in found[refit]["context"]["members"]} for refit in (True, False)
    )
    parts = collections.Counter()
    for row in csv.DictReader((tmp_path / "True" / "splits" / "splits.csv").open()):
        parts[row["fold"], row["part"]] += 1
    for fold, frames in without.items():
        assert frames == parts[fold, "train"]
        assert with_them[fold] == frames + parts[fold, "validation"]


def test_label_fractions_and_seeds_are_members_of_one_run(settings, tmp_path):
    settings.update(fractions=(0.5, 1.0), seeds=(0, 1))
    results = evaluate(settings, str(tmp_path))
    found = predictions.read(tmp_path, predictions.ClassPredictions)
    members = {(float(f), int(s)) for f, s in zip(found.fraction, found.seed, strict=True)}
    # With all labels nothing in a logistic regression depends on the seed.
    assert members == {(0.5, 0), (0.5, 1), (1.0, 0)}
    frames = {(m["fraction"], m["seed"], m["fold"]): m["training_frames"] for m in results["context"]["members"]}
    assert frames[0.5, 0, "1"] < frames[1.0, 0, "1"]
    assert results["fraction"] == 1.0


def test_corruptions_are_a_curve_over_five_severities(settings, tmp_path):
    settings.update(corruptions=True)
    results = evaluate(settings, str(tmp_path))
    robustness = results["robustness"]
    assert robustness.keys() == CORRUPTIONS.keys()
    clean = results["metrics"]["auroc"]["value"]
    for curves in robustness.values():
        assert len(curves["auroc"]) == len(curves["balanced_accuracy"]) == 6
        assert curves["auroc"][0] == clean
        assert all(0 <= value <= 1 for value in curves["auroc"])
    assert len({*robustness["blur"]["ece"]}) == 6  # every severity changes something


def test_what_was_pretrained_on_is_said(settings, shards, tmp_path):
    params = nnx.to_pure_dict(nnx.state(ViT(**ARCHITECTURE | {"image_size": (32, 32)}, rngs=nnx.Rngs(0)), nnx.Param))
    lineage = [{"job": "pretrain", "data": [{"dataset": "made"}]}]
    save_model(str(tmp_path / "e"), Model({"encoder": params}, VIT, PREPROCESSING, lineage))
    settings.checkpoint = str(tmp_path / "e")
    (warning,) = evaluate(settings, str(tmp_path / "out"))["context"]["warnings"]
    assert "pretrained, without labels, on frames of made" in warning


def write_run(workdir, splits_from, folds, params_of):
    """A fine-tuning run as its loop leaves it: members with predictions and a classifier, and the splits."""
    description = VIT | {"pool": "mean", "classes": ["0", "1"]}
    lineage = [{"job": "finetune", "data": [{"dataset": "made"}]}]
    (workdir / "splits").mkdir(parents=True)
    (workdir / "splits" / "splits.csv").write_bytes(splits_from.read_bytes())
    for fold in folds:
        member = workdir / "members" / f"fold-{fold}"
        params = nnx.to_pure_dict(nnx.state(build(description)(nnx.Rngs(params_of(fold))), nnx.Param))
        save_model(str(member / "classifier"), Model(params, description, PREPROCESSING, lineage))
        own = predictions.read(splits_from.parent.parent, predictions.ClassPredictions)
        own.select(own.fold == fold).write(member / "predictions.csv")


def test_a_fine_tuned_run_judges_every_frame_by_the_member_that_has_not_seen_it(probed, settings, tmp_path):
    write_run(tmp_path / "run", probed / "splits" / "splits.csv", ("1", "2", "3"), int)
    settings.checkpoint = str(tmp_path / "run")
    results = evaluate(settings, str(tmp_path / "out"))
    assert results["task"]["protocol"] == "finetuned"
    found, first = (predictions.read(run, predictions.ClassPredictions) for run in (tmp_path / "out", probed))
    assert dict(zip(found.frame_key, found.fold, strict=True)) == dict(zip(first.frame_key, first.fold, strict=True))

    # One member alone may judge only its own test part, also when its classifier/ is what is named.
    for place in ("", "classifier"):
        settings.checkpoint = str(tmp_path / "run" / "members" / "fold-2" / place)
        evaluate(settings, str(tmp_path / "one"))
        one = predictions.read(tmp_path / "one", predictions.ClassPredictions)
        assert set(one.frame_key) == set(found.frame_key[found.fold == "2"])
        np.testing.assert_allclose(one.probabilities, found.probabilities[found.fold == "2"], rtol=1e-5)


def test_a_setting_of_probes_is_not_ignored_for_a_classifier(probed, settings, tmp_path):
    write_run(tmp_path / "run", probed / "splits" / "splits.csv", ("1",), int)
    settings.checkpoint = str(tmp_path / "run")
    for name, value in (("seeds", (0, 1)), ("fractions", (0.5,)), ("split.only", ("1",)), ("pool", "cls"), ("step", 5)):
        changed = settings.copy_and_resolve_references()
        changed.update_from_flattened_dict({name: value})
        with pytest.raises(InputError, match=f"config.{name} is for probes"):
            evaluate(changed, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_classifier_that_may_have_seen_the_data_needs_a_split(probed, settings, tmp_path):
    splits = probed / "splits" / "splits.csv"
    write_run(tmp_path / "run", splits, ("1",), int)
    moved = tmp_path / "elsewhere" / "model"
    (tmp_path / "run" / "members" / "fold-1" / "classifier").rename((moved.parent.mkdir(), moved)[1])
    settings.checkpoint = str(moved)
    with pytest.raises(InputError, match="was fine-tuned on frames of made"):
        evaluate(settings, str(tmp_path / "out"))
    settings.split.path = str(splits)
    with pytest.raises(InputError, match=r"of the one fold that is its own \(there are 3\)"):
        evaluate(settings, str(tmp_path / "out"))
    rows = [line for line in splits.read_text().splitlines() if line.split(",")[-2] in ("fold", "1")]
    (tmp_path / "one.csv").write_text("\n".join(rows))
    settings.split.path = str(tmp_path / "one.csv")
    assert evaluate(settings, str(tmp_path / "out"))["counts"]["frames"] == 16


def test_frames_of_a_run_that_nothing_is_known_of_are_left_out(probed, settings, tmp_path):
    splits = probed / "splits" / "splits.csv"
    write_run(tmp_path / "run", splits, ("1", "2", "3"), int)
    settings.checkpoint = str(tmp_path / "run")
    ours = tmp_path / "run" / "splits" / "splits.csv"
    lines = splits.read_text().splitlines()
    ours.write_text("\n".join(line for line in lines if ",v0," not in line))  # as for copies of test images
    found = evaluate(settings, str(tmp_path / "out"))
    assert found["counts"]["frames"] == 47
    assert (
        "1 frames that are in no part of the run's split, such as copies, are left out" in found["context"]["warnings"]
    )
    ours.write_text(splits.read_text().replace(",part", ",parts"))
    with pytest.raises(InputError, match=r"splits\.csv is damaged"):
        evaluate(settings, str(tmp_path / "out"))
    ours.write_text(splits.read_text())
    (tmp_path / "run" / "members" / "fold-2" / "predictions.csv").unlink()
    with pytest.raises(InputError, match="fold-2 is not finished; finish the run"):
        evaluate(settings, str(tmp_path / "out"))


def test_labels_that_an_earlier_stage_learnt_are_told(probed, settings, tmp_path):
    write_run(tmp_path / "run", probed / "splits" / "splits.csv", ("1", "2", "3"), int)
    for member in (tmp_path / "run" / "members").iterdir():
        stages = [{"job": "finetune", "data": [{"dataset": "made"}]}] * 2
        model = open_model(str(member))
        shutil.rmtree(member / "classifier")
        save_model(str(member / "classifier"), Model(model.params, model.description, model.preprocessing, stages))
    settings.checkpoint = str(tmp_path / "run")
    (warning,) = evaluate(settings, str(tmp_path / "out"))["context"]["warnings"]
    assert "the weights were fine-tuned, with labels, on frames of made that are tested here" in warning


def _renamed(dataset="again", count=8):
    """Frames whose ids say nothing, and their hashes."""
    frames = tables.table([f"p{i}" for i in range(count)], [0] * count, dataset=[dataset] * count)
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]
    return dataclasses.replace(frames, sha256=np.array(hashes)), hashes


def _member(hashes, fold, seen=(), held_out=()):
    data = [{"dataset": "made"} | ({"frame_hashes": provenance.hash_frames(hashes)} if hashes else {})]
    model = types.SimpleNamespace(lineage=[{"job": "finetune", "data": data}])
    return finetuned.Trained(model, fold, 0, 1.0, *map(frozenset, (seen, (), held_out, ())))


def test_frames_that_a_member_has_learnt_under_another_name_are_left_to_the_others():
    frames, hashes = _renamed()
    trained = [_member(hashes[:4], "1", {("made", "x")}), _member(hashes[4:], "2", {("made", "y")})]
    for chosen in (None, ([Fold("1", *map(np.array, ([], [], [0, 1]))), Fold("2", *map(np.array, ([], [], [5])))], "")):
        allowed, _, _ = finetuned._allowed(trained, frames, chosen)
        tested = [0, 1, 5] if chosen else range(8)
        assert [np.flatnonzero(one).tolist() for one in allowed] == [
            [row for row in tested if row >= 4],
            [row for row in tested if row < 4],
        ]
    with pytest.raises(InputError, match="learnt from every patient of this data"):
        finetuned._allowed([_member(hashes, "1", {("made", "x")})], frames, None)


def test_a_copy_that_the_run_itself_tested_stays():
    frames, hashes = _renamed("made")
    own = {("made", f"f{i}", f"f{i}") for i in (6, 7)}
    allowed, note, _ = finetuned._allowed([_member(hashes[:7], "1", {("made", "x")}, own)], frames, None)
    assert np.flatnonzero(allowed[0]).tolist() == [6, 7]
    assert note == "the run's own test parts"


def test_a_model_alone_is_tested_where_its_hashes_say_that_it_has_not_learnt():
    frames, hashes = _renamed("made")
    with pytest.raises(InputError, match="was fine-tuned on frames of made, and which ones is not known"):
        finetuned._allowed([_member(hashes[:1], "")], frames, None)
    with pytest.raises(InputError, match="was fine-tuned on frames of made, and which ones is not known"):
        finetuned._allowed([_member((), "")], frames, None)
    other = [hashlib.sha256(f"other {i}".encode()).hexdigest() for i in range(3)]
    assert finetuned._allowed([_member(other, "")], frames, None)[0].all()


def test_a_probe_is_refused_where_labels_were_learnt_and_nowhere_else():
    frames, hashes = _renamed()
    model = types.SimpleNamespace(lineage=_member(hashes[:3], "").model.lineage, kind="classifier")
    with pytest.raises(InputError, match="fine-tuned, with labels, on 3 of the 8 frames of again: a probe of them"):
        build_probe.refuse_labels_seen(model, frames)
    build_probe.refuse_labels_seen(model, dataclasses.replace(frames, sha256=np.array([*hashes[3:], *hashes[3:6]])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": ""}, "config.checkpoint is missing"),
        ({"checkpoint": "nowhere"}, "is no folder"),
        ({"protocol": "svm"}, "config.protocol='svm' must be one of"),
        ({"protocol": "finetuned"}, "holds an encoder without a head"),
        ({"positive": "bad"}, "config.positive='bad' is no class"),
        ({"classes": ("a",)}, "label 1 is outside the class list"),
        ({"pool": "max"}, "config.pool='max' must be"),
        ({"fractions": (0.0,)}, "config.fractions"),
        ({"seeds": ()}, "config.seeds"),
        ({"seeds": (1, 1)}, "config.seeds"),
        ({"bootstrap": 0}, "config.bootstrap=0 must be 1 or more"),
        ({"attentive.epochs": 0}, "config.attentive.epochs=0"),
        ({"batch_size": 3}, "must be a multiple of the 8 devices"),
        ({"data.path": ""}, "config.data.path names no labelled shards"),
        ({"data.path": "data/none"}, "no shards match 'data/none'"),
        ({"split.folds": 40}, "groups"),
        ({"split.only": ("9",)}, "there is no fold '9'"),
        ({"dtype": "float16"}, "config.dtype='float16'"),
        ({"linear.optimizer": "sgd"}, "config.linear.optimizer='sgd'"),
    ],
)
def test_bad_input_is_refused_before_any_features_are_computed(settings, change, message, tmp_path, monkeypatch):
    monkeypatch.setattr("usfmae_jax.probing.features.extract", lambda *args, **kwargs: pytest.fail("too late"))
    settings.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=message):
        evaluate(settings, str(tmp_path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_are_complete(variant):
    config = get_config(variant)
    assert config.protocol == "auto"
    assert bool(config.data.path) == (variant != "folder")


def test_help_shows_the_fields_and_the_comparison():
    command = [sys.executable, "-m", "usfmae_jax.evaluate", "--config=evaluate", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for text in ("compare A B", "--config.protocol='auto'", ":busbra", "--config.corruptions=False"):
        assert text in shown


def test_a_comparison_with_nothing_is_one_sentence(tmp_path, capsys):
    assert door.compare([str(tmp_path), str(tmp_path)]) == 2
    assert "no predictions there" in capsys.readouterr().err
