"""Headers of NIfTI, MetaImage and NRRD are not trusted: what they name, and what they declare."""

import numpy as np
import pytest

from data_prep.readers import UnreadableError
from tests.data_prep.readers import samples
from tests.data_prep.readers.test_volumes import DEEP, VOLUME, grey, read


def test_a_missing_data_file_is_named_without_its_folder(tmp_path):
    path = samples.write_meta_image(tmp_path / "v.mhd", VOLUME, "v.raw")
    (tmp_path / "v.raw").unlink()
    with pytest.raises(UnreadableError) as error:
        read(path)
    assert str(error.value) == "the data file that it names is missing"


@pytest.mark.parametrize(
    "name", ["../secret.raw", "a/../../secret.raw", "{outside}/secret.raw", "link.raw", "linked/secret.raw"]
)
@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_header_reads_nothing_outside_its_own_folder(tmp_path, name, suffix):
    inside, outside = tmp_path / "inside", tmp_path
    inside.mkdir()
    (outside / "secret.raw").write_bytes(VOLUME.tobytes())
    (inside / "link.raw").symlink_to(outside / "secret.raw")
    (inside / "linked").symlink_to(outside)
    path = inside / f"v{suffix}"
    name = name.format(outside=outside)
    if suffix == ".mhd":
        samples.write_meta_image(path, VOLUME)
        text = path.read_bytes().partition(b"ElementDataFile")[0]
        path.write_bytes(text + f"ElementDataFile = {name}\n".encode())
    else:
        samples.write_nrrd(path, VOLUME)
        text = path.read_bytes().partition(b"\n\n")[0]
        path.write_bytes(text + f"\ndata file: {name}\n\n".encode())
    with pytest.raises(UnreadableError, match="outside the folder") as error:
        read(path)
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("name", ["slice%03d.raw 1 7 1", "LIST"])
def test_lists_of_data_files_are_refused(tmp_path, name):
    path = samples.write_meta_image(tmp_path / "v.mhd", VOLUME, name)
    with pytest.raises(UnreadableError, match="a list of files"):
        read(path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"DimSize": "640 480 9"}, "cut off: 21504 bytes of the 2764800"),
        ({"DimSize": "64 48 -7"}, "no pixels"),
        ({"DimSize": "64"}, "header is damaged"),
        ({"DimSize": "64 48 seven"}, "header is damaged"),
        ({"NDims": "x" * 70_000}, "header is damaged"),
        ({"NDims": 5, "DimSize": "2 2 2 2 1344"}, "5 dimensions"),
        ({"ElementNumberOfChannels": 7}, "7 channels"),
        ({"ElementType": "MET_OTHER"}, "not supported"),
        ({"BinaryData": "False"}, "as text"),
        ({"CompressedData": "True"}, "damaged or cut off"),
    ],
)
def test_headers_that_cannot_be_true_are_refused_before_the_data_are_read(tmp_path, fields, reason):
    samples.write_meta_image(tmp_path / "v.mha", VOLUME, **fields)
    with pytest.raises(UnreadableError, match=reason):
        read(tmp_path / "v.mha")


@pytest.mark.parametrize("offset", [-5, 10**9])
def test_data_outside_of_their_file_are_refused(tmp_path, offset):
    for path in (
        samples.write_meta_image(tmp_path / "v.mhd", VOLUME, "v.raw", HeaderSize=offset),
        samples.write_nrrd(tmp_path / "v.nrrd", VOLUME, **{"byte skip": offset}),
        samples.write_nrrd(tmp_path / "z.nrrd", VOLUME, "gzip", **{"byte skip": offset}),
    ):
        with pytest.raises(UnreadableError, match=r"damaged|cut off"):
            read(path)


@pytest.mark.slow
def test_a_packed_plane_of_too_many_pixels_is_refused(tmp_path):
    packed = samples.write_nifti(tmp_path / "v.nii.gz", np.zeros((300, 1000, 1000), np.uint8), dims=(10_000, 10_000, 3))
    for axis in range(3):
        with pytest.raises(UnreadableError, match="more than 50 million"):
            read(packed, axis=axis)


def test_a_plane_of_too_many_pixels_is_refused_before_it_is_read(tmp_path):
    path = samples.write_meta_image(tmp_path / "v.mha", np.zeros((1, 1, 1), np.uint8), DimSize="10000 10000 3")
    with path.open("ab") as file:
        file.truncate(300_100_000)  # sparse
    for axis in range(3):
        with pytest.raises(UnreadableError, match="more than 50 million"):
            read(path, axis=axis)


def test_what_gives_no_pictures_along_an_axis_is_refused(tmp_path):
    still = samples.write_nifti(tmp_path / "v.nii", VOLUME[0], dims=(64, 48))
    with pytest.raises(UnreadableError, match="lines of 64 pixels: another axis"):
        read(still, axis=1)
    many = samples.write_meta_image(tmp_path / "v.mha", np.zeros(4_000_004, np.uint8), NDims=3, DimSize="2 2 1000001")
    with pytest.raises(UnreadableError, match="1000001 slices, more than a million"):
        read(many, axis=0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": "block"}, "type of numbers"),
        ({"encoding": "ascii"}, "encoding"),
        ({"line skip": 3}, "lines to be skipped"),
        ({"kinds": "list domain domain"}, "first axis"),
    ],
)
def test_kinds_of_nrrd_that_are_not_supported_say_why(tmp_path, fields, reason):
    with pytest.raises(UnreadableError, match=reason):
        read(samples.write_nrrd(tmp_path / "v.nrrd", VOLUME, **fields))


def test_data_at_the_end_of_a_file_and_after_skipped_bytes_are_found(tmp_path):
    (tmp_path / "x.raw").write_bytes(b"some other header" + VOLUME.tobytes())
    samples.write_nrrd(tmp_path / "v.nhdr", VOLUME, data_file="v.raw", **{"byte skip": -1})
    (tmp_path / "v.raw").write_bytes((tmp_path / "x.raw").read_bytes())
    np.testing.assert_array_equal(grey(tmp_path / "v.nhdr"), VOLUME)
    samples.write_meta_image(tmp_path / "v.mhd", VOLUME, "v.raw", HeaderSize=17)
    (tmp_path / "v.raw").write_bytes((tmp_path / "x.raw").read_bytes())
    np.testing.assert_array_equal(grey(tmp_path / "v.mhd"), VOLUME)


def test_nifti_whose_numbers_would_turn_dark_to_bright_or_that_is_half_a_pair_is_refused(tmp_path):
    with pytest.raises(UnreadableError, match="negative slope"):
        read(samples.write_nifti(tmp_path / "v.nii", DEEP, slope=-1.0))
    data = bytearray(samples.write_nifti(tmp_path / "v.nii", DEEP).read_bytes())
    data[344:348] = b"ni1\0"
    (tmp_path / "v.nii").write_bytes(data)
    with pytest.raises(UnreadableError, match="a pair of files"):
        read(tmp_path / "v.nii")
