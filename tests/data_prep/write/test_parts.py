"""Units of work: every source is used, or named with the reason, and nothing that is done is done again."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from data_prep.find.files import Rejected
from data_prep.readers import UnreadableError
from data_prep.write import parts
from tests.helpers import record
from usfmae_jax.data.records import decode_record


@dataclasses.dataclass(frozen=True)
class Made:
    """What `work.Stored` is, as far as parts look."""

    record: dict
    split: str = "train"
    channels: int = 1
    patient_known: bool = True
    hash: np.ndarray | None = None
    cleaned: dict = dataclasses.field(default_factory=lambda: {"text": 5})
    facts: dict = dataclasses.field(default_factory=lambda: {"Manufacturer": "ACME"})
    removed: dict = dataclasses.field(default_factory=lambda: {"dates": 2})
    warnings: tuple = ("odd header",)
    originals: tuple = ()
    mask_colours: tuple = ()
    mask_problem: str = ""


def process(source):
    """Sources are numbers: as many frames, the second of which is a repetition; some fail."""
    for number in range(source % 10):
        if source >= 20 and number == 2:
            raise UnreadableError("damaged") if source < 30 else KeyError("a name that must not be told")
        yield "repeated" if number == 1 else Made(record(source * 10 + number))


def write(sources, folder, given_up=None, process=process):
    part = parts.Part(7, tuple(sources))
    begun = []
    usable = parts.write_part(part, given_up or {}, begun.append, process=process, folder=str(folder))
    index = parts.read_index(folder, 7)
    stored = list(parts.read_records(folder, [parts.Index()] * 7 + [index]))
    assert [len(data) for data in stored] == [row.size for row in index.rows]
    return usable, index, [decode_record(data)["source"] for data in stored], begun


def test_a_part_holds_the_records_of_its_sources_in_order(tmp_path):
    usable, index, found, begun = write([3, 1], tmp_path)
    assert usable == 2
    assert found == ["30.png", "32.png", "10.png"]
    assert index.dropped == {"repeated": 1}
    assert index.cleaned == {"text": 15}  # frames add up
    assert index.removed == {"dates": 4}  # sources do
    assert index.warnings == {"odd header": 2}
    assert index.technical == {"Manufacturer": {"ACME": 2}}
    assert index.rows[0].patient == "p15"
    assert set(begun) == {0, 1}


def test_of_a_source_that_is_damaged_further_on_the_sound_frames_are_kept(tmp_path):
    usable, index, found, _ = write([2, 23, 34, 1], tmp_path)
    assert usable == 4
    assert found == ["20.png", "230.png", "340.png", "10.png"]
    kept = f"; {parts.KEPT}"
    assert index.rejected == [Rejected("23", "damaged" + kept), Rejected("34", "its reader failed (KeyError)" + kept)]
    assert index.dropped == {"repeated": 3}
    assert index.cleaned == {"text": 20}


def test_a_source_without_a_sound_frame_is_rejected(tmp_path):
    def unreadable(source):
        if source == 5:
            raise UnreadableError("empty file")
        yield from process(source)

    usable, index, found, _ = write([1, 5, 1], tmp_path, process=unreadable)
    assert usable == 2
    assert found == ["10.png", "10.png"]
    assert index.rejected == [Rejected("5", "empty file")]


def test_a_source_that_was_given_up_is_not_touched(tmp_path):
    usable, index, found, begun = write([2, 1, 1], tmp_path, {1: "crashed its reader (SIGSEGV)"})
    assert usable == 2
    assert found == ["20.png", "10.png"]
    assert index.rejected == [Rejected("1", "crashed its reader (SIGSEGV)")]
    assert 1 not in begun


def test_a_part_counts_as_finished_only_with_its_index(tmp_path):
    divided = parts.divide([1, 2])
    assert list(parts.finished(divided, tmp_path)) == []

    def interrupted(source):
        if source == 2:
            raise KeyboardInterrupt
        yield from process(source)

    for part in divided:
        with pytest.raises(KeyboardInterrupt) if part.number else open("/dev/null"):
            parts.write_part(part, {}, lambda _: None, process=interrupted, folder=str(tmp_path))
    assert list(parts.finished(divided, tmp_path)) == [0]


@pytest.mark.parametrize(("sources", "expected"), [(1, 1), (63, 63), (128, 64), (1875, 65), (100_000, 1563)])
def test_parts_are_many_enough_to_share_and_few_enough_to_keep(sources, expected):
    divided = parts.divide(range(sources))
    assert len(divided) == expected
    assert [one for part in divided for one in part.sources] == list(range(sources))


def test_processes_and_beam_make_the_same_parts(tmp_path):
    pipeline_options = pytest.importorskip("apache_beam.options.pipeline_options")
    divided = parts.divide([3, 24, 1, 9])
    folders = [tmp_path / name for name in ("here", "beam")]
    for folder in folders:
        folder.mkdir()
    works = [functools.partial(parts.write_part, process=process, folder=str(folder)) for folder in folders]
    made = parts.run_here(divided, works[0], 2, 30, "data_prep.write.parts")
    assert sorted((part.number, usable) for part, usable in made) == [(number, 1) for number in range(4)]
    options = pipeline_options.PipelineOptions(["--runner=DirectRunner"])
    parts.run_on_beam(divided, works[1], 30, "data_prep.write.parts", options)
    here, there = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert len(here) == 8
    assert here == there


def test_indices_survive_writing(tmp_path):
    hashed = Made(record(1), hash=np.arange(4, dtype=np.uint64), originals=(("p1", "patient", "a name"),))
    _, index, _, _ = write([1], tmp_path, process=functools.partial(_one, hashed))
    assert index.originals == {"p1": ("patient", "a name")}
    assert np.frombuffer(bytes.fromhex(index.rows[0].hash), "<u8").tolist() == [0, 1, 2, 3]


def _one(made, source):
    yield made


def test_an_index_of_an_earlier_version_is_read(tmp_path):
    _, index, _, _ = write([1], tmp_path)
    path = tmp_path / "000007.json"
    content = json.loads(path.read_text())
    del content["unmasked"], content["mask_colours"], content["number"], content["sha256"], content["checksum"]
    path.write_text(json.dumps(content))
    assert parts.read_index(tmp_path, 7) == dataclasses.replace(index, sha256="")
