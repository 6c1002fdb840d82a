"""Mixed, erased and smoothed examples: targets follow the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from usfmae_jax.finetuning.regularization import erase, mix, smoothed_targets


def _plain_images(count=6, size=16):
    """Image i is all i."""
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, size, size + 4, 1))


def test_smoothed_targets_are_those_of_the_paper():
    targets = smoothed_targets(jnp.asarray([0, 2]), 4, 0.2)
    np.testing.assert_allclose(targets, [[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]], rtol=1e-6)
    np.testing.assert_array_equal(smoothed_targets(jnp.asarray([1]), 2, 0.0), [[0.0, 1.0]])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_are_the_shares_of_pixels(mixup, cutmix):
    images, targets = _plain_images(), jnp.eye(6)
    run = jax.jit(lambda key: mix(key, images, targets, mixup=mixup, cutmix=cutmix))
    kinds = set()
    for seed in range(24):
        mixed, weights = run(jax.random.key(seed))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), weights @ jnp.arange(6.0), atol=1e-4)
        np.testing.assert_allclose(weights[0, 5], weights[5, 0])  # partners are those of the reversed batch
        values = np.unique(np.asarray(mixed[0]))
        kinds.add("cutmix" if set(values) <= {0.0, 5.0} else "mixup")
    assert kinds == ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())


def test_a_cut_is_one_rectangle():
    mixed, _ = mix(jax.random.key(3), _plain_images(), jnp.eye(6), mixup=0.0, cutmix=1.0)
    hole = np.asarray(mixed[0, ..., 0]) > 0
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    assert 0 < hole.sum() < hole.size
    assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_what_is_off_changes_nothing():
    images, targets = _plain_images(), jnp.eye(6)
    mixed, weights = mix(jax.random.key(0), images, targets, mixup=0.0, cutmix=0.0)
    assert mixed is images
    assert weights is targets
    assert erase(jax.random.key(0), images, 0.0) is images


def test_some_images_lose_a_rectangle_of_up_to_a_third():
    images = jnp.full((400, 24, 32, 1), 7.0)
    erased = np.asarray(jax.jit(erase, static_argnums=2)(jax.random.key(0), images, 0.25))[..., 0]
    holes = erased != 7.0
    area = holes.mean(axis=(1, 2))
    assert 0.18 < (area > 0).mean() < 0.32
    assert 0.015 < area[area > 0].min() < 0.05
    assert 0.25 < area.max() < 0.36
    for hole in holes[area > 0]:
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    noise = erased[holes]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
