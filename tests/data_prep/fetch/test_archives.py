"""Archives from strangers: what is unpacked, what is left out and named, and what is refused whole."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile

import pytest

from data_prep.fetch import archives
from usfmae_jax.errors import InputError

GOOD = {"set/a.png": b"first", "set/deep/b.png": b"second"}


def make_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def make_tar(path, members, mode="w"):
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as file:
        for name, data in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def content(folder):
    """Every file that can be seen below a folder, and what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != archives.MARKER
    }


def reasons(done):
    return {one.source: one.reason for one in done.rejected}


def test_every_kind_of_archive_gives_the_same_files(tmp_path):
    made = [make_zip(tmp_path / "a.zip", GOOD)]
    for suffix, mode in {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.items():
        made.append(make_tar(tmp_path / f"a.{suffix}", GOOD, mode))
    for number, archive in enumerate(made):
        done = archives.extract(archive, tmp_path / f"out{number}")
        assert content(tmp_path / f"out{number}") == GOOD
        assert (done.files, done.bytes, done.rejected) == (2, 11, [])


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_a_single_compressed_file_loses_its_suffix(tmp_path, suffix, compress):
    (tmp_path / f"table.csv.{suffix}").write_bytes(compress(b"x" * 1000))
    archives.extract(tmp_path / f"table.csv.{suffix}", tmp_path / "out")
    assert content(tmp_path / "out") == {"table.csv": b"x" * 1000}


def test_a_zip64_archive_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file, file.open("big.bin", "w", force_zip64=True) as member:
        member.write(b"data")
    assert archives.extract(tmp_path / "a.zip", tmp_path / "out").files == 1


def test_the_content_decides_not_the_name(tmp_path):
    archives.extract(make_tar(tmp_path / "a.zip", GOOD, "w:gz"), tmp_path / "out")
    assert content(tmp_path / "out") == GOOD


def test_a_folder_of_the_same_name_is_not_put_into_itself(tmp_path):
    archives.extract(make_zip(tmp_path / "set.zip", GOOD), tmp_path / "set")
    assert content(tmp_path / "set") == {"a.png": b"first", "deep/b.png": b"second"}


HOSTILE = ["../evil", "ok/../../evil", "/etc/evil", "C:/evil", "c:evil", "..\\evil", "ok\\..\\..\\evil", "\\evil"]


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_name_that_leads_out_of_the_folder_is_left_out_and_named(tmp_path, make):
    inside = tmp_path / "a/b/c"
    inside.mkdir(parents=True)
    done = archives.extract(make(tmp_path / "bad.archive", GOOD | dict.fromkeys(HOSTILE, b"evil")), inside / "out")
    assert content(inside / "out") == GOOD
    assert set(reasons(done)) == {f"bad.archive/{name}" for name in HOSTILE}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "bad.archive",
        "a.png",
        "b.png",
        archives.MARKER,
    }


def test_backslashes_that_stay_inside_are_folders(tmp_path):
    archives.extract(make_zip(tmp_path / "a.zip", {"Images\\": b"", "Images\\1.png": b"1"}), tmp_path / "out")
    assert content(tmp_path / "out") == {"Images/1.png": b"1"}


