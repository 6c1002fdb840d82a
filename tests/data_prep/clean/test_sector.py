import cv2
import numpy as np
import pytest

from benchmarks import overlays
from data_prep import phantom
from data_prep.clean.sector import find_sector


def simulated(geometry, size=256, seed=3):
    """The first phantom of a geometry -> image, sector."""
    frames = (phantom.simulate_patient(k, seed=seed, image_size=size, frames=1)[0] for k in range(50))
    one = next(frame for frame in frames if frame.geometry == geometry)
    return one.image, one.sector


def on_screen(geometry, size=256):
    """A phantom with a margin and annotations around it -> image [H, W, C], sector."""
    image, sector = simulated(geometry, size)
    image, sector = overlays.screen(image, sector, np.random.default_rng(0))
    cv2.putText(image, "HOSPITAL 12-34", (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1, cv2.LINE_AA)
    cv2.rectangle(image, (image.shape[1] - 12, 40), (image.shape[1] - 8, 120), 200, -1)
    return image[:, :, None], sector


def overlap(one, other):
    return np.count_nonzero((one > 0) & (other > 0)) / np.count_nonzero((one > 0) | (other > 0))


def cleaned(image, sector):
    left, top, right, bottom = sector.box
    return cv2.bitwise_and(image[:, :, 0], sector.mask)[top:bottom, left:right, None]


@pytest.mark.parametrize(("geometry", "kind"), [("convex", "fan"), ("linear", "linear")])
def test_the_sector_is_found_between_text_and_bars_and_no_tissue_is_cut(geometry, kind):
    image, truth = on_screen(geometry)
    sector = find_sector([image])
    assert (sector.kind, sector.trusted) == (kind, True)
    assert np.mean(sector.mask[truth > 0] > 0) > 0.995
    assert overlap(sector.mask, truth) > 0.93  # a fan is convex but for the face of the probe
    assert set(np.unique(sector.mask)) == {0, 255}


@pytest.mark.parametrize("geometry", ["convex", "linear"])
def test_the_box_is_that_of_the_mask(geometry):
    sector = find_sector([on_screen(geometry)[0]])
    left, top, right, bottom = sector.box
    inside = np.zeros_like(sector.mask)
    inside[top:bottom, left:right] = 255
    assert not (sector.mask & ~inside).any()
    assert all(side.any() for side in (sector.mask[top], sector.mask[bottom - 1], sector.mask[:, left]))


@pytest.mark.parametrize("geometry", ["convex", "linear"])
def test_a_cleaned_frame_has_the_same_sector_again(geometry):
    image, _ = on_screen(geometry)
    sector = find_sector([image])
    left, top, right, bottom = sector.box
    again = find_sector([cleaned(image, sector)])
    assert overlap(again.mask, sector.mask[top:bottom, left:right]) > 0.985


def test_a_frame_that_is_all_tissue_is_whole():
    image, _ = simulated("linear")
    inner = image[20:-20, 20:-20]
    sector = find_sector([inner])
    assert (sector.kind, sector.trusted, sector.box) == ("whole", True, (0, 0, inner.shape[1], inner.shape[0]))
    assert sector.mask.all()


@pytest.mark.parametrize("picture", [np.zeros((60, 80, 1)), np.full((200, 200, 3), 90), np.zeros((5, 4, 1))])
def test_a_frame_without_tissue_is_whole_and_not_trusted(picture):
    sector = find_sector([picture.astype(np.uint8)])
    assert (sector.kind, sector.trusted) == ("whole", False)
    assert sector.mask.all()


def test_a_dark_far_field_is_not_cut():
    image, truth = simulated("linear")
    dark = (image * np.linspace(1, 0.06, len(image))[:, None]).astype(np.uint8)
    sector = find_sector([np.pad(dark, 30)[:, :, None]])
    assert np.mean(sector.mask[np.pad(truth, 30) > 0] > 0) > 0.99


def test_a_fan_with_one_side_in_the_dark_is_completed():
    image, truth = simulated("convex")
    image, truth = image.copy(), np.pad(truth, 30)
    image[len(image) // 2 :, : image.shape[1] // 4] = 0
    sector = find_sector([np.pad(image, 30)[:, :, None]])
    assert np.mean(sector.mask[truth > 0] > 0) > 0.98


def test_a_ruler_down_the_tissue_does_not_cut_what_lies_beside_it():
    image, truth = simulated("linear")
    image, truth = np.pad(image, 30), np.pad(truth, 30)
    right = cv2.boundingRect(truth)[0] + cv2.boundingRect(truth)[2]
    image[:, right - 12 : right - 8] = 0
    image[:, right - 10] = 255
    sector = find_sector([image[:, :, None]])
    assert np.mean(sector.mask[truth > 0] > 0) > 0.99


def test_a_bar_beside_the_tissue_is_left_out():
    image, truth = simulated("linear")
    image, truth = np.pad(image, 30), np.pad(truth, 30)
    right = cv2.boundingRect(truth)[0] + cv2.boundingRect(truth)[2]
    image[40:140, right + 4 : right + 9] = np.linspace(255, 0, 100, dtype=np.uint8)[:, None]
    assert find_sector([image[:, :, None]]).box[2] <= right + 4


def test_of_two_candidates_the_moving_one_is_tissue():
    image, _ = simulated("linear", size=128)
    still = np.pad(image, ((0, 0), (0, image.shape[1] + 40)))
    still[:, -image.shape[1] :] = image[:, ::-1]
    clip = [still.copy() for _ in range(3)]
    for number, frame in enumerate(clip):
        frame[:, : image.shape[1]] = np.roll(image, 3 * number, axis=0)
    right = find_sector([frame[:, :, None] for frame in clip]).box[2]
    assert right <= image.shape[1] + 4
    assert find_sector([still[:, :, None]]).box[2] > image.shape[1] + 40


def test_of_a_clip_what_is_lit_in_any_frame_belongs_to_the_sector():
    image, truth = simulated("linear")
    image, truth = np.pad(image, 30), np.pad(truth, 30)
    upper, lower = image.copy(), image.copy()
    upper[len(image) // 2 :], lower[: len(image) // 2] = 0, 0
    sector = find_sector([upper[:, :, None], lower[:, :, None]])
    assert np.mean(sector.mask[truth > 0] > 0) > 0.99


def test_the_sector_lies_in_the_declared_region():
    image, truth = on_screen("convex")
    left, top, width, height = cv2.boundingRect(truth)
    region = (left - 3, top - 3, left + width // 2, top + height + 3)
    sector = find_sector([image], [region])
    inside = np.zeros_like(sector.mask)
    inside[region[1] : region[3], region[0] : region[2]] = 255
    assert (sector.kind, sector.trusted) == ("declared", True)
    assert not (sector.mask & ~inside).any()
    assert np.mean(sector.mask[(truth > 0) & (inside > 0)] > 0) > 0.99


def test_a_declared_region_without_visible_tissue_stays_whole():
    sector = find_sector([np.zeros((100, 100, 1), np.uint8)], [(10, 20, 60, 70)])
    assert (sector.kind, sector.box) == ("declared", (10, 20, 60, 70))


def test_two_declared_regions_are_both_kept():
    sector = find_sector([np.zeros((100, 100, 1), np.uint8)], [(0, 0, 40, 50), (50, 0, 90, 50)])
    assert sector.box == (0, 0, 90, 50)
    assert not sector.mask[:50, 40:50].any()


def test_a_declared_region_beyond_the_frame_describes_another_picture():
    image, _ = on_screen("linear")
    height, width = image.shape[:2]
    declared = find_sector([image], [(0, 0, 2 * width, 2 * height)])
    assert declared.kind == "linear"


@pytest.mark.parametrize("frames", [[], [np.zeros((4, 4, 1), np.uint8), np.zeros((4, 5, 1), np.uint8)]])
def test_frames_are_some_and_of_one_size(frames):
    with pytest.raises(ValueError, match="one size"):
        find_sector(frames)
