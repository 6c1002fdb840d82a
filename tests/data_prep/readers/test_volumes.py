"""NIfTI, MetaImage and NRRD: the slices that SimpleITK gives, one window a volume, and flat memory."""

import gzip
import itertools

import numpy as np
import pytest

from data_prep.readers import Options, UnreadableError, read_frames, stacks
from tests.data_prep.readers import samples

VOLUME = samples.scene(frames=7)
DEEP = VOLUME.astype(np.int16) * 100 - 5000


def read(path, **options):
    return list(read_frames(path, Options(**options)))


def grey(path, **options):
    return np.stack([frame.pixels[:, :, 0] for frame in read(path, **options)])


WRITERS = {
    "v.mha": samples.write_meta_image,
    "z.mha": lambda path, volume: samples.write_meta_image(path, volume, packed=True),
    "v.mhd": lambda path, volume: samples.write_meta_image(path, volume, "v.raw"),
    "z.mhd": lambda path, volume: samples.write_meta_image(path, volume, "z.zraw", packed=True),
    "v.nii": samples.write_nifti,
    "v.nii.gz": samples.write_nifti,
    "v.nrrd": samples.write_nrrd,
    "z.nrrd": lambda path, volume: samples.write_nrrd(path, volume, "gzip"),
    "v.nhdr": lambda path, volume: samples.write_nrrd(path, volume, data_file="v.raw"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_slices_are_those_of_the_stored_array_along_every_axis(tmp_path, name):
    path = WRITERS[name](tmp_path / name, VOLUME)
    for axis in range(3):
        np.testing.assert_array_equal(grey(path, axis=axis), np.moveaxis(VOLUME, axis, 0))
    assert [frame.number for frame in read(path, stride=3)] == [0, 3, 6]
    assert [frame.number for frame in read(path, axis=2, max_frames=2)] == [16, 48]


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_simpleitk_writes_is_read_as_simpleitk_reads_it(tmp_path, suffix, packed):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(VOLUME)
    image.SetDirection([0, 1, 0, -1, 0, 0, 0, 0, -1])  # which turns nothing
    sitk.WriteImage(image, str(tmp_path / f"v{suffix}"), packed)
    np.testing.assert_array_equal(grey(tmp_path / f"v{suffix}"), VOLUME)
    colour = np.repeat(VOLUME[..., None], 3, axis=-1)
    colour[:, 20:30, 20:30] = 200, 40, 30
    sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(tmp_path / f"c{suffix}"), packed)
    if ".nii" not in suffix:  # where SimpleITK makes a five-dimensional vector of it
        np.testing.assert_array_equal([frame.pixels for frame in read(tmp_path / f"c{suffix}")], colour)


def test_what_nibabel_and_pynrrd_write_is_read_in_reverse_order_of_axes(tmp_path):
    nibabel, nrrd = pytest.importorskip("nibabel"), pytest.importorskip("nrrd")
    turned = VOLUME.T  # x, y, z
    for make in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        nibabel.save(make(turned, np.eye(4), dtype=np.uint8), tmp_path / "v.nii.gz")
        np.testing.assert_array_equal(grey(tmp_path / "v.nii.gz"), VOLUME)
    nrrd.write(str(tmp_path / "v.nrrd"), turned, {"encoding": "bzip2"})
    np.testing.assert_array_equal(grey(tmp_path / "v.nrrd"), VOLUME)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">f4", "<f8"])
def test_other_numbers_than_8_bits_share_one_window_and_keep_their_order(tmp_path, dtype):
    volume = DEEP.astype(dtype)
    volume[3] = volume[3] // 4 - 3750  # a dark slice should stay dark
    shown = grey(samples.write_meta_image(tmp_path / "v.mha", volume))
    low, high = np.percentile(volume, [0.1, 99.9])
    expected = np.rint(np.clip((volume.astype(float) - low) / (high - low), 0, 1) * 255)
    np.testing.assert_allclose(shown, expected, atol=1)
    assert shown[3].max() < 80


def test_8_bits_stay_as_they_are(tmp_path):
    dark = VOLUME // 8
    np.testing.assert_array_equal(grey(samples.write_nifti(tmp_path / "v.nii", dark, slope=3.5)), dark)


def test_one_saturated_voxel_does_not_make_the_rest_black(tmp_path):
    volume = DEEP.copy()
    volume[0, 0, 0] = 32767
    assert np.median(grey(samples.write_nifti(tmp_path / "v.nii", volume))) > 60


def test_nan_is_background_and_mostly_nan_is_refused(tmp_path):
    volume = DEEP.astype(np.float32)
    volume[:, :, :10] = np.nan
    volume[0, 40, 40], volume[0, 40, 41] = np.inf, -np.inf
    shown = grey(samples.write_nifti(tmp_path / "v.nii", volume))
    assert not shown[:, :, :10].any()
    assert not shown[0, 40, 40:42].any()
    assert shown[:, :, 10:].mean() > 50
    volume[:, :, :40] = np.nan
    with pytest.raises(UnreadableError, match="more than half of the values are NaN"):
        read(samples.write_nifti(tmp_path / "w.nii", volume))


