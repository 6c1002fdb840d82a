import pathlib
import struct

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tests.helpers import write_shards
from usfmae_jax.data import array_record, records
from usfmae_jax.errors import DamagedRecord, InputError


@pytest.mark.parametrize("compression", ["zstd", "brotli", "snappy", "uncompressed"])
@pytest.mark.parametrize("group", [1, 7])
def test_the_declared_size_of_a_record_is_known_before_it_is_read(tmp_path, monkeypatch, group, compression):
    rng = np.random.default_rng(0)
    written = [rng.bytes(size) for size in rng.integers(1, 1500, 1400)]  # over many blocks, its index too
    path = str(tmp_path / "x.array_record")
    writer = ArrayRecordWriter(path, f"group_size:{group},{compression}")
    for data in written:
        writer.write(data)
    writer.close()
    shard = array_record.ArrayRecordShard(path)
    assert [shard[number] for number in range(len(shard))] == written
    monkeypatch.setattr(array_record, "MAX_RECORD", 0)
    shard = array_record.ArrayRecordShard(path)  # each chunk is checked once
    for number in range(len(shard)):
        chunk = written[number // group * group :][:group]
        with pytest.raises(DamagedRecord, match=f"declares {sum(map(len, chunk))} bytes"):
            shard[number]


def test_a_record_that_unpacks_to_more_than_any_image_is_damaged_and_its_neighbours_are_not(tmp_path, monkeypatch):
    path = write_shards(tmp_path, 4, instead={2: bytes(3_000_000)}, pieces=1)[0]
    assert pathlib.Path(path).stat().st_size < 200_000
    monkeypatch.setattr(array_record, "MAX_RECORD", 1_000_000)
    shards = records.open_shards(path)
    with pytest.raises(DamagedRecord, match="record declares 3000"):
        shards[2]
    assert records.decode_record(shards[3])["source"] == "3.png"


def test_an_index_that_declares_more_than_the_file_holds_is_a_sentence(tmp_path):
    path = pathlib.Path(write_shards(tmp_path, 40, pieces=1)[0])
    data = bytearray(path.read_bytes())
    position, _ = array_record.ArrayRecordShard(str(path))._find_index()
    struct.pack_into("<Q", data, position + 32, 1 << 60)
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be opened: its index declares 1152921504606846976 bytes"):
        records.open_shards(str(path))
    for end in (b"\x80" * 9 + b"\x01", b"\xff" * 1000):  # where the index is
        last = len(data) - (1 << 16)
        data[last + 70 : last + 70 + len(end)] = end
        path.write_bytes(data)
        with pytest.raises(InputError, match="cannot be opened: its index cannot be found"):
            records.open_shards(str(path))
