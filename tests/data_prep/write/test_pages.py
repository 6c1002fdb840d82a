"""The pages that people look at: the manifest's numbers, nothing from outside, nothing that runs, any screen."""

import base64
import json
import os
import pathlib
import re
import shutil

import cv2
import numpy as np
import pytest

from data_prep.write import pages
from tests.data_prep.builds import picture
from tests.html_pages import Reader, layout, words
from usfmae_jax.data import records, tfrecord
from usfmae_jax.errors import InputError
from usfmae_jax.reporting import pages as templates

EVIL = '<script>alert("1")</script>\'"><img src=x onerror=alert(2)>/\u202egnp.png'
COLOUR = np.dstack([np.full((40, 60), value, np.uint8) for value in (200, 40, 20)])  # RGB

MANIFEST = {
    "schema": 1,
    "tool": "usfmae_jax 9.9",
    "dataset": "bus_x",
    "title": "BUS & X",
    "version": "1.2.3",
    "anatomy": "breast",
    "licence": "CC BY 4.0",
    "citation": "A. Uthor, 2024",
    "homepage": "https://example.org/a?b=1&c=2",
    "verified": "layout fixture",
    "problems": ["Some frames show calipers."],
    "warnings": ["The salt was made for this build."],
    "arguments": {"image_size": 256, "options": {"stride": 3}, "labels": ""},
    "input": {"fingerprint": "f00d", "files": 4321, "bytes": 12},
    "sources": [{"file": "a.zip", "sha256": "5a" * 32, "bytes": 7654321}, {"file": "b.csv", "md5": "6b" * 16}],
    "label_names": ["benign", "malignant"],
    "splits": {
        "train": {
            "frames": 5,
            "patients": 1101,
            "unknown_patients": 1301,
            "videos": 4,
            "bytes": 2_500_000,
            "labels": {"(none)": 1, "benign": 3, "malignant": 1},
        },
        "test": {"frames": 2, "patients": 11, "unknown_patients": 7, "videos": 2, "labels": {"benign": 2}},
    },
    "kept": 7,
    "dropped": {"duplicate": 2001, "nearly the frame before": 40},
    "rejected": {"truncated file": 3001, "no frames": 5},
    "unmasked": {"mask: is 40 x 48 pixels, the image 64 x 48": 1701},
    "mask_colours": [{"class": 1, "colour": "#00ff00", "files": 3}, {"class": 2, "name": "cy<st", "colour": "#ff0000"}],
    "passed_over": {"other files": 17},
    "removed": {"PatientName": 801},
    "cleaned": {"text": 90_001},
    "technical": {"Manufacturer": {"ACME": 606, "Other <b>": 1}},
    "expected": {"frames": 2048, "patients": 1112, "benign": 5},
    "files": {"bus_x-train.tfrecord-00000-of-00001": 4242},
}


def record(number, label=-1, pixels=None, mask=b"", frame=""):
    pixels = picture(number, (48, 64)) if pixels is None else pixels
    image = cv2.imencode(".png", pixels[:, :, ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()
    ids = dict.fromkeys(("patient", "video", "source"), f"images/{number}.png") | {"frame": frame or f"f{number:04d}"}
    size = {"height": pixels.shape[0], "width": pixels.shape[1]}
    return records.FIELDS | {"image": image, "label": label, "mask": mask, "anatomy": "breast"} | size | ids


def build(folder, splits, manifest):
    folder.mkdir(parents=True)
    for split, content in splits.items():
        data = [one if isinstance(one, bytes) else records.encode_record(one) for one in content]
        (folder / f"bus_x-{split}.tfrecord-00000-of-00001").write_bytes(b"".join(map(tfrecord.frame_tfrecord, data)))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def dataset(tmp_path):
    """Seven frames in two splits: three classes, one in colour, one with a mask, one with a hostile name."""
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:40] = 255
    train = [record(0, 0), record(1, 0, frame=EVIL), record(2, 0, COLOUR), record(3, 1), record(4)]
    train[3]["mask"] = cv2.imencode(".png", mask)[1].tobytes()
    folder = build(tmp_path / "one" / "1.2.3", {"train": train, "test": [record(5, 0), record(6, 0)]}, MANIFEST)
    rows = "".join(f'"{EVIL.replace(chr(34), chr(34) * 2)}{number}",truncated file\n' for number in range(20))
    (folder / "rejected.csv").write_text("file,reason\n" + rows + "x/y.png,no frames\n")
    return folder


def tiles(path):
    found = re.findall(r'<div class="tile"><b>([\d,]+)</b><span>([^<]+)', path.read_text(encoding="utf-8"))
    return {name: int(number.replace(",", "")) for number, name in found}


def pictures(path):
    sources = [one["src"] for one in Reader(path).all("img")]
    data = [base64.b64decode(source.removeprefix("data:image/jpeg;base64,")) for source in sources]
    return [cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1] for one in data]


