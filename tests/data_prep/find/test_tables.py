"""Tables: whatever their separators, marks and gaps, the same rows; damaged ones are one sentence."""

import csv
import dataclasses
import json
import sys
import tracemalloc
import zipfile

import openpyxl
import pytest

from data_prep import catalog, find
from data_prep.catalog.schema import Folds, Layout, Table
from data_prep.find import collect, tables
from data_prep.find.files import Item
from tests.data_prep.trees import TREES, coco, grow
from usfmae_jax.errors import InputError


def _table(tmp_path, text, name="a.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "name,Class\n1.JPG,4\n"),
        ("a.csv", "\ufeff name ; Class \r\n1.JPG; 4 \r\n\r\n"),
        ("a.csv", 'name,Class\n"1.JPG",4\n,\n'),
        ("a.tsv", "name\tClass\n1.JPG\t4"),
        ("a.txt", "name Class\n\n1.JPG  4\n"),
        ("a.txt", "name,Class\n1.JPG,4\n"),
        ("a.xml", "<a><name>1.JPG</name><Class> 4 </Class><b><Class>5</Class></b></a>"),
    ],
)
def test_separators_marks_blanks_and_empty_lines_do_not_matter(tmp_path, name, text):
    assert tables.read_table(_table(tmp_path, text, name)) == [{"name": "1.JPG", "Class": "4"}]


def test_a_table_without_a_header_gets_its_names(tmp_path):
    assert tables.read_table(_table(tmp_path, "0000.jpg,1\n"), ("file", "class")) == [
        {"file": "0000.jpg", "class": "1"}
    ]


def test_commas_in_quotes_and_short_rows_are_kept_apart(tmp_path):
    rows = tables.read_table(_table(tmp_path, 'ID,BBOX,Case\na,"[1,2,3,4]",7\nb\n'))
    assert rows == [{"ID": "a", "BBOX": "[1,2,3,4]", "Case": "7"}, {"ID": "b"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1"])
@pytest.mark.parametrize("text", ["a,b\nKöln,1\n", "a\tb\r\nKöln\t1\r\n"])
def test_a_table_is_read_in_whatever_encoding_it_was_saved(tmp_path, encoding, text):
    assert tables.read_table(_table(tmp_path, text.encode(encoding))) == [{"a": "Köln", "b": "1"}]


def test_a_cell_that_says_that_there_is_no_value_is_empty(tmp_path):
    rows = tables.read_table(_table(tmp_path, "a,b,c,d,e\nNA,nan,N/A,<NA>,none\n"))
    assert rows == [{"a": "", "b": "", "c": "", "d": "", "e": "none"}]  # some classes are called "none"


def test_coco_gives_a_row_for_every_annotation_and_every_bare_image(tmp_path):
    text = coco([("images/1.jpg", 2), ("2.jpg", 1)]).replace('"image_id": 1', '"image_id": 0')
    rows = tables.read_table(_table(tmp_path, text, "a.json"))
    assert rows == [
        {"file_name": "1.jpg", "category": "GIST"},
        {"file_name": "1.jpg", "category": "lmym"},
        {"file_name": "2.jpg", "category": ""},
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b"{"),
        ("a.json", b"[1]"),
        ("a.json", b'{"images": [], "annotations": [{"image_id": 1, "category_id": 9}], "categories": []}'),
        ("a.json", b"[" * 100_000),
        ("a.xlsx", b"no archive"),
        ("a.xlsx", b"PK\x05\x06" + bytes(18)),
        ("a.csv", b'a\n"' + b"x" * 200_000),
    ],
)
@pytest.mark.parametrize("limit", [1 << 17, 1 << 26])  # of the csv module, the whole process's: others raise it
def test_a_damaged_table_is_one_sentence_that_names_it(tmp_path, name, data, limit):
    csv.field_size_limit(limit)
    with pytest.raises(InputError, match=rf"table {name} is damaged or of another kind"):
        tables.read_table(_table(tmp_path, data, name))


def test_a_table_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_BYTES", 8)
    with pytest.raises(InputError, match=r"table a\.csv is larger than"):
        tables.read_table(_table(tmp_path, "a,b\n1,2\n3,4\n"))


def test_a_spreadsheet_that_unpacks_to_more_than_it_can_hold_is_not_read(tmp_path, monkeypatch):
    root = grow(TREES["breast"], tmp_path)
    path = next(root.glob("*.xlsx"))
    assert len(tables.read_table(path)) == 2
    monkeypatch.setattr(tables, "MAX_BYTES", 10_000)  # the file has 5,000 bytes, unpacked more than 4 times this
    size = path.stat().st_size
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/more.xml", bytes(50_000))
    assert size < path.stat().st_size < 10_000
    with pytest.raises(InputError, match="unpacks to more"):
        tables.read_table(path)


