"""Masking, targets and loss keep the numerics that DESIGN section 3 fixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import nnx

from usfmae_jax.models import mae, patches


@pytest.mark.parametrize(("n", "ratio", "visible"), [(196, 0.75, 49), (256, 0.75, 64), (10, 0.25, 8), (7, 0.5, 3)])
def test_visible_patches_are_counted_in_integers(n, ratio, visible):
    assert mae.num_visible(n, ratio) == visible == n - round(n * ratio)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.001])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        mae.num_visible(16, ratio)


def test_mask_invariants():
    keep, restore, mask = mae.random_masking(jax.random.key(0), 16, 36, 0.75)
    assert keep.shape == (16, 9)
    assert (mask.sum(axis=1) == 27).all()
    for row in range(16):
        assert sorted(np.asarray(restore[row])) == list(range(36))  # a permutation
        assert (mask[row, keep[row]] == 0).all()  # what is kept is not hidden
        shuffled = np.argsort(restore[row])
        assert (shuffled[:9] == keep[row]).all()  # restore undoes the shuffle
    assert len({tuple(np.asarray(m)) for m in mask}) == 16  # a mask per sample


def test_every_patch_is_hidden_equally_often():
    _, _, mask = mae.random_masking(jax.random.key(1), 4000, 16, 0.75)
    np.testing.assert_allclose(mask.mean(axis=0), 0.75, atol=0.03)


@pytest.mark.parametrize("block", [2, 4])
def test_block_masks_hide_squares_at_all_places(block):
    noise = mae.block_noise(jax.random.key(0), 400, (8, 12), block)
    keep, _, mask = mae.mask_from_noise(noise, 0.5)
    assert keep.shape == (400, 48)
    hidden = np.asarray(mask).reshape(400, 8, 12)
    np.testing.assert_array_equal(hidden.sum(axis=(1, 2)), 48)
    assert np.abs(hidden.mean(axis=0) - 0.5).max() < 0.1  # every patch equally often
    coarse = np.asarray(mae.mask_from_noise(mae.block_noise(jax.random.key(0), 400, (8, 12), 1), 0.5)[2])
    alike = [
        np.mean(one[:, :, 1:] == one[:, :, :-1]) for one in (hidden, coarse.reshape(400, 8, 12))
    ]  # neighbours share their fate where squares are hidden
    assert alike[0] > 0.5 + 0.4 * (1 - 1 / block) > alike[1] + 0.1
    assert np.asarray(noise).min() >= 0


def test_fan_aware_masking_spends_nothing_outside_the_sector():
    inside = np.zeros((40, 36), bool)
    rng = np.random.default_rng(0)
    for row, m in enumerate(rng.integers(1, 37, 40)):
        inside[row, rng.permutation(36)[:m]] = True
    noise = jax.random.uniform(jax.random.key(0), (40, 36))
    keep, restore, mask = mae.mask_from_noise(noise, 0.75, jnp.asarray(inside))
    assert keep.shape == (40, 9)
    assert not (np.asarray(mask).astype(bool) & ~inside).any()
    for row in range(40):
        m = inside[row].sum()
        assert mask[row].sum() == round(m * 0.75)  # the same ratio, of the sector
        assert (mask[row, keep[row]] == 0).all()
        assert sorted(np.asarray(restore[row])) == list(range(36))


def test_fan_aware_masking_of_a_full_sector_is_random_masking():
    noise = jax.random.uniform(jax.random.key(0), (8, 36))
    plain = mae.mask_from_noise(noise, 0.75)
    fan = mae.mask_from_noise(noise, 0.75, jnp.ones((8, 36), bool))
    for a, b in zip(plain, fan, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sector_is_found_with_its_dark_inside():
    image = np.zeros((1, 64, 64, 1), np.uint8)
    image[0, 8:56, 8:56] = 100
    image[0, 24:40, 24:40] = 0  # a cyst
    image[0, :8] = 3  # JPEG noise in the surround
    inside = np.asarray(mae.sector_patches(jnp.asarray(image), 8)).reshape(8, 8)
    expected = np.zeros((8, 8), bool)
    expected[1:7, 1:7] = True
    np.testing.assert_array_equal(inside, expected)


def test_a_black_image_counts_as_all_sector():
    assert mae.sector_patches(jnp.zeros((2, 16, 16, 1), jnp.uint8), 8).all()


def test_normalised_targets_use_the_unbiased_variance(rng):
    images = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    target = np.asarray(mae.patch_targets(images, 4, normalize=True))
    patch = np.asarray(images)[1, 4:, :4].reshape(-1)
    expected = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(target[1, 2], expected, rtol=1e-5)


def test_loss_is_the_mean_over_hidden_patches_only(rng):
    predicted, target = (jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.integers(0, 2, (3, 5)), jnp.float32)
    error, count = mae.masked_error(predicted, target, mask)
    hidden = np.asarray(mask, bool)
    expected = np.square(np.asarray(predicted)[hidden] - np.asarray(target)[hidden]).mean()
    np.testing.assert_allclose(error / count, expected, rtol=1e-6)


def _mae(**options):
    return mae.MAE(
        **{
            "image_size": (32, 32), "patch_size": 8, "channels": 1, "width": 32, "depth": 2, "num_heads": 2,
            "decoder_width": 16, "decoder_depth": 2, "decoder_num_heads": 2, "rngs": nnx.Rngs(0),
        } | options
    )  # fmt: skip


def _loss(model, images, noise):
    keep, restore, mask = mae.mask_from_noise(noise, 0.75)
    error, count = mae.masked_error(model(images, keep, restore), mae.patch_targets(images, 8, True), mask)
    return error / count


def test_how_it_is_computed_does_not_change_what():
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 1))
    noise = jax.random.uniform(jax.random.key(2), (2, 16))
    run = jax.jit(nnx.value_and_grad(_loss))
    value, gradient = run(_mae(), images, noise)
    for options in ({"scan": False}, {"remat": "full"}, {"attention": "xla"}):
        other, other_gradient = run(_mae(**options), images, noise)
        np.testing.assert_allclose(value, other, rtol=1e-6, err_msg=str(options))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, other_gradient)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_outside():
    model = _mae(dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 1))
    keep, restore, _ = mae.random_masking(jax.random.key(2), 2, 16, 0.75)
    text = str(jax.make_jaxpr(lambda: model(images, keep, restore))())
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len([line for line in products if ":bf16" in line]) >= 8  # embeddings, and qkv, proj, fc1, fc2 twice
    run = jax.jit(lambda model: model(images, keep, restore))
    assert run(model).dtype == jnp.float32
    np.testing.assert_allclose(run(model), run(_mae()), atol=0.1)


@pytest.mark.parametrize(("size", "channels"), [((32, 48), 1), ((48, 32), 3)])
def test_any_image_size_divisible_by_the_patch(size, channels):
    def run():
        keep, restore, _ = mae.random_masking(jax.random.key(0), 2, size[0] * size[1] // 64, 0.75)
        return _mae(channels=channels)(jnp.zeros((2, *size, channels)), keep, restore)

    assert jax.eval_shape(run).shape == (2, size[0] * size[1] // 64, 64 * channels)


@pytest.mark.parametrize(
    ("gflops", "size"),
    [
        (58.7, {"patch_dim": 768, "num_patches": 196, "width": 768, "depth": 12}),
        (124.5, {"patch_dim": 768, "num_patches": 196, "width": 1024, "depth": 24}),
        (291.4, {"patch_dim": 588, "num_patches": 256, "width": 1280, "depth": 32}),
    ],
)
def test_training_arithmetic_matches_the_published_figures(gflops, size):
    flops = mae.training_flops(**size, mask_ratio=0.75, decoder_width=512, decoder_depth=8)
    # A little less than published: only visible patches are embedded.
    assert 0.985 * gflops < flops / 1e9 <= gflops


def test_a_blurred_image_is_scipys(rng):
    images = rng.normal(size=(2, 20, 24, 3)).astype(np.float32)
    expected = scipy.ndimage.gaussian_filter(images, (0, 1.3, 1.3, 0), mode="nearest", radius=(0, 4, 4, 0))
    np.testing.assert_allclose(patches.blurred(jnp.asarray(images), 1.3), expected, atol=1e-5)
