"""The catalogue: complete, strict about its files, and honest about what was verified."""

import dataclasses
import re

import pytest

from data_prep import catalog
from data_prep.catalog import schema
from data_prep.readers import VIDEOS, VOLUMES, Options
from tests.data_prep.trees import TREES
from usfmae_jax.errors import InputError

ENTRIES = {name: catalog.load(name) for name in catalog.names()}
ROWS = {entry.number: entry for entry in ENTRIES.values() if entry.number}


def test_all_46_rows_and_the_kinds_of_files_are_there():
    assert sorted(ROWS) == list(range(1, 47))
    assert {name for name, entry in ENTRIES.items() if entry.generic} == {
        "folder",
        "phantom",
        "dicom",
        "video",
        "volume",
    }


def test_the_three_benchmarks_and_nothing_else_are_kept_out_of_pretraining():
    assert [number for number, entry in sorted(ROWS.items()) if entry.benchmark] == [12, 27, 33]
    assert ROWS[12].classes == ("benign", "malignant")
    assert ROWS[27].classes == ("leiomyoma", "GIST")
    assert len(ROWS[33].classes) == 8


def test_ids_are_hashed_for_dicom():
    assert [name for name, entry in ENTRIES.items() if entry.private] == ["dicom"]


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_called_verified_has_a_tree_that_is_tested(name):
    entry = ENTRIES[name]
    assert entry.layouts or name in ("cactus", "phantom")
    assert (entry.verified == "documented only") == (name == "cactus")
    if entry.layouts and not entry.generic:
        assert len([key for key in TREES if key.split()[0] == name]) >= len(entry.layouts)
    if entry.verified == "real files":
        assert entry.verification


@pytest.mark.parametrize("name", ENTRIES)
def test_a_person_learns_where_to_get_a_dataset_and_under_which_terms(name):
    entry = ENTRIES[name]
    text = catalog.describe(entry)
    assert entry.title in text
    assert entry.access in text
    assert max(map(len, text.splitlines())) <= 130
    if not entry.generic:
        assert entry.homepage.startswith("https://")
        assert entry.homepage in text
        assert entry.licence
        assert entry.anatomy or name == "pluslib"
        assert entry.access_note or entry.downloads


@pytest.mark.parametrize("download", [one for entry in ENTRIES.values() for one in entry.downloads])
def test_downloads_are_encrypted_files_with_checksums_of_the_right_length(download):
    assert download.url.startswith("https://")
    assert "/" not in download.file
    assert re.fullmatch("([0-9a-f]{64})?", download.sha256)
    assert re.fullmatch("([0-9a-f]{32})?", download.md5)


def test_the_listing_has_every_row_and_fits_120_columns():
    listing = catalog.listing()
    assert max(map(len, listing.splitlines())) <= 120
    for entry in ENTRIES.values():
        assert re.search(
            rf"^ *{entry.number or ''} +{entry.name} .*{entry.access} +{entry.verified}$", listing, re.MULTILINE
        )
    assert "46 rows" in listing
    assert f"{sum(entry.verified == 'real files' for entry in ROWS.values())} real files" in listing


def test_the_listing_can_be_searched():
    rows = re.findall(r"^[ \d]{4}(\w+)", catalog.listing("BREAST"), re.MULTILINE)
    assert {"breast", "bus_bra", "busi"} <= set(rows)
    assert {"hc", "aul"}.isdisjoint(rows)
    assert re.findall(r"^[ \d]{4}(\w+)", catalog.listing("hc18"), re.MULTILINE) == ["name", "hc"]  # an alias
    with pytest.raises(InputError, match="--list=brest: no dataset has that"):
        catalog.listing("brest")


def test_options_of_readers_are_those_that_readers_have():
    types = {field.name: field.type for field in dataclasses.fields(Options)}
    types["axis"] = int  # or None, which TOML does not have
    assert types == schema.READER


def test_clips_and_volumes_are_found_by_all_suffixes_that_readers_know():
    assert set(ENTRIES["video"].layouts[0].suffixes) == VIDEOS
    assert set(ENTRIES["volume"].layouts[0].suffixes) == VOLUMES
    assert ENTRIES["folder"].layouts[0].suffixes == ("*",)


@pytest.mark.parametrize("name", ["bus_bra", "BUS-BRA", "busbra", "hc18", "covid_blues"])
def test_names_have_aliases_and_any_spelling(name):
    assert catalog.load(name).name in ("bus_bra", "hc", "blues")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"--dataset=bus_brra .* did you mean bus_bra.*--list"):
        catalog.load("bus_brra")


MINIMAL = 'name = "mine"\ntitle = "Mine"\nverified = "real files"\n[[layout]]\ninclude = ["**/*.png"]\n'


