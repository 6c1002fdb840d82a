"""The page of a run in training says how far it is, and stays one file without scripts."""

import json

import numpy as np
import pytest

from tests.html_pages import Reader
from usfmae_jax.pretraining.loop import pretrain
from usfmae_jax.reporting import progress


def _line(step, **more):
    return {"step": step, "loss": 1 / step, "images_per_second": 50.0, "input_wait": 0.02, **more}


PROBE = {f"probe/{name}_auroc{end}": 0.7 for name in ("knn", "logistic") for end in ("", "_low", "_high")}


@pytest.mark.parametrize(
    ("lines", "left", "words"),
    [
        ([], 0.0, ["In training", "0 of 40"]),
        ([_line(1)], 1170.0, ["1 of 40", "20 min"]),
        ([{"step": 0, **PROBE}, _line(1), _line(10, mfu=0.4), {"step": 10, **PROBE}], 20.0,
         ["10 of 40", "0.1000", "0.700", "20 s", "Logistic regression", "40% of the device"]),
        ([_line(1), _line(40)], None, ["Done", "40 of 40"]),
        ([_line(1), _line(20)], None, ["Stopped", "20 of 40"]),
    ],
)  # fmt: skip
def test_it_says_where_the_run_is(tmp_path, lines, left, words):
    picture = np.zeros((20, 30, 3), np.uint8) if lines else None
    warnings = ["a <script>shard</script> is damaged"] if lines else []
    progress.write(str(tmp_path), lines, total=40, seconds_left=left, warnings=warnings, picture=picture)
    page = (tmp_path / "index.html").read_text()
    for word in words:
        assert word in page
    assert f"<h1>{tmp_path.name}: " in page
    assert ('http-equiv="refresh"' in page) == (left is not None)
    assert not Reader(tmp_path / "index.html").all("script")
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_durations_are_words():
    assert [progress.duration(s) for s in (5, 89, 91, 3599, 3601, 90000)] == [
        "5 s", "89 s", "2 min", "1 h 0 min", "1 h 0 min", "25 h 0 min"
    ]  # fmt: skip


def test_a_run_leaves_its_page(config, shards, tmp_path):
    config.train.steps = 4
    config.log.pictures_every = 2
    config.probe.update(every=4, data={"path": shards, "split": ""})
    assert pretrain(config, str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open() if '"loss"' in line][-1]
    assert f"{last['loss']:.4f}" in page
    assert all(word in page for word in ("4 of 4", "data:image/jpeg", "Probe"))
    assert str(tmp_path.parent) not in page
