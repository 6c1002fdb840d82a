"""Which frames of a clip come out, upright, grey or coloured, and what becomes of damaged clips."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from data_prep.readers import Options, UnreadableError, read_frames
from data_prep.readers.clips import WRONG_COUNT
from tests.data_prep.readers import samples

av = pytest.importorskip("av")

CLIP = samples.scene(frames=20)


def read(path, **options):
    return list(read_frames(path, Options(**options)))


def numbers(path, **options):
    return [frame.number for frame in read(path, **options)]


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return samples.write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", CLIP)


@pytest.mark.parametrize("name", samples.VIDEOS)
def test_every_container_gives_all_frames_in_grey_in_order_and_in_full_range(tmp_path, name):
    frames = read(samples.write_video(tmp_path / name, CLIP))
    assert [frame.number for frame in frames] == list(range(20))
    for frame, original in zip(frames, CLIP, strict=True):
        assert frame.pixels.shape == (48, 64, 1)
        assert np.abs(frame.pixels[:, :, 0].astype(int) - original).mean() < 4  # the next frame differs by more
    assert np.abs(CLIP[1:].astype(int) - CLIP[:-1]).mean() > 5


def test_the_stride_counts_from_the_first_frame_and_the_numbers_are_those_of_the_file(mp4):
    assert numbers(mp4, stride=6) == [0, 6, 12, 18]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"max_frames": 4}, [2, 7, 12, 17]), ({"max_frames": 1}, [10]), ({"max_frames": 99}, list(range(20)))],
)
def test_max_frames_are_spread_over_the_whole_clip(mp4, options, expected):
    assert numbers(mp4, **options) == expected


@pytest.mark.parametrize("name", ["clip.mpg", "clip.m2v", "clip.gif"])
def test_frames_are_counted_where_the_container_does_not_say_how_many_there_are(tmp_path, name):
    path = samples.write_video(tmp_path / name, CLIP)
    assert numbers(path, stride=2, max_frames=2) == [4, 14]


@pytest.mark.parametrize(("rotation", "where"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (270, (0, 1))])
def test_a_clip_that_asks_to_be_turned_is_turned(tmp_path, rotation, where):
    pixels = read(samples.write_video(tmp_path / "x.mp4", CLIP[:2], rotation=rotation))[0].pixels
    assert pixels.shape == ((48, 64, 1), (64, 48, 1))[rotation % 180 // 90]
    corners = pixels[:: pixels.shape[0] - 1, :: pixels.shape[1] - 1, 0]
    assert np.unravel_index(corners.argmax(), (2, 2)) == where


def doppler(frames):
    clip = np.repeat(CLIP[..., None], 3, axis=-1)
    for number in frames:
        clip[number, 20:30, 20:40] = 200, 30, 40
    return clip


def test_colour_that_begins_after_the_first_frame_makes_the_whole_clip_colour(tmp_path):
    frames = read(samples.write_video(tmp_path / "x.mp4", doppler(range(5, 9))))
    assert {frame.pixels.shape for frame in frames} == {(48, 64, 3)}
    red, green, _ = frames[6].pixels[25, 30].astype(int)
    assert red > green + 100
    assert np.ptp(frames[15].pixels, axis=2).max() < 20


def test_a_tint_makes_no_clip_colour(tmp_path):
    tinted = (CLIP[..., None] * [0.9, 0.95, 1.0]).astype(np.uint8)
    assert {frame.pixels.shape for frame in read(samples.write_video(tmp_path / "x.mp4", tinted))} == {(48, 64, 1)}


def test_a_gif_of_one_picture_is_one_frame_and_transparent_is_black(tmp_path):
    palette = bytes([255, 255, 255, 200, 200, 200]) + bytes(6)
    screen = b"GIF89a" + bytes([4, 0, 4, 0, 0x91, 0, 0]) + palette
    control = bytes([0x21, 0xF9, 4, 1, 0, 0, 0, 0])  # colour 0 is transparent
    # Two bits a pixel, each code three bits wide: cleared before they would widen.
    codes = [4, 0, 0, 4, 0, 0, 4, 0, 0, 4, 0, 0, 4, 1, 1, 4, 1, 1, 4, 1, 1, 4, 1, 1, 5]
    bits = sum(code << 3 * place for place, code in enumerate(codes)).to_bytes(-(-3 * len(codes) // 8), "little")
    image = b"\x2c" + bytes([0, 0, 0, 0, 4, 0, 4, 0, 0, 2, len(bits)]) + bits + b"\0;"
    (tmp_path / "x.gif").write_bytes(screen + control + image)
    (frame,) = read(tmp_path / "x.gif")
    np.testing.assert_array_equal(frame.pixels[:, :, 0], [[0] * 4] * 2 + [[200] * 4] * 2)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov", "clip.avi", "clip.m2v", "clip.gif"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_clip_that_is_cut_off_gives_its_sound_frames_and_then_the_reason(tmp_path, name, kept):
    path = samples.write_video(tmp_path / name, CLIP, index_first=True)
    whole = read(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    sound = []
    with pytest.raises(UnreadableError, match=r"cut off|cannot be decoded"):
        sound.extend(read_frames(path))  # keeps what came before the error
    assert len(sound) < len(whole)
    assert len(sound) > 20 * kept - 8
    for frame in sound:
        np.testing.assert_array_equal(frame.pixels, whole[frame.number].pixels)


def test_a_damaged_picture_in_the_middle_ends_the_clip_and_is_named(tmp_path):
    path = samples.write_video(tmp_path / "x.mov", CLIP)  # every frame is a JPEG
    data = bytearray(path.read_bytes())
    start = [place for place in range(len(data)) if data[place : place + 3] == b"\xff\xd8\xff"][7]
    data[start : start + 700] = bytes(700)
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match="damaged or cut off after 7 frames"):
        read(path)


def patched(path, mark, offset, value):
    """The same file with other 32 bits at an offset from a mark."""
    data = bytearray(path.read_bytes())
    at = data.index(mark) + offset if mark else offset
    data[at : at + 4] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("said", [1, 19, 21, 1_000_000])  # more: frames that were dropped in recording
@pytest.mark.parametrize("name", ["x.avi", "x.mov"])
def test_a_wrong_number_of_frames_in_the_header_loses_none_and_is_a_warning(tmp_path, name, said):
    path = samples.write_video(tmp_path / name, CLIP)
    whole = read(path)
    assert {frame.warnings for frame in whole} == {()}
    if name == "x.avi":
        patched(path, b"strh", 40, said.to_bytes(4, "little"))
    else:
        patched(path, b"stts", 12, said.to_bytes(4, "big"))
    frames = read(path)
    assert [frame.number for frame in frames] == list(range(20))
    assert frames[0].warnings == (WRONG_COUNT,)
    assert numbers(path, max_frames=2) == [5, 15]


@pytest.mark.parametrize("said", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_avi_that_was_written_as_a_stream_does_not_know_its_size(tmp_path, said):
    path = patched(samples.write_video(tmp_path / "x.avi", CLIP), b"", 4, said.to_bytes(4, "little"))
    assert len(read(path)) == 20


def test_an_avi_that_says_a_size_too_large_but_has_all_its_frames_is_sound(tmp_path):
    path = patched(samples.write_video(tmp_path / "x.avi", CLIP), b"", 4, (1 << 20).to_bytes(4, "little"))
    assert len(read(path)) == 20


def test_an_animated_png_is_a_clip(tmp_path):
    pictures = list(map(Image.fromarray, CLIP))
    pictures[0].save(tmp_path / "x.png", save_all=True, append_images=pictures[1:], duration=40)
    frames = read(tmp_path / "x.png")
    assert len(frames) == 20
    for frame, expected in zip(frames, CLIP, strict=True):
        np.testing.assert_array_equal(frame.pixels[:, :, 0], expected)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    path = samples.write_video(tmp_path / "x.m2v", CLIP[:1])
    data = bytearray(path.read_bytes())
    data[4:7] = 0xFF, 0xFF, 0xFF  # 4095 x 4095 pixels in the sequence header
    at = data.index(b"\0\0\1\xb5") + 4  # its extension has two more bits of each
    data[at + 1] |= 0x01
    data[at + 2] |= 0xE0
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match="million"):
        read(path)


def test_a_play_list_is_not_followed(tmp_path, mp4):
    (tmp_path / "x.mp4").write_text(f"#EXTM3U\n#EXTINF:10,\nfile://{mp4}\n#EXT-X-ENDLIST\n")
    with pytest.raises(UnreadableError, match="not a kind of file"):
        read(tmp_path / "x.mp4")


def test_sound_without_pictures_is_refused(tmp_path):
    with av.open(str(tmp_path / "x.mp4"), "w") as clip:
        stream = clip.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        clip.mux(stream.encode(frame))
        clip.mux(stream.encode())
    with pytest.raises(UnreadableError, match="no video in it"):
        read(tmp_path / "x.mp4")


def test_nothing_is_printed_about_damaged_clips(tmp_path, capfd):
    path = samples.write_video(tmp_path / "x.mpg", CLIP)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :: 7] = bytes(len(data[len(data) // 2 :: 7]))
    path.write_bytes(data)
    with contextlib.suppress(UnreadableError):
        read(path)
    assert capfd.readouterr() == ("", "")
