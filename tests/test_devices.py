"""Fine-tuning, evaluation and embedding say the same of every frame, once, whatever the number of devices."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from tests.helpers import write_shards
from tests.pretraining.runs import environment
from usfmae_jax.interop.model import Model, preprocessing, save_model
from usfmae_jax.models.vit import ViT

ARCHITECTURE = {"image_size": [32, 32], "patch_size": 8, "channels": 1, "width": 32, "depth": 1, "num_heads": 2}

FRAMES = 34  # of 17 patients: neither 3 nor 8 divides the folds
#: Doors after one another in one process, which has so many devices.
DOORS = """
import sys
from usfmae_jax import embed, evaluate, finetune
data, encoder, folder = sys.argv[1:]
split = [f"--config.split.{field}" for field in ("kind=group", "folds=2", "duplicates=false")]
model = [f"--config.model.{field}" for field in ("image_size=32", "patch_size=8", "width=32", "depth=2", "num_heads=2")]
how = [f"--config.{field}" for field in ("train.batch_size=24", "train.steps=3", "stop.every=3.0", "parallel=1")]
small = ["--config.evaluate.bootstrap=20", "--config.evaluate.batch_size=24"]
def run(door, *words):
    sys.argv = [door.__name__, f"--config.data.path={data}", *words]
    try:
        door.run()
    except SystemExit as end:
        assert not end.code, end
run(finetune, "--config=configs/finetune.py:folder", f"--workdir={folder}/tuned", *split, *model, *how, *small)
probe = ["--config=configs/evaluate.py:folder", "--config.bootstrap=20", "--config.batch_size=24"]
run(evaluate, *probe, f"--workdir={folder}/again", f"--config.checkpoint={folder}/tuned")
cache = f"--config.cache={folder}/cache"
run(evaluate, *probe, *split, f"--workdir={folder}/probed", f"--config.checkpoint={encoder}", cache)
assert embed.main([f"--checkpoint={encoder}", f"--data={data}", f"--output={folder}/features.npz"]) == 0
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the doors left with 1, 3 and 8 devices."""
    data, left = tmp_path_factory.mktemp("data"), {}
    write_shards(data, FRAMES)
    encoder = str(tmp_path_factory.mktemp("encoder"))
    params = nnx.to_pure_dict(nnx.state(ViT(**ARCHITECTURE | {"image_size": (32, 32)}, rngs=nnx.Rngs(0)), nnx.Param))
    description = {"model": "vit", "encoder": ARCHITECTURE}
    save_model(encoder, Model({"encoder": params}, description, preprocessing((32, 32), 1, [0.25], [0.2]), []))
    for devices in (1, 3, 8):
        left[devices] = tmp_path_factory.mktemp(f"devices-{devices}")
        words = [sys.executable, "-c", DOORS, str(data), encoder, str(left[devices])]
        done = subprocess.run(words, env=environment(devices), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return left


def predictions(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    said = [name for name in rows[0] if name.startswith("p_") or name.startswith("probability")]
    assert said, rows[0]
    return [row["frame"] + row["video"] for row in rows], np.array(
        [[float(row[name]) for name in said] for row in rows]
    )


@pytest.mark.slow
@pytest.mark.parametrize("door", ["tuned", "again", "probed"])
def test_every_frame_is_tested_once_and_alike_on_1_3_and_8_devices(answers, door):
    frames, expected = predictions(answers[1] / door)
    assert len(frames) == len(set(frames)) == FRAMES
    for devices in (3, 8):
        names, found = predictions(answers[devices] / door)
        assert names == frames
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_every_frame_is_embedded_once_and_alike_on_1_3_and_8_devices(answers):
    one, *others = (np.load(answers[devices] / "features.npz") for devices in (1, 3, 8))
    assert len(set(one["video"])) == FRAMES
    for other in others:
        assert other["video"].tolist() == one["video"].tolist()
        np.testing.assert_allclose(other["features"], one["features"], atol=1e-6)
