"""Records to a folder that TensorFlow Datasets opens: shards, metadata, and all of it at once or not at all.

TensorFlow Datasets writes the metadata (`tfds.core.DatasetInfo`) and names the files, but not the shards: its own
writers need TensorFlow for TFRecord files and for splits above 1 GB, and keep a shard or a split in memory.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info, naming

from usfmae_jax.data.records import Record, encode_record
from usfmae_jax.data.tfrecord import frame_tfrecord
from usfmae_jax.errors import InputError

FORMATS = ("array_record", "tfrecord")
SHARD_BYTES = 128 << 20


@dataclasses.dataclass
class SplitWriter:
    """Writes the shards of one split, a new one whenever the last has `SHARD_BYTES`.

    Attributes:
      folder: where they go.
      name: of the dataset.
      split: of the dataset.
      format: one of `FORMATS`.
      lengths: records per shard so far.
      size: bytes of all records so far.
    """

    folder: pathlib.Path
    name: str
    split: str
    format: str
    lengths: list[int] = dataclasses.field(default_factory=list)
    size: int = 0
    _shard: Any = None
    _shard_size: int = 0

    def write(self, record: Record) -> None:
        """Appends a record."""
        data = encode_record(record)
        with _as_os_error():
            if self._shard is None or self._shard_size >= SHARD_BYTES:
                self._close_shard()
                self._shard = _open_shard(self._path("incomplete", len(self.lengths)), self.format)
                self.lengths.append(0)
                self._shard_size = 0
            self._shard.write(data)
        self.lengths[-1] += 1
        self._shard_size += len(data)
        self.size += len(data)

    def close(self) -> None:
        """Completes the last shard and gives all their final names, which hold how many there are."""
        with _as_os_error():
            self._close_shard()
        for index in range(len(self.lengths)):
            self._path("incomplete", index).rename(self._path(f"{len(self.lengths):05d}", index))

    def info(self) -> tfds.core.SplitInfo:
        """The split as TensorFlow Datasets describes it."""
        template = naming.ShardedFileTemplate(
            data_dir=self.folder, dataset_name=self.name, split=self.split, filetype_suffix=self.format
        )
        return tfds.core.SplitInfo(
            name=self.split, shard_lengths=self.lengths, num_bytes=self.size, filename_template=template
        )

    def _path(self, count: str, index: int) -> pathlib.Path:
        return self.folder / f"{self.name}-{self.split}.{self.format}-{index:05d}-of-{count}"

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


class _TFRecordWriter:
    def __init__(self, path: pathlib.Path):
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(frame_tfrecord(data))

    def close(self) -> None:
        self._file.close()


def _open_shard(path: pathlib.Path, file_format: str) -> Any:
    if file_format == "tfrecord":
        return _TFRecordWriter(path)
    # One record a group: training reads single records in random order.
    return array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what ArrayRecord raises: "write() failed: No space left on device; writing ..."
        raise OSError(str(error).split(";")[0].split(": ", 1)[-1]) from error


def write_metadata(
    folder: pathlib.Path,
    writers: Mapping[str, SplitWriter],
    *,
    name: str,
    version: str,
    description: str,
    label_names: list[str],
    channels: int,
) -> None:
    """Writes `dataset_info.json`, `features.json` and, if there are classes, `label.labels.txt`.

    Args:
      folder: with the shards.
      writers: per split, closed.
      name: of the dataset.
      version: of the dataset, "1.0.0".
      description: of the dataset.
      label_names: class names in the order of their numbers.
      channels: 1 if all images are grey, else 3, and then TensorFlow Datasets shows all in colour.
    """
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, channels), doc="one channel when the source is grey"),
            "height": tfds.features.Scalar(np.int64),
            "width": tfds.features.Scalar(np.int64),
            "dataset": tfds.features.Text(),
            "anatomy": tfds.features.Text(),
            "patient": tfds.features.Text(doc="an unknown patient is its own"),
            "video": tfds.features.Text(doc="a still is its own"),
            "frame": tfds.features.Text(),
            "label": _label_feature(label_names),
            # Bytes, because TensorFlow Datasets has no image that may be absent.
            "mask": tfds.features.Tensor(shape=(), dtype=np.object_, doc="PNG as large as the image, or empty"),
            "source": tfds.features.Text(doc="path inside the dataset"),
            "sha256": tfds.features.Text(doc="of the pixels as decoded from the source"),
        }
    )
    identity = dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(version),
        data_dir=os.fspath(folder),
        module_name="data_prep.build",
        release_notes={version: "First build."},
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=description,
        features=features,
        supervised_keys=("image", "label"),
        disable_shuffling=True,  # the records are in the order of their sources; the input pipeline shuffles
    )
    info.set_file_format(next(iter(writers.values())).format)
    info.set_splits(tfds.core.splits.SplitDict([writer.info() for writer in writers.values()]))
    info.write_to_directory(folder)


def _label_feature(names: list[str]) -> tfds.features.ClassLabel:
    doc = "-1 = none"
    # Without names no file of names is written, which is how others tell that there are no classes.
    return tfds.features.ClassLabel(names=names, doc=doc) if names else tfds.features.ClassLabel(num_classes=0, doc=doc)


@contextlib.contextmanager
def all_or_nothing(target: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yields an empty folder that becomes `target` if the block succeeds, and is gone without a trace if it fails.

    A killed process leaves a hidden folder with 'incomplete' in its name: nobody opens it, the next build removes it.

    Args:
      target: two levels of folders, NAME/VERSION, that belong to the build.
      overwrite: replace `target` if it is there.

    Raises:
      InputError: another build is at work on the same dataset, or `target` appeared meanwhile.
    """
    parents = [folder for folder in (target.parent.parent, target.parent) if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(target.parent) as locked:
            if locked:
                for leftover in target.parent.glob(".*.incomplete-*"):
                    shutil.rmtree(leftover)
            folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.incomplete-", dir=target.parent))
            try:
                folder.chmod(target.parent.stat().st_mode & 0o777)  # mkdtemp's is for the owner alone
                yield folder
                _move(folder, target, overwrite)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        for parent in reversed(parents):
            with contextlib.suppress(OSError):  # not empty: someone else is there
                parent.rmdir()
        raise


def _move(folder: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    old = folder.with_name(folder.name + "-old")
    if overwrite and target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError as error:
        raise InputError(f"{target} appeared while this build was at work; add --overwrite to replace it") from error
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[bool]:
    """Holds a folder for this process; False where the file system knows no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another build is writing to {folder}; wait for it, or choose another --name") from error
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)  # also unlocks
