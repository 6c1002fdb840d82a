"""All records of some shards as one table, from which splits, tasks and evaluation select rows."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from tqdm import tqdm

from usfmae_jax.data import augment
from usfmae_jax.data.pipeline import decode_ahead, open_sources
from usfmae_jax.data.provenance import read_manifest
from usfmae_jax.data.records import Record, Shards, dataset_name, decode_image, decode_record, split_name
from usfmae_jax.errors import DamagedRecord, InputError

_TEXTS = ("dataset", "patient", "video", "frame", "source", "sha256")
_COLUMNS = ("index", "label", "digest", "split", *_TEXTS)
MAX_CLASSES = 100_000
_ROOM = 1 << 28  # bytes that a column may always take, whatever its texts
_MANY = 20_000  # number of records above which progress is shown


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Frames, one per row, in the order of the shards. N = number of rows.

    Attributes:
      shards: the shards of the records.
      index: int64 `[N]`, index of the record in `shards`.
      label: int64 `[N]`; -1 = none.
      digest: uint8 `[N, 32]`, SHA-256 of the encoded image; `sha256` is that of its source, before cleaning.
      split: str `[N]`, TFDS split from the shard's name; empty if it has none.
      dataset: str `[N]`, as all below; taken from the shard's name if the record has none.
      patient: id as in the record; empty = unknown.
      video: likewise.
      frame: likewise.
      source: path within the dataset.
      sha256: hash of the decoded pixels; may be empty in shards made by others.
      label_names: in the order of the labels; () if not given, or if folders disagree.
      left_out: number of readable records that are not rows of this table, see `take`.
      damaged: number of unreadable records.
      path: the sources as requested.
    """

    shards: Shards
    index: np.ndarray
    label: np.ndarray
    digest: np.ndarray
    split: np.ndarray
    dataset: np.ndarray
    patient: np.ndarray
    video: np.ndarray
    frame: np.ndarray
    source: np.ndarray
    sha256: np.ndarray
    label_names: tuple[str, ...] = ()
    left_out: int = 0
    damaged: int = 0
    path: str = ""

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: np.ndarray) -> "Table":
        """The table with only the given rows, int `[M]`, without repeats."""
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return dataclasses.replace(self, **columns, left_out=self.left_out + len(self) - len(rows))

    @functools.cached_property
    def label_name(self) -> np.ndarray:
        """The name of each label, or its number if it has no name; empty without a label; str `[N]`."""
        labels, codes = np.unique(self.label, return_inverse=True)
        named = [self.label_names[one] if 0 <= one < len(self.label_names) else str(one) for one in labels.tolist()]
        return np.asarray(["" if one < 0 else name for one, name in zip(labels, named, strict=True)], np.str_)[codes]

    @functools.cached_property
    def video_key(self) -> np.ndarray:
        """'dataset/video', unique over datasets; frames of unknown video have one each; str `[N]`."""
        return self._key(self.video)

    @functools.cached_property
    def patient_key(self) -> np.ndarray:
        """'dataset/patient', unique over datasets; videos of unknown patient have one each; str `[N]`."""
        return self._key(np.where(self.patient == "", self.video, self.patient))

    @functools.cached_property
    def frame_key(self) -> np.ndarray:
        """A name for each row: frame, video/frame or dataset/video/frame, the first that is unique; str `[N]`."""
        long = _join(self.video, self.frame)
        for key in (self.frame, long, _join(self.dataset, long)):
            if len(np.unique(key)) == len(key) and "" not in key:
                return key
        return _join(self.dataset, _join(long, self.index.astype(str)))

    @functools.cached_property
    def frame_name(self) -> np.ndarray:
        """The name of each frame in files with dataset and video: its id if the three are unique; str `[N]`."""
        ids = np.stack([self.dataset, self.video, self.frame], axis=1)
        return self.frame if len(np.unique(ids, axis=0)) == len(self) else self.frame_key

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change with rows, labels, ids and pixels, but not with the location of the files."""
        digest = hashlib.sha256(json.dumps([self.shards.contents(), self.label_names]).encode())
        digest.update(hashlib.sha256(self.digest.tobytes()).hexdigest().encode())
        digest.update(np.stack([self.index, self.label]).astype("<i8").tobytes())
        for name in _TEXTS:
            digest.update("\n".join(getattr(self, name)).encode())
        return digest.hexdigest()[:12]

    def _key(self, ids: np.ndarray) -> np.ndarray:
        own = np.where(self.source == "", np.char.add("#", self.index.astype(str)), self.source)
        return _join(self.dataset, np.where(ids == "", own, ids))


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.char.add(np.char.add(a, "/"), b)


def read_table(paths: str, split: str = "") -> Table:
    """Reads the metadata of all records, without decoding images; damaged ones are left out and counted.

    Args:
      paths: sources separated by commas, see `records.open_shards`.
      split: only shards of this TFDS split; "" = all.

    Raises:
      InputError: there is nothing to read.
    """
    files = [path for source in open_sources(paths, split or None) for path in source.paths]
    shards = Shards(list(dict.fromkeys(files)))
    texts: dict[str, list[str]] = {name: [] for name in ("split", *_TEXTS)}
    index, label, digests = [], [], []
    for number in tqdm(range(len(shards)), "reading ids", unit="record", disable=len(shards) <= _MANY):
        try:
            record = decode_record(shards[number])
        except DamagedRecord:
            continue
        path, _ = shards.locate(number)
        record["dataset"] = record["dataset"] or dataset_name(path)
        record["split"] = split_name(path)
        for name, values in texts.items():
            values.append(record[name])
        index.append(number)
        label.append(record["label"])
        digests.append(hashlib.sha256(record["image"]).digest())
    columns: dict[str, Any] = {name: _column(paths, name, values) for name, values in texts.items()}
    columns["index"], columns["label"] = np.asarray(index, np.int64), np.asarray(label, np.int64)
    columns["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    table = Table(shards, **columns, damaged=len(shards) - len(index), path=paths)
    named = {names for folder in folders(table) if (names := names_beside(folder))}
    return dataclasses.replace(table, label_names=named.pop() if len(named) == 1 else ())


def _column(paths: str, name: str, values: list[str]) -> np.ndarray:
    """Texts as an array, in which each takes as much memory as the longest; raises InputError if that is too much."""
    longest = max(map(len, values), default=0)
    if 4 * longest * len(values) > _ROOM + 16 * sum(map(len, values)):
        raise InputError(
            f"{name} of a record in {paths} has {longest:,} letters, far more than those of the others: is it an id?"
        )
    return np.asarray(values, np.str_)


def folders(frames: Table) -> list[str]:
    """The folders of the rows' shards."""
    return sorted({frames.shards.locate(number)[0].rpartition("/")[0] for number in frames.index.tolist()})


