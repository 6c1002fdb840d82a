"""Pseudonyms, the secret behind them, and the table that leads them back."""

import csv
import multiprocessing
import os
import stat

import pytest

from data_prep import identity
from usfmae_jax.errors import InputError

SALT = bytes(range(32))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(identity.VARIABLE, raising=False)
    return tmp_path


def write_salt(path, data=SALT, mode=0o600):
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_a_pseudonym_is_the_hmac_of_the_kind_and_the_value():
    # printf 'patient\0001234' | openssl dgst -sha256 -mac HMAC -macopt hexkey:000102...1f
    assert identity.pseudonym(SALT, "patient", "1234") == "p4e549312ab8bc550"


def test_the_same_value_has_unrelated_pseudonyms_by_kind_and_salt():
    names = [identity.pseudonym(SALT, kind, "1234") for kind in identity.PREFIXES]
    names.append(identity.pseudonym(bytes(32), "patient", "1234"))
    assert len({name[1:] for name in names}) == 4
    assert [name[0] for name in names] == ["p", "v", "f", "p"]
    assert all(len(name) == 17 for name in names)


def test_values_that_are_no_text_have_pseudonyms_too():
    assert identity.pseudonym(SALT, "video", "a\udcff") != identity.pseudonym(SALT, "video", "a\udcfe")


def test_unknown_patients_do_not_become_one():
    with pytest.raises(ValueError, match="unknown"):
        identity.pseudonym(SALT, "patient", "")


def test_what_is_sealed_is_read_with_the_same_salt_only():
    text = '{"patient": "Doe\\u00e9 \U0001f600"}' * 100
    sealed = identity.seal(SALT, text)
    assert identity.unseal(SALT, sealed) == text
    assert identity.unseal(SALT, identity.seal(SALT, "")) == ""
    assert b"patient" not in sealed
    assert sealed != identity.seal(SALT, text)
    for salt, data in (
        (SALT[1:], sealed),
        (SALT, sealed[:-1]),
        (SALT, b""),
        (SALT, bytes([sealed[0] ^ 1]) + sealed[1:]),
    ):
        with pytest.raises(ValueError, match="sealed with another salt"):
            identity.unseal(salt, data)


@pytest.mark.parametrize(
    ("manufacturer", "shown"),
    [
        ("GE Vingmed Ultrasound", "GE"),
        ("Philips Medical Systems", "Philips"),
        ("SAMSUNG MEDISON CO.,LTD.", "SAMSUNG"),
        ("ZEBEDEE^Jane", "other"),
        ("19560708", "other"),
        ("Philips QQ-4711", "other"),
    ],
)
def test_a_manufacturer_is_a_known_one_or_other(manufacturer, shown):
    assert identity.public_facts({"Manufacturer": manufacturer}, ["QQ-4711"]) == {"Manufacturer": shown}


@pytest.mark.parametrize("name", ["ManufacturerModelName", "TransducerType"])
@pytest.mark.parametrize(
    "value", ["LOGIQ E9", "iU22", "EPIQ 7C", "Voluson E10", "RS80A", "C5-1", "SECTOR_PHASED", "9L"]
)
def test_what_is_shaped_as_models_are_is_shown(name, value):
    assert identity.public_facts({name: value}, ["QQ-4711", ""]) == {name: value}


@pytest.mark.parametrize(
    "value",
    [
        *(
            "ZEBEDEE^Jane",
            "Jane Zebedee",
            "Zebedee",
            "QQ-4711",
            "qq 4711",
            "LOGIQ QQ4711",
            "19560708",
            "12345",
            "E1 2 3 45",
        ),
        *("1956-07-08", "08.07.56", "LOGIQ E9 Zebedee", "=E1", "X\u00e9 1"),
    ],
)
def test_what_may_be_a_person_in_the_name_of_a_model_is_not(value):
    facts = {"ManufacturerModelName": value, "Rows": "600"}
    assert identity.public_facts(facts, ["QQ-4711"]) == {"ManufacturerModelName": "other", "Rows": "600"}


def test_what_one_file_alone_says_is_other():
    assert identity.without_single({"E9": 2, "QQ 1": 1, "QQ 2": 1}) == {"E9": 2, "other": 2}
    assert identity.without_single({"E9": 2, "other": 1}) == {"E9": 2, "other": 1}


def test_the_fingerprint_tells_salts_apart_and_is_no_part_of_them():
    assert identity.salt_fingerprint(SALT) != identity.salt_fingerprint(SALT[1:])
    assert identity.salt_fingerprint(SALT) == identity.salt_fingerprint(SALT)
    assert bytes.fromhex(identity.salt_fingerprint(SALT)) not in SALT


def test_the_salt_is_made_at_its_first_use_and_stays(home):
    salt = identity.load_salt()
    file = home / ".config/usfmae_jax/salt"
    assert len(salt) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert identity.load_salt() == salt
    assert [path.name for path in file.parent.iterdir()] == ["salt"]


