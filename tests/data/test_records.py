"""The record contract and random access to shards of both formats."""

import importlib.util
import os
import pathlib
import pickle
import resource
import struct
import types
import zlib

import cv2
import numpy as np
import pytest

from tests.helpers import frame, record, write_shards
from usfmae_jax.data import records, tfrecord
from usfmae_jax.errors import DamagedRecord, InputError


def test_a_record_survives_encoding():
    original = record(3, mask=b"\x89PNG", anatomy="breast", frame="7")
    assert records.decode_record(records.encode_record(original)) == original


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ((0.25, 0.5), (0.25, 0.5)),
        ((0.25,), (0, 0)),
        ((0.25, float("nan")), (0, 0)),
        ((0.25, -1.0), (0, 0)),
        ((), (0, 0)),
    ],
)
def test_a_size_of_a_pixel_that_cannot_be_is_not_known(written, expected):
    assert records.decode_record(records.encode_record(record(0, spacing=written)))["spacing"] == expected


@pytest.mark.parametrize("change", [{"extra": 1}, {"image": None}])
def test_a_record_has_exactly_its_fields(change):
    broken = {k: v for k, v in (record(0) | change).items() if v is not None}
    with pytest.raises(ValueError, match="a record has the fields"):
        records.encode_record(broken)


def test_absent_fields_get_defaults_as_in_shards_made_by_others():
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(b"x")
    example.features.feature["coarse_label"].int64_list.value.append(3)
    assert records.decode_record(example.SerializeToString()) == records.FIELDS | {"image": b"x"}


@pytest.mark.parametrize("data", [b"not a proto", b"\x0a\xff\xff\xff\xff\x7f"])
def test_garbage_is_a_damaged_record(data):
    with pytest.raises(DamagedRecord):
        records.decode_record(data)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_decode_to_grey_or_rgb(suffix, channels):
    rgb = np.zeros((16, 24, 3), np.uint8)
    rgb[..., 0] = 200  # red
    encoded = cv2.imencode(suffix, rgb[..., ::-1])[1].tobytes()
    pixels = records.decode_image(encoded, channels)
    assert pixels.shape == (16, 24, channels)
    assert pixels.dtype == np.uint8
    expected = [200, 0, 0] if channels == 3 else [round(0.299 * 200)]
    np.testing.assert_allclose(pixels[8, 12], expected, atol=3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reduction", [1, 2, 8])
@pytest.mark.parametrize("scale", [1, 16, 256])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_show_what_8_bits_do_whatever_part_of_them_is_used(channels, reduction, scale, suffix):
    shown = np.add.outer(np.arange(128), np.arange(128)).astype(np.uint8)  # 0 to 254
    if channels == 3:
        shown = np.dstack([shown, shown // 2, shown // 4])
    deep = cv2.imencode(suffix, shown.astype(np.uint16) * scale)[1].tobytes()
    expected = records.decode_image(cv2.imencode(".png", shown)[1].tobytes(), channels, reduction)
    pixels = records.decode_image(deep, channels, reduction)
    assert pixels.shape == expected.shape
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).mean() < 2.5


def test_other_depths_are_damaged_records_and_not_a_guess():
    data = cv2.imencode(".tif", np.ones((8, 8), np.float32))[1].tobytes()
    with pytest.raises(DamagedRecord, match="float32 pixels"):
        records.decode_image(data)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"hello"])
def test_an_undecodable_image_is_a_damaged_record(data):
    with pytest.raises(DamagedRecord):
        records.decode_image(data)


def declaring(suffix, side):
    """A small image whose header says that it is large."""
    data = bytearray(cv2.imencode(suffix, np.zeros((8, 8), np.uint8))[1].tobytes())
    if suffix == ".png":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif suffix == ".jpg":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", side, side)
    elif suffix == ".bmp":
        data[18:26] = struct.pack("<ii", side, side)
    else:
        entries = {tag: data.index(struct.pack("<HH", tag, 3)) for tag in (256, 257)}
        for at in entries.values():
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(data)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_that_declares_more_than_any_scan_is_refused_before_it_is_decoded(monkeypatch, suffix, channels):
    for side in (12_000, 60_000):
        data = declaring(suffix, side)
        monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
        with pytest.raises(DamagedRecord, match=r"more than 50 million|cannot be decoded"):
            records.decode_image(data, channels)


def test_a_jpeg_with_bytes_that_decoders_skip_is_still_decoded():
    data = cv2.imencode(".jpg", np.full((8, 8), 99, np.uint8))[1].tobytes()
    at = data.index(b"\xff\xdb")
    assert records.decode_image(data[:at] + b"\x00\x01\xff" + data[at:]).mean() == 99


