"""Weights in: every format recognised, every tensor accounted for, bad files refused, nothing lost on a round trip."""

import json
import pathlib

import numpy as np
import pytest

from tests.interop import made
from usfmae_jax import convert, export
from usfmae_jax.interop.checkpoint import load_parameters
from usfmae_jax.interop.files import from_array, open_safetensors
from usfmae_jax.interop.model import flatten, open_model, read_lineage
from usfmae_jax.loading import load_encoder
from usfmae_jax.models.patches import resize_table


def run(source: str | pathlib.Path, output: pathlib.Path, *arguments: str) -> int:
    return convert.main([f"--input={source}", f"--output={output}", *arguments])


def all_parameters(output: pathlib.Path) -> dict[str, np.ndarray]:
    if (output / "classifier").exists():
        return flatten(open_model(str(output / "classifier")).params)
    return flatten(load_parameters(str(output))[0])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """For each kind of model the file, and what convert made of it."""
    folder = tmp_path_factory.mktemp("converted")
    kinds = {"mae": {}, "mean": {"decoder": False, "pool": "mean"}, "cls": {"decoder": False, "pool": "cls"}}
    for kind, arguments in kinds.items():
        made.write(folder / f"{kind}.safetensors", made.tensors(**arguments))
        assert run(folder / f"{kind}.safetensors", folder / kind, *made.HEADS) == 0
    return folder


def test_parameters_lie_where_ours_do(converted):
    found, ours = made.tensors(), all_parameters(converted / "mae")
    np.testing.assert_array_equal(ours["encoder.blocks.stack.fc1.kernel"][1], found["blocks.1.mlp.fc1.weight"].read().T)
    np.testing.assert_array_equal(ours["encoder.blocks.stack.norm2.scale"][0], found["blocks.0.norm2.weight"].read())
    np.testing.assert_array_equal(ours["decoder.embed.kernel"], found["decoder_embed.weight"].read().T)
    patch = ours["encoder.patch_embed.kernel"].reshape(8, 8, 3, 32)  # row, column, channel
    np.testing.assert_array_equal(patch, found["patch_embed.proj.weight"].read().transpose(2, 3, 1, 0))


def test_a_hidden_width_whose_quotient_is_rounded_down_is_kept(tmp_path):
    assert int(61 / 28 * 28) == 60
    made.write(tmp_path / "x.safetensors", made.tensors(decoder=False, width=28, mlp_ratio=2.1786))
    assert run(tmp_path / "x.safetensors", tmp_path / "out", "--num_heads=4") == 0
    assert all_parameters(tmp_path / "out")["encoder.blocks.stack.fc1.bias"].shape == (2, 61)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *[("mae", form) for form in ("safetensors", "timm", "hf", "mae")],
        *[("mean", form) for form in ("safetensors", "timm", "mae")],
        *[("cls", form) for form in ("safetensors", "timm", "hf", "mae")],
    ],
)
def test_a_round_trip_is_bitwise(converted, tmp_path, monkeypatch, kind, form):
    monkeypatch.setattr("usfmae_jax.interop.verify.observed", _unavailable)  # compared elsewhere; here it is slow
    assert export.main([f"--checkpoint={converted / kind}", f"--format={form}", f"--output={tmp_path / 'out'}"]) == 0
    assert run(tmp_path / "out", tmp_path / "back") == 0  # heads are known from the export
    before, after = all_parameters(converted / kind), all_parameters(tmp_path / "back")
    if form in ("safetensors", "timm"):  # which have no place for a decoder
        before = {name: value for name, value in before.items() if not name.startswith("decoder.")}
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
    _assert_same_encoder(tmp_path / "back", converted / kind)


def _assert_same_encoder(*outputs):
    before, after = (open_model(str(output / "encoder")) for output in outputs)
    assert (before.description, before.preprocessing) == (after.description, after.preprocessing)


def _unavailable(*_):
    from usfmae_jax.interop.verify import UnavailableError

    raise UnavailableError("not compared here")


