"""From shards to batches: deterministic, host-sharded, resumable at any batch.

The contents of batch `step` depend only on (seed, step) and the shards, not on the number of workers, hosts or
restarts: randomness is drawn per position in one endless global sequence, and every host takes its own rows of each
batch.
"""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import cv2
import grain
import numpy as np

from usfmae_jax.data import augment
from usfmae_jax.data.records import FIELDS, Record, Shards, decode_image, decode_record, open_shards
from usfmae_jax.errors import LOADER, NO_GUARD, UNGUARDED, DamagedRecord, FaultError, InputError, check_guard

#: Maximum number of records tried for one row of a batch before the data counts as unreadable.
MAX_TRIES = 8
#: Seconds to wait for the next batch or images: longer than any working storage takes.
PATIENCE = 600.0
_PIECE = 16  # items per task of a thread
_IMAGE = {name: FIELDS[name] for name in ("image", "height", "width")}

Batch = dict[str, np.ndarray]
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def open_sources(paths: str, split: str | None, exclude: Sequence[str] = ()) -> list[Shards]:
    """Opens a comma-separated list of sources; see `records.open_shards`."""
    return [open_shards(path.strip(), split, exclude) for path in paths.split(",")]


class Rows(NamedTuple):
    """Records to train on, with their targets.

    Attributes:
      shards: the shards of the records.
      records: R indices of records in `shards`.
      targets: arrays `[R, ...]` by name.
    """

    shards: Shards
    records: Sequence[int] | np.ndarray
    targets: dict[str, np.ndarray]


def all_rows(sources: Sequence[Shards]) -> tuple[Rows, ...]:
    """All records of every source, with no targets."""
    return tuple(Rows(shards, range(len(shards)), {}) for shards in sources)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadView(grain.transforms.RandomMap):
    """Loads one training view of (source, position in its rows); a damaged record is replaced by another of its source.

    Attributes:
      sources: rows to train on; all with the same targets.
      size: (height, width) of the view.
      channels: 1 for grey, 3 for colour.
      how: the augmentation.
      mask: from a record to the class of each pixel, uint8 `[H, W]`, or several such layers, `[H, W, L]`, which get the
        same view; None = no masks.
    """

    sources: Sequence[Rows]
    size: tuple[int, int]
    channels: int
    how: augment.Augmentation
    mask: Callable[[Record], np.ndarray] | None = None

    def random_map(self, element: tuple[int, int], rng: np.random.Generator) -> Batch:
        """Loads one view, with its targets and origin.

        Returns:
          `image` uint8 `[H, W, C]`; `mask` uint8 `[H, W]` or `[H, W, L]`, if requested; the targets; `record` int64
          `[2]`: (source, record); `damaged` int64 `[MAX_TRIES, 2]`: damaged records tried before it, padded with -1.
        """
        cv2.setNumThreads(1)  # images are processed in parallel instead
        source, place = element
        shards, records, targets = self.sources[source]
        damaged = np.full((MAX_TRIES, 2), -1, np.int64)
        for attempt in range(MAX_TRIES):
            number = int(records[place])
            try:
                views = self.draw(decode_record(shards[number], FIELDS if self.mask else _IMAGE), rng)
            except DamagedRecord:
                damaged[attempt] = source, number
                place = int(rng.integers(len(records)))
            else:
                beside = {name: np.asarray(values[place]) for name, values in targets.items()}
                return views | {"record": np.array([source, number]), "damaged": damaged} | beside
        path, number = shards.locate(number)
        raise InputError(
            f"{MAX_TRIES} records in a row are damaged, the last is number {number} of {path}; rebuild the shards"
        )

    def draw(self, record: Record, rng: np.random.Generator) -> Batch:
        """Draws one view of a record: `image` uint8 `[H, W, C]`, and `mask`; raises DamagedRecord."""
        pixels = None
        height, width = record["height"], record["width"]
        if not (height and width):  # shards made by others may lack it
            pixels = decode_image(record["image"], self.channels)
            height, width = pixels.shape[:2]
        matrix = augment.random_view(rng, height, width, self.size, self.how)
        masks = {}
        if self.mask:
            mask = self.mask(record)
            layers = mask.reshape(*mask.shape[:2], -1)
            masks["mask"] = augment.warp(layers, matrix, self.size, "nearest").reshape(*self.size, *mask.shape[2:])
        if pixels is None:
            pixels = decode_image(record["image"], self.channels, augment.reduction(matrix))
            if len(pixels) != height:
                matrix = augment.shrink_view(matrix, height / len(pixels))
        image = augment.adjust(augment.warp(pixels, matrix, self.size, self.how.interpolation), rng, self.how)
        return {"image": image} | masks


