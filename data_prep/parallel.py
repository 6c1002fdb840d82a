"""A map over processes: results in the order of the inputs, and only a few of them in memory at a time."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any

from usfmae_jax.errors import InputError

_CHUNK = 4  # inputs per message: enough to hide its cost, few enough for large frames
_AHEAD = 3  # chunks per worker that are under way


def ordered_map(
    function: Callable[[Any], Any], inputs: Iterable[Any], workers: int, preload: str
) -> Generator[Any, None, None]:
    """Yields `function(input)` for every input, in order, whatever the number of workers.

    Args:
      function: at the top of a module (or a partial of one), so that it can be pickled.
      inputs: likewise.
      workers: processes; 1 stays in this one.
      preload: module that the processes import once, before they are forked off.

    Raises:
      InputError: a worker was killed.
    """
    if workers == 1:
        _one_thread()
        yield from map(function, inputs)
        return
    # Not fork: this process has threads. The fork server has none and pays for the imports once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    remaining = iter(inputs)
    chunks = iter(lambda: list(itertools.islice(remaining, _CHUNK)), [])
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        for chunk in itertools.islice(chunks, workers * _AHEAD):
            pending.append(pool.submit(_map_chunk, function, chunk))
        while pending:
            results = pending.popleft().result()
            for chunk in itertools.islice(chunks, 1):
                pending.append(pool.submit(_map_chunk, function, chunk))
            yield from results
    except concurrent.futures.process.BrokenProcessPool as error:
        raise InputError("a worker process was killed, most likely for memory; use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _map_chunk(function: Callable[[Any], Any], inputs: list[Any]) -> list[Any]:
    return [function(one) for one in inputs]


def _start_worker() -> None:
    _one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent does not take its pool along: the workers would wait for it for ever.
    parent = multiprocessing.parent_process()
    if parent:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _one_thread() -> None:
    import cv2  # late: asking for help should not wait for it

    cv2.setNumThreads(1)  # the parallelism is over files
    # Silence: damaged files are named in the summary. OpenCV 5 has moved the function.
    logging = getattr(cv2.utils, "logging", cv2)
    logging.setLogLevel(0)
