"""The record contract, and random access to the shards that hold records.

A record is one frame as a `tf.train.Example`, the same in ArrayRecord and TFRecord files and readable with
TensorFlow Datasets. Only `image` is required, so that shards made by others with TensorFlow Datasets work too;
other fields have the defaults in `FIELDS`.
"""

import bisect
import collections
import concurrent.futures
import dataclasses
import difflib
import errno
import glob
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import resource
import shlex
import struct
import warnings
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from usfmae_jax.data.array_record import ArrayRecordShard
from usfmae_jax.data.tfrecord import TFRecordShard
from usfmae_jax.errors import DamagedRecord, InputError

Record = dict[str, Any]

#: All fields, with their default values. Ids are strings, which the builders never leave empty: a still image has a
#: video of its own, and so does an unknown patient.
FIELDS: Record = {
    "image": b"",  # encoded JPEG, PNG or BMP; one channel for grey, three if colour carries meaning
    "height": 0,  # height of `image` in pixels
    "width": 0,
    "dataset": "",
    "anatomy": "",
    "patient": "",
    "video": "",
    "frame": "",
    "label": -1,  # -1 = none
    "mask": b"",  # PNG, one channel, as large as `image`; or empty
    "spacing": (0.0, 0.0),  # mm per pixel of `image`, (down, across); 0 = unknown
    "source": "",  # path within the dataset, never absolute
    "sha256": "",  # `pixel_hash` of the frame as decoded from its source
}

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom")  # the usual ones, for an error message
_SHARD = re.compile(
    r"(?:-(?P<split>[^-./]+))?\.(?P<format>array_record|tfrecord)(?:-(?P<index>\d+)-of-(?P<count>\d+))?$"
)


def encode_record(record: Record) -> bytes:
    """Serialises a record as a `tf.train.Example`.

    Args:
      record: values for all of `FIELDS`.

    Raises:
      ValueError: a field is missing or unknown.
    """
    if record.keys() != FIELDS.keys():
        raise ValueError(f"a record has the fields {list(FIELDS)}, not {list(record)}")
    example = tf_example_pb2.Example()
    for name, value in record.items():
        feature = example.features.feature[name]
        if isinstance(FIELDS[name], int):
            feature.int64_list.value.append(int(value))
        elif isinstance(FIELDS[name], tuple):
            feature.float_list.value.extend(value)
        else:
            feature.bytes_list.value.append(value.encode() if isinstance(value, str) else value)
    return example.SerializeToString(deterministic=True)


def decode_record(data: bytes, fields: Record = FIELDS) -> Record:
    """The inverse of `encode_record`; absent fields get their default, unknown ones are left out.

    Args:
      data: a serialised record.
      fields: those of `FIELDS` that are needed, with their defaults; the fewer, the faster.

    Raises:
      DamagedRecord: the bytes are not a `tf.train.Example`.
      InputError: the example has no encoded `image`: the shards follow another schema.
    """
    try:
        features = tf_example_pb2.Example.FromString(data).features.feature
    except Exception as error:  # protobuf's DecodeError is in a different module in each implementation
        raise DamagedRecord(f"not a tf.train.Example: {error}") from error
    if "image" not in features or not features["image"].bytes_list.value:
        raise InputError(
            f"the shards follow another schema: expected an encoded 'image', found {sorted(features) or 'no fields'}; "
            "build them with python -m data_prep.build"
        )
    record = dict(fields)
    for name, default in fields.items():
        if name not in features:
            continue
        if isinstance(default, int):
            values = features[name].int64_list.value
            record[name] = int(values[0]) if values else default
        elif isinstance(default, tuple):
            numbers = tuple(map(float, features[name].float_list.value))
            sound = len(numbers) == len(default) and all(0 < number < math.inf for number in numbers)
            record[name] = numbers if sound else default
        else:
            values = features[name].bytes_list.value
            value = values[0] if values else b""
            record[name] = value.decode("utf-8", "replace") if isinstance(default, str) else value
    return record


#: Bytes of shards that are hashed: in total (approximately), and per block.
_HASHED, _BLOCK = 1 << 28, 1 << 16

#: Maximum pixels of an image; files that declare more are refused before decoding.
MAX_PIXELS = 50_000_000

_WINDOW = 0.1, 99.9  # percentiles

