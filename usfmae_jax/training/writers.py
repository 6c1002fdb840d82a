"""Where numbers and pictures of a run go beside its own log: TensorBoard's event files, Weights & Biases, MLflow."""

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
from usfmae_jax.errors import InputError

#: What trackers that are not part of the core need.
_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


class Writer(Protocol):
    """One place that a run is reported to. Steps come in order; a resumed run goes on in the same place."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by name."""
        ...

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Adds a uint8 `[H, W, 3]` picture."""
        ...

    def close(self, failed: bool) -> None:
        """Writes what is left; `failed` says that an error ends the run."""
        ...


def check(log: Mapping[str, Any], workdir: str) -> None:
    """Raises InputError if a tracker that is asked for cannot be used.

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
                    f"config.log.{name} needs a package that is not installed ({error.name or package}); install it "
                    "with pip install 'usfmae_jax[tracking]', or pip install -r requirements-tracking.txt in a checkout"
                ) from error


def open_writers(
    log: Mapping[str, Any], folder: str, first_step: int, settings: Mapping[str, Any], workdir: str = ""
) -> Sequence[Writer]:
    """The places that a run is reported to, none on other processes than the first.

    Args:
      log: `config.log`.
      folder: of what is trained; keeps the ids under which trackers know it.
      first_step: finished before this start.
      settings: of the run, as artefacts may show them.
      workdir: of the run, where several are trained in it.

    Raises:
      InputError: a tracker refuses.
    """
    if jax.process_index():
        return ()
    top = workdir or folder
    name = "/".join(filter(None, (epath.Path(top).name, epath.Path(folder).name if workdir else "")))
    found: list[Writer] = [EventFile(epath.Path(folder) / "tensorboard", first_step)] if log["tensorboard"] else []
    for field, make in (("wandb", Wandb), ("mlflow", Mlflow)):
        if log[field]:
            place = epath.Path(folder) / f"{field}_id"  # a random one: a name would tell what it is a run of
            kept = place.read_bytes().decode(errors="replace").strip() if place.exists() else ""
            known = kept if re.fullmatch(r"[\w-]{1,128}", kept, re.ASCII) else ""  # a damaged one is none
            writer = make(top, name, known, settings, online=log[field] == "online")
            files.write(place, writer.id + "\n")
            found.append(writer)
    return found


class EventFile:
    """An event file for TensorBoard.

    Written by the loop itself: the thread that tensorboardX's own writer has for it dies of a full disk without a word
    to the loop, which then waits for it for ever; and the host's name is left out of the file's.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads in the order of names, which has to be that of the starts though the clock may be set back.
        stamps = [path.name.split(".")[3] for path in matches(folder, "events.out.tfevents.*")]
        stamp = max([time.time_ns() // 1000, *(int(one) + 1 for one in stamps if one.isdecimal())])
        self._file = RecordWriter(os.fspath(folder / f"events.out.tfevents.{stamp}.usfmae_jax"))
        self._flushed = time.monotonic()
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        # What a killed run wrote beyond its last checkpoint is not shown.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=first_step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        # One message for all: at every 10,000th, protobuf gives the free memory of the process back to the system.
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
    """A run of Weights & Biases: on its server, or offline in `<workdir>/wandb/` for `wandb sync`.

    By itself it would tell the host, the user, the program and its Git repository.

    Attributes:
      id: under which a resumed run goes on.
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
        self._logs = os.path.join(os.path.dirname(self._run.dir), "logs")  # which name paths
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
    """A run of MLflow: on the server that MLFLOW_TRACKING_URI names, or in `<workdir>/mlflow/`.

    What is in that folder names no path, so that it can be moved; in it,
    `mlflow server --backend-store-uri sqlite:///mlflow.db --artifacts-destination artifacts` shows it.

    Attributes:
      id: under which a resumed run goes on.
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
            # Members that are trained side by side share the database: two would make its tables at the same time.
            self._lock = filelock.FileLock(os.path.join(folder, ".lock"))
            uri = f"sqlite:///{folder}/mlflow.db"
            # Else the database names the folder that the run was started in.
            os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        try:
            with self._lock:
                self._client = tracking.MlflowClient(tracking_uri=uri)
                experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "usfmae_jax")
                self.id = self._continued(known) or self._new(experiment, name, settings)
        except self._error as error:
            raise InputError(f"config.log.mlflow: {str(error).splitlines()[0]}") from error

    def _continued(self, known: str) -> str:
        """The id, if a run goes on under it; "" where it is of another server or folder."""
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
        except self._error:  # another process was quicker
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
        # As a server would: it finds them by the run.
        number = self._client.get_run(self.id).info.experiment_id
        path = os.path.join(self._artifacts, number, self.id, "artifacts", file)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        cv2.imwrite(path, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def _try(self, action: Any) -> None:
        """A server that is away costs its numbers, not the training."""
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
    """A name of letters that MLflow allows."""
    return re.sub(r"[^\w./ -]", "_", name)
