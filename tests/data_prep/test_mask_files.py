"""Masks of a build: never worth a frame, whatever they look like, and found beside their images."""

import json
import shutil

import cv2
import numpy as np
import pytest

from tests.data_prep.builds import content, picture, read, refused, run, write, write_csv
from tests.data_prep.trees import ddti
from usfmae_jax.data import records

RED, GREEN, WHITE = (0, 0, 255), (0, 255, 0), (255, 255, 255)  # BGR


def drawn(*parts, shape=(48, 64)):
    """A mask in colours: rectangles of (top, bottom, left, right, colour)."""
    mask = np.zeros((*shape, 3), np.uint8)
    for top, bottom, left, right, colour in parts:
        mask[top:bottom, left:right] = colour
    return mask


def box(shape=(48, 64), value=255, top=12, bottom=36, left=16, right=48):
    mask = np.zeros(shape, np.uint8)
    mask[top:bottom, left:right] = value
    return mask


def build(tmp_path, *flags, **where):
    assert run("--image_size=0", "--clean=off", *flags, output=tmp_path / "out", source=tmp_path / "in", **where) == 0
    folder = next((tmp_path / "out").iterdir()) / "1.0.0"
    found = {record["source"]: record for record in read(folder.parent)}
    masks = {
        name: records.decode_image(record["mask"])[:, :, 0] if record["mask"] else None
        for name, record in found.items()
    }
    return found, masks, json.loads((folder / "manifest.json").read_text()), folder


def table(tmp_path, **masks):
    """Images and a table with their masks."""
    for number, (name, mask) in enumerate(masks.items()):
        write(tmp_path / f"in/{name}.png", picture(number))
        write(tmp_path / f"in/drawings/{name}.png", mask)
    rows = [[f"{name}.png", f"drawings/{name}.png"] for name in masks]
    return f"--labels={write_csv(tmp_path / 'l.csv', ['file', 'mask'], *rows)}"


def test_frames_in_a_folder_of_masks_are_doubted(tmp_path, capsys):
    for number in range(3):
        write(tmp_path / f"in/Images/bus_{number}.png", picture(number))
        write(tmp_path / f"in/Masks/mask_{number}.png", box(top=12 + number))
    assert len(build(tmp_path, "--deduplicate=off")[0]) == 6
    assert "3 files in Masks/ look like masks but match no image by name" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    build(tmp_path, "--deduplicate=off", "--masks=off")
    assert "look like masks" not in capsys.readouterr().out


def test_a_mask_of_another_size_is_resized_and_one_of_another_shape_is_left_out_by_name(tmp_path, capsys):
    large = box((192, 256), top=48, bottom=144, left=64, right=192)
    labels = table(tmp_path, a=large, b=box((49, 64)), c=box((48, 40)), d=box((64, 48)))
    _, masks, manifest, folder = build(tmp_path, labels)
    np.testing.assert_array_equal(masks["a.png"], box())  # four times as large
    assert masks["b.png"].shape == (48, 64)  # a row more, as rounding makes it
    assert masks["c.png"] is None
    assert masks["d.png"] is None
    assert manifest["splits"]["train"]["masks"] == 2
    assert manifest["unmasked"] == {
        "mask: is 40 x 48 pixels, the image 64 x 48": 1,
        "mask: is 48 x 64 pixels, the image 64 x 48": 1,
    }
    assert manifest["rejected"] == {}
    assert (folder / "unmasked.csv").read_text().splitlines() == [
        "file,reason",
        'c.png,"mask: is 40 x 48 pixels, the image 64 x 48"',
        'd.png,"mask: is 48 x 64 pixels, the image 64 x 48"',
    ]
    printed = capsys.readouterr().out
    assert "Kept without a mask: 2 files" in printed
    assert "2 of 4" in printed
    assert f"finetune --config=segment:folder --config.data.path='{folder.parent}'" in printed
    assert "finetune:folder" not in printed  # there are no labels
    page = (folder / "report.html").read_text()
    assert "c.png" in page
    assert ">Masks</th>" in page
    _, masks, manifest, _ = build(tmp_path, labels, "--masks=required", "--overwrite")
    assert set(masks) == {"a.png", "b.png"}
    assert manifest["rejected"] == {
        "mask drawings/c.png: is 40 x 48 pixels, the image 64 x 48": 1,
        "mask drawings/d.png: is 48 x 64 pixels, the image 64 x 48": 1,
    }


