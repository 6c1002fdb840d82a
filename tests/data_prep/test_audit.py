"""The audit door: what of an evaluation set is in a corpus."""

import csv
import os
import pathlib
import re
import shutil

import cv2
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep import audit, exclusions
from tests.data.test_fingerprints import annotated, cropped, jpeg, on_screen, picture, resized
from usfmae_jax.data import records
from usfmae_jax.data.tfrecord import frame_tfrecord

DATA = pathlib.Path(os.environ.get("ULTRASOUND_DATA", pathlib.Path(__file__).parents[3] / "shared" / "ultrasound"))
BLACK = np.zeros((60, 80), np.uint8)


def record(name, pixels, dataset="one", **fields):
    """A still of an unknown patient, unless the fields say otherwise."""
    own = {"dataset": dataset, "patient": name, "video": name, "frame": name, "source": name}
    encoded = cv2.imencode(".png", pixels)[1].tobytes()
    shape = {"height": pixels.shape[0], "width": pixels.shape[1], "sha256": records.pixel_hash(pixels)}
    return records.FIELDS | {"image": encoded} | shape | own | fields


def write(folder, *made, name="one", split="train", kind="array_record"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{split}.{kind}-00000-of-00001"
    if kind == "tfrecord":
        path.write_bytes(b"".join(frame_tfrecord(records.encode_record(one)) for one in made))
        return str(folder)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for one in made:
        writer.write(records.encode_record(one))
    writer.close()
    return str(folder)


def run(capsys, *flags, workers=1):
    """(status, stdout, stderr without the progress bars)."""
    status = audit.main([*flags, f"--workers={workers}"])
    out, err = capsys.readouterr()
    lines = re.split("[\r\n]", err)
    said = [line for line in lines if line.startswith("error") or (line and "%|" not in line and "?" not in line)]
    return status, out.splitlines(), said


def listed(path):
    with path.open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


@pytest.fixture
def evaluation(tmp_path):
    """Frames a and b of patient p, a of video v."""
    return write(
        tmp_path / "evaluation",
        record("a.png", picture(0), patient="p", video="v"),
        record("b.png", picture(1), patient="p"),
    )


def test_nothing_in_common_is_one_line_and_status_0(tmp_path, capsys, evaluation):
    corpus = write(tmp_path / "corpus", record("c.png", picture(2)), record("d.png", picture(3), patient="q"))
    status, out, err = run(capsys, f"--shards={corpus}", f"--against={evaluation}")
    assert (status, err) == (0, [])
    assert out == [
        "no evaluation patient, video, image or near-duplicate among 2 frames of the corpus and 2 of evaluation sets"
    ]


def test_pictures_that_are_near_by_chance_are_not_alike(tmp_path, capsys, evaluation):
    corpus = write(tmp_path / "corpus", *(record(f"c{k}.png", picture(k)) for k in range(2, 12)))
    path = tmp_path / "leaks.csv"
    flags = f"--shards={corpus}", f"--against={evaluation}", f"--write-exclusions={path}"
    assert audit.main([*flags, "--radius=128", "--workers=1"]) == 0  # half of all pairs are near
    out, err = capsys.readouterr()
    assert out.startswith("no evaluation patient")
    assert re.search(r"candidates: 100%.* (\d+)/\1 ", err)
    assert listed(path) == []


LEAKS = {
    "same patient": record("c.png", picture(2), patient="p"),
    "same video": record("c.png", picture(2), video="v"),
    "same source file": record("a.png", picture(2)),
    "equal pixels": record("c.png", picture(0), dataset="other"),
    "near-duplicate": record("c.png", jpeg(resized(picture(0), 0.5)), dataset="other"),
}


@pytest.mark.parametrize("reason", LEAKS)
def test_every_kind_of_leak_is_a_line_of_the_table_and_status_1(tmp_path, capsys, evaluation, reason):
    corpus = write(tmp_path / "corpus", record("x.png", picture(7)), LEAKS[reason])
    status, out, _ = run(capsys, f"--shards={corpus}", f"--against={evaluation}")
    assert status == 1
    leak = LEAKS[reason]
    row = f"one {reason} 1 {leak['dataset']} {leak['frame']}, one a.png"
    assert out[0].split() == ["evaluation", "set", "because", "of", "frames", "example"]
    assert [" ".join(line.split()) for line in out[1:2]] == [row]
    assert out[3].startswith("1 frames of the corpus belong to evaluation sets, of 2 frames")


@pytest.mark.parametrize("treat", [cropped, on_screen, annotated], ids=["cropped", "on a screen", "annotated"])
def test_a_treated_copy_is_a_near_duplicate(tmp_path, capsys, evaluation, treat):
    corpus = write(tmp_path / "corpus", record("c.png", treat(picture(1)), dataset="other"))
    status, out, _ = run(capsys, f"--shards={corpus}", f"--against={evaluation}")
    assert status == 1
    assert " ".join(out[1].split()) == "one near-duplicate 1 other c.png, one b.png"


def test_the_list_holds_every_frame_once_with_its_first_reason_and_build_can_read_it(tmp_path, capsys, evaluation):
    corpus = write(
        tmp_path / "corpus",
        record("a.png", picture(0), patient="p"),  # patient, image and pixels
        record("p2.png", picture(4), patient="p"),
        record("p3.png", picture(5), patient="p"),
        record("kept.png", picture(6)),
        record("copy.png", jpeg(picture(1)), dataset="other"),
    )
    path = tmp_path / "leaks.csv"
    status, out, _ = run(capsys, f"--shards={corpus}", f"--against={evaluation}", f"--write-exclusions={path}")
    assert status == 1
    assert out[-1] == f"Leave them out:  python -m data_prep.build --exclude={path} ..."
    rows = [(row[0], row[1], *row[3:]) for row in listed(path)]
    assert rows == [
        ("one", "a.png", "patient", "one", "a.png"),
        ("one", "p2.png", "patient", "one", "a.png"),
        ("one", "p3.png", "patient", "one", "a.png"),
        ("other", "copy.png", "near", "one", "b.png"),
    ]
    found = exclusions.read(path)
    assert found.reason("one", "p3.png", "") == "excluded: same patient in one"
    assert found.reason("one", "kept.png", records.pixel_hash(picture(6))) == ""
    assert found.reason("renamed", "renamed", records.pixel_hash(picture(4)))


def test_a_list_is_written_even_if_there_is_nothing_on_it(tmp_path, capsys, evaluation):
    corpus = write(tmp_path / "corpus", record("c.png", picture(2)))
    path = tmp_path / "leaks.csv"
    assert run(capsys, f"--shards={corpus}", f"--against={evaluation}", f"--write-exclusions={path}")[0] == 0
    assert listed(path) == []
    exclusions.read(path)


def test_an_unknown_patient_of_the_same_dataset_is_no_leak(tmp_path, capsys):
    evaluation = write(tmp_path / "evaluation", record("a.png", picture(0)), record("", picture(1), patient=""))
    corpus = write(tmp_path / "corpus", record("b.png", picture(2)), record("", picture(3), patient=""))
    assert run(capsys, f"--shards={corpus}", f"--against={evaluation}")[0] == 0


def test_black_frames_do_not_resemble_each_other(tmp_path, capsys):
    evaluation = write(tmp_path / "evaluation", record("a.png", BLACK))
    corpus = write(tmp_path / "corpus", record("b.png", BLACK[:50]), dataset := record("c.png", BLACK[:40]))
    assert dataset["sha256"] != records.pixel_hash(BLACK)
    assert run(capsys, f"--shards={corpus}", f"--against={evaluation}")[0] == 0


def test_damaged_records_are_counted_and_named_and_their_ids_still_compared(tmp_path, capsys, evaluation):
    corpus = write(
        tmp_path / "corpus",
        record("x.png", picture(7)),
        record("c.png", picture(2), image=b"\xff\xd8\xff broken", patient="p"),
        record("d.png", picture(3), image=b"no image"),
        record("e.png", jpeg(picture(0))),
    )
    status, out, err = run(capsys, f"--shards={corpus}", f"--against={evaluation}")
    assert status == 1
    assert [line.split()[1] for line in out[1:3]] == ["near-duplicate", "same"]
    assert err[0] == "corpus: 2 damaged records, compared by what is left of them:"
    assert [line.split(":")[0] for line in err[1:]] == [
        f"  number {k} of one-train.array_record-00000-of-00001" for k in (1, 2)
    ]


def test_records_that_cannot_be_parsed_are_not_fatal(tmp_path, capsys, evaluation):
    corpus = write(tmp_path / "corpus", record("x.png", picture(7)), record("a.png", picture(0)), kind="tfrecord")
    path = next(pathlib.Path(corpus).iterdir())
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF  # inside the first record, whose checksum says so
    path.write_bytes(data)
    status, out, err = run(capsys, f"--shards={corpus}", f"--against={evaluation}")
    assert status == 1
    assert err[0].startswith("corpus: 1 damaged records")
    assert out[-2].startswith("1 frames of the corpus belong to evaluation sets, of 1 frames of the corpus")


def test_records_that_crashed_their_decoder_are_damaged_ones(evaluation):
    path = str(next(pathlib.Path(evaluation).iterdir()))
    began = []
    numbers, ids, codes, damaged = audit._scan((path, 0, 2), {0: "crashed its reader"}, began.append)
    assert (numbers, began, codes.shape) == ([1], [0, 1], (1, 8))
    assert [one[4] for one in ids] == ["b.png"]
    assert damaged == ["number 0 of one-train.array_record-00000-of-00001: crashed its reader"]
    pairs = [(path, 0, path, 0), (path, 1, path, 1)]
    alike = audit._compare(pairs, {0: "crashed its reader"}, began.append)
    assert alike == [pytest.approx(float("nan"), nan_ok=True), pytest.approx(1, abs=0.01)]


def test_splits_lists_and_globs_choose_what_is_compared(tmp_path, capsys):
    folder = tmp_path / "evaluation"
    write(folder, record("a.png", picture(0)), split="train")
    evaluation = write(folder, record("b.png", picture(1)), split="test")
    corpus = write(tmp_path / "corpus" / "x", record("c.png", picture(0)))
    more = write(tmp_path / "corpus" / "y", record("d.png", picture(3)), name="two")
    assert run(capsys, f"--shards={corpus},{more}", f"--against={evaluation}:test")[0] == 0
    assert run(capsys, f"--shards={corpus},{more}", f"--against={evaluation}:train")[0] == 1
    assert run(capsys, f"--shards={corpus},{more}", f"--against={evaluation}")[0] == 1
    assert run(capsys, f"--shards={tmp_path}/corpus/*", f"--against={evaluation}")[0] == 1
    assert run(capsys, f"--shards={more}", f"--against={evaluation}:test, {evaluation}:train")[0] == 0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--shards={one}", "--against={none}"], "no shards match"),
        (["--shards={one}:test", "--against={one}"], "has no split 'test', only ['train']"),
        (["--shards={one}", "--against={one}", "--radius=200"], "--radius=200 must be from 0 to 128"),
        (["--shards={one}", "--against={one}", "--radius=x"], "invalid int value"),
        (["--shards={one}", "--write-exclusions=x.csv"], "--write-exclusions needs --against"),
        (
            ["--shards={one}", "--against={one}", "--write-exclusions={none}/x.csv"],
            "is no file in a folder that exists",
        ),
        (["--shards={one}", "--against={one}", "--write-exclusions={one}"], "is no file in a folder that exists"),
        (["--against={one}"], "required: --shards"),
        (["--shards={one}", "--agains={one}"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, flags, complaint):
    one = write(tmp_path / "one", record("a.png", picture(0)))
    status, out, err = run(capsys, *(flag.format(one=one, none=tmp_path / "none") for flag in flags))
    assert (status, out) == (2, [])
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert complaint in err[0]


def test_without_evaluation_sets_duplicates_inside_and_across_datasets_are_shown(tmp_path, capsys):
    one = write(
        tmp_path / "one",
        record("a.png", picture(0), patient="p"),
        record("b.png", picture(0), patient="p"),
        record("c.png", jpeg(picture(0)), patient="p"),
        record("d.png", picture(1), video="v"),
        record("e.png", jpeg(picture(1)), video="v"),  # neighbours in a clip
    )
    two = write(tmp_path / "two", record("f.png", resized(picture(1), 0.5), "two"), name="two")
    status, out, _ = run(capsys, f"--shards={one},{two}")
    assert status == 0
    assert [" ".join(line.split()) for line in out] == [
        "datasets what same frames example",
        "one equal pixels patient 1 one b.png, one a.png",
        "one near-duplicate patient 1 one c.png, one a.png",
        "one and two near-duplicate - 1 two f.png, one d.png",
        "3 of 6 frames show what an earlier one shows",
    ]


def test_without_duplicates_there_is_one_line(tmp_path, capsys):
    one = write(tmp_path / "one", record("a.png", picture(0)), record("b.png", picture(1)))
    assert run(capsys, f"--shards={one}")[:2] == (0, ["0 of 2 frames show what an earlier one shows"])


def test_the_number_of_workers_and_tasks_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "_RECORDS", 3)
    monkeypatch.setattr(audit, "_PAIRS", 2)
    evaluation = write(tmp_path / "evaluation", *(record(f"{k}.png", picture(k)) for k in range(8)))
    copies = [record(f"copy {k}.png", jpeg(cropped(picture(k))), "two") for k in range(4, 12)]
    corpus = write(tmp_path / "corpus", *copies)
    answers = []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.csv"
        flags = f"--shards={corpus}", f"--against={evaluation}", f"--write-exclusions={path}"
        status, out, _ = run(capsys, *flags, workers=workers)
        answers.append((status, out[:-1], path.read_bytes()))
    assert answers[0] == answers[1]
    assert [row[1] for row in listed(path)] == [f"copy {k}.png" for k in range(4, 8)]


def test_tasks_that_are_finished_in_another_order_change_nothing(tmp_path, capsys, monkeypatch):
    def backwards(function, tasks, *_, **__):
        return reversed([(number, function(task, {}, lambda _: None)) for number, task in enumerate(tasks)])

    monkeypatch.setattr(audit, "_RECORDS", 2)
    monkeypatch.setattr(audit, "_PAIRS", 1)
    monkeypatch.setattr(audit.isolate, "isolated_map", backwards)
    evaluation = write(tmp_path / "evaluation", *(record(f"{k}.png", picture(k)) for k in range(6)))
    corpus = write(tmp_path / "corpus", *(record(f"copy {k}.png", jpeg(picture(k)), "two") for k in range(3, 9)))
    path = tmp_path / "leaks.csv"
    run(capsys, f"--shards={corpus}", f"--against={evaluation}", f"--write-exclusions={path}")
    assert [(row[1], row[5]) for row in listed(path)] == [(f"copy {k}.png", f"{k}.png") for k in range(3, 6)]


def test_names_from_strangers_do_not_steer_the_terminal(tmp_path, capsys, evaluation):
    corpus = write(tmp_path / "corpus", record("\x1b[2J\n.png", picture(0), dataset="o\x07ther"))
    status, out, _ = run(capsys, f"--shards={corpus}", f"--against={evaluation}")
    assert status == 1
    assert " ".join(out[1].split()) == r"one equal pixels 1 o\u0007ther \u001b[2J\u000a.png, one a.png"


@pytest.fixture(scope="module")
def bus_bra(tmp_path_factory):
    """Three folders of shards, stored at half the size: all of BUS-BRA, and patients with even and odd numbers."""
    folder = DATA / "BUS-BRA"
    if not folder.is_dir():
        pytest.skip("needs the public dataset BUS-BRA; ULTRASOUND_DATA names the folder that holds it")
    made = []
    with (folder / "bus_data.csv").open() as table:
        for row in csv.DictReader(table):
            path = f"Images/{row['ID']}.png"
            pixels = records.decode_image((folder / path).read_bytes())
            stored = cv2.imencode(".bmp", cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))[1]
            ids = {"dataset": "bus_bra", "patient": row["Case"], "video": path, "frame": path, "source": path}
            made.append(records.FIELDS | {"image": stored.tobytes(), "sha256": records.pixel_hash(pixels)} | ids)
    target = tmp_path_factory.mktemp("bus_bra")
    halves = [[one for one in made if int(one["patient"]) % 2 == k] for k in (0, 1)]
    return [write(target / str(k), *some) for k, some in enumerate((made, *halves))]


