"""TFRecord files without TensorFlow.

Each record consists of length (uint64), masked CRC-32C of the length, data, masked CRC-32C of the data.
"""

import struct

import google_crc32c
import numpy as np
from etils import epath

from usfmae_jax.errors import DamagedRecord


class TFRecordShard:
    """Random access to one file, local or `gs://`.

    Offsets are found once, by jumping from length to length. A truncated record, or everything after a damaged length,
    counts as one damaged record, so that no loss goes unnoticed.
    """

    def __init__(self, path: str):
        self.path = path
        self._offsets = self._index()

    def _index(self) -> np.ndarray:
        self._size = size = epath.Path(self.path).stat().length
        offsets, position = [], 0
        with epath.Path(self.path).open("rb") as file:
            while position < size:
                offsets.append(position)
                file.seek(position)
                header = file.read(12)
                if len(header) < 12 or _masked_crc(header[:8]) != struct.unpack("<I", header[8:])[0]:
                    break  # records after a damaged length cannot be found
                position += 16 + struct.unpack("<Q", header[:8])[0]
        return np.asarray(offsets, np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> bytes:
        with epath.Path(self.path).open("rb") as file:
            file.seek(int(self._offsets[index]))
            header = file.read(12)
            if len(header) < 12 or _masked_crc(header[:8]) != struct.unpack("<I", header[8:])[0]:
                raise DamagedRecord("record header is damaged")
            length = struct.unpack("<Q", header[:8])[0]
            if length > self._size - 16 - self._offsets[index]:  # the length may exceed the memory
                raise DamagedRecord("record is truncated or its checksum is wrong")
            data, checksum = file.read(length), file.read(4)
        if len(data) < length or len(checksum) < 4 or _masked_crc(data) != struct.unpack("<I", checksum)[0]:
            raise DamagedRecord("record is truncated or its checksum is wrong")
        return data


def frame_tfrecord(data: bytes) -> bytes:
    """One record in the format of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked_crc(length)) + data + struct.pack("<I", _masked_crc(data))


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
