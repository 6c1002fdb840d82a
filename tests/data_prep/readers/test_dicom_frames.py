"""The frames of a DICOM clip that are there come out, whatever its header says and wherever it ends."""

import itertools
import json

import cv2
import numpy as np
import pytest
from pydicom import uid

from data_prep.readers import Options, UnreadableError, dicom
from data_prep.readers.clips import WRONG_COUNT
from tests.data_prep import builds
from tests.data_prep.readers import dicoms

CLIP = np.stack(
    [cv2.GaussianBlur(np.random.default_rng(i).integers(0, 256, (33, 41), np.uint8), (5, 5), 0) for i in range(10)]
)
COLOUR = np.stack([CLIP, CLIP[:, ::-1], CLIP[:, :, ::-1]], axis=-1)


def jpegs(fragments=1, table=True):
    return dicoms.encapsulated(CLIP, dicoms.JPEG, list(map(dicoms.jpeg, CLIP)), fragments=fragments, table=table)


CLIPS = {
    **{name: lambda s=syntax: dicoms.dataset(CLIP, s, frames=10) for name, syntax in dicoms.NATIVE.items()},
    **{name: lambda s=syntax: dicoms.compressed(CLIP, s, frames=10) for name, syntax in dicoms.LOSSLESS.items()},
    "16 bits": lambda: dicoms.dataset(CLIP.astype(np.uint16) * 16, frames=10, stored=12),
    "colour": lambda: dicoms.dataset(COLOUR, frames=10),
    "colour, rle": lambda: dicoms.compressed(COLOUR, uid.RLELossless, frames=10),
    "jpeg": jpegs,
    "jpeg without a table": lambda: jpegs(table=False),
    "jpeg in pieces": lambda: jpegs(fragments=3),
    "jpeg in pieces without a table": lambda: jpegs(fragments=3, table=False),
}


def read(path, **options):
    """The frames, and why there are no more of them."""
    frames = []
    try:
        frames.extend(dicom.read(path, Options(**options)))  # keeps what came before the error
    except UnreadableError as error:
        return frames, str(error)
    return frames, ""


def says(made, count):
    """The same data set with another number of frames; None is none, and "" an empty one."""
    if count is None:
        del made.NumberOfFrames
    else:
        made.add_new("NumberOfFrames", "LO" if isinstance(count, str) else "IS", count)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    paths = {name: dicoms.save(folder / str(number), make()) for number, (name, make) in enumerate(CLIPS.items())}
    return {name: (path.read_bytes(), read(path)[0]) for name, path in paths.items()}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("count", [None, "", 0, 1, 9, 12, 2_000_000_000, -1, "ten"])
def test_a_wrong_number_in_the_header_loses_no_frame_and_is_a_warning(tmp_path, whole, name, count):
    frames, why = read(dicoms.save(tmp_path / "x", says(CLIPS[name](), count)))
    assert not why
    assert [frame.number for frame in frames] == list(range(10))
    assert frames[0].warnings == (WRONG_COUNT,)
    assert frames[0].facts["NumberOfFrames"] == "10"
    for frame, expected in zip(frames, whole[name][1], strict=True):
        np.testing.assert_array_equal(frame.pixels, expected.pixels)
    assert whole[name][1][0].warnings == ()


@pytest.mark.parametrize("name", ["explicit", "jpeg", "rle"])
def test_frames_are_spread_over_those_that_are_there(tmp_path, name):
    path = dicoms.save(tmp_path / "x", says(CLIPS[name](), 5))
    assert [frame.number for frame in read(path, max_frames=2)[0]] == [2, 7]


@pytest.mark.parametrize("count", [None, ""])
def test_a_still_need_not_say_how_many_frames_it_has(tmp_path, count):
    for made in (
        dicoms.dataset(CLIP[0]),
        dicoms.encapsulated(CLIP[0], dicoms.JPEG, [dicoms.jpeg(CLIP[0])], fragments=4),
    ):
        made.NumberOfFrames = 1
        frames, why = read(dicoms.save(tmp_path / "x", says(made, count)))
        assert (len(frames), why, frames[0].warnings) == (1, "", ())


@pytest.mark.parametrize(("extra", "count"), [(2, 10), (300, 10), (1300, 9), (300, None)])
def test_what_follows_the_frames_is_not_a_frame(tmp_path, extra, count):
    made = says(dicoms.dataset(CLIP, frames=10), count)
    made.PixelData = CLIP.tobytes() + bytes(extra)
    frames, why = read(dicoms.save(tmp_path / "x", made))
    assert not why
    assert len(frames) == (count or 10)


@pytest.mark.parametrize("count", [None, 3, 4, 5])
@pytest.mark.parametrize("halved", [True, False])
def test_frames_of_halved_colour_are_counted_by_the_size_that_fits(tmp_path, halved, count):
    pixels = np.zeros((4, 8, 10, 3), np.uint8)
    made = dicoms.dataset(pixels, frames=4, PhotometricInterpretation="YBR_FULL_422")
    made.PixelData = bytes(4 * 160) if halved else bytes(4 * 240)
    frames, why = read(dicoms.save(tmp_path / "x", says(made, count)))
    if halved or count == 4:  # else as many of the size that the standard has
        assert (len(frames), why) == (4, "")
    assert not why


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("kept", [0.4, 0.7, 0.95, -1])
def test_a_clip_that_is_cut_off_gives_its_sound_frames_and_then_the_reason(tmp_path, whole, name, kept):
    data, expected = whole[name]
    (tmp_path / "x").write_bytes(data[: int(kept * len(data))] if kept > 0 else data[:-60])
    frames, why = read(tmp_path / "x")
    assert why.startswith("cut off")
    assert 10 * abs(kept) - 2.5 < len(frames) < 10
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert frames[0].warnings == ()
    for frame, one in zip(frames, expected, strict=False):
        np.testing.assert_array_equal(frame.pixels, one.pixels)


