"""What is taken from DICOM files beside the pixels, what is left behind, and what is refused."""

import cv2
import numpy as np
import pytest

from data_prep.readers import dicom, dicom_pixels
from data_prep.readers.base import Options, UnreadableError
from data_prep.readers.kinds import HEAD_BYTES, kind_of
from tests.data_prep.readers import dicoms
from tests.data_prep.trees import DATA

GREY = np.random.default_rng(0).integers(0, 256, (32, 40), dtype=np.uint8)
SMOOTH = cv2.GaussianBlur(GREY, (9, 9), 0)


def read(path, options=Options()):  # noqa: B008 - frozen
    return list(dicom.read(path, options))


def read_one(folder, **elements):
    (frame,) = read(dicoms.write(folder, SMOOTH, **elements))
    return frame


# ---- which files are DICOM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", dicoms.NATIVE.values(), ids=dicoms.NATIVE)
@pytest.mark.parametrize("preamble", [True, False])
def test_files_are_known_by_their_content_with_and_without_a_preamble(tmp_path, syntax, preamble):
    path = dicoms.save(tmp_path / "IM_0001", dicoms.dataset(GREY, syntax), preamble=preamble)
    assert kind_of(path.read_bytes()[:HEAD_BYTES]) == "dicom"
    np.testing.assert_array_equal(read(path)[0].pixels[:, :, 0], GREY)


@pytest.mark.parametrize("name", ["implicit", "explicit", "big-endian"])
def test_files_without_any_file_header_are_known_by_their_first_elements(tmp_path, name):
    path = dicoms.save(tmp_path / "raw", dicoms.dataset(GREY, dicoms.NATIVE[name]), meta=False)
    assert kind_of(path.read_bytes()[:HEAD_BYTES]) == "dicom"
    np.testing.assert_array_equal(read(path)[0].pixels[:, :, 0], GREY)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        bytes(512),
        b"\x08\x00",
        b"\x08\x00" * 256,
        b"\x89PNG\r\n\x1a\n" + bytes(500),
        cv2.imencode(".jpg", GREY)[1].tobytes(),
        b"BM" + bytes(500),
        b"II*\0" + bytes(500),
        b"a text about \x08\x00\x05\x00 and other numbers" * 9,
        np.random.default_rng(0).bytes(512),
    ],
)
def test_other_files_are_not_taken_for_dicom(tmp_path, head):
    assert kind_of(head) != "dicom"
    (tmp_path / "x.dcm").write_bytes(head)
    with pytest.raises(UnreadableError, match="not a DICOM file" if head else "empty file"):
        read(tmp_path / "x.dcm")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UnreadableError, match="cannot be read: No such file"):
        read(tmp_path / "x.dcm")


# ---- regions and facts ---------------------------------------------------------------------------------------------


def test_2d_regions_of_tissue_and_flow_are_boxes_and_strips_are_not(tmp_path):
    regions = [
        dicoms.region((2, 3, 19, 20)),
        dicoms.region((20, 3, 40, 20), kind=2),  # some write the first column after it
        dicoms.region((2, 3, 19, 20), kind=2),  # flow over tissue
        dicoms.region((0, 21, 39, 24), spatial=4, kind=10),  # ECG
        dicoms.region((0, 25, 39, 31), spatial=3, kind=3),  # spectrum
        dicoms.region((0, 0, 1, 20), spatial=1, kind=13),  # grey bar
    ]
    frame = read_one(tmp_path, SequenceOfUltrasoundRegions=regions)
    assert frame.boxes == ((2, 3, 20, 21), (20, 3, 40, 21))
    assert frame.facts["RegionSpatialFormat"] == "2D, spectral, waveform"
    assert frame.facts["RegionDataType"] == "tissue, colour flow, PW spectral, ECG, grey bar"
    assert frame.facts["PhysicalDeltaX"] == frame.facts["PhysicalDeltaY"] == "0.01235 cm"


@pytest.mark.parametrize("corner", ["RegionLocationMinX0", "RegionLocationMaxY1"])
@pytest.mark.parametrize("value", [None, "missing"])
def test_a_region_that_does_not_say_where_it_is_is_ignored(tmp_path, corner, value):
    nowhere = dicoms.region((0, 0, 0, 0), delta=7)
    dicoms.change(nowhere, **{corner: None})
    if value is None:
        nowhere.add_new(corner, "UL", None)  # there, and empty
    frame = read_one(tmp_path, SequenceOfUltrasoundRegions=[nowhere, dicoms.region((2, 3, 19, 20))])
    assert frame.boxes == ((2, 3, 20, 21),)
    assert frame.facts["PhysicalDeltaX"] == "0.01235 cm"
    assert read_one(tmp_path, SequenceOfUltrasoundRegions=[nowhere]).boxes == ()