def test_the_numbers_are_those_of_the_manifest(dataset):
    written = pages.write_page(dataset)
    assert written == dataset / "report.html"
    assert tiles(written) == {
        "frames kept": 7,
        "frames dropped": 2041,
        "files rejected": 3006,
        "patients": 1112,
        "patients not known": 1308,
    }
    text = words(written)
    numbers = ("1,101", "1,301", "2.5", "2,001", "3,001", "17", "801", "90,001", "4,321", "7,654,321", "4,242")
    assert set(numbers) <= set(text.split())
    for fact in (
        "CC BY 4.0",
        "A. Uthor, 2024",
        "usfmae_jax 9.9",
        "layout fixture",
        "f00d",
        '{"stride": 3}',
        "ACME (606)",
    ):
        assert fact in text
    for fact in ("sha256 " + "5a" * 32, "md5 " + "6b" * 16, "Some frames show calipers.", "The salt was made"):
        assert fact in text


def test_labels_are_counted_by_split(dataset):
    text = words(pages.write_page(dataset))
    assert "Label train test all (none) 1 0 1 benign 3 2 5 malignant 1 0 1 Frames by anatomy" in text
    assert (
        "Split Frames Patients Patients not known Clips or stills MB train 5 1,101 1,301 4 2.5 test 2 11 7 2 0.0"
        in text
    )
    assert "Anatomy Frames breast 7" in text


def test_a_difference_to_the_published_counts_is_marked(dataset):
    assert "differs" not in words(pages.write_page(dataset))  # 7 kept and 2,041 dropped are the published 2,048
    wrong = MANIFEST | {"expected": {"frames": 2050, "patients": 1112, "malignant": 3}}
    (dataset / "manifest.json").write_text(json.dumps(wrong))
    text = words(pages.write_page(dataset))
    assert "frames (kept and dropped) 2,050 2,048 differs" in text
    assert "malignant 3 1 differs" in text
    assert "patients 1,112 1,112 as expected" in text


def test_shards_that_hold_another_number_of_frames_are_a_warning(dataset):
    (dataset / "manifest.json").write_text(json.dumps(MANIFEST | {"kept": 8}))
    assert "The shards hold 7 frames, but the build wrote 8" in words(pages.write_page(dataset))


def test_rejected_files_are_named_by_reason(dataset):
    text = words(pages.write_page(dataset))
    assert text.count("alert(2)>/\\u202egnp.png") >= 4
    assert "and 2,997 more" in text
    assert "x/y.png and 4 more" in text


def test_frames_without_their_mask_and_colours_of_masks_are_shown(dataset):
    (dataset / "unmasked.csv").write_text('file,reason\na/b.png,"mask: is 40 x 48 pixels, the image 64 x 48"\n')
    text = words(pages.write_page(dataset))
    assert "Frames that were kept without their mask" in text
    assert "mask: is 40 x 48 pixels, the image 64 x 48 1,701 a/b.png and 1,700 more" in text
    assert "#00ff00 1 #ff0000 2 cy<st" in " ".join(text.split())


def test_nothing_in_a_name_becomes_markup(dataset):
    hostile = json.dumps(MANIFEST).replace("ACME", json.dumps(EVIL)[1:-1]).replace("duplicate", json.dumps(EVIL)[1:-1])
    manifest = json.loads(hostile) | {"title": EVIL, "homepage": f"javascript:{EVIL}", "label_names": [EVIL, EVIL]}
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    index = pages.write_index([dataset], dataset.parent / "index.html")
    for written in (pages.write_page(dataset), index):
        reader = Reader(written)
        assert not reader.all("script")
        assert not [one for _, attributes in reader.elements for one in attributes if one.startswith("on")]
        assert {one.get("href", "")[:1] for one in reader.all("a")} <= {"#", "1"}
        assert '<script>alert("1")</script>' in reader.text
        assert "\u202e" not in written.read_text(encoding="utf-8")