class HostRows(grain.MapDataset):
    """This host's rows of every global batch: row j of step s is element `s * batch_size + first + j`."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, host: int, hosts: int):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, batch_size // hosts
        self._first = host * self._rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * self._rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._rows)
        return self._parent[step * self._batch_size + self._first + row]


def training_batches(
    load: LoadView,
    *,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
    strata: np.ndarray | None = None,
    host: int = 0,
    hosts: int = 1,
) -> grain.MapDataset:
    """The endless sequence of this host's batches; `dataset[step]` is random access.

    A batch has `image` uint8 `[B, H, W, C]`, the targets `[B, ...]`, `record` int64 `[B, 2]`: (source, record), and
    `damaged` int64 `[B, MAX_TRIES, 2]` for a `DamageReport`. Every epoch is shuffled anew; an incomplete last batch is
    filled up from the next epoch.

    Args:
      load: loads the views; holds the rows to train on.
      batch_size: size of the global batch, over all hosts.
      seed: determines order and augmentation.
      weights: sampling weight of each source; empty = in proportion to its size.
      strata: int `[R]`, stratum of each row of a single source: all strata are sampled equally often, by repeating the
        rare ones; the length of an epoch does not change. None = every row equally often.
      host: index of this host.
      hosts: number of hosts; must divide `batch_size`.

    Raises:
      InputError: hosts do not divide the batch, weights do not fit the sources, or there are no rows.
    """
    if batch_size % hosts:
        raise InputError(f"a batch of {batch_size} cannot be divided among {hosts} hosts")
    sizes = [len(source.records) for source in load.sources]
    if not all(sizes):
        raise InputError("there are no frames to train on; choose another split")
    weights = list(weights) or sizes
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise InputError(f"config.data.weights needs {len(sizes)} positive numbers, one per source, not {weights}")
    places: list[tuple[int, Sequence[int] | np.ndarray]] = [(source, range(size)) for source, size in enumerate(sizes)]
    if strata is not None:
        places = [(0, np.flatnonzero(strata == stratum)) for stratum in np.unique(strata)]
        weights = [1] * len(places)
    orders = [
        grain.MapDataset.source(chosen).seed(seed + number).shuffle().repeat().map(_Pair(source))
        for number, (source, chosen) in enumerate(places)
    ]
    mixed = (
        grain.MapDataset.mix(orders, [weight / sum(weights) for weight in weights]) if len(orders) > 1 else orders[0]
    )
    return HostRows(mixed.seed(seed).random_map(load), batch_size, host, hosts).batch(batch_size // hosts)


@dataclasses.dataclass(frozen=True)
class _Pair(grain.transforms.Map):
    source: int

    def map(self, element: int) -> tuple[int, int]:
        return self.source, int(element)


def iterate(dataset: grain.MapDataset, start: int, workers: int, threads: int = 2) -> Generator[Any, None, None]:
    """Yields batches from number `start`, prepared ahead; closing it ends the workers.

    Args:
      dataset: from `training_batches`.
      start: first batch, 0 for a new run.
      workers: number of processes; 0 = decode in `threads` threads of this process, best with few cores.
      threads: number of decoding threads.

    Raises:
      FaultError: a worker was killed, or no batch arrived within `PATIENCE`: a worker or the storage hangs.
    """
    options = grain.ReadOptions(num_threads=max(threads, 1), prefetch_buffer_size=max(2 * threads, 2))
    if workers:
        check_guard()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    prepared = dataset[start:].to_iter_dataset(options)
    if workers:
        prepared = prepared.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    batches = iter(prepared)
    # If a worker is stopped, or killed while sending a message, grain waits for the rest forever. So a thread, which
    # can be abandoned, waits for grain.
    asked: queue.SimpleQueue[concurrent.futures.Future[Batch] | None] = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(batches, asked), daemon=True).start()
    try:
        while True:
            future: concurrent.futures.Future[Batch] = concurrent.futures.Future()
            asked.put(future)
            batch = [_within_patience(future)]
            del future  # and its result: a worker's shared memory is released with the last reference to the batch
            yield batch.pop()
    except FaultError:
        _kill_workers()  # they do not end when asked to
        raise
    finally:
        asked.put(None)
        batches.close()


def _answer(batches: Iterator[Batch], asked: "queue.SimpleQueue[concurrent.futures.Future[Batch] | None]") -> None:
    while future := asked.get():
        try:
            future.set_result(next(batches))
        except BaseException as error:
            future.set_exception(error)
        del future


def _within_patience(future: "concurrent.futures.Future[Loaded]") -> Loaded:
    """The result of a future; raises FaultError if there is none in time, or if a worker was killed."""
    how_to = "the same command goes on from the last checkpoint"
    try:
        return future.result(PATIENCE)
    except concurrent.futures.TimeoutError as error:
        if future.done():  # the awaited function itself raised it
            raise
        raise FaultError(
            f"no images came for {PATIENCE:g} s: what loads them, or the storage that they are on, hangs; {how_to}"
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("Worker process was terminated"):
            raise
        code = str(error).partition("exit code ")[2].partition(".")[0]
        if code == str(UNGUARDED):
            raise InputError(NO_GUARD) from error
        raise FaultError(
            f"a process that loads images was killed (status {code}), often for want of memory, of which fewer "
            f"--config.data.workers need less; {how_to}"
        ) from error


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.name.startswith(LOADER):
            process.kill()


class DamageReport:
    """Counts damaged records, each once, and stops the run when they exceed a fraction of the data.

    Args:
      sources: the sources that indices in batches refer to.
      limit: maximum fraction of all records that may be damaged.
      known: pairs (source, record) found before a restart.
    """

    def __init__(self, sources: Sequence[Shards], limit: float, known: Sequence[Sequence[int]] = ()):
        self._sources, self._limit = sources, limit
        self.found = {(int(source), int(record)) for source, record in known}

    def update(self, damaged: np.ndarray) -> list[str]:
        """Takes a batch's `damaged` and returns one line per record that was not known yet.

        Raises:
          InputError: the limit is exceeded.
        """
        fresh = {(int(s), int(r)) for s, r in damaged.reshape(-1, 2) if s >= 0} - self.found
        self.found |= fresh
        lines = []
        for source, record in sorted(fresh):
            path, number = self._sources[source].locate(record)
            lines.append(f"damaged record skipped: number {number} of {path}")
        total = sum(len(source) for source in self._sources)
        if len(self.found) > self._limit * total:
            raise InputError(
                f"{len(self.found)} of {total} records are damaged, more than config.data.max_damaged={self._limit:g}; "
                "rebuild the shards or raise the limit" + (f" ({lines[-1]})" if lines else "")
            )
        return lines


def decode_ahead(
    load: Callable[[Item], Loaded], items: Sequence[Item], threads: int, ahead: int
) -> Generator[Loaded, None, None]:
    """Yields `load(item)` for every item, in order, from threads that work ahead; closing it ends them.

    Args:
      load: called in a thread. An exception in it is raised here and ends the iteration; FaultError if it hangs.
      items: the items to load.
      threads: number of threads; the results do not depend on it.
      ahead: approximate number of items to load ahead.
    """
    waiting: collections.deque[concurrent.futures.Future[list[Loaded]]] = collections.deque()
    pool, hangs = concurrent.futures.ThreadPoolExecutor(max(threads, 1)), False
    try:
        for start in range(0, len(items), _PIECE):
            waiting.append(pool.submit(lambda piece: list(map(load, piece)), items[start : start + _PIECE]))
            if len(waiting) > max(ahead // _PIECE, threads):
                yield from _within_patience(waiting.popleft())
        while waiting:
            yield from _within_patience(waiting.popleft())
    except FaultError:
        hangs = True
        raise
    finally:
        pool.shutdown(wait=not hangs, cancel_futures=True)
