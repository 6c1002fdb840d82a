"""Corruptions are graded, keep black surround black, and follow their generator."""

import cv2
import numpy as np
import pytest

from usfmae_jax.data import corruptions
from usfmae_jax.errors import InputError

NAMES = list(corruptions.CORRUPTIONS)


def scan(size: int = 64) -> np.ndarray:
    """Speckled tissue with a dark lesion, in a disc with black around it: uint8 `[size, size]`."""
    rng = np.random.default_rng(0)
    tissue = 90 + 30 * cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), 1) / 0.28
    y, x = np.mgrid[:size, :size] / size - 0.5
    tissue[np.hypot(x, y) < 0.12] *= 0.3
    tissue[np.hypot(x, y) > 0.45] = 0
    return np.clip(tissue, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_each_severity_changes_more_than_the_one_before(name, channels):
    image = np.repeat(scan()[:, :, None], channels, axis=2)
    before = image.copy()
    change = np.zeros(6)
    for seed in range(6):
        views = [corruptions.corrupt(image, name, severity, np.random.default_rng(seed)) for severity in range(6)]
        assert all(view.shape == image.shape and view.dtype == np.uint8 for view in views)
        change += [np.abs(view.astype(int) - image).mean() for view in views]
    assert change[0] == 0
    assert (np.diff(change[1:]) > 0).all()
    assert change[1] > 0 or name == "sector"  # which may cut off no more than surround
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", NAMES)
def test_black_surround_stays_black_and_lesions_are_part_of_the_image(name):
    image = scan()[:, :, None]
    y, x = np.mgrid[:64, :64] / 64 - 0.5
    view = corruptions.corrupt(image, name, 5, np.random.default_rng(1))
    assert view[np.hypot(x, y) > 0.49].max() == 0
    if name in ("haze", "gain"):
        assert not np.array_equal(view[30:34, 30:34], image[30:34, 30:34])


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_follows_its_generator(name):
    image = scan()[:, :, None]
    one, again, other = (corruptions.corrupt(image, name, 3, np.random.default_rng(seed)) for seed in (2, 2, 5))
    np.testing.assert_array_equal(one, again)
    if name not in ("depth_attenuation", "blur", "gain"):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, 255])
def test_plain_and_small_images_are_no_trouble(name, value):
    image = np.full((8, 12, 1), value, np.uint8)
    assert corruptions.corrupt(image, name, 5, np.random.default_rng(0)).shape == image.shape


@pytest.mark.parametrize(("name", "severity"), [("fog", 1), ("haze", 6), ("haze", -1)])
def test_what_is_not_known_is_refused(name, severity):
    with pytest.raises(InputError, match=f"no corruption '{name}' of severity {severity}"):
        corruptions.corrupt(scan()[:, :, None], name, severity, np.random.default_rng(0))