#: OpenCV flags to decode at a fraction of the size, by (channels, reduction); for JPEG, during decoding itself.
_DECODE = {
    (1, 1): cv2.IMREAD_GRAYSCALE,
    (1, 2): cv2.IMREAD_REDUCED_GRAYSCALE_2,
    (1, 4): cv2.IMREAD_REDUCED_GRAYSCALE_4,
    (1, 8): cv2.IMREAD_REDUCED_GRAYSCALE_8,
    (3, 1): cv2.IMREAD_COLOR,
    (3, 2): cv2.IMREAD_REDUCED_COLOR_2,
    (3, 4): cv2.IMREAD_REDUCED_COLOR_4,
    (3, 8): cv2.IMREAD_REDUCED_COLOR_8,
}


def decode_image(data: bytes, channels: int = 1, reduction: int = 1) -> np.ndarray:
    """Decodes a JPEG, PNG, BMP or TIFF to uint8 `[H, W, channels]`, RGB for three channels, grey for one.

    Images of 16 bits are converted with `to_uint8`.

    Args:
      data: the encoded image.
      channels: 1 or 3.
      reduction: 1, 2, 4 or 8: decode at this fraction of the size.

    Raises:
      DamagedRecord: the image cannot be decoded, declares more than `MAX_PIXELS`, or has neither 8 nor 16 bits.
    """
    _check_size(data)
    pixels = _decode(data, channels, reduction)
    if pixels.dtype == np.uint16:
        if reduction > 1:  # the window must be that of the whole frame
            pixels = _decode(data, channels, 1)
        size = max(pixels.shape[1] // reduction, 1), max(pixels.shape[0] // reduction, 1)
        pixels = cv2.resize(to_uint8(pixels), size, interpolation=cv2.INTER_AREA)
    elif pixels.dtype != np.uint8:
        raise DamagedRecord(f"image has {pixels.dtype} pixels, expected 8 or 16 bits")
    if channels == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return pixels[:, :, None]


def _check_size(data: bytes) -> None:
    """Refuses images whose header declares more than `MAX_PIXELS`: a few bytes could take all memory."""
    try:
        if data.startswith(b"\x89PNG"):
            size = struct.unpack_from(">II", data, 16)
        elif data.startswith(b"\xff\xd8"):
            size = _jpeg_size(data)
        else:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
                size = image.size
    except Exception as error:  # of many types: Pillow reads many old formats
        raise DamagedRecord("image cannot be decoded") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise DamagedRecord(f"image declares {size[0]} x {size[1]} pixels, more than {MAX_PIXELS // 1_000_000} million")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    # Pillow would take a tenth of the decoding time. The largest size counts, since decoders differ in which they use.
    position, largest = 2, (0, 0)
    while (marker := data[position + 1]) != 0xDA:  # start of scan
        if data[position] != 0xFF:  # decoders skip it too
            position = data.index(b"\xff", position)
            continue
        if marker == 0xFF:  # padding
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            largest = max(largest, struct.unpack_from(">HH", data, position + 5), key=math.prod)
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    return largest


def _decode(data: bytes, channels: int, reduction: int) -> np.ndarray:
    # Any depth: OpenCV would divide 16 bits by 256, although most scanners use only a few of the bits.
    flags = _DECODE[channels, reduction] | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DamagedRecord(f"image cannot be decoded: {error.err}") from error
    if pixels is None:
        raise DamagedRecord("image cannot be decoded")
    return pixels


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Maps 16 bits to 8 by a window from the 0.1st to the 99.9th percentile of the frame; 8 bits are not changed.

    Scanners use very different ranges of the 16 bits; the percentiles ignore a few saturated pixels, and one window for
    all channels keeps colours. This rule applies to all 16-bit input.

    Args:
      pixels: uint8 or uint16, of any shape.

    Returns:
      uint8 of the same shape.
    """
    if pixels.dtype == np.uint8:
        return pixels
    low, high = np.percentile(pixels, _WINDOW)
    if low == high:  # almost all pixels are equal
        low, high = pixels.min(), pixels.max()
    scale = 255 / max(float(high) - float(low), 1.0)
    return np.clip(np.rint((pixels.astype(np.float32) - low) * scale), 0, 255).astype(np.uint8)


def pixel_hash(pixels: np.ndarray) -> str:
    """SHA-256 of decoded pixels and their shape: equal for equal images, whatever the file format."""
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


class NoShardsError(InputError):
    """A path names no shards; `advised`: the message states what to do instead."""

    def __init__(self, message: str, advised: bool):
        super().__init__(message)
        self.advised = advised


@dataclasses.dataclass
class Shards:
    """All records of some shard files, in file order: `shards[i]` returns the bytes of record i."""

    paths: list[str]

    def __post_init__(self) -> None:
        _allow_files(sum(".tfrecord" not in os.path.basename(path) for path in self.paths))
        # Opening a file reads its footer or index: done in parallel, which helps for remote files.
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self._files = list(pool.map(_open_shard, self.paths))
        self._ends = list(itertools.accumulate(len(file) for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[str, int]:
        """The path of the record's shard, and its index in that shard."""
        shard, start = self._find(index)
        return self.paths[shard], index - start

    def __getitem__(self, index: int) -> bytes:
        shard, start = self._find(index)
        try:
            return self._files[shard][index - start]
        except (RuntimeError, OSError, IndexError, ValueError) as error:
            if os.strerror(errno.EMFILE) in str(error):  # too many open files: not the record's fault
                raise _too_many_files(len(self.paths)) from error
            raise DamagedRecord(f"record cannot be read: {error}") from error

    def contents(self) -> list[tuple[str, int]]:
        """Name and record count of every shard, which identify data independently of its location."""
        return [(os.path.basename(path), len(file)) for path, file in zip(self.paths, self._files, strict=True)]

    def fingerprint(self) -> str:
        """Hash of `contents`, 12 hex digits."""
        return hashlib.sha256(json.dumps(self.contents()).encode()).hexdigest()[:12]

    def content(self) -> str:
        """Hash of the contents of the files, 12 hex digits: of evenly spaced blocks, which cover small data completely.

        Changes between the blocks of large data are detected by the records' checksums on reading. In a bucket only the
        sizes are hashed, since every block would be a request.
        """
        blocks = max(_HASHED // _BLOCK // len(self.paths), 2)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            digests = list(pool.map(lambda path: _digest(path, blocks), self.paths))
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]

    def _find(self, index: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._ends, index)
        return shard, self._ends[shard - 1] if shard else 0


def _allow_files(count: int) -> None:
    """Raises the limit of open files for `count` shards: an ArrayRecord shard stays open once it was read."""
    count += 256  # for other files of the process
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and hard < count:
        raise _too_many_files(count - 256)
    if soft != resource.RLIM_INFINITY and soft < count:  # often 1,024
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _too_many_files(count: int) -> InputError:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return InputError(
        f"{count} shards cannot be open at once where a process may open {hard} files (ulimit -Hn); "
        "raise the limit or write fewer, larger shards"
    )


def _digest(path: str, blocks: int) -> str:
    size = epath.Path(path).stat().length
    whole = hashlib.sha256(str(size).encode())
    if "://" not in path:
        starts = range(0, size, _BLOCK)
        if len(starts) > blocks:  # includes the first and the last, which holds the index
            starts = np.linspace(0, size - _BLOCK, blocks).astype(int).tolist()
        with open(path, "rb") as file:
            for start in starts:
                file.seek(start)
                whole.update(file.read(_BLOCK))
    return whole.hexdigest()


def _open_shard(path: str) -> Any:
    try:
        if ".tfrecord" in os.path.basename(path):
            return TFRecordShard(path)
        return ArrayRecordShard(path)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"shard {path} cannot be opened: {str(error).splitlines()[0]}; rebuild or remove it"
        ) from error


