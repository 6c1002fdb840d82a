"""Members of a run trained at the same time, each in a process with cores of its own.

A small model leaves much of a CPU idle: its products are too short to be worth dividing. Folds, seeds and fractions do
not need each other, so that about as many of them as there are cores are trained side by side.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from usfmae_jax.errors import (
    BAD_INPUT,
    DONE,
    NO_GUARD,
    PREEMPTED,
    TRAINER,
    UNGUARDED,
    FaultError,
    InputError,
    check_guard,
)
from usfmae_jax.finetuning.members import Member
from usfmae_jax.training.mesh import keep_memory
from usfmae_jax.training.monitor import DivergedError, Preemption

#: Models of more parameters than this keep several cores busy by themselves, and fill the memory if there are many.
SMALL = 10_000_000

#: `(members, line)` to False when it was preempted after saving; `line` of the terminal is its own.
Action = Callable[[Sequence[Member], int], bool]


def check(parallel: int, mesh: Mesh) -> None:
    """Raises InputError if several members at a time are asked for where they are not on a single CPU device."""
    if parallel > 1 and not _alone(mesh):
        raise InputError(
            f"config.parallel={parallel} is for a CPU that is one device; here members are trained one after "
            "another, each on all devices: leave it out"
        )


def how_many(members: int, parallel: int, parameters: Callable[[], int], mesh: Mesh) -> int:
    """How many members are trained at a time; it follows from the run, not from how far it is.

    A member's arithmetic depends on the number of its threads in the last bits, and is to be the same after a restart.

    Args:
      members: of the run.
      parallel: how many are asked for; 0 = what keeps all cores busy, if the model is small.
      parameters: counts those of the model; asked only where that decides.
      mesh: one device, or members share all of them one after the other.
    """
    if not _alone(mesh):
        return 1
    if parallel:
        return min(parallel, members)
    return quickest(members, _cores()) if parameters() <= SMALL else 1


def quickest(members: int, cores: int) -> int:
    """The smallest number of processes that are done with so many members first.

    Of five members on two cores, two processes have three and two to train: for a third of the time a core idles. Three
    processes that take turns on the two cores end together.
    """

    def duration(processes: int) -> float:
        rounds, rest = divmod(members, processes)
        return rounds * max(1.0, processes / cores) + (max(1.0, rest / cores) if rest else 0.0)

    return min(range(min(cores, members), min(2 * cores, members) + 1), key=duration)


def train(action: Action, unfinished: Sequence[Member], processes: int) -> bool:
    """Trains members in so many processes; returns False when they were preempted after saving.

    Args:
      action: trains the members that it is given one after another; can be pickled.
      unfinished: those to be trained.
      processes: from `how_many`; 1 = this one.

    Raises:
      InputError, DivergedError, FaultError: a process met it; the others have saved and stopped.
      FaultError: a process ended in another way.
    """
    if processes == 1 or not unfinished:
        return not unfinished or action(unfinished, 0)
    check_guard()
    context = multiprocessing.get_context("spawn")  # JAX has threads, and a fork copies none of them
    failures, lock = context.SimpleQueue(), context.RLock()
    threads = max(_cores() // processes, 1)
    workers = [
        context.Process(
            name=TRAINER, target=_work, args=(action, unfinished[line::processes], line, threads, lock, failures)
        )
        for line in range(min(processes, len(unfinished)))
    ]
    told = False
    with Preemption() as preemption:
        try:
            for worker in workers:
                worker.start()
            while alive := [worker for worker in workers if worker.exitcode is None]:
                connection.wait([worker.sentinel for worker in alive], timeout=0.5)
                if not told and (preemption.requested() or any(worker.exitcode for worker in workers)):
                    told = True
                    for worker in alive:
                        worker.terminate()  # SIGTERM: they save first
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
                    worker.join()
        asked = preemption.requested()
    if not failures.empty():
        raise failures.get()
    if asked:  # a process that was still starting, or between two members, says nothing of it
        print("stopped as asked; the same command continues it", file=sys.stderr, flush=True)
    if asked or not any(worker.exitcode for worker in workers):
        return not asked
    if UNGUARDED in [worker.exitcode for worker in workers]:
        raise InputError(NO_GUARD)
    told_to = (DONE, PREEMPTED, -signal.SIGTERM)
    codes = [worker.exitcode for worker in workers if worker.exitcode not in told_to] or [-signal.SIGTERM]
    raise FaultError(
        f"a process that trained members ended with status {codes[0]}; what it said is above, unless the system ended "
        "it for want of memory. The same command continues the run, with --config.parallel=1 one member after another"
    )


def _work(action: Action, members: Sequence[Member], line: int, threads: int, lock: Any, failures: Any) -> None:
    os.setsid()  # Ctrl-C is for the parent, which passes it on
    os.environ["NPROC"] = str(threads)  # of XLA's pool, which starts with the first array
    keep_memory()
    flags.FLAGS.mark_as_parsed()  # grain starts no worker processes before that
    tqdm.set_lock(lock)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        code = DONE if action(members, line) else PREEMPTED
    except (InputError, DivergedError, FaultError) as error:
        failures.put(error)
        code = BAD_INPUT
    if code == BAD_INPUT:  # what hangs may be a thread, which Python would wait for
        os._exit(code)
    raise SystemExit(code)


def _end_with_parent() -> None:
    """Saves and stops when the parent was killed: what it would be started again for must not be written twice."""
    parent = multiprocessing.parent_process()
    if parent:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _alone(mesh: Mesh) -> bool:
    return jax.default_backend() == "cpu" and mesh.size == jax.process_count() == 1


def _cores() -> int:
    with contextlib.suppress(AttributeError):  # Linux alone tells which cores a process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