def test_datasets_bring_their_masks_from_folders_names_and_polygons(tmp_path):
    folder = tmp_path / "in/Dataset_BUSI_with_GT/benign"
    write(folder / "benign (1).png", picture(0))
    write(folder / "benign (1)_mask.png", box())
    write(folder / "benign (1)_mask_1.png", box(top=2, bottom=6))
    found, masks, manifest, _ = build(tmp_path, dataset="busi")
    assert list(found) == ["Dataset_BUSI_with_GT/benign/benign (1).png"]
    np.testing.assert_array_equal(masks[next(iter(found))], np.maximum(box(), box(top=2, bottom=6)))
    assert manifest["label_names"] == ["benign", "malignant", "normal"]
    shutil.rmtree(tmp_path / "out")
    for number, name in enumerate(("1_1", "1_2", "2_1")):
        write(tmp_path / f"in/archive/{name}.jpg", picture(number))
    corners = ((16, 12), (47, 12), (47, 35), (16, 35))
    (tmp_path / "in/archive/1.xml").write_text(ddti("4b", (1, corners), (2, None)))
    (tmp_path / "in/archive/2.xml").write_text(ddti("2", (1, corners)))
    found, masks, manifest, _ = build(tmp_path, dataset="ddti")
    assert {name: (one["patient"], one["label"]) for name, one in found.items()} == {
        "archive/1_1.jpg": ("1", 3),
        "archive/1_2.jpg": ("1", 3),
        "archive/2_1.jpg": ("2", 0),
    }
    np.testing.assert_array_equal(masks["archive/1_1.jpg"], box())
    np.testing.assert_array_equal(masks["archive/2_1.jpg"], box())
    assert masks["archive/1_2.jpg"] is None
    assert manifest["unmasked"] == {"mask: has no polygon of image 2": 1}


def test_polygons_on_another_size_are_scaled(tmp_path):
    write(tmp_path / "in/a.png", picture(0))
    shape = {"points": [[32, 24], [95, 24], [95, 71], [32, 71]]}
    drawing = {"shapes": [shape], "imageHeight": 96, "imageWidth": 128}
    (tmp_path / "in/a.json").write_text(json.dumps(drawing))
    entry = tmp_path / "mine.toml"
    layout = '[[layout]]\ninclude = ["*.png"]\nmask = "{stem}.json"\nmask_kind = "polygons"\n'
    entry.write_text(f'name = "mine"\ntitle = "Mine"\nverified = "documented only"\n{layout}')
    _, masks, _, _ = build(tmp_path, dataset=entry)
    assert np.count_nonzero(masks["a.png"] != box()) <= 2 * (24 + 32)  # a line of pixels on each side