def _file(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_dataset_of_ones_own_needs_four_keys(tmp_path):
    entry = catalog.load_file(_file(tmp_path, MINIMAL))
    assert entry.layouts[0].include == ("**/*.png",)
    assert entry.version == "1.0.0"
    assert len(entry.fingerprint) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is no TOML file"),
        ("name = " + "[" * 5000, "nested too deeply"),
        (MINIMAL.replace('title = "Mine"\n', ""), "title is missing"),
        (MINIMAL.replace("title", "tittle"), r"unknown key 'tittle', did you mean 'title'\?"),
        (MINIMAL.replace("include", "incldue"), "layout 1: unknown key 'incldue'"),
        (MINIMAL.replace('"**/*.png"', "3"), "layout 1: include 1 must be of type str, not 3"),
        (MINIMAL.replace('["**/*.png"]', '"**/*.png"'), "layout 1: include must be a list"),
        (MINIMAL.replace('["**/*.png"]', "[]"), "layout 1: include is empty"),
        (MINIMAL.replace('"mine"', '"Mine 2"'), "name 'Mine 2' must be"),
        (MINIMAL.replace("real files", "surely"), "verified 'surely' must be one of"),
        (MINIMAL.replace("[[layout]]", 'access = "free"\n[[layout]]'), "access 'free' must be one of"),
        (MINIMAL.replace("[[layout]]", 'version = "1"\n[[layout]]'), "version '1' must be like"),
        (MINIMAL.replace("[[layout]]", 'classes = ["a", "A"]\n[[layout]]'), "classes has a name twice"),
        (MINIMAL.replace("[[layout]]", "number = true\n[[layout]]"), "number must be of type int"),
        (MINIMAL.replace("[[layout]]", "expected = { dogs = 1 }\n[[layout]]"), "expected.dogs is not counted"),
        (MINIMAL.replace("[[layout]]", 'fingerprint = "0"\n[[layout]]'), "fingerprint is not a key"),
        (
            MINIMAL + '[[download]]\nurl = "a"\nfile = "b"\nextract = "all"',
            "extract of 'b' must be true, false or 'nested'",
        ),
        (MINIMAL + "pattern = '(?P<patient>'", "layout 1: pattern .* is no regular expression"),
        (MINIMAL + 'patient = "{nobody}"', r"layout 1: \{nobody\} is no group of the pattern"),
        (MINIMAL + 'splits = { a = "trian" }', "layout 1: splits.a must be one of train, validation, test"),
        (MINIMAL + 'labels = { a = "b" }', "layout 1: labels.a: 'b' is not in classes"),
        (MINIMAL + "reader = { strde = 2 }", "layout 1: reader.strde must be one of stride"),
        (MINIMAL + 'reader = { stride = "2" }', "layout 1: reader.stride must be one of stride"),
        (MINIMAL + 'mask_kind = "blue"', "layout 1: mask_kind 'blue' must be one of"),
        (MINIMAL + 'content = "png"', "layout 1: content 'png' must be"),
        (MINIMAL + '[[layout.table]]\nfile = ["a.csv"]', "layout 1: table 1: key is missing"),
        (
            MINIMAL + '[[layout.folds]]\nname="a"\nfile=["a"]\nkey="{a}"\nfold="{b}"',
            "folds 'a' needs either part or others",
        ),
        (
            MINIMAL + '[[layout.folds]]\nname="a/b"\nfile=["a"]\nkey="a"\nfold="b"\npart="c"',
            "'a/b' must be that of a file",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_file_and_key(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        catalog.load_file(_file(tmp_path, text))
    assert "mine.toml" in str(error.value)


def test_templates_are_empty_when_a_field_is():
    assert schema.fill("{a}/{b}", {"a": "1", "b": "2"}) == "1/2"
    assert schema.fill("{a}/{b}", {"a": "1", "b": ""}) == ""
    assert schema.fill("{a.real}", {"a": "1"}) == ""
    assert schema.fill("train", {}) == "train"


@pytest.mark.parametrize(
    ("glob", "matched", "not_matched"),
    [
        ("**/*.png", ["a.png", "x/y/a.png"], ["a.PNG", "a.png.txt"]),
        ("**/US images/*.png", ["US images/1.png", "a/US images/1.png"], ["bUS images/1.png", "US images/b/1.png"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a/c"]),
        ("case[0-9].png", ["case1.png"], ["caseA.png", "case12.png"]),
        ("[!a]?.png", ["bc.png"], ["ac.png", "b/.png"]),
        ("a+(1).png", ["a+(1).png"], ["aa1.png"]),
        ("[a", ["[a"], ["a"]),
    ],
)
def test_globs(glob, matched, not_matched):
    matches = schema.glob_matcher([glob])
    assert [path for path in matched if not matches(path)] == []
    assert [path for path in not_matched if matches(path)] == []


def test_no_globs_match_nothing():
    assert not schema.glob_matcher([])("a")
