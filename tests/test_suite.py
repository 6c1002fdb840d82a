"""A suite: every encoder on every dataset, one table with paired differences, resumed where it was."""

import json
import re

import numpy as np
import pytest

from configs import suite as configs
from tests.helpers import write_shards
from tests.tasks.test_segmentation import write
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError
from usfmae_jax.interop.model import save_model
from usfmae_jax.probing import build, suite
from usfmae_jax.reporting import suite as reporting


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Frames with labels, and frames with labels and masks."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "labelled").mkdir()
    write_shards(folder / "labelled", count=32)
    return str(folder / "labelled"), write(folder / "masked", dataset="other")


@pytest.fixture
def config(data, tmp_path):
    config = configs.get_config()
    config.data.path = ",".join(data)
    config.suite.checkpoints = ("random", "pixels")
    config.split.update(folds=2, duplicates=False)
    config.update(bootstrap=30, cache=str(tmp_path / "cache"))
    return config


def test_every_encoder_is_tested_on_everything_and_nothing_twice(config, tmp_path, monkeypatch, capsys):
    found = suite.run(config, str(tmp_path / "run"), "the command")
    assert [(row["dataset"], row["kind"]) for row in found["rows"]] == [
        ("made", "classes"), ("other", "classes"), ("other", "masks")
    ]  # fmt: skip
    for row in found["rows"]:
        lead = row["lead"]
        values = [row["metrics"][column][lead]["value"] for column in ("random", "pixels")]
        assert row["differences"]["pixels"]["difference"] == pytest.approx(values[0] - values[1])
    means = found["means"]["classes"]["random"]
    assert means == pytest.approx(sum(r["metrics"]["random"][r["lead"]]["value"] for r in found["rows"][:2]) / 2)
    said = capsys.readouterr().out
    assert "| other (Dice) " in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(word in page for word in ("random is better than pixels in", "Outlines", "the command"))
    assert all(word in page for word in ("random (untrained, size tiny)", "random - this: "))
    links = re.findall('href="([^#"]+)"', page)
    assert len(links) == 6
    assert all((tmp_path / "run" / link).exists() for link in links)
    assert json.loads((tmp_path / "run" / "suite.json").read_text())["columns"] == ["random", "pixels"]
    assert (tmp_path / "run" / "other-masks" / "pixels" / "report.html").exists()
    monkeypatch.setattr(suite, "evaluate", lambda *_: pytest.fail("was there already"))
    again = suite.run(config, str(tmp_path / "run"), "the command")
    assert again["rows"] == found["rows"]


def test_what_has_changed_under_the_same_name_is_tested_again(config, data, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    encoder = f"{tmp_path}/x/enc"
    config.suite.update(checkpoints=(encoder,), masks="")

    def save(seed):
        save_model(encoder, build.untrained("tiny", seed))

    save(0)
    config.data.path = data[0]
    run = str(tmp_path / "run")
    first = suite.run(config, run)["rows"][0]["metrics"]
    asked, real = [], suite.evaluate
    monkeypatch.setattr(suite, "evaluate", lambda *given: asked.append(1) or real(*given))
    assert suite.run(config, run)["rows"][0]["metrics"] == first
    assert not asked
    save(1)  # other weights
    assert suite.run(config, run)["rows"][0]["metrics"] != first
    assert len(asked) == 1
    write_shards(tmp_path / "x", count=28)  # other frames, which are called the same
    (tmp_path / "x" / "labelled").mkdir()
    write_shards(tmp_path / "x" / "labelled", count=28)
    config.data.path = str(tmp_path / "x" / "labelled")
    assert suite.run(config, run)["rows"][0]["frames"] == 28
    assert len(asked) == 2


def test_numbers_of_a_table_are_tested_where_a_dataset_has_one(config, data, tmp_path, capsys):
    table = read_table(data[0])
    rng = np.random.default_rng(0)
    rows = zip(table.video.tolist(), table.frame.tolist(), table.label.tolist(), strict=True)
    lines = [f"{video},{frame},{10 * label + rng.normal():.3f}" for video, frame, label in rows]
    (tmp_path / "table.csv").write_text("\n".join(["video,frame,size [mm]", *lines]) + "\n")
    config.suite.update(labels="", masks="", targets=(f"made={tmp_path / 'table.csv'}",))
    config.data.path = data[0]
    (row,) = suite.run(config, str(tmp_path / "run"))["rows"]
    assert (row["dataset"], row["kind"], row["lead"]) == ("made", "numbers", "r2")
    stored = json.loads((tmp_path / "run" / "made-numbers" / "pixels" / "results.json").read_text())
    assert stored["task"]["unit"] == "mm"
    assert stored["metrics"]["mae"]["value"] < 5
    assert not stored["context"]["config"]["of_frame"]  # the size of these pixels is not known
    assert str(tmp_path) not in json.dumps(stored)
    assert (tmp_path / "run" / "made-numbers" / "random" / "report.html").exists()
    assert "## Numbers" in capsys.readouterr().out
    table = config.suite.targets[0]
    for wrong, says in ((f"{table}#nothing", "'nothing' is no column of"), ("made=x.csv", "x.csv")):
        config.suite.targets = (wrong,)
        with pytest.raises(InputError, match=says):  # before anything is computed
            suite.run(config, str(tmp_path / "again"))
    config.suite.targets = (table, "other=x.csv")
    with pytest.raises(InputError, match=r"config\.suite\.targets names 'other', but the data are of made"):
        suite.run(config, str(tmp_path / "again"))
    config.suite.targets = ("x.csv",)
    with pytest.raises(InputError, match="must be DATASET=FILE"):
        suite.run(config, str(tmp_path / "again"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"checkpoints": ()}, r"config\.suite\.checkpoints is missing"),
        ({"checkpoints": ("random", "random")}, "names an encoder twice"),
        ({"checkpoints": ("random:none",)}, "random:none must name one of the sizes"),
        ({"checkpoints": ("nothing/there",)}, "is no folder"),
        ({"labels": "", "masks": "", "numbers": ""}, "there is nothing to test"),
        ({"labels": ""}, "has neither labels of two classes nor masks"),
    ],
)
def test_mistakes_are_one_sentence(config, tmp_path, fields, says):
    config.suite.update(fields)
    with pytest.raises(InputError, match=says):
        suite.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dataset_on_which_a_test_is_not_possible_is_named(config, tmp_path, data, monkeypatch):
    real = suite.evaluate

    def evaluate(single, folder, command):
        if single.protocol == "segmentation":
            raise InputError("config.data.path='/home/somebody/emp': no such masks")
        return real(single, folder, command)

    monkeypatch.setattr(suite, "evaluate", evaluate)
    config.data.path = data[1]
    found = suite.run(config, str(tmp_path / "run"))
    assert found["left_out"] == [{"dataset": "other", "kind": "masks", "why": "config.data.path='emp': no such masks"}]
    assert "no such masks" in (tmp_path / "run" / "report.html").read_text()
    for name in ("suite.json", "suite.md", "report.html"):
        assert "somebody" not in (tmp_path / "run" / name).read_text()


def test_a_warning_names_the_encoders_that_it_is_about():
    assert suite._warnings({"a": ["few patients", "seen", "seen"], "b": ["few patients"]}) == [
        "few patients",
        "a: seen",
    ]
    row = {"warnings": ["few patients", "a: seen"]}
    written = reporting.text({"columns": ["a", "b"], "rows": [row | {"kind": "none"}], "left_out": []})
    assert written == "## Please note\n\n- few patients\n- a: seen"
