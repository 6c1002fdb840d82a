"""Arrays and volumes alike: along which axis their frames are, how many there are, and what is left when cut off."""

import gzip
import json
import zipfile

import numpy as np
import pytest
import scipy.io

from data_prep.readers import Options, UnreadableError, read_frames, stacks
from tests.data_prep import builds
from tests.data_prep.readers import samples
from tests.data_prep.readers.test_arrays import FRAMES_FIRST, FRAMES_LAST, npy
from tests.data_prep.readers.test_volumes import WRITERS

h5py = pytest.importorskip("h5py")

CLIP = samples.scene(frames=12)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 64), np.uint8)


def chunked(path, clip, **how):
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=clip, chunks=(1, *clip.shape[1:]), **how)
    return path


PACKED_HDF5 = {"p.h5": lambda path, clip: chunked(path, clip, compression="gzip"), "c.h5": chunked}
ALL = {**FRAMES_FIRST, **FRAMES_LAST, **WRITERS, **PACKED_HDF5}


def write(name, folder, clip):
    """`[N, H, W]` with its frames where the format has them."""
    return ALL[name](folder / name, clip.transpose(1, 2, 0) if name in FRAMES_LAST else clip)


def read(path, **options):
    """The sound frames, their warnings, and the reason why there are no more."""
    frames, reason = [], ""
    try:
        for frame in read_frames(path, Options(**options)):
            frames.append(frame)
    except UnreadableError as error:
        reason = str(error)
    warnings = {warning for frame in frames for warning in frame.warnings}
    pixels = np.stack([frame.pixels[:, :, 0] for frame in frames]) if frames else None
    return pixels, warnings, reason


@pytest.mark.parametrize("name", ALL)
def test_frames_that_are_where_the_format_has_them_are_taken_without_a_warning(tmp_path, name):
    for clip in (CLIP, NOISE):  # of NOISE, every axis has frames of 16 x 16 or more
        pixels, warnings, reason = read(write(name, tmp_path, clip))
        np.testing.assert_array_equal(pixels, clip)
        assert (warnings, reason) == (set(), "")


@pytest.mark.parametrize("name", FRAMES_FIRST)
@pytest.mark.parametrize("axis", [1, 2])
def test_frames_along_another_axis_are_found(tmp_path, name, axis):
    path = write(name, tmp_path, np.moveaxis(CLIP, 0, axis))
    pixels, warnings, reason = read(path)
    np.testing.assert_array_equal(pixels, CLIP)
    assert (warnings, reason) == ({stacks.ELSEWHERE}, "")
    np.testing.assert_array_equal(read(path, axis=axis)[0], CLIP)


@pytest.mark.parametrize("name", FRAMES_LAST)
@pytest.mark.parametrize("axis", [0, 1])
def test_frames_first_in_a_matlab_file_as_scipy_saves_them_are_found(tmp_path, name, axis):
    path = FRAMES_LAST[name](tmp_path / name, np.moveaxis(CLIP, 0, axis))
    pixels, warnings, reason = read(path)
    np.testing.assert_array_equal(pixels, CLIP)
    assert (warnings, reason) == ({stacks.ELSEWHERE}, "")


@pytest.mark.parametrize("name", WRITERS)
def test_a_volume_whose_frames_seem_to_lie_along_another_axis_is_refused_naming_the_option(tmp_path, name):
    path = write(name, tmp_path, np.moveaxis(CLIP, 0, 2))
    pixels, _, reason = read(path)
    slices = "64 x 12 along 0, 48 x 12 along 1, 48 x 64 along 2"
    assert pixels is None
    assert reason == f"its frames may lie along another axis ({slices}): say which with --axis"
    np.testing.assert_array_equal(read(path, axis=2)[0], CLIP)


