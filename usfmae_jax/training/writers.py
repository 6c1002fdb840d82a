"""Outputs for a run's numbers and pictures besides its own log: TensorBoard event files, Weights & Biases, MLflow."""

import contextlib
import importlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import cv2
import filelock
import jax
import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from usfmae_jax import files
from usfmae_jax.data.records import matches
from usfmae_jax.errors import InputError, install

#: Packages needed by the optional trackers.
_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


class Writer(Protocol):
    """One output for a run's numbers and pictures. Steps come in order; a resumed run continues the same record."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by name."""
        ...

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Adds a uint8 `[H, W, 3]` picture."""
        ...

    def close(self, failed: bool) -> None:
        """Writes what is pending and closes; `failed` means that the run ended with an error."""
        ...


def check(log: Mapping[str, Any], workdir: str) -> None:
    """Raises InputError if a requested tracker cannot be used.

    Args:
      log: `config.log`, whose fields `wandb` and `mlflow` are "", "offline" or "online".
      workdir: of the run.
    """
    for name, packages in _PACKAGES.items():
        if log[name] not in ("", "offline", "online"):
            raise InputError(f"config.log.{name}={log[name]!r} must be 'offline', 'online' or '' for none")
        if log[name] == "offline" and "://" in workdir:
            raise InputError(f"config.log.{name}=offline writes into a folder, which --workdir={workdir} is not")
        if name == "mlflow" and log[name] == "offline" and "?" in os.path.abspath(workdir):
            raise InputError(f"config.log.mlflow=offline cannot write into {workdir}: a ? in a path ends it there")
        if log[name]:
            try:
                for package in packages:
                    importlib.import_module(package)
            except ImportError as error:
                raise InputError(
                    f"config.log.{name} needs a package that is not installed ({error.name or package}): "
                    f"{install('tracking')}"
                ) from error


def open_writers(
    log: Mapping[str, Any], folder: str, first_step: int, settings: Mapping[str, Any], workdir: str = ""
) -> Sequence[Writer]:
    """Opens the writers that the config requests; none on processes other than the first.

    Args:
      log: `config.log`.
      folder: of the model being trained; stores the ids under which trackers know it.
      first_step: number of steps completed before this start.
      settings: of the run, as artefacts may show them.
      workdir: of the run, if several models are trained in it.

    Raises:
      InputError: a tracker cannot be opened.
    """
    if jax.process_index():
        return ()
    top = workdir or folder
    name = "/".join(filter(None, (epath.Path(top).name, epath.Path(folder).name if workdir else "")))
    found: list[Writer] = [EventFile(epath.Path(folder) / "tensorboard", first_step)] if log["tensorboard"] else []
    for field, make in (("wandb", Wandb), ("mlflow", Mlflow)):
        if log[field]:
            place = epath.Path(folder) / f"{field}_id"  # a random id: a name would reveal what the run is about
            kept = place.read_bytes().decode(errors="replace").strip() if place.exists() else ""
            known = kept if re.fullmatch(r"[\w-]{1,128}", kept, re.ASCII) else ""  # a damaged id is ignored
            writer = make(top, name, known, settings, online=log[field] == "online")
            files.write(place, writer.id + "\n")
            found.append(writer)
    return found


class EventFile:
    """An event file for TensorBoard.

    Written in the loop's own thread: the background thread of tensorboardX's writer dies silently when the disk is
    full, and the loop then waits for it forever. The file's name does not contain the host's name.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in order of name, which must be that of the starts even if the clock was set back.
        stamps = [path.name.split(".")[3] for path in matches(folder, "events.out.tfevents.*")]
        stamp = max([time.time_ns() // 1000, *(int(one) + 1 for one in stamps if one.isdecimal())])
        self._file = RecordWriter(os.fspath(folder / f"events.out.tfevents.{stamp}.usfmae_jax"))
        self._flushed = time.monotonic()
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        # Hides what a killed run wrote beyond its last checkpoint.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=first_step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        # One message for all: every 10,000 messages, protobuf returns the process's free memory to the system.
        event = event_pb2.Event(step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=float(value))
        self._add(event)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `Writer`."""
        self._add(event_pb2.Event(step=step, summary=summary.image(name, picture, dataformats="HWC")))

    def _add(self, event: Any) -> None:
        self._write(event)
        if time.monotonic() - self._flushed > 30:
            self._file.flush()
            self._flushed = time.monotonic()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())

    def close(self, failed: bool) -> None:
        """See `Writer`."""
        self._file.close()


class Wandb:
    """A Weights & Biases run: on its server, or offline in `<workdir>/wandb/` for `wandb sync`.

    The settings keep it from recording the host, the user, the program and its Git repository, as it does by default.

    Attributes:
      id: of the run, under which a resumed run continues.
    """

    def __init__(self, workdir: str, name: str, known: str, settings: Mapping[str, Any], *, online: bool):
        import wandb

        self.id, self._wandb = known or uuid.uuid4().hex, wandb
        os.makedirs(workdir, exist_ok=True)
        how = wandb.Settings(
            mode="online" if online else "offline",
            project=os.environ.get("WANDB_PROJECT", "usfmae_jax"),
            root_dir=os.path.abspath(workdir),
            run_id=self.id,
            run_name=name,
            resume="allow",
            console="off",
            silent=True,
            symlink=False,
            host="",
            program="",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(config=dict(settings), settings=how)
        except wandb.errors.Error as error:
            said = (str(error).splitlines() or [""])[0]
            raise InputError(f"config.log.wandb: {said}; try wandb login, or --config.log.wandb=offline") from error
        self._logs = os.path.join(os.path.dirname(self._run.dir), "logs")  # they contain paths
        shutil.rmtree(self._logs, ignore_errors=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `Writer`."""
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self, failed: bool) -> None:
        """See `Writer`."""
        self._run.finish(exit_code=int(failed))
        shutil.rmtree(self._logs, ignore_errors=True)


class Mlflow:
    """An MLflow run: on the server that MLFLOW_TRACKING_URI names, or in `<workdir>/mlflow/`.

    That folder contains no absolute paths, so that it can be moved. To view it, run there
    `mlflow server --backend-store-uri sqlite:///mlflow.db --artifacts-destination artifacts`.

    Attributes:
      id: of the run, under which a resumed run continues.
    """

    def __init__(self, workdir: str, name: str, known: str, settings: Mapping[str, Any], *, online: bool):
        from mlflow import entities, exceptions, tracking

        self._metric, self._error = entities.Metric, exceptions.MlflowException
        self._artifacts: str | None = None
        self._lock: contextlib.AbstractContextManager = contextlib.nullcontext()
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if online and not uri:
            raise InputError("config.log.mlflow=online needs a server: set MLFLOW_TRACKING_URI, or say offline")
        if not online:
            folder = os.path.join(os.path.abspath(workdir), "mlflow")
            self._artifacts = os.path.join(folder, "artifacts")
            os.makedirs(self._artifacts, exist_ok=True)
            # Members trained in parallel share the database, and two could create its tables at the same time.
            self._lock = filelock.FileLock(os.path.join(folder, ".lock"))
            uri = f"sqlite:///{folder}/mlflow.db"
            # Otherwise the database would contain the folder in which the run was started.
            os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        try:
            with self._lock:
                self._client = tracking.MlflowClient(tracking_uri=uri)
                experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "usfmae_jax")
                self.id = self._continued(known) or self._new(experiment, name, settings)
        except self._error as error:
            raise InputError(f"config.log.mlflow: {str(error).splitlines()[0]}") from error

    def _continued(self, known: str) -> str:
        """The id, if that run can be continued; "" if it belongs to another server or folder."""
        try:
            if known:
                self._client.update_run(known, status="RUNNING")
            return known
        except self._error as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""

    def _new(self, experiment: str, name: str, settings: Mapping[str, Any]) -> str:
        from mlflow import entities

        found = self._client.get_experiment_by_name(experiment)
        try:
            number = found.experiment_id if found else self._client.create_experiment(experiment)
        except self._error:  # another process was faster
            number = self._client.get_experiment_by_name(experiment).experiment_id
        made = self._client.create_run(number, run_name=name).info.run_id
        for field, value in settings.items():
            said = value if isinstance(value, str) else json.dumps(value)
            self._client.log_batch(made, params=[entities.Param(field, said[:500])])
        return made

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        now = time.time_ns() // 10**6
        metrics = [self._metric(_plain(name), float(value), now, step) for name, value in values.items()]
        self._try(lambda: self._client.log_batch(self.id, metrics=metrics))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `Writer`."""
        self._try(lambda: self._keep(f"{_plain(name)}_{step}.png", picture))

    def _keep(self, file: str, picture: np.ndarray) -> None:
        if self._artifacts is None:
            self._client.log_image(self.id, picture, artifact_file=file)
            return
        # Where a server would put them, which finds artifacts by run.
        number = self._client.get_run(self.id).info.experiment_id
        path = os.path.join(self._artifacts, number, self.id, "artifacts", file)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        cv2.imwrite(path, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def _try(self, action: Any) -> None:
        """Runs an action; if the server fails, a warning is printed and logging stops, not the training."""
        if not self.id:
            return
        try:
            with self._lock:
                action()
        except self._error as error:
            print(f"warning: MLflow gets no more numbers: {str(error).splitlines()[0]}", file=sys.stderr)
            self.id = ""

    def close(self, failed: bool) -> None:
        """See `Writer`."""
        self._try(lambda: self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED"))


def _plain(name: str) -> str:
    """A name with only the characters that MLflow allows."""
    return re.sub(r"[^\w./ -]", "_", name)