@pytest.mark.parametrize("length", [1 << 20, 1 << 45, 1 << 63, (1 << 64) - 1])
def test_a_tfrecord_that_says_it_is_longer_than_its_file_is_damaged(tmp_path, length):
    (path,) = write_shards(tmp_path, count=1, kind="tfrecord", pieces=1)
    header = struct.pack("<Q", length)
    with open(path, "ab") as file:
        file.write(header + struct.pack("<I", tfrecord._masked_crc(header)) + b"data")
    shards = records.open_shards(path)
    assert len(shards) == 2
    assert records.decode_record(shards[0])["source"] == "0.png"
    with pytest.raises(DamagedRecord, match="truncated"):
        shards[1]


def test_pixel_hash_tells_pictures_not_files():
    pixels = frame(0, 1)
    again = cv2.imdecode(cv2.imencode(".bmp", pixels)[1], cv2.IMREAD_GRAYSCALE)
    assert records.pixel_hash(pixels) == records.pixel_hash(again)
    assert records.pixel_hash(pixels) != records.pixel_hash(pixels.reshape(pixels.shape[::-1]))
    assert records.pixel_hash(pixels) != records.pixel_hash(frame(1, 1))


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_shards_are_read_at_random_after_pickling(tmp_path, kind):
    paths = write_shards(tmp_path, 10, kind=kind)
    shards = pickle.loads(pickle.dumps(records.open_shards(str(tmp_path), "train")))
    assert len(shards) == 10
    patients = [records.decode_record(shards[i])["source"] for i in (9, 0, 5, 4)]
    assert patients == ["9.png", "0.png", "1.png", "8.png"]
    assert shards.locate(5) == (paths[1], 0)


def test_truncated_tfrecord_keeps_what_is_whole_and_counts_the_rest(tmp_path):
    path = write_shards(tmp_path, 10, kind="tfrecord", pieces=1)[0]
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[:-7])
    shards = records.open_shards(path)
    assert len(shards) == 10
    assert records.decode_record(shards[8])["source"] == "8.png"
    with pytest.raises(DamagedRecord, match="truncated"):
        shards[9]