def test_links_and_devices_are_left_out_and_named(tmp_path):
    members = GOOD | {
        special("out", tarfile.SYMTYPE, "/etc"): b"",
        special("out/passwd", tarfile.LNKTYPE, "/etc/passwd"): b"",
        special("null", tarfile.CHRTYPE): b"",
        special("pipe", tarfile.FIFOTYPE): b"",
    }
    done = archives.extract(make_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert content(tmp_path / "out") == GOOD
    assert reasons(done) == {
        "a.tar/out": "link, not followed",
        "a.tar/out/passwd": "link, not followed",
        "a.tar/null": "not a regular file",
        "a.tar/pipe": "not a regular file",
    }


def test_a_link_in_a_zip_is_left_out_and_named(tmp_path):
    link = zipfile.ZipInfo("out")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    done = archives.extract(make_zip(tmp_path / "a.zip", GOOD | {link: b"/etc"}), tmp_path / "out")
    assert content(tmp_path / "out") == GOOD
    assert reasons(done) == {"a.zip/out": "link, not followed"}


def test_names_that_differ_only_in_case_or_are_there_twice_do_not_replace_each_other(tmp_path):
    members = {"a.png": b"1", "A.PNG": b"2", "e\u0301.png": b"3", "\u00e9.png": b"4", "f": b"5", "f/g": b"6"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a.png", b"7")
    done = archives.extract(tmp_path / "a.zip", tmp_path / "out")
    assert content(tmp_path / "out") == {"a.png": b"1", "e\u0301.png": b"3", "f": b"5"}
    assert reasons(done) == {
        "a.zip/A.PNG": "differs from 'a.png' only in case",
        "a.zip/\u00e9.png": "differs from 'e\u0301.png' only in case",
        "a.zip/f/g": "a file and a folder are called 'f'",
        "a.zip/a.png": "second of its name",
    }


def test_a_member_with_a_password_or_damage_is_named_and_the_rest_is_there(tmp_path):
    make_zip(tmp_path / "a.zip", {"ok": b"fine", "damaged": os.urandom(64), "locked": b"secret"})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        damaged = file.getinfo("damaged").header_offset
    data[data.rindex(b"locked") - 38] |= 1  # the flags of its entry in the directory
    data[damaged + 30 + len("damaged") + 20] ^= 0xFF  # a byte of its content
    (tmp_path / "a.zip").write_bytes(data)
    done = archives.extract(tmp_path / "a.zip", tmp_path / "out")
    assert content(tmp_path / "out") == {"ok": b"fine"}
    assert reasons(done)["a.zip/locked"] == "protected by a password"
    assert reasons(done)["a.zip/damaged"].startswith("cannot be read: Bad CRC-32")


def test_an_archive_with_passwords_only_is_refused_with_the_reason(tmp_path):
    make_zip(tmp_path / "a.zip", {"locked": b"secret"})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.rindex(b"locked") - 38] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"nothing in a\.zip .*password"):
        archives.extract(tmp_path / "a.zip", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_bytes_that_are_no_text_are_escaped_in_names(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as file:
        for name in ("\udcd6\udcd0.png", "line\nbreak", "\u4e2d.png"):
            file.addfile(tarfile.TarInfo(name))
    archives.extract(tmp_path / "a.tar", tmp_path / "out")
    assert set(content(tmp_path / "out")) == {"%D6%D0.png", "line%0Abreak", "\u4e2d.png"}


def test_utf8_names_of_a_zip_that_does_not_declare_them_are_read(tmp_path):
    make_zip(tmp_path / "a.zip", {"aaa.png": b"1", "bbb.png": b"2"})
    data = (tmp_path / "a.zip").read_bytes()
    data = data.replace(b"aaa", "\u4e2d".encode()).replace(b"bbb", b"\xd6\xd0b")
    (tmp_path / "a.zip").write_bytes(data)
    archives.extract(tmp_path / "a.zip", tmp_path / "out")
    assert set(content(tmp_path / "out")) == {"\u4e2d.png", "%D6%D0b.png"}


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "gz"])
def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(archives, "_SMALL", 1 << 20)
    zeros, path = bytes(8 << 20), tmp_path / f"bomb.{suffix}"
    if suffix == "gz":
        path.write_bytes(gzip.compress(zeros))
    else:
        make_zip(path, {"zeros": zeros}) if suffix == "zip" else make_tar(path, {"zeros": zeros}, "w:gz")
    with pytest.raises(InputError, match="would unpack to more than 200 times its size"):
        archives.extract(path, tmp_path / "out")
    assert os.listdir(tmp_path) == [path.name]


