"""ArrayRecord files, without trusting the sizes that they declare.

They are Riegeli files (github.com/google/riegeli, doc/riegeli_records_file_format.md): chunks of compressed records,
with a header of 24 bytes at every 64 KiB. Their library allocates what a chunk declares and tells nobody before: 128 KB
cost 3 GB. So the header of a chunk is looked at first.
"""

import functools
import os
import struct

import grain
import numpy as np

from usfmae_jax.errors import DamagedRecord

#: Bytes of one record; the largest image that is decoded has 150 MB uncompressed.
MAX_RECORD = 256 << 20

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}


class ArrayRecordShard:
    """Random access to one file, local or `gs://`. Of a bucket nothing is checked: its files are one's own.

    Raises:
      RuntimeError, OSError, ValueError: it cannot be opened, or declares more than it can hold.
    """

    def __init__(self, path: str):
        self.path = path
        self._size = os.path.getsize(path) if "://" not in path else 0
        if self._size >= _BLOCK:  # of a shorter one the library says what is wrong
            try:
                self._find_index()
            except (IndexError, OverflowError) as error:
                raise ValueError("its index cannot be found") from error
        # One record at a time is asked for: read-ahead would fetch what nobody wants.
        self._records = grain.sources.ArrayRecordDataSource([path])
        if self._size and len(self) > self._size:
            raise ValueError(f"it declares {len(self)} records in {self._size} bytes")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        if self._size:
            ends, chunks = self._index
            _, declared = self._header(int(chunks[np.searchsorted(ends, index, side="right")]))
            if declared > MAX_RECORD:
                raise DamagedRecord(f"record declares {declared} bytes, more than {MAX_RECORD >> 20} MB")
        return self._records[index]

    def _find_index(self) -> tuple[int, int]:
        """Position and size of the chunk that lists all others."""
        last = self._size - _BLOCK
        last -= last % _BLOCK
        stored, _ = self._header(last)
        text = self._read(last, min(_CHUNK_HEADER + stored, 1000))[_CHUNK_HEADER:]
        # Uncompressed: a byte for that, the number of sizes, the sizes, and the tag of the field that says it.
        position, _ = _varint(text, 3 + text[1])
        stored, declared = self._header(position)
        if max(stored, declared) > self._size:  # a record has 41 bytes or more here, and some 10 in the index
            raise ValueError(f"its index declares {max(stored, declared)} bytes, more than the whole file has")
        return position, stored

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """How many records there are up to the end of every chunk, and where the chunk begins."""
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
                # The first one is about the file; of the others: 1, position; 2, uncompressed size; 3, records.
                if chunks or at:
                    fields, end, inside = {}, at + size, at
                    while inside < end:
                        fields[values[inside] >> 3], inside = _varint(values, inside + 1)
                    chunks.append(fields[1])
                    ends.append(ends[-1] + fields[3])
                at += size
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise DamagedRecord("the shard's index cannot be read") from error
        return np.asarray(ends[1:], np.int64), np.asarray(chunks, np.int64)

    def _unpacked(self, codec: int, data: bytes) -> bytes:
        if not codec:
            return data
        size, start = _varint(data, 0)
        if size > self._size:
            raise ValueError(f"{size} bytes are more than the file has")
        # It starts a thread, with which glibc's memory is in two parts for good: not before `mesh.keep_memory`.
        import pyarrow

        try:
            return pyarrow.decompress(data[start:], size, codec=_CODECS[codec], asbytes=True)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from error

    def _header(self, position: int) -> tuple[int, int]:
        """Of the chunk at a position: bytes in the file, and uncompressed."""
        _, stored, _, _, declared = struct.unpack("<5Q", self._read(position, _CHUNK_HEADER))
        return stored, declared

    def _read(self, position: int, count: int) -> bytes:
        """Bytes from a position on, without the headers of blocks."""
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
    """A number in base 128, and where the next one begins."""
    value, shift = 0, 0
    while True:
        byte = data[start]
        value |= (byte & 127) << shift
        start, shift = start + 1, shift + 7
        if byte < 128:
            return value, start