def test_two_builds_at_first_use_have_one_salt(home):
    file = home / "salt"
    identity._create(file)
    salt = file.read_bytes()
    identity._create(file)
    assert file.read_bytes() == salt


def test_the_variable_names_another_salt_and_the_argument_overrides_it(home, monkeypatch):
    monkeypatch.setenv(identity.VARIABLE, write_salt(home / "mine"))
    assert identity.load_salt() == SALT
    assert identity.load_salt(write_salt(home / "other", SALT[:20])) == SALT[:20]
    assert not (home / ".config").exists()


def test_a_salt_that_was_named_but_is_not_there_is_not_made(home, monkeypatch):
    monkeypatch.setenv(identity.VARIABLE, str(home / "mistyped"))
    with pytest.raises(InputError, match=r"mistyped cannot be used: No such file.*head -c 32 /dev/urandom"):
        identity.load_salt()
    assert not (home / "mistyped").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_salt_that_others_can_open_is_refused(tmp_path, mode):
    with pytest.raises(InputError, match="open to others than its owner; close it with: chmod 600"):
        identity.load_salt(write_salt(tmp_path / "salt", mode=mode))


def test_a_salt_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(InputError, match="has 15 bytes, expected 16 or more"):
        identity.load_salt(write_salt(tmp_path / "salt", SALT[:15]))


@pytest.mark.parametrize("salt", [b"a" * 16, b"ab" * 100, bytes(4096)])
def test_a_salt_that_can_be_guessed_is_refused(tmp_path, salt):
    with pytest.raises(InputError, match="different bytes, expected 8 or more; make one with"):
        identity.load_salt(write_salt(tmp_path / "salt", salt))


def test_a_salt_that_would_be_handed_on_is_refused(home, monkeypatch):
    (home / "out/x").mkdir(parents=True)
    (home / "link").symlink_to(home / "out")
    for path in ("out/salt", "out/x/salt", "link/salt"):
        write_salt(home / path)
        with pytest.raises(InputError, match="would be handed on"):
            identity.load_salt(str(home / path), str(home / "out"))
    monkeypatch.setenv(identity.VARIABLE, str(home / "out/salt"))
    with pytest.raises(InputError, match="would be handed on"):
        identity.load_salt(output=str(home / "out"))
    monkeypatch.delenv(identity.VARIABLE)
    with pytest.raises(InputError, match="would be handed on"):
        identity.load_salt(output=str(home))


def test_a_folder_is_no_salt(tmp_path):
    with pytest.raises(InputError, match="cannot be used"):
        identity.load_salt(str(tmp_path))


def test_the_linkage_table_is_complete_and_for_its_owner_alone(tmp_path):
    path = tmp_path / "linkage.csv"
    path.write_text("pseudonym,kind,original\np0,patient,older\n")
    path.chmod(0o644)
    rows = [("p1", "patient", 'Doe^J, "Jane"'), ("v1", "video", "1.2.3"), ("p1", "patient", 'Doe^J, "Jane"')]
    identity.write_linkage(str(path), rows, str(tmp_path / "out"))
    with path.open(newline="") as file:
        read = list(csv.reader(file))
    assert read == [["pseudonym", "kind", "original"], ["p0", "patient", "older"], list(rows[0]), list(rows[1])]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["linkage.csv"]


def add_rows(path, name):
    for number in range(20):
        identity.write_linkage(str(path), [(f"{name}{number}", "patient", "x")], str(path.parent / "out"))


def test_builds_at_the_same_time_lose_none_of_each_others_rows(tmp_path):
    path, context = tmp_path / "linkage.csv", multiprocessing.get_context("forkserver")
    processes = [context.Process(target=add_rows, args=(path, name)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with path.open(newline="") as file:
        assert {row["pseudonym"] for row in csv.DictReader(file)} == {
            f"{name}{k}" for name in "abcd" for k in range(20)
        }
    assert os.listdir(tmp_path) == ["linkage.csv"]


@pytest.mark.parametrize("inside", ["linkage.csv", "bus_bra/1.0.0/linkage.csv", "../out/linkage.csv", "../link/x.csv"])
def test_the_linkage_table_is_never_inside_the_output(tmp_path, inside):
    output = tmp_path / "out"
    (output / "bus_bra/1.0.0").mkdir(parents=True)
    (tmp_path / "link").symlink_to(output)
    with pytest.raises(InputError, match="would be handed on"):
        identity.write_linkage(str(output / inside), [("p1", "patient", "x")], str(output))
    assert not list(output.rglob("*.csv"))


def test_a_file_that_is_no_linkage_table_is_not_touched(tmp_path):
    (tmp_path / "x.csv").write_text("my,notes\n")
    with pytest.raises(InputError, match="no linkage table"):
        identity.check_linkage(str(tmp_path / "x.csv"), str(tmp_path / "out"))
    assert (tmp_path / "x.csv").read_text() == "my,notes\n"


def test_a_linkage_table_without_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="needs a folder that exists: mkdir -p"):
        identity.check_linkage(str(tmp_path / "a/b.csv"), str(tmp_path / "out"))