def test_pages_load_nothing_and_may_not(dataset):
    written = pages.write_page(dataset)
    reader, text = Reader(written), written.read_text(encoding="utf-8")
    assert {"link", "script", "iframe", "object", "form", "base"}.isdisjoint(tag for tag, _ in reader.elements)
    assert all(one["src"].startswith("data:image/jpeg;base64,") and one["alt"] for one in reader.all("img"))
    assert "url(" not in text
    assert "@import" not in text
    policy = [one["content"] for one in reader.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert [one["href"] for one in reader.all("a") if not one["href"].startswith("#")] == [MANIFEST["homepage"]]


def test_links_within_the_page_have_somewhere_to_go(dataset):
    reader = Reader(pages.write_page(dataset))
    targets = {attributes.get("id") for _, attributes in reader.elements}
    links = [one["href"][1:] for one in reader.all("a") if one["href"].startswith("#")]
    assert len(links) == 7
    assert set(links) <= targets


def test_the_same_data_elsewhere_give_the_same_bytes(dataset, tmp_path):
    one = pages.write_page(dataset).read_bytes()
    shutil.copytree(dataset, tmp_path / "else" / "where")
    assert pages.write_page(tmp_path / "else" / "where").read_bytes() == one
    assert pages.write_page(dataset).read_bytes() == one
    assert os.fsencode(tmp_path) not in one


@pytest.mark.parametrize("key", [*MANIFEST, "all"])
def test_any_key_of_the_manifest_may_be_missing(dataset, key):
    (dataset / "manifest.json").write_text(
        json.dumps({} if key == "all" else {k: v for k, v in MANIFEST.items() if k != key})
    )
    (dataset / "rejected.csv").unlink()
    written = pages.write_page(dataset)
    assert tiles(written)["frames kept"] == 7
    pages.write_index([dataset], dataset / "index.html")
    if key == "all":  # what is not known is not shown as zero
        assert set(tiles(written)) == {"frames kept"}


def test_empty_values_say_that_nothing_happened(dataset):
    empty = {key: type(value)() for key, value in MANIFEST.items() if isinstance(value, dict | list)}
    (dataset / "manifest.json").write_text(json.dumps(empty))
    assert "Nothing was removed" in words(pages.write_page(dataset))


@pytest.mark.parametrize("content", [None, "", "[]", "{", "[" * 100_000])
def test_a_folder_without_a_manifest_is_refused(dataset, content):
    (dataset / "manifest.json").unlink()
    if content is not None:
        (dataset / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="build the dataset again"):
        pages.write_page(dataset)
    with pytest.raises(InputError, match="build the dataset again"):
        pages.write_index([dataset], dataset / "index.html")


def test_colour_stays_colour_and_masks_are_outlined(dataset):
    shown = pictures(pages.write_page(dataset))
    assert len(shown) == 7
    saturation = [float(np.ptp(one.astype(int), axis=2).mean()) for one in shown]
    assert sum(value > 100 for value in saturation) == 1
    assert sum(3 < value < 100 for value in saturation) == 1  # the outline, a pixel wide
    assert "Outlines are masks." in words(dataset / "report.html")


def test_the_sheet_shows_every_split_and_label_evenly(tmp_path):
    train = [record(number, 0) for number in range(200)] + [record(500, 1), record(501, 1)]
    test = [record(number, 0) for number in range(300, 340)]
    folder = build(tmp_path / "d", {"train": train, "test": test}, {"label_names": ["often", "rare"]})
    text = pages.write_page(folder).read_text(encoding="utf-8")
    shown = [int(name) for name in re.findall(r"</b>f(\d{4})</figcaption>", text)]
    assert len(shown) == 60
    assert {500, 501} <= set(shown)
    often = [name for name in shown if name < 200]
    assert (len(often), often[0], often[-1]) == (29, 0, 199)
    assert set(np.diff(often)) <= {7, 8}
    assert text.index("<h3>train</h3>") < text.index("f0000") < text.index("f0500") < text.index("<h3>test</h3>")


def test_more_labels_than_places_still_make_a_sheet(tmp_path):
    folder = build(tmp_path / "d", {"train": [record(number, number % 90) for number in range(120)]}, {})
    assert len(pictures(pages.write_page(folder))) == 60


def test_sixty_frames_full_of_detail_stay_below_three_megabytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    folder = build(tmp_path / "d", {"train": [record(number, 0, noise) for number in range(60)]}, {})
    assert pages.write_page(folder).stat().st_size < 3e6


def test_brightness_and_size_are_measured(tmp_path):
    levels = enumerate([0, 100, 100, 200])
    grey = [record(number, pixels=np.full((50, 80), level, np.uint8)) for number, level in levels]
    text = words(pages.write_page(build(tmp_path / "d", {"train": grey}, {})))
    assert "Half of the frames lie between 75 and 125, the middle is 100." in text
    assert "Half of the frames lie between 0 and 25, the middle is 0." in text  # one of four is black
    assert "Most often 80 x 50 (100%)." in text


def test_large_datasets_are_measured_on_an_even_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "_SAMPLE", 11)
    folder = build(tmp_path / "d", {"train": [record(number) for number in range(101)]}, {})
    asked, original = [], records.decode_record

    def watch(data):
        asked.append(original(data)["frame"])
        return original(data)

    monkeypatch.setattr(pages.records, "decode_record", watch)
    text = words(pages.write_page(folder))
    assert "11 frames, evenly drawn" in text
    assert set(asked) == {f"f{number:04d}" for number in range(0, 101, 10)}