def open_shards(path: str, split: str | None = None, exclude: Sequence[str] = ()) -> Shards:
    """Opens the shards of `path`.

    Args:
      path: a shard, a glob of shards or folders, or a folder with shards at most three levels below; local or `gs://`.
      split: only shards of this TFDS split by name (`NAME-split.array_record-00000-of-00004`); None = all.
      exclude: names of datasets whose shards are skipped.

    Raises:
      NoShardsError: nothing matches.
      InputError: the split does not exist, or a shard is missing, unreadable or of another schema.
    """
    try:
        found = [file for file in _expand(path) if _SHARD.search(file)]
    except ImportError as error:
        raise InputError(f"{path!r} needs another package: {error} (pip install gcsfs for gs://)") from error
    if not found:
        raise _no_shards(path)
    found = [file for file in found if dataset_name(file) not in exclude]
    if not found:
        raise InputError(f"{path!r} holds nothing but what is excluded: {', '.join(exclude)}")
    splits: dict[str | None, list[str]] = collections.defaultdict(list)
    for file in found:
        splits[_SHARD.search(file)["split"]].append(file)  # type: ignore[index]
    chosen = found if not split else splits.get(None, []) + splits.get(split, [])
    if not chosen:
        raise InputError(f"{path!r} has no split {split!r}, only {sorted(filter(None, splits))}")
    _check_complete(path, chosen)
    shards = Shards(sorted(chosen))
    if not len(shards):
        raise InputError(f"the shards of {path!r} hold no records")
    for index in range(min(len(shards), 8)):
        try:
            decode_record(shards[index])
            break
        except DamagedRecord:
            continue
    return shards


