"""MMOTU-2D and GIST514-DB from trees of the published layout to shards, labels and official splits.

BUS-BRA, of which the real files are at hand, is in `test_real`.
"""

import collections
import csv
import json

import numpy as np
import pytest

from tests.data_prep.builds import picture, read, run, write
from usfmae_jax.data import records, splits
from usfmae_jax.data.table import read_table
from usfmae_jax.tasks import classification

#: Ids, names and counts of train and val as published; `OTU_2d/*_cls.txt` holds the ids.
MMOTU = (
    ("Chocolate cyst", 226, 110),
    ("Serous cystadenoma", 153, 66),
    ("Teratoma", 228, 108),
    ("Theca cell tumor", 57, 31),
    ("Simple cyst", 47, 19),
    ("Normal ovary", 180, 87),
    ("Mucinous cystadenoma", 71, 33),
    ("High grade serous cystadenocarcinoma", 38, 15),
)
PALETTE = ((64, 0, 0), (0, 64, 0), (0, 0, 64), (64, 0, 64), (64, 64, 0), (64, 64, 64), (0, 128, 0), (0, 0, 128))
#: Small enough to build in a second: of every class four to train with and two to test on.
TRAIN, TEST = 4, 2
GISTS = 20
PARTS = ("train", "validation", "test")


def mmotu_tree(root, folder="OTU_2d"):
    """Images 1 to 48, their classes in turn; returns the class ids by image number."""
    count = len(MMOTU) * (TRAIN + TEST)
    classes = {number: (number - 1) % len(MMOTU) for number in range(1, count + 1)}
    for number, label in classes.items():
        grey = picture(number)
        write(root / folder / f"images/{number}.JPG", np.stack([grey] * 3, axis=-1))
        tumour = np.zeros(grey.shape, np.uint8)
        tumour[10:30, 20 : 40 + label] = 255
        write(root / folder / f"annotations/{number}.PNG", (tumour[..., None] > 0) * np.uint8(PALETTE[label][::-1]))
        write(root / folder / f"annotations/{number}_binary.PNG", tumour)
    write(root / folder / "annotations/7_binary_binary.PNG", tumour)  # litter of some copies
    train, test = list(classes)[: len(MMOTU) * TRAIN], list(classes)[len(MMOTU) * TRAIN :]
    for name, numbers in (("train", train), ("val", test)):
        (root / folder / f"{name}.txt").write_text("".join(f"{number}\n" for number in numbers))
        lines = "".join(f"{number}.JPG  {classes[number]}\n" for number in numbers)
        (root / folder / f"{name}_cls.txt").write_text(lines + "\n")
    return classes


def coco(names, labels, categories):
    """Object detection as COCO has it; ids begin anew in every file, and mean nothing outside it."""
    by_name = {name: number for number, name in categories}
    images = [
        {"id": number, "file_name": name, "width": 64, "height": 48, "anatomy_id": 1}
        for number, name in enumerate(names)
    ]
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": by_name[label],
            "bbox": [10, 8, 20, 10],
            "segmentation": [[10, 8, 30, 8, 30, 18]],
            "area": 100,
            "iscrowd": 0,
        }
        for number, (image, label) in enumerate(
            (image, label) for image, name in enumerate(names) for label in labels[name]
        )
    ]
    kinds = [{"id": number, "name": name} for number, name in categories]
    return json.dumps({"images": images, "annotations": annotations, "categories": kinds})


