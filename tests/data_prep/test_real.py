"""Real public datasets, where they lie beside the project or where ULTRASOUND_DATA says; skipped elsewhere."""

import csv
import os
import pathlib

import numpy as np
import pytest

from data_prep import build
from usfmae_jax.data import augment, pipeline, records

DATA = pathlib.Path(os.environ.get("ULTRASOUND_DATA", pathlib.Path(__file__).parents[3] / "shared" / "ultrasound"))


def _folder(*parts):
    folder = DATA.joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(f"needs the public dataset {parts[0]}; ULTRASOUND_DATA names the folder that holds it")
    return folder


def test_bus_bra_becomes_1875_frames_of_1064_patients(tmp_path):
    folder = _folder("BUS-BRA")
    with (folder / "bus_data.csv").open() as table, (tmp_path / "labels.csv").open("w", newline="") as labels:
        writer = csv.writer(labels)
        writer.writerow(["file", "label", "patient", "mask"])
        for row in csv.DictReader(table):
            mask = f"Masks/{row['ID'].replace('bus', 'mask')}.png"
            writer.writerow([f"Images/{row['ID']}.png", row["Pathology"], row["Case"], mask])
    arguments = ["--dataset=folder", f"--input={folder}", f"--output={tmp_path}", f"--labels={tmp_path / 'labels.csv'}"]
    assert build.main(arguments) == 0
    shards = records.open_shards(str(tmp_path / "bus_bra"), "train")
    decoded = [records.decode_record(shards[i]) for i in range(len(shards))]
    assert len(decoded) == 1875
    assert len({record["patient"] for record in decoded}) == 1064
    assert sum(record["label"] for record in decoded) == 607  # malignant
    assert all(record["mask"] for record in decoded)
    assert min(min(record["height"], record["width"]) for record in decoded) <= 256


@pytest.mark.parametrize(
    ("parts", "frames"),
    [
        (("AUL_liver",), 90),
        (("HC18", "training", "image"), 60),
        (("USGRA_nerve", "images"), 20),
        (("TimTrack_muscle",), 36),
    ],
)
def test_other_trees_are_read_whole_and_become_batches(tmp_path, parts, frames):
    folder = _folder(*parts)
    assert build.main(["--dataset=folder", f"--input={folder}", f"--output={tmp_path}", "--workers=1"]) == 0
    sources = pipeline.open_sources(str(tmp_path), "train")
    assert len(sources[0]) == frames
    dataset = pipeline.training_dataset(
        sources, size=(64, 64), channels=1, batch_size=16, how=augment.Augmentation(), seed=0
    )
    batch = dataset[0]
    assert (batch["damaged"] == -1).all()
    assert np.ptp(batch["image"]) > 100
