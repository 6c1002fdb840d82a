"""Pictures of what a model does, as a person sees them."""

import numpy as np

from usfmae_jax.pretraining.inspect import encode_png, picture_grid


def test_the_grid_has_a_column_for_every_caption(rng):
    images = rng.integers(0, 255, (2, 32, 48, 1), dtype=np.uint8)
    other = np.full_like(images, 255)
    grid = picture_grid({"input": images, "masked": other, "again": images}, side=48)
    tile = grid[22 + 2 : 22 + 2 + 32]
    assert grid.shape == (22 + 2 * 36, 3 * 52, 3)
    np.testing.assert_array_equal(tile[:, 2:50, 0], images[0, ..., 0])
    assert (tile[:, 54:102] == 255).all()
    np.testing.assert_array_equal(tile[:, 106:154, 2], images[0, ..., 0])
    assert grid[:22].any()  # captions
    assert encode_png(grid).startswith(b"\x89PNG")
