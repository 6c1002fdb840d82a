"""Writes records to shards that TensorFlow Datasets can open, into a folder that appears complete or not at all.

TensorFlow Datasets is used to write the metadata, but not the shards: its own writers need TensorFlow for TFRecord
files and for splits above 1 GB, and keep a shard or a split in memory.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import naming

from data_prep import locks
from usfmae_jax.data.tfrecord import frame_tfrecord
from usfmae_jax.errors import InputError

SHARD_BYTES = 128 << 20


class UnusableInputError(InputError):
    """The input yields no dataset, so that resuming the build is pointless."""


@dataclasses.dataclass
class SplitWriter:
    """Writes the shards of one split, starting a new one whenever the last has reached `SHARD_BYTES`.

    Attributes:
      folder: output folder.
      name: of the dataset.
      split: name of the split.
      format: "array_record" or "tfrecord".
      lengths: number of records in each shard so far.
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

    def write(self, data: bytes) -> None:
        """Appends an encoded record."""
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
        """Completes the last shard and gives all shards their final names, which include their number."""
        with _as_os_error():
            self._close_shard()
        for index in range(len(self.lengths)):
            self._path("incomplete", index).rename(self._path(f"{len(self.lengths):05d}", index))

    def info(self) -> tfds.core.SplitInfo:
        """Description of the split for TensorFlow Datasets."""
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
    # One record per group: training reads single records in random order.
    return array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # ArrayRecord raises "write() failed: No space left on device; writing ..."
        raise OSError(str(error).split(";")[0].split(": ", 1)[-1]) from error


def write_metadata(
    writers: Sequence[SplitWriter], version: str, label_names: Sequence[str], channels: int, **texts: str
) -> None:
    """Writes the metadata of finished splits beside their shards, for TensorFlow Datasets.

    Args:
      writers: of the splits, closed.
      version: of the dataset, such as "1.0.0".
      label_names: class names in the order of their numbers.
      channels: 1 if all images are grey, else 3; TensorFlow Datasets then decodes all images in colour.
      **texts: description, citation and homepage.
    """
    one = writers[0]
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=one.name,
            version=tfds.core.Version(version),
            data_dir=os.fspath(one.folder),
            module_name="data_prep.build",
            release_notes={version: "Prepared with python -m data_prep.build."},
        ),
        features=_features(label_names, channels),
        supervised_keys=("image", "label"),
        disable_shuffling=True,  # tfds must not reorder; the input pipeline shuffles
        **{name: text or None for name, text in texts.items()},
    )
    info.set_file_format(one.format)
    info.set_splits(tfds.core.splits.SplitDict([writer.info() for writer in writers]))
    info.write_to_directory(one.folder)


def _features(label_names: Sequence[str], channels: int) -> tfds.features.FeaturesDict:
    # Without names, no file of names is written, which is how readers know that there are no classes.
    names = {"names": list(label_names)} if label_names else {"num_classes": 0}
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, channels), doc="one channel when the source is grey"),
            "height": tfds.features.Scalar(np.int64),
            "width": tfds.features.Scalar(np.int64),
            "dataset": tfds.features.Text(),
            "anatomy": tfds.features.Text(),
            "patient": tfds.features.Text(doc="an unknown patient is its own"),
            "video": tfds.features.Text(doc="a still is its own"),
            "frame": tfds.features.Text(),
            "label": tfds.features.ClassLabel(doc="-1 = none", **names),
            # Bytes, because TensorFlow Datasets has no optional images.
            "mask": tfds.features.Tensor(shape=(), dtype=np.object_, doc="PNG as large as the image, or empty"),
            "spacing": tfds.features.Tensor(
                shape=(2,), dtype=np.float32, doc="mm from pixel to pixel, down and across; 0 = not known"
            ),
            "source": tfds.features.Text(doc="path inside the dataset"),
            "sha256": tfds.features.Text(doc="of the pixels as decoded from the source"),
        }
    )


@contextlib.contextmanager
def workplace(target: pathlib.Path, key: str) -> Iterator[pathlib.Path]:
    """Yields the hidden folder beside `target` in which it is built, with the work of an interrupted build.

    The block should end with `publish`. If it is interrupted before that, or the disk is full, the folder is kept, with
    'incomplete' in its name, so that nothing opens it and the next build can resume. After an `UnusableInputError`
    there is nothing to resume, and the folder is removed.

    Args:
      target: folder NAME/VERSION; both levels belong to the build.
      key: identifies what is built; work left by a build with another key is removed.

    Raises:
      InputError: another build of the same dataset is running.
    """
    parents = [folder for folder in (target.parent.parent, target.parent) if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.incomplete")
    try:
        taken = f"another build is writing to {target.parent}; wait for it, or choose another --name"
        with locks.hold(target.parent, taken):
            note = folder / "key"
            if folder.exists() and not (note.exists() and note.read_text() == key):
                shutil.rmtree(folder)
            folder.mkdir(mode=0o700, exist_ok=True)  # its content may name patients
            note.write_text(key)
            try:
                yield folder
            except BaseException as error:
                nothing = {path.name for path in folder.iterdir()} <= {note.name}
                if nothing or isinstance(error, UnusableInputError):
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        for parent in reversed(parents):
            with contextlib.suppress(OSError):  # not empty: work to resume, or files of others
                parent.rmdir()
        raise


def publish(folder: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    """Renames a finished folder to `target`, replacing an existing one only if `overwrite` is true.

    Raises:
      InputError: `target` appeared in the meantime.
    """
    old = folder.with_name(folder.name + "-old")
    if overwrite and target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError as error:
        if old.exists():
            old.rename(target)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise InputError(f"{target} appeared while this build was at work; add --overwrite to replace it") from error
    shutil.rmtree(old, ignore_errors=True)
