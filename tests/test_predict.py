"""Any file to a table, masks and outlines; members together; what was finished stays."""

import dataclasses
import json
import multiprocessing
import shutil
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from flax import nnx
from pycocotools import mask as run_lengths

from tests.helpers import frame, record, write_shards
from usfmae_jax import predict
from usfmae_jax.data import annotations, cells
from usfmae_jax.data.records import decode_image, decode_record, encode_record, open_shards
from usfmae_jax.data.table import images as decode
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError
from usfmae_jax.finetuning import results
from usfmae_jax.interop.model import Model, build, open_model, preprocessing, save_model
from usfmae_jax.prediction import output
from usfmae_jax.prediction.kinds import detected, measured, segmented
from usfmae_jax.reporting.masks import safe_path
from usfmae_jax.tasks.classification import probabilities
from usfmae_jax.tasks.instances import merged
from usfmae_jax.tasks.segmentation import Segmentation, classes_of
from usfmae_jax.training import forward
from usfmae_jax.training.mesh import global_batch, make_mesh, replicated

ENCODER = {"image_size": [16, 16], "patch_size": 8, "channels": 1, "width": 16, "depth": 1, "num_heads": 2}
CLASSIFIER = {"model": "vit", "encoder": ENCODER, "pool": "mean", "classes": ["benign", "malignant"]}
SEGMENTER = {
    "model": "vit",
    "encoder": ENCODER,
    "task": "segmentation",
    "outputs": ["lesion", "cyst"],
    "head": {"kind": "linear"},
}


DEEP = "[" * 100_000


