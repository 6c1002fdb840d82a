"""The fine-tuning loop: what it refuses, what it leaves, and that however it is interrupted, nothing changes."""

import copy
import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from configs import finetune as configs
from tests.helpers import stopping, write_shards
from tests.pretraining.runs import metrics
from usfmae_jax.data.table import images as table_images
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import predictions
from usfmae_jax.finetuning import build, results
from usfmae_jax.finetuning import loop as supervised
from usfmae_jax.finetuning.loop import better, finetune
from usfmae_jax.interop.model import Model, flatten, open_model, save_model
from usfmae_jax.tasks.classification import Classification, probabilities
from usfmae_jax.training.forward import model_function
from usfmae_jax.training.mesh import one_device
from usfmae_jax.training.monitor import DivergedError

Trainer = supervised.Trainer


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Runs of equal models and recipes share what was compiled for the first: that takes longer than to train them."""
    known = {}

    def compile_once(config, run):
        names = ("model", "mode", "last_k", "optimizer", "regularization", "evaluate")
        parts = {name: run.settings[name] for name in names}
        key = json.dumps([run.description, run.preprocessing, parts, config.train.batch_size])
        known[key] = known.get(key) or Trainer(config, run)
        trainer = copy.copy(known[key])
        trainer.config, trainer.run = config, run
        trainer._whole_images = trainer._decoded()
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "Trainer", compile_once)
        yield


def _config(shards):
    """Two folds of a model of two small blocks, ten updates each."""
    config = configs.get_config("folder")
    config.data.path = shards
    config.model.update(image_size=(32, 32), patch_size=8, width=32, depth=2, num_heads=2)
    config.split.update(folds=2, duplicates=False)  # simulated discs look alike
    config.train.update(batch_size=16, steps=10)
    config.stop.every = 1.6  # after 2, 4, ... updates
    config.checkpoint.every = 2
    config.log.every = 1
    config.evaluate.update(batch_size=16, bootstrap=20)
    return config


@pytest.fixture
def config(shards):
    return _config(shards)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert finetune(_config(shards), str(workdir))
    return workdir


@pytest.fixture
def no_report(monkeypatch):
    """For tests of members alone."""
    monkeypatch.setattr(supervised.results, "finish", lambda *args: None)


def _left(workdir):
    """What members leave, to compare; tensors, predictions, and losses by step."""
    found = {}
    for member in sorted((workdir / "members").iterdir()):
        params = flatten(open_model(str(member / "classifier")).params)
        losses = {line["step"]: line["loss"] for line in metrics(member) if "loss" in line}
        found[member.name] = (
            {name: value.tobytes() for name, value in params.items()},
            (member / "predictions.csv").read_text(),
            (member / "validation.csv").read_text(),  # kept, or predicted again after a restart
            losses,
        )
    return found


def test_a_run_leaves_members_splits_and_results(undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["metrics"]["auroc"]["value"] > 0.9  # a bright disc or none
    assert (results["counts"]["frames"], results["counts"]["folds"]) == (48, 2)
    assert results["context"]["lineage"][-1]["job"] == "finetune"
    assert {file.name for file in undisturbed.iterdir()} >= {
        "report.html", "results.md", "predictions.csv", "config.json", "lineage.json", "splits", "members"
    }  # fmt: skip
    model = open_model(str(undisturbed / "members" / "fold-1" / "classifier"))
    assert model.params["head"]["kernel"].shape == (32, 2)
    assert not model.stats
    assert model.description["classes"] == ["0", "1"]
    assert model.preprocessing["image_size"] == [32, 32]
    assert model.lineage[-1]["member"] == "fold-1"
    assert not (undisturbed / "members" / "fold-1" / "checkpoints").exists()


def test_every_frame_is_tested_by_the_member_that_has_not_seen_its_patient(undisturbed):
    tested = predictions.read(undisturbed, predictions.ClassPredictions)
    assert len(tested) == len(set(tested.frame_key)) == 48
    seen = {"1": set(), "2": set()}
    for row in csv.DictReader((undisturbed / "splits" / "splits.csv").open()):
        if row["part"] != "test":
            seen[row["fold"]].add(row["patient"])
    for patient, fold in zip(tested.patient, tested.fold, strict=True):
        assert patient not in seen[fold]


def test_evaluations_are_logged_and_the_best_is_what_is_tested(undisturbed):
    for member in (undisturbed / "members").iterdir():
        scores = {line["step"]: line for line in metrics(member) if "validation/auroc" in line}
        assert sorted(scores) == [2, 4, 6, 8, 10]
        best = max(scores.values(), key=lambda line: (line["validation/auroc"], -line["validation/log_loss"]))
        again = predictions.read(member / "validation.csv", predictions.ClassPredictions)
        loss = -np.log(again.probabilities[np.arange(len(again)), again.label]).mean()
        np.testing.assert_allclose(loss, best["validation/log_loss"], rtol=1e-5)


# Before a checkpoint; in the next member; on a checkpoint; at the end of a member.
@pytest.mark.parametrize("after", [1, 13, *(pytest.param(after, marks=pytest.mark.slow) for after in (4, 10))])
def test_a_stopped_run_ends_bitwise_as_the_undisturbed_one(undisturbed, config, tmp_path, after, no_report):
    with stopping(after):
        done = finetune(config, str(tmp_path))
    assert not done
    config.data.threads = 1  # may change
    assert finetune(config, str(tmp_path))
    assert _left(tmp_path) == _left(undisturbed)


def test_a_killed_run_starts_at_its_last_checkpoint(undisturbed, config, tmp_path, monkeypatch, no_report):
    real, calls = Classification.score, []

    def fail_at_the_third(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "score", fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, str(tmp_path))
    assert finetune(config, str(tmp_path))
    assert _left(tmp_path) == _left(undisturbed)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"epochs": 2.0, "steps": 0}, "200 steps of 32 each (config.train.min_steps; 2 epochs would be 6)\n"),
        ({"epochs": 90.0, "steps": 0}, "200 steps of 32 each\n"),
        ({"epochs": 2.0, "steps": 200}, "200 steps of 32 each\n"),
    ],
)
def test_what_min_steps_makes_of_the_epochs_is_said(train, said, config, tmp_path, capfd):
    run = build.prepare(config, str(tmp_path))
    member = dataclasses.replace(run.members[0], total_steps=200)
    member = dataclasses.replace(member, fold=dataclasses.replace(member.fold, train=np.arange(100)))
    run = dataclasses.replace(run, members=(member,), settings=run.settings | {"train": train})
    results.describe(run, one_device(), 32, 1, 1)
    assert said in capfd.readouterr().err


def test_a_finished_run_takes_more_seeds_fractions_and_folds(config, tmp_path, capfd):
    config.split.only = ("1",)
    config.train.steps = 2
    assert finetune(config, str(tmp_path))
    first = _left(tmp_path)["fold-1"]
    capfd.readouterr()
    config.split.only = ()
    config.seeds, config.fractions = (0, 2), (0.5, 1.0)
    assert finetune(config, str(tmp_path))
    assert "members: 8, of which 7 are to be trained" in capfd.readouterr().err
    assert _left(tmp_path)["fold-1"] == first
    results = json.loads((tmp_path / "results.json").read_text())
    assert [entry["fraction"] for entry in results["fractions"]] == [0.5, 1.0]
    assert [entry["seed"] for entry in results["seeds"]] == [0, 2]
    patients = {}
    for name in ("splits", "fractions/fraction-50-seed-0", "fractions/fraction-50-seed-2"):
        rows = csv.DictReader((tmp_path / "splits" / f"{name}.csv").open())
        patients[name] = {row["patient"] for row in rows if (row["part"], row["fold"]) == ("train", "1")}
    whole, half, other = patients.values()
    assert half < whole
    assert abs(len(half) - len(whole) / 2) <= 1
    assert half != other


def test_compiling_happens_once_for_all_members(config, tmp_path, capfd, no_report, monkeypatch):
    monkeypatch.setattr(supervised, "Trainer", Trainer)
    config.split.only = ("1",)
    config.fractions = (0.5, 1.0)
    config.train.steps = 2
    assert finetune(config, str(tmp_path))
    assert capfd.readouterr().err.count("compiling the training step took") == 1


def test_patience_stops_early(config, tmp_path, monkeypatch, no_report):
    config.split.only = ("1",)
    config.train.steps = 40
    config.stop.patience = 2
    monkeypatch.setattr(supervised, "better", lambda score, best, *how: not best)  # never better than at first
    assert finetune(config, str(tmp_path))
    steps = [line["step"] for line in metrics(tmp_path / "members" / "fold-1") if "validation/auroc" in line]
    assert len(steps) == 3


def test_the_better_evaluation_has_the_better_metric_then_the_lower_loss():
    def is_better(metric, score, best):
        return better(score, best, metric, Classification.tie, Classification.losses)

    assert is_better("auroc", {"auroc": 0.7, "log_loss": 9.0}, {})
    assert is_better("auroc", {"auroc": 0.7, "log_loss": 9.0}, {"auroc": 0.6, "log_loss": 1.0})
    assert is_better("auroc", {"auroc": 0.7, "log_loss": 0.9}, {"auroc": 0.7, "log_loss": 1.0})
    assert not is_better("auroc", {"auroc": 0.7, "log_loss": 1.0}, {"auroc": 0.7, "log_loss": 1.0})
    assert is_better("brier", {"brier": 0.1, "log_loss": 1.0}, {"brier": 0.2, "log_loss": 1.0})
    assert is_better("ppv", {"ppv": 0.1, "log_loss": 1.0}, {"ppv": np.nan, "log_loss": 0.5})  # nothing was called so
    assert not is_better("ppv", {"ppv": np.nan, "log_loss": 0.5}, {"ppv": 0.1, "log_loss": 1.0})
    assert is_better("ppv", {"ppv": np.nan, "log_loss": 0.5}, {"ppv": np.nan, "log_loss": 1.0})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.json", b"", r"config\.json is damaged; remove it"),
        ("config.json", b"[1]", r"config\.json is damaged; remove it"),
        ("config.json", b'{"augment": 5}', r"config\.json is damaged; remove it"),
        ("splits/splits.csv", b"\xff", r"splits\.csv holds another split"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_sentence(undisturbed, config, tmp_path, monkeypatch, name, text, says):
    monkeypatch.setattr(supervised.side_by_side, "train", lambda *args: pytest.fail("trained before refusing"))
    copy = shutil.copytree(undisturbed, tmp_path / "run")
    (copy / name).write_bytes(text)
    with pytest.raises(InputError, match=says):
        finetune(config, str(copy))


def _turn_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 0x40
    path.write_bytes(data)


def _lines(keep):
    return lambda path: path.write_text("".join(keep(path.read_text().splitlines(keepends=True))))


FINISHED = {
    "cut": _lines(lambda lines: lines[:4]),
    "header alone": _lines(lambda lines: lines[:1]),
    "repeated": _lines(lambda lines: lines + lines[-1:]),
    "other order": _lines(lambda lines: [lines[0], *lines[:0:-1]]),
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("name", ["predictions", "validation"])
@pytest.mark.parametrize("damage", FINISHED)
def test_a_finished_member_is_believed_only_as_it_was_left(
    undisturbed, config, tmp_path, monkeypatch, damage, name, sealed
):
    monkeypatch.setattr(supervised.side_by_side, "train", lambda *args: pytest.fail("trained before refusing"))
    copy = shutil.copytree(undisturbed, tmp_path / "run")
    member = copy / "members" / "fold-2"
    FINISHED[damage](member / f"{name}.csv")
    if not sealed:  # by an earlier version
        (member / "checksums.json").unlink()
    said = rf"{name}\.csv is damaged" if sealed else rf"rows of {name}\.csv are not the \d+ frames of the member's"
    with pytest.raises(
        InputError, match=rf"{said}.*; remove that folder, and the same command trains the member again"
    ):
        finetune(config, str(copy))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("classifier/model.safetensors", _turn_a_bit),
        ("predictions.csv", _turn_a_bit),
        ("classifier/model.safetensors", lambda path: path.unlink()),
        ("checksums.json", lambda path: path.write_bytes(b"[1]\xff")),
    ],
)
def test_a_bit_turned_in_a_finished_member_is_noticed(undisturbed, config, tmp_path, name, damage):
    copy = shutil.copytree(undisturbed, tmp_path / "run")
    damage(copy / "members" / "fold-2" / name)
    with pytest.raises(InputError, match=rf"fold-2: \S*{name.rpartition('/')[2]} is damaged"):
        finetune(config, str(copy))


def test_resuming_with_another_config_names_the_fields(undisturbed, config):
    config.optimizer.learning_rate = 0.5
    with pytest.raises(InputError, match=r"optimizer\.learning_rate is 0\.5 but was"):
        finetune(config, str(undisturbed))


def test_non_finite_loss_names_the_step(config, tmp_path, monkeypatch):
    targets = Classification.targets

    def infinite(*args):
        return targets(*args) | {"weight": np.full((len(args[2]), 2), np.inf, np.float32)}

    monkeypatch.setattr(Classification, "targets", infinite)
    with pytest.raises(DivergedError, match=r"(loss|grad_norm) is (nan|inf) at step \d+"):
        finetune(config, str(tmp_path))


def _encoder(directory):
    """A tiny encoder directory with random weights that has seen a dataset."""
    import jax.numpy as jnp
    from flax import nnx

    from usfmae_jax.models.vit import ViT

    kwargs = dict(image_size=(32, 32), patch_size=8, channels=1, width=32, depth=2, num_heads=2, mlp_ratio=4.0)
    params = nnx.to_pure_dict(nnx.state(ViT(**kwargs, dtype=jnp.float32, rngs=nnx.Rngs(7)), nnx.Param))
    preprocessing = {"image_size": [32, 32], "channels": 1, "mean": [0.3], "std": [0.1]}
    lineage = [{"job": "pretrain", "data": [{"dataset": "made", "shards": []}]}]
    description = {"model": "vit", "encoder": kwargs}
    save_model(str(directory), Model({"encoder": params}, description, preprocessing, lineage))
    return str(directory)


def test_it_starts_from_an_encoder_and_warns_when_that_has_seen_the_test_data(config, tmp_path, capfd):
    config.init = _encoder(tmp_path / "encoder")
    config.model.update(image_size=(), patch_size=0, width=0, depth=0, num_heads=0)  # as the encoder has it
    config.mode = "frozen"
    config.split.only = ("2",)
    config.train.steps = 3
    assert finetune(config, str(tmp_path / "run"))
    assert "warning: the weights were pretrained, without labels, on frames of made" in capfd.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert any("pretrained, without labels, on frames of made" in text for text in results["context"]["warnings"])
    assert [stage["job"] for stage in results["context"]["lineage"]] == ["pretrain", "finetune"]
    model = open_model(str(tmp_path / "run" / "members" / "fold-2" / "classifier"))
    assert model.preprocessing["mean"] == [0.3]
    for name, value in flatten(open_model(config.init).params).items():
        np.testing.assert_array_equal(flatten(model.params)[name], value, err_msg=name)


@pytest.mark.slow
def test_a_resnet_with_running_statistics_resumes_bitwise(config, tmp_path, no_report):
    config.model.update(arch="resnet50", width=4, depth=1, channels=1, patch_size=0, num_heads=0)
    config.split.only = ("1",)
    config.train.steps = 4
    assert finetune(config, str(tmp_path / "whole"))
    stats = flatten(open_model(str(tmp_path / "whole" / "members" / "fold-1" / "classifier")).stats)
    assert any(np.abs(value).max() > 0 for name, value in stats.items() if name.endswith("mean"))
    with stopping(2):
        assert not finetune(config, str(tmp_path / "stopped"))
    assert finetune(config, str(tmp_path / "stopped"))
    assert _left(tmp_path / "stopped") == _left(tmp_path / "whole")


def test_near_duplicates_are_left_out_of_training_and_listed(config, tmp_path):
    write_shards(tmp_path, 48)
    config.data.path = str(tmp_path)
    config.split.update(duplicates=True, kind="single")
    with pytest.raises(InputError):  # all simulated discs are alike: nothing is left to learn from
        finetune(config, str(tmp_path / "run"))
    assert (tmp_path / "run" / "duplicates.csv").exists()


def test_a_split_with_copies_can_be_run_as_it_was_published_and_says_what_they_are_worth(
    config, undisturbed, tmp_path, monkeypatch
):
    rows = list(csv.DictReader((undisturbed / "splits" / "splits.csv").open()))
    fold = [row for row in rows if row["fold"] == rows[0]["fold"]]
    names = {part: [row for row in fold if row["part"] == part] for part in ("train", "test")}
    one, other = (tuple(names[part][0][column] for column in ("video", "frame")) for part in ("train", "test"))

    def pairs(table, path, keep):
        place = {name: row for row, name in enumerate(zip(table.video, table.frame_name, strict=True))}
        return np.array([[place[one], place[other]]])

    monkeypatch.setattr(build, "cached_near_duplicates", pairs)
    config.split.update(duplicates=True, copies="keep", path=str(undisturbed / "splits"), only=(rows[0]["fold"],))
    config.train.steps = 2
    assert finetune(config, str(tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["without_copies"]["frames"] == found["counts"]["frames"] - 1 == len(names["test"]) - 1
    assert set(found["without_copies"]["metrics"]) == set(found["metrics"])
    assert not found["context"]["excluded"]
    assert "up to 1 tested pictures have a copy" in found["task"]["split"]
    for page in ("results.md", "report.html"):
        assert "1 copied frame" in (tmp_path / "run" / page).read_text()


BAD = {
    "no path": ({"data.path": ""}, "names no labelled shards"),
    "nothing there": ({"data.path": "/nonexistent/*"}, "no shards match"),
    "classes": ({"classes": ("0", "1", "2")}, "class '2' has 0 patients"),
    "positive": ({"positive": "GIST"}, "config.positive='GIST' is no class"),
    "arch": ({"model.arch": "vgg"}, "config.model.arch='vgg' must be one of tiny"),
    "negative heads": ({"model.num_heads": -3}, "config.model.num_heads=-3 must be 0 or more"),
    "a range of words": ({"augment.gamma": ("a", "b")}, "config.augment.gamma=('a', 'b') must be two numbers"),
    "words for shares": ({"fractions": ("half",)}, "config.fractions=('half',) must be shares"),
    "words for seeds": ({"seeds": ("one",)}, "config.seeds=('one',) must be one or more different numbers from 0 on"),
    "task": ({"task": "guessing"}, "config.task='guessing' must be one of classification"),
    "pool": ({"model.pool": "max"}, "config.model.pool"),
    "drop path": ({"model.drop_path": 1.0}, "config.model.drop_path"),
    "patch": ({"model.image_size": (30, 32)}, "not divisible by patch size 8"),
    "heads": ({"model.num_heads": 5}, "config.model.num_heads=5"),
    "channels": ({"data.channels": 3}, "config.data.channels=3"),
    "mean": ({"model.mean": (0.1, 0.2)}, "config.model.mean"),
    "dtype": ({"model.dtype": "float8"}, "config.model.dtype"),
    "mode": ({"mode": "half"}, "config.mode='half'"),
    "last_k": ({"mode": "last_k", "last_k": 3}, "config.last_k=3 must lie between 1 and the 2 blocks"),
    "init": ({"init": "/nonexistent"}, "config.init: "),
    "init file": ({"init": "vit.pth"}, "arch=resnet50"),
    "batch": ({"train.batch_size": 12}, "cannot be divided among 8 devices"),
    "no steps": ({"train.steps": 0, "train.min_steps": 0, "train.epochs": 0.0}, "0 steps"),
    "folds": ({"split.folds": 30}, "config.split.folds=30"),
    "no such fold": ({"split.only": ("7",)}, "no fold '7', only 1, 2"),
    "split kind": ({"split.kind": "random"}, "config.split.kind"),
    "fractions": ({"fractions": (0.0,)}, "config.fractions"),
    "seeds": ({"seeds": (1, 1)}, "config.seeds"),
    "metric": ({"stop.metric": "auc"}, "config.stop.metric='auc' must be one of auroc"),
    "every": ({"stop.every": 0.0}, "config.stop.every"),
    "smoothing": ({"regularization.smoothing": 1.0}, "config.regularization.smoothing"),
    "weights": ({"regularization.class_weights": "log"}, "config.regularization.class_weights"),
    "parallel": ({"parallel": 2}, "config.parallel=2 is for a CPU that is one device"),
    "less than none": ({"parallel": -1}, "config.parallel=-1 must be at least 0"),
    "epochs": ({"train.epochs": -1.0}, "config.train.epochs=-1 must be at least 0"),
    "rate": ({"optimizer.learning_rate": -1.0}, "config.optimizer.learning_rate=-1"),
    "crop": ({"augment.crop_scale": (0.0, 0.5)}, "config.augment.crop_scale"),
    "interpolation": ({"augment.interpolation": "sinc"}, "config.augment.interpolation"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_compiled(config, tmp_path, name, monkeypatch):
    monkeypatch.setattr(supervised, "Trainer", lambda *a: pytest.fail("compiled before refusing"))
    changes, message = BAD[name]
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(InputError) as error:
        finetune(config, str(tmp_path / "run"))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 64}, "config.model.width is 64, but 32 in config.init="),
        ({"model.arch": "base"}, "config.model.arch=base, whose patch_size is 16, but 8"),
        ({"model.arch": "resnet50"}, "holds a vit"),
    ],
)
def test_an_encoder_of_another_shape_is_refused_with_both_values(config, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(supervised, "Trainer", lambda *a: pytest.fail("compiled before refusing"))
    config.init = _encoder(tmp_path / "encoder")
    config.model.update(image_size=(), patch_size=0, width=0, depth=0, num_heads=0)
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError) as error:
        finetune(config, str(tmp_path / "run"))
    assert message in str(error.value)


def test_low_rank_additions_are_trained_and_become_part_of_the_weights(config, tmp_path, undisturbed):
    encoder = str(undisturbed / "members" / "fold-2")
    config.update(mode="lora", lora_rank=2, init=encoder)
    config.split.only = ("1",)
    config.optimizer.learning_rate = 0.2
    assert finetune(config, str(tmp_path))
    model = open_model(str(tmp_path / "members" / "fold-1"))
    before = flatten(open_model(encoder).params)
    after = flatten(model.params)
    assert not [name for name in after if "lora" in name]
    moved = {name for name in before if not np.array_equal(before[name], after[name]) and "head" not in name}
    assert moved == {f"encoder.blocks.stack.attn.{part}.kernel" for part in ("qkv", "proj")}
    change = after["encoder.blocks.stack.attn.qkv.kernel"] - before["encoder.blocks.stack.attn.qkv.kernel"]
    assert [np.linalg.matrix_rank(one, tol=1e-4 * np.abs(one).max()) for one in change] == [2, 2]
    # What was written is what the merged weights say.
    said = predictions.read(tmp_path, predictions.ClassPredictions)
    table = read_table(config.data.path)
    keys = list(zip(table.video, table.frame, strict=True))
    rows = [keys.index(key) for key in zip(said.video, said.frame, strict=True)]
    images = np.concatenate(list(table_images(table, rows, size=(32, 32), channels=1, batch_size=48)))
    function, variables = model_function(model, probabilities)
    again = function(variables, images)["probabilities"]
    np.testing.assert_allclose(again, said.probabilities, atol=1e-5)


def test_the_mean_of_a_frame_and_its_mirror_is_tested(config, tmp_path):
    config.split.only = ("1",)
    found = {}
    for flip in (False, True):
        config.evaluate.flip = flip
        assert finetune(config, str(tmp_path / str(flip)))
        found[flip] = predictions.read(tmp_path / str(flip), predictions.ClassPredictions)
    model = open_model(str(tmp_path / "True" / "members" / "fold-1"))
    assert flatten(model.params).keys() == flatten(open_model(str(tmp_path / "False/members/fold-1")).params).keys()
    assert not np.array_equal(found[True].probabilities, found[False].probabilities)
    table = read_table(config.data.path)
    keys = list(zip(table.video, table.frame, strict=True))
    rows = [keys.index(key) for key in zip(found[True].video, found[True].frame, strict=True)]
    images = np.concatenate(list(table_images(table, rows, size=(32, 32), channels=1, batch_size=48)))
    function, variables = model_function(model, probabilities)
    both = [function(variables, one)["probabilities"] for one in (images, images[:, :, ::-1])]
    np.testing.assert_allclose(found[True].probabilities, (both[0] + both[1]) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mode": "lora", "lora_rank": 0}, r"config\.lora_rank=0 must lie between 1 and the width of the model, 32"),
        ({"mode": "lora", "lora_rank": 33}, r"config\.lora_rank=33 must lie between 1"),
        ({"mode": "lora", "model": {"arch": "resnet50"}}, "is for the attention of a ViT, which a resnet50 has not"),
    ],
)
def test_low_ranks_that_cannot_be_are_refused(config, tmp_path, fields, says):
    config.update(fields)
    if "model" in fields:
        config.model.update(width=8, depth=1, patch_size=0, num_heads=0)
    with pytest.raises(InputError, match=says):
        finetune(config, str(tmp_path))
