"""All records of some shards as one table: what splits, tasks and evaluation choose rows from."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from tqdm import tqdm

from usfmae_jax.data import augment
from usfmae_jax.data.pipeline import decode_ahead, open_sources
from usfmae_jax.data.provenance import read_manifest
from usfmae_jax.data.records import Record, Shards, dataset_name, decode_image, decode_record
from usfmae_jax.errors import DamagedRecord, InputError

_SPLIT = re.compile(r"-([^-./]+)\.(?:array_record|tfrecord)")
_TEXTS = ("dataset", "patient", "video", "frame", "source", "sha256")
_COLUMNS = ("index", "label", "digest", "split", *_TEXTS)
MAX_CLASSES = 100_000
_ROOM = 1 << 28  # bytes that a column may take whatever its texts are
_MANY = 20_000  # records from which reading takes long enough to show progress


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Frames, one a row, in the order of the shards. N = number of rows.

    Attributes:
      shards: where the records lie.
      index: int64 `[N]`, record number in `shards`.
      label: int64 `[N]`; -1 = none.
      digest: uint8 `[N, 32]`, SHA-256 of the encoded image; `sha256` is of its source, before it was cleaned.
      split: str `[N]`, TFDS split by the shard's name; empty where it names none.
      dataset: str `[N]`, as all below; the shard's name where the record has none.
      patient: id as in the record; empty = unknown.
      video: likewise.
      frame: likewise.
      source: path inside the dataset.
      sha256: of the decoded pixels; may be empty in shards made by others.
      label_names: in the order of the labels; () where nobody says, or not all say the same.
      left_out: number of readable records that are no rows here, see `take`.
      damaged: number of records that cannot be read.
      path: the sources as they were asked for.
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
        """The table of some rows, int `[M]`, none of them twice."""
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return dataclasses.replace(self, **columns, left_out=self.left_out + len(self) - len(rows))

    @functools.cached_property
    def label_name(self) -> np.ndarray:
        """Every label's name, or its number where it has none; empty without a label; str `[N]`."""
        labels, codes = np.unique(self.label, return_inverse=True)
        named = [self.label_names[one] if 0 <= one < len(self.label_names) else str(one) for one in labels.tolist()]
        return np.asarray(["" if one < 0 else name for one, name in zip(labels, named, strict=True)], np.str_)[codes]

    @functools.cached_property
    def video_key(self) -> np.ndarray:
        """'dataset/video', unique over datasets; an unknown video is its frame's own; str `[N]`."""
        return self._key(self.video)

    @functools.cached_property
    def patient_key(self) -> np.ndarray:
        """'dataset/patient', unique over datasets; an unknown patient is its video's own; str `[N]`."""
        return self._key(np.where(self.patient == "", self.video, self.patient))

    @functools.cached_property
    def frame_key(self) -> np.ndarray:
        """A name for every row: frame, video/frame or dataset/video/frame, the first that is unique; str `[N]`."""
        long = _join(self.video, self.frame)
        for key in (self.frame, long, _join(self.dataset, long)):
            if len(np.unique(key)) == len(key) and "" not in key:
                return key
        return _join(self.dataset, _join(long, self.index.astype(str)))

    @functools.cached_property
    def frame_name(self) -> np.ndarray:
        """The frame as files name it beside dataset and video: its id where those three are unique; str `[N]`."""
        ids = np.stack([self.dataset, self.video, self.frame], axis=1)
        return self.frame if len(np.unique(ids, axis=0)) == len(self) else self.frame_key

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change with rows, labels, ids and pixels, and not with where files lie."""
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
    """Reads what all records say of themselves, without decoding an image; damaged ones are left out and counted.

    Args:
      paths: sources with commas between them, see `records.open_shards`.
      split: only shards of this TFDS split; empty takes all.

    Raises:
      InputError: nothing to read.
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
        match = _SPLIT.search(path.rpartition("/")[2])
        record["dataset"] = record["dataset"] or dataset_name(path)
        record["split"] = match[1] if match else ""
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
    """Texts as an array, in which each takes the room of the longest; raises InputError where that is no id."""
    longest = max(map(len, values), default=0)
    if 4 * longest * len(values) > _ROOM + 16 * sum(map(len, values)):
        raise InputError(
            f"{name} of a record in {paths} has {longest:,} letters, far more than those of the others: is it an id?"
        )
    return np.asarray(values, np.str_)


def folders(frames: Table) -> list[str]:
    """The folders that the rows come from."""
    return sorted({frames.shards.locate(number)[0].rpartition("/")[0] for number in frames.index.tolist()})


def names_beside(folder: str) -> tuple[str, ...]:
    """Class names from the `label.labels.txt` or `manifest.json` beside shards; () where neither says.

    Raises:
      InputError: the file of names is no text, or has more than `MAX_CLASSES`.
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
    """The frames of `rows`, whole, in order, decoded by threads that work ahead.

    Args:
      frames: the table.
      rows: which of its rows, in any order.
      size: (height, width) of the images; the aspect is not kept.
      channels: 1 or 3.
      batch_size: images at a time; the last batch is what remains.
      threads: that decode. What comes out does not depend on them.

    Yields:
      uint8 `[n, H, W, C]`.

    Raises:
      InputError: an image is damaged; says which.
    """
    cv2.setNumThreads(1)  # the parallelism is over images

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
    """One frame, whole, in `size`: uint8 `[H, W, C]`; raises InputError if it is damaged."""
    try:
        pixels = decode_image(read_row(frames, row)["image"], channels)
    except DamagedRecord as error:
        path, number = frames.shards.locate(int(frames.index[row]))
        raise InputError(f"record number {number} of {path} is damaged: {error}; rebuild the shards") from error
    return augment.resize(pixels, size)
