"""Trains members of a run in parallel, each in a process with its own cores.

A small model leaves much of a CPU idle: its matrix products are too small to be worth splitting. Folds, seeds and
fractions are independent, so about as many of them as there are cores are trained in parallel.
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
from usfmae_jax.training.monitor import DivergedError, Preemption

#: A model with more parameters than this keeps several cores busy on its own, and several of them need much memory.
SMALL = 10_000_000

#: `(members, line)` -> False if it was preempted, after saving; each process has its own `line` of the terminal.
Action = Callable[[Sequence[Member], int], bool]


def check(parallel: int, mesh: Mesh) -> None:
    """Raises InputError if several members at a time are asked for on anything but a single CPU device."""
    if parallel > 1 and not _alone(mesh):
        raise InputError(
            f"config.parallel={parallel} is for a CPU that is one device; here members are trained one after "
            "another, each on all devices: leave it out"
        )


def how_many(members: int, parallel: int, parameters: Callable[[], int], mesh: Mesh) -> int:
    """The number of members trained in parallel; it depends on the run, not on its progress.

    The last bits of a member's results depend on its number of threads, and must be the same after a restart.

    Args:
      members: number of members of the run.
      parallel: the requested number; 0 = as many as keep all cores busy, if the model is small.
      parameters: counts the parameters of the model; called only if needed.
      mesh: if it has several devices, each member uses all of them, one member after another.
    """
    if not _alone(mesh):
        return 1
    if parallel:
        return min(parallel, members)
    return quickest(members, _cores()) if parameters() <= SMALL else 1


def quickest(members: int, cores: int) -> int:
    """The smallest number of processes that finishes this many members soonest.

    For five members on two cores, two processes have three and two to train: one core idles for a third of the time.
    Three processes that share the two cores end together.
    """

    def duration(processes: int) -> float:
        rounds, rest = divmod(members, processes)
        return rounds * max(1.0, processes / cores) + (max(1.0, rest / cores) if rest else 0.0)

    return min(range(min(cores, members), min(2 * cores, members) + 1), key=duration)


def train(action: Action, unfinished: Sequence[Member], processes: int) -> bool:
    """Trains members in several processes; returns False if they were preempted, after saving.

    Args:
      action: trains the given members one after another; must be picklable.
      unfinished: the members to train.
      processes: from `how_many`; 1 = this process.

    Raises:
      InputError, DivergedError, FaultError: raised in a process; the others have saved and stopped.
      FaultError: a process ended in any other way.
    """
    if processes == 1 or not unfinished:
        return not unfinished or action(unfinished, 0)
    check_guard()
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork does not copy
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
                        worker.terminate()  # SIGTERM: the process saves first
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
                    worker.join()
        asked = preemption.requested()
    if not failures.empty():
        raise failures.get()
    if asked:  # a process that was still starting, or between two members, does not report it
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
    os.setsid()  # Ctrl-C goes to the parent, which passes it on
    os.environ["NPROC"] = str(threads)  # size of XLA's thread pool, which starts with the first array
    flags.FLAGS.mark_as_parsed()  # grain starts no worker processes until then
    tqdm.set_lock(lock)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        code = DONE if action(members, line) else PREEMPTED
    except (InputError, DivergedError, FaultError) as error:
        failures.put(error)
        code = BAD_INPUT
    if code == BAD_INPUT:  # Python would wait for a thread that may hang
        os._exit(code)
    raise SystemExit(code)


def _end_with_parent() -> None:
    """Saves and stops if the parent was killed: a restarted run must not write the same files at the same time."""
    parent = multiprocessing.parent_process()
    if parent:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _alone(mesh: Mesh) -> bool:
    return jax.default_backend() == "cpu" and mesh.size == jax.process_count() == 1


def _cores() -> int:
    with contextlib.suppress(AttributeError):  # only Linux reports which cores a process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
