"""DICOM pixels of every encoding come out as they went in; what is compared with is worked out here."""

import itertools

import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi_lut

from data_prep.readers import dicom
from data_prep.readers.base import Options, UnreadableError
from tests.data_prep.readers import dicoms

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (32, 40), dtype=np.uint8)
DEEP = RNG.integers(0, 1 << 16, (32, 40), dtype=np.uint16)
TWELVE = RNG.integers(0, 1 << 12, (32, 40), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (32, 40, 3), dtype=np.uint8)
# Gradients with a coloured patch: what JPEG keeps.
SMOOTH = np.dstack([np.add.outer(np.arange(32) * 3, np.arange(40) * 4).astype(np.uint8)] * 3)
SMOOTH[8:16, 8:24] = 200, 60, 40


def read(folder, made, options=Options()):  # noqa: B008 - frozen
    return [frame.pixels for frame in dicom.read(dicoms.save(folder / "image", made), options)]


def read_one(folder, made):
    (pixels,) = read(folder, made)
    return pixels


@pytest.mark.parametrize("syntax", dicoms.NATIVE.values(), ids=dicoms.NATIVE)
@pytest.mark.parametrize("pixels", [GREY, DEEP, COLOUR], ids=["8 bits", "16 bits", "colour"])
def test_uncompressed_pixels_are_exact(tmp_path, syntax, pixels):
    read = read_one(tmp_path, dicoms.dataset(pixels, syntax))
    assert read.dtype == pixels.dtype
    np.testing.assert_array_equal(read, pixels.reshape(32, 40, -1))


@pytest.mark.parametrize("syntax", dicoms.NATIVE.values(), ids=dicoms.NATIVE)
def test_colour_planes_are_put_together_in_every_frame(tmp_path, syntax):
    clip = np.stack([COLOUR, 255 - COLOUR])
    made = dicoms.dataset(clip, syntax, frames=2, planar=1)
    np.testing.assert_array_equal(read(tmp_path, made), clip)


def test_bytes_in_big_endian_words_are_swapped_also_where_frames_have_an_odd_length(tmp_path):
    clip = RNG.integers(0, 256, (3, 5, 7), dtype=np.uint8)
    made = dicoms.dataset(clip, dicoms.NATIVE["big-endian"], frames=3, pixel_vr="OW")
    np.testing.assert_array_equal(np.squeeze(read(tmp_path, made), -1), clip)


@pytest.mark.parametrize("syntax", dicoms.LOSSLESS.values(), ids=dicoms.LOSSLESS)
@pytest.mark.parametrize("pixels", [GREY, DEEP, TWELVE, COLOUR], ids=["8 bits", "16 bits", "12 bits", "colour"])
def test_lossless_compression_is_exact(tmp_path, syntax, pixels):
    stored = 12 if pixels is TWELVE else None
    read = read_one(tmp_path, dicoms.compressed(pixels, syntax, stored=stored))
    assert read.dtype == pixels.dtype
    np.testing.assert_array_equal(read, pixels.reshape(32, 40, -1))


@pytest.mark.parametrize(("pixels", "stored"), [(GREY, 8), (COLOUR, 8), (TWELVE, 12), (DEEP, 16)])
def test_lossless_jpeg_is_exact(tmp_path, pixels, stored):
    if stored > 8:
        pytest.importorskip("libjpeg", reason="needs pylibjpeg-libjpeg, which is GPL and not required")
    stream = dicoms.lossless_jpeg(pixels, stored)
    read = read_one(tmp_path, dicoms.encapsulated(pixels, dicoms.LOSSLESS_JPEG, [stream], stored=stored))
    np.testing.assert_array_equal(read, pixels.reshape(32, 40, -1))


def test_lossless_jpeg_of_ybr_becomes_rgb(tmp_path):
    stream = dicoms.lossless_jpeg(ybr(SMOOTH))
    made = dicoms.encapsulated(SMOOTH, dicoms.LOSSLESS_JPEG, [stream], PhotometricInterpretation="YBR_FULL")
    assert np.abs(read_one(tmp_path, made).astype(int) - SMOOTH).max() <= 2