def test_a_bomb_of_empty_files_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_SMALL", 1 << 20)
    make_tar(tmp_path / "bomb.tar.xz", {str(number): b"" for number in range(1000)}, "w:xz")
    with pytest.raises(InputError, match="would unpack to more than 200 times its size"):
        archives.extract(tmp_path / "bomb.tar.xz", tmp_path / "out")
    assert os.listdir(tmp_path) == ["bomb.tar.xz"]


def test_a_file_inside_of_very_many_folders_is_left_out_and_named(tmp_path):
    make_zip(tmp_path / "a.zip", {"good.txt": b"1", "/".join(["d"] * 1000) + "/f": b"2"})
    done = archives.extract(tmp_path / "a.zip", tmp_path / "a")
    assert list(reasons(done).values()) == ["inside of more than 31 folders"]
    assert content(tmp_path / "a") == {"good.txt": b"1"}


def test_folders_and_names_take_room_like_files(tmp_path, monkeypatch):
    members = {"/".join([f"{number}", *"abcdefghij", "f"]): b"" for number in range(50)}
    make_zip(tmp_path / "a.zip", members)
    monkeypatch.setattr(archives, "_SMALL", 500 * archives._BLOCK)
    monkeypatch.setattr(archives, "_RATIO", 1)
    with pytest.raises(InputError, match="would unpack to more than"):  # 50 files, 550 folders
        archives.extract(tmp_path / "a.zip", tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr(archives._Budget, "names", 1000)
    monkeypatch.setattr(archives._Budget.__init__, "__defaults__", (1000,))
    with pytest.raises(InputError, match="has names of more than"):
        archives.extract(tmp_path / "a.zip", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_members_that_share_their_bytes_are_refused(tmp_path):
    make_zip(tmp_path / "a.zip", {"x": os.urandom(5000)})
    data = (tmp_path / "a.zip").read_bytes()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[start:end]
    record = bytearray(data[end:])
    struct.pack_into("<HHL", record, 8, 100, 100, 100 * len(entry))
    (tmp_path / "a.zip").write_bytes(data[:start] + 100 * entry + record)
    with pytest.raises(InputError, match="members overlap"):
        archives.extract(tmp_path / "a.zip", tmp_path / "out")


def test_an_archive_larger_than_the_free_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", GOOD)
    monkeypatch.setattr(archives, "_write", None)  # would fail if it were called
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: shutil_usage(archives._RESERVE + 10))
    with pytest.raises(InputError, match="more than the disk has room for"):
        archives.extract(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.zip"]


def shutil_usage(free):
    return type("Usage", (), {"free": free})


def test_a_tar_header_that_is_larger_than_memory_allows_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_HEADER", archives._CHUNK)
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 4 << 20
    (tmp_path / "a.tgz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(5 << 20)))
    with pytest.raises(InputError, match="a header is longer than any header"):
        archives.extract(tmp_path / "a.tgz", tmp_path / "out")


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.xz"])
def test_a_truncated_archive_is_refused_and_leaves_nothing(tmp_path, suffix):
    members = {str(number): os.urandom(2000) for number in range(5)}
    path = tmp_path / f"a.{suffix}"
    make_zip(path, members) if suffix == "zip" else make_tar(path, members, f"w:{suffix[4:]}")
    path.write_bytes(path.read_bytes()[:6700])
    with pytest.raises(InputError, match="damaged or incomplete"):
        archives.extract(path, tmp_path / "out")
    assert os.listdir(tmp_path) == [path.name]


def test_a_tar_with_a_broken_header_in_the_middle_is_refused(tmp_path):
    make_tar(tmp_path / "a.tar", {"1": b"one", "2": b"two"})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match="damaged or incomplete"):
        archives.extract(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "data", "tool"),
    [
        ("a.rar", b"Rar!\x1a\x07\x01\x00", "unrar x a.rar"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c\x00", "7z x a.7z"),
        ("a.z01", b"PK\x07\x08PK\x03\x04", "7z x a.z01"),
        ("a.zip.001", b"PK\x03\x04", "7z x a.zip.001"),
        ("a.zip", b"PK\x03\x04PK\x05\x06" + struct.pack("<HH", 3, 3) + bytes(14), "7z x a.zip"),
    ],
)
def test_archives_that_need_another_tool_say_which(tmp_path, name, data, tool):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=tool):
        archives.extract(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"PK", b"<html>log in</html>", bytes(1024)])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.zip is no archive"):
        archives.extract(tmp_path / "a.zip", tmp_path / "out")