def test_a_flipped_bit_in_a_tfrecord_is_damage(tmp_path):
    path = write_shards(tmp_path, 4, kind="tfrecord", pieces=1)[0]
    data = bytearray(pathlib.Path(path).read_bytes())
    data[len(data) // 2 + 40] ^= 1
    pathlib.Path(path).write_bytes(data)
    shards = records.open_shards(path)
    damaged = 0
    for i in range(len(shards)):
        try:
            records.decode_record(shards[i])
        except DamagedRecord:
            damaged += 1
    assert damaged == 1


def test_a_damaged_array_record_is_a_damaged_record(tmp_path):
    path = write_shards(tmp_path, 4, pieces=1)[0]
    data = bytearray(pathlib.Path(path).read_bytes())
    position = data.find(b"1.png")
    data[position - 200 : position] = os.urandom(200)
    pathlib.Path(path).write_bytes(data)
    shards = records.open_shards(path)
    with pytest.raises(DamagedRecord):
        records.decode_record(shards[1])
    assert records.decode_record(shards[3])["source"] == "3.png"


def test_more_shards_than_files_may_be_open_raise_the_limit_or_are_a_sentence(tmp_path, monkeypatch):
    write_shards(tmp_path, 4)
    set_to = []
    monkeypatch.setattr(records.resource, "getrlimit", lambda which: (100, 1000))
    monkeypatch.setattr(records.resource, "setrlimit", lambda which, limits: set_to.append(limits))
    records.open_shards(str(tmp_path))
    assert set_to == [(2 + 256, 1000)]
    monkeypatch.setattr(records.resource, "getrlimit", lambda which: (100, 200))
    with pytest.raises(InputError, match="2 shards cannot be open at once where a process may open 200 files"):
        records.open_shards(str(tmp_path))


def test_a_record_is_not_called_damaged_where_no_more_files_can_be_opened(tmp_path):
    write_shards(tmp_path, 40, pieces=20)
    shards = records.open_shards(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 3, hard))
        with pytest.raises(InputError, match="20 shards cannot be open at once"):
            [shards[number] for number in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_split_is_chosen_by_name_and_folders_are_searched(tmp_path):
    (tmp_path / "made" / "1.0.0").mkdir(parents=True)
    (tmp_path / "made" / "1.0.0.incompleteABC").mkdir()
    write_shards(tmp_path / "made" / "1.0.0", 6, split="train")
    write_shards(tmp_path / "made" / "1.0.0", 4, split="test")
    write_shards(tmp_path / "made" / "1.0.0.incompleteABC", 8, split="train")
    for path in (str(tmp_path), str(tmp_path / "made"), str(tmp_path / "*"), str(tmp_path / "made" / "1.0.0" / "*")):
        assert len(records.open_shards(path, "train")) == 6, path
        assert len(records.open_shards(path, "test")) == 4, path
    assert len(records.open_shards(str(tmp_path))) == len(records.open_shards(str(tmp_path), "")) == 10


@pytest.mark.parametrize("name", ["g[1]", "a*b", "what?"])
def test_a_folder_whose_name_looks_like_a_pattern_is_itself(tmp_path, name):
    place = tmp_path / name / "made"
    (place / "1.0.0").mkdir(parents=True)
    paths = write_shards(place / "1.0.0", 6)
    for path in (tmp_path / name, place, place / "1.0.0", paths[0]):
        assert records.open_shards(str(path)).paths[0] == paths[0], path
    os.remove(paths[0])
    with pytest.raises(InputError, match=r"1 of 2 shards of .* are missing"):
        records.open_shards(str(place))
    (place / "splits").mkdir()
    (place / "splits" / "one.csv").touch()
    assert [path.name for path in records.matches(place / "splits", "*.csv")] == ["one.csv"]


def test_fingerprint_is_of_content_not_of_place(tmp_path):
    for folder, count in (("a", 6), ("b", 6), ("c", 8)):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, count)
    a, b, c = (records.open_shards(str(tmp_path / folder)).fingerprint() for folder in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no shards match"),
        (lambda path: write_shards(path, 4, split="test"), "has no split 'train', only \\['test'\\]"),
        (lambda path: os.remove(write_shards(path, 4)[0]), "1 of 2 shards of .* are missing"),
        (lambda path: pathlib.Path(write_shards(path, 4)[0]).write_bytes(b"junk"), "cannot be opened"),
        (lambda path: write_shards(path, 0, kind="tfrecord"), "hold no records"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(InputError, match=message):
        records.open_shards(str(tmp_path), "train")


def test_a_path_without_shards_is_answered_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "labelled").mkdir(parents=True)
    write_shards(tmp_path / "data" / "labelled", 4)
    for path in ("data/labeled", "dta/labelled", str(tmp_path / "data" / "labeled")):
        meant = path.replace("labeled", "labelled").replace("dta", "data")
        with pytest.raises(records.NoShardsError, match=f"no shards match .*; did you mean {meant}\\?$"):
            records.open_shards(path)
    (tmp_path / "my scans" / "a").mkdir(parents=True)
    (tmp_path / "my scans" / "a" / "1.PNG").write_bytes(b"")
    with pytest.raises(records.NoShardsError) as error:
        records.open_shards("my scans")
    assert str(error.value) == (
        "'my scans' is a folder of images, not of shards; build it: "
        "python -m data_prep.build --dataset=folder --input='my scans' --output=data"
    )
    for path in ("nothing like it", "data/l*", "gs://bucket/data/labeled"):
        assert not records._no_shards(path).advised


class _Bucket:
    """Stands for `epath.Path` of a bucket whose files lie in a local folder."""

    root = pathlib.Path()

    def __init__(self, path):
        self._path = str(path)
        self._local = self.root / self._path.removeprefix("gs://bucket").lstrip("/")

    def __fspath__(self):
        return self._path

    def is_dir(self):
        return self._local.is_dir()

    def exists(self):
        return self._local.exists()

    def glob(self, pattern):
        return [_Bucket(f"gs://bucket/{path.relative_to(self.root)}") for path in self._local.glob(pattern)]

    def stat(self):
        return types.SimpleNamespace(length=self._local.stat().st_size)

    def open(self, mode):
        return self._local.open(mode)


@pytest.mark.parametrize("path", ["gs://bucket/data", "gs://bucket/d*/made/*", "gs://bucket/data/made/1.0.0/*train*"])
def test_buckets_are_searched_and_read_like_folders(tmp_path, monkeypatch, path):
    (tmp_path / "data" / "made" / "1.0.0").mkdir(parents=True)
    write_shards(tmp_path / "data" / "made" / "1.0.0", 6, kind="tfrecord")
    monkeypatch.setattr(_Bucket, "root", tmp_path)
    monkeypatch.setattr(records.epath, "Path", _Bucket)
    shards = records.open_shards(path, "train")
    assert shards.paths[0].startswith("gs://bucket/data/made/1.0.0/")
    assert [records.decode_record(shards[i])["source"] for i in range(6)] == [f"{i}.png" for i in (0, 2, 4, 1, 3, 5)]


def test_a_bucket_without_its_package_is_one_sentence():
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(InputError, match="pip install gcsfs"):
        records.open_shards("gs://bucket/data")


def test_shards_of_excluded_datasets_are_passed_over(tmp_path):
    for name, count in (("mine", 3), ("bus_bra", 5)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, count=count)
        for shard in (tmp_path / name).iterdir():
            shard.rename(shard.with_name(shard.name.replace(records.dataset_name(shard.name), name)))
    assert len(records.open_shards(str(tmp_path))) == 8
    assert len(records.open_shards(str(tmp_path), exclude=("bus_bra",))) == 3
    with pytest.raises(InputError, match="nothing but what is excluded: bus_bra"):
        records.open_shards(str(tmp_path / "bus_bra"), exclude=("bus_bra",))