@pytest.mark.parametrize("syntax", [dicoms.JPEG, dicoms.EXTENDED_JPEG])
def test_jpeg_is_what_opencv_makes_of_it(tmp_path, syntax):
    pixels = SMOOTH[:, :, 0]
    stream = dicoms.jpeg(pixels)
    if syntax == dicoms.EXTENDED_JPEG:
        stream = stream.replace(b"\xff\xc0", b"\xff\xc1")
    read = read_one(tmp_path, dicoms.encapsulated(pixels, syntax, [stream]))
    np.testing.assert_array_equal(read[:, :, 0], cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_GRAYSCALE))
    assert np.abs(read[:, :, 0].astype(int) - pixels).max() < 30


@pytest.mark.parametrize(
    ("interpretation", "jfif", "sampling"),
    [
        ("YBR_FULL_422", True, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
        ("YBR_FULL_422", False, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
        ("YBR_FULL", False, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
        ("RGB", True, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),  # wrapped up without a look
        ("RGB", False, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),  # nobody subsamples red
    ],
)
def test_jpeg_colours_are_those_that_were_encoded(tmp_path, interpretation, jfif, sampling):
    stream = dicoms.jpeg(SMOOTH, sampling=sampling, jfif=jfif)
    made = dicoms.encapsulated(SMOOTH, dicoms.JPEG, [stream], PhotometricInterpretation=interpretation)
    difference = np.abs(read_one(tmp_path, made).astype(int) - SMOOTH)
    assert difference[10:14, 12:20].max() < 12
    assert difference.mean() < 6


def test_jpeg_that_says_rgb_and_nothing_against_it_is_rgb(tmp_path):
    stream = dicoms.jpeg(SMOOTH, jfif=False)  # of which the components are taken as they are
    read = read_one(tmp_path, dicoms.encapsulated(SMOOTH, dicoms.JPEG, [stream]))
    components = cv2.cvtColor(SMOOTH, cv2.COLOR_RGB2YCrCb)[:, :, [0, 2, 1]].astype(int)
    assert np.abs(read - components)[10:14, 12:20].max() < 12


def ybr(pixels):
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb)[:, :, [0, 2, 1]]


@pytest.mark.parametrize("planar", [0, 1])
def test_ybr_becomes_rgb(tmp_path, planar):
    made = dicoms.dataset(ybr(SMOOTH), planar=planar, PhotometricInterpretation="YBR_FULL")
    assert np.abs(read_one(tmp_path, made).astype(int) - SMOOTH).max() <= 2


def test_halved_ybr_becomes_rgb_and_so_does_what_is_only_called_halved(tmp_path):
    full = ybr(SMOOTH)
    halved = np.dstack([full[:, ::2, 0], full[:, 1::2, 0], full[:, ::2, 1], full[:, ::2, 2]])
    made = dicoms.dataset(full, PhotometricInterpretation="YBR_FULL_422", PixelData=halved.tobytes())
    assert np.abs(read_one(tmp_path, made).astype(int) - SMOOTH).max() <= 2
    made = dicoms.dataset(full, PhotometricInterpretation="YBR_FULL_422")
    assert np.abs(read_one(tmp_path, made).astype(int) - SMOOTH).max() <= 2


@pytest.mark.parametrize(("pixels", "stored", "top"), [(GREY, 8, 255), (TWELVE, 12, 4095)])
def test_monochrome1_is_inverted(tmp_path, pixels, stored, top):
    made = dicoms.dataset(pixels, stored=stored, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_one(tmp_path, made)[:, :, 0], top - pixels)


def test_fewer_than_8_bits_are_spread(tmp_path):
    read = read_one(tmp_path, dicoms.dataset(GREY >> 2, stored=6))
    np.testing.assert_array_equal(read[:, :, 0], np.rint((GREY >> 2) * (255 / 63)))


@pytest.mark.parametrize("syntax", [dicoms.NATIVE["explicit"], dicoms.NATIVE["big-endian"], dicoms.LOSSLESS["rle"]])
@pytest.mark.parametrize("shift", [0, 4])
def test_bits_that_do_not_count_are_not_seen(tmp_path, syntax, shift):
    overlay = DEEP & (0xF000 if shift == 0 else 0x000F)
    make = dicoms.compressed if syntax.is_encapsulated else dicoms.dataset
    made = make(TWELVE << shift | overlay, syntax, stored=12, HighBit=11 + shift)
    np.testing.assert_array_equal(read_one(tmp_path, made)[:, :, 0], TWELVE)


@pytest.mark.parametrize("syntax", [dicoms.NATIVE["implicit"], *dicoms.LOSSLESS.values()])
def test_signed_numbers_start_at_zero(tmp_path, syntax):
    signed = TWELVE.astype(np.int16) - 2048
    make = dicoms.compressed if syntax.is_encapsulated else dicoms.dataset
    np.testing.assert_array_equal(read_one(tmp_path, make(signed, syntax, stored=12))[:, :, 0], TWELVE)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("function", ["", "LINEAR_EXACT", "SIGMOID"])
def test_more_than_8_bits_are_shown_through_the_window_of_the_file(tmp_path, inverted, signed, function):
    pixels = TWELVE.astype(np.int16) - 2048 if signed else TWELVE
    made = dicoms.dataset(pixels, stored=12, WindowCenter=[700, 5], WindowWidth=[1200, 9])
    made.RescaleSlope, made.RescaleIntercept = 2, -100
    if function:
        made.VOILUTFunction = function
    shown = apply_voi_lut(2.0 * pixels - 100, made)
    low, high = (2 * bound - 100 for bound in ((-2048, 2047) if signed else (0, 4095)))
    expected = (shown - low) * (255 / (high - low))
    if inverted:
        made.PhotometricInterpretation, expected = "MONOCHROME1", 255 - expected
    read = read_one(tmp_path, made)
    assert read.dtype == np.uint8
    assert np.abs(read[:, :, 0] - expected).max() <= 0.51


@pytest.mark.parametrize("syntax", [dicoms.NATIVE["explicit"], dicoms.NATIVE["big-endian"]])
def test_more_than_8_bits_are_shown_through_the_table_of_the_file(tmp_path, syntax):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    table.LUTData = (4095 - np.arange(4096)).tolist()
    table["LUTData"].VR = "US"
    made = dicoms.dataset(TWELVE, syntax, stored=12, VOILUTSequence=[table], WindowCenter=1, WindowWidth=1)
    np.testing.assert_array_equal(read_one(tmp_path, made)[:, :, 0], np.rint((4095 - TWELVE) * (255 / 4095)))


@pytest.mark.parametrize("width", [None, 0, -5, "1e400"])
def test_without_a_window_that_makes_sense_16_bits_stay(tmp_path, width):
    window = {} if width is None else {"WindowCenter": 700, "WindowWidth": width}
    read = read_one(tmp_path, dicoms.dataset(TWELVE, stored=12, **window))
    np.testing.assert_array_equal(read[:, :, 0], TWELVE)


def test_8_bits_are_not_windowed(tmp_path):
    made = dicoms.dataset(GREY, WindowCenter=10, WindowWidth=10)
    np.testing.assert_array_equal(read_one(tmp_path, made)[:, :, 0], GREY)


PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint16)


@pytest.mark.parametrize("syntax", dicoms.NATIVE.values(), ids=dicoms.NATIVE)
@pytest.mark.parametrize(
    ("entries", "how"),
    [(PALETTE * 257, {}), (PALETTE, {}), (PALETTE, {"bits": 8}), (PALETTE, {"bits": 8, "packed": True})],
    ids=["16 bits", "8 bits called 16", "8 bits", "8 bits packed"],
)
def test_palettes_of_8_and_16_bits_become_colours(tmp_path, syntax, entries, how):
    made = dicoms.with_palette(dicoms.dataset(GREY, syntax), entries, **how)
    np.testing.assert_array_equal(read_one(tmp_path, made), PALETTE[GREY])


@pytest.mark.parametrize(("pixels", "first"), [(DEEP, 100), (DEEP, 40_000), (DEEP.view(np.int16), -300)])
def test_numbers_outside_a_palette_take_its_ends(tmp_path, pixels, first):
    made = dicoms.with_palette(dicoms.dataset(pixels), PALETTE * 257, first=first)
    np.testing.assert_array_equal(read_one(tmp_path, made), PALETTE[np.clip(pixels.astype(int) - first, 0, 255)])


def test_a_palette_in_segments_is_unfolded(tmp_path):
    made = dicoms.with_palette(dicoms.dataset(GREY), PALETTE)
    for colour in ("Red", "Green", "Blue"):
        words = [0, 1, 0, 1, 255, 255 << 8] if colour == "Red" else [0, 2, 0, 0, 1, 254, 0]
        delattr(made, f"{colour}PaletteColorLookupTableData")
        setattr(made, f"Segmented{colour}PaletteColorLookupTableData", np.array(words, "<u2").tobytes())
    read = read_one(tmp_path, made)
    np.testing.assert_array_equal(read[:, :, 0], GREY)
    assert not read[:, :, 1:].any()


def test_a_grey_palette_becomes_grey(tmp_path):
    made = dicoms.with_palette(dicoms.dataset(GREY), np.repeat(np.arange(256)[:, None], 3, axis=1) * 257)
    np.testing.assert_array_equal(read_one(tmp_path, made)[:, :, 0], GREY)


def test_colour_is_kept_where_it_carries_meaning_and_only_the_regions_are_asked(tmp_path):
    screen = np.dstack([GREY] * 3)
    screen[:4] = 30, 60, 200  # a coloured bar at the top
    assert read_one(tmp_path, dicoms.dataset(screen)).shape == (32, 40, 3)
    regions = [dicoms.region((0, 6, 39, 31))]
    grey = read_one(tmp_path, dicoms.dataset(screen, SequenceOfUltrasoundRegions=regions))
    np.testing.assert_array_equal(grey[6:, :, 0], GREY[6:])
    assert grey.shape == (32, 40, 1)
    screen[10:12, 10:12] = 220, 30, 30  # Doppler
    kept = read_one(tmp_path, dicoms.dataset(screen, SequenceOfUltrasoundRegions=regions))
    np.testing.assert_array_equal(kept, screen)


def test_a_clip_is_grey_or_coloured_as_a_whole(tmp_path):
    clip = np.stack([np.dstack([GREY] * 3)] * 3)
    assert {pixels.shape for pixels in read(tmp_path, dicoms.dataset(clip, frames=3))} == {(32, 40, 1)}
    clip[1, 10:12, 10:12] = 220, 30, 30  # Doppler comes and goes
    np.testing.assert_array_equal(read(tmp_path, dicoms.dataset(clip, frames=3)), clip)


@pytest.mark.parametrize("table", [True, False])
def test_frames_in_several_pieces_are_put_together(tmp_path, table):
    clip = np.stack([cv2.GaussianBlur(np.roll(GREY, shift, 0), (3, 3), 0) for shift in range(4)])
    streams = [dicoms.jpeg(frame) for frame in clip]
    made = dicoms.encapsulated(clip, dicoms.JPEG, streams, fragments=3, table=table)
    decoded = [cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_UNCHANGED) for stream in streams]
    np.testing.assert_array_equal(np.squeeze(read(tmp_path, made), -1), decoded)