@pytest.mark.parametrize("name", ["gone.png", "link.png", "text.png", "empty.png"])
def test_a_mask_that_is_missing_or_damaged_costs_its_frame_nothing(tmp_path, name):
    table(tmp_path, a=box(), b=box())
    (tmp_path / "outside.png").write_bytes((tmp_path / "in/drawings/a.png").read_bytes())
    (tmp_path / "in/link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "in/text.png").write_text("text")
    (tmp_path / "in/empty.png").touch()
    labels = write_csv(tmp_path / "l.csv", ["file", "mask"], ["a.png", "drawings/a.png"], ["b.png", name])
    _, masks, manifest, _ = build(tmp_path, f"--labels={labels}")
    np.testing.assert_array_equal(masks["a.png"], box())
    assert masks["b.png"] is None
    assert sum(manifest["unmasked"].values()) == 1


def test_colours_become_classes_that_are_the_same_in_all_files(tmp_path, capsys):
    both = drawn((0, 8, 0, 8, RED), (20, 30, 20, 30, GREEN))
    labels = table(tmp_path, a=both, b=drawn((4, 9, 4, 9, RED)), c=drawn((5, 6, 5, 7, GREEN), (9, 12, 9, 12, WHITE)))
    table(tmp_path, d=box())
    with (tmp_path / "l.csv").open("w") as file:
        file.write("file,mask\n" + "".join(f"{name}.png,drawings/{name}.png\n" for name in "abcd"))
    _found, masks, manifest, folder = build(tmp_path, labels)
    assert manifest["mask_colours"] == [
        {"class": 1, "colour": "#00ff00", "files": 2},
        {"class": 2, "colour": "#ff0000", "files": 2},
        {"class": 3, "colour": "#ffffff", "files": 1},
    ]
    assert [masks["a.png"][at] for at in ((0, 0), (25, 25), (40, 40))] == [2, 1, 0]
    assert [masks["b.png"][at] for at in ((5, 5), (25, 25))] == [2, 0]
    assert [masks["c.png"][at] for at in ((5, 5), (10, 10))] == [1, 3]
    assert set(np.unique(masks["d.png"])) == {0, 3}  # white is that class everywhere
    assert "1 #00ff00, 2 #ff0000, 3 #ffffff" in capsys.readouterr().out
    assert "#00ff00" in (folder / "report.html").read_text()
    shards = [path for path in folder.iterdir() if "array_record" in path.name]
    assert manifest["splits"]["train"]["bytes"] < sum(path.stat().st_size for path in shards)
    assert manifest["unmasked"] == {}


def test_colours_can_be_named_and_then_shades_count_as_the_nearest(tmp_path, capsys):
    shaded = drawn((0, 20, 0, 20, (5, 3, 250)), (24, 40, 20, 40, (2, 240, 6)))
    labels = table(tmp_path, a=shaded, b=drawn((0, 20, 0, 20, (200, 0, 200))))
    flag = "--mask_colours=lesion=#FF0000, cyst=#00ff00"
    _, masks, manifest, _ = build(tmp_path, labels, flag)
    assert [masks["a.png"][at] for at in ((5, 5), (30, 30), (45, 60))] == [1, 2, 0]
    assert masks["b.png"] is None
    assert list(manifest["unmasked"]) == ["mask: has the colour #c800c8, which --mask_colours does not name"]
    assert manifest["mask_colours"] == [
        {"class": 1, "name": "lesion", "colour": "#ff0000"},
        {"class": 2, "name": "cyst", "colour": "#00ff00"},
    ]
    for wrong in ("lesion", "a=red", "a=#ff0000,b=#FF0000"):
        message = refused(capsys, f"--mask_colours={wrong}", output=tmp_path / "x", source=tmp_path / "in")
        assert "--mask_colours" in message


def test_a_picture_is_no_mask_in_colours(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    _, masks, manifest, _ = build(tmp_path, table(tmp_path, a=noise, b=box()))
    assert masks["a.png"] is None
    assert "colours, a mask has few" in next(iter(manifest["unmasked"]))


def beside(tmp_path, *names):
    for number, name in enumerate(names):
        write(tmp_path / "in" / name, picture(number))


def test_masks_beside_images_are_theirs_and_several_are_joined(tmp_path, capsys):
    beside(tmp_path, "benign/b (1).png", "benign/b (2).png", "normal/n (1).png")
    write(tmp_path / "in/benign/b (1)_mask.png", box(right=32))
    write(tmp_path / "in/benign/b (1)_mask_1.png", np.dstack([box(left=32)] * 3))
    write(tmp_path / "in/normal/n (1)_mask.png", box(value=0))
    found, masks, manifest, folder = build(tmp_path, "--labels=parent")
    assert {name: record["label"] for name, record in found.items()} == {
        "benign/b (1).png": 0,
        "benign/b (2).png": 0,
        "normal/n (1).png": 1,
    }
    np.testing.assert_array_equal(masks["benign/b (1).png"], box())
    assert masks["benign/b (2).png"] is None
    assert not masks["normal/n (1).png"].any()
    assert manifest["masks_beside"] == 3
    printed = capsys.readouterr().out
    assert "Masks: 3 files are taken for masks of the images beside them, by their names; --masks=off takes" in printed
    assert "Warning" not in printed
    before = content(folder)
    assert "was built without --masks=off; add" in refused(
        capsys,
        "--labels=parent",
        "--masks=off",
        "--image_size=0",
        "--clean=off",
        output=tmp_path / "out",
        source=tmp_path / "in",
    )
    assert content(folder) == before
    found, masks, manifest, _ = build(tmp_path, "--labels=parent", "--masks=off", "--overwrite", "--deduplicate=off")
    assert len(found) == 6
    assert set(masks.values()) == {None}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("x.png", "x_mask.png"),
        ("x.jpg", "x_mask_2.png"),
        ("a/x.png", "a/x_seg.png"),
        ("a/x.png", "a/x-label.bmp"),
        ("a/x.png", "a/X_gt.png".replace("X", "x")),
        ("images/x.png", "masks/x.png"),
        ("images/p1/x.png", "masks/p1/x_mask.png"),
        ("p1/images/x.png", "p1/Masks/x.tif"),
        ("p1/x.png", "p1/mask/x.png"),
        ("train_images/x.png", "train_masks/x.png"),
        ("img/x.png", "ground truth/x.png"),
    ],
)
def test_usual_names_of_masks_are_known(tmp_path, image, mask):
    beside(tmp_path, image, "other.png")
    write(tmp_path / "in" / mask, box())
    for flags in ([], ["--include=**/*", "--pattern=(?P<video>[^/]+)$"]):
        _, masks, _, _ = build(tmp_path, *flags, "--overwrite")
        assert set(masks) == {image, "other.png"}
        np.testing.assert_array_equal(masks[image], box())


