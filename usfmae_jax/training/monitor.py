"""Monitoring of a run: progress bar, throughput, logs, profiles; and stop requests from outside."""

import contextlib
import gzip
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from usfmae_jax import files
from usfmae_jax.data.records import Shards
from usfmae_jax.errors import InputError, some
from usfmae_jax.reporting import progress
from usfmae_jax.training.mesh import rows_of_all
from usfmae_jax.training.writers import Writer

#: Published dense bf16 peaks, FLOP/s per JAX device, by substring of `device_kind`; the first match counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "TPU7x": 2307e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
    "TPU v2": 22.5e12,
}

#: All but the last part of an absolute path, as it appears in JSON.
_ABSOLUTE = re.compile(r'(?<=["\s:=(])\\?/(?:[^"\s:/\\]+\\?/)+')


class DivergedError(RuntimeError):
    """Loss or gradient norm is not finite.

    Args:
      message: what happened.
      step: of the update.
    """

    def __init__(self, message: str, step: int = 0):
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> Any:  # it is passed between processes
        return DivergedError, (str(self), self.step)


@contextlib.contextmanager
def naming_records(dataset: Any, sources: Sequence[Shards], workdir: str) -> Iterator[None]:
    """Adds to a `DivergedError` the records in the batch of its step, and lists all of them in `diverged.csv`.

    Args:
      dataset: from `data.pipeline.training_batches`, of this process.
      sources: the shards to which its record numbers refer.
      workdir: where the file is written.
    """
    try:
        yield
    except DivergedError as error:
        rows = rows_of_all(dataset[error.step - 1]["record"], f"diverged/{os.path.basename(workdir)}/{error.step}")
        places = [sources[source].locate(record) for source, record in rows.tolist()]
        found = [f"{os.path.basename(path)},{number}" for path, number in places]
        if jax.process_index() == 0:
            files.write(epath.Path(workdir, "diverged.csv"), "\n".join(["shard,record", *found]) + "\n")
        said = f"{error}, whose batch is in diverged.csv (shard,record: {some(found)})"
        raise DivergedError(said, error.step) from error


