"""Tables of numbers: which frames a row is of, what columns are called, and what is refused."""

import numpy as np
import pytest

from tests.data.tables import table
from usfmae_jax.data.targets import read_targets
from usfmae_jax.errors import InputError

SOURCES = ["a/1.png", "a/2.png", "b/1.png", "b/clip.nii.gz", "b/clip.nii.gz"]
FRAMES = ["one", "two", "three", "b/clip.nii.gz", "b/clip.nii.gz#1"]


@pytest.fixture
def frames():
    return table("pqrss", [0] * 5, source=SOURCES, frame=FRAMES)


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return str(path)


def values(path, frames, *names, **how):
    return read_targets(path, frames, names, **how).values.T.tolist()


NAN = pytest.approx(np.nan, nan_ok=True)


@pytest.mark.parametrize(
    ("key", "cells", "expected"),
    [
        ("frame", ["one", "two", "three", "b/clip.nii.gz#1"], [1, 2, 3, NAN, 4]),
        ("source", SOURCES[:4], [1, 2, 3, 4, 4]),  # a clip's is that of all of its frames
        ("File", ["a\\1.png", "./a/2.png", "b/1.png", "clip.nii.gz"], [1, 2, 3, 4, 4]),
        ("filename", ["three", "2.png", "2", "clip"], [NAN, NAN, 1, 4, 4]),  # two rows of one frame say other numbers
        ("file_name", ["1.png", "2", "b/1.png", "nothing.png"], [NAN, 2, 3, NAN, NAN]),
    ],
)
def test_rows_belong_to_frames_sources_or_files(tmp_path, frames, key, cells, expected):
    path = write(tmp_path / "t.csv", f"{key},x [mm]\n" + "".join(f"{cell},{i}\n" for i, cell in enumerate(cells, 1)))
    found = read_targets(path, frames, ["x"])
    assert (found.names, found.units) == (("x",), ("mm",))
    assert found.values[:, 0].tolist() == expected


def test_what_cannot_be_used_is_counted_and_said(tmp_path, frames):
    path = write(tmp_path / "t.csv", "file,x\n1.png,1\n2.png,2\n2,3\nelsewhere.png,4\n")
    assert read_targets(path, frames, ["x"]).notes == (
        "1 of 4 rows of t.csv name no frame of the data, first 'elsewhere.png'",
        "1 of 4 rows of t.csv fit several files and are left out; give their paths in a column source, or the column "
        "dataset, first '1.png'",
        "1 frames have two values that differ in config.targets, and none is taken, first two",
    )


def test_ids_tell_frames_of_equal_names_apart(tmp_path):
    frames = table("pq", [0, 0], dataset=["d", "e"], source=["x.png", "x.png"], frame=["x", "x"])
    path = write(tmp_path / "t.csv", "frame,dataset,v\nx,d,1\nx,e,2\n")
    assert values(path, frames, "v") == [[1, 2]]


@pytest.mark.parametrize(
    ("header", "name", "unit"),
    [
        ("head circumference (mm)", "head circumference", "mm"),
        ("pixel size(mm)", "pixel size", "mm"),
        ("EF [%]", "EF", "%"),
        ("age", "age", ""),
        ("a [b] c", "a [b] c", ""),
    ],
)
def test_units_stand_in_brackets_and_names_do_with_and_without_them(tmp_path, frames, header, name, unit):
    path = write(tmp_path / "t.csv", f"frame,{header}\none,3\n")
    for asked in (name, header, name.upper()):
        found = read_targets(path, frames, [asked])
        assert (found.names, found.units) == ((name,), (unit,))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_tables_are_read_as_spreadsheets_save_them(tmp_path, frames, separator, encoding):
    rows = [["frame", "größe [mm]", "note"], ["one", " 1.5 ", "é"], ["two", "NA", ""], ["three", "-2e1", "x"]]
    path = write(tmp_path / "t.csv", "\n".join(map(separator.join, rows)), encoding)
    found = read_targets(path, frames)
    assert found.names == ("größe",)  # the only one of numbers
    assert found.values[:, 0].tolist() == [1.5, NAN, -20, NAN, NAN]


