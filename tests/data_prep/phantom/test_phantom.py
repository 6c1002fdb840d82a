import itertools
import math

import cv2
import numpy as np
import pytest

from data_prep import phantom
from data_prep.phantom import CLASSES, __main__, simulate_patient
from data_prep.phantom.scanner import PROBES, complex_normal, receive, scan_geometry

ALL_PROBES = list(itertools.chain(*PROBES.values()))


def homogeneous_envelope(probe, seed=0):
    """The envelope of uniform tissue before log compression, unit mean power -> float32 [D, L]."""
    scan = scan_geometry(probe, 256)
    echoes = receive(scan, complex_normal(np.random.default_rng(seed), *scan.shape))
    return np.sqrt(echoes[..., 0] ** 2 + echoes[..., 1] ** 2)


@pytest.fixture(scope="module")
def frames():
    """One frame of each of 96 patients: 24 of every class."""
    return [simulate_patient(patient, image_size=96, frames=1)[0] for patient in range(96)]


def of_class(frames, name):
    return [frame for frame in frames if CLASSES[frame.label] == name]


def brightness_below(frame):
    """Mean grey level straight below the lesion minus that of the flanks at the same depth."""
    rows, columns = np.nonzero(frame.mask)
    left, right, band = columns.min(), columns.max(), slice(rows.max() + 3, rows.max() + 15)
    width = right - left
    below = slice(left + width // 4, right - width // 4 + 1)
    visible = np.where(frame.sector > 0, frame.image, np.nan)[band]
    flanks = np.hstack([visible[:, max(0, left - width // 2 - 3) : left - 3], visible[:, right + 4 :][:, : width // 2]])
    return np.nanmean(visible[:, below]) - np.nanmean(flanks)


def brightness_inside(frame):
    """Mean grey level in the lesion minus that of a ring around it."""
    ring = (cv2.dilate(frame.mask, np.ones((11, 11))) > 0) & (cv2.dilate(frame.mask, np.ones((5, 5))) == 0)
    return frame.image[frame.mask > 0].mean() - frame.image[ring & (frame.sector > 0)].mean()


def lateral_sigma(probe, at):
    """Width in mm of the lateral response at a fraction of the depth, from the autocorrelation of the intensity.

    A Gaussian response of sigma s gives intensities whose correlation at lag d is exp(-d^2 / (2 s^2)).
    """
    estimates, lag = [], 2
    for seed in range(6):
        intensity = homogeneous_envelope(probe, seed=seed) ** 2
        middle = round(at * (len(intensity) - 1))
        band = intensity[max(0, middle - 12) : middle + 13] - 1
        estimates.append((band[:, lag:] * band[:, :-lag]).mean() / (band**2).mean())
    pitch = probe.span / intensity.shape[1]
    if probe.geometry == "convex":
        pitch *= probe.radius + at * probe.depth
    return pitch * lag / math.sqrt(-2 * math.log(np.mean(estimates)))


def motion(first, other):
    """Shift of the probe (fraction of the height), its rotation (radians) and log scale between two lesion masks.

    From the affine map that fits best; masks have no speckle in the way.
    """
    before, after = (cv2.GaussianBlur(frame.mask, (0, 0), 4).astype(np.float32) for frame in (first, other))
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 60, 1e-6)
    _, affine = cv2.findTransformECC(before, after, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE, stop)
    face = np.array([first.image.shape[1] / 2, 0])  # what the probe turns about
    shift = np.linalg.norm(affine @ [*face, 1] - face) / len(first.image)
    turn = math.atan2(affine[1, 0] - affine[0, 1], affine[0, 0] + affine[1, 1])
    return shift, turn, math.log(np.linalg.det(affine[:, :2]))


def speckle_correlation(first, other, reach=24):
    """Correlation of the fine texture of two frames at the best shift."""

    def texture(frame):
        detail = frame.image - cv2.GaussianBlur(frame.image.astype(np.float32), (0, 0), 4)
        return detail / np.sqrt(cv2.GaussianBlur(detail**2, (0, 0), 8) + 1)

    inner = texture(other)[reach:-reach, reach:-reach]
    return cv2.matchTemplate(texture(first), inner, cv2.TM_CCOEFF_NORMED).max()


@pytest.mark.parametrize("probe", ALL_PROBES, ids=lambda probe: f"{probe.geometry}-{probe.depth}mm")
def test_speckle_is_rayleigh_before_compression(probe):
    envelope = np.stack([homogeneous_envelope(probe, seed=seed) for seed in range(8)])
    assert envelope.mean() / envelope.std() == pytest.approx(math.sqrt(math.pi / (4 - math.pi)), abs=0.03)  # 1.91
    quantiles = np.array([0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    np.testing.assert_allclose(np.quantile(envelope, quantiles), np.sqrt(-np.log(1 - quantiles)), rtol=0.04)


@pytest.mark.parametrize("probe", ALL_PROBES, ids=lambda probe: f"{probe.geometry}-{probe.depth}mm")
def test_the_point_spread_function_keeps_the_power_of_tissue_at_every_depth(probe):
    power = np.mean([homogeneous_envelope(probe, seed=seed) ** 2 for seed in range(8)], axis=(0, 2))
    bands = [band.mean() for band in np.array_split(power, 5)]
    np.testing.assert_allclose(bands, 1, atol=0.08)


@pytest.mark.parametrize("probe", ALL_PROBES, ids=lambda probe: f"{probe.geometry}-{probe.depth}mm")
def test_the_beam_is_narrowest_at_the_focus_and_widens_with_depth(probe):
    focus = probe.focus / probe.depth
    at_focus, between, deep = (lateral_sigma(probe, at) for at in (focus, (1 + focus) / 2, 0.95))
    assert at_focus * 1.1 < between < deep / 1.1
    assert lateral_sigma(probe, 0.05) > 1.1 * at_focus


def test_speckle_is_finer_along_depth_than_across():
    envelope = homogeneous_envelope(PROBES["linear"][0])
    envelope = envelope - envelope.mean()
    assert (envelope[3:] * envelope[:-3]).mean() < 0.5 * (envelope[:, 3:] * envelope[:, :-3]).mean()


def test_a_cyst_is_darker_than_its_surroundings_and_enhances_what_is_below(frames):
    cysts = of_class(frames, "cyst")
    assert max(brightness_inside(frame) for frame in cysts) < -25
    below = np.array([brightness_below(frame) for frame in cysts])
    assert below.mean() > 10
    assert (below > 0).mean() > 0.8


def test_a_solid_irregular_lesion_shadows_on_average_and_a_regular_one_does_not(frames):
    irregular = np.mean([brightness_below(frame) for frame in of_class(frames, "solid_irregular")])
    regular = np.mean([brightness_below(frame) for frame in of_class(frames, "solid_regular")])
    assert irregular < -15
    assert abs(regular) < 12


def test_only_irregular_lesions_have_irregular_outlines(frames):
    def solidity(frame):  # area over that of the convex hull
        (outline, *_), _ = cv2.findContours(frame.mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        return cv2.contourArea(outline) / cv2.contourArea(cv2.convexHull(outline))

    by_class = {name: [solidity(frame) for frame in of_class(frames, name)] for name in CLASSES[1:]}
    assert np.mean(by_class["solid_irregular"]) < 0.88
    assert min(by_class["cyst"] + by_class["solid_regular"]) > 0.88


def test_masks_lie_inside_the_sector_and_are_empty_exactly_for_none(frames):
    for frame in frames:
        assert set(np.unique(frame.mask)) <= {0, 255}
        assert not (frame.mask & ~frame.sector).any()
        assert frame.mask.any() == (CLASSES[frame.label] != "none")


def test_the_surround_is_black_and_the_sector_is_not(frames):
    assert {frame.geometry for frame in frames} == {"linear", "convex"}
    for frame in frames:
        assert (frame.image[frame.sector == 0] == 0).all()
        assert (frame.image[frame.sector > 0] > 0).mean() > 0.6
        if frame.geometry == "convex":
            assert not frame.sector[[0, 0, -1, -1], [0, -1, 0, -1]].any()
            assert 0.3 < (frame.sector > 0).mean() < 0.8


def test_the_mean_grey_level_does_not_give_the_class_away(frames):
    means = {name: [f.image[f.sector > 0].mean() for f in of_class(frames, name)] for name in CLASSES}
    spread = np.mean([np.std(values) for values in means.values()])
    assert np.ptp([np.mean(values) for values in means.values()]) < 1.5 * spread


def test_frames_depend_on_seed_patient_and_index_only():
    four, two = simulate_patient(7, image_size=64, frames=4), simulate_patient(7, image_size=64, frames=2)
    for a, b in zip(four, two, strict=False):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.mask, b.mask)
    for other in (four[1], simulate_patient(7, image_size=64, seed=1)[0], simulate_patient(8, image_size=64)[0]):
        assert not np.array_equal(other.image, four[0].image)


def test_frames_of_a_patient_show_the_same_lesion_moved():
    for patient in range(12):
        first, *others = simulate_patient(patient, image_size=128)
        for other in others:
            assert (other.label, other.geometry, other.image.shape) == (first.label, first.geometry, first.image.shape)
            assert (other.image != first.image).mean() > 0.2
            if first.mask.any():
                before, after = first.mask > 0, other.mask > 0
                assert 0.2 < (before & after).sum() / (before | after).sum() < 1
                assert 0.75 < after.sum() / before.sum() < 1.33


def test_between_frames_the_probe_shifts_turns_and_presses():
    moves = []
    for patient in range(40):
        (small,) = simulate_patient(patient, image_size=32, frames=1)
        if CLASSES[small.label] == "solid_irregular":  # an outline that a rotation does not map onto itself
            first, *others = simulate_patient(patient, image_size=160)
            moves += [motion(first, other) for other in others]
    shift, turn, scale = np.array(moves).T
    assert 0.01 < np.mean(shift) < 0.06
    assert 0.015 < np.std(turn) < 0.05  # 0.02 per frame
    assert 0.009 < np.std(scale) < 0.04  # 0.015 per frame


def test_speckle_of_a_patient_is_partly_kept_from_frame_to_frame(monkeypatch):
    def uniform(rng, probe, v, u):
        return np.zeros((v.size, u.size), np.float32), np.zeros((v.size, u.size), np.float32)

    # Without anatomy, which frames share too.
    monkeypatch.setattr(phantom, "draw_layers", uniform)
    monkeypatch.setattr(phantom, "draw_vessels", lambda *_: None)
    monkeypatch.setattr(phantom, "LESIONS", {})
    patients = [simulate_patient(patient, image_size=160, frames=3) for patient in range(24)]
    patients = [frames for frames in patients if frames[0].geometry == "linear"]  # where a shift is one of the image
    within = [speckle_correlation(*pair) for frames in patients for pair in itertools.combinations(frames, 2)]
    pairs = itertools.combinations([frames[0] for frames in patients], 2)
    between = [speckle_correlation(a, b) for a, b in pairs if a.image.shape == b.image.shape]
    assert 2 * np.mean(between) < np.mean(within) < 0.5
    assert max(within) < 0.9


def test_every_four_patients_have_one_of_each_class_in_an_order_that_varies():
    labels = np.array([simulate_patient(patient, image_size=32, frames=1)[0].label for patient in range(48)])
    blocks = labels.reshape(-1, 4)
    assert (np.sort(blocks, axis=1) == np.arange(4)).all()
    assert len(np.unique(blocks, axis=0)) > 4


def test_ids_name_patient_video_and_frame():
    frames = simulate_patient(12, image_size=32)
    assert {frame.patient for frame in frames} == {"p00012"}
    assert {frame.video for frame in frames} == {"p00012"}
    assert [frame.frame for frame in frames] == ["p00012_00", "p00012_01", "p00012_02", "p00012_03"]


@pytest.mark.parametrize("image_size", [32, 45, 224, 300])
def test_the_shorter_side_is_the_image_size(image_size):
    for patient in range(6):
        (frame,) = simulate_patient(patient, image_size=image_size, frames=1)
        for array in (frame.image, frame.mask, frame.sector):
            assert array.dtype == np.uint8
            assert array.shape == frame.image.shape
        assert min(frame.image.shape) == image_size
        assert max(frame.image.shape) <= 1.5 * image_size


def test_a_size_too_small_is_refused():
    with pytest.raises(ValueError, match="image_size 16"):
        simulate_patient(0, image_size=16)


def test_the_door_writes_the_contact_sheet_or_says_why_not(tmp_path, monkeypatch, capsys):
    sheet = __main__.contact_sheet()
    monkeypatch.setattr(__main__, "contact_sheet", lambda seed: sheet)
    __main__.main([f"--output={tmp_path / 'sheet.png'}"])
    assert (tmp_path / "sheet.png").stat().st_size < 600_000
    with pytest.raises(SystemExit, match="2"):
        __main__.main([f"--output={tmp_path / 'missing' / 'sheet.png'}"])
    assert "cannot write" in capsys.readouterr().err


def test_several_lesions_lie_apart_and_the_mask_tells_their_classes():
    found = []
    for patient in range(8):
        (frame,) = simulate_patient(patient, seed=5, image_size=96, frames=1, several=True)
        sizes = [
            np.sort(cv2.connectedComponentsWithStats((frame.mask == number).astype(np.uint8))[2][1:, cv2.CC_STAT_AREA])
            for number in (1, 2, 3)
        ]
        assert set(np.unique(frame.mask)) <= {0, 1, 2, 3}
        assert frame.label == -1
        assert not (frame.mask & ~frame.sector).any()
        found.append(sum(int((areas >= 20).sum()) for areas in sizes))
    assert sorted(found[:4]) == sorted(found[4:]) == [0, 1, 2, 3]