def peak_flops(device: jax.Device) -> float | None:
    """bf16 peak of a device in FLOP/s; None if unknown (any CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device.device_kind), None)


class Monitor:
    """Follows a training loop: writes `metrics.jsonl`, shows a progress bar, passes numbers and pictures to `writers`.

    It reports the step before the one just dispatched, so that the device never waits for the log. Rates exclude pauses
    (saving, probing, drawing), which the loop marks with `pause`.

    Args:
      workdir: where the logs are written; lines that a killed run wrote beyond `first_step` are removed.
      total_steps: of the whole run.
      first_step: number of steps completed before this start.
      batch_size: global.
      every: steps between log lines.
      flops_per_image: floating-point operations to train on one image; gives MFU if the device's peak is known.
      skippable: maximum number of steps that may be skipped because their loss or gradient is not finite.
      name: label of the progress bar.
      line: terminal line of the bar, counted down from the cursor, if several runs share a terminal.
      page: keep `index.html` up to date, see `reporting.progress`.
      writers: other outputs for numbers and pictures; they are closed with the monitor.

    Attributes:
      skipped: number of skipped steps; a resumed run restores it.
    """

    def __init__(
        self,
        workdir: str,
        *,
        total_steps: int,
        first_step: int,
        batch_size: int,
        every: int,
        flops_per_image: float,
        skippable: int = 0,
        name: str = "pretrain",
        line: int = 0,
        page: bool = False,
        writers: Sequence[Writer] = (),
    ):
        self._batch_size, self._every, self._flops = batch_size, every, flops_per_image
        self._peak = peak_flops(jax.devices()[0])
        self._skippable, self.skipped = skippable, 0
        self._pending: tuple[int, Any] | None = None
        self._main = jax.process_index() == 0
        self._log = _JsonLines(epath.Path(workdir) / "metrics.jsonl", first_step) if self._main else None
        self._writers = writers
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            desc=name,
            position=line if interactive and line else None,
            smoothing=0.1,
            dynamic_ncols=interactive,
            # A log file needs a line now and then, not one per step.
            mininterval=0.2 if interactive else 30,
            disable=not self._main,
        )
        # tqdm uses the wall clock: if that were set back, the bar would freeze until the time has passed again.
        self._bar._time = time.monotonic
        self._bar.start_t = self._bar.last_print_t = time.monotonic()
        self._losses: list[float] = []
        self._page = _Page(workdir, total_steps, self._log.lines()) if page and self._log else None
        self._restart_window()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        for writer in self._writers:
            writer.close(exception[0] is not None)
        if self._page:
            self._page.close()

    def _restart_window(self) -> None:
        self._start, self._steps, self._waited, self._paused = time.perf_counter(), 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Marks time that the loop spends waiting for the next batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Marks time that is not spent training."""
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self._paused += paused
        if not self._bar.disable:  # shift the bar's clock, so that its ETA excludes pauses too
            self._bar.start_t += paused
            self._bar.last_print_t += paused

    def update(self, step: int, metrics: Any) -> None:
        """Takes the metrics of step `step`, possibly still being computed, and reports those of the previous step.

        Raises:
          DivergedError: the previous step had a non-finite loss or gradient norm, and no more steps may be skipped.
        """
        previous, self._pending = self._pending, (step, metrics)
        if previous:
            self._report(*previous)

    def flush(self) -> dict[str, float]:
        """Waits for the newest step, reports it and returns its metrics; {} if there is nothing to report.

        Raises:
          DivergedError: see `update`.
        """
        previous, self._pending = self._pending, None
        return self._report(*previous) if previous else {}

    def _report(self, step: int, metrics: Any) -> dict[str, float]:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values.pop("skipped", None)  # the loss already shows it
        self._steps += 1
        self._bar.update(1)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                self.skipped += 1
                said = f"{name} is {values[name]} at step {step}"
                if self.skipped > self._skippable:
                    many = f", the last of {self.skipped} such steps" if self._skippable else ""
                    raise DivergedError(said + many, step)
                self.say(f"warning: {said}, which is skipped ({self.skipped} of at most {self._skippable})")
                self.write(step, {"skipped": self.skipped})
                return {}
        self._losses.append(values["loss"])
        if step % self._every == 0 or step in (1, self._bar.total):
            rates = self._rates()
            self.write(step, values | rates)
            shown = {"loss": f"{values['loss']:.4f}", "img/s": f"{rates['images_per_second']:.0f}"}
            shown["wait"] = f"{rates['input_wait']:.0%}"
            if "mfu" in rates:
                shown["mfu"] = f"{rates['mfu']:.0%}"
            self._bar.set_postfix(shown, refresh=False)
            self._restart_window()
        return values

    def _rates(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        images_per_second = self._steps * self._batch_size / elapsed
        per_device = images_per_second / jax.device_count()
        rates = {
            "images_per_second": images_per_second,
            "images_per_second_per_device": per_device,
            "input_wait": min(self._waited / elapsed, 1.0),
        }
        if self._peak:
            rates["mfu"] = per_device * self._flops / self._peak
        return rates

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers to the log and passes them to the writers."""
        if self._log:
            self._log.append({"step": step, **values})
            if self._page:
                self._page.add({"step": step, **values}, self._batch_size)
            for writer in self._writers:
                writer.scalars(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Passes a uint8 `[H, W, 3]` picture to the writers and the page."""
        for writer in self._writers:
            writer.image(step, name, image)
        if self._page:
            self._page.picture = image

    def say(self, text: str) -> None:
        """Prints a line above the bar, on the main process only."""
        if self._main:
            self._bar.write(text, file=sys.stderr)
        if self._page and text.startswith("warning: "):
            self._page.warnings.append(text.removeprefix("warning: "))

    def mean_loss_since_save(self) -> float:
        """Mean loss since the last call, or since the start, to rank checkpoints: less noisy than a single step's.

        Infinite if every step was skipped.
        """
        mean = sum(self._losses) / len(self._losses) if self._losses else math.inf
        self._losses.clear()
        return mean


class Profile:
    """Traces some steps of a loop into `<workdir>/profile/steps-FROM-TO.json.gz`, for https://ui.perfetto.dev.

    The files that JAX writes for TensorBoard reveal the machine's name and folders and are not kept; paths in the trace
    are reduced to their last part. Only process 0 traces.

    Args:
      workdir: of the run.
      steps: the first step, counted from 1, and the number of steps; (0, 0) = none.

    Raises:
      InputError: `steps` is not such a pair.
    """

    def __init__(self, workdir: str, steps: Sequence[int]):
        whole = len(steps) == 2 and all(isinstance(number, int) and number >= 0 for number in steps)
        if not whole or bool(steps[0]) != bool(steps[1]):
            raise InputError(
                f"config.log.profile={tuple(steps)} must be the first step and a number of steps, counted from 1, such "
                "as (10, 3); (0, 0) for none"
            )
        self._workdir, self._steps = workdir, tuple(steps)
        self._first, self._last, self._reached = steps[0], steps[0] + steps[1] - 1, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def between(self, done: int, total: int) -> str:
        """Restricts tracing to the steps from `done` + 1 to `total`; returns a warning if none are left, else ""."""
        asked = self._first <= self._last
        self._first, self._last = max(self._first, done + 1), min(self._last, total)
        if not asked or self._first <= self._last or done >= total:
            return ""
        return f"warning: config.log.profile={self._steps} traces nothing: this start does steps {done + 1} to {total}"

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """To be called before a step and its wait for input."""
        self._reached = step
        if step == self._first <= self._last and jax.process_index() == 0:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            self._folder = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._folder.name, create_perfetto_trace=True, profiler_options=options)

    def end(self, step: int, metrics: Any) -> None:
        """To be called after a step, with its metrics, which are waited for at the last traced step."""
        if step == self._last and self._folder:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        (trace,) = epath.Path(self._folder.name).glob("plugins/profile/*/perfetto_trace.json.gz")
        text = gzip.decompress(trace.read_bytes()).decode()
        path = epath.Path(self._workdir) / "profile" / f"steps-{self._first}-{self._reached}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, gzip.compress(_ABSOLUTE.sub("", text).encode()))
        self._folder.cleanup()
        self._folder = None


