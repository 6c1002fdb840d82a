"""Real public datasets through their own catalogue entries: shards, and batches for training.

They lie beside the project or where ULTRASOUND_DATA says, and are skipped elsewhere. What paths and tables say about
them is tested in `test_collect`.
"""

import collections
import csv
import json

import numpy as np
import pytest

from tests.data_prep.builds import read, run
from tests.data_prep.trees import real_folder
from usfmae_jax.data import augment, pipeline

ALL = "--thin=off", "--deduplicate=off"


def manifest(folder):
    return json.loads((folder / "1.0.0/manifest.json").read_text())


def test_bus_bra_becomes_1875_frames_of_1064_patients_with_masks_and_folds(tmp_path):
    assert run(output=tmp_path, source=real_folder("BUS-BRA"), dataset="bus_bra", workers=2) == 0
    found = read(tmp_path / "bus_bra", "train")
    assert len(found) == 1875
    assert len({record["patient"] for record in found}) == 1064
    assert sum(record["label"] for record in found) == 607  # malignant
    assert all(record["mask"] for record in found)
    assert max(min(record["height"], record["width"]) for record in found) <= 256
    with (tmp_path / "bus_bra/1.0.0/splits/5-fold-cv.csv").open() as file:
        rows = list(csv.DictReader(file))
    tested = collections.Counter(row["fold"] for row in rows if row["part"] == "test")
    assert [tested[str(fold)] for fold in range(1, 6)] == [376, 385, 366, 365, 383]
    assert {row["frame"] for row in rows} == {record["frame"] for record in found}


@pytest.mark.parametrize(
    ("dataset", "folder", "frames", "patients", "rejected"),
    [
        ("aul", "AUL_liver", 90, 90, 0),
        ("camus_public", "CAMUS", 4, 1, 2),  # the headers of the sequences have no data beside them
        ("hc", "HC18", 60, 50, 0),
        ("usgra_nerve", "USGRA_nerve", 20, 20, 0),
        ("timtrack_muscle", "TimTrack_muscle", 36, 2, 0),
        ("pocus", "POCUS_lung", 91, 4, 0),
        ("pluslib", "PlusLibData", None, 4, 0),
        ("blues", "COVID-BLUES", 51, 9, 0),
        ("dicom", "DICOM_US", 37, 5, 0),  # one, a crop, has no sector; two are of one patient, one of them also a TIFF
        ("dicom", "BrachialPlexus_DICOM", 6, 3, 0),
    ],
)
def test_every_other_set_goes_through_its_entry_and_becomes_batches(
    tmp_path, monkeypatch, dataset, folder, frames, patients, rejected
):
    salt = tmp_path / "salt"
    salt.write_bytes(bytes(range(32)))
    salt.chmod(0o600)
    monkeypatch.setenv("USFMAE_SALT", str(salt))
    some = ["--max_frames=1"] if dataset == "blues" else []
    out = tmp_path / "out"
    assert run(*ALL, *some, output=out, source=real_folder(folder), dataset=dataset, workers=2) == 0
    found = manifest(out / dataset)
    assert sum(found["rejected"].values()) == rejected
    assert found["splits"]["train"]["patients"] + found["splits"]["train"]["unknown_patients"] == patients
    if frames is not None:
        assert found["kept"] == frames
    sources = pipeline.open_sources(str(out), "train")
    load = pipeline.LoadView(pipeline.all_rows(sources), (64, 64), 1, augment.Augmentation())
    batch = pipeline.training_batches(load, batch_size=8, seed=0)[0]
    assert (batch["damaged"] == -1).all()
    assert np.ptp(batch["image"]) > 100
