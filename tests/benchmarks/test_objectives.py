"""The comparison of objectives: its table, and that it goes on where it ended."""

import json

import pytest

from benchmarks import objectives
from configs.pretrain import get_config
from data_prep import build
from usfmae_jax.errors import DONE

SMALL = (
    "small model.image_size=32 model.width=32 model.depth=1 model.num_heads=2 model.decoder_width=16 "
    "model.decoder_depth=1 model.decoder_num_heads=2 train.batch_size=8"
)


def _line(setting, seed, f1, **more):
    metrics = {"f1_macro": {"value": f1, "ci95": [f1 - 0.02, f1 + 0.04]}, "auroc": {"value": f1 + 0.1, "ci95": None}}
    return {"setting": setting, "seed": seed, "steps": 100, "probes": {"set logistic": metrics}} | more


def test_the_table_has_means_ranges_and_differences_of_the_same_seed():
    lines = [
        {"setting": "mae", "seed": None, "trial": True, "images_per_second": 41.7, "steps": 100},
        _line("mae", 0, 0.60),
        _line("mae", 1, 0.70),
        _line("cross", 1, 0.75),
        _line("cross", 0, 0.62, steps=120),
        _line("pixels", 0, 0.50, steps=0),
    ]
    head, _, *rows, _, widths = objectives.summary(lines).splitlines()
    assert head == "| setting | seeds | steps | images/s | set logistic, macro-F1 | set logistic, AUROC |"
    assert rows == [
        "| mae | 2 | 100 | 42 | 65.0 (60.0 to 70.0) | 75.0 (70.0 to 80.0) |",
        "| cross | 2 | 100 to 120 |  | 68.5 (62.0 to 75.0); +3.5 (+2.0 to +5.0) | "
        "78.5 (72.0 to 85.0); +3.5 (+2.0 to +5.0) |",
        "| pixels | 1 | 0 |  | 50.0; -10.0 | 60.0; -10.0 |",
    ]
    assert widths.endswith("set logistic, macro-F1 ± 3.0; set logistic, AUROC -.")
    assert "cross" not in objectives.summary(lines, ["mae"])


def test_every_setting_overrides_fields_that_there_are():
    flat = get_config("tiny")
    for fields in objectives.SETTINGS.values():
        for name in (fields if isinstance(fields, dict) else {}) | objectives.ALWAYS:
            *groups, last = name.split(".")
            group = flat
            for one in groups:
                group = group[one]
            assert last in group, name


def test_unknown_settings_are_refused(capsys):
    with pytest.raises(SystemExit):
        objectives.arguments(["--output=x", "--settings=mae,nonsense", "--summary"])
    assert "there is no nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--minutes=1", "--variant=demo"])
def test_runs_that_cannot_be_compared_are_kept_in_files_of_their_own(other, tmp_path, capsys):
    output = tmp_path / "lines.jsonl"
    output.write_text(json.dumps(_line("mae", 0, 0.6, minutes=10, variant="tiny")) + "\n")
    asked = ["--phantoms=x", "--probe=x", f"--output={output}"]
    objectives.arguments(asked)
    with pytest.raises(SystemExit):
        objectives.arguments([*asked, other])
    assert f"has runs of another {other.partition('=')[0]}: name another file" in capsys.readouterr().err


@pytest.mark.slow
def test_it_trains_probes_and_passes_over_what_is_there(tmp_path, capsys):
    made = ["--dataset=phantom", "--patients=24", "--frames=1", "--image_size=32", "--workers=1"]
    assert build.main([*made, f"--output={tmp_path / 'data'}"]) == DONE
    data, output = tmp_path / "data" / "phantom", tmp_path / "lines.jsonl"
    asked = [f"--phantoms={data}", f"--probe={data}", f"--output={output}", f"--work={tmp_path / 'work'}"]
    asked += ["--minutes=0.002", "--trial=2,3", "--seeds=0", f"--add={SMALL}"]
    assert objectives.compare(objectives.arguments([*asked, "--settings=wrong,small", "--add=wrong seed=x"])) == 1
    assert "wrong, seed None" in capsys.readouterr().err
    trial, run = map(json.loads, output.read_text().splitlines())
    assert trial["steps"] == run["steps"] >= 1
    assert set(run["probes"]) == {"phantom logistic", "phantom knn"}
    assert 0 <= run["probes"]["phantom knn"]["f1_macro"]["value"] <= 1
    assert objectives.compare(objectives.arguments([*asked, "--settings=small"])) == 0
    assert len(output.read_text().splitlines()) == 2
    assert not capsys.readouterr().err
    for _ in range(2):  # the probe that is asked for later; once
        assert objectives.compare(objectives.arguments([*asked, "--settings=small", "--attentive"])) == 0
    *_, late = lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert (len(lines), late["seed"], set(late["probes"])) == (3, 0, {"phantom attentive"})
    assert "| small | 1 |" in objectives.summary(lines)
    assert "phantom attentive, AUROC" in objectives.summary(lines)
    with pytest.raises(SystemExit):
        objectives.arguments([*asked, "--minutes=1"])