def _sheet(path, xml, more=""):
    """An XLSX file with this XML as its first sheet, compressed."""
    openpyxl.Workbook().save(path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in plain.namelist():
            main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
            sheet = f'{more}<worksheet xmlns="{main}">{xml}</worksheet>'
            made.writestr(name, sheet if name == "xl/worksheets/sheet1.xml" else plain.read(name))
    return path


def _cell(place, text):
    return f'<c r="{place}" t="inlineStr"><is><t>{text}</t></is></c>'


def test_a_spreadsheet_is_not_filled_up_to_what_it_declares(tmp_path):
    rows = f'<row r="1">{_cell("A1", "file")}</row><row r="2000">{_cell("A2000", "a.png")}</row>'
    sheet = f'<dimension ref="A1:XFD1048576"/><sheetData>{rows}</sheetData>'
    tracemalloc.start()
    try:
        assert tables.read_table(_sheet(tmp_path / "a.xlsx", sheet)) == [{"file": "a.png"}]
        assert tracemalloc.get_traced_memory()[1] < 20e6  # bytes; a row of what it declares takes 131,072
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("xml", "limits", "said"),
    [
        ('<row><c r="XFD1"/></row>' * 9, {"_MAX_CELLS": 100_000}, "more than 100,000 cells"),
        ("<row>" + "<c/>" * 900 + "</row>", {"_MAX_ELEMENTS": 600}, "more than 600 elements"),
        (f"<row>{_cell('A1', 'x' * 900)}</row>", {"_MAX_CELL": 800}, "a cell has more than 800 letters"),
        ("<row>" + "<c/>" * 300_000 + "</row>", {}, "more than 1[0-9]{2},[0-9]{3} elements"),
        ('<row><c t="s"><v>9</v></c></row>', {}, "index"),
        ("<row>", {}, "mismatched tag"),
        (f"<row>{_cell('A1', 'x' * 999)}</row>" * 2000, {}, "one text in very many"),
    ],
)
def test_a_spreadsheet_that_would_fill_the_memory_or_is_broken_is_one_sentence(
    tmp_path, monkeypatch, xml, limits, said
):
    for name, value in limits.items():
        monkeypatch.setattr(tables, name, value)
    path = _sheet(tmp_path / "a.xlsx", f"<sheetData>{xml}</sheetData>")
    with pytest.raises(InputError, match=f"table a.xlsx is damaged or of another kind: .*{said}"):
        tables.read_table(path)


def test_a_spreadsheet_with_entities_is_refused(tmp_path):
    path = _sheet(tmp_path / "a.xlsx", "<sheetData/>", '<!DOCTYPE a [<!ENTITY e "x">]>')
    with pytest.raises(InputError, match="declares entities"):
        tables.read_table(path)


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_a_table_of_very_many_columns_rows_or_cells_is_one_sentence(tmp_path, monkeypatch, name):
    separator = "," if name == "a.csv" else " "
    with pytest.raises(InputError, match="more than 2,097,152 rows or 16,384 columns"):
        tables.read_table(_table(tmp_path, "x y\n" + separator.join("x" * 16_385), name))
    monkeypatch.setattr(tables, "_MAX_CELLS", 5)
    with pytest.raises(InputError, match="more than 5 cells"):
        tables.read_table(_table(tmp_path, f"a{separator}b\n" * 4, name))
    monkeypatch.setattr(tables, "_MAX_ROWS", 3)
    with pytest.raises(InputError, match="more than 3 rows"):
        tables.read_table(_table(tmp_path, f"a{separator}b\n" * 4, name))


def test_a_line_of_nothing_but_separators_is_not_split(tmp_path):
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="more than 16,384 columns"):
            tables.read_table(_table(tmp_path, "a,b\n" + "," * 3_000_000))
        assert tracemalloc.get_traced_memory()[1] < 20e6  # bytes; split it is 8 for each
    finally:
        tracemalloc.stop()


def test_images_of_one_number_are_one_sentence_and_not_multiplied_by_its_annotations(tmp_path):
    text = coco([("1.jpg", 2), ("2.jpg", 1)]).replace('"id": 1, "file', '"id": 0, "file')
    with pytest.raises(InputError, match="two images have one id"):
        tables.read_table(_table(tmp_path, text, "a.json"))


def test_a_long_category_of_many_annotations_is_one_sentence(tmp_path):
    images = [{"id": 0, "file_name": "a"}]
    said = {"images": images, "annotations": [{"image_id": 0, "category_id": 0}] * 1000}
    text = json.dumps(said | {"categories": [{"id": 0, "name": "x" * 20_000}]})
    with pytest.raises(InputError, match="one text for very many annotations"):
        tables.read_table(_table(tmp_path, text, "a.json"))


