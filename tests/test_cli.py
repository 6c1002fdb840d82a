"""The command line: quick help, and errors that name the nearest right thing."""

import subprocess
import sys

import pytest

from usfmae_jax import cli
from usfmae_jax.errors import InputError

CONFIG = "--config=configs/pretrain.py"


def _parse(*argv):
    return cli.parse(["main", *argv], "doc", "configs/pretrain.py")


def test_overrides_reach_the_config():
    values = _parse(
        f"{CONFIG}:tiny",
        "--config.data.weights=(0.7, 0.3)",
        "--config.mask.fan_aware",
        "--config.train.batch_size=32",
        "--config.augment.crop_scale=(0.5,1.0)",
        "--workdir=w",
    )
    assert values.config.train.batch_size == 32
    assert tuple(values.config.augment.crop_scale) == (0.5, 1.0)
    assert values.config.model.width == 192
    assert values.config.data.weights == (0.7, 0.3)
    assert values.config.mask.fan_aware
    assert values.workdir == "w"


@pytest.mark.parametrize(("value", "size"), [("112", (112, 112)), ("(112,160)", (112, 160)), ("112,160", (112, 160))])
def test_images_are_square_or_not(value, size):
    from usfmae_jax.training.checks import square

    assert square(_parse(f"{CONFIG}:tiny", f"--config.model.image_size={value}").config.model.image_size) == size


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing; try --config=configs/pretrain.py"),
        (["--config=nowhere.py"], "'nowhere.py' does not exist"),
        ([f"{CONFIG}:dmeo"], "no variant 'dmeo'; nearest are demo"),
        ([f"{CONFIG}:zzz"], "no variant 'zzz'; valid are base, paper, demo, tiny, small, large, huge"),
        ([CONFIG, "--config.optimizer.learning_rat=1"], "nearest are config.optimizer.learning_rate"),
        ([CONFIG, "--config.batch_size=1"], "config.train.batch_size"),
        ([CONFIG, "--config.train.batch_size=many"], "config.train.batch_size=many"),
        ([CONFIG, "--wrkdir=x"], "Did you mean: workdir"),
        ([CONFIG, "stray"], "'stray' is not understood"),
        ([CONFIG, "--noconfig.model.scam"], "nearest are config.model.scan"),
    ],
)
def test_mistakes_are_answered_with_what_to_type(argv, message):
    with pytest.raises(InputError) as error:
        _parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("configs/pretrain.py:tiny", "runs/pretrain-tiny"), ("configs/pretrain.py", "runs/pretrain-base")],
)
def test_the_workdir_is_named_after_the_config(value, expected):
    assert cli.default_workdir(value) == expected


def test_the_config_may_be_two_words_and_stand_behind_what_it_is_overridden_with():
    values = _parse("--config.train.batch_size=32", "--noconfig.model.scan", "--config", "configs/pretrain.py:tiny")
    assert values.config.train.batch_size == 32
    assert values.config.model.width == 192
    assert not values.config.model.scan
    assert values["config"].config_filename == "configs/pretrain.py:tiny"


def test_what_was_typed_is_shown_without_where_it_was(monkeypatch):
    monkeypatch.setattr(cli.sys, "argv", ["main", "--config", "/home/me/a.py:tiny", "--config.data.path=/data/b,c/d"])
    assert cli.command("door") == "python -m door --config a.py:tiny --config.data.path=b,c/d"


def test_help_shows_the_config_and_its_fields_without_importing_jax():
    script = (
        "import sys; sys.argv[1:] = ['--help']; import runpy; runpy.run_module('usfmae_jax.main', run_name='__main__')"
    )
    code = f"try:\n  {script}\nexcept SystemExit as e:\n  assert e.code == 0 and 'jax' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for text in ("--workdir", "--config.mask.ratio=0.75", ":demo", "continue an interrupted run"):
        assert text in shown.stdout


def test_a_mistake_exits_2_without_a_traceback():
    done = subprocess.run([sys.executable, "-m", "usfmae_jax.main", f"{CONFIG}:dmeo"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
