"""Runs are reported to trackers that are asked for, continued by a resumed run, and told neither who nor where."""

import json
import multiprocessing
import os
import pathlib
import sqlite3
import sys
import types

import numpy as np
import pytest

from tests.training.test_monitor import _metrics, _monitor
from usfmae_jax.errors import InputError
from usfmae_jax.pretraining.loop import pretrain
from usfmae_jax.training import writers

OFF = {"tensorboard": False, "wandb": "", "mlflow": ""}
PICTURE = np.zeros((8, 8, 3), np.uint8)
SECRETS = ("zqplanteduser", "zqplantedhost", "zqplantedgit")


@pytest.fixture
def wandb(monkeypatch):
    """A module in the place of wandb, which keeps what its runs are told."""
    runs: list[types.SimpleNamespace] = []

    def init(config, settings):
        told: list[tuple] = []
        run = types.SimpleNamespace(config=config, told=told, dir=f"{settings.root_dir}/wandb/files", settings=settings)
        run.log = lambda values, step: told.append((step, values))
        run.finish = lambda exit_code: told.append(("finished", exit_code))
        runs.append(run)
        return run

    module = types.ModuleType("wandb")
    module.Settings, module.init, module.Image = types.SimpleNamespace, init, lambda picture: picture.shape  # type: ignore[attr-defined]
    module.errors = types.SimpleNamespace(Error=RuntimeError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_a_monitor_hands_on_its_numbers_and_pictures_and_closes_what_it_was_given(tmp_path, wandb):
    log = OFF | {"wandb": "offline", "tensorboard": True}
    places = writers.open_writers(log, str(tmp_path / "runs/x"), 0, {"seed": 3})
    with _monitor(tmp_path / "runs/x", writers=places) as report:
        report.update(1, _metrics(2.0))
        report.flush()
        report.write_image(1, "reconstruction", PICTURE)
    (run,) = wandb
    (step, numbers), picture, finished = run.told
    assert (step, numbers["loss"]) == (1, 2.0)
    assert picture == (1, {"reconstruction": (8, 8, 3)})
    assert finished == ("finished", 0)
    assert (run.config, run.settings.run_name, run.settings.mode) == ({"seed": 3}, "x", "offline")
    assert list((tmp_path / "runs/x/tensorboard").iterdir())


def test_a_resumed_run_goes_on_in_the_same_place_and_a_member_has_its_own(tmp_path, wandb):
    for member in ("a", "a", "b"):
        (tmp_path / member).mkdir(exist_ok=True)
        writers.open_writers(OFF | {"wandb": "offline"}, str(tmp_path / member), 0, {}, str(tmp_path))
    first, again, other = (run.settings.run_id for run in wandb)
    assert first == again != other
    assert [run.settings.run_name for run in wandb] == [f"{tmp_path.name}/{member}" for member in "aab"]


def test_a_run_that_fails_is_marked_so(tmp_path, wandb):
    places = writers.open_writers(OFF | {"wandb": "offline"}, str(tmp_path), 0, {})
    with pytest.raises(RuntimeError), _monitor(tmp_path, writers=places):
        raise RuntimeError
    assert wandb[0].told == [("finished", 1)]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_cannot_be_used_is_refused_with_one_sentence_before_data_are_read(
    tmp_path, config, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    config.data.path = "nowhere"
    config.log[name] = "online"
    with pytest.raises(InputError, match=rf"config.log.{name} needs a package .* pip install '.\[tracking\]'"):
        pretrain(config, str(tmp_path / "x"))
    config.log[name] = "yes"
    with pytest.raises(InputError, match=f"config.log.{name}='yes' must be 'offline', 'online' or ''"):
        pretrain(config, str(tmp_path / "x"))
    with pytest.raises(InputError, match="offline writes into a folder"):
        writers.check(OFF | {name: "offline"}, "gs://bucket/x")


def _needs(name):
    for package in writers._PACKAGES[name]:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -r requirements-tracking.txt")


def _resumed(config, folder, monkeypatch, name):
    """The folder of a run that was interrupted and continued, by somebody whose names are planted everywhere."""
    _needs(name)
    for variable in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(variable, SECRETS[0])
    monkeypatch.setenv("HOSTNAME", SECRETS[1])
    monkeypatch.setattr("socket.gethostname", lambda: SECRETS[1])
    monkeypatch.delenv("_MLFLOW_SERVER_ARTIFACT_ROOT", raising=False)
    home = folder / SECRETS[0]
    home.mkdir()
    monkeypatch.chdir(home)
    os.system(f"git init -q . && git remote add origin https://example.org/{SECRETS[2]}")
    config.log.update(**{name: "offline", "pictures_every": 2, "tensorboard": False})
    config.train.steps, config.checkpoint.every = 2, 1
    assert pretrain(config, "runs/x")
    known = (home / f"runs/x/{name}_id").read_text()
    config.train.steps = 4
    return home, known


def _continue(config, home, monkeypatch, name, known):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("usfmae_jax.training.checkpoints.check_resumable", lambda *_: None)  # it has more steps now
        assert pretrain(config, "runs/x")
    assert (home / f"runs/x/{name}_id").read_text() == known
    assert not (home / "runs/x/tensorboard").exists()
    for path in (home / "runs/x").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            host = os.uname().nodename  # of a few letters it is in any picture
            secrets = [*SECRETS, str(home), str(pathlib.Path(__file__).parents[2]), *[host] * (len(host) > 4)]
            for secret in secrets:
                assert secret.encode() not in data, f"{secret} in {path}"


def test_weights_and_biases_is_told_neither_who_nor_where_and_its_run_is_continued(config, tmp_path, monkeypatch):
    home, known = _resumed(config, tmp_path, monkeypatch, "wandb")
    _continue(config, home, monkeypatch, "wandb", known)
    runs = sorted((home / "runs/x/wandb").glob("offline-run-*"))
    assert {path.name.rpartition("-")[2] for path in runs} == {known.strip()}
    assert b"images_per_second" in (runs[0] / f"run-{known.strip()}.wandb").read_bytes()
    assert list((home / "runs/x/wandb").rglob("*.png"))


def test_mlflow_is_told_neither_who_nor_where_and_its_run_is_continued(config, tmp_path, monkeypatch):
    home, known = _resumed(config, tmp_path, monkeypatch, "mlflow")
    _continue(config, home, monkeypatch, "mlflow", known)
    with sqlite3.connect(home / "runs/x/mlflow/mlflow.db") as database:
        assert database.execute("select run_uuid, status from runs").fetchall() == [(known.strip(), "FINISHED")]
        steps = [step for (step,) in database.execute("select step from metrics where key='loss' order by step")]
        assert steps == [1, 2, 3, 4]
        params = dict(database.execute("select key, value from params"))
        assert params["model.image_size"] == json.dumps(list(config.model.image_size))
        ((uri,),) = database.execute("select artifact_uri from runs").fetchall()
    path = home / "runs/x/mlflow/artifacts" / uri.removeprefix("mlflow-artifacts:/")
    assert list(path.glob("*_2.png"))


def _member(folder, name, ready, told):
    place = folder / "members" / name
    place.mkdir(parents=True)
    ready.wait(60)
    try:
        (writer,) = writers.open_writers(OFF | {"mlflow": "offline"}, str(place), 0, {"seed": 3}, str(folder))
        for step in range(1, 11):
            writer.scalars(step, {"loss": float(step), "validation/auroc": float("nan")})
        writer.image(10, "reconstruction", PICTURE)
        writer.close(False)
    finally:
        told.put(name)


def test_members_that_are_trained_side_by_side_share_the_database_of_mlflow(tmp_path):
    _needs("mlflow")
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(3), context.SimpleQueue()
    members = [context.Process(target=_member, args=(tmp_path, name, ready, told)) for name in "abc"]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert [member.exitcode for member in members] == [0, 0, 0]
    with sqlite3.connect(tmp_path / "mlflow/mlflow.db") as database:
        counts = database.execute("select count(*) from metrics where key='loss' group by run_uuid").fetchall()
    assert counts == [(10,)] * 3
    assert len(list((tmp_path / "mlflow/artifacts").rglob("*_10.png"))) == 3


def test_a_run_that_mlflow_does_not_know_is_begun_anew(tmp_path):
    _needs("mlflow")
    (tmp_path / "mlflow_id").write_text("0123456789abcdef0123456789abcdef\n")  # of another server
    (writer,) = writers.open_writers(OFF | {"mlflow": "offline"}, str(tmp_path), 0, {})
    writer.scalars(1, {"loss": 1.0})
    writer.close(False)
    known = (tmp_path / "mlflow_id").read_text().strip()
    with sqlite3.connect(tmp_path / "mlflow/mlflow.db") as database:
        assert database.execute("select run_uuid, status from runs").fetchall() == [(known, "FINISHED")]


def test_pictures_too_are_lost_without_ending_the_run_where_mlflow_fails(tmp_path, capsys):
    _needs("mlflow")
    (writer,) = writers.open_writers(OFF | {"mlflow": "offline"}, str(tmp_path), 0, {})
    with sqlite3.connect(tmp_path / "mlflow/mlflow.db") as database:
        database.execute("delete from params")
        database.execute("delete from runs")
    writer.image(1, "reconstruction", PICTURE)
    writer.image(2, "reconstruction", PICTURE)
    writer.close(False)
    assert capsys.readouterr().err.count("warning: MLflow gets no more numbers") == 1


def test_a_folder_that_the_address_of_a_database_cannot_name_is_refused():
    _needs("mlflow")
    with pytest.raises(InputError, match=r"config\.log\.mlflow=offline cannot write into runs/why\?"):
        writers.check(OFF | {"mlflow": "offline"}, "runs/why?")