def names_beside(folder: str) -> tuple[str, ...]:
    """Class names from the `label.labels.txt` or `manifest.json` beside shards; () if neither has them.

    Raises:
      InputError: the file of names is not text, or has more than `MAX_CLASSES`.
    """
    try:
        text = (epath.Path(folder or ".") / "label.labels.txt").read_text()
    except OSError:
        text = ""
    except UnicodeDecodeError as error:
        raise InputError(f"{folder or '.'}/label.labels.txt is no text in UTF-8: write a class name a line") from error
    names: Any = [line.strip() for line in text.splitlines() if line.strip()]
    names = names or read_manifest(folder or ".").get("label_names")
    if not isinstance(names, list):
        return ()
    if len(names) > MAX_CLASSES:
        raise InputError(
            f"{folder or '.'} names {len(names):,} classes, more than {MAX_CLASSES:,}: is it a class list?"
        )
    return tuple(map(str, names))


def images(
    frames: Table,
    rows: Sequence[int] | np.ndarray,
    *,
    size: tuple[int, int],
    channels: int,
    batch_size: int,
    threads: int = 2,
) -> Iterator[np.ndarray]:
    """Yields the whole frames of `rows`, in order, decoded ahead in threads.

    Args:
      frames: table of the frames.
      rows: rows of the table, in any order.
      size: (height, width) of the images; the aspect ratio is not kept.
      channels: 1 or 3.
      batch_size: images per batch; the last batch may be smaller.
      threads: decoding threads; the results do not depend on their number.

    Yields:
      uint8 `[n, H, W, C]`.

    Raises:
      InputError: an image is damaged; the message names it.
    """
    cv2.setNumThreads(1)  # images are processed in parallel instead

    def load(row: int) -> np.ndarray:
        return whole_image(frames, row, size, channels)

    with contextlib.closing(
        decode_ahead(load, np.asarray(rows, np.int64).tolist(), threads, 2 * batch_size)
    ) as decoded:
        while batch := list(itertools.islice(decoded, batch_size)):
            yield np.stack(batch)


def read_row(frames: Table, row: int) -> Record:
    """The whole record of a row, image and mask included."""
    return decode_record(frames.shards[int(frames.index[row])])


def whole_image(frames: Table, row: int, size: tuple[int, int], channels: int) -> np.ndarray:
    """One whole frame, resized to `size`: uint8 `[H, W, C]`; raises InputError if it is damaged."""
    try:
        pixels = decode_image(read_row(frames, row)["image"], channels)
    except DamagedRecord as error:
        path, number = frames.shards.locate(int(frames.index[row]))
        raise InputError(f"record number {number} of {path} is damaged: {error}; rebuild the shards") from error
    return augment.resize(pixels, size)
