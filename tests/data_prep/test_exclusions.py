"""The list of frames to leave out, and what else is left out of a build."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from data_prep import exclusions
from data_prep.exclusions import Match
from tests.data.test_fingerprints import jpeg, picture
from usfmae_jax.data import fingerprints
from usfmae_jax.errors import InputError

SHA, OTHER_SHA = "a" * 64, "0123456789abcdef" * 4
HEADER = ",".join(exclusions.COLUMNS) + "\n"


@dataclasses.dataclass
class Row:
    """What `duplicates_within` looks at."""

    frame: str
    sha256: str
    hash: str = ""
    label: int = -1
    split: str = "train"
    video: str = ""

    def __post_init__(self):
        self.video = self.video or self.frame


def hash_of(pixels):
    return fingerprints.perceptual_hash(pixels).tobytes().hex()


def within(rows):
    dropped, warnings = exclusions.duplicates_within(rows)
    return {position: reason for position, (reason, _) in dropped.items()}, warnings


def test_what_is_written_is_excluded_and_nothing_else(tmp_path):
    path = tmp_path / "leaks.csv"
    odd = 'a,"b"\nc;é.png'
    exclusions.write(
        path,
        [
            ("bus", odd, "", "patient", "bus_bra", "x.png"),
            ("bus", "", SHA, "pixels", "bus_bra", "y.png"),
            ("bus", "both.png", OTHER_SHA, "near", "mmotu", "z.png"),
        ],
    )
    found = exclusions.read(path)
    assert found.reason("bus", odd, "") == "excluded: same patient in bus_bra"
    assert found.reason("another", "another.png", SHA) == "excluded: equal pixels in bus_bra"
    assert found.reason("bus", "both.png", "f" * 64) == "excluded: near-duplicate in mmotu"
    assert found.reason("another", "another.png", OTHER_SHA) == "excluded: near-duplicate in mmotu"
    assert found.reason("bus", "x.png", "f" * 64) == ""
    assert found.reason("another", "both.png", "f" * 64) == ""
    assert found.reason("bus", "", "") == ""


def test_a_list_without_rows_excludes_nothing(tmp_path):
    exclusions.write(tmp_path / "none.csv", [])
    assert exclusions.read(tmp_path / "none.csv").reason("a", "b", SHA) == ""


def test_a_list_that_a_spreadsheet_saved_is_read(tmp_path):
    rows = f"\ufeff{HEADER}bus,a.png,{SHA},near,bus_bra,b.png\n"
    (tmp_path / "list.csv").write_bytes(rows.replace("\n", "\r\n").encode())
    assert exclusions.read(tmp_path / "list.csv").reason("bus", "a.png", "")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no list of exclusions"),
        (b"file,label\na.png,1\n", "no list of exclusions"),
        (b"\xff\xfe\x00\x01", "no CSV file"),
        (b"\x89PNG\r\n\x1a\n", "no CSV file"),
        ((HEADER + "bus,a.png\n").encode(), "line 2 has 2 values where 6 belong"),
        ((HEADER + "\n").encode(), "line 2 has 0 values where 6 belong"),
        ((HEADER + f"bus,a.png,{SHA},because,bus_bra,b.png\n").encode(), "'because' is none of patient, video"),
        ((HEADER + "bus,a.png,abc,near,bus_bra,b.png\n").encode(), "'abc' is no SHA-256"),
        ((HEADER + f"bus,a.png,{SHA.upper()},near,bus_bra,b.png\n").encode(), "is no SHA-256"),
        ((HEADER + ",a.png,,near,bus_bra,b.png\n").encode(), "neither a dataset and its frame nor a SHA-256"),
        ((HEADER + "bus,,,near,bus_bra,b.png\n").encode(), "neither a dataset and its frame nor a SHA-256"),
        ((HEADER + f"bus,a.png,{SHA},near,,b.png\n").encode(), "no name of a dataset"),
        ((HEADER + f"bus,a.png,{SHA},near,\x1b[2J,b.png\n").encode(), "no name of a dataset"),
        ((HEADER + f'bus,"a.png,{SHA},near,bus_bra,b.png\n').encode(), "no CSV file"),
    ],
)
def test_what_is_no_list_is_refused_in_one_sentence(tmp_path, content, complaint):
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as refusal:
        exclusions.read(path)
    assert "\n" not in str(refusal.value)
    assert "list.csv" in str(refusal.value)


def test_a_list_that_is_not_there_is_refused_with_what_makes_one(tmp_path):
    for path in (tmp_path / "missing.csv", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read.*--write-exclusions"):
            exclusions.read(path)


def ids(dataset="d", patient="p", video="v", source="s", frame="f", sha256="h"):
    return dataset, patient, video, source, frame, sha256


@pytest.mark.parametrize(
    ("corpus", "reason"),
    [
        (ids(), "patient"),
        (ids(patient="q"), "video"),
        (ids(patient="q", video="w"), "image"),
        (ids(patient="q", video="w", source="t"), "pixels"),
        (ids(patient="q", video="w", source="t", sha256="i"), None),
        (ids(dataset="e", sha256="i"), None),  # the same names in another dataset
        (ids(dataset="e"), "pixels"),
    ],
)
def test_the_first_thing_that_is_shared_is_the_reason(corpus, reason):
    expected = [Match(reason, 0, 0)] if reason else []
    assert list(exclusions.match_ids([corpus], [ids()])) == expected


def test_an_unknown_patient_or_video_matches_nobody():
    unknown = ids(patient="s", video="s", sha256="")
    assert list(exclusions.match_ids([unknown], [ids(patient="s", video="s", source="t")])) == []
    nameless = ids(patient="", video="", source="", sha256="")
    assert list(exclusions.match_ids([nameless], [nameless])) == []


def test_every_evaluation_set_that_leaks_is_named():
    evaluation = [ids(dataset="e"), ids(dataset="d", sha256="i"), ids(dataset="d")]
    matches = [Match("patient", 0, 1), Match("pixels", 0, 0)]
    assert list(exclusions.match_ids([ids()], evaluation)) == matches


def test_a_frame_whose_name_others_share_is_listed_by_its_pixels():
    corpus = [ids(sha256=SHA), ids(sha256=OTHER_SHA), ids(frame="g", sha256=SHA), ids(frame="h", sha256="")]
    matches = [Match("near", k, 0) for k in range(4)]
    listed = [row[:4] for row in exclusions.rows(corpus, [ids()], matches)]
    assert listed == [
        ("d", "", SHA, "near"),
        ("d", "", OTHER_SHA, "near"),
        ("d", "g", SHA, "near"),
        ("d", "h", "", "near"),
    ]


def test_the_first_of_equal_pixels_is_kept():
    rows = [Row("a", SHA), Row("b", OTHER_SHA), Row("c", SHA), Row("d", SHA, video="a")]
    assert within(rows) == ({2: "equal pixels", 3: "equal pixels"}, [])


def test_a_copy_in_the_test_split_or_with_a_label_is_kept_rather_than_the_first():
    rows = [Row("a", SHA, label=0), Row("b", SHA, split="test"), Row("c", OTHER_SHA), Row("d", OTHER_SHA, label=2)]
    dropped, warnings = within(rows)
    assert dropped == {0: "equal pixels", 2: "equal pixels"}
    assert warnings == []


def test_copies_with_two_labels_all_stay_and_a_person_is_told():
    rows = [Row("a", SHA, label=0), Row("b", SHA, label=1), Row("c", SHA, label=1), Row("d", SHA)]
    dropped, warnings = within(rows)
    assert dropped == {2: "equal pixels", 3: "equal pixels"}
    assert warnings == ["pictures with two labels, which are all kept: 1, the first 'a' and 'b'"]


def test_near_equal_pictures_of_other_videos_are_dropped_and_of_the_same_video_kept():
    original, copy, other = picture(0), jpeg(picture(0)), picture(1)
    rows = [Row(str(k), str(k) * 64, hash_of(pixels)) for k, pixels in enumerate((original, other, copy))]
    assert within(rows) == ({2: "near-equal picture"}, [])
    for row in rows:
        row.video = "one"
    assert within(rows) == ({}, [])


def test_near_equal_pictures_with_two_labels_stay():
    rows = [Row("a", "a", hash_of(picture(0)), label=0), Row("b", "b", hash_of(jpeg(picture(0))), label=1)]
    dropped, warnings = within(rows)
    assert dropped == {}
    assert len(warnings) == 1
    rows[1].sha256 = "a"  # equal pixels have equal hashes: still one pair
    assert within(rows) == ({}, warnings)


def test_what_is_near_to_a_dropped_picture_alone_stays():
    codes = np.zeros((3, 2, 256), np.uint8)
    codes[:, :, 255] = 1
    codes[1, :, :10] = 1
    codes[2, :, :20] = 1
    packed = [np.packbits(code, axis=1).tobytes().hex() for code in codes]
    rows = [Row(name, name, code) for name, code in zip("abc", packed, strict=True)]
    assert within(rows) == ({1: "near-equal picture"}, [])


def test_pictures_without_structure_or_hash_are_not_near_equal():
    black = hash_of(np.zeros((50, 50), np.uint8))
    rows = [Row("a", "a", black), Row("b", "b", black), Row("c", "c"), Row("d", "d")]
    assert within(rows) == ({}, [])
    assert within([]) == ({}, [])


@pytest.mark.parametrize("equal", [True, False], ids=["equal pixels", "near-equal pictures"])
def test_very_many_copies_take_little_memory_and_the_first_of_each_label_stays(equal):
    code = hash_of(picture(0))
    rows = [Row(f"{k}.png", SHA if equal else f"{k:064}", code, label=k % 3) for k in range(10_000)]
    tracemalloc.start()
    dropped, _ = within(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted({*range(10_000)} - dropped.keys()) == [0, 1, 2]
    assert peak < 200e6  # all pairs took gigabytes


def test_every_copy_with_a_label_of_its_own_is_not_compared_with_all():
    rows = [Row(f"{k}.png", SHA, label=k) for k in range(5000)]
    assert len(list(exclusions._equal_pairs(rows, list(range(5000))))) <= 5000 * fingerprints.COPIES