def test_halves_of_bus_bra_share_no_patient_but_six_frames_that_it_holds_under_two_numbers(bus_bra, tmp_path, capsys):
    _, even, odd = bus_bra
    path = tmp_path / "leaks.csv"
    status, out, _ = run(capsys, f"--shards={even}", f"--against={odd}", f"--write-exclusions={path}", workers=2)
    assert status == 1
    assert out[1].split()[:3] == ["bus_bra", "near-duplicate", "6"]
    assert len(out) == 5  # no other reason
    found = {(row[1][11:17], row[5][11:17]) for row in listed(path)}
    assert found == {
        (f"{a}-{view}", f"{b}-{view}")
        for a, b in (("0044", "0065"), ("0056", "0091"), ("0356", "0341"))
        for view in "lr"
    }


def test_all_of_bus_bra_finds_itself(bus_bra, tmp_path, capsys):
    path = tmp_path / "leaks.csv"
    shutil.copytree(bus_bra[0], tmp_path / "copy")
    flags = f"--shards={tmp_path / 'copy'}", f"--against={bus_bra[0]}", f"--write-exclusions={path}"
    status, out, _ = run(capsys, *flags, workers=2)
    assert status == 1
    assert out[1].split()[:4] == ["bus_bra", "same", "patient", "1,875"]
    assert len({row[1] for row in listed(path)}) == 1875