def test_a_damaged_record_is_counted_and_skipped(tmp_path):
    frames = [record(0), b"\xff no example", records.encode_record(record(1) | {"image": b"no image"})]
    text = words(pages.write_page(build(tmp_path / "d", {"train": frames}, {})))
    assert "2 of 3 frames looked at cannot be read" in text


def test_the_index_adds_up_and_its_links_lead_to_the_pages(dataset, tmp_path):
    other = build(
        tmp_path / "with #odd? name" / "1.0.0",
        {"train": [record(0)]},
        {"title": "Another", "anatomy": "lung", "kept": 1_000, "splits": {"train": {"patients": 9}}},
    )
    for folder in (dataset, other):
        pages.write_page(folder)
    index = pages.write_index([dataset, other], tmp_path / "index.html")
    assert index == tmp_path / "index.html"
    assert tiles(index) == {"datasets": 2, "frames": 1007, "patients": 1121, "patients not known": 1308}
    links = [one["href"] for one in Reader(index).all("a")]
    assert links == ["with%20%23odd%3F%20name/1.0.0/report.html", "one/1.2.3/report.html"]
    text = words(index)
    assert "lung 1,000" in text
    assert "breast 7" in text
    assert pages.write_index([other, dataset], tmp_path / "index.html").read_bytes() == index.read_bytes()


def test_pages_fit_a_phone_and_a_desk_without_sideways_scrolling(dataset, tmp_path):
    long = {"x" * 300 + ".png": 3, "many words " * 30: 2} | {f"reason {number}": 1 for number in range(30)}
    manifest = MANIFEST | {
        "dropped": long,
        "rejected": long,
        "unmasked": long,
        "citation": "c" * 400,
        "label_names": ["l" * 90, "m"],
    }
    manifest |= {"arguments": {"a" * 80: "b" * 500}, "technical": {"Maker" * 20: {"v" * 200: 1}}, "title": "T" * 120}
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    paths = [pages.write_page(dataset), pages.write_index([dataset], dataset / "index.html")]
    measured = layout(paths, tmp_path)
    assert all(found["scrolled"] <= found["width"] and not found["missing"] for found in measured)
    assert [found["images"] for found in measured] == [7, 7, 0, 0]


def test_the_templates_travel_with_the_module():
    for name in ("page", "macros", "build", "index", "run", "classification"):
        assert pathlib.Path(templates.__file__).with_name(f"{name}.html").is_file()
