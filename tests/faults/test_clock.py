"""A clock that is set back changes nothing of what a run or a build leaves."""

import time

import pytest

from data_prep import build
from tests.data_prep.builds import content
from usfmae_jax import cli
from usfmae_jax.interop.model import open_model
from usfmae_jax.pretraining.loop import pretrain
from usfmae_jax.training import monitor


@pytest.fixture
def set_back(monkeypatch):
    """From when it is called, each look at the clock finds it an hour earlier."""

    def start():
        wall = [time.time()]

        def earlier():
            wall[0] -= 3600
            return wall[0]

        for name in ("time.time", "tqdm.std.time"):
            monkeypatch.setattr(name, earlier)
        monkeypatch.setattr("time.time_ns", lambda: int(earlier() * 1e9))

    return start


@pytest.mark.slow
def test_a_run_whose_clock_is_set_back_goes_on_bitwise(config, tmp_path, monkeypatch, set_back, capfd):
    config.train.steps, config.checkpoint.every = 6, 2
    assert pretrain(config, str(tmp_path / "undisturbed"))
    set_back()
    update = monitor.Monitor.update

    def ended(self, number, metrics):
        update(self, number, metrics)
        if number == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(monitor.Monitor, "update", ended)
        with cli.alone_in(str(tmp_path / "run")), pytest.raises(KeyboardInterrupt):
            pretrain(config, str(tmp_path / "run"))
    with cli.alone_in(str(tmp_path / "run")):
        assert pretrain(config, str(tmp_path / "run"))
    assert "resuming after step 4" in capfd.readouterr().err
    ends = [open_model(str(tmp_path / name)).fingerprint for name in ("run", "undisturbed")]
    assert ends[0] == ends[1]


def test_a_build_whose_clock_is_set_back_is_the_same(tmp_path, set_back):
    flags = ["--dataset=phantom", "--patients=4", "--frames=1", "--image_size=32", "--workers=1"]
    assert build.main([*flags, f"--output={tmp_path}/one"]) == 0
    set_back()
    assert build.main([*flags, f"--output={tmp_path}/other"]) == 0
    assert content(tmp_path / "one") == content(tmp_path / "other")
