"""Annotations to masks: filled where they are outlines or corners, refused where they are something else."""

import json

import cv2
import numpy as np
import pytest

from data_prep import catalog, masks
from data_prep.find import collect
from data_prep.readers import UnreadableError, read_frames
from tests.data_prep.trees import ddti, real_folder

SHAPE = (60, 80)


def _ellipse(centre=(40, 30), axes=(25, 15), thickness=1, angle=20):
    return cv2.ellipse(np.zeros(SHAPE, np.uint8), centre, axes, angle, 0, 360, 255, thickness)


def _save(path, pixels):
    assert cv2.imwrite(str(path), pixels)
    return path


@pytest.mark.parametrize(
    "drawn",
    [
        {},
        {"thickness": 3},
        {"centre": (5, 30)},  # cut by one side
        {"centre": (75, 30)},
        {"centre": (40, 2)},
        {"centre": (6, 4)},  # by two, with the corner inside
        {"centre": (75, 55)},
        {"axes": (60, 12), "angle": 0},  # by two opposite sides
        {"axes": (6, 4)},
    ],
)
def test_outlines_are_filled_also_where_the_border_cuts_them(drawn):
    filled = masks.fill_outline(_ellipse(**drawn))
    expected = _ellipse(**drawn) | _ellipse(**{**drawn, "thickness": -1})
    assert filled.dtype == np.uint8
    assert np.count_nonzero(filled != expected) <= 16  # OpenCV draws lines and areas a pixel apart in places


def test_an_outline_with_a_gap_is_closed_by_its_hull():
    line = _ellipse()
    line[:, 38:42] = 0
    filled, expected = masks.fill_outline(line), _ellipse(thickness=-1)
    assert np.count_nonzero(filled != expected) < 0.05 * np.count_nonzero(expected)


def test_what_is_filled_already_or_empty_stays():
    filled = _ellipse(thickness=-1)
    np.testing.assert_array_equal(masks.fill_outline(filled), filled)
    assert not masks.fill_outline(np.zeros(SHAPE, np.uint8)).any()
    line = np.zeros(SHAPE, np.uint8)
    line[10, 5:50] = 255
    np.testing.assert_array_equal(masks.fill_outline(line), line)