def _no_shards(path: str) -> NoShardsError:
    """The error for a path without shards: how to build some from images there, or which path was meant."""
    if os.path.isdir(path):
        below = itertools.islice((name for _, _, names in os.walk(path) for name in names), 1000)
        if any(name.lower().endswith(_IMAGES) for name in below):
            build = f"python -m data_prep.build --dataset=folder --input={shlex.quote(path)} --output=data"
            return NoShardsError(f"{path!r} is a folder of images, not of shards; build it: {build}", advised=True)
    near = "" if "://" in path or glob.has_magic(path) else nearest_path(path)
    return NoShardsError(f"no shards match {path!r}" + (f"; did you mean {near}?" if near else ""), advised=bool(near))


def nearest_path(path: str) -> str:
    """The existing path with the most similar name to a missing one; "" if there is none, or the path exists.

    Args:
      path: a local path.
    """
    found = pathlib.Path(path).anchor
    for name in pathlib.Path(path).relative_to(found).parts:
        if not os.path.exists(os.path.join(found, name)):
            beside = os.listdir(found or ".") if os.path.isdir(found or ".") else []
            name = next(iter(difflib.get_close_matches(name, beside, n=1)), "")
        if not name:
            return ""
        found = os.path.join(found, name)
    return "" if found == str(pathlib.Path(path)) else found


def dataset_name(shard: str) -> str:
    """The dataset of a shard, from its name: NAME in `NAME-split.array_record-00000-of-00004`."""
    name = os.path.basename(shard)
    match = _SHARD.search(name)
    return name[: match.start()] if match else name


def split_name(shard: str) -> str:
    """The TFDS split of a shard, from its name; "" if that has none."""
    match = _SHARD.search(os.path.basename(shard))
    return (match["split"] or "") if match else ""


def _expand(path: str) -> list[str]:
    """All files that `path` names: itself, matches of its wildcards, and files below folders."""
    if not path:
        return []
    roots = [path]
    if _is_pattern(path):
        if "://" in path:
            head = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
            roots = [os.fspath(match) for match in epath.Path(head).glob(path[len(head) + 1 :])]
        else:
            roots = glob.glob(path, recursive=True)
    files: list[str] = []
    for root in sorted(roots):
        if epath.Path(root).is_dir():
            # Three levels reach NAME/VERSION/SHARD without listing a whole bucket.
            below = [os.fspath(file) for level in ("*", "*/*", "*/*/*") for file in matches(root, level)]
            # A builder that is still running, or was killed, leaves '.incomplete' in the folder's name.
            files += [file for file in below if "incomplete" not in file[len(root) :]]
        elif epath.Path(root).exists():
            files.append(root)
    return sorted(files)


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not epath.Path(path).exists()  # a folder may be called "data [1]"


def matches(folder: str | os.PathLike[str], pattern: str) -> list[epath.Path]:
    """Matches of a pattern below a folder, whose own name is taken literally: `epath` would treat it as a pattern."""
    name = os.fspath(folder)
    return list(epath.Path(name if "://" in name else glob.escape(name)).glob(pattern))


def _check_complete(path: str, files: list[str]) -> None:
    if _is_pattern(path) or not epath.Path(path).is_dir():
        return  # the user chose single files
    counts: dict[tuple[str, int], set[int]] = collections.defaultdict(set)
    for file in files:
        match = _SHARD.search(file)
        if match and match["index"]:
            counts[file[: match.end("format")], int(match["count"])].add(int(match["index"]))
    for (stem, count), present in counts.items():
        missing = sorted(set(range(count)) - present)
        if missing:
            raise InputError(
                f"{len(missing)} of {count} shards of {stem} are missing, first number {missing[0]}; build it again"
            )
