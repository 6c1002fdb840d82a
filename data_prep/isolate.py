"""A process pool that survives bad input: a file that crashes or stalls its reader is skipped rather than fatal.

Decoders of images, video and volumes are native code, and the files come from untrusted sources. A worker that dies or
is silent for too long is replaced. Input that crashed its worker is tried once more; input that crashes again or stalls
is given up and reported.

The pools of other packages do not do this: their time limit counts from the start of a task, even if its worker still
reports progress, and when a worker dies it is not known which of its inputs was to blame.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from usfmae_jax.errors import NO_GUARD, READER, UNGUARDED, InputError, check_guard

_PATIENCE = 1.0  # seconds
_TRIES = 2  # the first crash may be due to another program's use of memory; a second one on the same input is not
_MEMORY = 8 << 30  # bytes that a worker may use: a file that needs more fails alone, without the machine
_DEATHS = 3  # in a row, of workers that had not begun any input

#: `function(task, given_up, begin)`: `given_up` maps numbers of inputs to leave out to reasons, and `begin(number)`
#: announces an input before it is touched, and repeatedly while it is read.
Work = Callable[[Any, Mapping[int, str], Callable[[int], None]], Any]


@dataclasses.dataclass
class _Job:
    number: int
    task: Any
    given_up: dict[int, str] = dataclasses.field(default_factory=dict)
    crashes: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    at: int | None = None  # the input that the worker announced last


class _Worker:
    """A process and its current job."""

    def __init__(self, context: Any, function: Work):
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, function), name=READER, daemon=True)
        self.process.start()
        there.close()
        self.job: _Job | None = None
        self.heard = 0.0

    def give(self, job: _Job) -> None:
        job.at, self.job, self.heard = None, job, time.monotonic()
        with contextlib.suppress(OSError):  # a dead worker is detected by its sentinel
            self.pipe.send((job.task, job.given_up))

    def hear(self) -> tuple[str, Any] | None:
        """Reads its messages: returns ("done", result) or ("failed", error), or None if it has not finished."""
        assert self.job
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                self.heard = time.monotonic()
                if kind != "at":
                    return kind, value
                self.job.at = value
        return None

    def trouble(self, limit: float) -> str:
        """Why it will not finish: dead, or silent for longer than `limit` seconds; empty while it is working."""
        if not self.process.is_alive():
            code = self.process.exitcode or 0
            return f"crashed its reader ({signal.Signals(-code).name if code < 0 else f'status {code}'})"
        return f"took longer than {limit:g} s" if time.monotonic() - self.heard > limit else ""

    def unguarded(self) -> bool:
        """Whether, on importing the script, it reached the call that had started it: there is no main guard."""
        return self.process.exitcode == UNGUARDED

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def isolated_map(
    function: Work, tasks: Iterable[Any], workers: int, *, limit: float, preload: str
) -> Generator[tuple[int, Any], None, None]:
    """Yields `(number, function(task, given_up, begin))` for every task, in order of completion.

    Args:
      function: defined at the top level of a module (or a partial of such a function), so that it can be pickled.
      tasks: picklable arguments of `function`.
      workers: number of processes; even a single one is separate from this process.
      limit: seconds that a worker may be silent before it is considered stuck.
      preload: module that the fork server imports once, before it forks the processes.

    Raises:
      InputError: workers die before they begin, or import a script without a main guard.
      Exception: whatever `function` raises.
    """
    check_guard()
    # Not fork: this process has threads. The fork server has none and pays for the imports once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting = collections.deque(_Job(number, task) for number, task in enumerate(tasks))
    pool: list[_Worker] = []
    deaths = 0
    try:
        for _ in range(min(workers, len(waiting))):
            pool.append(_Worker(context, function))
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                if not worker.job and waiting:
                    worker.give(waiting.popleft())
            for worker in _ready(pool, limit):
                job = worker.job
                assert job
                if answer := worker.hear():
                    kind, value = answer
                    if kind == "failed":
                        raise value
                    deaths, worker.job = 0, None
                    yield job.number, value
                elif reason := worker.trouble(limit):
                    if worker.unguarded():
                        raise InputError(NO_GUARD)
                    worker.end()
                    deaths = deaths + 1 if job.at is None else 0
                    if deaths >= _DEATHS:
                        raise InputError(f"worker processes end before they begin ({reason}); use fewer --workers")
                    _blame(job, reason)
                    waiting.appendleft(job)
                    pool[pool.index(worker)] = _Worker(context, function)
    finally:
        for worker in pool:
            worker.process.kill()  # all of them, before waiting for any
        for worker in pool:
            worker.end()


def _ready(pool: list[_Worker], limit: float) -> list[_Worker]:
    """Workers that have sent a message, died, or been silent for too long; waits for at most one second."""
    busy = [worker for worker in pool if worker.job]
    began = time.monotonic()
    said = multiprocessing.connection.wait(
        [handle for worker in busy for handle in (worker.pipe, worker.process.sentinel)], _PATIENCE
    )
    asleep = time.monotonic() - began - _PATIENCE
    if asleep > _PATIENCE:  # this process was suspended and resumed, so no worker was silent
        for worker in busy:
            worker.heard += asleep
    return [
        worker
        for worker in busy
        if worker.pipe in said or worker.process.sentinel in said or time.monotonic() - worker.heard > limit
    ]


def _blame(job: _Job, reason: str) -> None:
    if job.at is None:
        return
    job.crashes[job.at] += 1
    # No second try after a time-out: a large build with many such files would never end.
    if job.crashes[job.at] >= _TRIES or reason.startswith("took"):
        job.given_up[job.at] = reason


def _serve(pipe: multiprocessing.connection.Connection, function: Work) -> None:
    """The main loop of a worker."""
    _prepare()
    while True:
        try:
            task, given_up = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", function(task, given_up, lambda number: pipe.send(("at", number)))))
        except Exception as error:
            pipe.send(("failed", _portable(error)))


def _portable(error: Exception) -> Exception:
    """The error itself if it can be pickled, else a RuntimeError that names its type."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in a worker process")
    return error


def _prepare() -> None:
    import cv2  # late, so that --help is quick

    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)  # files are processed in parallel
    # No log messages: damaged files are named in the summary. OpenCV 5 has moved the function.
    logging = getattr(cv2.utils, "logging", cv2)
    logging.setLogLevel(0)
    # Native decoders write to the descriptor directly, in the middle of the progress bar.
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _end_with_parent() -> None:
    # Workers outlive a killed parent, and would wait for it forever.
    parent = multiprocessing.parent_process()
    if parent:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