@pytest.mark.parametrize("syntax", [dicoms.NATIVE["explicit"], *dicoms.LOSSLESS.values()])
@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (Options(), range(10)),
        (Options(stride=3), [0, 3, 6, 9]),
        (Options(max_frames=4), [1, 3, 6, 8]),
        (Options(stride=2, max_frames=2), [2, 6]),
        (Options(max_frames=99), range(10)),
    ],
)
def test_a_clip_is_read_with_stride_and_an_even_spread(tmp_path, syntax, options, numbers):
    clip = RNG.integers(0, 256, (10, 32, 33), dtype=np.uint8)
    make = dicoms.compressed if syntax.is_encapsulated else dicoms.dataset
    made = make(clip, syntax, frames=10)
    frames = list(dicom.read(dicoms.save(tmp_path / "clip", made), options))
    assert [frame.number for frame in frames] == list(numbers)
    for frame in frames:
        np.testing.assert_array_equal(frame.pixels[:, :, 0], clip[frame.number])


def test_frames_that_are_left_out_are_not_decoded(tmp_path):
    streams = list(itertools.chain.from_iterable((dicoms.jpeg(GREY), b"rubbish!") for _ in range(3)))
    made = dicoms.encapsulated(np.stack([GREY] * 6), dicoms.JPEG, streams)
    path = dicoms.save(tmp_path / "clip", made)
    assert len(list(dicom.read(path, Options(stride=2)))) == 3
    with pytest.raises(UnreadableError, match="compressed pixels are damaged"):
        list(dicom.read(path, Options()))
