"""A new task is one file and one entry: it is fine-tuned, resumed and scored by a loop that does not know it.

The task here measures how bright a frame is, on a scale that the label gives.
"""

import dataclasses
import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs.finetune import get_config
from tests.helpers import stopping
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.intervals import bootstrap_chunks
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.finetuning import tasks
from usfmae_jax.finetuning.loop import finetune
from usfmae_jax.interop.model import open_model
from usfmae_jax.reporting import run
from usfmae_jax.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(Predictions):
    truth: np.ndarray
    value: np.ndarray


@dataclasses.dataclass(frozen=True)
class Brightness(Task):
    outputs = ("brightness",)
    metrics = ("mae",)
    losses = frozenset({"mae"})
    tie = ""
    predictions = Measured

    def targets(self, table, rows):
        return {"value": (10 + 5 * table.label[rows]).astype(np.float32)}

    def loss(self, model, batch, rng):
        found = model(batch["image"], rng=rng, train=True)[:, 0]
        return jnp.abs(found - batch["value"] / 10).sum(), jnp.float32(len(found))

    def predict(self, model, images):
        return {"value": 10 * model(images)[:, 0]}

    def score(self, table, rows, predicted):
        return {"mae": float(np.abs(predicted["value"] - self.targets(table, rows)["value"]).mean())}

    def record(self, ids, table, rows, predicted):
        return Measured(**ids, truth=self.targets(table, rows)["value"], value=predicted["value"])

    def finish(self, workdir, predictions, validation, **found):
        error = np.abs(predictions.value - predictions.truth)
        drawn = [w @ error / w.sum(axis=1) for w in bootstrap_chunks(predictions.patient_key, found["resamples"])]
        interval = np.percentile(np.concatenate(drawn), [2.5, 97.5]).tolist()
        metrics = {"mae": {"value": float(error.mean()), "ci95": interval}}
        results = {"format": 1, "counts": predictions.counts(), "metrics": metrics}
        predictions.write(f"{workdir}/predictions.csv")
        return run.finish(
            workdir,
            results,
            task=found["about"],
            context=found["context"],
            measures={"mae": run.Measure("Mean absolute error")},
            headline=("mae",),
        )


def test_a_new_task_is_fine_tuned_and_scored_through_the_same_loop(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "brightness", lambda config, table: (table, Brightness()))
    config = get_config("folder")
    config.task = "brightness"
    config.data.path = shards
    config.model.update(image_size=(32, 32), patch_size=8, width=32, depth=1, num_heads=2, drop_path=0.0)
    config.split.update(folds=2, duplicates=False)
    config.train.update(batch_size=16, steps=12)
    config.stop.every = 2.0
    with pytest.raises(InputError, match=r"config\.stop\.metric='auroc' must be one of mae"):
        finetune(config, str(tmp_path))
    config.stop.metric = "mae"
    config.evaluate.update(batch_size=16, bootstrap=20)
    with stopping(5):
        assert not finetune(config, str(tmp_path))
    assert finetune(config, str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: results["counts"][name] for name in ("frames", "patients", "folds")} == {
        "frames": 48, "patients": 24, "folds": 2
    }  # fmt: skip
    metric = results["metrics"]["mae"]
    assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
    assert "Mean absolute error" in (tmp_path / "report.html").read_text()
    member = open_model(str(tmp_path / "members" / "fold-1"))
    assert (member.kind, member.description["outputs"]) == ("model", ["brightness"])
    assert (tmp_path / "members" / "fold-2" / "predictions.csv").read_text().startswith("dataset,patient,video,frame,")
    words = (tmp_path / "report.html").read_text().lower()
    assert "benign" not in words
    assert "auroc" not in words


def test_the_task_is_short():
    assert len(inspect.getsource(Measured).splitlines() + inspect.getsource(Brightness).splitlines()) < 60
