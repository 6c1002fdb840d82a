"""ArrayRecord files, read without trusting the sizes that they declare.

They are Riegeli files (github.com/google/riegeli, doc/riegeli_records_file_format.md): chunks of compressed records,
with a header of 24 bytes every 64 KiB. The library allocates whatever size a chunk declares, without a check: a file of
128 KB can cost 3 GB. So chunk headers are checked first.
"""

import functools
import os
import struct

import grain
import numpy as np

from usfmae_jax.errors import DamagedRecord

#: Maximum bytes of one record; the largest image that is decoded has 150 MB uncompressed.
MAX_RECORD = 256 << 20

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}


class ArrayRecordShard:
    """Random access to one file, local or `gs://`. Files in a bucket are trusted and not checked.

    Raises:
      RuntimeError, OSError, ValueError: the file cannot be opened, or declares more than it can hold.
    """

    def __init__(self, path: str):
        self.path = path
        self._size = os.path.getsize(path) if "://" not in path else 0
        if self._size >= _BLOCK:  # for a shorter file the library reports what is wrong
            try:
                self._find_index()
            except (IndexError, OverflowError) as error:
                raise ValueError("its index cannot be found") from error
        # Records are read one at a time: read-ahead would fetch data that is not needed.
        self._records = grain.sources.ArrayRecordDataSource([path])
        if self._size and len(self) > self._size:
            raise ValueError(f"it declares {len(self)} records in {self._size} bytes")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        if self._size:
            ends, chunks, sound = self._index
            chunk = int(ends.searchsorted(index, side="right"))
            if not sound[chunk]:
                _, declared = self._header(int(chunks[chunk]))
                if declared > MAX_RECORD:
                    raise DamagedRecord(f"record declares {declared} bytes, more than {MAX_RECORD >> 20} MB")
                sound[chunk] = True
        return self._records[index]

    def _find_index(self) -> tuple[int, int]:
        """Position and size of the chunk that is the index of all others."""
        last = self._size - _BLOCK
        last -= last % _BLOCK
        stored, _ = self._header(last)
        text = self._read(last, min(_CHUNK_HEADER + stored, 1000))[_CHUNK_HEADER:]
        # Uncompressed: a byte that says so, the number of sizes, the sizes, and the tag of the field with the position.
        position, _ = _varint(text, 3 + text[1])
        stored, declared = self._header(position)
        if max(stored, declared) > self._size:  # a record takes 41 bytes or more in the file, about 10 in the index
            raise ValueError(f"its index declares {max(stored, declared)} bytes, more than the whole file has")
        return position, stored

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each chunk, the number of records up to its end, its position, and whether its header was checked."""
        try:
            position, stored = self._find_index()
            content = self._read(position, _CHUNK_HEADER + stored)[_CHUNK_HEADER:]
            length, start = _varint(content, 1)
            sizes = self._unpacked(content[0], content[start : start + length])
            values = self._unpacked(content[0], content[start + length :])
            chunks: list[int] = []
            ends, place, at = [0], 0, 0
            while place < len(sizes):
                size, place = _varint(sizes, place)
                # The first entry describes the file; fields of the others: 1 position, 2 uncompressed size, 3 records.
                if chunks or at:
                    fields, end, inside = {}, at + size, at
                    while inside < end:
                        fields[values[inside] >> 3], inside = _varint(values, inside + 1)
                    chunks.append(fields[1])
                    ends.append(ends[-1] + fields[3])
                at += size
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise DamagedRecord("the shard's index cannot be read") from error
        return np.asarray(ends[1:], np.int64), np.asarray(chunks, np.int64), np.zeros(len(chunks), bool)

    def _unpacked(self, codec: int, data: bytes) -> bytes:
        if not codec:
            return data
        size, start = _varint(data, 0)
        if size > self._size:
            raise ValueError(f"{size} bytes are more than the file has")
        import pyarrow

        try:
            return pyarrow.decompress(data[start:], size, codec=_CODECS[codec], asbytes=True)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from error

    def _header(self, position: int) -> tuple[int, int]:
        """Sizes in bytes of the chunk at a position: in the file, and uncompressed."""
        _, stored, _, _, declared = struct.unpack("<5Q", self._read(position, _CHUNK_HEADER))
        return stored, declared

    def _read(self, position: int, count: int) -> bytes:
        """Reads bytes from a position, skipping the block headers."""
        parts = []
        with open(self.path, "rb", buffering=0) as file:
            while count:
                if position % _BLOCK == 0:
                    position += _BLOCK_HEADER
                part = os.pread(file.fileno(), min(count, _BLOCK - position % _BLOCK), position)
                if not part:
                    raise ValueError("it is truncated")
                parts.append(part)
                position, count = position + len(part), count - len(part)
        return b"".join(parts)


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """Decodes a base-128 varint; returns it and the position after it."""
    value, shift = 0, 0
    while True:
        byte = data[start]
        value |= (byte & 127) << shift
        start, shift = start + 1, shift + 7
        if byte < 128:
            return value, start