def gist_tree(root, folder="usd514-db", labels=None):
    """Twenty images, leiomyoma and GIST in turn, five folds of four; returns the labels by file name."""
    names = [f"case_{number:03d}.jpg" for number in range(GISTS)]
    labels = {name: ["lmym", "GIST"][number % 2 : number % 2 + 1] for number, name in enumerate(names)} | (labels or {})
    roi, raw = root / folder / "usd514_jpeg_roi", root / folder / "usd514_jpeg_raw"
    for number, name in enumerate(names):
        write(roi / "images" / name, picture(number))
        write(raw / "images" / name, picture(number, (60, 80)))
    categories = [(1, "lmym"), (2, "GIST")]
    texts = {"all_anno_crop": (names, categories)}
    for fold in range(5):
        test = names[4 * fold : 4 * fold + 4]
        # The order of categories is not promised: names are looked up, ids are not.
        texts[f"train_anno_crop_split_{fold}"] = [name for name in names if name not in test], categories
        texts[f"val_anno_crop_split_{fold}"] = test, [(1, "GIST"), (2, "lmym")] if fold == 3 else categories
    for name, (some, kinds) in texts.items():
        for place, stem in ((roi, name), (raw, name.replace("_crop", ""))):
            (place / "annotations").mkdir(exist_ok=True)
            (place / "annotations" / f"{stem}.json").write_text(coco(some, labels, kinds))
    return labels


def build(tmp_path_factory, dataset, grow):
    """The folder of the build, and what `grow` says about the tree that it is made from."""
    root = tmp_path_factory.mktemp(dataset)
    known = grow(root / "downloads")
    assert run(output=root / "out", source=root / "downloads", dataset=dataset) == 0
    return root / "out" / dataset, known


@pytest.fixture(scope="module")
def mmotu(tmp_path_factory):
    return build(tmp_path_factory, "mmotu_2d", mmotu_tree)


@pytest.fixture(scope="module")
def gist(tmp_path_factory):
    return build(tmp_path_factory, "gist514_db", gist_tree)


def manifest(folder):
    return json.loads((folder / "1.0.0/manifest.json").read_text())


def folds_of(folder):
    with (folder / "1.0.0/splits/5-fold-cv.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_mmotu_has_the_eight_published_classes_in_the_order_of_their_ids(mmotu):
    assert manifest(mmotu[0])["label_names"] == [name for name, _, _ in MMOTU]
    assert (mmotu[0] / "1.0.0/label.labels.txt").read_text().splitlines() == [name for name, _, _ in MMOTU]


def test_published_counts_of_mmotu_are_what_the_entry_expects():
    from data_prep import catalog

    expected = catalog.load("mmotu_2d").expected
    assert expected == {"files": 1469} | {name: train + test for name, train, test in MMOTU}
    assert (sum(train for _, train, _ in MMOTU), sum(test for _, _, test in MMOTU)) == (1000, 469)


@pytest.mark.parametrize(("split", "numbers"), [("train", range(1, 33)), ("test", range(33, 49))])
def test_mmotu_takes_classes_and_split_from_its_lists(mmotu, split, numbers):
    folder, classes = mmotu
    found = {int(record["frame"]): record for record in read(folder, split)}
    assert sorted(found) == list(numbers)
    assert {number: record["label"] for number, record in found.items()} == {n: classes[n] for n in numbers}
    assert {record["source"] for record in found.values()} == {f"OTU_2d/images/{number}.JPG" for number in numbers}


def test_mmotu_has_no_validation_split_no_patients_and_the_binary_masks(mmotu):
    folder, classes = mmotu
    assert set(manifest(folder)["splits"]) == {"train", "test"}
    found = read(folder)
    assert len({record["patient"] for record in found}) == len(classes)
    for record in found:
        mask = records.decode_image(record["mask"])
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).sum() == 20 * (20 + record["label"])


def test_gist_has_leiomyoma_0_and_gist_1_by_name_whatever_the_ids_of_a_file(gist):
    folder, labels = gist
    assert manifest(folder)["label_names"] == ["leiomyoma", "GIST"]
    found = read(folder)
    assert len(found) == GISTS
    for record in found:
        assert record["label"] == (labels[f"{record['frame']}.jpg"] == ["GIST"])


