"""The size of a pixel: what headers and tables say, through cropping and shrinking, into the shards."""

import csv
import json
import struct

import numpy as np
import pytest

from data_prep.readers import Options, read_frames
from data_prep.work import stretched
from tests.data_prep.builds import picture, read, refused, run, write, write_csv
from tests.data_prep.readers import dicoms, samples
from tests.data_prep.trees import real_folder
from usfmae_jax.data.table import read_table
from usfmae_jax.data.targets import read_targets
from usfmae_jax.errors import InputError

PIXELS = picture(0)


def spacing(path, **options):
    (found,) = {frame.spacing for frame in read_frames(path, Options(**options))}
    return found


def by_axis(region, down, across, unit=3):
    region.PhysicalDeltaY, region.PhysicalDeltaX = down, across
    region.PhysicalUnitsYDirection = region.PhysicalUnitsXDirection = unit
    return region


def test_dicom_has_it_from_its_regions_in_cm_or_else_from_the_image_plane(tmp_path):
    left, right = dicoms.region((0, 0, 30, 47)), dicoms.region((31, 0, 63, 47))

    def said(*regions, **elements):
        elements |= {"SequenceOfUltrasoundRegions": list(regions)} if regions else {}
        return spacing(dicoms.write(tmp_path, PIXELS, **elements))

    plane = {"PixelSpacing": [0.4, 0.5]}
    assert said(by_axis(left, -0.02, 0.03), by_axis(right, 0.02, 0.03)) == pytest.approx((0.2, 0.3))
    assert said(by_axis(left, 0.02, 0.03), **plane) == pytest.approx((0.2, 0.3))
    assert said(by_axis(left, 0.02, 0.03), by_axis(right, 0.04, 0.03), **plane) == (0, 0)  # two scales in one picture
    assert said(by_axis(left, 0.02, 0.03, unit=4), **plane) == (0.4, 0.5)  # seconds
    assert said(**plane) == (0.4, 0.5)
    assert said() == (0, 0)
    far = by_axis(dicoms.region((0, 0, 500, 400)), 0.02, 0.03)  # declared before the picture was shrunk
    assert said(far, **plane) == (0, 0)
    assert said(by_axis(left, 0.0, 0.0)) == said(by_axis(left, 50, 50)) == (0, 0)


VOLUME = samples.scene(frames=20)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".nhdr"])
def test_volumes_have_it_by_the_axis_along_which_they_are_sliced(tmp_path, suffix):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(VOLUME)
    image.SetSpacing((0.1, 0.2, 0.4))  # x, y, z
    sitk.WriteImage(image, str(tmp_path / f"v{suffix}"))
    found = {axis: spacing(tmp_path / f"v{suffix}", axis=axis) for axis in range(3)}
    assert found == {0: pytest.approx((0.2, 0.1)), 1: pytest.approx((0.4, 0.1)), 2: pytest.approx((0.4, 0.2))}
    image.SetSpacing((1, 1, 0.4))
    sitk.WriteImage(image, str(tmp_path / f"v{suffix}"))
    assert spacing(tmp_path / f"v{suffix}", axis=0) == (0, 0)


@pytest.mark.parametrize(("unit", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 0.001)])
def test_nifti_in_other_units_becomes_mm(tmp_path, unit, factor):
    data = bytearray(samples.write_nifti(tmp_path / "v.nii", VOLUME).read_bytes())
    data[76:108] = struct.pack("<8f", 1, 0.2 / factor, 0.3 / factor, 9, 0, 0, 0, 0)
    data[123] = unit | 8  # and seconds
    (tmp_path / "v.nii").write_bytes(data)
    assert spacing(tmp_path / "v.nii", axis=0) == pytest.approx((0.3, 0.2))


@pytest.mark.parametrize("line", [b"ElementSpacing = a b c", b"ElementSpacing = nan 0.1 1", b"ElementSpacing = 0.1"])
def test_a_size_that_cannot_be_read_costs_no_frame(tmp_path, line):
    path = samples.write_meta_image(tmp_path / "v.mha", VOLUME)
    head, tail = path.read_bytes().split(b"ElementDataFile", 1)
    kept = [one for one in head.splitlines() if not one.startswith(b"ElementSpacing")]
    path.write_bytes(b"\n".join([*kept, line, b"ElementDataFile" + tail]))
    frames = list(read_frames(path, Options(axis=0)))
    assert len(frames) == 20
    assert {frame.spacing for frame in frames} == {(0, 0)}


def test_resizing_stretches_it_and_cropping_does_not():
    assert stretched((0.1, 0.2), (400, 300, 1), (200, 100, 1)) == pytest.approx((0.2, 0.6))
    assert stretched((0.0, 0.0), (400, 300), (200, 100)) == (0, 0)


