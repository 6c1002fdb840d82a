"""What people write: tables from any program, names spelled in two ways, placeholders, and tips that fit."""

import sys
import unicodedata

import numpy as np
import openpyxl
import pytest

from data_prep import catalog
from data_prep.find import collect, files
from tests.data_prep.builds import picture, read, refused, run, write, write_csv
from usfmae_jax.errors import InputError

HEAD = "file,label,patient,split\n"
ROWS = "a/Köln.png,übrig,p1,train\na/2.png,NA,Anonymous,nan\nb/3.png,y,n/a,\n"


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a/Köln.png", "a/2.png", "b/3.png")):
        write(tmp_path / "in" / name, picture(number))
    return tmp_path / "in"


def listed(folder, path):
    found = collect(catalog.load("folder"), folder, labels=str(path))
    names = dict(enumerate(found.label_names))
    return [(one.path, names.get(one.label, ""), one.patient, one.split) for one in found.items]


EXPECTED = [("a/Köln.png", "übrig", "p1", "train"), ("a/2.png", "", "", "train"), ("b/3.png", "y", "", "train")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_a_labels_table_may_be_saved_in_any_encoding(folder, tmp_path, encoding):
    (tmp_path / "l.csv").write_bytes((HEAD + ROWS).encode(encoding))
    assert listed(folder, tmp_path / "l.csv") == EXPECTED


def test_a_labels_table_may_be_a_spreadsheet(folder, tmp_path):
    book = openpyxl.Workbook()
    for line in (HEAD + ROWS).splitlines():
        book.active.append([cell or None for cell in line.split(",")])
    book.save(tmp_path / "l.xlsx")
    assert listed(folder, tmp_path / "l.xlsx") == EXPECTED
    (tmp_path / "broken.xlsx").write_text("no archive")
    with pytest.raises(InputError, match=r"broken\.xlsx is damaged"):
        listed(folder, tmp_path / "broken.xlsx")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_match_however_their_accents_are_written(folder, tmp_path, form):
    (folder / "a/Köln.png").rename(folder / unicodedata.normalize("NFD", "a/Köln.png"))
    (folder / "a").rename(folder / unicodedata.normalize("NFC", "ä"))
    text = unicodedata.normalize(form, "file\nä/Köln.png\nä/2.png\n")
    (tmp_path / "l.csv").write_text(text)
    found = [path for path, *_ in listed(folder, tmp_path / "l.csv")]
    assert found == [f"ä/{unicodedata.normalize('NFD', 'Köln.png')}", "ä/2.png"]


def test_rows_of_published_tables_match_however_accents_are_written(tmp_path):
    write(tmp_path / "in" / unicodedata.normalize("NFD", "Köln.png"), picture(0))
    (tmp_path / "in/t.csv").write_text(unicodedata.normalize("NFC", "name,class\nKöln.png,good\n"))
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ntitle = "Mine"\nverified = "documented only"\n[[layout]]\ninclude = ["*.png"]\n'
        '[[layout.table]]\nfile = ["t.csv"]\nkey = "{name}"\nlabel = "{class}"\n'
    )
    found = collect(catalog.load_file(tmp_path / "mine.toml"), tmp_path / "in")
    assert found.label_names == ["good"]
    assert [one.label for one in found.items] == [0]
    assert found.warnings == []


def test_classes_that_differ_in_case_only_are_asked_about(folder, tmp_path):
    labels = write_csv(tmp_path / "l.csv", ["file", "label"], ["a/2.png", "Benign"], ["b/3.png", "benign"])
    with pytest.raises(InputError, match="the classes 'Benign' and 'benign' differ in upper and lower case only: are"):
        listed(folder, labels)
    (folder / "a").rename(folder / "B")
    for flags in ({}, {"pattern": "(?P<video>[^/]+)$"}):
        with pytest.raises(InputError, match=r"'B' and 'b' .* by renaming folders"):
            collect(catalog.load("folder"), folder, labels="parent", **flags)
    with pytest.raises(InputError, match="'B' and 'b'"):
        collect(catalog.load("folder"), folder, pattern="^(?P<cls>[^/]+)/")


@pytest.mark.parametrize(
    "name",
    [
        "Anonymous",
        "ANONYMIZED",
        "anonymised^patient",
        "anon.",
        "DEID",
        "de-identified",
        "Unknown",
        "unknown patient",
        "n/a",
        "None",
        "?",
        "-",
        "XXXX",
        "Anonymous (Springfield)",
        "not available",
    ],
)
def test_a_placeholder_is_no_patient(name):
    assert files.known_patient(name) == ""


@pytest.mark.parametrize("name", ["p1", "Anonymous12", "0", "00", "x", "xx1", "Anon Ymer", "DEID-7", "nancy", "患者"])
def test_a_name_that_tells_somebody_apart_is_a_patient(name):
    assert files.known_patient(name) == name


def test_placeholders_in_paths_are_unknown_patients_and_cross_no_split(tmp_path):
    for name in ("train/unknown_1.png", "test/unknown_2.png", "test/p1_3.png"):
        write(tmp_path / name, picture(0))
    found = collect(catalog.load("folder"), tmp_path, pattern=r"(?P<split>\w+)/(?P<patient>[^_]+)_")
    assert sorted((one.path, one.patient) for one in found.items) == [
        ("test/p1_3.png", "p1"),
        ("test/unknown_2.png", ""),
        ("train/unknown_1.png", ""),
    ]


def test_no_tip_makes_a_class_a_patient(folder, tmp_path, capsys):
    for flags in ("--labels=parent", "--labels="):
        assert run(flags, "--overwrite", output=tmp_path / "out", source=folder) == 0
        printed = capsys.readouterr().out
        assert "Unknown patients: 3." in printed
        assert "add --pattern='...', a regular expression" in printed
        assert "Warning" not in printed
    for number in range(13):
        write(tmp_path / f"many/case{number}/1.png", picture(number))
    write(tmp_path / "many/case0/2.png", picture(13))
    assert run("--overwrite", output=tmp_path / "out", source=tmp_path / "many") == 0
    assert "--pattern='^(?P<patient>[^/]+)/'" in capsys.readouterr().out


def test_a_table_without_openpyxl_is_one_sentence(folder, tmp_path, capsys, monkeypatch):
    openpyxl.Workbook().save(tmp_path / "l.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    message = refused(capsys, f"--labels={tmp_path / 'l.xlsx'}", output=tmp_path / "out", source=folder)
    assert "need openpyxl: pip install" in message


def test_a_placeholder_inside_a_file_is_no_patient_either(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in/clips.h5", "w") as file:
        file["image"] = np.stack([picture(number, (32, 40)) for number in range(3)])
        file["who"] = [b"unknown", b"p1", b"unknown"]
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ntitle = "Mine"\nverified = "documented only"\n[[layout]]\ninclude = ["*.h5"]\n'
        'reader = { key = "image", patient_key = "who" }\n'
    )
    flags = "--thin=off", "--deduplicate=off"
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in", dataset=tmp_path / "mine.toml") == 0
    found = read(tmp_path / "out")
    assert [one["patient"] == "p1" for one in found] == [False, True, False]
    assert "unknown" not in {one["patient"] for one in found}