class _Page:
    """The progress page of a run, rewritten at most every few seconds."""

    def __init__(self, workdir: str, total_steps: int, lines: list[dict[str, Any]]):
        self._workdir, self._total, self._lines = workdir, total_steps, lines
        self._written, self._left = -math.inf, 0.0
        self.warnings: list[str] = []
        self.picture: np.ndarray | None = None

    def add(self, line: dict[str, Any], batch_size: int) -> None:
        self._lines.append(line)
        if "images_per_second" in line:
            self._left = (self._total - line["step"]) * batch_size / max(line["images_per_second"], 1e-9)
        if time.monotonic() - self._written > progress.AGAIN / 2:
            self._write(self._left)

    def close(self) -> None:
        self._write(None)

    def _write(self, left: float | None) -> None:
        how: dict[str, Any] = {"total": self._total, "warnings": self.warnings, "picture": self.picture}
        progress.write(self._workdir, self._lines, seconds_left=left, **how)
        self._written = time.monotonic()


class _JsonLines:
    """A JSON Lines file that a resumed run continues at its step; rewritten in full on buckets, which cannot append."""

    def __init__(self, path: epath.Path, first_step: int):
        self._path, self._lines = path, []
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):  # a killed run may leave half a line, a faulty disk anything
                    if _is_record(found := files.parse(line)) and found["step"] <= first_step:
                        self._lines.append(line.decode())
        self._write()

    def _write(self) -> None:
        files.write(self._path, "".join(line + "\n" for line in self._lines))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines]

    def append(self, values: dict[str, Any]) -> None:
        line = json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in values.items()})
        self._lines.append(line)
        if "://" in os.fspath(self._path):
            self._write()
        else:
            with self._path.open("a") as file:
                file.write(line + "\n")


def _is_record(found: Any) -> bool:
    """Whether this is a valid log line: an integer `step` and numbers by name that fit into a float."""
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return False
    return all(type(one) is float or (type(one) is int and abs(one) < 2**63) for one in found.values())


class Preemption:
    """Catches SIGTERM (the scheduler needs the machine) and the first Ctrl-C; the loop calls `requested` every step."""

    def __init__(self) -> None:
        self._noticed, self._asked = False, 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        # With several processes, JAX's own service catches SIGTERM and makes all of them stop after the same step.
        numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGTERM, signal.SIGINT]
        for number in numbers:
            self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True
        signal.signal(number, self._previous[number])  # a second signal has its usual effect
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to save and stop after this step; every process of a job gets the same answer."""
        self._asked += 1  # counted here, over all loops of a job: identical on all processes, and without gaps
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._noticed
