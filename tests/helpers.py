"""What several test files build."""

import contextlib
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import cv2
import ml_collections
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from configs.evaluate import get_config as get_evaluation
from configs.pretrain import get_config
from usfmae_jax.data import records
from usfmae_jax.data.tfrecord import frame_tfrecord
from usfmae_jax.probing.loop import evaluate
from usfmae_jax.training.monitor import Preemption

#: For `jax.jit`: compiles as users do, where conftest.py has all else compiled without LLVM's optimisation.
OPTIMIZED = {"xla_backend_optimization_level": 3}


def frame(index: int, label: int, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    """A smooth random grey picture; those of label 1 have a bright disc."""
    rng = np.random.default_rng(index)
    pixels = cv2.resize(rng.integers(20, 120, (6, 6), np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    if label:
        cv2.circle(pixels, (size[1] // 2, size[0] // 2), 10, 240, -1)
    return pixels


def evaluated(run: Any, data: str, workdir: Any, **fields: Any) -> dict[str, Any]:
    """The results of evaluating a fine-tuning run unchanged on a folder of shards."""
    config = get_evaluation()
    config.checkpoint, config.data.path = str(run), data
    config.split.duplicates = False
    config.update(batch_size=16, bootstrap=20, examples=2, **fields)
    return evaluate(config, str(workdir))


def record(index: int, image: bytes | None = None, **fields: object) -> records.Record:
    """Record number `index`: two frames per patient, patients alternate between two labels."""
    label = (index // 2) % 2
    pixels = frame(index, label)
    encoded = cv2.imencode(".png", pixels)[1].tobytes() if image is None else image
    named = {"dataset": "made", "patient": f"p{index // 2}", "video": f"v{index}", "frame": "0", "label": label}
    shape = {"height": pixels.shape[0], "width": pixels.shape[1], "source": f"{index}.png"}
    return records.FIELDS | {"image": encoded, "sha256": records.pixel_hash(pixels)} | named | shape | fields


def write_shards(
    folder: pathlib.Path,
    count: int = 48,
    *,
    damaged: tuple[int, ...] = (),
    instead: dict[int, bytes] | None = None,
    kind: str = "array_record",
    split: str = "train",
    pieces: int = 2,
) -> list[str]:
    """Writes `count` records; those in `damaged` hold an image that cannot be decoded, those in `instead` another."""
    images = dict.fromkeys(damaged, b"\xff\xd8\xff broken") | (instead or {})
    paths = []
    for piece in range(pieces):
        path = folder / f"made-{split}.{kind}-{piece:05d}-of-{pieces:05d}"
        data = [records.encode_record(record(i, images.get(i))) for i in range(piece, count, pieces)]
        if kind == "array_record":
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for item in data:
                writer.write(item)
            writer.close()
        else:
            path.write_bytes(b"".join(map(frame_tfrecord, data)))
        paths.append(str(path))
    return paths


def tiny_config(shards: str) -> ml_collections.ConfigDict:
    """Compiles in a second or two; 8 steps of 8 frames."""
    config = get_config("demo")
    config.model.update(
        image_size=(32, 32),
        patch_size=8,
        width=32,
        depth=2,
        num_heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    config.data.update(path=shards, split="train", workers=0)
    config.train.update(batch_size=8, steps=8)
    config.checkpoint.every = 4
    config.log.update(every=1, pictures_every=0)
    config.probe.data.update(path="", split="")
    return config


@contextlib.contextmanager
def stopping(after: int) -> Iterator[None]:
    """Whatever trains is asked to stop when it looks whether it was for the `after`-th time."""
    answers = itertools.chain(itertools.repeat(False, after - 1), [True], itertools.repeat(False))
    with mock.patch.object(Preemption, "requested", side_effect=answers):
        yield
