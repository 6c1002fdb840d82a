"""What a build leaves out, what it writes beside the shards, and that every runner builds the same."""

import csv
import hashlib
import json

import cv2
import numpy as np
import pytest

from data_prep import audit, exclusions, phantom
from tests.data_prep.builds import content, picture, read, refused, run, write, write_csv


def speckle(patient, frames=1):
    return [one.image for one in phantom.simulate_patient(patient, image_size=192, frames=frames)]


def compressed(pixels):
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 70])[1], cv2.IMREAD_UNCHANGED)


def manifest(folder):
    return json.loads((folder / "1.0.0/manifest.json").read_text())


@pytest.fixture
def copies(tmp_path):
    """Three pictures, an equal copy of one, and a compressed copy of another."""
    root = tmp_path / "in"
    one, two, three = (speckle(patient)[0] for patient in (0, 3, 2))
    for name, pixels in {"1.png": one, "2.png": two, "3.png": three, "copies/1.bmp": one}.items():
        write(root / name, pixels)
    write(root / "copies/2.png", compressed(two))
    return root


def test_copies_are_dropped_and_counted(copies, tmp_path):
    assert run("--clean=off", output=tmp_path / "out", source=copies) == 0
    assert [record["source"] for record in read(tmp_path / "out")] == ["1.png", "2.png", "3.png"]
    found = manifest(tmp_path / "out/in")
    assert found["dropped"] == {"equal pixels": 1, "near-equal picture": 1}
    assert (found["kept"], found["splits"]["train"]["frames"]) == (3, 3)


def test_copies_stay_and_are_mentioned_where_nothing_may_be_dropped(copies, tmp_path, capsys):
    assert run("--labels=parent", output=tmp_path / "out", source=copies) == 0
    assert len(read(tmp_path / "out")) == 5
    assert "frames that are there more than once: 2; --deduplicate=on would drop them" in capsys.readouterr().out
    assert manifest(tmp_path / "out/in")["dropped"] == {}


def test_a_clip_of_single_files_is_thinned(tmp_path):
    # The frames of one patient are alike but not the same; one is there twice.
    first, second = speckle(3, frames=2)
    for name, pixels in {"1.png": first, "2.png": compressed(first), "3.png": second}.items():
        write(tmp_path / "in/v" / name, pixels)
    labels = write_csv(tmp_path / "l.csv", ["file", "video"], *[[f"v/{number}.png", "v"] for number in (1, 2, 3)])
    assert run(f"--labels={labels}", "--thin=on", output=tmp_path / "out", source=tmp_path / "in") == 0
    assert [record["source"] for record in read(tmp_path / "out")] == ["v/1.png", "v/3.png"]
    assert manifest(tmp_path / "out/in")["dropped"] == {"near-identical to the frame before it": 1}


def test_a_clip_is_thinned_as_it_is_read(tmp_path):
    frames = [speckle(patient)[0] for patient in (0, 0, 3, 3, 3, 7)]
    height, width = (min(frame.shape[axis] for frame in frames) for axis in (0, 1))
    np.save(tmp_path / "clip.npy", np.stack([frame[:height, :width] for frame in frames]))
    (tmp_path / "in").mkdir()
    (tmp_path / "clip.npy").rename(tmp_path / "in/clip.npy")
    assert run("--clean=off", output=tmp_path / "out", source=tmp_path / "in") == 0
    assert [record["frame"] for record in read(tmp_path / "out")] == ["clip.npy", "clip.npy#2", "clip.npy#5"]
    assert {record["video"] for record in read(tmp_path / "out")} == {"clip.npy"}


def test_stride_and_max_frames_are_for_every_file(tmp_path):
    clip = np.stack([picture(number) for number in range(12)])
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/clip.npy", clip)
    flags = "--stride=2", "--max_frames=3", "--clean=off"
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in") == 0
    assert [record["frame"] for record in read(tmp_path / "out")] == ["clip.npy#2", "clip.npy#6", "clip.npy#10"]