@pytest.mark.parametrize("name", ["explicit", "jpeg", "jpeg in pieces without a table"])
def test_a_clip_that_is_cut_off_and_does_not_say_how_long_it_was_does_the_same(tmp_path, name):
    data = dicoms.save(tmp_path / "x", says(CLIPS[name](), None)).read_bytes()
    (tmp_path / "x").write_bytes(data[: int(0.7 * len(data))])
    frames, why = read(tmp_path / "x")
    assert why.startswith("cut off")
    assert 4 < len(frames) < 8


@pytest.mark.parametrize(
    ("count", "why"), [(None, ""), (10, ""), (11, "cut off: fewer pixels than the header declares")]
)
def test_the_item_that_ends_compressed_pixels_may_be_missing(tmp_path, count, why):
    data = dicoms.save(tmp_path / "x", says(jpegs(), count)).read_bytes()
    (tmp_path / "x").write_bytes(data[: data.rindex(b"\xfe\xff\xdd\xe0")])
    frames, reason = read(tmp_path / "x")
    assert (len(frames), reason) == (10, why)


@pytest.mark.parametrize("name", ["jpeg", "rle", "jpeg-ls", "jpeg 2000"])
def test_damage_between_frames_ends_a_clip_and_not_those_before(tmp_path, whole, name):
    data = bytearray(whole[name][0])
    items = [at for at in range(len(data)) if data[at : at + 4] == b"\xfe\xff\x00\xe0"]
    data[items[6] : items[6] + 4] = b"what"  # the sixth frame, after the table of offsets
    (tmp_path / "x").write_bytes(data)
    frames, why = read(tmp_path / "x")
    assert (len(frames), why) == (5, "compressed pixels are damaged")


def test_pieces_that_begin_with_nothing_known_are_frames_if_the_header_or_the_table_says_so(tmp_path):
    streams = list(itertools.chain.from_iterable((dicoms.jpeg(CLIP[0]), b"rubbish!") for _ in range(3)))
    for table in (True, False):
        made = dicoms.encapsulated(CLIP[:6], dicoms.JPEG, streams, table=table)
        assert len(read(dicoms.save(tmp_path / "x", made), stride=2)[0]) == 3


# Of add.outer(3 * arange(8), 4 * arange(8)), made with OpenJPH.
HTJ2K = bytes.fromhex(
    "ff4fff510029400000000008000000080000000000000000000000080000000800000000000000000001070101ff500008000200000001"
    "ff52000c00020001000104044001ff5c00072048484848ff64001700014f70656e4a50482056657220302e32362e332eff90000a000000"
    "0000370001ff93c02d70ff79efe3efb4193c675f278fb9dae900f597000031b800c025804caaa9e2740004fed5ecb400ffd9"
)


@pytest.mark.parametrize("syntax", [uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K])
def test_what_the_installed_plugins_of_pydicom_decode_is_read(tmp_path, syntax):
    pixels = np.add.outer(3 * np.arange(8), 4 * np.arange(8)).astype(np.uint8)
    ((frame,), why) = read(dicoms.save(tmp_path / "x", dicoms.encapsulated(pixels, syntax, [HTJ2K])))
    np.testing.assert_array_equal(frame.pixels[:, :, 0], pixels)
    assert not why


def test_a_damaged_frame_in_colour_ends_a_clip_and_not_those_before_it(tmp_path):
    streams = [dicoms.jpeg(frame) for frame in COLOUR]
    streams[5] = streams[5][:-300] + b"\xff\xd9"
    frames, why = read(dicoms.save(tmp_path / "x", dicoms.encapsulated(COLOUR, dicoms.JPEG, streams)))
    assert (len(frames), why) == (5, "damaged")


def test_a_build_keeps_the_frames_before_the_damage_and_counts_wrong_headers(tmp_path):
    (tmp_path / "in").mkdir()
    path = dicoms.save(tmp_path / "in" / "cut.dcm", jpegs())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for number, count in enumerate((None, 3, 10)):
        dicoms.save(tmp_path / "in" / f"{number}.dcm", says(jpegs(), count))
    flags = ("--name=x", "--whole_frames", "--deduplicate=off", "--clean=off")
    assert builds.run(*flags, source=tmp_path / "in", output=tmp_path / "out", dataset="dicom") == 0
    assert len(builds.read(tmp_path / "out" / "x")) == 4 + 30
    (reason,) = builds.read_rejected(tmp_path / "out" / "x").values()
    assert reason == "cut off: fewer pixels than the header declares; the frames before the damage are kept"
    manifest = json.loads((tmp_path / "out" / "x" / "1.0.0" / "manifest.json").read_text())
    assert f"{WRONG_COUNT}: 2 files" in manifest["warnings"]