def test_a_table_of_ones_own_says_it_and_tfds_reads_it(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    for number in range(3):
        write(tmp_path / "in" / f"{number}.png", picture(number, (96, 128)))
    rows = ["file", "spacing"], ["0.png", "0.25"], ["1.png", "0.25 0.5"], ["2.png", ""]
    labels = f"--labels={write_csv(tmp_path / 'l.csv', *rows)}"
    assert run(labels, "--image_size=48", "--thin=off", source=tmp_path / "in", output=tmp_path / "out") == 0
    found = {record["source"]: record for record in read(tmp_path / "out")}
    assert [found[f"{n}.png"]["spacing"] for n in range(3)] == [(0.5, 0.5), (0.5, 1.0), (0.0, 0.0)]
    builder = tfds.builder_from_directory(str(next((tmp_path / "out").glob("*/1.0.0"))))
    assert builder.info.features["spacing"].shape == (2,)
    decoded = sorted(tuple(one["spacing"].tolist()) for one in builder.as_data_source("train"))
    assert decoded == [(0.0, 0.0), (0.5, 0.5), (0.5, 1.0)]


@pytest.mark.parametrize("cell", ["wide", "0", "-1", "inf", "nan 1", "1 2 3"])
def test_a_size_in_a_table_that_is_none_is_refused(tmp_path, capsys, cell):
    write(tmp_path / "in" / "a.png", PIXELS)
    labels = f"--labels={write_csv(tmp_path / 'l.csv', ['file', 'spacing'], ['a.png', cell])}"
    said = refused(capsys, labels, source=tmp_path / "in", output=tmp_path / "out")
    assert f"the spacing {cell!r} of 'a.png' is not the size of a pixel in mm" in said


def test_the_table_of_a_build_is_joined_to_its_shards_and_that_of_a_private_one_by_its_pseudonyms(
    tmp_path, monkeypatch
):
    salt = tmp_path / "salt"
    salt.write_bytes(bytes(range(32)))
    salt.chmod(0o600)
    monkeypatch.setenv("USFMAE_SALT", str(salt))
    for number in range(3):
        write(tmp_path / "in" / "a" / f"{number}.png", picture(number))
    rows = ["file", "label", "thickness [mm]"], *([f"a/{n}.png", "x", 1.5 * n] for n in range(3))
    table = str(write_csv(tmp_path / "l.csv", *rows))
    flags = f"--labels={table}", "--thin=off", "--whole_frames"
    assert run(*flags, source=tmp_path / "in", output=tmp_path / "out") == 0
    frames = read_table(str(tmp_path / "out"))
    assert read_targets(table, frames, ["thickness"]).values[:, 0].tolist() == [0, 1.5, 3]
    linkage = tmp_path / "who.csv"
    private = *flags, "--private", f"--linkage={linkage}"
    assert run(*private, source=tmp_path / "in", output=tmp_path / "private") == 0
    frames = read_table(str(tmp_path / "private"))
    with pytest.raises(InputError, match="whose frames have pseudonyms"):
        read_targets(table, frames, ["thickness"])
    known = {row["original"]: row["pseudonym"] for row in csv.DictReader(linkage.open()) if row["kind"] == "frame"}
    rows = ["frame", "thickness [mm]"], *([known[f"a/{n}.png"], 1.5 * n] for n in range(3))
    found = read_targets(str(write_csv(tmp_path / "m.csv", *rows)), frames, ["thickness"])
    assert sorted(found.values[:, 0].tolist()) == [0, 1.5, 3]
    assert found.notes == ()


def test_a_private_build_keeps_four_digits(tmp_path, monkeypatch):
    salt = tmp_path / "salt"
    salt.write_bytes(bytes(range(32)))
    salt.chmod(0o600)
    monkeypatch.setenv("USFMAE_SALT", str(salt))
    (tmp_path / "in").mkdir()
    regions = [by_axis(dicoms.region((0, 0, 63, 47)), 0.0123456, 0.0123456)]
    dicoms.write(tmp_path / "in", PIXELS, SequenceOfUltrasoundRegions=regions)
    flags = "--whole_frames", "--image_size=0"
    assert run(*flags, dataset="dicom", source=tmp_path / "in", output=tmp_path / "out") == 0
    (found,) = read(tmp_path / "out")
    assert found["spacing"] == pytest.approx((0.1235, 0.1235), abs=1e-8)


def test_hc18_has_it_from_its_table(tmp_path):
    assert run("--thin=off", "--clean=off", dataset="hc", source=real_folder("HC18"), output=tmp_path) == 0
    found = {record["frame"]: record for record in read(tmp_path)}
    assert len(found) == 60
    one = found["training/000_HC"]
    down, across = one["spacing"]
    assert down * one["height"] == pytest.approx(0.0691358041432 * 540)
    assert across * one["width"] == pytest.approx(0.0691358041432 * 800)
    table = real_folder("HC18") / "training" / "training_set_pixel_size_and_HC.csv"
    said = read_targets(str(table), read_table(str(tmp_path)), ["head circumference"])
    assert (said.units, int(np.isfinite(said.values).sum())) == (("mm",), 60)
    assert said.notes == ("939 of 999 rows of training_set_pixel_size_and_HC.csv name no frame of the data, first "
                          "'050_2HC.png'",)  # fmt: skip
    manifest = json.loads(next(tmp_path.glob("*/1.0.0/manifest.json")).read_text())
    assert not [one for one in manifest["warnings"] if "have no spacing" in one]


def test_camus_has_it_from_its_headers(tmp_path):
    root = real_folder("CAMUS")
    assert run("--thin=off", "--clean=off", dataset="camus_public", source=root, output=tmp_path) == 0
    header = next(root.rglob("*_4CH_ED.mhd")).read_text()
    x, y = (float(one) for one in header.split("ElementSpacing = ")[1].split()[:2])
    width, height = (int(one) for one in header.split("DimSize = ")[1].split()[:2])
    found = next(one for one in read(tmp_path) if "4CH_ED" in one["source"])
    assert np.array(found["spacing"]) * (found["height"], found["width"]) == pytest.approx((y * height, x * width))
