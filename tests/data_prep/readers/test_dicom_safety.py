"""No identifier gets out of DICOM files, and no damage or size brings the reader down."""

import logging
import random
import struct
import traceback
import tracemalloc
import warnings
import zlib

import cv2
import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from data_prep.readers import dicom
from data_prep.readers.base import Options, UnreadableError
from tests.data_prep.readers import dicoms

GREY = np.random.default_rng(0).integers(0, 256, (32, 40), dtype=np.uint8)
SMOOTH = cv2.GaussianBlur(GREY, (9, 9), 0)


def read(path):
    return list(dicom.read(path, Options()))


# ---- identifiers ---------------------------------------------------------------------------------------------------

SECRET = "ZEBEDEE"


def identified():
    """A file with an identifier wherever one can be."""
    text = f"{SECRET} was here"
    item = Dataset()
    item.PatientName, item.ReferencedSOPInstanceUID, item.TextValue = SECRET, "1.2.99", text
    icon = dicoms.dataset(GREY[:8, :8])
    made = dicoms.dataset(
        SMOOTH,
        PatientID=SECRET,
        PatientName=f"{SECRET}^Jane",
        OtherPatientIDs=SECRET,
        PatientBirthDate="19560708",
        StudyDate="20200102",
        StudyTime="030405",
        AcquisitionDateTime="20200102030405",
        InstitutionName=SECRET,
        StationName=SECRET,
        AccessionNumber=SECRET,
        StudyDescription=text,
        ImageComments=text,
        StudyInstanceUID="1.2.3",
        BurnedInAnnotation="YES",
        RequestAttributesSequence=[item],
        IconImageSequence=[icon],
        OperatorsName="",
    )
    made.add_new((0x0019, 0x0010), "LO", SECRET)
    made.add_new((0x0019, 0x1001), "LO", SECRET)
    for group in (0x6000, 0x6002):
        made.add_new((group, 0x0010), "US", 8)
        made.add_new((group, 0x0022), "LO", SECRET)
        made.add_new((group, 0x3000), "OW", SECRET.encode() + b" ")
    made.add_new((0x5000, 0x3000), "OW", SECRET.encode() + b" ")
    made.add_new((0x7FE1, 0x0010), "LO", SECRET)  # after the pixels
    return made


def test_what_is_left_behind_is_counted_by_kind(tmp_path):
    (frame,) = read(dicoms.save(tmp_path / "x", identified()))
    assert frame.removed == {
        "person names": 2,
        "dates and times": 4,
        "UIDs": 5,  # the instance twice, the study, one in the sequence, and the software that wrote the file
        "other identifiers": 5,
        "free text": 4,  # ... and its version
        "private tags": 3,
        "overlays": 2,
        "curves and graphics": 1,
        "embedded pictures and documents": 1,
        "declared burnt-in annotation": 1,
    }
    np.testing.assert_array_equal(frame.pixels[:, :, 0], SMOOTH)


def test_no_identifier_is_in_what_may_be_written(tmp_path):
    (frame,) = read(dicoms.save(tmp_path / "x", identified()))
    written = f"{frame.facts} {frame.removed} {frame.boxes}" + frame.pixels.tobytes().decode("latin-1")
    for identifier in (SECRET, "19560708", "1956", "20200102", "030405", "1.2.3", "1.2.99"):
        assert identifier not in written


def broken():
    """Files with the identifier in places where pydicom would print it."""
    for keyword, value in (("Rows", SECRET), ("BitsStored", SECRET), ("PhotometricInterpretation", SECRET)):
        made = identified()
        made.add_new(keyword, "LO", value)
        yield made
    yield dicoms.change(identified(), Modality=SECRET)
    yield dicoms.encapsulated(SMOOTH, dicoms.LOSSLESS_JPEG, [b"\xff\xd8\xff" + SECRET.encode()], PatientID=SECRET)
    yield dicoms.encapsulated(SMOOTH, dicoms.LOSSLESS["jpeg 2000"], [SECRET.encode() * 9], PatientID=SECRET)