def save(directory, description, seed=0, **more):
    """A model of random weights, whose head says something."""
    network = build(description)(nnx.Rngs(seed))
    network.head.kernel[...] = 3 * np.random.default_rng(seed).standard_normal(network.head.kernel.shape)
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    model = Model(params, description | more, preprocessing((16, 16), 1, [0.25], [0.2]), [])
    save_model(str(directory), model)
    return str(directory)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save(tmp_path_factory.mktemp("classifier"), CLASSIFIER)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return save(tmp_path_factory.mktemp("segmenter"), SEGMENTER)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two pictures, a volume of five slices, and one that is damaged."""
    root = tmp_path_factory.mktemp("files")
    (root / "sub").mkdir()
    cv2.imwrite(str(root / "sub" / "=one.png"), frame(0, 0))
    cv2.imwrite(str(root / "two.bmp"), frame(1, 1, (30, 50)))
    np.save(root / "volume.npy", np.stack([frame(n, n % 2, (33, 47)) for n in range(5)]))
    (root / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (root / "notes.txt").write_text("nothing")
    return root


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as lines:
        return list(cells.read_dicts(lines))


def run(checkpoint, data, output, *more):
    return predict.main([f"--checkpoint={checkpoint}", f"--data={data}", f"--output={output}", "--workers=1", *more])


def test_a_script_without_a_main_guard_does_not_predict_again_in_its_workers(files, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(InputError, match="below `if __name__"):
        predict._files([str(files)], str(tmp_path / "out"), 1, 1, 0)


def test_files_of_any_kind_are_classified_and_what_cannot_be_read_is_named(classifier, files, tmp_path, capsys):
    assert run(classifier, files, tmp_path / "out", "--batch_size=8") == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [(row["file"], row["frame"]) for row in rows] == [
        ("sub/=one.png", "0"),
        ("two.bmp", "0"),
        *(("volume.npy", str(number)) for number in range(5)),
    ]
    for row in rows:
        said = {name: float(row[f"p_{name}"]) for name in CLASSIFIER["classes"]}
        assert sum(said.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(said, key=said.get)
        assert "uncertainty" not in row
    (skipped,) = rows_of(tmp_path / "out" / "skipped.csv")
    assert skipped["file"] == "damaged.png"
    shown = capsys.readouterr().err
    assert "warning: 1 file is passed over, since it is no image: notes.txt\n" in shown
    assert "1 file or frame is left out" in shown
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert str(tmp_path).encode() not in everything
    assert str(files).encode() not in everything
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "finished.jsonl",
        "prediction.json",
        "predictions.csv",
        "skipped.csv",
    ]


def test_a_model_of_cleaned_frames_is_told_that_files_are_not(classifier, files, tmp_path, capsys):
    shutil.copytree(classifier, tmp_path / "model")
    for cleaned in (False, True):
        stages = [{"job": "finetune", "data": [{"dataset": "a"} | ({"cleaned": True} if cleaned else {})]}]
        (tmp_path / "model" / "lineage.json").write_text(json.dumps({"stages": stages}))
        assert run(tmp_path / "model", files / "two.bmp", tmp_path / f"out-{cleaned}") == 0
        assert ("from which text and graphics were removed" in capsys.readouterr().err) == cleaned


def test_masks_have_the_size_of_their_frames_and_areas_count_them(segmenter, files, tmp_path):
    assert run(segmenter, files, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    sizes = {"sub/=one.png": (40, 48), "two.bmp": (30, 50), "volume.npy": (33, 47)}
    for row in rows:
        mask = cv2.imread(str(tmp_path / "out" / row["mask"]), cv2.IMREAD_UNCHANGED)
        assert mask.shape == sizes[row["file"]]
        assert mask.dtype == np.uint8
        counts = np.bincount(mask.ravel(), minlength=3)
        assert [int(row[f"area_pixels:{name}"]) for name in SEGMENTER["outputs"]] == counts[1:].tolist()
        assert row["area_cm2:lesion"] == ""
    assert [row["mask"] for row in rows][:3] == [
        "masks/sub/=one.png.png",
        "masks/two.bmp.png",
        "masks/volume.npy/000000.png",
    ]
    assert (tmp_path / "out" / "overlays" / "two.bmp.png").exists()
    if (film := tmp_path / "out" / "overlays" / "volume.npy.mp4").exists():
        import av

        with av.open(str(film)) as container:
            pictures = [one.to_ndarray(format="rgb24") for one in container.decode(video=0)]
        assert [one.shape for one in pictures] == [(34, 48, 3)] * 5
    else:
        assert len(list((tmp_path / "out" / "overlays" / "volume.npy").iterdir())) == 5
    assert not list((tmp_path / "out").rglob("*incomplete*"))


def test_a_dicom_clip_gives_areas_in_cm2_and_no_word_of_its_header(segmenter, tmp_path):
    pytest.importorskip("pydicom", reason="pydicom is optional")
    from tests.data_prep.readers import dicoms

    clip = np.stack([frame(number, 1) for number in range(3)])
    regions = [dicoms.region((0, 0, 47, 39), delta=0.01)]
    who = {"PatientName": "ZEBEDEE^Z", "PatientID": "ZQ4711", "InstitutionName": "ZQHOUSE", "StudyDate": "19991231"}
    (tmp_path / "in").mkdir()
    dicoms.write(tmp_path / "in", clip, frames=3, SequenceOfUltrasoundRegions=regions, **who)
    assert run(segmenter, tmp_path / "in", tmp_path / "out", "--max_frames=2") == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [(row["file"], row["frame"]) for row in rows] == [("image", "0"), ("image", "2")]
    for row in rows:
        for name in SEGMENTER["outputs"]:
            assert float(row[f"area_cm2:{name}"]) == pytest.approx(int(row[f"area_pixels:{name}"]) * 1e-4, abs=1e-5)
    assert any(float(row[f"area_cm2:{name}"]) for row in rows for name in SEGMENTER["outputs"])
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for word in ("ZEBEDEE", "ZQ4711", "ZQHOUSE", "19991231", "1.2.3.4"):
        assert word.encode() not in everything


def test_the_mean_of_a_frame_and_its_mirror_is_that_of_the_mirror(segmenter, tmp_path):
    (tmp_path / "in").mkdir()
    for name, turn in (("one", 1), ("two", -1)):
        cv2.imwrite(str(tmp_path / "in" / f"{name}.png"), np.ascontiguousarray(frame(0, 0, (32, 48))[:, ::turn]))
    for flip in ("on", "off"):
        assert run(segmenter, tmp_path / "in", tmp_path / flip, f"--flip={flip}") == 0
    one, two = (cv2.imread(str(tmp_path / "on" / "masks" / f"{name}.png.png"), 0) for name in ("one", "two"))
    np.testing.assert_array_equal(one, two[:, ::-1])
    alone, mirrored = (cv2.imread(str(tmp_path / "off" / "masks" / f"{name}.png.png"), 0) for name in ("one", "two"))
    assert (alone != mirrored[:, ::-1]).any()


def test_areas_are_in_cm2_where_the_size_of_a_pixel_is_known_and_members_disagree_inside():
    shares = np.zeros((2, 4, 4, 3), np.uint8)
    shares[..., 0] = 255
    shares[0, :2, :2] = 0, 255, 0
    shares[1, :2, :2] = 51, 204, 0
    cells, mask, _ = segmented([SEGMENTER], {"probabilities": shares}, (8, 8), (0.5, 2.0))
    assert mask.tolist() == classes_of(shares.mean(axis=0, dtype=np.float32), (8, 8)).tolist()
    assert cells["area_pixels:lesion"] == (mask == 1).sum()
    assert cells["area_cm2:lesion"] == pytest.approx((mask == 1).sum() / 100)
    assert cells["area_cm2:cyst"] == 0
    assert cells["uncertainty"] == pytest.approx(0.1, abs=1e-6)  # 1 and 0.8
    cells, *_ = segmented([SEGMENTER], {"probabilities": shares * 0}, (8, 8), (0.0, 0.0))
    assert (cells["uncertainty"], cells["area_cm2:lesion"]) == ("", "")


def test_a_quantity_is_given_in_its_unit_and_by_each_member_with_its_own_scale():
    about = {"outputs": ["length"], "scale": {"mean": [10.0], "deviation": [2.0], "unit": ["mm"], "of_frame": [False]}}
    other = {**about, "scale": {**about["scale"], "mean": [20.0]}}
    cells, mask, _ = measured([about, other], {"value": np.array([1.0, 0.0])}, (8, 8), (0.0, 0.0))
    assert (cells, mask) == ({"length [mm]": 16.0, "uncertainty": 4.0}, None)
    shares = {**about, "scale": {"mean": [0.5], "deviation": [0.1], "unit": ["mm"], "of_frame": [True]}}
    cells, *_ = measured([shares], {"value": np.array([1.0])}, (10, 40), (0.5, 0.5))
    assert cells == {"length [mm]": pytest.approx(0.6 * 10)}  # of a square as large as 5 x 20 mm
    assert measured([shares], {"value": np.array([1.0])}, (10, 40), (0.0, 0.0))[0] == {"length [mm]": ""}


@pytest.mark.parametrize(
    ("description", "column"),
    [
        ({"task": "multilabel", "outputs": ["cyst", "shadow"]}, "p_shadow"),
        (
            {
                "task": "regression",
                "outputs": ["length"],
                "scale": {"mean": [10.0], "deviation": [2.0], "unit": ["mm"], "of_frame": [False]},
            },
            "length [mm]",
        ),
    ],
)
def test_other_tasks_are_predicted_too(files, tmp_path, description, column):
    about = {"model": "vit", "encoder": ENCODER, "pool": "mean", **description}
    for seed in range(2):
        save(tmp_path / "run" / "members" / f"m{seed}" / "model", about, seed)
    assert run(tmp_path / "run", files / "two.bmp", tmp_path / "out") == 0
    (row,) = rows_of(tmp_path / "out" / "predictions.csv")
    assert np.isfinite(float(row[column]))
    assert float(row["uncertainty"]) > 0


def test_the_members_of_a_run_are_averaged_and_their_spread_is_told(tmp_path, files):
    for seed in range(2):
        save(tmp_path / "run" / "members" / f"m{seed}" / "classifier", CLASSIFIER, seed)
    save(tmp_path / "run" / "members" / "m0-fraction-2.5" / "classifier", CLASSIFIER, 2)  # taught on less: left out
    for name, checkpoint in {"both": "run", "0": "run/members/m0", "1": "run/members/m1"}.items():
        assert run(tmp_path / checkpoint, files / "two.bmp", tmp_path / name) == 0
    ((both,), (one,), (two,)) = (rows_of(tmp_path / name / "predictions.csv") for name in ("both", "0", "1"))
    p = np.array([[float(row[f"p_{name}"]) for name in CLASSIFIER["classes"]] for row in (one, two)])
    assert [float(both[f"p_{name}"]) for name in CLASSIFIER["classes"]] == pytest.approx(p.mean(axis=0), abs=2e-6)
    chosen = CLASSIFIER["classes"].index(both["predicted"])
    assert float(both["uncertainty"]) == pytest.approx(p[:, chosen].std(), abs=2e-6)
    assert p[:, chosen].std() > 1e-3
    assert both["file"] == "two.bmp"
    assert [predict._fraction(name) for name in ("a/m", "m-fraction-10", "m-fraction-1e-05")] == [100, 10, 1e-5]


def test_batches_become_smaller_until_they_fit_into_memory(classifier, monkeypatch):
    monkeypatch.setattr(forward, "_free", lambda mesh: 0)
    function, variables = forward.model_function(open_model(classifier), probabilities)
    mesh = make_mesh()
    variables = jax.device_put(variables, replicated(mesh))
    for asked, fitting in ((0, mesh.size), (2 * mesh.size, 2 * mesh.size)):
        program, size = forward.fitted(function, variables, (16, 16, 1), mesh, asked, "--batch_size")
        assert size == fitting
        images = np.random.default_rng(0).integers(0, 256, (size, 16, 16, 1), np.uint8)
        said = program(variables, global_batch(mesh, images))["probabilities"]
        np.testing.assert_allclose(said, function(variables, images)["probabilities"], atol=1e-5)


def test_a_second_start_takes_what_is_new_or_changed_and_what_was_cut_off(classifier, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for number in range(4):
        cv2.imwrite(str(tmp_path / "in" / f"{number}.png"), frame(number, 0))
    assert run(classifier, tmp_path / "in", tmp_path / "out") == 0
    before = (tmp_path / "out" / "predictions.csv").read_text()
    finished = tmp_path / "out" / "finished.jsonl"
    finished.write_bytes(finished.read_bytes()[:-20])  # killed while it wrote
    (tmp_path / "out" / "predictions.csv").unlink()
    capsys.readouterr()
    assert run(classifier, tmp_path / "in", tmp_path / "out") == 0
    assert "3 of 4 files were finished before" in capsys.readouterr().err
    assert (tmp_path / "out" / "predictions.csv").read_text() == before
    cv2.imwrite(str(tmp_path / "in" / "0.png"), frame(9, 1, (50, 50)))
    cv2.imwrite(str(tmp_path / "in" / "4.png"), frame(4, 1))
    assert run(classifier, tmp_path / "in", tmp_path / "out") == 0
    assert "3 of 5 files were finished before" in capsys.readouterr().err
    after = rows_of(tmp_path / "out" / "predictions.csv")
    assert [row["file"] for row in after] == [f"{number}.png" for number in range(5)]
    assert before.splitlines()[2:] == (tmp_path / "out" / "predictions.csv").read_text().splitlines()[2:5]
    monkeypatch.setattr(predict, "_answer", None)  # nothing is left to do
    assert run(classifier, tmp_path / "in", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", None), ("rows", 5), ("rows", [5]), ("rows", [{}]), ("rows", [{"file": "a", "frame": 0, "x": 1}]),
     ("problems", 5), ("problems", [5]), ("problems", [["a", 5]]), ("name", ["x"]), ("stamp", 5), ("masks", 5),
     ("masks", [5]), ("masks", [{"name": "a", "size": [1], "found": []}]), ("film", DEEP), ("about", DEEP)],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_damaged_file_in_the_folder_is_one_sentence(tmp_path, field, value):
    about = {"weights": ["1"], "read": {}}
    row = {"file": "a.png", "frame": 0, "predicted": "benign"}
    lines = [json.dumps(dataclasses.asdict(output.Source(name, "1", [row]))) for name in ("a", "b")]
    output.Folder(str(tmp_path), about, False)
    (tmp_path / "finished.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert output.Folder(str(tmp_path), about, False).is_finished("b", "1")
    if field == "about":
        (tmp_path / "prediction.json").write_text(value)
    else:
        changed = value if value == DEEP else json.dumps(json.loads(lines[0]) | {field: value})
        (tmp_path / "finished.jsonl").write_text(f"{changed}\n{lines[1]}\n")
    said = "holds something else" if field == "about" else r"finished\.jsonl is damaged; remove it, and everything is"
    with pytest.raises(InputError, match=said):
        output.Folder(str(tmp_path), about, False)


def test_an_output_that_vanishes_is_named_by_its_option(classifier, files, tmp_path, monkeypatch, capsys):
    answered = predict._answer

    def vanish(*args):
        answered(*args)
        shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(predict, "_answer", vanish)
    assert run(classifier, files / "two.bmp", tmp_path / "out") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: --output={tmp_path}/out vanished")
    assert "--workdir" not in said


def test_shards_are_predicted_record_by_record(segmenter, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", count=70, damaged=(3,), pieces=1)
    assert run(segmenter, tmp_path / "in", tmp_path / "out", "--overlays=off") == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [row["file"] for row in rows] == [f"{number}.png" for number in range(70) if number != 3]
    assert len({row["mask"] for row in rows}) == 69
    mask = cv2.imread(str(tmp_path / "out" / rows[5]["mask"]), cv2.IMREAD_UNCHANGED)
    shards = open_shards(str(tmp_path / "in"))
    assert mask.shape == decode_image(decode_record(shards[6])["image"]).shape[:2]
    assert [row["file"] for row in rows_of(tmp_path / "out" / "skipped.csv")] == ["3.png"]
    assert not (tmp_path / "out" / "overlays").exists()


def test_masks_of_a_fine_tuning_run_are_those_that_are_predicted_and_coco_reads_them(segmenter, tmp_path):
    from pycocotools.coco import COCO

    drawn = [np.zeros((40, 48), np.uint8) for _ in range(6)]
    for number, mask in enumerate(drawn):
        cv2.circle(mask, (10 + 3 * number, 20), 6, 1 + number % 2, -1)
    (tmp_path / "in").mkdir()
    writer = ArrayRecordWriter(str(tmp_path / "in" / "made-train.array_record-00000-of-00001"), "group_size:1")
    for number, mask in enumerate(drawn):
        fields = {"mask": cv2.imencode(".png", mask)[1].tobytes(), "frame": f"../{number}"}
        writer.write(encode_record(record(number, **fields)))
    writer.close()
    model, table = open_model(segmenter), read_table(str(tmp_path / "in"))
    found = annotations.survey(table)
    task = Segmentation(annotations.classes(table, found, SEGMENTER["outputs"]), found.pixels[:, 1:3] > 0)
    masks = results.Masks(SimpleNamespace(task=task, table=table, workdir=tmp_path / "run"), SimpleNamespace(name="m"))
    images = next(decode(table, np.arange(6), size=(16, 16), channels=1, batch_size=6))
    for rows in (np.arange(4), np.arange(4, 6)):
        masks.add(rows, results.predict(SimpleNamespace(task=task), model, images[rows]))
    masks.write()
    assert run(segmenter, tmp_path / "in", tmp_path / "out") == 0
    predicted = [row["mask"] for row in rows_of(tmp_path / "out" / "predictions.csv")]
    coco = COCO(str(tmp_path / "run" / "masks" / "m" / "coco.json"))
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == SEGMENTER["outputs"]
    for number, name in enumerate(predicted):
        image = coco.loadImgs(number + 1)[0]
        png = cv2.imread(str(tmp_path / "run" / "masks" / "m" / image["file_name"]), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(png, cv2.imread(str(tmp_path / "out" / name), cv2.IMREAD_UNCHANGED))
        assert (image["height"], image["width"]) == png.shape == (40, 48)
        again = np.zeros_like(png)
        for one in coco.loadAnns(coco.getAnnIds(imgIds=number + 1)):
            area = coco.annToMask(one)
            left, top, across, down = one["bbox"]
            assert area.sum() == one["area"] == area[top : top + down, left : left + across].sum()
            again[area > 0] = one["category_id"]
        np.testing.assert_array_equal(again, png)


QUERIES = {
    "model": "vit",
    "encoder": ENCODER | {"depth": 2},
    "task": "instances",
    "outputs": ["lesion", "cyst"],
    "head": {"kind": "queries", "width": 64, "queries": 6, "blocks": 1},
}


def finder(directory, seed):
    """A model of instances whose random queries are sure of themselves."""
    network = build(QUERIES)(nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    params = jax.tree.map(lambda value: value + 0.3 * rng.standard_normal(value.shape, np.float32), params)
    save_model(str(directory), Model(params, QUERIES, preprocessing((16, 16), 1, [0.25], [0.2]), []))
    return str(directory)


def test_areas_are_in_cm2_wherever_a_file_says_how_large_its_pixels_are(segmenter, tmp_path):
    (tmp_path / "in").mkdir()
    volume = np.stack([frame(n, 1, (33, 47)) for n in range(2)])
    head = "ObjectType = Image\nNDims = 3\nDimSize = 47 33 2\nElementType = MET_UCHAR\nElementSpacing = 0.4 0.5 1\n"
    (tmp_path / "in" / "v.mha").write_bytes((head + "ElementDataFile = LOCAL\n").encode() + volume.tobytes())
    assert run(segmenter, tmp_path / "in", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 2
    for row in rows:
        for name in SEGMENTER["outputs"]:
            assert float(row[f"area_cm2:{name}"]) == pytest.approx(
                int(row[f"area_pixels:{name}"]) * 0.2 / 100, abs=1e-5
            )


def test_instances_are_counted_and_are_in_coco_with_their_scores(files, tmp_path, capsys):
    from pycocotools.coco import COCO

    checkpoint = finder(tmp_path / "model", 0)
    assert run(checkpoint, files, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    coco = COCO(str(tmp_path / "out" / "masks" / "coco.json"))
    assert len(coco.getImgIds()) == len(rows) == 7
    counted = 0
    for row, image in zip(rows, coco.loadImgs(coco.getImgIds()), strict=True):
        assert row["mask"] == "masks/" + image["file_name"]
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        sure = [one for one in found if one["score"] >= 0.5]
        png = cv2.imread(str(tmp_path / "out" / row["mask"]), cv2.IMREAD_UNCHANGED)
        assert (png > 0).sum() == (np.any([coco.annToMask(one) for one in sure], axis=0).sum() if sure else 0)
        for c, name in enumerate(QUERIES["outputs"], 1):
            mine = [one for one in sure if one["category_id"] == c]
            assert int(row[f"count:{name}"]) == len(mine)
            together = np.any([coco.annToMask(one) for one in mine], axis=0).sum() if mine else 0
            assert int(row[f"area_pixels:{name}"]) == together
        counted += len(sure)
    assert counted
    assert run(checkpoint, files, tmp_path / "again", "--flip=on") == 2
    assert "what queries find on a mirrored frame has another order" in capsys.readouterr().err


def test_what_several_models_find_is_one_answer():
    """Two models: both see the left square (the second half of it more), one alone sees the right one."""
    masks = np.zeros((2, 3, 8, 16), np.uint8)
    masks[0, 0, 2:6, 1:5] = masks[1, 2, 2:6, 1:6] = masks[0, 1, 2:6, 10:14] = 255
    classes = np.zeros((2, 3, 2))
    classes[0, 0, 0], classes[1, 2, 0], classes[0, 1, 1] = 0.9, 0.7, 0.8
    found = merged(classes, masks, (8, 16))
    assert [(one["class"], one["score"]) for one in found] == [(0, 0.8), (1, 0.4)]
    assert [one["spread"] for one in found] == pytest.approx([0.1, 0.4])
    np.testing.assert_array_equal(run_lengths.decode(found[1]["mask"]), masks[0, 1] > 0)
    np.testing.assert_array_equal(run_lengths.decode(found[0]["mask"]), masks[1, 2] > 0)  # half of them is enough
    answer = detected([QUERIES] * 2, {"classes": classes, "masks": masks}, (8, 16), (0.5, 2.0))
    assert answer.cells == {
        "count:lesion": 1, "count:cyst": 0, "area_pixels:lesion": 20, "area_pixels:cyst": 0,
        "area_cm2:lesion": 0.2, "area_cm2:cyst": 0.0, "uncertainty": pytest.approx(0.1),
    }  # fmt: skip
    over = np.zeros((1, 2, 8, 16), np.uint8)
    over[0, 0, 2:6, 1:5] = over[0, 1, 2:6, 4:8] = 255  # one column is of both
    twice = detected([QUERIES], {"classes": np.array([[[0.9, 0], [0.8, 0]]]), "masks": over}, (8, 16), (0.0, 0.0))
    assert (twice.cells["count:lesion"], twice.cells["area_pixels:lesion"]) == (2, 28)
    assert (twice.mask == 1).sum() == 28
    alone = detected([QUERIES], {"classes": classes[:1], "masks": masks[:1]}, (8, 16), (0.0, 0.0))
    assert (alone.cells["count:cyst"], alone.cells["area_cm2:cyst"]) == (1, "")
    assert "uncertainty" not in alone.cells
    other = classes.copy()
    other[1, 2] = 0, 0.7  # the same pixels as another class are another instance
    assert len(merged(other, masks, (8, 16))) == 3


@pytest.mark.parametrize("name", ["a/b.png", "..", "../up", "a\\b", "", "-x", "nul\0", "x" * 300, "\u202egnp.exe", "."])
def test_any_name_is_a_path_below_its_folder(tmp_path, name):
    path = safe_path(name)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / f"{path}.png.incomplete").touch()
    assert tmp_path in (tmp_path / path).resolve().parents
    assert safe_path(name + "/") != safe_path(name + "y")


def test_a_folder_of_something_else_or_of_another_model_is_refused(classifier, segmenter, files, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    assert run(classifier, files / "two.bmp", tmp_path) == 2
    assert "holds something else (masks)" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "masks")
    assert run(classifier, files / "two.bmp", tmp_path / "out") == 0
    (tmp_path / "out" / "notes.txt").touch()
    assert run(classifier, files / "two.bmp", tmp_path / "out") == 2
    assert "holds something else (notes.txt)" in capsys.readouterr().err
    (tmp_path / "out" / "notes.txt").unlink()
    assert run(segmenter, files / "two.bmp", tmp_path / "out") == 2
    assert "holds predictions of another checkpoint; name a new folder" in capsys.readouterr().err
    assert run(classifier, files / "two.bmp", tmp_path / "out", "--stride=2") == 2
    assert "holds predictions with --stride=1" in capsys.readouterr().err


def test_models_that_predict_nothing_known_are_refused(files, tmp_path, capsys):
    network = build({"model": "vit", "encoder": ENCODER})(nnx.Rngs(0))
    params = {"encoder": nnx.to_pure_dict(nnx.state(network, nnx.Param))}
    description = {"model": "vit", "encoder": ENCODER}
    save_model(str(tmp_path / "e"), Model(params, description, preprocessing((16, 16), 1, [0.25], [0.2]), []))
    assert run(tmp_path / "e", files / "two.bmp", tmp_path / "out") == 2
    assert "holds an encoder without a head" in capsys.readouterr().err
    save(tmp_path / "r", {"model": "vit", "encoder": ENCODER, "pool": "mean", "outputs": ["mm"]}, task="astrology")
    assert run(tmp_path / "r", files / "two.bmp", tmp_path / "out") == 2
    assert "is a model for 'astrology'; predicted are classification, segmentation" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", ["results.json", "suite.json"])
def test_an_evaluation_keeps_no_model_to_predict_with(files, tmp_path, capsys, left):
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / left).write_text("{}")
    assert run(tmp_path / "probe", files / "two.bmp", tmp_path / "out") == 2
    assert "probe is an evaluation, which keeps no model; give a fine-tuning run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "nowhere"}, "--data: 'nowhere' is not there"),
        ({"data": "EMPTY"}, "holds no file that can be read"),
        ({"checkpoint": "nowhere"}, "is no folder"),
        ({"batch_size": "3"}, "--batch_size=3 must be a multiple of the 8 devices"),
        ({"stride": "0"}, "--stride and --workers must be 1 or more"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(classifier, files, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    flags = {"checkpoint": classifier, "data": str(files / "two.bmp"), "output": str(tmp_path / "out")} | arguments
    flags = {name: str(tmp_path / "empty") if value == "EMPTY" else value for name, value in flags.items()}
    assert predict.main([f"--{name}={value}" for name, value in flags.items()]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_nothing_that_can_be_read_is_an_error_that_leaves_the_reasons(classifier, files, tmp_path, capsys):
    assert run(classifier, files / "damaged.png", tmp_path / "out") == 2
    assert "none of the files can be read" in capsys.readouterr().err
    assert rows_of(tmp_path / "out" / "skipped.csv")[0]["file"] == "damaged.png"
    assert json.loads((tmp_path / "out" / "prediction.json").read_text())["kind"] == "classification"