def test_what_an_audit_lists_is_left_out(copies, tmp_path, capsys):
    assert run("--deduplicate=off", "--clean=off", "--name=all", output=tmp_path / "out", source=copies) == 0
    one = read(tmp_path / "out/all")[0]
    rows = [["all", "2.png", "", "near", "benchmark", "x"], ["", "", one["sha256"], "pixels", "benchmark", "y"]]
    exclusions.write(tmp_path / "leaks.csv", rows)
    flags = "--deduplicate=off", "--clean=off", "--name=all", f"--exclude={tmp_path / 'leaks.csv'}"
    assert "was built without --exclude" in refused(capsys, *flags, output=tmp_path / "out", source=copies)
    assert run(*flags, "--overwrite", output=tmp_path / "out", source=copies) == 0
    # copies/2.png is not on the list, but shows what 2.png shows.
    assert [record["source"] for record in read(tmp_path / "out/all")] == ["3.png"]
    assert manifest(tmp_path / "out/all")["dropped"] == {
        "excluded: equal pixels in benchmark": 2,
        "excluded: near-duplicate in benchmark": 2,
    }


def test_a_copy_that_is_left_out_anyway_is_not_said_to_be_there(copies, tmp_path, capsys):
    exclusions.write(tmp_path / "leaks.csv", [["in", "copies/2.png", "", "near", "benchmark", "x"]])
    flags = "--deduplicate=off", "--clean=off", f"--exclude={tmp_path / 'leaks.csv'}"
    assert run(*flags, output=tmp_path / "out", source=copies) == 0
    assert [record["source"] for record in read(tmp_path / "out")] == ["1.png", "2.png", "3.png", "copies/1.bmp"]
    assert "frames that are there more than once: 1; " in capsys.readouterr().out


@pytest.mark.parametrize(("choice", "kept", "said"), [("on", 3, "because another split has them: 2"), ("off", 5, "")])
def test_copies_across_splits_are_said_to_be_dropped_where_they_are(copies, tmp_path, capsys, choice, kept, said):
    rows = [[f"{name}.png", "train"] for name in "123"] + [["copies/1.bmp", "test"], ["copies/2.png", "test"]]
    labels = write_csv(tmp_path / "l.csv", ["file", "split"], *rows)
    flags = f"--labels={labels}", f"--deduplicate={choice}", "--clean=off"
    assert run(*flags, output=tmp_path / "out", source=copies) == 0
    assert len(read(tmp_path / "out")) == kept
    told = capsys.readouterr().out
    assert said in told
    assert ("another split" in told) == bool(said)


def test_what_is_excluded_does_not_come_back_as_its_copy(copies, tmp_path):
    write(tmp_path / "test/2.png", speckle(3)[0])
    out = tmp_path / "out"
    for source in (copies, tmp_path / "test"):
        assert run("--clean=off", output=out, source=source) == 0
    flags = f"--shards={out / 'in'}", f"--against={out / 'test'}"
    assert audit.main([*flags, f"--write-exclusions={tmp_path / 'leaks.csv'}", "--workers=1"]) == 1
    more = "--clean=off", f"--exclude={tmp_path / 'leaks.csv'}", "--overwrite"
    assert run(*more, output=out, source=copies) == 0
    assert audit.main([*flags, "--workers=1"]) == 0
    assert [record["source"] for record in read(out / "in")] == ["1.png", "3.png"]


def test_a_data_file_that_appears_beside_its_header_is_noticed(tmp_path, capsys):
    header = "ObjectType = Image\nNDims = 2\nDimSize = 64 48\nElementType = MET_UCHAR\nElementDataFile = {}\n"
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"in/{name}.mhd").write_text(header.format(f"{name}.raw"))
    for number, name in enumerate("ab"):
        (tmp_path / f"in/{name}.raw").write_bytes(picture(number).tobytes())
    flags = ("--clean=off",)
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in") == 0
    assert manifest(tmp_path / "out/in")["rejected"] == {"the data file that it names is missing": 1}
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "in") == 0
    (tmp_path / "in/c.raw").write_bytes(picture(3).tobytes())
    assert "other files" in refused(capsys, *flags, output=tmp_path / "out", source=tmp_path / "in")


def test_nothing_left_is_said_and_leaves_nothing(tmp_path, capsys):
    write(tmp_path / "in/1.png", picture(0))
    exclusions.write(tmp_path / "leaks.csv", [["in", "1.png", "", "image", "benchmark", "x"]])
    sentence = refused(capsys, f"--exclude={tmp_path / 'leaks.csv'}", output=tmp_path / "out", source=tmp_path / "in")
    assert "no frame is left" in sentence
    assert not (tmp_path / "out").exists()


