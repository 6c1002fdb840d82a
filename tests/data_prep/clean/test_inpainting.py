import functools

import cv2
import numpy as np
import pytest

from benchmarks import overlays
from benchmarks.overlays import burn
from data_prep import phantom
from data_prep.clean import marks
from data_prep.clean.inpainting import clean_frame, overlay_mask
from data_prep.clean.sector import Sector, find_sector


@functools.cache
def simulated(geometry="linear", size=320, seed=3):
    """Image and sector of one frame, `[H, W]`, both read-only."""
    frames = (phantom.simulate_patient(k, seed=seed, image_size=size, frames=1)[0] for k in range(50))
    one = next(frame for frame in frames if frame.geometry == geometry)
    one.image.flags.writeable = one.sector.flags.writeable = False
    return one.image, one.sector


def whole(image):
    height, width = image.shape[:2]
    return Sector(np.full((height, width), 255, np.uint8), (0, 0, width, height), "whole", False)


def as_sector(mask):
    left, top, width, height = cv2.boundingRect(mask)
    return Sector(mask, (left, top, left + width, top + height), "fan", True)


@pytest.fixture(scope="module")
def tissue():
    """Tissue without a margin, [H, W]."""
    return np.ascontiguousarray(simulated()[0][12:-12, 12:-12])


def colours(tissue):
    return np.repeat(tissue[:, :, None], 3, axis=2)


def written(tissue, ink=255, text="MAMA DIR 12 mm"):
    """Tissue with a line of text -> image [H, W, 1], where the letters are."""
    letters = np.zeros_like(tissue)
    cv2.putText(letters, text, (30, 150), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 255, 1, cv2.LINE_AA)
    written = letters > 128  # thin strokes are nowhere full in OpenCV 4
    return np.maximum(tissue, np.where(written, np.uint8(ink), np.uint8(0)))[:, :, None], written


def test_nothing_outside_the_sector_survives():
    image, sector = simulated("convex")
    image = np.where(sector > 0, image, 200).astype(np.uint8)[:, :, None]
    cleaned = clean_frame(image, as_sector(sector))
    left, top, right, bottom = cleaned.box
    assert cleaned.pixels.shape == (bottom - top, right - left, 1)
    assert not cleaned.pixels[sector[top:bottom, left:right] == 0].any()
    assert cleaned.removed["outside"] == np.count_nonzero(sector == 0)


def test_pixels_that_were_not_detected_stay_as_they_are(tissue):
    image, _ = written(tissue)
    cleaned = clean_frame(image, whole(image))
    same = overlay_mask(image, whole(image)) == 0
    assert np.array_equal(cleaned.pixels[same], image[same])


def test_text_is_gone_and_counted(tissue):
    image, letters = written(tissue)
    cleaned = clean_frame(image, whole(image))
    assert np.mean(overlay_mask(image, whole(image))[letters] > 0) > 0.95
    burnt, left = (np.abs(a[:, :, 0].astype(int) - tissue)[letters].mean() for a in (image, cleaned.pixels))
    assert left < 0.4 * burnt
    assert cleaned.removed["text"] > np.count_nonzero(letters)


@pytest.mark.parametrize("geometry", ["linear", "convex"])
def test_a_clean_frame_hardly_changes(geometry):
    changed = []
    for seed in range(4):
        image, sector = simulated(geometry, seed=seed)
        changed.append(np.mean(overlay_mask(image[:, :, None], as_sector(sector))[sector > 0] > 0))
    assert np.mean(changed) < 0.001


@pytest.mark.parametrize(("kind", "least"), [(kind, 0.9) for kind in overlays.KINDS if kind != "bar"] + [("bar", 0.8)])
def test_annotations_of_every_kind_are_found(kind, least):
    found = total = 0
    for seed in range(3):
        image, sector = simulated(size=400, seed=seed)
        burnt = burn(image, sector, np.random.default_rng(seed), kinds=[kind], pieces=3)
        seen = (burnt.masks[kind] > 0) & (sector > 0) & (np.abs(burnt.image.astype(int) - burnt.clean).max(axis=2) > 40)
        found += np.count_nonzero(overlay_mask(burnt.image, as_sector(sector))[seen])
        total += np.count_nonzero(seen)
    assert found > least * total > 0


def test_doppler_is_left_alone_and_keeps_its_colour():
    image, sector = simulated(size=400)
    burnt = burn(image, sector, np.random.default_rng(4), pieces=0, doppler=True)
    cleaned = clean_frame(burnt.image, as_sector(sector))
    left, top, right, bottom = cleaned.box
    flow = burnt.doppler[top:bottom, left:right] > 0
    assert cleaned.pixels.shape[2] == 3
    assert cleaned.removed["colour"] < 0.01 * np.count_nonzero(flow)
    assert np.abs(cleaned.pixels.astype(int) - burnt.image[top:bottom, left:right])[flow].mean() < 0.2


def test_white_text_on_a_frame_with_doppler_is_removed():
    image, sector = simulated(size=400)
    burnt = burn(image, sector, np.random.default_rng(4), pieces=0, doppler=True)
    letters = np.zeros_like(image)
    cv2.putText(letters, "DIST 12.3 mm", (40, 40), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 255, 1)
    letters[burnt.doppler > 0] = 0
    mask = overlay_mask(np.maximum(burnt.image, letters[:, :, None]), as_sector(sector))
    assert np.mean(mask[letters > 0] > 0) > 0.9