@pytest.mark.parametrize("number", range(6))
def test_errors_warnings_and_logs_repeat_nothing_of_the_file(tmp_path, number, caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of writing such a file
        path = dicoms.save(tmp_path / "x", list(broken())[number])
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(UnreadableError) as caught:
            read(path)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text + str(warned)
    shown += "".join(capfd.readouterr())
    assert SECRET not in shown
    assert "1.2.3" not in shown


# ---- refused files -------------------------------------------------------------------------------------------------


def stream_of_another_size():
    return dicoms.encapsulated(SMOOTH, dicoms.JPEG, [dicoms.jpeg(np.zeros((512, 512), np.uint8))])


def painted_over():
    stream = dicoms.jpeg(SMOOTH)
    return dicoms.encapsulated(SMOOTH, dicoms.JPEG, [stream[: len(stream) // 2] + b"\xff\xd9"])


def many_tiles():
    made = dicoms.compressed(np.tile(SMOOTH, (3, 3)), dicoms.LOSSLESS["jpeg 2000"])
    at = made.PixelData.index(b"\xff\x4f\xff\x51") + 24
    made.PixelData = made.PixelData[:at] + struct.pack(">II", 1, 1) + made.PixelData[at + 8 :]
    return made


def rle_bomb():
    made = dicoms.compressed(SMOOTH, dicoms.LOSSLESS["rle"])
    stream = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 100_000
    return dicoms.encapsulated(SMOOTH, made.file_meta.TransferSyntaxUID, [stream])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: dicoms.dataset(GREY, Modality="CT"), "modality CT, expected US, IVUS or OT"),
        (lambda: dicoms.dataset(GREY, Modality="SR", PixelData=None), "modality SR"),
        (lambda: dicoms.dataset(GREY, Modality=""), None),  # an ultrasound image by its class
        (lambda: dicoms.dataset(GREY, Modality=None, SOPClassUID=uid.CTImageStorage), "not said to be ultrasound"),
        (lambda: dicoms.dataset(GREY, PixelData=None), "has no pixels"),
        (lambda: dicoms.dataset(GREY, Rows=60_000, Columns=60_000), "60000 x 60000 pixels, more than 50 million"),
        (lambda: dicoms.dataset(GREY, Rows=0), "declares no pixels"),
        (lambda: dicoms.dataset(np.zeros((2, 2), np.uint8), PixelData=bytes(400_004)), "100001 frames .* too many"),
        (lambda: dicoms.dataset(GREY, PixelData=bytes(900)), "cut off"),
        (lambda: dicoms.dataset(GREY, BitsAllocated=32, BitsStored=32, HighBit=31), "not 8 or 16 bits"),
        (lambda: dicoms.dataset(GREY, PhotometricInterpretation="HSV"), "colour space not supported"),
        (lambda: dicoms.dataset(GREY, SamplesPerPixel=4), "colour space not supported"),
        (lambda: dicoms.dataset(GREY, PhotometricInterpretation="PALETTE COLOR"), "header is damaged"),
        (lambda: dicoms.encapsulated(GREY, uid.MPEG4HP41, [b"ftyp"]), "not supported: MPEG-4 AVC/H.264 High Profile"),
        (stream_of_another_size, "disagree about its size"),
        (painted_over, "^damaged$"),
        (many_tiles, "compressed pixels are damaged"),
        (rle_bomb, "larger than its pixels"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path, make, reason):
    path = dicoms.save(tmp_path / "x", make())
    if reason is None:
        assert len(read(path)) == 1
        return
    with pytest.raises(UnreadableError, match=reason):
        read(path)


@pytest.mark.parametrize("claimed", ["1.2.840.10008.9.9.9", "1.2.840.10008.1.2.5"])
def test_a_wrong_transfer_syntax_is_refused_and_not_repeated(tmp_path, claimed):
    path = dicoms.write(tmp_path, GREY)
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1", claimed.encode()))
    with pytest.raises(
        UnreadableError, match=r"^(transfer syntax not supported: unknown|compressed pixels are damaged)$"
    ):
        read(path)


def test_floating_point_pixels_are_refused(tmp_path):
    made = dicoms.dataset(GREY, PixelData=None, FloatPixelData=SMOOTH.astype(np.float32).tobytes())
    with pytest.raises(UnreadableError, match="floating-point"):
        read(dicoms.save(tmp_path / "x", made))


def test_deflated_data_is_not_inflated_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "_MAX_DEFLATED", 1 << 20)
    path = dicoms.save(tmp_path / "x", dicoms.dataset(GREY, dicoms.NATIVE["deflated"]))
    head = path.read_bytes()
    start = 144 + struct.unpack_from("<I", head, 140)[0]
    packer = zlib.compressobj(wbits=-15)
    path.write_bytes(head[:start] + packer.compress(bytes(8 << 20)) + packer.flush())
    with pytest.raises(UnreadableError, match="larger than 1 MiB"):
        read(path)


def test_a_missing_decoder_is_one_sentence(tmp_path, monkeypatch):
    path = dicoms.save(tmp_path / "x", dicoms.compressed(GREY, dicoms.LOSSLESS["jpeg-ls"]))
    monkeypatch.setattr("pydicom.pixels.common.CoderBase.available_plugins", ())
    with pytest.raises(UnreadableError, match=r"^JPEG-LS Lossless .* that is not installed: pip install pyjpegls$"):
        read(path)


def test_jpeg_2000_needs_one_decoder_of_several(tmp_path, monkeypatch):
    path = dicoms.save(tmp_path / "x", dicoms.compressed(GREY, dicoms.LOSSLESS["jpeg 2000"]))
    monkeypatch.setattr("pydicom.pixels.common.CoderBase.available_plugins", ("gdcm", "pillow"))
    np.testing.assert_array_equal(read(path)[0].pixels[:, :, 0], GREY)


# ---- damage and memory ---------------------------------------------------------------------------------------------


def victims():
    """One file of each decoder, with a sequence, a palette and a window among them."""
    clip = np.stack([SMOOTH, SMOOTH[::-1]])
    rle = dicoms.with_palette(dicoms.compressed(clip, dicoms.LOSSLESS["rle"], frames=2), np.full((256, 3), 777))
    rle.SequenceOfUltrasoundRegions = [dicoms.region((2, 3, 19, 20))]
    deep = dicoms.dataset(SMOOTH.astype(np.uint16) * 16, stored=12, WindowCenter=700, WindowWidth=1200)
    yield from (rle, deep)
    yield dicoms.dataset(np.dstack([SMOOTH] * 3), dicoms.NATIVE["deflated"])
    yield dicoms.encapsulated(clip, dicoms.JPEG, [dicoms.jpeg(frame) for frame in clip])
    yield dicoms.encapsulated(SMOOTH, dicoms.LOSSLESS_JPEG, [dicoms.lossless_jpeg(SMOOTH)])
    yield dicoms.compressed(SMOOTH, dicoms.LOSSLESS["jpeg-ls"])
    yield dicoms.compressed(SMOOTH, dicoms.LOSSLESS["jpeg 2000"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return [dicoms.save(folder / "x", made).read_bytes() for made in victims()]


def survives(path, data):
    """Whether a file is still read; anything but frames and `UnreadableError` is a failure."""
    path.write_bytes(data)
    try:
        for frame in dicom.read(path, Options()):
            assert frame.pixels.dtype in (np.uint8, np.uint16)
            assert frame.pixels.shape[2] in (1, 3)
    except UnreadableError:
        return False
    return True


def test_a_cut_off_file_is_refused(tmp_path, whole):
    for data in whole:
        assert survives(tmp_path / "x", data)
        for kept in np.linspace(0, 0.98, 20):
            assert not survives(tmp_path / "x", data[: int(kept * len(data))])


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 150), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("victim", range(7))
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, whole, victim, seeds):
    data, read = whole[victim], 0
    for seed in seeds:
        chance = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 8, 64])):
            # The header is where it hurts.
            damaged[chance.randrange(132, len(data) if chance.random() < 0.5 else 700)] = chance.randrange(256)
        read += survives(tmp_path / "x", bytes(damaged))
    assert 0 < read < len(seeds)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, dicoms.JPEG])
def test_a_clip_streams(tmp_path, syntax):
    clip = np.zeros((60, 128, 128), np.uint8)
    if syntax == dicoms.JPEG:
        made = dicoms.encapsulated(clip, syntax, [dicoms.jpeg(frame) for frame in clip])
    else:
        make = dicoms.compressed if syntax.is_encapsulated else dicoms.dataset
        made = make(clip, syntax, frames=60)
    path = dicoms.save(tmp_path / "clip", made)
    read(path)  # imports
    tracemalloc.start()
    try:
        assert sum(1 for _ in dicom.read(path, Options())) == 60
        assert tracemalloc.get_traced_memory()[1] < 12 * 128 * 128
    finally:
        tracemalloc.stop()