def test_beam_and_processes_build_the_same(copies, tmp_path):
    pytest.importorskip("apache_beam")
    write(copies / "bad.png", picture(1))
    (copies / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run(output=tmp_path / "here", source=copies, workers=2) == 0
    options = "--runner=beam", "--beam_pipeline_options=runner=DirectRunner,direct_num_workers=1"
    assert run(*options, output=tmp_path / "beam", source=copies) == 0
    assert content(tmp_path / "here") == content(tmp_path / "beam")


def test_several_datasets_are_built_from_their_folders_and_shown_together(tmp_path, capsys):
    for number in range(2):
        write(tmp_path / f"raw/usgra_nerve/images/{number:04d}.png", picture(number))
        write(tmp_path / f"raw/timtrack_muscle/S{number}/S{number}_L20_step_025.png", picture(number + 5))
    (tmp_path / "raw/us105").mkdir()
    flags = "--clean=off", "--deduplicate=off"
    names = "usgra_nerve,us105,timtrack_muscle"
    assert run(*flags, output=tmp_path / "out", source=tmp_path / "raw", dataset=names) == 2
    assert "error: us105: " in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"usgra_nerve", "timtrack_muscle", "index.html"}
    page = (tmp_path / "out/index.html").read_text()
    assert "usgra_nerve/1.0.0/report.html" in page
    assert "timtrack_muscle/1.0.0/report.html" in page


def test_official_folds_stand_beside_the_shards(tmp_path):
    rows = [["ID", "Pathology", "kFold", "valid_1", "valid_2"]]
    data = [["ID", "Case", "Histology", "Pathology", "BIRADS", "Device", "Width", "Height", "Side", "BBOX"]]
    for number, side in enumerate("lrs"):
        identity = f"bus_{number + 1:04d}-{side}"
        write(tmp_path / f"in/Images/{identity}.png", picture(number))
        write(tmp_path / f"in/Masks/mask_{identity[4:]}.png", np.zeros((48, 64), np.uint8))
        data.append([identity, number, "", ("benign", "malignant")[number % 2], 3, "", 64, 48, "", "[1,2,3,4]"])
        rows.append([identity, "", number % 2 + 1, "NaN" if number % 2 == 0 else 1, "NaN" if number % 2 else 0])
    write_csv(tmp_path / "in/bus_data.csv", *data)
    write_csv(tmp_path / "in/5-fold-cv.csv", *rows)
    assert run(output=tmp_path / "out", source=tmp_path / "in", dataset="bus_bra") == 0
    with (tmp_path / "out/bus_bra/1.0.0/splits/5-fold-cv.csv").open() as file:
        table = {(row["frame"], row["fold"]): row["part"] for row in csv.DictReader(file)}
    assert table == {
        ("bus_0001-l", "1"): "test",
        ("bus_0001-l", "2"): "validation",
        ("bus_0002-r", "1"): "train",
        ("bus_0002-r", "2"): "test",
        ("bus_0003-s", "1"): "test",
        ("bus_0003-s", "2"): "validation",
    }
    assert {record["frame"] for record in read(tmp_path / "out")} == {"bus_0001-l", "bus_0002-r", "bus_0003-s"}


def test_the_manifest_tells_the_whole_story(copies, tmp_path):
    (copies / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (copies / "notes.txt").write_text("text")
    assert run("--anatomy=breast", output=tmp_path / "out", source=copies) == 0
    found = manifest(tmp_path / "out/in")
    assert found["rejected"] == {"header is damaged or cut off": 1}
    assert found["passed_over"] == {"other files": 1}
    assert found["input"]["files"] == 6
    digests = {
        path.relative_to(copies).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in copies.rglob("*")
        if path.suffix in (".png", ".bmp")
    }
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    assert found["input"]["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert found["arguments"]["clean"] is True
    assert found["anatomy"] == "breast"
    written = {path.name: path.stat().st_size for path in (tmp_path / "out/in/1.0.0").iterdir()}
    assert found["files"].items() <= written.items()
    assert written.keys() - found["files"].keys() == {"manifest.json", "report.html"}
