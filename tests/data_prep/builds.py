"""What the tests of the preparation door build from and look at."""

import csv
import pathlib

import cv2
import numpy as np

from data_prep import build
from usfmae_jax.data import records

ROOT = pathlib.Path(__file__).parents[2]


def picture(seed, shape=(48, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return cv2.GaussianBlur(pixels, (5, 5), 2)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def run(*flags, output, source=None, dataset="folder", workers=1):
    source = [f"--input={source}"] if source else []
    return build.main([f"--dataset={dataset}", f"--output={output}", f"--workers={workers}", *source, *flags])


def read(path, split=None):
    opened = records.open_shards(str(path), split)
    return [records.decode_record(opened[i]) for i in range(len(opened))]


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def read_rejected(path):
    with (path / "1.0.0/rejected.csv").open() as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def refused(capsys, *flags, **options):
    """The one sentence on stderr of a build that must end with status 2."""
    assert run(*flags, **options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