def test_archives_inside_are_unpacked_only_when_told(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", {"x.png": b"x", "../evil": b"evil"}).read_bytes()
    sheet = make_zip(tmp_path / "sheet.xlsx", {"cells": b"1"}).read_bytes()
    members = {
        "deep/inner.zip": inner,
        "deep/old.rar": b"Rar!\x1a\x07",
        "table.xlsx": sheet,
        "scan.nii.gz": b"\x1f\x8b",
    }
    outer = make_zip(tmp_path / "outer.zip", members)
    archives.extract(outer, tmp_path / "flat")
    assert content(tmp_path / "flat") == members
    done = archives.extract(outer, tmp_path / "all", nested=True)
    assert set(content(tmp_path / "all")) == {"deep/inner/x.png", "deep/old.rar", "table.xlsx", "scan.nii.gz"}
    assert done.files == 4
    assert set(reasons(done)) == {"outer.zip/deep/inner.zip/../evil", "outer.zip/deep/old.rar"}
    assert "unrar x" in reasons(done)["outer.zip/deep/old.rar"]


def test_a_kill_in_the_middle_leaves_nothing_half_and_the_next_run_cleans_up(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "rmtree", lambda *_, **__: None)  # as if killed: no clean-up runs
        patch.setattr(archives.json, "dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            archives.extract(archive, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.incomplete", "a.zip"]
    archives.extract(archive, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "out"]
    assert content(tmp_path / "out") == GOOD


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(InputError, match="in the way"):
        archives.extract(make_zip(tmp_path / "a.zip", GOOD), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_the_same_archive_gives_files_of_the_same_times(tmp_path):
    archive = make_zip(tmp_path / "a.zip", GOOD)
    for name in ("one", "two"):
        archives.extract(archive, tmp_path / name)
    one, two = ((tmp_path / name / "set/a.png").stat() for name in ("one", "two"))
    assert one.st_mtime_ns == two.st_mtime_ns


def test_the_folder_remembers_what_was_left_out(tmp_path):
    archive = make_zip(tmp_path / "a.zip", GOOD | {"../evil": b""})
    archives.extract(archive, tmp_path / "out", note={"sha256": "0"})
    assert json.loads((tmp_path / "out" / archives.MARKER).read_text()) == {
        "files": 2,
        "rejected": [["a.zip/../evil", "name that leads out of the folder"]],
        "sha256": "0",
    }


@pytest.mark.parametrize("numbers", [range(60), pytest.param(range(60, 600), marks=pytest.mark.slow)], ids=len)
def test_no_mutation_of_an_archive_crashes_or_writes_outside(tmp_path, numbers):
    sources = [make_zip(tmp_path / "0", GOOD), make_tar(tmp_path / "1", GOOD), make_tar(tmp_path / "2", GOOD, "w:gz")]
    originals = [source.read_bytes() for source in sources]
    for source in sources:
        source.unlink()
    outcomes = set()
    for number in numbers:
        data = bytearray(originals[number % 3])
        for step in range(1 + number % 4):
            data[(number * 7919 + step * 104729) % len(data)] = (number * 31 + step * 17) % 256
        (tmp_path / "a").write_bytes(data)
        try:
            archives.extract(tmp_path / "a", tmp_path / "out")
            outcomes.add("opened")
            archives.shutil.rmtree(tmp_path / "out")
        except InputError:
            outcomes.add("refused")
        assert os.listdir(tmp_path) == ["a"]
    assert outcomes == {"opened", "refused"}
