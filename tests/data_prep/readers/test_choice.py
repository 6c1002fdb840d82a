"""Which reader a file goes to: its content decides, and what nobody reads is named."""

import gzip
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from data_prep import readers
from data_prep.readers import Options, UnreadableError, clips, kinds, read_frames
from tests.data_prep.readers import dicoms, samples
from usfmae_jax.errors import InputError, install

EXPECTED = {kinds.IMAGES: "images", kinds.VIDEOS: "video", kinds.VOLUMES: "volumes", kinds.ARRAYS: "arrays"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("av")
    pytest.importorskip("h5py")
    return samples.write_all(tmp_path_factory.mktemp("files"))


def test_every_kind_is_known_by_its_content_alone(files, tmp_path):
    for path in files:
        kind = next(kind for suffixes, kind in EXPECTED.items() if path.name.endswith(tuple(suffixes)))
        assert readers.kind_of(path.read_bytes()[: kinds.HEAD_BYTES]) == kind, path.name
        if path.suffix != ".mhd":  # which needs its other file beside it
            (tmp_path / "x.png").write_bytes(path.read_bytes())
            assert len(list(read_frames(tmp_path / "x.png"))) == len(list(read_frames(path))), path.name


def test_dicom_goes_to_its_own_reader_with_and_without_a_preamble():
    element = b"\x08\0\x05\0CS\n\0ISO_IR 100" + b"\x08\0\x16\0UI\x1a\x001.2.840.10008.5.1.4.1.1.6\0"
    assert readers.kind_of(bytes(128) + b"DICM" + element) == "dicom"
    assert readers.kind_of(element) == "dicom"


@pytest.mark.parametrize(
    "mark",
    [
        *(b"II*\0", b"MM\0*", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a", b"PK\3\4", b"\x1f\x8b\x08"),
        *(b"RIFF\0\0\0\0AVI ", b"\0\0\0\x20ftyp", b"\x1a\x45\xdf\xa3", b"NRRD0004", b"\x93NUMPY", b"ObjectType ="),
        *(b"MATLAB 5.0 MAT-file", b"\x89HDF\r\n\x1a\n", b"%PDF-1.7"),
    ],
)
def test_dicom_may_have_the_mark_of_any_other_format_in_its_preamble(tmp_path, mark):
    pixels = samples.scene(1)[0]
    path = dicoms.save(tmp_path / "x", dicoms.dataset(pixels))
    path.write_bytes(mark.ljust(128, b"\0") + path.read_bytes()[128:])
    (frame,) = read_frames(path)
    np.testing.assert_array_equal(frame.pixels[:, :, 0], pixels)


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("mark", [b"MATLAB 7.3 MAT-file", b"II*\0", b"\xff\xd8\xff\xe0", b"BM", b""])
def test_hdf5_may_have_anything_before_it(size, mark):
    head = mark.ljust(size, b"\0") + b"\x89HDF\r\n\x1a\n" + bytes(kinds.HEAD_BYTES)
    assert readers.kind_of(head[: kinds.HEAD_BYTES]) == "arrays"


def test_short_marks_give_way_to_longer_ones():
    gif = bytearray(b"GIF89a".ljust(400, b"\0"))
    gif[188] = gif[376] = ord("G")  # as an MPEG transport stream has them
    assert kinds.video_container(bytes(gif)) == "gif"
    bitmap = cv2.imencode(".bmp", samples.scene(1)[0])[1].tobytes()
    assert readers.kind_of(bitmap) == "images"
    assert readers.kind_of(b"BMI and age of the patients\n" * 40) == ""


@pytest.mark.parametrize(
    "data",
    [
        b"a text\n" * 100,
        gzip.compress(b"a text\n" * 100, mtime=0),
        b"\x1f\x8b\x08 no gzip",
        b"PK\3\4" + bytes(22) + b"\4\0\0\0x.md",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"#EXTM3U\n#EXTINF:10,\nclip.ts\n",
        b"%PDF-1.7\n",
        bytes(2000),
        b"\0",
    ],
)
def test_what_nobody_reads_is_named(tmp_path, data):
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(UnreadableError, match=r"^not a kind of file that can be read$"):
        list(read_frames(tmp_path / "x.mp4"))


def test_what_is_no_file_or_empty_is_named_without_its_path(tmp_path):
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {"empty.png": "empty file", "pipe.png": "not a regular file", "none.png": "cannot be read: No such file"}
    for name, reason in reasons.items():
        with pytest.raises(UnreadableError, match=f"^{reason}") as error:
            list(read_frames(tmp_path / name))
        assert str(tmp_path) not in str(error.value)


def test_names_that_are_not_utf_8_are_read(files, tmp_path):
    for path in files:
        if path.suffix != ".mhd":
            strange = os.path.join(tmp_path, os.fsdecode(b"\xff\xe9" + os.fsencode(path.name)))
            os.symlink(path, strange)
            assert list(read_frames(strange)), path.name


@pytest.mark.parametrize(
    ("name", "library", "what"),
    [
        ("clip.mp4", "av", "Videos"),
        ("a.h5", "h5py", "HDF5 and MATLAB 7.3 files"),
        ("image", "pydicom", "DICOM files"),
    ],
)
def test_a_missing_library_is_one_sentence_that_says_what_to_type(files, tmp_path, monkeypatch, name, library, what):
    dicoms.write(tmp_path, samples.scene(1)[0])
    path = next(path for path in [*files, tmp_path / "image"] if path.name == name)
    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("video", "hdf5", "dicom", "dicom_pixels"):
        monkeypatch.delitem(sys.modules, f"data_prep.readers.{module}", raising=False)
    with pytest.raises(InputError, match=rf"^{what} need {library}: {re.escape(install('prep'))}$"):
        list(read_frames(path))


def test_images_are_read_without_loading_any_other_library(tmp_path, files):
    image = next(path for path in files if path.name == "still.png")
    code = (
        "import sys; from data_prep.readers import read_frames;"
        f"list(read_frames({str(image)!r}));"
        "print({'av', 'h5py', 'scipy', 'SimpleITK', 'nibabel', 'pydicom', 'jax'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (5, {}, [0, 1, 2, 3, 4]),
        (5, {"stride": 2}, [0, 2, 4]),
        (100, {"max_frames": 4}, [12, 37, 62, 87]),
        (100, {"stride": 10, "max_frames": 2}, [20, 70]),
        (3, {"max_frames": 3}, [0, 1, 2]),
        (3, {"stride": 5, "max_frames": 9}, [0]),
        (0, {"max_frames": 9}, []),
    ],
)
def test_frames_are_chosen_by_the_stride_and_then_evenly(count, options, expected):
    assert list(clips.chosen(count, Options(**options))) == expected


def test_a_folder_is_not_searched_for_files_without_a_suffix():
    assert "" in readers.DICOM
    assert "" not in readers.SUFFIXES
    assert {".png", ".mp4", ".nii.gz", ".mat", ".dcm"} < readers.SUFFIXES


def test_colour_is_decided_by_the_first_frames_and_held(monkeypatch):
    grey, doppler = np.full((20, 20, 3), 90, np.uint8), np.full((20, 20, 3), 90, np.uint8)
    doppler[:5] = 200, 30, 40
    for where, channels in ((7, 3), (8, 1)):
        pictures = [(number, doppler if number == where else grey) for number in range(12)]
        frames = list(clips.as_frames(pictures))
        assert {frame.pixels.shape[2] for frame in frames} == {channels}
        assert [frame.number for frame in frames] == list(range(12))