def test_regions_of_another_size_of_the_picture_are_not_used(tmp_path):
    regions = [dicoms.region((2, 3, 19, 20)), dicoms.region((20, 3, 79, 63))]
    frame = read_one(tmp_path, SequenceOfUltrasoundRegions=regions)
    assert frame.boxes == ()
    assert "PhysicalDeltaX" not in frame.facts


def test_a_file_with_strips_only_is_refused(tmp_path):
    with pytest.raises(UnreadableError, match="no 2D image"):
        read_one(tmp_path, SequenceOfUltrasoundRegions=[dicoms.region((0, 0, 39, 31), spatial=2)])


def test_facts_are_technical_and_nothing_else(tmp_path):
    frame = read_one(tmp_path, Manufacturer="ACME\nMedical ", ManufacturerModelName="x" * 64, StationName="ROOM 7")
    assert frame.facts == {
        "Manufacturer": "ACME Medical",
        "ManufacturerModelName": "x" * 64,
        "PhotometricInterpretation": "MONOCHROME2",
        "TransferSyntax": "Explicit VR Little Endian",
        "BitsStored": "8",
        "NumberOfFrames": "1",
        "Rows": "32",
        "Columns": "40",
    }


@pytest.mark.parametrize(
    ("elements", "patient"),
    [
        ({"PatientID": " 12-3 ", "PatientName": "Doe^Jane"}, "12-3"),
        ({"PatientID": "12-3", "IssuerOfPatientID": "Mercy"}, "12-3 (Mercy)"),
        ({"PatientName": "Doe^Jane"}, "Doe^Jane"),
        ({"PatientID": "--", "PatientName": "Doe^Jane"}, "Doe^Jane"),
        ({"PatientID": "0000", "PatientName": "ANONYMOUS^"}, ""),
        ({"IssuerOfPatientID": "Mercy"}, ""),
        ({"PatientID": "7"}, "7"),
    ],
)
def test_the_patient_is_the_id_or_else_the_name_and_nobody_is_called_anonymous(tmp_path, elements, patient):
    frame = read_one(tmp_path, **elements)
    assert (frame.patient, frame.video) == (patient, "1.2.3.4")


# ---- real files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "frames", "shape", "boxes"),
    [
        ("DICOM_US/ExplVR_BigEnd.dcm", 1, (60, 80, 3), 0),
        ("DICOM_US/OBXXXX1A_rle_2frame.dcm", 2, (600, 800, 3), 1),
        ("DICOM_US/US1_J2KI.dcm", 1, (480, 640, 3), 0),
        ("DICOM_US/US1_UNCR.dcm", 1, (480, 640, 3), 0),
        ("DICOM_US/examples_palette.dcm", 1, (350, 800, 3), 0),  # its regions are of the picture before it was cropped
        ("DICOM_US/examples_ybr_color.dcm", 30, (240, 320, 1), 0),  # ... shrunk
        ("DICOM_US/gdcm-US-ALOKA-16.dcm", 1, (480, 640, 3), 2),
        ("DICOM_US/sonoque_anechoic-3mm-3mm.dcm", 1, (1455, 2083, 1), 1),
        *((f"BrachialPlexus_DICOM/20210{n}/2021010{m}", 1, (600, 800, 1), 1) for n in range(3) for m in (0, 2)),
    ],
)
def test_real_files(name, frames, shape, boxes):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"needs the public dataset {name.split('/')[0]}; ULTRASOUND_DATA names the folder that holds it")
    found = read(path)
    assert [frame.number for frame in found] == list(range(frames))
    assert {frame.pixels.shape for frame in found} == {shape}
    assert {len(frame.boxes) for frame in found} == {boxes}
    first = found[0].pixels
    assert np.ptp(first) > 190
    if name != "DICOM_US/ExplVR_BigEnd.dcm":  # a detail of a coloured one
        assert np.median(first) < 60  # echo is bright on black


def test_real_lossy_and_lossless_copies_of_one_picture_look_the_same():
    paths = [DATA / "DICOM_US" / name for name in ("US1_J2KI.dcm", "US1_UNCR.dcm")]
    if not all(path.is_file() for path in paths):
        pytest.skip("needs the public dataset DICOM_US; ULTRASOUND_DATA names the folder that holds it")
    lossy, lossless = (read(path)[0].pixels.astype(int) for path in paths)
    assert np.abs(lossy - lossless).mean() < 3


def test_the_caps_leave_room_for_every_clip_of_a_scanner():
    assert dicom_pixels.MAX_FRAMES >= 30 * 60 * 30  # half an hour