def test_empty_slices_are_dropped_and_the_others_keep_their_numbers(tmp_path):
    volume = VOLUME.copy()
    volume[0], volume[1], volume[4] = 0, 7, 255
    assert [frame.number for frame in read(samples.write_nifti(tmp_path / "v.nii.gz", volume))] == [2, 3, 5, 6]


def test_a_volume_of_one_value_is_named(tmp_path):
    for dtype in (np.uint8, np.float32):
        with pytest.raises(UnreadableError, match="all slices are empty"):
            read(samples.write_meta_image(tmp_path / "v.mha", np.full((3, 20, 20), 9, dtype)))


@pytest.mark.parametrize(
    ("flip", "expected"),
    [
        ("vertical", VOLUME[:, ::-1]),
        ("horizontal", VOLUME[:, :, ::-1]),
        ("both", VOLUME[:, ::-1, ::-1]),
    ],
)
def test_slices_are_flipped_on_demand(tmp_path, flip, expected):
    np.testing.assert_array_equal(grey(samples.write_nifti(tmp_path / "v.nii", VOLUME), flip=flip), expected)


def test_a_plane_a_sequence_and_a_series_of_volumes_become_frames(tmp_path):
    plane = samples.write_nifti(tmp_path / "p.nii", VOLUME[0], dims=(64, 48))
    np.testing.assert_array_equal(grey(plane), VOLUME[:1])
    sequence = samples.write_nifti(tmp_path / "s.nii", VOLUME, dims=(64, 48, 1, 7))
    np.testing.assert_array_equal(grey(sequence), VOLUME)
    series = samples.write_nifti(tmp_path / "t.nii", VOLUME[:6], dims=(64, 48, 3, 2))
    np.testing.assert_array_equal(grey(series), VOLUME[:6])
    with pytest.raises(UnreadableError, match="axis 0 only"):
        read(series, axis=1)


def test_three_equal_slices_are_one_still(tmp_path):
    path = samples.write_meta_image(tmp_path / "v.mha", np.stack([VOLUME[0]] * 3))
    np.testing.assert_array_equal(grey(path), VOLUME[:1])
    assert len(read(samples.write_meta_image(tmp_path / "w.mha", VOLUME[:3]))) == 3


def test_three_equal_channels_become_grey_and_doppler_stays_in_all_slices(tmp_path):
    equal = np.repeat(VOLUME[..., None], 3, axis=-1)
    path = samples.write_meta_image(tmp_path / "v.mha", equal, channels=3)
    np.testing.assert_array_equal(grey(path), VOLUME)
    equal[2, 2:30, 2:30] = 200, 30, 40
    frames = read(samples.write_meta_image(tmp_path / "v.mha", equal, channels=3))
    np.testing.assert_array_equal([frame.pixels for frame in frames], equal)
    for axis in (1, 2):
        frames = read(tmp_path / "v.mha", axis=axis)
        np.testing.assert_array_equal([frame.pixels for frame in frames], np.moveaxis(equal, axis, 0))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_volume_that_is_cut_off_is_refused(tmp_path, name, kept):
    path = WRITERS[name](tmp_path / name, VOLUME)
    data_file = next((tmp_path / other for other in ("v.raw", "z.zraw") if (tmp_path / other).exists()), path)
    data = data_file.read_bytes()
    data_file.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UnreadableError, match="cut off"):
        read(path)


def test_a_wrong_checksum_is_seen(tmp_path):
    path = samples.write_nifti(tmp_path / "v.nii.gz", VOLUME)
    data = bytearray(path.read_bytes())
    data[-8:-4] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match="damaged"):
        read(path)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_large_volume_is_never_in_memory(tmp_path, monkeypatch, axis):
    monkeypatch.setattr(stacks, "_HELD", 10_000)  # bytes; one of the planes has 3,072
    path = samples.write_nifti(tmp_path / "v.nii.gz", VOLUME)
    read_at_once = []
    original = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read_at_once.append(size) or original(self, size))
    np.testing.assert_array_equal(grey(path, axis=axis), np.moveaxis(VOLUME, axis, 0))
    assert 0 < max(read_at_once) <= 10_000
    assert min(read_at_once) >= 0
    assert sum(size == 3072 for size in read_at_once) == 7 * (1, 3, 3)[axis]  # passes: all slices, 22 at a time


def test_frames_are_given_while_the_file_is_read(tmp_path):
    path = samples.write_nifti(tmp_path / "v.nii", np.concatenate([VOLUME] * 8))
    with path.open("r+b") as file:
        file.truncate(352 + 56 * 3072)
    frames = read_frames(path)
    first = list(itertools.islice(frames, 9))
    path.write_bytes(b"")  # what is behind does not exist any more
    assert [frame.number for frame in first] == list(range(9))
    with pytest.raises(UnreadableError, match="cut off"):
        list(frames)
