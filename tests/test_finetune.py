"""The fine-tuning door, in processes of its own."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.pretraining.runs import environment
from usfmae_jax import finetune as door
from usfmae_jax.evaluation import predictions

TINY = {
    "model.image_size": 32, "model.patch_size": 8, "model.width": 32, "model.depth": 2, "model.num_heads": 2,
    "train.batch_size": 16, "train.steps": 6, "split.folds": 2, "split.duplicates": False, "log.every": 1,
    "stop.every": 3.2, "evaluate.bootstrap": 20, "seeds": "0,1", "parallel": 2,
}  # fmt: skip


def _command(shards, workdir, **overrides):
    fields = TINY | {"data.path": shards} | {name.replace("__", "."): value for name, value in overrides.items()}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    script = [sys.executable, "-m", "usfmae_jax.finetune", "--config=configs/finetune.py:folder"]
    return [*script, f"--workdir={workdir}", *flags]


def _run(shards, workdir, **overrides):
    command = _command(shards, workdir, **overrides)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("door")
    done = _run(shards, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def _tested(workdir):
    return {member.name: (member / "predictions.csv").read_text() for member in (workdir / "members").iterdir()}


def test_a_run_says_what_a_person_wants_to_know(undisturbed):
    workdir, done = undisturbed
    for expected in (
        "data: 48 frames of 24 patients: 24 0, 24 1",
        "split: cross-validation by patient",
        "members: 4, of which 4 are to be trained",
        "2 members at a time",
        "parameters",
        "compiling the training step took",
        "fold-2-seed-1 (4/4)",
        "best validation auroc",
        "report.html",
    ):
        assert expected in done.stderr
    assert "AUROC" in done.stdout
    assert set(_tested(workdir)) == {"fold-1", "fold-2", "fold-1-seed-1", "fold-2-seed-1"}


def test_no_absolute_path_leaks_into_what_a_run_leaves(undisturbed, shards):
    workdir, _ = undisturbed
    files = [file for file in workdir.rglob("*") if file.is_file()]
    assert len(files) > 30
    for file in files:
        for path in (shards, workdir, os.path.expanduser("~")):
            assert str(path).encode() not in file.read_bytes(), file


@pytest.mark.slow  # the same in one process: tests/finetuning/test_loop.py
def test_sigterm_saves_exits_75_and_resumes_bitwise(undisturbed, shards, tmp_path):
    process = subprocess.Popen(_command(shards, tmp_path), env=environment(), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "fold-1: best validation" in line:  # between two members
            break
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "the same command continues it" in text
    assert _run(shards, tmp_path).returncode == 0
    assert _tested(tmp_path) == _tested(undisturbed[0])


@pytest.mark.slow
def test_members_trained_side_by_side_are_those_trained_one_after_another(undisturbed, shards, tmp_path):
    done = _run(shards, tmp_path, parallel=1)
    assert done.returncode == 0, done.stderr
    assert _tested(tmp_path).keys() == _tested(undisturbed[0]).keys()
    for name in _tested(tmp_path):
        one, two = (
            predictions.read(run / "members" / name, predictions.ClassPredictions) for run in (undisturbed[0], tmp_path)
        )
        np.testing.assert_allclose(two.probabilities, one.probabilities, atol=1e-3)


def test_the_door_exits_2_with_one_sentence(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", _command(shards, tmp_path, split__folds=40, parallel=0)[2:])
    with pytest.raises(SystemExit) as end:
        door.run()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: config.split.folds=40")
    assert len(said.splitlines()) == 1


def test_help_names_the_variants_and_fields():
    command = [sys.executable, "-m", "usfmae_jax.finetune", "--config=finetune", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for expected in (":gist514", "--config.mode='full'", "--config.regularization.mixup=0.0", "--workdir"):
        assert expected in done.stdout
