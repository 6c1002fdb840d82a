"""`load_encoder`: images of any size, batched, the same features whatever comes with them."""

import numpy as np
import pytest

from tests.interop import made
from usfmae_jax import convert, load_encoder
from usfmae_jax.errors import InputError
from usfmae_jax.training.forward import _compiled


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    source = made.write(folder / "w.safetensors", made.tensors(decoder=False))
    assert convert.main([f"--input={source}", f"--output={folder / 'in'}", *made.HEADS]) == 0
    return load_encoder(folder / "in")


def test_images_of_any_size_become_features(encoder, rng):
    images = rng.integers(0, 256, (3, 50, 70, 1), np.uint8)
    features = encoder(images)
    assert [part.shape for part in features] == [(3, 32), (3, 32), (3, 4, 4, 32)]
    assert all(part.dtype == np.float32 for part in features)
    np.testing.assert_allclose(features.mean_patch, features.patch_grid.mean(axis=(1, 2)), atol=1e-6)
    for same in (images[..., 0], np.repeat(images, 3, axis=-1), list(images)):
        np.testing.assert_array_equal(encoder(same).class_token, features.class_token)
    mixed = encoder([images[0], images[1, :40, :60]])  # a list may hold different sizes
    np.testing.assert_allclose(mixed.class_token[0], features.class_token[0], atol=1e-5)


def test_features_do_not_depend_on_the_batch_and_one_shape_is_compiled(encoder, rng):
    images = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)
    program = _compiled(encoder._apply, encoder._mesh)
    compiled = program._cache_size()
    features = encoder(images, batch_size=4)  # one full batch and one padded
    assert program._cache_size() == compiled + 1
    np.testing.assert_allclose(features.patch_grid, encoder(images, batch_size=5).patch_grid, atol=1e-5)


def test_images_can_be_taken_as_they_are(encoder):
    assert encoder(np.zeros((1, 16, 48, 1), np.uint8), resized=False).patch_grid.shape == (1, 2, 6, 32)
    with pytest.raises(InputError, match="30x48 are not divisible by the patch size 8"):
        encoder(np.zeros((1, 30, 48, 1), np.uint8), resized=False)
    with pytest.raises(InputError, match="different sizes have to be resized"):
        encoder([np.zeros((16, 16), np.uint8), np.zeros((16, 24), np.uint8)], resized=False)


def test_attention_is_a_map_of_the_patches(encoder, rng):
    images = rng.integers(0, 256, (3, 50, 70, 1), np.uint8)
    for pool in ("mean", "cls"):
        maps = encoder.attention(images, pool=pool)
        assert (maps.shape, maps.dtype) == ((3, 4, 4), np.float32)
        assert np.isfinite(maps).all()
        assert (maps >= 0).all()
        assert (maps <= 1).all()
    np.testing.assert_array_equal(encoder.attention(list(images[..., 0])), encoder.attention(images))


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 32, 32, 1), np.float32), np.zeros((2, 32, 32, 4), np.uint8), np.zeros((2, 0, 32, 1), np.uint8), []],
    ids=["floats", "four channels", "no pixels", "nothing"],
)
def test_other_images_are_refused(encoder, images):
    with pytest.raises(InputError, match="uint8"):
        encoder(images)


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no encoder, no classifier and no finished checkpoint"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("shape", [(40, 48), (40, 48, 1), (40, 48, 3)])
def test_one_image_is_no_batch(encoder, shape):
    with pytest.raises(InputError, match="is one image; put it into a list"):
        encoder(np.zeros(shape, np.uint8))
    assert len(encoder([np.zeros(shape, np.uint8)]).class_token) == 1


@pytest.mark.parametrize("size", [0, -1, "8", True, 2.0])
def test_a_batch_size_is_a_whole_number(encoder, size):
    with pytest.raises(InputError, match="must be a whole number of 1 or more"):
        encoder(np.zeros((1, 40, 48), np.uint8), batch_size=size)


def test_it_says_what_it_is(encoder):
    assert repr(encoder).startswith("Encoder: a ViT of width ")
