"""Jobs of several processes on this machine compute what one does, say it once, and end together."""

import shutil
import signal
import sys
import time

import numpy as np
import pytest

from tests.faults.processes import Job, finish, free_port
from tests.helpers import write_shards
from tests.pretraining.runs import command, losses, losses_or_none
from usfmae_jax.evaluation import predictions
from usfmae_jax.interop.model import flatten, open_model
from usfmae_jax.training import lock

#: Wide enough for arrays that FSDP splits, see `layers.MIN_SPLIT_SIZE`.
WIDE = {"model__width": 64}
MODEL = ("image_size=32", "patch_size=8", "width=64", "depth=2", "num_heads=2")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Shards three of whose 48 records cannot be decoded."""
    folder = tmp_path_factory.mktemp("damaged")
    write_shards(folder, 48, damaged=(5, 17, 30))
    return str(folder)


def _pretrain(shards, workdir, **overrides):
    return command(shards, workdir, **(WIDE | {"data__max_damaged": 0.1} | overrides))


@pytest.fixture(scope="module")
def alone(damaged, tmp_path_factory):
    """What one process left, and what it said."""
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, finish(_pretrain(damaged, workdir), 1, workdir.parent / "alone-logs").said(0)


def _door(name, shards, *fields):
    words = [sys.executable, "-m", f"usfmae_jax.{name}", f"--config=configs/{name}.py:folder"]
    fields = (f"data.path={shards}", "split.folds=2", "split.duplicates=False", *fields)
    return [*words, *(f"--config.{field}" for field in fields)]


def _named(text):
    return {line.rpartition(" of ")[0] for line in text.splitlines() if line.startswith("damaged record skipped")}


def _assert_as_one(workdir, one):
    """Losses and parameters are those of one process, but for the order in which numbers are added."""
    found, expected = losses(workdir), losses(one)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
    ours, theirs = (flatten(open_model(str(run / "encoder")).params) for run in (workdir, one))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-3, err_msg=name)


def _assert_said_once(job, workdir):
    """Only the first process says and writes anything."""
    assert "compiling the training step took" in job.said(0)
    for number in range(1, len(job.processes)):
        assert not job.said(number)
        assert not job.printed(number)
    assert len(list((workdir / "tensorboard").iterdir())) == 1


def test_two_processes_compute_what_one_does(alone, damaged, tmp_path):
    workdir = tmp_path / "run"
    job = finish(_pretrain(damaged, workdir, mesh__fsdp=2), 2, tmp_path / "logs", devices=2)
    assert "4 devices as data=2 x fsdp=2, 2 processes" in job.said(0)
    _assert_as_one(workdir, alone[0])
    _assert_said_once(job, workdir)
    assert _named(job.said(0)) == _named(alone[1])  # whichever process met them
    assert len(_named(alone[1])) == 3


@pytest.mark.slow
def test_four_processes_compute_what_one_does_and_their_checkpoint_opens_with_one(alone, damaged, tmp_path):
    workdir = tmp_path / "run"
    job = finish(_pretrain(damaged, workdir, mesh__fsdp=4), 4, tmp_path / "logs")
    assert "4 devices as data=1 x fsdp=4, 4 processes" in job.said(0)
    _assert_as_one(workdir, alone[0])
    _assert_said_once(job, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    assert "resuming after step 9" in finish(_pretrain(damaged, workdir), 1, tmp_path / "one").said(0)
    _assert_as_one(workdir, alone[0])


@pytest.mark.slow
def test_a_checkpoint_of_one_process_opens_with_four(alone, damaged, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(alone[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    job = finish(_pretrain(damaged, workdir), 4, tmp_path / "logs")  # data parallel
    assert "resuming after step 9" in job.said(0)
    _assert_as_one(workdir, alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_others_with_a_reason_and_the_job_resumes(shards, tmp_path, killed):
    workdir = tmp_path / "run"
    words = command(shards, workdir, train__steps=60)
    job = Job(words, 2, tmp_path / "logs")
    job.reach(lambda: any(path.name.isdecimal() for path in workdir.glob("checkpoints/*")))
    job.processes[killed].send_signal(signal.SIGKILL)
    began, other = time.monotonic(), 1 - killed
    codes = job.wait(60)
    assert time.monotonic() - began < 60
    assert codes[killed] == -signal.SIGKILL
    assert codes[other] in (1, -signal.SIGABRT)  # JAX's own service aborts
    reasons = ("another process of this job has ended", "another task died")
    assert any(reason in job.said(other) for reason in reasons), job.said(other)
    assert "resuming after step" in finish(words, 1, tmp_path / "again").said(0)
    assert sorted(losses(workdir)) == list(range(1, 61))


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(shards, tmp_path):
    workdir = tmp_path / "run"
    words = command(shards, workdir, train__steps=100_000, checkpoint__every=100_000, mesh__fsdp=2)
    job = Job(words, 2, tmp_path / "logs", devices=2)
    job.reach(lambda: max(losses_or_none(workdir)) >= 2)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [75, 75], job.said(0) + job.said(1)
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    assert f"stopped at step {checkpoint.name} of 100000" in job.said(0)


@pytest.mark.slow
def test_a_job_whose_first_process_is_refused_ends_with_its_sentence(shards, tmp_path):
    with lock.hold(str(tmp_path / "run")):
        job = Job(command(shards, tmp_path / "run"), 2, tmp_path / "logs")
        assert job.wait(120) == [2, 2], job.said(0) + job.said(1)
    assert job.said(0).startswith("error: another run is at work in --workdir=")
    assert job.said(1) == "error: process 0 of this job has stopped; see what it says\n"


@pytest.mark.slow
def test_processes_train_and_test_the_members_that_one_does(shards, tmp_path):
    fields = [f"model.{field}" for field in MODEL]
    fields += ["train.batch_size=16", "train.steps=6", "log.every=1", "stop.every=3.2", "evaluate.bootstrap=20"]
    door = _door("finetune", shards, *fields)
    finish([*door, f"--workdir={tmp_path / 'one'}", "--config.parallel=1"], 1, tmp_path / "logs-1")
    job = finish([*door, f"--workdir={tmp_path / 'four'}", "--config.mesh.fsdp=2"], 4, tmp_path / "logs-4")
    one, four = (predictions.read(tmp_path / run, predictions.ClassPredictions) for run in ("one", "four"))
    assert four.frame_key.tolist() == one.frame_key.tolist()
    np.testing.assert_allclose(four.probabilities, one.probabilities, atol=1e-3)
    for number in (1, 2, 3):
        assert not job.said(number) + job.printed(number)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_probe_as_one_does(alone, shards, tmp_path, count):
    door = _door("evaluate", shards, "bootstrap=20", f"checkpoint={alone[0]}")
    for run, processes in (("one", 1), ("several", count)):
        words = [*door, f"--workdir={tmp_path / run}", f"--config.cache={tmp_path / run / 'cache'}"]
        job = finish(words, processes, tmp_path / f"logs-{run}")
    one, several = (predictions.read(tmp_path / run, predictions.ClassPredictions) for run in ("one", "several"))
    assert len(set(several.frame_key.tolist())) == len(several.frame_key) == 48  # none dropped, none doubled
    assert several.frame_key.tolist() == one.frame_key.tolist()
    np.testing.assert_allclose(several.probabilities, one.probabilities, atol=1e-4)
    assert "AUROC" in job.printed(0)
    for number in range(1, count):
        assert not job.said(number) + job.printed(number)


@pytest.mark.slow
def test_slurm_tells_the_processes_who_they_are(tmp_path):
    """The variables that `srun --ntasks=2` sets, and JAX reads, for two tasks on a machine of this name."""
    script = """if True:
        import sys
        import jax
        import types
        from usfmae_jax import cli
        cli.start(types.SimpleNamespace(coordinator="", num_processes=0, process_id=-1))
        print(jax.process_index(), jax.process_count(), file=sys.stderr)
    """

    def slurm(number):
        shared = {"SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
        return shared | {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}

    job = free_port() % 2**12  # JAX's port follows from the job's number
    started = Job([sys.executable, "-c", script], 2, tmp_path, env=slurm)
    assert started.wait(120) == [0, 0], started.said(0) + started.said(1)
    assert [started.said(number) for number in range(2)] == ["0 2\n", "1 2\n"]