def still_screen(frames, height, width):
    """Noise in the middle of a screen on which nothing else moves."""
    clip = np.random.default_rng(1).integers(0, 256, (frames, height, width), np.uint8)
    clip[:, :, : width // 4], clip[:, :, -width // 4 :] = clip[0, :, : width // 4], clip[0, :, -width // 4 :]
    return clip


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_of_three_axes_that_could_be_that_of_time_what_stands_still_tells(tmp_path, dtype):
    short, long = (still_screen(frames, 96, 128).astype(dtype) for frames in (20, 80))
    pixels, warnings, _ = read(npy(tmp_path / "a.npy", np.moveaxis(short, 0, 2)))
    assert (pixels.shape, warnings) == (short.shape, {stacks.ELSEWHERE})
    # Of 96 slices of 128 x 80 nothing tells but that, which is not enough to change what the format means.
    pixels, _, reason = read(npy(tmp_path / "a.npy", np.moveaxis(long, 0, 2)))
    assert pixels is None
    assert "say which with --axis" in reason
    assert read(npy(tmp_path / "a.npy", long))[0].shape == long.shape


def test_where_nothing_tells_long_frames_are_refused_and_taken_when_asked_for(tmp_path):
    lines = np.random.default_rng(2).integers(0, 256, (20, 32, 400), np.uint8)  # such as echoes before scan conversion
    pixels, _, reason = read(npy(tmp_path / "a.npy", lines))
    assert pixels is None
    assert "(32 x 400 along 0, 20 x 400 along 1, 20 x 32 along 2): say which with --axis" in reason
    np.testing.assert_array_equal(read(tmp_path / "a.npy", axis=0)[0], lines)


def wrong_count(folder, name, count):
    """A file of 12 frames whose header declares `count`."""
    path, other = write(name, folder, CLIP), write(name, folder / "other", CLIP[: max(count, 1)])
    if count > 12 or count < 1:
        other = write(name, folder / "other", np.resize(CLIP, (max(count, 1), *CLIP.shape[1:])))
    data, header = path.read_bytes(), other.read_bytes()
    if path.suffix in (".mha", ".nrrd"):
        head = header[: len(header) - max(count, 1) * 3072]
        return path, head.replace(b"64 48 1\n", f"64 48 {count}\n".encode()) + data[-12 * 3072 :]
    if path.suffix == ".npy":
        return path, header[:128].replace(b"(1, 48", b"(%d, 48" % count) + data[128:]
    if path.suffix == ".gz":
        data, header = gzip.decompress(data), bytearray(gzip.decompress(header)[:352])
        header[46:48] = count.to_bytes(2, "little", signed=True)
        return path, gzip.compress(bytes(header) + data[352:])
    header = bytearray(header[:352])
    header[46:48] = count.to_bytes(2, "little", signed=True)
    return path, bytes(header) + data[352:]


@pytest.mark.parametrize("name", ["v.mha", "v.nrrd", "v.nii", "v.nii.gz", "a.npy"])
@pytest.mark.parametrize(("count", "warning"), [(100, stacks.FEWER), (5, stacks.MORE), (0, stacks.UNKNOWN)])
def test_a_header_that_is_wrong_about_the_number_of_frames_loses_none(tmp_path, name, count, warning):
    (tmp_path / "other").mkdir()
    path, data = wrong_count(tmp_path, name, count)
    path.write_bytes(data)
    pixels, warnings, reason = read(path)
    np.testing.assert_array_equal(pixels, CLIP)
    assert (warnings, reason) == ({warning}, "")


def test_what_other_headers_do_not_say_is_counted_in_the_data(tmp_path):
    for fields in ({"DimSize": "64 48"}, {"DimSize": "64 48 -1"}, {"DimSize": "64 48 9000"}):
        pixels, warnings, _ = read(samples.write_meta_image(tmp_path / "v.mha", CLIP, **fields))
        np.testing.assert_array_equal(pixels, CLIP)
        assert warnings == {stacks.FEWER if "9000" in fields["DimSize"] else stacks.UNKNOWN}
    still = samples.write_nifti(tmp_path / "v.nii", CLIP, dims=(64, 48))  # two dimensions, and twelve frames
    pixels, warnings, _ = read(still)
    np.testing.assert_array_equal(pixels, CLIP)
    assert warnings == {stacks.MORE}
    scipy.io.savemat(tmp_path / "a.mat", {"image": CLIP.transpose(1, 2, 0)})
    data = (tmp_path / "a.mat").read_bytes()
    place = data.index(np.array([48, 64, 12], "<i4").tobytes())
    (tmp_path / "a.mat").write_bytes(data[: place + 8] + np.int32(70).tobytes() + data[place + 12 :])
    pixels, warnings, _ = read(tmp_path / "a.mat")
    np.testing.assert_array_equal(pixels, CLIP)
    assert warnings == {stacks.FEWER}


def test_a_data_file_that_holds_more_than_its_header_declares_may_hold_other_volumes(tmp_path):
    samples.write_meta_image(tmp_path / "v.mhd", CLIP[:5], "v.raw")
    (tmp_path / "v.raw").write_bytes(CLIP.tobytes())
    pixels, warnings, _ = read(tmp_path / "v.mhd")
    np.testing.assert_array_equal(pixels, CLIP[:5])
    assert warnings == {"its data file holds more than its header declares"}


def test_hdf5_of_which_not_all_was_written_says_so(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("image", (20, 48, 64), "u1", chunks=(1, 48, 64))
        dataset[:12] = CLIP
    pixels, warnings, _ = read(tmp_path / "a.h5")
    np.testing.assert_array_equal(pixels, CLIP)
    assert warnings == {stacks.FEWER}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", ["<u1", "<u2"])
def test_a_clip_that_is_cut_off_gives_its_sound_frames_first(tmp_path, name, dtype):
    clip = NOISE[:12].astype(dtype)  # which does not shrink
    clip[:, :2] = np.array([0, 255])[:, None]  # so that the window of 16 bits is that of 8
    path = write(name, tmp_path, clip)
    data_file = next((tmp_path / other for other in ("v.raw", "z.zraw") if (tmp_path / other).exists()), path)
    data = data_file.read_bytes()
    data_file.write_bytes(data[: int(0.6 * len(data)) + 1])
    pixels, warnings, reason = read(path)
    assert 5 <= len(pixels) <= 7
    np.testing.assert_array_equal(pixels, clip[: len(pixels)])
    assert "cut off" in reason
    assert warnings == set()


def test_an_archive_without_its_list_of_members_gives_those_before_the_cut(tmp_path):
    np.savez(tmp_path / "a.npz", image=CLIP, number=np.arange(5000))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data[:-30_000])
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(tmp_path / "a.npz")
    np.testing.assert_array_equal(read(tmp_path / "a.npz", key="image")[0], CLIP)


def test_warnings_are_counted_by_file_and_a_short_clip_that_is_cut_off_keeps_its_frames(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        npy(folder / f"turned{number}.npy", np.moveaxis(samples.scene(frames=5, seed=number), 0, 2))
    samples.write_nifti(folder / "more.nii", samples.scene(frames=5, seed=2), dims=(64, 48, 9))
    cut = npy(folder / "cut.npy", samples.scene(frames=6, seed=3))
    cut.write_bytes(cut.read_bytes()[:-4000])
    assert builds.run("--name=x", source=folder, output=tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out/x/1.0.0/manifest.json").read_text())
    assert manifest["kept"] == 2 * 5 + 5 + 4
    expected = [f"{stacks.ELSEWHERE}: 2 files", f"{stacks.FEWER}: 1 file"]
    assert [warning for warning in manifest["warnings"] if "header" in warning or "axis" in warning] == expected
    printed = capsys.readouterr().out
    assert all(f"Warning: {warning}" in printed for warning in expected)
    assert list(manifest["rejected"]) == [
        "cut off: 14432 bytes of the 18432 that its header declares; the frames before the damage are kept"
    ]
