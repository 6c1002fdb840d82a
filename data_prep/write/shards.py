"""Records to shards that TensorFlow Datasets opens, and a folder that appears at once or not at all.

TensorFlow Datasets names the files and writes the metadata, but not the shards: its own writers need TensorFlow for
TFRecord files and for splits above 1 GB, and keep a shard or a split in memory.
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
    """The input gives no dataset, whatever is done with it."""


@dataclasses.dataclass
class SplitWriter:
    """Writes the shards of one split, a new one whenever the last has `SHARD_BYTES`.

    Attributes:
      folder: where they go.
      name: of the dataset.
      split: of the dataset.
      format: "array_record" or "tfrecord".
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
    writers: Sequence[SplitWriter], version: str, label_names: Sequence[str], channels: int, **texts: str
) -> None:
    """Describes finished splits beside their shards, as a dataset that TensorFlow Datasets opens.

    Args:
      writers: of the splits, closed.
      version: "1.0.0".
      label_names: class names in the order of their numbers.
      channels: 1 if all images are grey, else 3, and then TensorFlow Datasets shows all in colour.
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
        disable_shuffling=True,  # whatever their order; the input pipeline shuffles
        **{name: text or None for name, text in texts.items()},
    )
    info.set_file_format(one.format)
    info.set_splits(tfds.core.splits.SplitDict([writer.info() for writer in writers]))
    info.write_to_directory(one.folder)


def _features(label_names: Sequence[str], channels: int) -> tfds.features.FeaturesDict:
    # Without names no file of names is written, which is how others tell that there are no classes.
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
            # Bytes, because TensorFlow Datasets has no image that may be absent.
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
    """Yields the hidden folder beside `target` in which it is built, with what an interrupted build left there.

    The block ends with `publish`. If it does not get so far because it was interrupted or the disk is full, the folder
    stays, with 'incomplete' in its name, so that nothing opens it and the next build goes on from there. After an
    `UnusableInputError` there is nothing to go on with, and no trace is left.

    Args:
      target: two levels of folders, NAME/VERSION, that belong to the build.
      key: of what is built; work on anything else is removed.

    Raises:
      InputError: another build is at work on the same dataset.
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
            folder.mkdir(mode=0o700, exist_ok=True)  # what lies here may name patients
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
            with contextlib.suppress(OSError):  # not empty: there is work to go on with, or someone else
                parent.rmdir()
        raise


def publish(folder: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    """Makes a finished folder appear as `target`, in place of what is there only if it may be replaced.

    Raises:
      InputError: `target` appeared meanwhile.
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
