"""Folders to items: every documented layout in miniature, what people type instead, and the real datasets."""

import collections
import dataclasses
import os
import signal
import time

import pytest

from data_prep import catalog
from data_prep.catalog.schema import Entry, Layout
from data_prep.find import collect
from data_prep.readers import Options
from tests.data_prep.trees import TREES, grow, real_folder
from usfmae_jax.errors import InputError


def _label(found, item):
    return found.label_names[item.label] if item.label >= 0 else ""


def _grown(key, root, **arguments):
    return collect(catalog.load(key.split()[0]), grow(TREES[key], root), **arguments)


def _write(root, *paths, data=b"x"):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def _entry(*include, classes=(), **layout):
    return Entry("mine", "Mine", "real files", classes=classes, layouts=(Layout(include or ("**/*.png",), **layout),))


@pytest.mark.parametrize("key", TREES)
def test_the_documented_tree_gives_its_frames_ids_labels_masks_and_splits(tmp_path, key):
    found = _grown(key, tmp_path)
    tree = TREES[key]
    assert sorted(item.path for item in found.items) == sorted(tree.frames)
    for item in found.items:
        values = dataclasses.asdict(item) | {"label": _label(found, item), "mask": "".join(item.masks)}
        assert {field: values[field] for field in tree.frames[item.path]} == tree.frames[item.path]
    assert found.rejected == []
    assert {name: set(rows) for name, rows in found.splits.items()} == tree.folds
    doubts = [warning for warning in found.warnings if "are in the whole dataset" not in warning]
    assert len(doubts) == len(tree.warnings)
    assert all(expected in doubt for expected, doubt in zip(tree.warnings, doubts, strict=True))
    assert found.left_out["hidden files and folders"] == 4


@pytest.mark.parametrize("key", TREES)
def test_a_dataset_is_found_below_any_folder(tmp_path, key):
    found = _grown(key, tmp_path / "downloads" / "here")
    again = collect(catalog.load(key.split()[0]), tmp_path)
    assert len(again.items) == len(found.items)
    assert [(item.patient, item.video, item.label) for item in again.items] == [
        (item.patient, item.video, item.label) for item in found.items
    ]


@pytest.mark.parametrize("key", [key for key, tree in TREES.items() if tree.optional])
def test_optional_parts_are_added_by_name_and_have_ids(tmp_path, key):
    for switch, paths in TREES[key].optional.items():
        found = _grown(key, tmp_path, switches=[switch])
        assert {item.path for item in found.items} == {*TREES[key].frames, *paths}
        assert not any("do not match the pattern" in warning for warning in found.warnings)


def test_key_frames_of_camus_come_with_their_masks(tmp_path):
    found = _grown("camus_public", tmp_path, switches=["key_frames"])
    folder = "database_nifti/patient0001/patient0001_2CH"
    assert {item.path: item.masks for item in found.items}[f"{folder}_ED.nii.gz"] == (f"{folder}_ED_gt.nii.gz",)
    assert {item.video for item in found.items} == {"patient0001_2CH"}


def test_clips_without_a_trusted_class_have_no_label(tmp_path):
    found = _grown("pocus", tmp_path, switches=["uncertain"])
    assert [item.label for item in found.items if "uncertain" in item.path] == [-1]


def test_an_unknown_switch_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="--optional=humans is not known to porcine, only human, no_masks, one_split"):
        _grown("porcine", tmp_path, switches=["humans"])


def test_masks_and_splits_can_be_left_out(tmp_path):
    found = _grown("hc", tmp_path, switches=["no_masks", "one_split"])
    assert {(item.masks, item.split) for item in found.items} == {((), "train")}


def test_a_layout_that_nobody_knows_is_asked_for(tmp_path):
    _write(tmp_path, "A4C/p1_0.png", "A4C/p1_1.png", "notes.txt")
    entry = catalog.load("cactus")
    with pytest.raises(InputError, match=r"the layout of cactus is not known: .*--include='\*\*/\*.png'.*--pattern="):
        collect(entry, tmp_path)
    with pytest.raises(InputError, match="the layout of cactus is not known"):
        collect(entry, tmp_path, pattern="(?P<patient>p1)")
    found = collect(
        entry, tmp_path, include=["**/*.png"], pattern=r"(?P<cls>[^/]+)/(?P<video>p\d+)_(?P<frame>\d+)\.png$"
    )
    assert [(item.video, item.frame, _label(found, item)) for item in found.items] == [
        ("p1", "p1/0", "A4C"),
        ("p1", "p1/1", "A4C"),
    ]


