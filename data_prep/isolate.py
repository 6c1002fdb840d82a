"""A pool of processes that survives what it reads: a file that crashes or stalls its reader is set aside, not fatal.

Decoders of images, video and volumes are native code, and the files come from strangers. A worker that dies, or says
nothing for too long, is replaced; the input that it was at is tried once more and then given up, by name.
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

from usfmae_jax.errors import InputError

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


@dataclasses.dataclass
class _Worker:
    process: Any
    pipe: multiprocessing.connection.Connection
    job: _Job | None = None
    heard: float = 0.0


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
      InputError: workers die before they begin.
      Exception: whatever `function` raises.
    """
    # Not fork: this process has threads. The fork server has none and pays for the imports once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting = collections.deque(_Job(number, task) for number, task in enumerate(tasks))
    pool: list[_Worker] = []
    deaths = 0
    try:
        for _ in range(min(workers, len(waiting))):
            pool.append(_start(context, function))
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                if not worker.job and waiting:
                    _give(worker, waiting.popleft())
            for worker in _ready(pool, limit):
                answer = _hear(worker)
                if answer is not None:
                    deaths = 0
                    number, kind, value = answer
                    if kind == "failed":
                        raise value
                    yield number, value
                    continue
                lost = _lost(worker, limit)
                if lost is None:
                    continue
                job, reason = lost
                deaths = deaths + 1 if job.at is None else 0
                if deaths >= _DEATHS:
                    raise InputError(f"worker processes end before they begin ({reason}); use fewer --workers")
                _blame(job, reason)
                waiting.appendleft(job)
                pool[pool.index(worker)] = _start(context, function)
    finally:
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.process.join()
            worker.pipe.close()


def _start(context: Any, function: Work) -> _Worker:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _give(worker: _Worker, job: _Job) -> None:
    job.at, worker.job, worker.heard = None, job, time.monotonic()
    with contextlib.suppress(OSError):  # a dead worker is noticed by its sentinel
        worker.pipe.send((job.task, job.given_up))


def _ready(pool: list[_Worker], limit: float) -> list[_Worker]:
    """Workers that have said something, died, or been silent for too long; none after a second of nothing."""
    busy = [worker for worker in pool if worker.job]
    sources = {handle: worker for worker in busy for handle in (worker.pipe, worker.process.sentinel)}
    began = time.monotonic()
    said = multiprocessing.connection.wait(list(sources), _PATIENCE)
    asleep = time.monotonic() - began - _PATIENCE
    if asleep > _PATIENCE:  # the whole job was stopped and went on: nobody was silent
        for worker in busy:
            worker.heard += asleep
    late = [worker for worker in busy if time.monotonic() - worker.heard > limit]
    return list({id(worker): worker for worker in [*(sources[handle] for handle in said), *late]}.values())  # type: ignore[index]


def _hear(worker: _Worker) -> tuple[int, str, Any] | None:
    """Takes what a worker has said; its answer if it has finished, else None."""
    assert worker.job
    with contextlib.suppress(EOFError, OSError):
        while worker.pipe.poll():
            kind, value = worker.pipe.recv()
            worker.heard = time.monotonic()
            if kind == "at":
                worker.job.at = value
                continue
            number, worker.job = worker.job.number, None
            return number, kind, value
    return None


def _lost(worker: _Worker, limit: float) -> tuple[_Job, str] | None:
    """The job of a worker that is dead or stuck, and why; None for one that is at work."""
    reason = ""
    if not worker.process.is_alive():
        code = worker.process.exitcode or 0
        reason = f"crashed its reader ({signal.Signals(-code).name if code < 0 else f'status {code}'})"
    elif time.monotonic() - worker.heard > limit:
        reason = f"took longer than {limit:g} s"
    if not reason:
        return None
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()
    assert worker.job
    job, worker.job = worker.job, None
    return job, reason


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
            result = function(task, given_up, lambda number: pipe.send(("at", number)))
            pipe.send(("done", result))
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