def test_shards_are_not_compared_with_themselves(tmp_path, capsys):
    corpus = write(tmp_path / "data" / "one", record("a.png", picture(0)))
    evaluation = write(tmp_path / "data" / "two", record("b.png", picture(1), "two"), name="two")
    assert run(capsys, f"--shards={tmp_path}/data/*", f"--against={evaluation}")[0] == 0
    assert run(capsys, f"--shards={evaluation}", f"--against={evaluation}")[0] == 2
    assert run(capsys, f"--shards={corpus}", f"--against={evaluation}")[0] == 0


def test_a_resized_and_recompressed_copy_of_hc18_is_found(tmp_path, capsys):
    paths = sorted((DATA / "HC18/training/image").glob("*.png"))[:20]
    if not paths:
        pytest.skip("needs the public dataset HC18; ULTRASOUND_DATA names the folder that holds it")
    heads = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in paths]
    evaluation = write(tmp_path / "a", *(record(path.name, head) for path, head in zip(paths, heads, strict=True)))
    copies = [record(path.name, jpeg(resized(head, 0.4), 60), "two") for path, head in zip(paths, heads, strict=True)]
    corpus = write(tmp_path / "b", *copies)
    status, out, _ = run(capsys, f"--shards={corpus}", f"--against={evaluation}")
    assert status == 1
    assert out[1].split()[:3] == ["one", "near-duplicate", "20"]