def test_what_is_called_a_mask_but_has_no_image_is_a_frame(tmp_path):
    names = "masks/1.png", "label/2.png", "x_mask.png", "a/y.png", "b/y_mask.png", "gt.png"
    beside(tmp_path, *names)
    found, masks, manifest, _ = build(tmp_path)
    assert set(found) == set(names)
    assert set(masks.values()) == {None}
    assert manifest["masks_beside"] == 0


def test_soft_masks_beside_images_are_meant_where_they_are_light(tmp_path):
    beside(tmp_path, "x.png")
    soft = cv2.GaussianBlur(box(), (0, 0), 2)
    write(tmp_path / "in/x_mask.jpg", soft)
    _, masks, _, _ = build(tmp_path)
    assert set(np.unique(masks["x.png"])) == {0, 255}
    assert np.count_nonzero(masks["x.png"] != box()) < 40


def test_a_volume_is_no_frame_of_its_own_where_it_segments_another(tmp_path):
    header = "NDims = 3\nDimSize = 20 20 3\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name in ("v", "v_seg"):
        data = rng.integers(0, 200, 20 * 20 * 3, np.uint8).tobytes()
        (tmp_path / f"in/{name}.mha").write_bytes(header.encode() + data)
    found, _, manifest, _ = build(tmp_path, "--thin=off", "--deduplicate=off")
    assert set(found) == {"v.mha"}
    assert manifest["unmasked"] == {"mask: has 3 slices, expected the mask of one image": 1}


def test_masks_of_a_table_without_a_column_for_them_are_found_beside_the_images(tmp_path):
    beside(tmp_path, "a.png", "b.png")
    write(tmp_path / "in/a_mask.png", box())
    labels = write_csv(tmp_path / "l.csv", ["file", "label"], ["a.png", "x"], ["b.png", "y"])
    _, masks, manifest, _ = build(tmp_path, f"--labels={labels}")
    np.testing.assert_array_equal(masks["a.png"], box())
    assert manifest["masks_beside"] == 1
    assert "images not in the labels file" not in manifest["passed_over"]


def test_private_data_names_no_mask(tmp_path, monkeypatch):
    (tmp_path / "salt").write_bytes(bytes(range(32)))
    (tmp_path / "salt").chmod(0o600)
    monkeypatch.setenv("USFMAE_SALT", str(tmp_path / "salt"))
    beside(tmp_path, "Zebedee.png", "b.png")
    write(tmp_path / "in/Zebedee_mask.png", box((48, 40)))
    flags = "--private", "--whole_frames", "--format=tfrecord", "--name=clinic"
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in") == 0
    data = content(tmp_path / "out")
    assert not [name for name, one in data.items() if b"ebedee" in one]
    assert "mask: is 40 x 48 pixels" in next(one for name, one in data.items() if "unmasked" in str(name)).decode()


def test_a_file_that_a_table_lists_is_a_frame_whatever_its_name(tmp_path):
    beside(tmp_path, "a.png", "a_mask.png")
    labels = write_csv(tmp_path / "l.csv", ["file"], ["a.png"], ["a_mask.png"])
    found, masks, _, _ = build(tmp_path, f"--labels={labels}")
    assert set(found) == {"a.png", "a_mask.png"}
    assert set(masks.values()) == {None}


def test_the_class_of_an_image_beside_a_folder_of_masks_is_the_folder_above_both(tmp_path):
    beside(tmp_path, "benign/images/1.png", "benign/images/2.png", "normal/images/3.png")
    write(tmp_path / "in/benign/masks/1.png", box())
    found, masks, manifest, _ = build(tmp_path, "--labels=parent")
    assert {name: record["label"] for name, record in found.items()} == {
        "benign/images/1.png": 0,
        "benign/images/2.png": 0,
        "normal/images/3.png": 1,
    }
    assert manifest["label_names"] == ["benign", "normal"]
    np.testing.assert_array_equal(masks["benign/images/1.png"], box())
