"""Tables of frames for tests: in memory, or from shards."""

import pathlib
from collections.abc import Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from tests.helpers import record
from usfmae_jax.data import records
from usfmae_jax.data.table import Table


def write_records(
    folder: pathlib.Path, written: Sequence[records.Record], name: str = "made", split: str = "train"
) -> pathlib.Path:
    """Writes one shard, beside whatever else the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
    for one in written:
        writer.write(records.encode_record(one))
    writer.close()
    return folder


def write_classes(folder: pathlib.Path, names: Sequence[str]) -> None:
    (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in names))


def made(count: int, first: int = 0, **fields: object) -> list[records.Record]:
    """Records of `helpers.record`, each with its own frame name."""
    return [record(i, **({"frame": f"f{i}"} | fields)) for i in range(first, first + count)]


def table(patient: Sequence[object], label: Sequence[int], classes: int = 2, **columns: Sequence[object]) -> Table:
    """A table without shards: ids of patients as they come, every frame its own video."""
    count = len(patient)
    names = [f"f{i}" for i in range(count)]
    texts = {"dataset": ["made"] * count, "video": names, "frame": names, "source": names} | columns
    texts |= {"patient": patient, "split": columns.get("split", ["train"] * count), "sha256": names}
    return Table(
        records.Shards([]),
        np.arange(count),
        np.asarray(label, np.int64),
        np.zeros((count, 32), np.uint8),
        **{name: np.asarray([str(value) for value in values], np.str_) for name, values in texts.items()},
        label_names=tuple("abcdefgh"[:classes]),
    )
