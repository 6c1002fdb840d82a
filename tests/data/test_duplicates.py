"""Pictures that two patients have in common are found, and others are not."""

import csv

import cv2
import numpy as np
import pytest

from tests.data.tables import write_records
from tests.data_prep.trees import real_folder
from usfmae_jax.data import duplicates, records
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError


def picture(seed: int) -> np.ndarray:
    """Structure of several sizes under a fall-off with depth."""
    rng = np.random.default_rng(seed)
    pixels = sum(
        cv2.resize(rng.normal(0, 1, (n, n)), (160, 160), interpolation=cv2.INTER_CUBIC) * 12 for n in (6, 12, 25)
    )
    return np.clip(pixels + np.linspace(120, 60, 160)[:, None], 0, 255).astype(np.uint8)


def frame(pixels: np.ndarray, name: str, patient: str, **fields: object) -> records.Record:
    height, width = pixels.shape
    image = cv2.imencode(".png", pixels)[1].tobytes()
    known = {"height": height, "width": width, "frame": name, "patient": patient, "video": name, "source": name}
    return records.FIELDS | {"image": image, "dataset": "d", "label": len(name) % 2} | known | fields


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    one, two = picture(1), picture(2)
    smaller = cv2.resize(one[3:-3, 3:-3], (120, 128), interpolation=cv2.INTER_AREA)
    brighter = np.clip(two * 1.2 + 10, 0, 255).astype(np.uint8)
    black, equal = np.zeros((40, 40), np.uint8), np.full((40, 40), 9, np.uint8)
    written = [
        frame(one, "one", "p1"),
        frame(two, "two", "p2"),
        frame(smaller, "smaller", "p3"),
        frame(brighter, "brighter", "p4"),
        frame(one, "again", "p1"),  # of the same patient
        *(frame(picture(n), f"other{n}", f"q{n}") for n in range(10, 30)),
        frame(black, "black", "p5"),
        frame(black + 1, "blackish", "p6"),
        frame(equal, "plain", "p7", sha256="same"),
        frame(equal, "plains", "p8", sha256="same"),
        frame(black, "broken", "p9", image=b"\x89PNG broken"),
    ]
    return read_table(str(write_records(tmp_path_factory.mktemp("pictures"), written)))


def names(frames, pairs):
    return {tuple(sorted((frames.frame[i], frames.frame[j]))) for i, j in pairs}


FOUND = {("one", "smaller"), ("again", "smaller"), ("brighter", "two"), ("plain", "plains")}


def test_copies_of_other_patients_are_found_and_others_are_not(frames):
    pairs = duplicates.near_duplicates(frames)
    assert names(frames, pairs) == FOUND
    assert (pairs[:, 0] < pairs[:, 1]).all()


def test_a_person_can_rule_pairs_out(frames, tmp_path):
    pairs = duplicates.cached_near_duplicates(frames, tmp_path / "duplicates.csv")
    lines = (tmp_path / "duplicates.csv").read_text().splitlines()
    kept = [lines[0], *(line for line in lines if "two" in line), "mine,plains,plain"]  # in either order
    (tmp_path / "no.csv").write_text("\n".join(kept))
    left = duplicates.rule_out(frames, pairs, str(tmp_path / "no.csv"))
    assert names(frames, left) == FOUND - {("brighter", "two"), ("plain", "plains")}
    assert duplicates.rule_out(frames, pairs, "") is pairs
    for text, says in (
        ("frame,other\none,nobody\n", "names 'nobody', which is no frame of the data"),
        ("a,b\n1,2\n", "needs the columns frame and other"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(InputError, match=says):
            duplicates.rule_out(frames, pairs, str(tmp_path / "bad.csv"))
    with pytest.raises(InputError, match="cannot be read"):
        duplicates.rule_out(frames, pairs, str(tmp_path / "absent.csv"))


def test_a_cache_is_read_for_the_same_rows_only(frames, tmp_path, monkeypatch):
    path = tmp_path / "splits" / "near-duplicates.csv"
    pairs = duplicates.cached_near_duplicates(frames, path)
    monkeypatch.setattr(duplicates, "near_duplicates", lambda *args: np.asarray([[0, 1]]))
    np.testing.assert_array_equal(duplicates.cached_near_duplicates(frames, path), pairs)
    path.write_text(path.read_text().replace(frames.fingerprint, "0" * 12))
    np.testing.assert_array_equal(duplicates.cached_near_duplicates(frames, path), [[0, 1]])


@pytest.mark.parametrize("content", ["", "x", "data,frame,other\n", "data,frame,other\na,b\n"])
def test_what_is_no_cache_is_written_anew(frames, tmp_path, monkeypatch, content):
    monkeypatch.setattr(duplicates, "near_duplicates", lambda *args: np.empty((0, 2), np.int64))
    path = tmp_path / "cache.csv"
    path.write_text(content)
    assert duplicates.cached_near_duplicates(frames, path).shape == (0, 2)
    monkeypatch.setattr(duplicates, "near_duplicates", None)
    assert duplicates.cached_near_duplicates(frames, path).shape == (0, 2)  # none is an answer too


def test_bus_bra_has_three_patients_twice(tmp_path):
    folder = real_folder("BUS-BRA")
    written = []
    with (folder / "bus_data.csv").open(encoding="utf-8-sig") as table:
        for row in csv.DictReader(table):
            if int(row["Case"]) in (*range(30, 110), *range(330, 370)):
                data = (folder / "Images" / f"{row['ID']}.png").read_bytes()
                label = int(row["Pathology"] == "malignant")
                written.append(frame(np.zeros((1, 1), np.uint8), row["ID"], row["Case"], image=data, label=label))
    frames = read_table(str(write_records(tmp_path, written)))
    pairs = duplicates.near_duplicates(frames, progress=False)
    assert {(frames.patient[i], frames.patient[j]) for i, j in pairs} == {("44", "65"), ("56", "91"), ("341", "356")}
    assert len(pairs) == 6
