"""predictions.csv holds exactly what was predicted, and other CSVs are refused in a sentence."""

import dataclasses

import numpy as np
import pytest

from tests.evaluation.made import predictions
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.predictions import ClassPredictions, concatenate, read


def _same(a: ClassPredictions, b: ClassPredictions) -> bool:
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(ClassPredictions)
    )


def test_what_is_written_is_read_back_exactly(tmp_path, rng):
    made = predictions(rng, classes=("a, b", 'the "other"', "p_ö"), decimals=17)
    made = dataclasses.replace(
        made,
        patient=np.array(["line\r\nbreak", "", *made.patient[2:]], object),
        fraction=np.full(len(made), 0.1),
        seed=np.arange(len(made)),
        probabilities=made.probabilities.astype(np.float32),
    )
    made.write(tmp_path / "predictions.csv")
    assert _same(read(tmp_path / "predictions.csv", ClassPredictions), made)
    assert _same(read(tmp_path, ClassPredictions), made)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_the_csv_is_for_people_and_spreadsheets(tmp_path, rng):
    predictions(rng).select(np.array([0])).write(tmp_path / "predictions.csv")
    head, row = (tmp_path / "predictions.csv").read_text().splitlines()
    assert head == "dataset,patient,video,frame,fold,seed,fraction,label,predicted,p_benign,p_malignant"
    assert row.startswith("made,p0,v0,0,1,0,1.0,benign,")


def test_no_predictions_are_predictions(tmp_path, rng):
    none = predictions(rng).select(np.zeros(0, int))
    none.write(tmp_path / "predictions.csv")
    assert _same(read(tmp_path / "predictions.csv", ClassPredictions), none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "id,score\n1,0.5\n", "needs column 'dataset'"),
        (lambda text: "", "needs column 'dataset'"),
        (lambda text: text.replace("p_", "q_"), "a probability column p_CLASS"),
        (lambda text: text.replace(",benign,benign,", ",benine,benign,"), "label 'benine' is none of its classes"),
        (lambda text: text.rsplit(",", 1)[0], "damaged predictions.csv"),
        (lambda text: text.replace("made,p1,v2,0,1,0,", "made,p1,v2,0,1,zero,"), "damaged predictions.csv"),
        (lambda text: text + "made,p,v,0,1,0,1.0,benign,benign,1.5,nan\n", "probabilities must lie in"),
    ],
    ids=["foreign", "empty", "no probabilities", "label", "cut off", "seed", "not probabilities"],
)
def test_other_files_are_refused(tmp_path, rng, change, message):
    path = tmp_path / "predictions.csv"
    predictions(rng).write(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message):
        read(path, ClassPredictions)


def test_a_path_without_predictions_is_refused(tmp_path):
    with pytest.raises(InputError, match="no predictions there"):
        read(tmp_path, ClassPredictions)
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff")
    with pytest.raises(InputError, match="no predictions there"):
        read(tmp_path / "image.csv", ClassPredictions)


def test_a_patient_without_an_id_is_its_videos_own_and_ids_are_of_a_dataset(rng):
    made = predictions(rng, patients=2, frames=2)
    made = dataclasses.replace(
        made,
        dataset=np.array(["a", "a", "b", "b"], object),
        patient=np.array(["1", "1", "1", ""], object),
    )
    assert made.patient_key.tolist() == ["a/1", "a/1", "b/1", "b/v3"]
    assert made.frame_key.tolist() == ["a/v0/0", "a/v1/0", "b/v2/0", "b/v3/0"]


def test_parts_add_up_to_the_whole(rng):
    made = predictions(rng, folds=2)
    parts = [made.select(made.fold == "1"), made.select(np.flatnonzero(made.fold == "2"))]
    whole = concatenate(parts)
    assert len(whole) == len(made)
    assert sorted(whole.frame_key) == sorted(made.frame_key)
    with pytest.raises(ValueError, match="same classes"):
        concatenate([made, predictions(rng, classes=("x", "y"))])


@pytest.mark.parametrize(
    "change",
    [{"label": np.array([0])}, {"label": np.array([0, 2])}, {"probabilities": np.array([[0.5, np.nan]] * 2)}],
    ids=["rows", "class", "nan"],
)
def test_what_cannot_be_is_refused_where_it_is_made(rng, change):
    with pytest.raises(ValueError):
        dataclasses.replace(predictions(rng, patients=2, frames=1), **change)
