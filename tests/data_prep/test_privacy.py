"""What a patient's file says about the patient is in no byte that a private build writes."""

import csv
import json

import cv2
import numpy as np
import pytest

from benchmarks.overlays import screen
from data_prep import phantom
from data_prep.exclusions import COLUMNS
from data_prep.write import dataset, parts
from tests.data_prep.builds import content, picture, read, read_rejected, refused, run, write, write_csv

pytest.importorskip("pydicom")

from pydicom.dataset import Dataset

from tests.data_prep.readers import dicoms

SECRETS = ("ZEBEDEE", "Jane", "19560708", "1.2.826.0.1.3680043.99", "QQ-4711", "Springfield")


FOLDS = r"""
name = "made"
title = "Made"
verified = "layout fixture"

[[layout]]
include = ["*.png"]

[[layout.folds]]
name = "official"
file = ["folds.csv"]
key = "{frame}"
match = "{name}"
fold = "{fold}"
part = "{part}"
"""


@pytest.fixture
def export(tmp_path, monkeypatch):
    """A folder as a clinic exports it: patients in paths, tags, private tags, overlay planes and pixels."""
    salt = tmp_path / "salt"
    salt.write_bytes(b"0123456789abcdef")
    salt.chmod(0o600)
    monkeypatch.setenv("USFMAE_SALT", str(salt))
    root = tmp_path / "ZEBEDEE_Jane"
    for number in range(3):
        # The name is burnt into the margin above the tissue, as scanners do.
        one = phantom.simulate_patient(number + 1, image_size=160, frames=1)[0]
        pixels, _ = screen(one.image, one.sector, np.random.default_rng(number))
        cv2.putText(pixels, "ZEBEDEE JANE 08.07.1956", (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.45, 255, 1)
        made = dicoms.dataset(
            pixels,
            PatientID=f"QQ-4711-{number // 2}",  # two files of one patient, one of another
            PatientName="ZEBEDEE^Jane",
            PatientBirthDate="19560708",
            InstitutionName="Springfield General",
            StudyInstanceUID="1.2.826.0.1.3680043.99.1",
            SOPInstanceUID=f"1.2.826.0.1.3680043.99.2.{number}",
            StudyDescription="ZEBEDEE, follow-up",
            Manufacturer=("Philips", "ZEBEDEE^Jane", "Springfield")[number],
            ManufacturerModelName=("QQ-4711", "iU22", "19560708")[number],
            TransducerType=("ZEBEDEE", "C5-1", "QQ 4711")[number],
        )
        made.add_new(0x60000010, "US", pixels.shape[0])
        made.add_new(0x60000022, "LO", "ZEBEDEE Jane")
        made.add_new(0x60003000, "OW", b"ZEBEDEE Jane" * 40)
        block = made.private_block(0x0029, "Springfield PACS", create=True)
        block.add_new(0x01, "LO", "ZEBEDEE Jane 19560708")
        nested = Dataset()
        nested.PatientName = "ZEBEDEE^Jane"
        made.ReferencedPatientSequence = [nested]
        path = root / "QQ-4711" / f"ZEBEDEE_{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        dicoms.save(path, made)
    (root / "QQ-4711/ZEBEDEE_broken.dcm").write_bytes(bytes(128) + b"DICM" + b"ZEBEDEE" * 40)
    return root


def test_no_output_byte_names_a_patient(export, tmp_path, capsys):
    # TFRecord files are not compressed and raw images neither: what is in them can be searched.
    flags = "--format=tfrecord", "--encoding=raw", "--image_size=0"
    assert run(*flags, output=tmp_path / "out", source=export, dataset="dicom") == 0
    printed = capsys.readouterr().out
    written = content(tmp_path / "out")
    assert {"manifest.json", "report.html", "rejected.csv", "dataset_info.json"} <= written.keys()
    for secret in (*SECRETS, str(tmp_path)):
        for name, data in written.items():
            assert secret.encode() not in data, name
            assert secret.encode("utf-16-le") not in data, name
            assert secret not in name
    assert not any(secret in printed for secret in SECRETS)
    found = read(tmp_path / "out")
    patients = [record["patient"] for record in found]
    assert sorted(map(patients.count, set(patients))) == [1, 2]
    manifest = json.loads(written["manifest.json"])
    assert manifest["technical"]["Manufacturer"] == {"other": 3}
    assert manifest["technical"]["ManufacturerModelName"] == {"other": 3}
    for kind in ("person names", "private tags", "dates and times", "UIDs", "free text", "other identifiers"):
        assert manifest["removed"][kind] >= 3


@pytest.fixture
def private(tmp_path):
    """Flags of a private build of any folder, with a linkage table."""
    salt = tmp_path / "salt"
    salt.write_bytes(bytes(range(32)))
    salt.chmod(0o600)
    return "--private", f"--salt={salt}", "--whole_frames", f"--linkage={tmp_path / 'linkage.csv'}", "--name=x"


def originals(tmp_path, kind):
    with (tmp_path / "linkage.csv").open(newline="", encoding="utf-8") as file:
        return {row["pseudonym"]: row["original"] for row in csv.DictReader(file) if row["kind"] == kind}


def test_the_order_of_no_artefact_is_that_of_names(private, tmp_path):
    patients = [f"patient{number:02}" for number in range(12)]
    for number, patient in enumerate(patients):
        for frame in range(3):
            write(tmp_path / f"in/{patient}/{frame}.png", picture(10 * number + frame))
        (tmp_path / f"in/{patient}/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    flags = *private, "--pattern=(?P<video>(?P<patient>[^/]+))/"
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in") == 0
    found, names, frames = read(tmp_path / "out"), originals(tmp_path, "patient"), originals(tmp_path, "frame")
    order = [names[record["patient"]] for record in found[::3]]
    assert sorted(order) == patients != order
    assert [record["video"] for record in found] == sorted(record["video"] for record in found)
    assert [frames[record["frame"]] for record in found] == [f"{p}/{k}.png" for p in order for k in range(3)]
    rejected = [frames[name] for name in read_rejected(tmp_path / "out/x")]
    assert len(rejected) == 12
    assert rejected != sorted(rejected)


def test_no_digest_in_a_private_manifest_can_be_tried_without_the_salt(private, tmp_path):
    for number in range(3):
        write(tmp_path / f"in/{number}.png", picture(number))
    table = write_csv(tmp_path / "labels.csv", ["file", "patient"], *[[f"{k}.png", "QQ-4711"] for k in range(3)])
    leaks = write_csv(tmp_path / "leaks.csv", COLUMNS)
    (tmp_path / "other").write_bytes(bytes(range(1, 33)))
    (tmp_path / "other").chmod(0o600)
    manifests = []
    for name in ("salt", "other"):
        flags = [*(flag for flag in private if "linkage" not in flag), f"--salt={tmp_path / name}"]
        flags += [f"--labels={table}", f"--exclude={leaks}", "--key=ZEBEDEE"]
        assert run(*flags, output=tmp_path / f"out_{name}", source=tmp_path / "in") == 0
        manifests.append(json.loads((tmp_path / f"out_{name}/x/1.0.0/manifest.json").read_text()))
    one, other = manifests
    for manifest in manifests:
        assert manifest["arguments"]["options"]["key"].startswith("hmac-sha256 ")
        assert "ZEBEDEE" not in json.dumps(manifest)
    for key in ("entry", "labels", "exclude", "salt"):
        assert one["arguments"][key] != other["arguments"][key]
    for key in ("fingerprint", "sha256"):
        assert one["input"][key] != other["input"][key]


def test_what_a_killed_build_leaves_names_nobody(export, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_write_dataset", killed)
        assert run("--encoding=raw", output=tmp_path / "out", source=export, dataset="dicom") == 130
    (left,) = (tmp_path / "out/dicom").glob(".*.incomplete")
    names = {path.name for path in left.rglob("*.json")}
    assert len(names) == 4
    for path in (tmp_path / "out").rglob("*"):
        for secret in (*SECRETS, str(tmp_path)):
            assert secret not in path.name
            assert path.is_dir() or secret.encode() not in path.read_bytes()
    monkeypatch.setattr(parts, "write_part", killed)
    assert run("--encoding=raw", output=tmp_path / "out", source=export, dataset="dicom") == 0  # goes on from there
    assert len(read(tmp_path / "out")) == 3


def test_official_splits_do_not_keep_the_order_of_names(private, tmp_path):
    names = [f"{number:02}.png" for number in range(12)]
    for number, name in enumerate(names):
        write(tmp_path / "in" / name, picture(number))
    write_csv(tmp_path / "in/folds.csv", ["frame", "fold", "part"], *[[name, "0", "train"] for name in names])
    (tmp_path / "made.toml").write_text(FOLDS)
    flags = [flag for flag in private if not flag.startswith("--name")]
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in", dataset=str(tmp_path / "made.toml")) == 0
    with (tmp_path / "out/made/1.0.0/splits/official.csv").open() as file:
        rows = [originals(tmp_path, "frame")[row["frame"]] for row in csv.DictReader(file)]
    assert sorted(rows) == names != rows


def test_burnt_in_names_outside_the_sector_are_gone(export, tmp_path):
    assert run("--encoding=raw", "--image_size=0", output=tmp_path / "out", source=export, dataset="dicom") == 0
    for record in read(tmp_path / "out"):
        pixels = cv2.imdecode(np.frombuffer(record["image"], np.uint8), cv2.IMREAD_GRAYSCALE)
        # The text is pure white, the tissue below is not; what is left of a line of letters would stand out.
        top = pixels[: max(3, pixels.shape[0] // 12)]
        assert (top == 255).mean() < 0.002
    manifest = json.loads((tmp_path / "out/dicom/1.0.0/manifest.json").read_text())
    assert manifest["cleaned"]["outside"] > 1000


def test_whoever_holds_the_table_can_lead_back(export, tmp_path, capsys):
    table = tmp_path / "linkage.csv"
    assert "handed on" in refused(
        capsys, f"--linkage={tmp_path / 'out/l.csv'}", output=tmp_path / "out", source=export, dataset="dicom"
    )
    assert run(f"--linkage={table}", output=tmp_path / "out", source=export, dataset="dicom") == 0
    assert table.stat().st_mode & 0o777 == 0o600
    with table.open() as file:
        rows = {(row["kind"], row["pseudonym"]): row["original"] for row in csv.DictReader(file)}
    for record in read(tmp_path / "out"):
        assert rows["patient", record["patient"]].startswith("QQ-4711")
        assert rows["frame", record["source"]].startswith("QQ-4711/ZEBEDEE_")
    assert any(original.endswith("ZEBEDEE_broken.dcm") for original in rows.values())


def test_another_salt_gives_other_names_and_is_noticed(export, tmp_path, capsys):
    assert run(output=tmp_path / "out", source=export, dataset="dicom") == 0
    other = tmp_path / "other"
    other.write_bytes(b"fedcba9876543210")
    other.chmod(0o600)
    sentence = refused(capsys, f"--salt={other}", output=tmp_path / "out", source=export, dataset="dicom")
    assert "was built with another secret (--salt)" in sentence
    before = {record["patient"] for record in read(tmp_path / "out")}
    assert run(f"--salt={other}", "--overwrite", output=tmp_path / "out", source=export, dataset="dicom") == 0
    assert not before & {record["patient"] for record in read(tmp_path / "out")}


def test_labels_do_not_turn_the_cleaning_of_private_data_off_and_doing_so_is_warned_of(export, tmp_path, capsys):
    for flags, clean in ((["--labels=parent"], True), (["--clean=off", "--overwrite"], False)):
        assert run(*flags, output=tmp_path / "out", source=export, dataset="dicom") == 0
        written = json.loads((tmp_path / "out/dicom/1.0.0/manifest.json").read_text())
        assert written["arguments"]["clean"] is clean
        assert ("names that a scanner burnt into the pictures" in capsys.readouterr().out) is not clean


def test_a_page_without_a_sector_is_not_written(export, tmp_path):
    page = np.full((240, 320), 230, np.uint8)  # a scanned report
    cv2.putText(page, "ZEBEDEE JANE", (20, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 20, 2)
    dicoms.save(export / "page", dicoms.dataset(page, Modality="OT", PatientID="QQ-4711-9"))
    assert run(output=tmp_path / "out", source=export, dataset="dicom") == 0
    written = json.loads((tmp_path / "out/dicom/1.0.0/manifest.json").read_text())
    assert [number for reason, number in written["dropped"].items() if reason.startswith("no imaged sector")] == [1]
    assert len(read(tmp_path / "out")) == 3


def test_reasons_name_no_file(tmp_path):
    (tmp_path / "salt").write_bytes(b"0123456789abcdef")
    (tmp_path / "salt").chmod(0o600)
    header = "ObjectType = Image\nNDims = 2\nDimSize = 64 48\nElementType = MET_UCHAR\nElementDataFile = {}\n"
    (tmp_path / "in").mkdir()
    for name in ("a", "ZEBEDEE"):
        (tmp_path / f"in/{name}.mhd").write_text(header.format(f"{name}.raw"))
    (tmp_path / "in/a.raw").write_bytes(np.random.default_rng(0).bytes(64 * 48))
    flags = "--private", "--whole_frames", f"--salt={tmp_path / 'salt'}", "--name=x"
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in") == 0
    assert "rejected.csv" in content(tmp_path / "out")
    assert not any(b"ZEBEDEE" in data for data in content(tmp_path / "out").values())


def test_any_folder_can_be_private(tree, tmp_path, capsys):
    salt = tmp_path / "salt"
    salt.write_bytes(b"0123456789abcdef")
    salt.chmod(0o600)
    flags = "--private", f"--salt={salt}", "--format=tfrecord"
    assert "no frame is left" in refused(capsys, *flags, output=tmp_path / "out", source=tree)
    assert run(*flags, "--whole_frames", "--include=**/deep/**;**", output=tmp_path / "out", source=tree) == 0
    for data in content(tmp_path / "out").values():
        assert b"deep" not in data.replace(b"deeppink", b"")
        assert b"My Images" not in data
    assert len({record["source"] for record in read(tmp_path / "out")}) == 6


def test_that_most_files_are_of_no_use_is_said_without_a_name(private, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/ZEBEDEE_{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    sentence = refused(capsys, *private, output=tmp_path / "out", source=tmp_path / "in")
    assert "more than half of the 3 files cannot be used, for example 'f" in sentence
    assert "ZEBEDEE" not in sentence
