"""The labelled frames of some shards as one table: what splits, fine-tuning and evaluation choose rows from."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from etils import epath
from tqdm import tqdm

from usfmae_jax.data import augment
from usfmae_jax.data.pipeline import open_sources
from usfmae_jax.data.provenance import read_manifest
from usfmae_jax.data.records import Record, Shards, dataset_name, decode_image, decode_record
from usfmae_jax.errors import DamagedRecord, InputError

_SPLIT = re.compile(r"-([^-./]+)\.(?:array_record|tfrecord)")
_TEXTS = ("dataset", "patient", "video", "frame", "source", "sha256")
_MANY = 20_000  # records from which reading takes long enough to show progress
_PIECE = 16  # images that a thread decodes at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Frames with a label, one a row, in the order of the shards. N = number of rows.

    Attributes:
      shards: where the records lie.
      index: int64 `[N]`, record number in `shards`.
      label: int64 `[N]`, in [0, C).
      dataset: str `[N]`, as all below; the shard's name where the record has none.
      patient: id as in the record; empty = unknown.
      video: likewise.
      frame: likewise.
      source: path inside the dataset.
      split: TFDS split by the shard's name; empty where it names none.
      sha256: of the decoded pixels; may be empty in shards made by others.
      class_names: C names, in the order of the labels.
      unlabelled: number of records that were left out since they have no label.
      damaged: number of records that were left out since they cannot be read.
      stored: SHA-256 of all encoded images; `sha256` is of their sources, before they were cleaned and shrunk.
    """

    shards: Shards
    index: np.ndarray
    label: np.ndarray
    dataset: np.ndarray
    patient: np.ndarray
    video: np.ndarray
    frame: np.ndarray
    source: np.ndarray
    split: np.ndarray
    sha256: np.ndarray
    class_names: tuple[str, ...]
    unlabelled: int = 0
    damaged: int = 0
    stored: str = ""

    def __len__(self) -> int:
        return len(self.index)

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
        digest = hashlib.sha256(json.dumps([self.shards.contents(), self.class_names]).encode())
        digest.update(self.stored.encode())
        digest.update(np.stack([self.index, self.label]).astype("<i8").tobytes())
        for name in _TEXTS:
            digest.update("\n".join(getattr(self, name)).encode())
        return digest.hexdigest()[:12]

    def _key(self, ids: np.ndarray) -> np.ndarray:
        own = np.where(self.source == "", np.char.add("#", self.index.astype(str)), self.source)
        return _join(self.dataset, np.where(ids == "", own, ids))


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.char.add(np.char.add(a, "/"), b)


def read_labelled(paths: str, split: str = "", classes: Sequence[str] = ()) -> Labelled:
    """Reads what all records say of themselves, without decoding an image.

    Args:
      paths: sources with commas between them, see `records.open_shards`.
      split: only shards of this TFDS split; empty takes all.
      classes: the class names that are expected, in order; empty takes what is there. Case does not count.

    Raises:
      InputError: nothing to read, no labels, one class only, a label outside the class list, or sources (or `classes`)
        that disagree about the classes.
    """
    files = [path for source in open_sources(paths, split or None) for path in source.paths]
    shards = Shards(list(dict.fromkeys(files)))
    found: dict[str, list[str]] = collections.defaultdict(list)
    index, label, unlabelled, damaged, stored = [], [], 0, 0, hashlib.sha256()
    for number in tqdm(range(len(shards)), "reading ids", unit="record", disable=len(shards) <= _MANY):
        try:
            record = decode_record(shards[number])
        except DamagedRecord:
            damaged += 1
            continue
        if record["label"] < 0:
            unlabelled += 1
            continue
        path, _ = shards.locate(number)
        record["dataset"] = record["dataset"] or dataset_name(path)
        for name in _TEXTS:
            found[name].append(record[name])
        match = _SPLIT.search(path.rpartition("/")[2])
        found["split"].append(match[1] if match else "")
        found["folder"].append(path.rpartition("/")[0])
        index.append(number)
        label.append(record["label"])
        stored.update(hashlib.sha256(record["image"]).digest())
    if not index:
        raise InputError(f"config.data.path={paths!r} has no labels in {len(shards)} records; build it with --labels")
    names = _class_names(sorted(set(found.pop("folder"))), max(label), classes)
    if len(set(label)) < 2:
        raise InputError(
            f"config.data.path={paths!r} has labelled frames of one class only, {names[label[0]]!r}; "
            "two or more are needed"
        )
    texts = {name: np.asarray(values, np.str_) for name, values in found.items()}
    return Labelled(
        shards,
        np.asarray(index),
        np.asarray(label),
        **texts,
        class_names=names,
        unlabelled=unlabelled,
        damaged=damaged,
        stored=stored.hexdigest(),
    )