def test_a_folder_that_holds_something_else_is_refused_with_what_was_expected(tmp_path):
    _write(tmp_path, "a.png")
    with pytest.raises(InputError, match=r"no files of bus_bra, expected \*\*/Images/bus_\*.png.*--include=GLOB"):
        collect(catalog.load("bus_bra"), tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        collect(catalog.load("bus_bra"), tmp_path / "nowhere")
    with pytest.raises(InputError, match="takes no --input"):
        collect(catalog.load("phantom"), tmp_path)


def test_own_globs_replace_those_of_the_catalogue_and_masks_stay_out(tmp_path):
    _write(tmp_path, "renamed/bus_0001-l.png", "Masks/mask_0001-l.png")
    found = collect(catalog.load("bus_bra"), tmp_path, include=["**/*.png"])
    assert [item.path for item in found.items] == ["renamed/bus_0001-l.png"]
    assert any("1 files do not match the pattern of ids" in warning for warning in found.warnings)


def test_files_whose_ids_cannot_be_read_are_kept_and_counted(tmp_path):
    _write(tmp_path, "p1_1.png", "strange.png")
    found = collect(_entry(pattern=r"(?P<patient>p\d+)_"), tmp_path)
    assert [item.patient for item in found.items] == ["p1", ""]
    assert found.warnings == [
        "1 files do not match the pattern of ids, first 'strange.png': each of them counts as a patient of its own"
    ]


def test_own_patterns_must_be_regular_expressions(tmp_path):
    with pytest.raises(InputError, match="--pattern=\\( is no regular expression"):
        collect(catalog.load("folder"), tmp_path, pattern="(")


def test_a_plain_folder_is_collected_as_ever(tmp_path):
    _write(tmp_path, "b/2.png", "a/1.JPG", "labels.csv")
    found = collect(catalog.load("folder"), tmp_path, labels="parent")
    assert [(item.path, _label(found, item)) for item in found.items] == [("a/1.JPG", "a"), ("b/2.png", "b")]
    (tmp_path / "labels.csv").write_text("file,label,patient\nb/2.png,x,p\n")
    listed = collect(catalog.load("folder"), tmp_path, labels=str(tmp_path / "labels.csv"))
    assert [(item.path, item.patient) for item in listed.items] == [("b/2.png", "p")]
    assert found.options == listed.options == Options()


def test_a_plain_folder_is_searched_for_all_that_can_be_read_and_litter_is_not(tmp_path):
    _write(tmp_path, "a.nii.gz", "b.MHA", "c.mp4", "b.gz", "__MACOSX/d.png", "Thumbs.db")
    found = collect(catalog.load("folder"), tmp_path)
    assert [item.path for item in found.items] == ["a.nii.gz", "b.MHA", "c.mp4"]
    assert found.left_out == {"hidden files and folders": 2, "archives, which have to be unpacked first": 1}


def test_in_a_plain_folder_content_decides_where_the_suffix_says_nothing(tmp_path):
    _write(tmp_path, "IM0001", "scan.2", data=bytes(128) + b"DICM")
    _write(tmp_path, "bild.alt", data=b"\x89PNG\r\n\x1a\n")
    _write(tmp_path, "notes", "table.csv", data=b"a,b\n")
    _write(tmp_path, "volume.raw", data=b"BM")  # the data of a header may begin with anything
    found = collect(catalog.load("folder"), tmp_path)
    assert [item.path for item in found.items] == ["IM0001", "bild.alt", "scan.2"]
    assert found.left_out == {"other files": 3}


def test_a_table_of_labels_in_the_folder_is_named_until_it_is_read(tmp_path):
    _write(tmp_path, "a.png", "notes.txt")
    (tmp_path / "labels.csv").write_text("file,label\na.png,b\n")
    found = collect(catalog.load("folder"), tmp_path)
    assert found.left_out == {"other files": 2}
    assert found.warnings == [
        "labels.csv is in the folder and is not read; --labels=DIR/labels.csv, where DIR is that of --input, takes "
        "labels and patients from it"
    ]
    found = collect(catalog.load("folder"), tmp_path, labels=str(tmp_path / "labels.csv"))
    assert (found.left_out, found.warnings) == ({"other files": 1}, [])


def test_a_pattern_that_names_nothing_is_refused(tmp_path):
    _write(tmp_path, "p2/1.png")
    with pytest.raises(InputError, match="names nothing"):
        collect(catalog.load("folder"), tmp_path, pattern="^([^/]+)/")


def test_a_plain_folder_can_have_a_pattern(tmp_path):
    _write(tmp_path, "p2/1.png", "p1/1.JPG", "notes.txt")
    found = collect(catalog.load("folder"), tmp_path, pattern="(?P<patient>[^/]+)/")
    assert [(item.path, item.patient) for item in found.items] == [("p1/1.JPG", "p1"), ("p2/1.png", "p2")]
    assert found.left_out == {"other files": 1}


def test_parent_folders_can_be_the_labels_of_any_dataset(tmp_path):
    _write(tmp_path, "b/1.mp4", "a/1.MP4", "a/1.txt")
    found = collect(catalog.load("video"), tmp_path, labels="parent")
    assert [(item.path, _label(found, item)) for item in found.items] == [("a/1.MP4", "a"), ("b/1.mp4", "b")]


def test_dicom_is_told_by_content_not_by_suffix(tmp_path):
    head = bytes(128) + b"DICM"
    _write(tmp_path, "IM0001", "1.2.840.113", "scan.dcm", data=head)
    _write(tmp_path, "README.md", "short", "picture.png", "damaged.DCM")
    found = collect(catalog.load("dicom"), tmp_path)
    assert sorted(item.path for item in found.items) == ["1.2.840.113", "IM0001", "damaged.DCM", "scan.dcm"]
    assert found.left_out == {"other files": 3}


def test_frames_of_a_clip_are_in_the_order_of_their_numbers(tmp_path):
    _write(tmp_path, "v_10.png", "v_2.png", "v_1.png")
    assert [item.path for item in collect(_entry(), tmp_path).items] == ["v_1.png", "v_2.png", "v_10.png"]


def test_frame_ids_that_stand_for_several_files_are_not_used(tmp_path):
    _write(tmp_path, "a/1.png", "b/1.png", "b/2.png")
    found = collect(_entry(pattern=r"(?P<image>\d+)\.png"), tmp_path)
    assert [item.frame for item in found.items] == ["", "", "2"]
    assert "1 frame ids stand for several files, first '1'" in found.warnings[0]


def test_a_patient_on_both_sides_of_a_split_is_refused_with_the_way_out(tmp_path):
    _write(tmp_path, "train/p1_1.png", "test/p1_2.png")
    entry = _entry(pattern=r"(?P<split>train|test)/(?P<patient>p\d+)_")
    with pytest.raises(InputError, match=r"patient 'p1' is in the splits .*--optional=one_split"):
        collect(entry, tmp_path)
    assert {item.split for item in collect(entry, tmp_path, switches=["one_split"]).items} == {"train"}


def test_a_split_of_an_unknown_name_is_refused(tmp_path):
    _write(tmp_path, "holdout/1.png")
    with pytest.raises(
        InputError, match="is in split 'holdout', which is none of train, val, test; --optional=one_split"
    ):
        collect(_entry(pattern="(?P<split>[a-z]+)/"), tmp_path)


def test_labels_that_are_no_classes_are_named_and_left_out(tmp_path):
    _write(tmp_path, "good/1.png", "odd/2.png")
    found = collect(_entry(pattern="(?P<cls>[a-z]+)/", classes=("Good",)), tmp_path)
    assert [item.label for item in found.items] == [0, -1]
    assert "'odd'" in found.warnings[0]


def test_missing_masks_are_noticed_when_all_are_missing(tmp_path):
    _write(tmp_path, "1.png", "2.png", "m/2.bmp")
    some = collect(_entry(mask="{dir}/m/{stem}.bmp"), tmp_path)
    assert [item.masks for item in some.items] == [(), ("m/2.bmp",)]
    assert some.warnings == []
    none = collect(_entry(mask="../m/{stem}.bmp"), tmp_path)
    assert [item.masks for item in none.items] == [(), ()]
    assert "there are no masks" in none.warnings[0]


def test_counts_that_differ_from_the_published_ones_are_warnings(tmp_path):
    warnings = _grown("bus_bra", tmp_path).warnings
    assert "4 files were found, 1,875 are in the whole dataset" in warnings
    assert "2 malignant were found, 607 are in the whole dataset" in warnings


def test_files_that_take_no_part_are_counted_by_kind(tmp_path):
    found = _grown("bus_bra", _write(tmp_path, "BUSBRA/README.md"))
    assert found.left_out == {
        "hidden files and folders": 4,
        "masks and copies that the catalogue excludes": 1,
        "other files": 1,
    }


def test_links_that_leave_the_folder_are_rejected_and_other_litter_is_not(tmp_path):
    outside = _write(tmp_path / "outside", "secret.png")
    root = _write(tmp_path / "root", "1.png")
    os.symlink(outside / "secret.png", root / "2.png")
    os.symlink(outside / "secret.png", root / "2.txt")
    os.symlink(outside, root / "folder")
    found = collect(_entry(), root)
    assert [item.path for item in found.items] == ["1.png"]
    assert {one.source: one.reason for one in found.rejected} == {
        "2.png": "link that leaves the input folder",
        "folder": "link to a folder, not followed",
    }


def test_names_that_are_not_utf8_are_escaped_in_ids(tmp_path):
    name = os.fsdecode(b"p\xff_1.png")
    _write(tmp_path, name)
    found = collect(_entry(pattern="(?P<patient>.+)_"), tmp_path)
    assert [(item.path, item.patient) for item in found.items] == [(name, r"p\xff")]


def test_the_fingerprint_is_that_of_files_masks_and_tables(tmp_path):
    before = _grown("bus_bra", tmp_path).fingerprint
    _write(tmp_path, "BUSBRA/README.md")
    entry = catalog.load("bus_bra")
    assert collect(entry, tmp_path).fingerprint == before
    with (tmp_path / "BUSBRA/bus_data.csv").open("a") as file:
        file.write("\n")
    assert collect(entry, tmp_path).fingerprint != before


def test_reader_options_come_with_the_files(tmp_path):
    assert _grown("regpro", tmp_path / "a").options == Options(axis=2, flip="both")
    assert _grown("echonet_dynamic", tmp_path / "b").options == Options(max_frames=2)
    assert _grown("thyroid_us_cineclip", tmp_path / "c").options == Options(key="image", patient_key="annot_id")
    assert _grown("hc", tmp_path / "d").mask_kind == "outline"


def test_real_bus_bra_has_its_patients_labels_masks_and_folds():
    found = collect(catalog.load("bus_bra"), real_folder("BUS-BRA"))
    assert len(found.items) == 1875
    assert len({item.patient for item in found.items}) == 1064
    assert sum(item.label for item in found.items) == 607
    assert all(item.masks for item in found.items)
    assert found.warnings == []
    rows = found.splits["5-fold-cv"]
    tested = collections.Counter(fold for _, fold, part in rows if part == "test")
    assert [tested[str(fold)] for fold in range(1, 6)] == [376, 385, 366, 365, 383]
    patients = {item.frame: item.patient for item in found.items}
    by_fold = [len({patients[frame] for frame, k, part in rows if part == "test" and k == str(f)}) for f in range(1, 6)]
    assert by_fold == [212, 213, 213, 214, 212]
    assert len(rows) == 5 * 1875
    assert len(found.splits["10-fold-cv"]) == 10 * 1875


def test_real_covid_blues_has_patients_points_and_severities_from_names_and_table():
    found = collect(catalog.load("blues"), real_folder("COVID-BLUES"))
    assert len(found.items) == 51
    repeated = {item.video: item for item in found.items}["patient_15_L2_2"]
    assert repeated.patient == "15"
    assert len({item.video for item in found.items}) == 51
    assert all(item.label >= 0 for item in found.items)
    assert any("311 entries of **/severity.csv name no file" in warning for warning in found.warnings)
    assert len(collect(catalog.load("video"), real_folder("COVID-BLUES")).items) == 51


@pytest.mark.parametrize(
    ("name", "folder", "files", "patients", "masks"),
    [
        ("aul", "AUL_liver", 90, 90, 60),
        ("hc", "HC18", 60, 50, 60),
        ("camus", "CAMUS", 6, 1, 4),
        ("pocus", "POCUS_lung", 4, 4, 0),
        ("usgra_nerve", "USGRA_nerve", 20, 0, 20),
        ("timtrack_muscle", "TimTrack_muscle", 36, 2, 0),
        ("pluslib", "PlusLibData", 4, 0, 0),
        ("volume", "PlusLibData", 4, 0, 0),
        ("dicom", "DICOM_US", 8, 0, 0),
        ("dicom", "BrachialPlexus_DICOM", 6, 0, 0),
    ],
)
def test_real_sets_are_found_with_patients_and_masks(name, folder, files, patients, masks):
    found = collect(catalog.load(name), real_folder(folder))
    assert len(found.items) == files
    assert len({item.patient for item in found.items} - {""}) == patients
    assert sum(bool(item.masks) for item in found.items) == masks
    assert found.rejected == []


def test_real_classes_are_those_of_folders_and_names():
    found = collect(catalog.load("aul"), real_folder("AUL_liver"))
    assert collections.Counter(_label(found, item) for item in found.items) == {
        "benign": 30,
        "malignant": 30,
        "normal": 30,
    }
    found = collect(catalog.load("pocus"), real_folder("POCUS_lung"))
    assert {item.path.rpartition("/")[2]: (item.patient, _label(found, item)) for item in found.items} == {
        "Pneu_emdocs_1.png": ("219", "bacterial pneumonia"),
        "Cov_convex_volpecelli_sonographic_v1.mov": ("134", "COVID-19"),
        "Reg_Image_181602_trimmed_crop.mp4": ("10", "regular"),
        "Reg_pat1Image_132943.mpeg": ("4", "regular"),
    }


def test_a_pattern_that_would_take_for_ever_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.find.files._LONGEST", 0.2)
    _write(tmp_path, "a" * 60 + ".png")
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"takes too long for 'a{60}.png': write it without repetitions"):
        collect(catalog.load("folder"), tmp_path, pattern="(?P<patient>(a+)+)$")
    assert time.monotonic() - begun < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
