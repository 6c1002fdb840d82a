import numpy as np
import pytest

from benchmarks import overlays
from benchmarks.overlays import KINDS, burn
from data_prep import phantom


@pytest.fixture(scope="module")
def frame():
    one = phantom.simulate_patient(0, seed=5, image_size=192, frames=1)[0]
    return one.image, one.sector


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_of_a_kind_is_where_the_frame_changed(frame, kind):
    burnt = burn(*frame, rng(), kinds=[kind], pieces=3, colour=0.5)
    changed = (burnt.image != burnt.clean).any(axis=2)
    far = np.abs(burnt.image.astype(int) - burnt.clean).max(axis=2) > 40
    assert changed.any()
    assert burnt.masks[kind][far].all()
    assert set(burnt.masks) == {kind}


def test_the_same_seed_burns_the_same(frame):
    one, two, other = (burn(*frame, rng(seed), pieces=9, doppler=True) for seed in (1, 1, 2))
    assert np.array_equal(one.image, two.image)
    assert not np.array_equal(one.image, other.image)


def test_without_pieces_nothing_changes(frame):
    burnt = burn(*frame, rng(), pieces=0)
    assert np.array_equal(burnt.image[:, :, 0], frame[0])
    assert not any(mask.any() for mask in burnt.masks.values())


@pytest.mark.parametrize(("colour", "doppler", "channels"), [(0, False, 1), (1, False, 3), (0, True, 3)])
def test_a_frame_has_colour_only_where_colour_was_painted(frame, colour, doppler, channels):
    burnt = burn(*frame, rng(), colour=colour, doppler=doppler)
    assert burnt.image.shape == burnt.clean.shape == (*frame[0].shape, channels)


def test_doppler_belongs_to_the_clean_frame(frame):
    burnt = burn(*frame, rng(), pieces=0, doppler=True)
    assert burnt.doppler.any()
    assert np.array_equal(burnt.image, burnt.clean)
    assert np.ptp(burnt.clean[burnt.doppler > 0].astype(int), axis=1).min() > 60
    assert not burnt.doppler[frame[1] == 0].any()


def test_every_kind_is_painted_once_before_any_comes_again(frame):
    burnt = burn(*frame, rng(3), pieces=len(KINDS))
    assert all(mask.any() for mask in burnt.masks.values())


def test_compression_touches_the_image_and_not_the_truth(frame):
    plain, coded = burn(*frame, rng(), quality=0), burn(*frame, rng(), quality=80)
    assert np.array_equal(plain.clean, coded.clean)
    assert 0 < np.abs(plain.image.astype(int) - coded.image).mean() < 10


def test_soft_ink_is_wider_and_weaker(frame):
    sharp, soft = (burn(*frame, rng(), kinds=["line"], pieces=1, soft=soft) for soft in (0, 1.0))
    assert np.count_nonzero(soft.masks["line"]) > np.count_nonzero(sharp.masks["line"])


def test_a_screen_surrounds_the_frame(frame):
    image, sector = overlays.screen(*frame, rng())
    assert image.shape == sector.shape
    assert np.array_equal(image[sector > 0], frame[0][frame[1] > 0])
    assert not image[0].any()
    assert not image[:, -1].any()


def test_kinds_are_checked(frame):
    with pytest.raises(ValueError, match="not stamp"):
        burn(*frame, rng(), kinds=["stamp"])