@pytest.mark.parametrize("ink", [(255, 255, 0), (0, 255, 0), (90, 200, 255)])
def test_a_frame_whose_only_colour_was_graphics_becomes_grey(tissue, ink):
    _, letters = written(tissue)
    coloured = np.where(letters[:, :, None], np.array(ink, np.uint8), colours(tissue))
    cleaned = clean_frame(coloured, whole(coloured))
    assert cleaned.pixels.shape[2] == 1
    assert cleaned.removed["colour"] >= np.count_nonzero(letters)
    assert np.array_equal(cleaned.pixels[:40, :, 0], tissue[:40])


def test_tinted_tissue_is_not_taken_for_coloured_ink(tissue):
    sepia = (colours(tissue) * np.array([1, 0.86, 0.7])).astype(np.uint8)
    assert np.mean(overlay_mask(sepia, whole(sepia)) > 0) < 0.001


def test_a_colour_map_over_the_tissue_stays(tissue):
    field = cv2.GaussianBlur(np.random.default_rng(0).normal(size=tissue.shape), (0, 0), 12)
    elastogram = cv2.applyColorMap(cv2.normalize(field, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U), cv2.COLORMAP_JET)
    image = colours(tissue)
    image[60:200, 60:220] = cv2.addWeighted(image, 0.5, elastogram, 0.5, 0)[60:200, 60:220]
    cleaned = clean_frame(image, whole(image))
    changed = (cleaned.pixels != image).any(axis=2)
    assert changed[60:200, 60:220].mean() < 0.02


def test_a_dark_cyst_that_is_outlined_stays_dark(tissue):
    image = tissue.copy()
    cv2.ellipse(image, (140, 120), (50, 35), 0, 0, 360, 3, -1)
    cv2.ellipse(image, (140, 120), (54, 39), 0, 0, 360, 255, 1)
    cleaned = clean_frame(image[:, :, None], whole(image))
    assert cleaned.pixels[95:145, 110:170].max() <= 3
    assert overlay_mask(image[:, :, None], whole(image))[image == 255].mean() > 0.9 * 255


def test_the_face_of_a_linear_probe_is_no_ink(tissue):
    image = tissue.copy()
    image[:4] = 250
    assert not overlay_mask(image[:, :, None], whole(image))[:4].any()


def test_cleaning_again_changes_little(tissue):
    image, _ = written(tissue)
    once = clean_frame(image, whole(image)).pixels
    twice = clean_frame(once, whole(once)).pixels
    assert np.mean(once != twice) < 0.002


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (40, 7)])
def test_frames_may_be_tiny(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    cleaned = clean_frame(image, find_sector([image]))
    assert cleaned.pixels.shape[:2] == shape


def test_the_frame_that_was_given_is_not_written_to(tissue):
    image, _ = written(tissue)
    before = image.copy()
    clean_frame(image, whole(image))
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "pixels", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 1), np.uint16)]
)
def test_only_eight_bits_and_one_or_three_channels_are_taken(pixels):
    with pytest.raises(ValueError, match="expected uint8"):
        clean_frame(pixels, whole(pixels))


def test_frame_and_sector_have_one_size():
    with pytest.raises(ValueError, match="the sector"):
        clean_frame(np.zeros((9, 9, 1), np.uint8), whole(np.zeros((9, 8))))


@pytest.mark.parametrize("connectivity", [4, 8])
def test_regions_are_those_of_opencv_with_its_statistics(connectivity):
    rng = np.random.default_rng(connectivity)
    mask = np.where(cv2.blur(rng.random((70, 90)), (3, 3)) > 0.55, np.uint8(255), np.uint8(0))
    values = rng.integers(0, 256, mask.shape, dtype=np.uint8)
    regions = marks.Regions(mask, connectivity)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=connectivity)
    assert regions.count == count > 20
    np.testing.assert_array_equal(regions.size, stats[:, cv2.CC_STAT_AREA])
    np.testing.assert_array_equal(regions.width[1:], stats[1:, cv2.CC_STAT_WIDTH])
    np.testing.assert_array_equal(regions.height[1:], stats[1:, cv2.CC_STAT_HEIGHT])
    grown = cv2.dilate(labels.astype(np.float32), np.ones((3, 3), np.uint8))
    for number in range(1, count):
        inside = labels == number
        np.testing.assert_allclose(regions.mean(values)[number], values[inside].mean())
        np.testing.assert_allclose(regions.deviation(values)[number], values[inside].std(), atol=1e-3)
        rim = values[(grown == number) & (mask == 0)] > 100
        expected = rim.mean() if rim.size else 0
        np.testing.assert_allclose(regions.share_of_rim(np.where(values > 100, values, 0))[number], expected)
    chosen = rng.random(count) > 0.5
    np.testing.assert_array_equal(regions.only(chosen) > 0, chosen[labels] & (mask > 0))


def test_what_outlines_enclose_does_not_depend_on_outlines_far_away():
    def outlined(*boxes):
        mask, level = np.zeros((300, 400), np.uint8), np.full((300, 400), 40, np.uint8)
        for left, top, wide, high in boxes:
            cv2.rectangle(level, (left, top), (left + wide, top + high), 200, cv2.FILLED)
            cv2.rectangle(mask, (left, top), (left + wide, top + high), 255, 2)
        return marks._enclosed(mask, level, np.full_like(mask, 60))

    boxes = (0, 0, 30, 20), (203, 11, 25, 25), (30, 150, 20, 30), (371, 277, 28, 22)
    together = outlined(*boxes)
    assert all(together[top + high // 2, left + wide // 2] for left, top, wide, high in boxes)
    np.testing.assert_array_equal(together, np.maximum.reduce([outlined(box) for box in boxes]))
