"""Perceptual hashes, near-duplicates, and clips that stand still."""

import itertools
import os
import pathlib

import cv2
import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from usfmae_jax.data import fingerprints
from usfmae_jax.data.fingerprints import ALIKE, NEAR, SAME

DATA = pathlib.Path(os.environ.get("ULTRASOUND_DATA", pathlib.Path(__file__).parents[3] / "shared" / "ultrasound"))


def picture(seed, shape=(200, 260)):
    """Grey noise at two scales, darker with depth: as much structure as tissue has."""
    rng = np.random.default_rng(seed)
    coarse, fine = (cv2.resize(rng.random((n, n)), shape[::-1], interpolation=cv2.INTER_CUBIC) for n in (12, 40))
    depth = np.linspace(1, 0.4, shape[0])[:, None]
    return (30 + 190 * np.clip(0.6 * coarse + 0.4 * fine, 0, 1) * depth).astype(np.uint8)


def resized(pixels, scale):
    return cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def jpeg(pixels, quality=50):
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)


def cropped(pixels, part=0.03):
    rows, columns = (round(side * part) for side in pixels.shape)
    return pixels[rows:-rows, columns:-columns]


def on_screen(pixels):
    screen = np.zeros((300, 420), np.uint8)
    screen[60 : 60 + pixels.shape[0], 100 : 100 + pixels.shape[1]] = pixels
    cv2.putText(screen, "CLINIC 12:30 MI 0.9", (5, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 220, 1)
    return screen


def annotated(pixels):
    pixels = pixels.copy()
    cv2.putText(pixels, "LEFT BREAST", (20, 120), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 230, 1)
    cv2.drawMarker(pixels, (130, 60), 240, cv2.MARKER_CROSS, 9)
    return pixels


COPIES = {
    "half": lambda pixels: resized(pixels, 0.5),
    "double": lambda pixels: resized(pixels, 2),
    "squeezed": lambda pixels: cv2.resize(pixels, (224, 224)),
    "compressed": jpeg,
    "cropped": cropped,
    "cropped at one corner": lambda pixels: pixels[6:, 8:],
    "surrounded": on_screen,
    "brighter": lambda pixels: np.rint(255 * (pixels / 255) ** 0.6).astype(np.uint8),
    "darker": lambda pixels: np.rint(255 * (pixels / 255) ** 1.6).astype(np.uint8),
    "contrast": lambda pixels: np.clip(1.4 * pixels - 20, 0, 255).astype(np.uint8),
    "annotated": annotated,
    "all of it": lambda pixels: jpeg(resized(cropped(annotated(pixels), 0.015), 0.7)),
}


def hashes(*pictures):
    return np.array([fingerprints.perceptual_hash(one) for one in pictures])


def alike(one, other):
    return fingerprints.similarity(fingerprints.views(one), fingerprints.views(other))


def random_codes(count, seed=0):
    """Usable hashes, every fifth of them a few bits from the one before, in one of its views."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (count, 2, 256), dtype=np.uint8)
    for k in range(4, count, 5):
        view = rng.integers(2)
        bits[k, view] = bits[k - 1, view] ^ (rng.random(256) < rng.choice([0.01, 0.05, 0.3]))
    bits[..., 255] = 1
    return np.packbits(bits, axis=2).reshape(count, 64).view(np.uint64)


def by_hand(a, b, radius):
    bits = [np.unpackbits(code.view(np.uint8), axis=1).reshape(len(code), 2, 256).astype(int) for code in (a, b)]
    every = np.abs(bits[0][:, None] - bits[1][None]).sum(-1).min(-1)
    i, j = np.nonzero(every <= radius)
    return i, j, every[i, j]


@pytest.mark.parametrize("treatment", COPIES)
def test_a_treated_copy_is_near_and_alike(treatment):
    for seed in range(5):
        original, copy = picture(seed), COPIES[treatment](picture(seed))
        assert fingerprints.distances(*(hashes(one) for one in (original, copy)))[0, 0] <= NEAR
        assert alike(original, copy) >= ALIKE
        assert alike(copy, original) >= ALIKE


def test_a_copy_that_shows_less_of_the_depth_is_near_and_alike():
    for seed in range(5):
        deep = picture(seed, shape=(300, 240))
        shallow = np.ascontiguousarray(deep[:220])
        assert fingerprints.distances(hashes(deep), hashes(shallow))[0, 0] <= NEAR
        assert alike(deep, shallow) >= ALIKE


@pytest.mark.parametrize("treatment", ["half", "double", "squeezed", "compressed"])
def test_a_copy_of_all_of_the_picture_is_the_same_without_a_second_look(treatment):
    codes = hashes(*(version for seed in range(5) for version in (picture(seed), COPIES[treatment](picture(seed)))))
    assert np.diag(fingerprints.distances(codes[::2], codes[1::2])).max() <= SAME


def test_other_pictures_are_not_alike():
    pictures = [picture(seed) for seed in range(30)]
    i, j, distance = fingerprints.near_pairs(hashes(*pictures), radius=110)
    assert len(i)  # of 435 pairs some are within chance of each other
    assert min(distance) > 4 * SAME
    assert max(alike(pictures[a], pictures[b]) for a, b in zip(i, j, strict=True)) < ALIKE


@pytest.mark.parametrize(
    "flat",
    [
        np.zeros((200, 260), np.uint8),
        np.full((200, 260), 90, np.uint8),
        np.full((200, 260), 255, np.uint8),
        np.random.default_rng(0).integers(0, 4, (200, 260)).astype(np.uint8),
        np.random.default_rng(0).normal(90, 10, (200, 260)).astype(np.uint8),
        np.linspace(0, 200, 200)[:, None].repeat(260, 1).astype(np.uint8),
    ],
    ids=["black", "grey", "white", "nearly black", "noise", "gradient"],
)
def test_a_picture_without_structure_matches_nothing_not_even_itself(flat):
    code = hashes(flat)
    assert not code.any()
    assert fingerprints.distances(code, code)[0, 0] == 255
    assert (fingerprints.distances(code, hashes(picture(0), picture(1))) == 255).all()
    assert (fingerprints.distances(hashes(picture(0), picture(1)), code) == 255).all()
    for radius in (10, 254):
        assert len(fingerprints.near_pairs(np.concatenate([code, code]), radius=radius)[0]) == 0
    assert alike(flat, flat) == 0
    assert alike(flat, picture(0)) == alike(picture(0), flat) == 0


def test_structure_at_the_border_alone_is_not_a_perfect_match():
    frame = np.zeros((2, 64, 64), np.float32)
    frame[:, :2], frame[:, :, :2], frame[:, -2:] = 1.5, -1.5, 1.5
    assert fingerprints.similarity(frame, fingerprints.views(picture(0))) == 0


def test_a_hash_is_the_same_for_grey_one_channel_and_three():
    grey = picture(3)
    codes = hashes(grey, grey[:, :, None], np.dstack([grey] * 3))
    assert codes.dtype == np.uint64
    assert codes.shape == (3, 8)
    assert (codes == codes[0]).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (400, 3), (20, 20)])
def test_small_and_narrow_pictures_have_a_hash_or_none(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert fingerprints.perceptual_hash(pixels).shape == (8,)


def test_the_opposite_of_a_hash_is_as_far_as_can_be():
    codes = random_codes(3)
    opposite = ~codes
    opposite[:, [3, 7]] ^= np.uint64(1) << np.uint64(56)  # the bit that says that there is a hash
    assert (np.diag(fingerprints.distances(codes, opposite)) == 255).all()


@pytest.mark.parametrize("radius", [0, 15, 16, 100, 254])
def test_near_pairs_are_those_of_brute_force(radius):
    codes = random_codes(61)
    i, j, distance = by_hand(codes, codes, radius)
    upper = i < j
    found = fingerprints.near_pairs(codes, radius=radius)
    assert [part.tolist() for part in found] == [part[upper].tolist() for part in (i, j, distance)]
    assert radius == 0 or upper.any()
    other = np.concatenate([random_codes(23, seed=1), codes[::7]])
    found = fingerprints.near_pairs(codes, other, radius)
    assert [part.tolist() for part in found] == [part.tolist() for part in by_hand(codes, other, radius)]


@pytest.mark.parametrize("spread", [15, 16])
def test_bits_that_differ_in_every_band_hide_no_pair(spread):
    bits = np.zeros((2, 2, 256), np.uint8)
    bits[1, :, 3 : 16 * spread : 16] = 1  # one bit in each of `spread` bands
    bits[..., 255] = 1
    codes = np.packbits(bits, axis=2).reshape(2, 64).view(np.uint64)
    assert [part.tolist() for part in fingerprints.near_pairs(codes, radius=spread)] == [[0], [1], [spread]]
    assert len(fingerprints.near_pairs(codes, radius=spread - 1)[0]) == 0


@pytest.mark.parametrize("radius", [15, 16])
def test_the_distance_is_that_of_the_view_that_differs_less(radius):
    bits = np.zeros((2, 2, 256), np.uint8)
    bits[1, 0, :10], bits[1, 1, :3], bits[..., 255] = 1, 1, 1
    codes = np.packbits(bits, axis=2).reshape(2, 64).view(np.uint64)
    assert [part.tolist() for part in fingerprints.near_pairs(codes, radius=radius)] == [[0], [1], [3]]


@pytest.mark.parametrize("radius", [15, 40])
def test_no_pair_is_missed_in_a_set_larger_than_a_block(radius, monkeypatch):
    codes = random_codes(300)
    whole = fingerprints.near_pairs(codes, radius=radius)
    monkeypatch.setattr(fingerprints, "_BLOCK", (7, 32))
    assert [part.tolist() for part in fingerprints.near_pairs(codes, radius=radius)] == [
        part.tolist() for part in whole
    ]
    assert len(whole[0]) > 5


@pytest.mark.parametrize("radius", [15, 40])
def test_pairs_of_one_group_are_left_out(radius):
    codes = random_codes(60)
    groups = np.arange(60) // 5
    i, j, _ = fingerprints.near_pairs(codes, radius=radius)
    assert (groups[i] == groups[j]).all()  # as they were made
    assert len(fingerprints.near_pairs(codes, radius=radius, groups=(groups, groups))[0]) == 0
    assert len(fingerprints.near_pairs(codes, radius=radius, groups=(groups, np.arange(60) + 1000))[0]) == len(i) > 0


def copies(count, seed=0):
    return np.repeat(random_codes(1, seed), count, axis=0)


@pytest.mark.parametrize("radius", [15, 40])
def test_up_to_some_copies_are_all_compared_with_all(radius):
    codes = np.concatenate([random_codes(40), copies(fingerprints.COPIES, seed=7), random_codes(9, seed=3)])
    groups = np.arange(len(codes)) // 3
    i, j, distance = by_hand(codes, codes, radius)
    apart = (i < j) & (groups[i] != groups[j])
    found = fingerprints.near_pairs(codes, radius=radius, groups=(groups, groups))
    assert [part.tolist() for part in found] == [part[apart].tolist() for part in (i, j, distance)]


@pytest.mark.parametrize("radius", [15, 96])
@pytest.mark.parametrize("other", [None, copies(300)], ids=["itself", "another"])
def test_of_very_many_copies_each_has_a_pair_with_every_kind_of_another_group(other, radius):
    codes = copies(10_000)
    groups, kinds = np.arange(10_000) // 100, np.arange(10_000) // 1000
    of_other = (groups, kinds) if other is None else (np.arange(300) - 10_000, np.arange(300) % 3)
    found = fingerprints.near_pairs(
        codes, other, radius, groups=(groups, of_other[0]), kinds=(kinds, of_other[1]), most=1 << 20
    )
    i, j, _ = found
    assert len(i) < 100 * 10_000
    assert len(np.unique(np.column_stack([i, j]), axis=0)) == len(i)
    assert (groups[i] != of_other[0][j]).all()
    reached = {*zip(i.tolist(), of_other[1][j].tolist(), strict=True)}
    if other is None:
        assert (i < j).all()
        reached |= {*zip(j.tolist(), kinds[i].tolist(), strict=True)}
    assert len(reached) == 10_000 * len(set(of_other[1].tolist()))


def test_equal_pairs_hold_all_groups_together():
    codes, groups = np.arange(1000) % 3, np.arange(1000) // 7
    i, j = fingerprints.equal_pairs(codes, groups)
    assert (codes[i] == codes[j]).all()
    assert (groups[i] != groups[j]).all()
    assert len(i) < 40 * 1000
    _, part = connected_components(coo_array((np.ones(len(i)), (i, j)), (1000, 1000)))
    for code in range(3):
        assert len(set(part[codes == code].tolist())) == 1


@pytest.mark.parametrize("radius", [15, 96])
def test_too_many_pairs_are_said_and_the_rest_is_left_out(radius):
    codes, said = copies(200), []
    for number in range(200):
        codes[number, number % 3] ^= np.uint64(1) << np.uint64(number // 3 % 56)
        codes[number, 4 + number // 168] ^= np.uint64(1 << 57)
    assert len(fingerprints.near_pairs(codes, radius=radius, warn=said.append)[0]) == 200 * 199 // 2
    assert not said
    assert 500 < len(fingerprints.near_pairs(codes, radius=radius, most=1000, warn=said.append)[0]) <= 1000
    assert said == ["more than 1,000 pairs of pictures are nearly equal: the rest of them is not compared"]


@pytest.mark.parametrize("radius", [15, 40])
def test_progress_adds_up_to_all_rows(radius):
    rows = []
    fingerprints.near_pairs(random_codes(61), radius=radius, done=rows.append)
    assert sum(rows) == 61


@pytest.mark.parametrize("radius", [15, 96])
def test_no_hashes_have_no_pairs(radius):
    none = np.empty((0, 8), np.uint64)
    assert [len(part) for part in fingerprints.near_pairs(none, radius=radius)] == [0, 0, 0]
    assert [len(part) for part in fingerprints.near_pairs(none, random_codes(3), radius)] == [0, 0, 0]


def test_the_imaged_area_is_found_beside_text():
    left, top, right, bottom = fingerprints.content_box(on_screen(picture(0)))
    assert np.abs(np.array([left, top, right, bottom]) - [100, 60, 360, 260]).max() <= 420 / 96


def thumbnails(*pictures):
    return [fingerprints.thumbnail(one) for one in pictures]


def test_what_compression_changes_is_not_news_and_motion_is():
    still = picture(0)
    last, again, moved = thumbnails(still, jpeg(still, 75), np.roll(still, 4, axis=0))
    assert fingerprints.near_identical(last, last)
    assert fingerprints.near_identical(last, again)
    assert not fingerprints.near_identical(last, moved)
    assert fingerprints.near_identical(*thumbnails(np.zeros_like(still), np.zeros_like(still)))
    assert not fingerprints.near_identical(*thumbnails(np.zeros_like(still), still))


def test_brightness_and_depth_of_colour_do_not_decide_what_is_news():
    one, other = picture(0), np.roll(picture(0), 1, axis=0)
    change = fingerprints.change(*thumbnails(one, other))
    assert fingerprints.change(*thumbnails(one // 2, other // 2)) == pytest.approx(change, rel=0.05)
    assert fingerprints.change(*thumbnails(one * np.uint16(200), other * np.uint16(200))) == pytest.approx(change, 0.05)


def test_slow_motion_adds_up():
    still = picture(0, (1600, 2080))
    pictures = thumbnails(*(resized(np.roll(still, step, axis=0), 0.125) for step in range(24)))
    assert all(fingerprints.near_identical(a, b) for a, b in itertools.pairwise(pictures))
    kept = pictures[:1]
    for this in pictures[1:]:
        if not fingerprints.near_identical(kept[-1], this):
            kept.append(this)
    assert 3 <= len(kept) <= 12


def read_real(pattern, step=1):
    paths = sorted(DATA.glob(pattern))[::step]
    if not paths:
        pytest.skip(f"needs the public dataset {pattern.split('/')[0]}; ULTRASOUND_DATA names the folder that holds it")
    return [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in paths]


def test_copies_of_real_fetal_heads_are_found_and_no_other():
    heads = read_real("HC18/training/image/*.png", step=2)
    copies = [jpeg(resized(head, 0.4), 60) for head in heads]
    i, j, _ = fingerprints.near_pairs(hashes(*heads), hashes(*copies))
    pairs = [(a, b) for a, b in zip(i, j, strict=True) if alike(heads[a], copies[b]) >= ALIKE]
    assert pairs == [(k, k) for k in range(len(heads))]


def test_frames_of_other_patients_are_not_alike():
    frames = read_real("BUS-BRA/Images/*-l.png", step=5)
    i, j, distance = fingerprints.near_pairs(hashes(*frames))
    assert not (distance <= 4 * SAME).any()
    assert not any(alike(frames[a], frames[b]) >= ALIKE for a, b in zip(i, j, strict=True))


def test_both_views_of_a_lesion_are_news():
    views = read_real("BUS-BRA/Images/bus_05[0-9][0-9]-[lr].png")
    assert not any(fingerprints.near_identical(*thumbnails(a, b)) for a, b in itertools.pairwise(views))
    assert len(fingerprints.near_pairs(hashes(*views), radius=SAME)[0]) == 0
