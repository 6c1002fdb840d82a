"""RandAugment keeps shape and type, follows its generator, and its strength means something."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers import frame
from usfmae_jax.data import randaugment


@pytest.mark.parametrize("channels", [1, 3])
def test_views_keep_their_shape_and_follow_the_generator(channels):
    image = np.repeat(frame(0, 1)[:, :, None], channels, axis=2)
    first = [randaugment.randaugment(image, np.random.default_rng(seed)) for seed in range(20)]
    again = [randaugment.randaugment(image, np.random.default_rng(seed)) for seed in range(20)]
    assert all(view.shape == image.shape and view.dtype == np.uint8 for view in first)
    np.testing.assert_array_equal(first, again)
    changed = sum(not np.array_equal(view, image) for view in first)
    assert 8 <= changed < 20  # an operation is left out with probability 1/2


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_operations_grow_with_their_strength(name, mode):
    image = Image.fromarray(frame(0, 1)).convert(mode)
    views = [
        np.asarray(randaugment.OPERATIONS[name](image, strength, 1.0)).astype(int) for strength in (0, 0.3, 0.6, 1)
    ]
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
            np.abs(np.asarray(randaugment.OPERATIONS[name](image, 1.0, 1.0)).astype(int) - 0)[:60, :60].argmax(),
            (60, 60),
        )
        for name in ("translate_x", "translate_y")
    }
    assert moved["translate_x"] == (50, 5)  # 0.45 of 101 pixels, about
    assert moved["translate_y"] == (5, 50)
    grey = Image.fromarray(np.full((4, 4), 100, np.uint8))
    assert np.asarray(randaugment.OPERATIONS["brightness"](grey, 1.0, 1.0)).max() == 190
    assert np.asarray(randaugment.OPERATIONS["brightness"](grey, 1.0, -1.0)).max() == 10
    assert np.asarray(randaugment.OPERATIONS["solarize_add"](grey, 1.0, 1.0)).max() == 210
    assert np.asarray(randaugment.OPERATIONS["solarize"](grey, 1.0, 1.0)).max() == 155
    assert np.asarray(randaugment.OPERATIONS["posterize"](grey, 0.5, 1.0)).max() == 64  # two bits
