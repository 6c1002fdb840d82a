"""A pool of processes that survives what it reads: a file that crashes or stalls its reader is set aside, not fatal.

Decoders of images, video and volumes are native code, and the files come from strangers. A worker that dies, or says
nothing for too long, is replaced; the input that it was at is tried once more and then given up, by name.

Pools of other packages do not do this: their time limit runs from the beginning of a task, whatever its worker still
says, and when a worker dies nobody knows at which of its inputs.
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
_TRIES = 2  # a crash may have been another program's hunger for memory; a second one at the same place is not
_MEMORY = 8 << 30  # bytes that a worker may take: a file that asks for more fails alone, not the machine
_DEATHS = 3  # in a row, of workers that had not even begun

#: `function(task, given_up, begin)`: `given_up` maps numbers of inputs to leave out to reasons, and `begin(number)`
#: announces an input before it is touched, again and again while it is read.
Work = Callable[[Any, Mapping[int, str], Callable[[int], None]], Any]


@dataclasses.dataclass
class _Job:
    number: int
    task: Any
    given_up: dict[int, str] = dataclasses.field(default_factory=dict)
    crashes: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    at: int | None = None  # the input that the worker announced last


class _Worker:
    """A process, and the job that it is at."""

    def __init__(self, context: Any, function: Work):
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, function), name=READER, daemon=True)
        self.process.start()
        there.close()
        self.job: _Job | None = None
        self.heard = 0.0

    def give(self, job: _Job) -> None:
        job.at, self.job, self.heard = None, job, time.monotonic()
        with contextlib.suppress(OSError):  # a dead worker is noticed by its sentinel
            self.pipe.send((job.task, job.given_up))

    def hear(self) -> tuple[str, Any] | None:
        """Takes what it has said: how it has finished and with what, None if it has not."""
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
        """Why it will not finish: dead, or silent for longer than `limit`; empty while it is at work."""
        if not self.process.is_alive():
            code = self.process.exitcode or 0
            return f"crashed its reader ({signal.Signals(-code).name if code < 0 else f'status {code}'})"
        return f"took longer than {limit:g} s" if time.monotonic() - self.heard > limit else ""

    def unguarded(self) -> bool:
        """Whether it met the call that had started it when it imported the script."""
        return self.process.exitcode == UNGUARDED

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def isolated_map(
    function: Work, tasks: Iterable[Any], workers: int, *, limit: float, preload: str
) -> Generator[tuple[int, Any], None, None]:
    """Yields `(number, function(task, given_up, begin))` for every task, in the order in which they are finished.

    Args:
      function: at the top of a module (or a partial of one), so that it can be pickled.
      tasks: likewise.
      workers: processes; also a single one is not this one.
      limit: seconds that a worker may be silent before it is taken for stuck.
      preload: module that the processes import once, before they are forked off.

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
            worker.process.kill()  # all of them, before one is waited for
        for worker in pool:
            worker.end()


def _ready(pool: list[_Worker], limit: float) -> list[_Worker]:
    """Workers that have said something, died, or been silent for too long; none after a second of nothing."""
    busy = [worker for worker in pool if worker.job]
    began = time.monotonic()
    said = multiprocessing.connection.wait(
        [handle for worker in busy for handle in (worker.pipe, worker.process.sentinel)], _PATIENCE
    )
    asleep = time.monotonic() - began - _PATIENCE
    if asleep > _PATIENCE:  # the whole job was stopped and went on: nobody was silent
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
    # Time is not given twice: a large build with many such files would not end.
    if job.crashes[job.at] >= _TRIES or reason.startswith("took"):
        job.given_up[job.at] = reason


def _serve(pipe: multiprocessing.connection.Connection, function: Work) -> None:
    """What a worker does all its life."""
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
    """The error, or what can be said of one that does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in a worker process")
    return error


def _prepare() -> None:
    import cv2  # late: asking for help should not wait for it

    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)  # the parallelism is over files
    # Silence: damaged files are named in the summary. OpenCV 5 has moved the function.
    logging = getattr(cv2.utils, "logging", cv2)
    logging.setLogLevel(0)
    # Native decoders write to the descriptor itself, in the middle of the progress bar.
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _end_with_parent() -> None:
    # A killed parent does not take its workers along: they would wait for it for ever.
    parent = multiprocessing.parent_process()
    if parent:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