def test_what_was_mapped_left_and_assumed_is_said(tmp_path, capsys):
    found = made.tensors(decoder=False) | {"module.extra": from_array(np.zeros(3, np.float32))}
    source = made.write(tmp_path / "mae_pretrain_vit_base.safetensors", found)
    assert run(source, tmp_path / "out", "--num_heads=4") == 2
    assert "holds extra, which mean nothing here; --allow_partial goes on without" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", "--num_heads=4", "--allow_partial") == 0
    said = capsys.readouterr().err
    for part in ("29 tensors into the encoder", "pos_embed: the fixed sin-cos table", "extra: not understood"):
        assert part in said
    for part in ("that of ImageNet", "initialises a fresh one", "CC BY-NC 4.0; what starts from these"):
        assert part in said


def _without(*names):
    return {name: tensor for name, tensor in made.tensors().items() if name not in names}


def _with(name, shape, value=0.3):
    return made.tensors() | {name: from_array(np.full(shape, value, np.float32))}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (_with("blocks.1.attn.qkv.weight", (90, 32)), "attn.qkv.weight is (90, 32) in the file and has to be (96, 32)"),
        (_with("decoder_pred.bias", (5,)), "decoder_pred.bias is (5,) in the file and has to be (192,)"),
        (_without("blocks.0.attn.proj.weight"), "lacks blocks.0.attn.proj.weight: there is no whole encoder"),
        (_without("decoder_norm.bias"), "lacks decoder_norm.bias; --allow_partial"),
        (_without("cls_token"), "holds no ViT encoder"),
        (_without("patch_embed.proj.weight"), "holds no whole encoder"),
        (_with("decoder_pos_embed", (1, 17, 16)), "decoder_pos_embed is off the sin-cos table"),
        (_with("pos_embed", (1, 12, 32)), "pos_embed is (1, 12, 32): not a class token and a square"),
        ({"weight": from_array(np.zeros(3, np.float32))}, "no class token and blocks, but weight"),
        ({}, "holds no ViT encoder"),
        (_with("norm.bias", (32,), np.nan), "encoder.norm.bias holds values that are not finite numbers"),
        (_with("patch_embed.proj.weight", (0, 3, 8, 8)), "holds no whole encoder"),
        (
            _with("dist_token", (1, 1, 32)) | {"pos_embed": from_array(np.ones((1, 18, 32)))},
            "holds dist_token, which mean nothing here, and pos_embed is",
        ),
    ],
    ids=[
        "qkv",
        "pred",
        "lacks",
        "lacks-decoder",
        "no-token",
        "no-patches",
        "table",
        "grid",
        "other",
        "empty",
        "nan",
        "no-width",
        "distilled",
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, capsys, found, message):
    source = made.write(tmp_path / "weights.safetensors", found)
    assert run(source, tmp_path / "out", *made.HEADS) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", None, "is no whole safetensors file"),
        ("b.safetensors", b"", "is no whole safetensors file"),
        ("c.safetensors", b"<!DOCTYPE html>", "is a web page"),
        ("d.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("e.npz", b"PK", "ends in .safetensors, .pt, .pth, .bin"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "../../model-1.safetensors"}}', "names model-1.safe"),
        ("model.safetensors.index.json", b"[]", "is no index"),
    ],
    ids=["truncated", "empty", "page", "lfs", "suffix", "part", "index"],
)
def test_files_that_are_not_whole_are_refused(tmp_path, capsys, name, content, message):
    if content is None:
        content = pathlib.Path(made.write(tmp_path / "whole.safetensors", made.tensors())).read_bytes()[:-100]
    (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config", "[" * 100_000, "cannot be read as JSON"),
        ("config", {"model_args": [1]}, "config.json: model_args is"),
        ("config", {"pretrained_cfg": {"mean": 1}}, "pretrained_cfg of config.json: mean is"),
        ("config", {"image_size": 0.5}, "config.json: image_size is"),
        ("config", {"image_size": [33, 32]}, "none that a model is for"),
        ("config", {"layer_norm_eps": "x"}, "is no small positive number"),
        ("preprocessor_config", {"image_mean": "abc"}, "image_mean is"),
        ("preprocessor_config", {"image_mean": [0.5] * 3, "image_std": [0.0] * 3}, "std is"),
        ("preprocessor_config", {"image_std": [float("nan")] * 3}, "image_std is"),
        ("export", {"model": {"architecture": "x"}}, "model of export.json: architecture is"),
        ("export", {"model": [1]}, "model of export.json is no object"),
        ("export", {"model": {"decoder": [1]}}, "decoder is"),
        ("architecture", {"encoder": [1]}, "architecture.json: encoder is"),
        ("preprocessing", {"image_size": 32}, "preprocessing.json: image_size is"),
        ("preprocessing", {"image_size": [1024, 1024]}, "none for a model of images of [32, 32]"),
        ("preprocessing", {"channels": 7}, "channels is"),
        ("lineage", {"stages": [{"licence": [1]}]}, "licence is"),
    ],
)
def test_what_a_strangers_files_say_beside_weights_is_checked(tmp_path, capsys, name, content, message):
    made.write(tmp_path / "model.safetensors", made.tensors(decoder=False))
    (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert run(tmp_path, tmp_path / "out", *made.HEADS) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_heads_and_normalisation_that_no_file_tells_are_asked_for(tmp_path, capsys):
    source = made.write(tmp_path / "grey.safetensors", made.tensors(channels=1))
    assert run(source, tmp_path / "out") == 2
    assert "add --num_heads=N" in capsys.readouterr().err
    assert run(source, tmp_path / "out", "--num_heads=5") == 2
    assert "5 attention heads do not divide a width of 32" in capsys.readouterr().err
    assert run(source, tmp_path / "out", *made.HEADS) == 2
    assert "add --mean and --std" in capsys.readouterr().err
    assert run(source, tmp_path / "out", *made.HEADS, "--mean=0.2", "--std=x") == 2
    assert "--std=x must be numbers" in capsys.readouterr().err
    assert run(source, tmp_path / "out", *made.HEADS, "--mean=0.2", "--std=0.1") == 0
    assert open_model(str(tmp_path / "out" / "encoder")).preprocessing["mean"] == [0.2]


def test_an_output_folder_with_something_else_in_it_is_left_alone(converted, tmp_path, capsys):
    source = converted / "mae.safetensors"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert run(source, tmp_path / "out", *made.HEADS) == 2
    assert "holds something else (thesis.tex)" in capsys.readouterr().err
    (tmp_path / "out" / "thesis.tex").unlink()
    for seed in (1, 2):  # an earlier output is replaced, checkpoint included
        source = made.write(tmp_path / "s.safetensors", made.tensors(seed=seed))
        assert run(source, tmp_path / "out", *made.HEADS) == 0
    expected = made.tensors(seed=2)["cls_token"].read()
    np.testing.assert_array_equal(load_parameters(str(tmp_path / "out"))[0]["encoder"]["cls_token"], expected)


def test_a_decoder_that_is_not_whole_is_left_out_on_request(tmp_path, capsys):
    source = made.write(tmp_path / "w.safetensors", _without("decoder_norm.bias", "norm.bias"))
    assert run(source, tmp_path / "out", *made.HEADS, "--allow_partial") == 0
    assert "the decoder is not whole and is left out" in capsys.readouterr().err
    params = load_parameters(str(tmp_path / "out"))[0]
    assert params.keys() == {"encoder"}
    assert not params["encoder"]["norm"]["bias"].any()


@pytest.mark.parametrize("size", [32, 48], ids=["as made", "resized"])
@pytest.mark.parametrize("form", ["safetensors", "timm", "hf", "mae"])
def test_a_learned_position_table_is_kept_and_a_round_trip_is_bitwise(tmp_path, rng, monkeypatch, form, size):
    monkeypatch.setattr("usfmae_jax.interop.verify.observed", _unavailable)
    table = rng.normal(0, 0.2, (1, 17, 32)).astype(np.float32)
    found = made.tensors(decoder=False) | {"pos_embed": from_array(table)}
    source = made.write(tmp_path / "w.safetensors", found)
    assert run(source, tmp_path / "in", *made.HEADS, f"--image_size={size}") == 0
    ours = all_parameters(tmp_path / "in")
    np.testing.assert_array_equal(ours["encoder.position"], resize_table(table[0, 1:], (4, 4), (size // 8, size // 8)))
    np.testing.assert_array_equal(ours["encoder.cls_token"][0], found["cls_token"].read()[0] + table[0, :1])
    assert open_model(str(tmp_path / "in" / "encoder")).description["encoder"]["learned_positions"] is True
    assert export.main([f"--checkpoint={tmp_path / 'in'}", f"--format={form}", f"--output={tmp_path / 'out'}"]) == 0
    assert run(tmp_path / "out", tmp_path / "back") == 0
    after = all_parameters(tmp_path / "back")
    assert ours.keys() == after.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3)])
def test_grey_images_keep_their_features_when_channels_change(tmp_path, rng, old, new):
    source = made.write(tmp_path / "w.safetensors", made.tensors(channels=old))
    norm = ["--mean=0.3", "--std=0.2"] if old == 1 else ["--mean=0.4,0.5,0.6", "--std=0.2,0.25,0.3"]
    grey = rng.integers(0, 256, (2, 40, 50, 1), np.uint8)
    features = []
    for channels in (old, new):
        assert (
            run(source, tmp_path / f"{channels}", *made.HEADS, *norm, *([f"--channels={new}"] * (channels == new))) == 0
        )
        encoder = load_encoder(tmp_path / f"{channels}")
        assert encoder.architecture["channels"] == channels
        features.append(encoder(grey))
    for before, after in zip(*features, strict=True):
        np.testing.assert_allclose(before, after, atol=2e-5)


def test_another_image_size_is_used_with_an_interpolated_table_and_survives_a_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr("usfmae_jax.interop.verify.observed", _unavailable)
    source = made.write(tmp_path / "w.safetensors", made.tensors(decoder=False))
    assert run(source, tmp_path / "bad", *made.HEADS, "--image_size=33") == 2
    assert run(source, tmp_path / "out", *made.HEADS, "--image_size=16,48") == 0
    assert load_encoder(tmp_path / "out")(np.zeros((1, 9, 9), np.uint8)).patch_grid.shape == (1, 2, 6, 32)
    assert export.main([f"--checkpoint={tmp_path / 'out'}", "--format=timm", f"--output={tmp_path / 'timm'}"]) == 0
    assert open_safetensors(str(tmp_path / "timm" / "model.safetensors"))[0]["pos_embed"].shape == (1, 13, 32)
    assert run(tmp_path / "timm", tmp_path / "back") == 0
    _assert_same_encoder(tmp_path / "back", tmp_path / "out")


def test_lineage_says_whose_weights_these_were_and_is_carried_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("usfmae_jax.interop.verify.observed", _unavailable)
    source = made.write(tmp_path / "mae_pretrain_vit_large.safetensors", made.tensors())
    assert run(source, tmp_path / "a", *made.HEADS) == 0
    assert "nothing says under which licence" not in capsys.readouterr().err
    stages = read_lineage(str(tmp_path / "a" / "encoder"))
    assert [stage["job"] for stage in stages] == ["mae", "convert"]
    assert stages[0]["licence"] == "CC BY-NC 4.0"
    assert stages[1]["source"]["files"] == ["mae_pretrain_vit_large.safetensors"]
    assert str(tmp_path) not in json.dumps(stages)
    assert export.main([f"--checkpoint={tmp_path / 'a'}", "--format=hf", f"--output={tmp_path / 'hf'}"]) == 0
    metadata = open_safetensors(str(tmp_path / "hf" / "model.safetensors"))[1]
    assert json.loads(metadata["lineage"]) == stages
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    assert "so are these weights" in card
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "only.safetensors")  # the header alone is enough
    assert run(tmp_path / "only.safetensors", tmp_path / "b", *made.HEADS) == 0
    assert [stage["job"] for stage in read_lineage(str(tmp_path / "b"))] == ["mae", "convert", "convert"]


def test_a_licence_can_be_stated_and_is_asked_for(tmp_path, capsys):
    source = made.write(tmp_path / "mine.safetensors", made.tensors())
    assert run(source, tmp_path / "a", *made.HEADS) == 0
    assert "add --licence=" in capsys.readouterr().err
    assert run(source, tmp_path / "b", *made.HEADS, "--licence=Apache-2.0") == 0
    assert read_lineage(str(tmp_path / "b"))[0]["licence"] == "Apache-2.0"
