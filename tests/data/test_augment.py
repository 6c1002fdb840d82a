"""One affine warp does what crop, rotation, flip and resize would; RandAugment's strength means something."""

import math

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.helpers import frame
from usfmae_jax.data import augment

IDENTITY = augment.Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0)


def _image(size=(64, 64)):
    rows, columns = np.mgrid[: size[0], : size[1]]
    return (2 * rows + columns).astype(np.uint8)[..., None]


def _view(image, size, how, seed=0):
    matrix = augment.random_view(np.random.default_rng(seed), *image.shape[:2], size, how)
    return augment.warp(image, matrix, size, how.interpolation)


def test_the_whole_square_image_is_the_identity():
    np.testing.assert_array_equal(_view(_image(), (64, 64), IDENTITY), _image())


def test_flips_mirror():
    how = augment.Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=1.0, vflip=1.0)
    np.testing.assert_array_equal(_view(_image(), (64, 64), how), _image()[::-1, ::-1])


def test_a_quarter_turn_rotates():
    how = augment.Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation=(90.0, 90.0), hflip=0.0)
    turned = _view(_image(), (64, 64), how)[..., 0].astype(int)
    expected = [np.rot90(_image()[..., 0], k).astype(int) for k in (1, 3)]
    assert min(np.abs(turned - e)[1:-1, 1:-1].max() for e in expected) <= 1


def test_resize_agrees_with_a_plain_resize():
    view = _view(_image(), (32, 32), IDENTITY)[..., 0].astype(int)
    plain = cv2.resize(_image(), (32, 32), interpolation=cv2.INTER_LINEAR).astype(int)
    assert np.abs(view - plain).max() <= 1


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (50, 50)])
def test_crops_stay_inside_and_keep_their_area_and_shape(rng, shape):
    for _ in range(200):
        left, top, width, height = augment.random_crop(rng, *shape, (0.2, 0.5), (0.75, 4 / 3))
        assert left >= 0
        assert top >= 0
        assert left + width <= shape[1] + 1e-6
        assert top + height <= shape[0] + 1e-6
        assert 0.2 <= width * height / (shape[0] * shape[1]) + 1e-6 <= 0.5 + 2e-6 or math.isclose(width / height, 4 / 3)
        assert 0.75 - 1e-6 <= width / height <= 4 / 3 + 1e-6


def test_a_scale_above_one_falls_back_to_the_whole_image(rng):
    assert augment.random_crop(rng, 80, 100, (1.5, 2.0), (0.75, 4 / 3)) == (0, 0, 100, 80)


def test_outside_the_image_is_black():
    how = augment.Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation=(45.0, 45.0), hflip=0.0)
    view = _view(np.full((64, 64, 1), 200, np.uint8), (64, 64), how)
    assert view[0, 0, 0] == view[-1, -1, 0] == 0
    assert view[32, 32, 0] == 200


def test_a_reduced_image_gives_the_same_view(rng):
    image = cv2.GaussianBlur(rng.integers(0, 255, (256, 320), np.uint8), (0, 0), 6)[..., None]
    how = augment.Augmentation(crop_scale=(0.9, 1.0), rotation=(10.0, 10.0))
    matrix = augment.random_view(np.random.default_rng(3), 256, 320, (48, 48), how)
    assert augment.reduction(matrix) == 4
    small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)[..., None]
    reduced = augment.warp(small, augment.shrink_view(matrix, 4), (48, 48), "linear").astype(int)
    full = augment.warp(image, matrix, (48, 48), "linear").astype(int)
    assert np.abs(reduced - full).mean() < 2


def test_colour_keeps_its_channels():
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 2] = 90
    assert _view(image, (16, 16), IDENTITY)[8, 8].tolist() == [0, 0, 90]
    assert augment.resize(image, (8, 16)).shape == (8, 16, 3)


def test_grey_levels_are_left_alone_by_default_and_nothing_is_drawn():
    rng = np.random.default_rng(0)
    image = np.arange(48, dtype=np.uint8).reshape(6, 8, 1)
    assert augment.adjust(image, rng, augment.Augmentation()) is image
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


@pytest.mark.parametrize("brightness", [-0.3, 0, 0.3])
@pytest.mark.parametrize("contrast", [0.6, 1, 1.7])
@pytest.mark.parametrize("gamma", [0.7, 1, 1.5])
def test_levels_keep_their_order_and_black_stays_black(brightness, contrast, gamma):
    table = augment.levels(brightness, contrast, gamma)
    assert (table.dtype, table.shape, table[0]) == (np.uint8, (256,), 0)
    assert (np.diff(table.astype(int)) >= 0).all()
    if (brightness, contrast, gamma) == (0, 1, 1):
        assert table.tolist() == list(range(256))