def _class_names(folders: Sequence[str], highest: int, expected: Sequence[str]) -> tuple[str, ...]:
    """The one list of names that all folders of shards agree on, and the person, if they said."""
    lists = {folder: names_beside(folder) for folder in folders}
    named = {folder: names for folder, names in lists.items() if names}
    first = next(iter(named.values()), ())
    for names in named.values():
        if names != first:
            raise InputError(
                f"sources have different classes: {', '.join(first)} and {', '.join(names)}; name one of them only in "
                "config.data.path, or build them with the same labels"
            )
    if named and len(named) < len(lists) and not expected:
        raise InputError(
            "some sources name their classes and others do not; say with config.classes what all of them have: "
            f"{', '.join(first)}?"
        )
    if named and expected and [name.casefold() for name in first] != [name.casefold() for name in expected]:
        raise InputError(
            f"config.classes={','.join(expected)} but the shards have the classes {','.join(first)}; they must be the "
            "same in the same order"
        )
    names = first or tuple(expected) or tuple(map(str, range(highest + 1)))
    if highest >= len(names):
        raise InputError(
            f"label {highest} is outside the class list, whose {len(names)} names are {', '.join(names)} (0 to "
            f"{len(names) - 1}); build the shards again, or set config.classes"
        )
    return names


def names_beside(folder: str) -> tuple[str, ...]:
    """Class names from the `label.labels.txt` or `manifest.json` beside shards; () where neither says."""
    try:
        text = (epath.Path(folder or ".") / "label.labels.txt").read_text()
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return tuple(lines or map(str, read_manifest(folder or ".").get("label_names") or ()))


def images(
    frames: Labelled,
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
    rows = np.asarray(rows, np.int64)

    def fill(batch: np.ndarray, chosen: np.ndarray) -> None:
        for place, row in enumerate(chosen):
            batch[place] = whole_image(frames, int(row), size, channels)

    ahead: collections.deque[tuple[np.ndarray, list[concurrent.futures.Future[None]]]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(max(threads, 1))
    try:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            batch = np.empty((len(chosen), *size, channels), np.uint8)
            pieces = [slice(i, i + _PIECE) for i in range(0, len(chosen), _PIECE)]
            ahead.append((batch, [pool.submit(fill, batch[piece], chosen[piece]) for piece in pieces]))
            if len(ahead) > 2:
                yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(batch: np.ndarray, pieces: list[concurrent.futures.Future[None]]) -> np.ndarray:
    for piece in pieces:
        piece.result()
    return batch


def read_row(frames: Labelled, row: int) -> Record:
    """The whole record of a row, image and mask included."""
    return decode_record(frames.shards[int(frames.index[row])])


def whole_image(frames: Labelled, row: int, size: tuple[int, int], channels: int) -> np.ndarray:
    """One frame, whole, in `size`: uint8 `[H, W, C]`; raises InputError if it is damaged."""
    try:
        pixels = decode_image(read_row(frames, row)["image"], channels)
    except DamagedRecord as error:
        path, number = frames.shards.locate(int(frames.index[row]))
        raise InputError(f"record number {number} of {path} is damaged: {error}; rebuild the shards") from error
    return augment.resize(pixels, size)