def test_without_openpyxl_labels_are_left_out_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    root = grow(dataclasses.replace(TREES["breast"], tables={}), tmp_path)
    with zipfile.ZipFile(root / "BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx", "w") as archive:
        archive.writestr("a", "b")
    found = collect(catalog.load("breast"), root)
    assert [item.label for item in found.items] == [-1, -1]
    assert any("was left out: XLSX tables need openpyxl: pip install" in warning for warning in found.warnings)


@pytest.mark.parametrize("key", ["1", "001", "001.png", "1.JPG"])
def test_suffixes_and_leading_zeros_do_not_count_in_keys(key):
    assert tables.plain_key("{key}", {"key": key}) == "1"


def test_other_keys_stay_as_they_are():
    keys = ["p/001", "1.2.3", "Cov-Atlas+(44)", "0", "IM-0001"]
    assert [tables.plain_key("{key}", {"key": key}) for key in keys] == keys


def _apply(tmp_path, text, **fields):
    _table(tmp_path, text)
    values = {"x/1.png": {"label": "path", "patient": ""}, "x/2.png": {"label": "", "patient": ""}}
    known = {path: {"stem": path[2]} for path in values}
    warnings = []
    used = tables.apply(tmp_path, [Table(("*.csv",), "{id}", **fields)], ["a.csv", *values], known, values, warnings)
    assert used == {"a.csv"}
    return values, warnings


def test_tables_overrule_paths_and_empty_cells_do_not(tmp_path):
    values, warnings = _apply(tmp_path, "id,c,p\n1,,a\n2,table,b\n", label="{c}", patient="{p}")
    assert values == {
        "x/1.png": {"label": "path", "patient": "a"},
        "x/2.png": {"label": "table", "patient": "b"},
    }
    assert warnings == []


def test_rows_that_disagree_or_name_nothing_and_files_without_a_row_are_told(tmp_path):
    values, warnings = _apply(tmp_path, "id,c\n2,a\n2,b\n2,a\n9,a\n,a\n", label="{c}")
    assert values["x/2.png"]["label"] == ""
    assert warnings == [
        "1 entries of *.csv name no file that is there, first '9'",
        "rows of *.csv disagree about 1 files, first the label of '2'",
        "1 files have no label in *.csv, first 'x/2.png'",
    ]


def _folds(tmp_path, text, **fields):
    _table(tmp_path, text)
    found = {name: Item(f"{name}.png", frame=name, patient=name[0]) for name in ("a1", "a2", "b1")}
    warnings = []
    rows, _ = tables.read_folds(tmp_path, Folds("f", ("*.csv",), "{id}", "{k}", **fields), ["a.csv"], found, warnings)
    return rows, warnings


def test_folds_by_column_say_what_a_row_is_in_every_round(tmp_path):
    rows, warnings = _folds(tmp_path, "id,k,v1,v2\na1,1,NaN,0\na2,1,,1.0\nb1,2,1,nan\nz9,1,,1\n", others="v{fold}")
    assert rows == [
        ("a1", "1", "test"),
        ("a2", "1", "test"),
        ("b1", "1", "train"),
        ("a1", "2", "validation"),
        ("a2", "2", "train"),
        ("b1", "2", "test"),
    ]
    assert warnings == []


def test_folds_that_test_on_patients_they_train_on_are_told(tmp_path):
    rows, warnings = _folds(tmp_path, "id,k,p\na1,1,train\na2,1,test\nb1,1,val\n", part="{p}")
    assert rows == [("a1", "1", "train"), ("a2", "1", "test"), ("b1", "1", "validation")]
    assert warnings == ["1 patients are trained on and tested in the same fold of f"]


def test_a_part_of_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"table a.csv: 'dev' is none of train, val, test"):
        _folds(tmp_path, "id,k,p\na1,1,dev\n", part="{p}")
    rows, _ = _folds(tmp_path, "id,k,p\na1,1,dev\n", part="{p}", parts={"dev": "validation"})
    assert rows == [("a1", "1", "validation")]


def test_class_names_in_a_table_that_steer_a_terminal_become_codes(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("file,label,patient\na.png,\x1b]52;c;aGk=\x07\u202e,p\x1b[2J\n")
    found = collect(catalog.load("folder"), tmp_path, labels=str(tmp_path / "labels.csv"))
    assert found.label_names == [r"\u001b]52;c;aGk=\u0007\u202e"]
    assert found.items[0].label == 0


def test_classes_have_their_numbers_by_name_and_by_what_they_are_called():
    names = [str(number) for number in range(10_000)]
    assert find._label_numbers(Layout(("**",), labels={"ten": "10"}), names)["ten"] == 10
    assert find._label_numbers(Layout(("**",)), ["B", "a"]) == {"b": 0, "a": 1}