def test_gain_adds_dynamic_range_stretches_from_white_and_gamma_bends():
    assert augment.levels(0.2, 1, 1)[100] == 151  # 51 of 255
    assert augment.levels(0, 1.5, 1)[[155, 255]].tolist() == [105, 255]  # 100 below white becomes 150 below
    assert augment.levels(0, 1, 2)[128] == round(128**2 / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_levels_follow_the_generator(channels):
    how = augment.Augmentation(brightness=(-0.2, 0.2), contrast=(0.7, 1.4), gamma=(0.7, 1.4), randaugment_magnitude=9)
    image = np.random.default_rng(1).integers(0, 255, (6, 8, channels), np.uint8)
    one, again, other = (augment.adjust(image, np.random.default_rng(seed), how) for seed in (0, 0, 1))
    assert (one.shape, one.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_keeps_the_shape_and_follows_the_generator(channels):
    image = np.repeat(frame(0, 1)[:, :, None], channels, axis=2)
    first = [augment.randaugment(image, np.random.default_rng(seed)) for seed in range(20)]
    again = [augment.randaugment(image, np.random.default_rng(seed)) for seed in range(20)]
    assert all(view.shape == image.shape and view.dtype == np.uint8 for view in first)
    np.testing.assert_array_equal(first, again)
    changed = sum(not np.array_equal(view, image) for view in first)
    assert 8 <= changed < 20  # an operation is left out with probability 1/2


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_grow_with_their_strength(name, mode):
    image = Image.fromarray(frame(0, 1)).convert(mode)
    views = [np.asarray(augment.OPERATIONS[name](image, strength, 1.0)).astype(int) for strength in (0, 0.3, 0.6, 1)]
    change = [np.abs(view - np.asarray(image)).mean() for view in views]
    if name in ("autocontrast", "equalize", "invert") or (name == "color"):
        assert len(set(change)) == 1  # these have no strength, and grey no colour
    else:
        assert change[0] < 2 or name == "posterize"  # which keeps 4 of 8 bits at the least
        assert change[0] < change[1] < change[3]


def test_the_strongest_values_are_those_of_the_recipe():
    # A single bright point in the middle tells where the geometric operations take it.
    image = Image.fromarray(np.zeros((101, 101), np.uint8))
    image.putpixel((50, 50), 255)
    moved = {
        name: np.unravel_index(
            np.abs(np.asarray(augment.OPERATIONS[name](image, 1.0, 1.0)).astype(int) - 0)[:60, :60].argmax(),
            (60, 60),
        )
        for name in ("translate_x", "translate_y")
    }
    assert moved["translate_x"] == (50, 5)  # 0.45 of 101 pixels, about
    assert moved["translate_y"] == (5, 50)
    grey = Image.fromarray(np.full((4, 4), 100, np.uint8))
    assert np.asarray(augment.OPERATIONS["brightness"](grey, 1.0, 1.0)).max() == 190
    assert np.asarray(augment.OPERATIONS["brightness"](grey, 1.0, -1.0)).max() == 10
    assert np.asarray(augment.OPERATIONS["solarize_add"](grey, 1.0, 1.0)).max() == 210
    assert np.asarray(augment.OPERATIONS["solarize"](grey, 1.0, 1.0)).max() == 155
    assert np.asarray(augment.OPERATIONS["posterize"](grey, 0.5, 1.0)).max() == 64  # two bits


@pytest.mark.parametrize("channels", [1, 3])
def test_trivialaugment_applies_one_operation_or_none(channels):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 32, channels), np.uint8)
    made = [augment.trivialaugment(image, np.random.default_rng(seed)) for seed in range(60)]
    again = [augment.trivialaugment(image, np.random.default_rng(seed)) for seed in range(60)]
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in made)
    assert all((one == other).all() for one, other in zip(made, again, strict=True))
    assert 0 < sum(np.array_equal(one, image) for one in made) < 30
    how = augment.Augmentation(trivialaugment=True)
    same = augment.adjust(image, np.random.default_rng(7), how)
    assert (same == augment.trivialaugment(image, np.random.default_rng(7))).all()
