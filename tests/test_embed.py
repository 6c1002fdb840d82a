"""Features on request, of shards and of folders with pictures."""

import cv2
import numpy as np
import pytest
from flax import nnx
from pyarrow import parquet

from tests.helpers import frame, write_shards
from usfmae_jax import embed
from usfmae_jax.data.table import read_table
from usfmae_jax.interop.model import Model, open_model, preprocessing, save_model
from usfmae_jax.models.vit import ViT
from usfmae_jax.probing import features
from usfmae_jax.training.mesh import make_mesh

ARCHITECTURE = {"image_size": [32, 32], "patch_size": 8, "channels": 1, "width": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("encoder"))
    params = nnx.to_pure_dict(nnx.state(ViT(**ARCHITECTURE | {"image_size": (32, 32)}, rngs=nnx.Rngs(0)), nnx.Param))
    description = {"model": "vit", "encoder": ARCHITECTURE}
    save_model(directory, Model({"encoder": params}, description, preprocessing((32, 32), 1, [0.25], [0.2]), []))
    return directory


def read(path):
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def test_features_of_shards_are_those_that_are_evaluated(encoder, shards, tmp_path):
    assert embed.main([f"--checkpoint={encoder}", f"--data={shards}", f"--output={tmp_path / 'new' / 'f.npz'}"]) == 0
    found, frames, weights = read(tmp_path / "new" / "f.npz"), read_table(shards), open_model(encoder)
    run = features.extractor(weights, "mean", mesh=make_mesh(), batch_size=64)
    expected = features.extract(run, weights, frames, pool="mean", batch_size=64)
    np.testing.assert_allclose(found["features"], expected, rtol=1e-5, atol=1e-5)
    assert found["features"].dtype == np.float32
    for name in ("source", "dataset", "patient", "video", "frame", "label"):
        assert found[name].tolist() == getattr(frames, name).tolist()
    assert found["weights"] == weights.fingerprint


@pytest.mark.parametrize(("pool", "shape"), [("cls", (48, 32)), ("patches", (48, 16, 32))])
def test_other_pooling(encoder, shards, tmp_path, pool, shape):
    embed.embed(encoder, shards, str(tmp_path / "f.npz"), pool, batch_size=24)
    assert read(tmp_path / "f.npz")["features"].shape == shape


def test_a_folder_of_pictures_needs_no_shards_and_damaged_ones_are_left_out(encoder, tmp_path, capsys):
    for number in range(5):
        (tmp_path / "pictures" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "pictures" / f"{number % 2}" / f"{number}.PNG"), frame(number, 0))
    (tmp_path / "pictures" / "broken.jpg").write_text("no picture")
    (tmp_path / "pictures" / "notes.txt").write_text("not even by its name")
    assert embed.embed(encoder, str(tmp_path / "pictures"), str(tmp_path / "f.npz")) == 5
    shown = capsys.readouterr().err
    assert "broken.jpg is left out" in shown
    assert "1 file is no PNG, JPEG, BMP or TIFF and passed over: notes.txt" in shown
    found = read(tmp_path / "f.npz")
    assert found["source"].tolist() == ["0/0.PNG", "0/2.PNG", "0/4.PNG", "1/1.PNG", "1/3.PNG"]
    assert set(found["label"].tolist()) == {-1}
    assert set(found["dataset"].tolist()) == {"pictures"}
    assert len(np.unique(found["features"].round(4), axis=0)) == 5


def test_pictures_of_any_depth_and_format_have_the_features_of_what_they_show(encoder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    shown = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8), (9, 9), 0)
    shown = cv2.normalize(shown, None, 0, 255, cv2.NORM_MINMAX)
    for name, pixels in {
        "a_8_bits.png": shown,
        "b_12_bits_in_16.png": shown.astype(np.uint16) * 16,
        "c_8_bits_in_16.png": shown.astype(np.uint16),
        "d.tif": shown,
        "e_12_bits_in_16.tiff": shown.astype(np.uint16) * 16,
    }.items():
        cv2.imwrite(str(tmp_path / "in" / name), pixels)
    cv2.imwritemulti(str(tmp_path / "in" / "pages.tif"), [shown, shown])
    for number in range(7):
        (tmp_path / "in" / f"{number}.dcm").touch()
    assert embed.embed(encoder, str(tmp_path / "in"), str(tmp_path / "f.npz")) == 5
    features = read(tmp_path / "f.npz")["features"]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    assert (features @ features[0]).min() > 0.999
    warned = capsys.readouterr().err
    assert "7 files are no PNG, JPEG, BMP or TIFF and passed over: 0.dcm, 1.dcm, 2.dcm and 4 more" in warned
    assert "pages.tif is left out: it has several pages" in warned


def test_damaged_and_unlabelled_records_do_not_stop_it(encoder, tmp_path, capsys):
    write_shards(tmp_path, count=12, damaged=(3,), kind="tfrecord")
    assert embed.embed(encoder, str(tmp_path), str(tmp_path / "f.npz"), split="train") == 11
    assert "record number" in capsys.readouterr().err
    assert "3.png" not in read(tmp_path / "f.npz")["source"].tolist()


def test_a_table_holds_the_same(encoder, shards, tmp_path):
    for name in ("f.npz", "f.parquet"):
        embed.embed(encoder, shards, str(tmp_path / name))
    table, found = parquet.read_table(tmp_path / "f.parquet"), read(tmp_path / "f.npz")
    np.testing.assert_array_equal(np.stack(table["features"].to_numpy()), found["features"])
    for name in ("source", "patient", "label"):
        assert table[name].to_pylist() == found[name].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "f.csv"}, "must end in .npz or .parquet"),
        ({"output": "f.parquet", "pool": "patches"}, "a table cannot hold patch tokens"),
        ({"data": "EMPTY"}, "holds neither shards nor PNG"),
        ({"data": "nowhere"}, "no shards match"),
        ({"split": "test"}, "has no split 'test'"),
        ({"checkpoint": "nowhere"}, "is no folder"),
        ({"batch_size": "3"}, "--batch_size=3 must be a multiple of the 8 devices"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(encoder, shards, tmp_path, capsys, arguments, message):
    flags = {"checkpoint": encoder, "data": shards, "output": str(tmp_path / "f.npz")} | arguments
    (tmp_path / "empty").mkdir()
    flags = {name: str(tmp_path / "empty") if value == "EMPTY" else value for name, value in flags.items()}
    assert embed.main([f"--{name}={value}" for name, value in flags.items()]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ")
    assert not list(tmp_path.glob("f.*"))
