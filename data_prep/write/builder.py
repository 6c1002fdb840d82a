"""The TensorFlow Datasets builder that finished parts go through.

TensorFlow Datasets names the files and writes the metadata, but not the shards: its own writers need TensorFlow for
TFRecord files and for splits above 1 GB, and keep a shard or a split in memory.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from usfmae_jax.errors import InputError


class Frames(tfds.core.DatasetBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Ultrasound frames as a versioned dataset; `download_and_prepare` calls `write`, `as_data_source` reads."""

    def __init__(
        self,
        name: str,
        version: str,
        data_dir: str | os.PathLike[str],
        *,
        write: Callable[[pathlib.Path], list[tfds.core.SplitInfo]],
        label_names: Sequence[str],
        channels: int,
        description: str,
        citation: str,
        homepage: str,
    ):
        """Describes a dataset that is not there yet.

        Args:
          name: letters, digits and underscores.
          version: "1.0.0".
          data_dir: where NAME/VERSION/ will be.
          write: puts the shards into the folder that it is given and describes their splits.
          label_names: class names in the order of their numbers.
          channels: 1 if all images are grey, else 3, and then TensorFlow Datasets shows all in colour.
          description: in a sentence.
          citation: of the source.
          homepage: of the source.
        """
        self.name = name
        self.VERSION = tfds.core.Version(version)
        self.RELEASE_NOTES = {version: "Prepared with python -m data_prep.build."}
        self._write = write
        self._features = _features(label_names, channels)
        self._texts = {"description": description, "citation": citation or None, "homepage": homepage or None}
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        info = tfds.core.DatasetInfo(
            builder=self,
            features=self._features,
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # the records are in the order of their sources; the input pipeline shuffles
            **self._texts,
        )
        # It would ask a public bucket for a dataset of this name: of no use, and the name may be a hospital's.
        info.initialize_from_bucket = lambda: None
        return info

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        self.info.set_splits(tfds.core.splits.SplitDict(self._write(pathlib.Path(self.data_dir))))

    def _as_dataset(self, split: Any, *unused: Any, **options: Any) -> Any:
        raise InputError(f"{self.name}: tfds.builder_from_directory opens it for tf.data")

    def _log_download_bytes(self) -> None:
        """Silent: nothing is downloaded here."""

    def _log_download_done(self) -> None:
        """Silent: the build prints its own summary."""


def _features(label_names: Sequence[str], channels: int) -> tfds.features.FeaturesDict:
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
            "label": _label_feature(list(label_names)),
            # Bytes, because TensorFlow Datasets has no image that may be absent.
            "mask": tfds.features.Tensor(shape=(), dtype=np.object_, doc="PNG as large as the image, or empty"),
            "source": tfds.features.Text(doc="path inside the dataset"),
            "sha256": tfds.features.Text(doc="of the pixels as decoded from the source"),
        }
    )


def _label_feature(names: list[str]) -> tfds.features.ClassLabel:
    doc = "-1 = none"
    # Without names no file of names is written, which is how others tell that there are no classes.
    return tfds.features.ClassLabel(names=names, doc=doc) if names else tfds.features.ClassLabel(num_classes=0, doc=doc)