def test_gist_takes_the_crops_and_not_the_raw_images(gist):
    assert {record["source"].rpartition("/")[0] for record in read(gist[0])} == {"usd514-db/usd514_jpeg_roi/images"}
    assert {(record["height"], record["width"]) for record in read(gist[0])} == {(48, 64)}


def test_gist_has_five_folds_whose_val_part_is_the_test_part(gist):
    tested, parts = collections.Counter(), collections.Counter()
    for row in folds_of(gist[0]):
        parts[row["fold"], row["part"]] += 1
        tested[row["frame"]] += row["part"] == "test"
        assert (row["part"] == "test") == (int(row["frame"][-3:]) // 4 == int(row["fold"]))
    assert parts == {(str(fold), part): count for fold in range(5) for part, count in (("train", 16), ("test", 4))}
    assert tested == {f"case_{number:03d}": 1 for number in range(GISTS)}


def test_gist_without_its_outer_folder_is_the_same(tmp_path, gist):
    gist_tree(tmp_path / "in", folder=".")
    assert run(output=tmp_path / "out", source=tmp_path / "in", dataset="gist514_db") == 0
    assert folds_of(tmp_path / "out/gist514_db") == folds_of(gist[0])
    assert [record["label"] for record in read(tmp_path / "out/gist514_db")] == [r["label"] for r in read(gist[0])]


def test_annotations_of_one_image_that_disagree_leave_it_unlabelled_with_a_warning(tmp_path):
    gist_tree(tmp_path / "in", labels={"case_004.jpg": ["lmym", "GIST"], "case_005.jpg": ["GIST", "GIST"]})
    assert run(output=tmp_path / "out", source=tmp_path / "in", dataset="gist514_db") == 0
    labels = {record["frame"]: record["label"] for record in read(tmp_path / "out/gist514_db")}
    assert (labels["case_004"], labels["case_005"]) == (-1, 1)
    assert any("disagree about 1 files" in warning for warning in manifest(tmp_path / "out/gist514_db")["warnings"])


def test_names_of_categories_are_compared_without_case(tmp_path):
    gist_tree(tmp_path / "in")
    for path in (tmp_path / "in").rglob("*.json"):
        path.write_text(path.read_text().replace('"lmym"', '"LMYM"').replace('"GIST"', '"gist"'))
    assert run(output=tmp_path / "out", source=tmp_path / "in", dataset="gist514_db") == 0
    assert manifest(tmp_path / "out/gist514_db")["label_names"] == ["leiomyoma", "GIST"]
    assert collections.Counter(r["label"] for r in read(tmp_path / "out/gist514_db")) == {0: 10, 1: 10}


def test_mmotu_is_tested_on_its_published_val_part_and_chooses_on_some_of_train(mmotu):
    frames = classification.select(read_table(str(mmotu[0])))
    folds, _, excluded, _ = splits.plan(frames, classification.strata(frames))
    assert len(folds) == 1
    assert excluded == []
    parts = {part: {int(frames.frame[row]) for row in getattr(folds[0], part)} for part in PARTS}
    assert parts["test"] == set(range(33, 49))
    assert parts["train"] | parts["validation"] == set(range(1, 33))
    assert not parts["train"] & parts["validation"]
    for part in PARTS:
        assert set(frames.label[getattr(folds[0], part)]) == set(range(8))


def test_gist_is_tested_on_its_five_published_folds_and_chooses_on_some_of_train(gist):
    frames = classification.select(read_table(str(gist[0])))
    folds, _, excluded, _ = splits.plan(frames, classification.strata(frames))
    assert [fold.name for fold in folds] == ["0", "1", "2", "3", "4"]
    assert excluded == []
    for number, fold in enumerate(folds):
        rows = {part: set(getattr(fold, part).tolist()) for part in PARTS}
        assert {frames.frame[row] for row in rows["test"]} == {f"case_{4 * number + i:03d}" for i in range(4)}
        assert set.union(*rows.values()) == set(range(GISTS))
        assert sum(map(len, rows.values())) == GISTS
        assert rows["validation"]