def test_several_files_add_up(tmp_path, frames):
    one = write(tmp_path / "1.csv", "frame,x [mm],y\none,1,0\n")
    two = write(tmp_path / "2.csv", "source,x (mm)\na/2.png,2\n")
    found = read_targets(f"{one}, {two}", frames)
    assert found.names == ("x", "y")
    assert found.values[:2].tolist() == [[1, 0], [2, NAN]]
    assert found.fingerprint != read_targets(one, frames).fingerprint


def test_labels_are_the_columns_of_0_and_1(tmp_path, frames):
    path = write(tmp_path / "t.csv", "frame,a,b,c,d\none,1,0,3,\ntwo,0,,1,\nthree,1.0,1,0,\n")
    found = read_targets(path, frames, labels=True)
    assert found.names == ("a", "b")
    assert found.values[:3].tolist() == [[1, 0], [0, NAN], [1, 1]]
    with pytest.raises(InputError, match=r"t\.csv, line 2, column 'c': '3' is neither 0 nor 1"):
        read_targets(path, frames, ["a", "c"], labels=True)


@pytest.mark.parametrize(
    ("text", "names", "says"),
    [
        ("frame,x\none,much\n", ["x"], r"t\.csv, line 2, column 'x': 'much' is no number"),
        ('frame,x\none,"1,5"\n', ["x"], r"'1,5' is no number; write a point for the comma"),
        ("frame,x\none,1_0\n", ["x"], "'1_0' is no number"),
        ("frame,x\none,-inf\n", ["x"], "'-inf' is not a finite number"),
        ("frame,x\none,1e999\n", ["x"], "'1e999' is not a finite number"),
        ("frame,x\none,1\n", ["y"], r"config\.target='y' is no column of t\.csv; there are 'x'"),
        ("frame,x\none,a\n", [], "no column of nothing but numbers; there are 'x'"),
        ("frame,x [mm],x [cm]\none,1,2\n", ["x"], r"'x' is in 'cm' in t\.csv and in 'mm' elsewhere"),
        ("frame,x [mm],x\none,1,2\n", ["x"], r"'x' is in 'no unit' in t\.csv and in 'mm' elsewhere"),
        ("image,x\none,1\n", ["x"], r"no column that names frames, frame, source, file, .* columns are 'image', 'x'"),
        ("frame,x,X\none,1,1\n", ["x"], "has the column 'x' twice"),
        ("frame,x\nelse,1\n", ["x"], r"t\.csv, 'else' and so on, names no frame of the data, .* called like 'one'"),
        ("frame,x\n1,1\n", ["x"], "names no frame of the data.*; 1 rows fit several files"),
        ("", ["x"], "cannot be read: it is no table"),
    ],
)
def test_what_is_no_such_table_is_one_sentence(tmp_path, frames, text, names, says):
    with pytest.raises(InputError, match=says):
        read_targets(write(tmp_path / "t.csv", text), frames, names)


def test_other_units_in_another_file_a_missing_file_and_none_are_refused(tmp_path, frames):
    one = write(tmp_path / "1.csv", "frame,x [mm]\none,1\n")
    two = write(tmp_path / "2.csv", "frame,x [cm]\ntwo,2\n")
    with pytest.raises(InputError, match=r"'x' is in 'cm' in 2\.csv and in 'mm' elsewhere"):
        read_targets(f"{one},{two}", frames, ["x"])
    with pytest.raises(InputError, match="cannot be read: No such file or directory"):
        read_targets(str(tmp_path / "3.csv"), frames)
    with pytest.raises(InputError, match=r"config\.targets names no table"):
        read_targets(" ", frames)


def test_of_pseudonyms_it_is_said_where_their_names_are(tmp_path):
    names = [f"f{number:016x}" for number in range(3)]
    frames = table("pqr", [0] * 3, source=names, frame=names)
    with pytest.raises(InputError, match=r"frames have pseudonyms: .* linkage table that data_prep\.build wrote with"):
        read_targets(write(tmp_path / "t.csv", "file,x\na/1.png,1\n"), frames, ["x"])
    path = write(tmp_path / "t.csv", f"frame,x\n{names[1]},1\n")
    assert values(path, frames, "x") == [[NAN, 1, NAN]]
