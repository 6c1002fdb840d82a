"""Batches of labelled frames for training, with the same promises as `pipeline`."""

import dataclasses
from collections.abc import Sequence

import cv2
import grain
import numpy as np

from usfmae_jax.data import augment
from usfmae_jax.data.pipeline import MAX_TRIES, Batch, HostRows, LoadView
from usfmae_jax.data.records import decode_record
from usfmae_jax.data.table import Labelled
from usfmae_jax.errors import DamagedRecord, InputError


@dataclasses.dataclass(frozen=True)
class LoadExample(grain.transforms.RandomMap):
    """A place in `rows` to one training view with its label; a damaged record is replaced by another one of `rows`.

    Attributes:
      frames: the table.
      rows: int64 `[R]`, the rows of it that are trained on.
      view: draws and decodes the view.
    """

    frames: Labelled
    rows: np.ndarray
    view: LoadView

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        """Returns `image` uint8 `[H, W, C]`, `label` int32 and `damaged` int64 `[MAX_TRIES, 2]`: (0, record) or -1."""
        cv2.setNumThreads(1)  # the parallelism is over images
        row = int(self.rows[element])
        damaged = np.full((MAX_TRIES, 2), -1, np.int64)
        for attempt in range(MAX_TRIES):
            index = int(self.frames.index[row])
            try:
                image = self.view.draw(decode_record(self.frames.shards[index]), rng)
            except DamagedRecord:
                damaged[attempt] = 0, index
                row = int(rng.choice(self.rows))
            else:
                return {"image": image, "label": np.asarray(self.frames.label[row], np.int32), "damaged": damaged}
        path, number = self.frames.shards.locate(index)
        raise InputError(
            f"{MAX_TRIES} records in a row are damaged, the last is number {number} of {path}; rebuild the shards"
        )


def supervised_dataset(
    frames: Labelled,
    rows: Sequence[int] | np.ndarray,
    *,
    size: tuple[int, int],
    channels: int,
    batch_size: int,
    how: augment.Augmentation,
    seed: int,
    host: int = 0,
    hosts: int = 1,
    balanced: bool = False,
) -> grain.MapDataset:
    """The endless sequence of this host's batches; `dataset[step]` is random access, see `pipeline.iterate`.

    A batch has `image` uint8 `[B, H, W, C]`, `label` int32 `[B]` and `damaged` int64 `[B, MAX_TRIES, 2]` for a
    `pipeline.DamageReport` of `[frames.shards]`. It follows from (rows, seed, step) alone. Every epoch is a fresh
    shuffle; the last incomplete batch of one runs over into the next.

    Args:
      frames: the table.
      rows: which of its rows to train on.
      size: (height, width) of the views.
      channels: 1 or 3.
      batch_size: of the global batch, over all hosts.
      how: augmentation.
      seed: fixes order and augmentation.
      host: number of this host.
      hosts: how many there are; must divide `batch_size`.
      balanced: show all classes equally often, by repeating the rare ones; an epoch is then as long as before.

    Raises:
      InputError: hosts do not divide the batch, or there are no rows.
    """
    if batch_size % hosts:
        raise InputError(f"a batch of {batch_size} cannot be divided among {hosts} hosts")
    rows = np.asarray(rows, np.int64)
    if not len(rows):
        raise InputError("there are no frames to train on; choose another split")
    places = [np.arange(len(rows))]
    if balanced:
        labels = frames.label[rows]
        places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    orders = [
        grain.MapDataset.source(chosen).seed(seed + number).shuffle().repeat() for number, chosen in enumerate(places)
    ]
    order = grain.MapDataset.mix(orders, [1 / len(orders)] * len(orders)) if len(orders) > 1 else orders[0]
    view = LoadView((frames.shards,), size, channels, how)
    return HostRows(order.seed(seed).random_map(LoadExample(frames, rows, view)), batch_size, host, hosts).batch(
        batch_size // hosts
    )