def test_an_image_keeps_its_numbers_and_a_binary_one_is_lighter_or_darker_than_half(tmp_path):
    pixels = np.array([[0, 1, 2], [127, 128, 255]], np.uint8)
    path = _save(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(masks.read_mask_as("image", path, (2, 3)), pixels)
    np.testing.assert_array_equal(masks.read_mask_as("binary", path, (2, 3)), [[0, 0, 0], [0, 255, 255]])


def test_a_binary_mask_may_be_drawn_in_colours_or_stored_as_jpeg(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8, 2] = 255  # red
    pixels[8:, 8:, 1] = 255  # green
    expected = pixels.max(axis=2)
    np.testing.assert_array_equal(masks.read_mask_as("binary", _save(tmp_path / "a.png", pixels), (16, 16)), expected)
    grey = _save(tmp_path / "a.jpg", expected)
    np.testing.assert_array_equal(masks.read_mask_as("binary", grey, (16, 16)), expected)


def test_an_outline_is_read_and_filled(tmp_path):
    path = _save(tmp_path / "a.png", _ellipse(thickness=2))
    assert masks.read_mask_as("outline", path, SHAPE)[30, 40] == masks.FOREGROUND


@pytest.mark.parametrize(
    "data",
    [
        [[1, 1], [4, 1], [4, 3], [1, 3]],
        [[[1, 1], [4, 1], [4, 3], [1, 3]], [[1, 1], [2, 1], [2, 2]]],
        {"shapes": [{"label": "a", "points": [[1, 1], [4, 1], [4, 3], [1, 3]], "shape_type": "polygon"}]},
        {"shapes": [{"label": "a", "points": [[1, 1], [4, 3]], "shape_type": "rectangle"}], "imageHeight": 5},
        {"shapes": [{"label": "a", "points": [[1, 1], [4, 1], [4, 3], [1, 3]]}, {"label": "b", "points": [[0, 0]]}]},
    ],
)
def test_corners_in_any_of_the_known_forms_are_filled(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    expected = np.zeros((5, 6), np.uint8)
    expected[1:4, 1:5] = 255
    np.testing.assert_array_equal(masks.read_mask_as("polygons", path, (5, 6)), expected)


def test_corners_outside_the_image_are_cut_and_label_names_may_be_in_any_encoding(tmp_path):
    path = tmp_path / "a.json"
    points = "[[-100, -1e300], [2.4, -1e300], [2.4, 1e300], [-100, 1e300]]"
    path.write_bytes(b'{"shapes": [{"label": "\xb6\xaf", "points": ' + points.encode() + b"}]}")
    mask = masks.read_mask_as("polygons", path, (4, 6))
    np.testing.assert_array_equal(mask, np.repeat([[255, 255, 255, 0, 0, 0]], 4, axis=0))


def test_of_an_annotation_of_several_images_the_polygons_of_this_one_are_filled(tmp_path):
    left, right = ((0, 0), (1, 0), (1, 3), (0, 3)), ((4, 0), (5, 0), (5, 3), (4, 3))
    path = tmp_path / "7.xml"
    path.write_text(ddti("4a", (1, left), (2, right), (2, left), (3, None)))
    mask = masks.read_mask_as("polygons", path, (4, 6), image="a_3/7_1.jpg")
    np.testing.assert_array_equal(mask, np.repeat([[255, 255, 0, 0, 0, 0]], 4, axis=0))
    mask = masks.read_mask_as("polygons", path, (4, 6), image="7_2.jpg")
    np.testing.assert_array_equal(mask, np.repeat([[255, 255, 0, 0, 255, 255]], 4, axis=0))
    for number in (3, 4, 12):
        with pytest.raises(UnreadableError, match=f"has no polygon of image {number}"):
            masks.read_mask_as("polygons", path, (4, 6), image=f"7_{number}.jpg")


@pytest.mark.parametrize(
    ("kind", "name", "data", "message"),
    [
        ("polygons", "a.json", b"", "empty file"),
        ("polygons", "a.json", b"{", "no JSON with polygons"),
        ("polygons", "a.json", b"3", "no JSON with polygons"),
        ("polygons", "a.json", b'[{"a": 1}, 2, 3]', "no JSON with polygons"),
        ("polygons", "a.json", b"[[1], [2], [3]]", "no JSON with polygons"),
        ("polygons", "a.json", b"[[1, 2, 3], [1, 2, 3], [1, 2, 3]]", "no JSON with polygons"),
        ("polygons", "a.xml", b"<case>", "no XML with polygons"),
        ("polygons", "a.xml", b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "no XML with polygons"),
        ("polygons", "a.xml", b"<a><mark><image/><svg>[</svg></mark></a>", "no XML with polygons"),
        ("polygons", "a.xml", b"<a><mark><image/><svg>[3]</svg></mark></a>", "no XML with polygons"),
        ("polygons", "a.json", b"[[NaN, 2], [1, 2], [3, 4]]", "corners that are no numbers"),
        ("polygons", "a.json", b'{"shapes": [], "imageWidth": 9}', "is drawn on 9 x 2 pixels, the image has 3 x 2"),
        ("binary", "a.png", b"no image", "not a PNG"),
        ("outline", "a.png", b"", "empty file"),
        ("image", "missing.png", None, "cannot be read"),
        ("polygons", "missing.json", None, "cannot be read"),
    ],
)
def test_what_is_no_such_annotation_is_refused(tmp_path, kind, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableError, match=message):
        masks.read_mask_as(kind, tmp_path / name, (2, 3))


@pytest.mark.parametrize("kind", ["image", "binary", "outline"])
def test_a_mask_of_another_size_is_refused(tmp_path, kind):
    path = _save(tmp_path / "a.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(UnreadableError, match="is 5 x 4 pixels, the image 4 x 5"):
        masks.read_mask_as(kind, path, (5, 4))


def test_a_header_that_asks_for_too_much_is_refused_before_anything_is_decoded(tmp_path):
    data = cv2.imencode(".png", np.zeros((4, 5), np.uint8))[1].tobytes()
    huge = data[:16] + (100_000).to_bytes(4, "big") * 2 + data[24:]
    (tmp_path / "a.png").write_bytes(huge)
    with pytest.raises(UnreadableError, match=r"100,?000 x 100,?000"):
        masks.read_mask_as("binary", tmp_path / "a.png", (4, 5))


def test_every_kind_of_the_catalogue_can_be_read():
    used = {layout.mask_kind for name in catalog.names() for layout in catalog.load(name).layouts if layout.mask}
    assert used == {"image", "binary", "outline", "polygons"}


def test_real_hc18_outlines_become_ellipses():
    root = real_folder("HC18")
    found = collect(catalog.load("hc"), root)
    for item in found.items:
        outline = cv2.imread(str(root / item.masks[0]), cv2.IMREAD_GRAYSCALE)
        mask = masks.read_mask_as(found.mask_kind, root / item.masks[0], outline.shape)
        ellipse = cv2.ellipse(outline.copy(), cv2.fitEllipse(cv2.findNonZero(outline)), 255, cv2.FILLED)
        assert np.count_nonzero(mask != ellipse) < 0.01 * np.count_nonzero(ellipse)


def test_real_camus_masks_are_numbers_of_the_size_of_their_frames():
    root = real_folder("CAMUS")
    found = collect(catalog.load("camus"), root)
    masked = [item for item in found.items if item.masks]
    assert len(masked) == 4
    for item in masked:
        (frame,) = read_frames(root / item.path, found.options)
        mask = masks.read_mask_as(found.mask_kind, root / item.masks[0], frame.pixels.shape[:2])
        assert set(np.unique(mask)) == {0, 1, 2, 3}


def test_real_aul_polygons_lie_inside_their_images():
    root = real_folder("AUL_liver")
    found = collect(catalog.load("aul"), root)
    for item in found.items:
        if item.masks:
            shape = cv2.imread(str(root / item.path), cv2.IMREAD_GRAYSCALE).shape
            share = np.count_nonzero(masks.read_mask_as(found.mask_kind, root / item.masks[0], shape)) / np.prod(shape)
            assert 0.0005 < share < 0.5


@pytest.mark.parametrize("dtype", ["u1", "<i2"])
def test_an_image_may_be_a_volume_of_one_slice_even_an_empty_one(tmp_path, dtype):
    kind = {"u1": "MET_UCHAR", "<i2": "MET_SHORT"}[dtype]
    for numbers in ([[0, 1, 2], [7, 8, 0]], [[0, 0, 0], [0, 0, 0]]):
        header = f"NDims = 2\nDimSize = 3 2\nElementType = {kind}\nElementDataFile = LOCAL\n"
        (tmp_path / "a.mha").write_bytes(header.encode() + np.array(numbers, dtype).tobytes())
        np.testing.assert_array_equal(masks.read_mask_as("image", tmp_path / "a.mha", (2, 3)), numbers)


@pytest.mark.parametrize(
    ("sizes", "numbers", "message"),
    [("3 1 2", [0] * 6, "has 2 slices"), ("3 2", [0, 300, 0, 0, 0, 0], "other numbers than 0 to 255")],
)
def test_volumes_that_are_no_mask_of_an_image_are_refused(tmp_path, sizes, numbers, message):
    header = f"NDims = {len(sizes.split())}\nDimSize = {sizes}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_bytes(header.encode() + np.array(numbers, "<i2").tobytes())
    with pytest.raises(UnreadableError, match=message):
        masks.read_mask_as("image", tmp_path / "a.mha", (2, 3))


@pytest.mark.parametrize(("name", "folder"), [("bus_bra", "BUS-BRA"), ("usgra_nerve", "USGRA_nerve")])
def test_real_masks_are_as_large_as_their_images(name, folder):
    root = real_folder(folder)
    found = collect(catalog.load(name), root)
    for item in found.items[:20]:
        shape = cv2.imread(str(root / item.path), cv2.IMREAD_GRAYSCALE).shape
        mask = masks.read_mask_as(found.mask_kind, root / item.masks[0], shape)
        assert mask.any()
        assert set(np.unique(mask)) <= ({0, 255} if name == "bus_bra" else {0, 1, 2})
