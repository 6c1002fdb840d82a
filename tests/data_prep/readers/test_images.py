"""What image files become, and which are refused before they are decoded."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep import work
from data_prep.readers import Options
from data_prep.readers import images as readers
from data_prep.readers.clips import WRONG_COUNT
from usfmae_jax.data import records

GREY = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)  # RGB


def write(path, pixels):
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    assert cv2.imwrite(str(path), pixels)
    return path


def read_image(path):
    (frame,) = readers.read(path, Options())
    return frame.pixels


def png(*chunks):
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def palette_png(numbers, palette):
    rows = b"".join(b"\0" + bytes(row) for row in numbers)
    header = struct.pack(">IIBBBBB", len(numbers[0]), len(numbers), 8, 3, 0, 0, 0)
    body = (b"IDAT", zlib.compress(rows))
    return png((b"IHDR", header), (b"PLTE", bytes(palette)), body, (b"IEND", b""))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp", ".PNG"])
def test_lossless_files_are_read_exactly_in_grey_and_colour(tmp_path, suffix):
    grey = read_image(write(tmp_path / f"grey{suffix}", GREY))
    colour = read_image(write(tmp_path / f"colour{suffix}", COLOUR))
    np.testing.assert_array_equal(grey, GREY[:, :, None])
    np.testing.assert_array_equal(colour, COLOUR)


def test_the_content_decides_not_the_suffix(tmp_path):
    write(tmp_path / "x.png", GREY).rename(tmp_path / "x.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), GREY[:, :, None])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_read_whole_and_windowed_to_the_range_that_they_use(tmp_path, suffix):
    deep = np.arange(10_000, dtype=np.uint16).reshape(100, 100) + 1000
    deep[0, 0] = 65535  # one saturated pixel should not make the rest black
    pixels = read_image(write(tmp_path / f"x{suffix}", deep))
    np.testing.assert_array_equal(pixels[:, :, 0], deep)
    shown = records.to_uint8(pixels)
    assert shown.dtype == np.uint8
    assert shown.min() == 0
    assert shown.max() == 255
    assert 120 < np.median(shown) < 135
    assert (np.diff(shown.ravel()[1:].astype(int)) >= 0).all()


def test_a_constant_16_bit_image_does_not_divide_by_zero():
    assert not records.to_uint8(np.full((4, 4, 1), 777, np.uint16)).any()


def test_alpha_is_dropped(tmp_path):
    rgba = np.dstack([COLOUR, np.zeros_like(GREY)])
    np.testing.assert_array_equal(read_image(write(tmp_path / "x.png", rgba)), COLOUR)


def test_a_palette_is_expanded_in_images_and_kept_as_numbers_in_masks(tmp_path):
    (tmp_path / "x.png").write_bytes(palette_png([[0, 1], [2, 0]], [0, 0, 0, 128, 0, 0, 0, 128, 0]))
    image = read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(image, [[[0, 0, 0], [128, 0, 0]], [[0, 128, 0], [0, 0, 0]]])
    np.testing.assert_array_equal(readers.read_mask(tmp_path / "x.png"), [[0, 1], [2, 0]])
    (tmp_path / "x.png").write_bytes(palette_png([[0, 1], [2, 0]], [9, 9, 9] * 3))  # all of one colour
    np.testing.assert_array_equal(readers.read_mask(tmp_path / "x.png"), [[0, 1], [2, 0]])


def test_colour_without_meaning_becomes_grey_and_doppler_stays(tmp_path):
    tinted = np.dstack([GREY // 2 + 20, GREY // 2 + 30, GREY // 2 + 40])
    assert read_image(write(tmp_path / "tinted.png", tinted)).shape == (24, 32, 1)
    doppler = np.dstack([GREY // 2] * 3)
    doppler[10:12, 10:12] = 220, 30, 30
    pixels = read_image(write(tmp_path / "doppler.png", doppler))
    np.testing.assert_array_equal(pixels, doppler)


def test_a_mask_in_colours_is_refused_because_nothing_says_what_they_mean(tmp_path):
    with pytest.raises(readers.UnreadableError, match="has colours"):
        readers.read_mask(write(tmp_path / "x.png", COLOUR))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_cut_off_file_is_refused(tmp_path, suffix, kept):
    path = write(tmp_path / f"x{suffix}", COLOUR)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(readers.UnreadableError):
        read_image(path)


def jpeg(components):
    frame = b"\x08\x00\x10\x00\x10" + bytes([components]) + bytes(3 * components)
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda\x00\x02\xff\xd9"


def tiff(*tags, following=0):
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"GIF89a" + bytes(100), "not a PNG, JPEG, TIFF or BMP"),
        (b"a text that someone called .png", "not a PNG, JPEG, TIFF or BMP"),
        (b"\x89PNG\r\n\x1a\n\0\0", "header is damaged or cut off"),
        (b"II*\0\xff\xff\xff\xff", "header is damaged or cut off"),
        (png((b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0))), "more than 50 million"),
        (b"BM" + bytes(12) + struct.pack("<Iii", 40, 60_000, -60_000) + bytes(100), "more than 50 million"),
        (tiff((256, 90_000), (257, 90_000)), "more than 50 million"),
        (tiff((256, 8), (257, 8), (262, 5)), "CMYK"),
        (tiff((256, 8), (257, 8), following=8), "header is damaged"),  # pages without end
        (jpeg(4), "4 components"),
        (jpeg(1)[:-2], "cut off"),
        (png((b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 0, 0, 0, 0))), "no pixels"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path, data, reason):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(readers.UnreadableError, match=reason):
        readers.checked(readers.load(tmp_path / "x.png"))


def test_a_jpeg_with_damage_inside_is_refused_and_nothing_is_printed(tmp_path, capfd):
    path = write(tmp_path / "x.jpg", cv2.resize(GREY, (320, 240)))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = data[middle + 300 : middle + 600]
    path.write_bytes(data)
    with pytest.raises(readers.UnreadableError, match=r"^damaged$"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


PAGES = [np.roll(GREY, number, axis=0) for number in range(40)]


def write_pages(path, pages):
    assert cv2.imwritemulti(str(path), pages)
    return path


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, range(40)),
        ({"stride": 2}, range(0, 40, 2)),
        ({"stride": 13}, [0, 13, 26, 39]),
        ({"max_frames": 3}, [6, 20, 33]),
    ],
)
def test_the_pages_of_a_tiff_are_its_frames(tmp_path, options, numbers):
    path = write_pages(tmp_path / "x.tif", PAGES)
    frames = list(readers.read(path, Options(**options)))
    assert [frame.number for frame in frames] == list(numbers)
    for frame in frames:
        np.testing.assert_array_equal(frame.pixels[:, :, 0], PAGES[frame.number])


def test_pages_are_all_colour_where_one_of_the_first_is(tmp_path):
    pages = [cv2.cvtColor(page, cv2.COLOR_GRAY2BGR) for page in PAGES[:12]]
    pages[3] = COLOUR[:, :, ::-1]
    frames = list(readers.read(write_pages(tmp_path / "x.tif", pages), Options()))
    assert {frame.pixels.shape for frame in frames} == {(24, 32, 3)}
    np.testing.assert_array_equal(frames[3].pixels, COLOUR)


def test_thumbnails_among_the_pages_are_left_out(tmp_path):
    path = write_pages(tmp_path / "x.tif", PAGES[:3])
    data = bytearray(path.read_bytes())
    mark = struct.pack("<HHII", 254, 4, 1, 2)  # NewSubfileType: one of several pages; 1 is a thumbnail
    at = [place for place in range(len(data)) if data[place : place + 12] == mark][1]
    data[at + 8] = 1
    path.write_bytes(data)
    frames = list(readers.read(path, Options()))
    assert [frame.number for frame in frames] == [0, 1]
    np.testing.assert_array_equal(frames[1].pixels[:, :, 0], PAGES[2])


def test_one_page_that_is_too_large_or_damaged_ends_the_file(tmp_path):
    data = bytearray(write_pages(tmp_path / "x.tif", PAGES[:3]).read_bytes())
    width = struct.pack("<HHI", 256, 3, 1)
    at = [place for place in range(len(data)) if data[place : place + 8] == width][2]
    data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 90_000_000)
    (tmp_path / "x.tif").write_bytes(data)
    with pytest.raises(readers.UnreadableError, match="more than 50 million"):
        list(readers.read(tmp_path / "x.tif", Options()))


def until_damage(path):
    """The frames, and why there are no more of them."""
    frames = []
    try:
        frames.extend(readers.read(path, Options()))  # keeps what came before the error
    except readers.UnreadableError as error:
        return frames, str(error)
    return frames, ""


@pytest.mark.parametrize("writer", ["OpenCV", "Pillow"])  # which writes the headers of pages before their pixels
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.93, 0.999])
def test_a_tiff_that_is_cut_off_gives_its_sound_pages_and_then_the_reason(tmp_path, writer, kept):
    path = tmp_path / "x.tif"
    if writer == "OpenCV":
        write_pages(path, PAGES)
    else:
        Image.fromarray(PAGES[0]).save(path, save_all=True, append_images=list(map(Image.fromarray, PAGES[1:])))
    assert until_damage(path)[1] == ""
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    frames, why = until_damage(path)
    assert "cut off" in why or "cannot be decoded" in why
    assert 40 * kept - 4 < len(frames) < 40
    for number, frame in enumerate(frames):
        assert frame.number == number
        np.testing.assert_array_equal(frame.pixels[:, :, 0], PAGES[number])


def test_one_damaged_page_ends_a_tiff_and_not_the_pages_before_it(tmp_path):
    path = write_pages(tmp_path / "x.tif", PAGES)
    data = bytearray(path.read_bytes())
    strip = struct.pack("<HH", 273, 4)  # where its pixels lie
    at = [place for place in range(len(data)) if data[place : place + 4] == strip][21]
    data[at + 8 : at + 12] = struct.pack("<I", 1 << 30)
    path.write_bytes(data)
    frames, why = until_damage(path)
    assert (len(frames), why) == (21, "page 21 cannot be decoded")


def test_another_number_of_pages_than_a_tiff_says_is_a_warning(tmp_path):
    path = write_pages(tmp_path / "x.tif", PAGES)
    assert until_damage(path)[0][0].warnings == ()
    data = path.read_bytes()
    said = struct.pack("<HHI", 297, 3, 2)
    changed = bytearray(data)
    for at in (place for place in range(len(data)) if data[place : place + 8] == said):
        changed[at + 10 : at + 12] = struct.pack("<H", 50)
    path.write_bytes(changed)
    frames, why = until_damage(path)
    assert (len(frames), why, frames[0].warnings) == (40, "", (WRONG_COUNT,))


def test_a_mask_is_not_the_first_of_several_pages(tmp_path):
    path = write_pages(tmp_path / "x.tif", PAGES[:2])
    with pytest.raises(readers.UnreadableError, match="several pages"):
        readers.read_mask(path)


def test_32_bit_pixels_are_refused(tmp_path):
    with pytest.raises(readers.UnreadableError, match="float32 pixels"):
        read_image(write(tmp_path / "x.tif", GREY.astype(np.float32)))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((100, 200), 50, (50, 100)), ((200, 100), 50, (100, 50)), ((40, 80), 50, (40, 80)), ((99, 70), 0, (99, 70))],
)
def test_the_short_side_shrinks_and_nothing_grows(shape, size, expected):
    assert work.shrink(np.zeros((*shape, 1), np.uint8), size, cv2.INTER_AREA).shape == (*expected, 1)
    assert work.shrink(np.zeros((*shape, 3), np.uint8), size, cv2.INTER_AREA).shape == (*expected, 3)
