"""From shards to batches: deterministic, host-sharded, resumable at any batch.

What batch `step` holds follows from (seed, step) and the shards alone, not from the number of workers, hosts or
restarts: all randomness is drawn per position in one endless global sequence, and every host takes its own rows of
each batch.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import cv2
import grain
import numpy as np

from usfmae_jax.data import augment
from usfmae_jax.data.records import Record, Shards, decode_image, decode_record, open_shards
from usfmae_jax.errors import DamagedRecord, InputError

#: How many records may be tried for one place in a batch before the data counts as unreadable.
MAX_TRIES = 8

Batch = dict[str, np.ndarray]


def open_sources(paths: str, split: str | None, exclude: Sequence[str] = ()) -> list[Shards]:
    """Opens a comma-separated list of sources; see `records.open_shards`."""
    return [open_shards(path.strip(), split, exclude) for path in paths.split(",")]


@dataclasses.dataclass(frozen=True)
class LoadView(grain.transforms.RandomMap):
    """(source, record) to one training view; a damaged record is replaced by another one of its source.

    Attributes:
      sources: what the record numbers refer to.
      size: (height, width) of the view.
      channels: 1 for grey, 3 for colour.
      how: the augmentation.
    """

    sources: Sequence[Shards]
    size: tuple[int, int]
    channels: int
    how: augment.Augmentation

    def random_map(self, element: tuple[int, int], rng: np.random.Generator) -> Batch:
        """Returns `image` uint8 `[H, W, C]` and `damaged` int64 `[MAX_TRIES, 2]`: (source, record) or -1."""
        cv2.setNumThreads(1)  # the parallelism is over images
        source, index = element
        damaged = np.full((MAX_TRIES, 2), -1, np.int64)
        for attempt in range(MAX_TRIES):
            try:
                image = self.draw(decode_record(self.sources[source][index]), rng)
            except DamagedRecord:
                damaged[attempt] = source, index
                index = int(rng.integers(len(self.sources[source])))
            else:
                return {"image": image, "damaged": damaged}
        path, number = self.sources[source].locate(index)
        raise InputError(
            f"{MAX_TRIES} records in a row are damaged, the last is number {number} of {path}; rebuild the shards"
        )

    def draw(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        """One view of a record: uint8 `[H, W, C]`; raises DamagedRecord."""
        pixels = None
        height, width = record["height"], record["width"]
        if not (height and width):  # shards made by others may not say
            pixels = decode_image(record["image"], self.channels)
            height, width = pixels.shape[:2]
        matrix = augment.random_view(rng, height, width, self.size, self.how)
        if pixels is None:
            pixels = decode_image(record["image"], self.channels, augment.reduction(matrix))
            matrix = augment.shrink_view(matrix, height / pixels.shape[0])
        return augment.adjust(augment.warp(pixels, matrix, self.size, self.how.interpolation), rng, self.how)


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


def training_dataset(
    sources: Sequence[Shards],
    *,
    size: tuple[int, int],
    channels: int,
    batch_size: int,
    how: augment.Augmentation,
    seed: int,
    weights: Sequence[float] = (),
    host: int = 0,
    hosts: int = 1,
) -> grain.MapDataset:
    """The endless sequence of this host's batches; `dataset[step]` is random access.

    Args:
      sources: opened shards, one or several.
      size: (height, width) of the views.
      channels: 1 or 3.
      batch_size: of the global batch, over all hosts.
      how: augmentation.
      seed: fixes order and augmentation.
      weights: share of each source in the mixture; empty = by their sizes.
      host: number of this host.
      hosts: how many there are; must divide `batch_size`.

    Raises:
      InputError: hosts do not divide the batch, or weights do not fit the sources.
    """
    if batch_size % hosts:
        raise InputError(f"a batch of {batch_size} cannot be divided among {hosts} hosts")
    weights = list(weights) or [len(source) for source in sources]
    if len(weights) != len(sources) or min(weights) <= 0:
        raise InputError(f"config.data.weights needs {len(sources)} positive numbers, one per source, not {weights}")
    orders = [
        grain.MapDataset.range(len(source)).seed(seed + number).shuffle().repeat().map(_Pair(number))
        for number, source in enumerate(sources)
    ]
    mixed = (
        grain.MapDataset.mix(orders, [weight / sum(weights) for weight in weights]) if len(orders) > 1 else orders[0]
    )
    views = mixed.seed(seed).random_map(LoadView(tuple(sources), size, channels, how))
    return HostRows(views, batch_size, host, hosts).batch(batch_size // hosts)


@dataclasses.dataclass(frozen=True)
class _Pair(grain.transforms.Map):
    source: int

    def map(self, element: int) -> tuple[int, int]:
        return self.source, int(element)


def iterate(dataset: grain.MapDataset, start: int, workers: int, threads: int = 2) -> grain.DatasetIterator[Batch]:
    """Batches from number `start` on, prepared ahead; to be closed, which ends the workers.

    Args:
      dataset: from `training_dataset`.
      start: first batch, 0 for a new run.
      workers: processes; 0 decodes in `threads` threads of this process, best when cores are few.
      threads: see above.
    """
    options = grain.ReadOptions(num_threads=max(threads, 1), prefetch_buffer_size=max(2 * threads, 2))
    if workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    batches = dataset[start:].to_iter_dataset(options)
    if workers:
        batches = batches.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    return iter(batches)


class DamageReport:
    """Counts damaged records, each once, and stops the run when they are more than a share of the data.

    Args:
      sources: what the numbers in batches refer to.
      limit: highest share of all records that may be damaged.
      known: pairs (source, record) found before a restart.
    """

    def __init__(self, sources: Sequence[Shards], limit: float, known: Sequence[Sequence[int]] = ()):
        self._sources, self._limit = sources, limit
        self.found = {(int(source), int(record)) for source, record in known}

    def update(self, damaged: np.ndarray) -> list[str]:
        """Takes a batch's `damaged` and returns a line for every record that was not known yet.

        Raises:
          InputError: the share is exceeded.
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


def load_labelled(shards: Shards, *, size: tuple[int, int], channels: int, limit: int) -> dict[str, Any]:
    """Decodes labelled frames whole, for a probe: at most `limit`, spread evenly over the shards.

    Returns:
      `image` uint8 `[N, H, W, C]`, `label` int `[N]`, `patient` list of N ids (made unique by their dataset).

    Raises:
      InputError: fewer than two classes are labelled.
    """
    found: dict[str, list[Any]] = collections.defaultdict(list)
    stride = max(1, -(-len(shards) // limit))
    for index in itertools.islice(range(0, len(shards), stride), limit):
        try:
            record = decode_record(shards[index])
            if record["label"] < 0:
                continue
            pixels = decode_image(record["image"], channels)
        except DamagedRecord:
            continue
        found["image"].append(augment.resize(pixels, size))
        found["label"].append(record["label"])
        found["patient"].append(f"{record['dataset']}/{record['patient'] or index}")
    if len(set(found["label"])) < 2:
        raise InputError("config.probe.data.path holds fewer than two labelled classes; build it with --labels")
    return {"image": np.stack(found["image"]), "label": np.asarray(found["label"]), "patient": found["patient"]}
