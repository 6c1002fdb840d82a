"""CSV files that spreadsheets show and do not run."""

import csv
import io

import pytest

from data_prep import exclusions, identity
from data_prep.find.files import Rejected
from data_prep.write.manifest import write_rejected
from usfmae_jax.data import cells
from usfmae_jax.data.split_files import write_csv

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx", "\rx", "'=x", "''=x", '=\n,"']


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_quoted_and_read_back(text):
    assert cells.quoted(text) == "'" + text
    assert cells.unquoted(cells.quoted(text)) == text


@pytest.mark.parametrize("value", ["", "a=1", "'quote'", "-12", "+1.5e-3", "-.5", "nan", -1, 0.5, "1-2", "x@y", "'"])
def test_other_text_and_numbers_stay(value):
    assert cells.quoted(value) == value
    assert cells.unquoted(str(value)) == str(value)


def test_tables_are_read_back_as_they_were_and_long_cells_too():
    file = io.StringIO(newline="")
    rows = [[text, "x" * 300_000] for text in FORMULAS]
    cells.write(file, ["=a", "b"], rows, lineterminator="\r\n")
    file.seek(0)
    assert list(cells.read(file)) == [["=a", "b"], *rows]
    file.seek(0)
    assert [dict(row) for row in cells.read_dicts(file)] == [{"=a": a, "b": b} for a, b in rows]


def test_no_table_that_is_written_holds_a_formula(tmp_path):
    evil = "=cmd()"
    write_rejected(tmp_path / "rejected.csv", [Rejected(evil, "broken")])
    identity.write_linkage(str(tmp_path / "linkage.csv"), [("p1", "patient", evil)], str(tmp_path / "out"))
    identity.write_linkage(str(tmp_path / "linkage.csv"), [("p2", "patient", "x")], str(tmp_path / "out"))
    exclusions.write(tmp_path / "leaks.csv", [(evil, evil, "a" * 64, "pixels", evil, evil)])
    write_csv(tmp_path / "splits.csv", ["frame"], [[evil]])
    for path in tmp_path.glob("*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        assert not [cell for row in rows for cell in row if cell.startswith("=")]
        assert [cell for row in rows for cell in row if cell == "'" + evil]
    assert exclusions.read(tmp_path / "leaks.csv").reason(evil, evil, "")
