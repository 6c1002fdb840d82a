"""A trained model is found wherever a run leaves it, is the same one, and says where it comes from."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from flax import nnx
from orbax.checkpoint import v1 as orbax

from usfmae_jax import load_encoder
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError, visible
from usfmae_jax.interop import card
from usfmae_jax.interop.checkpoint import load_parameters, save_parameters
from usfmae_jax.interop.model import (
    Model,
    build,
    flatten,
    members,
    model_graph,
    open_model,
    preprocessing,
    save_model,
)
from usfmae_jax.models.heads import Classifier
from usfmae_jax.models.mae import MAE
from usfmae_jax.models.resnet import ResNet
from usfmae_jax.models.vit import ViT
from usfmae_jax.pretraining.loop import pretrain

ENCODER = {
    "image_size": (32, 32), "patch_size": 8, "channels": 1, "width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0,
}  # fmt: skip
BARE = {"model": "vit", "encoder": ENCODER}
MASKED = BARE | {"decoder": {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}}
VIT = BARE | {"pool": "cls", "classes": ["benign", "malignant"]}
SCALE = {"mean": [1.0], "deviation": [2.0], "unit": ["mm"], "of_frame": [False]}
OTHER_TASK = BARE | {"pool": "mean", "outputs": ["cm"]}
RESNET = {
    "model": "resnet50",
    "resnet": {"channels": 1, "depths": (1, 1, 1, 1), "width": 8},
    "classes": ["benign", "malignant", "normal"],
}
PREPROCESSING = preprocessing((32, 32), 1, (0.25,), (0.2,))
LINEAGE = [{"job": "finetune", "step": 3}]

#: What version 0.1 wrote: a pretraining run with its checkpoint and encoder, a classifier, and the shard they saw.
VERSION_0_1 = pathlib.Path(__file__).parent / "version_0_1"


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards):
    """The workdir of a finished run of 4 steps with checkpoints after 2 and 4."""
    from tests.helpers import tiny_config

    config = tiny_config(shards)
    config.train.steps = 4
    config.checkpoint.every = 2
    workdir = tmp_path_factory.mktemp("run")
    assert pretrain(config, str(workdir))
    return workdir


def _made(description):
    _, params, stats = nnx.split(build(description)(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    params = nnx.to_pure_dict(params)
    stats = jax.tree.map(lambda s: s + 0.5, nnx.to_pure_dict(stats))  # as after some training
    params = {"encoder": params} if description == BARE else params
    return Model(params, description, PREPROCESSING, LINEAGE, stats)


@pytest.mark.parametrize("place", ["", "encoder", "checkpoints", "checkpoints/4"])
def test_a_run_and_all_its_parts_give_the_same_weights(run, place):
    model, reference = open_model(str(run / place)), open_model(str(run / "encoder"))
    assert model.kind == "encoder"
    assert model.fingerprint == reference.fingerprint
    assert model.description == reference.description
    assert model.preprocessing == reference.preprocessing
    assert model.image_format == ((32, 32), 1)
    assert model.grid() == (4, 4)
    assert [stage["step"] for stage in model.lineage] == [4]
    jax.tree.map(np.testing.assert_array_equal, model.params, reference.params)


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/4"])
def test_the_whole_model_has_its_decoder(run, place):
    whole = open_model(str(run / place), whole=True)
    assert whole.kind == "mae"
    assert whole.encoder().fingerprint == open_model(str(run)).fingerprint
    jax.tree.map(np.testing.assert_array_equal, whole.params, load_parameters(str(run))[0])
    nnx.merge(model_graph(build(whole.description)), whole.params)
    assert open_model(str(run / "encoder"), whole=True).kind == "encoder"


def test_a_step_is_that_checkpoint(run):
    early = open_model(str(run), step=2)
    assert early.fingerprint == open_model(str(run / "checkpoints" / "2")).fingerprint
    assert early.fingerprint != open_model(str(run)).fingerprint
    assert early.lineage[-1]["step"] == 2
    with pytest.raises(InputError, match=r"has the checkpoints \[2, 4\], not 3"):
        open_model(str(run), step=3)


@pytest.mark.parametrize(
    ("place", "kind", "fingerprint"),
    [
        ("run", "encoder", "db11d5e4ec66"),
        ("run/encoder", "encoder", "db11d5e4ec66"),
        ("run/checkpoints", "encoder", "db11d5e4ec66"),
        ("classifier", "classifier", "9cf7203105b9"),
    ],
)
def test_what_version_0_1_wrote_is_opened(place, kind, fingerprint):
    model = open_model(str(VERSION_0_1 / place))
    assert (model.kind, model.fingerprint) == (kind, fingerprint)  # as it was then: resumed runs compare it
    assert model.lineage[0]["step"] == 2
    frames = read_table(str(VERSION_0_1 / "shards"))
    assert len(frames) == 8
    assert load_encoder(VERSION_0_1 / "run")(np.zeros((1, 8, 8), np.uint8)).class_token.shape == (1, 16)


def test_a_checkpoint_of_version_0_1_has_its_decoder():
    model = open_model(str(VERSION_0_1 / "run"), whole=True)
    assert model.kind == "mae"
    assert model.description["decoder"] == {"decoder_width": 4, "decoder_depth": 1, "decoder_num_heads": 1}
    nnx.merge(model_graph(build(model.description)), model.params)


@pytest.mark.parametrize("about", [{}, {"kind": "classifier", "description": VIT, "preprocessing": PREPROCESSING}])
def test_a_checkpoint_of_a_fine_tuning_run_is_refused(tmp_path, about):
    config = {"model": ENCODER | MASKED["decoder"] | {"mean": [0.25], "std": [0.2]}, "data": {"channels": 1}}
    save_parameters(str(tmp_path), _made(VIT).params, about, config)
    with pytest.raises(InputError, match=r"checkpoint 0 in .* is not of a pretraining run; finish the run to get its"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("description", "kind", "network"),
    [
        (BARE, "encoder", ViT),
        (VIT, "classifier", Classifier),
        (OTHER_TASK, "model", Classifier),
        pytest.param(RESNET, "classifier", ResNet, marks=pytest.mark.slow),
    ],
)
def test_what_is_written_is_read_and_answers_the_same(tmp_path, description, kind, network):
    model = _made(description)
    save_model(str(tmp_path), model)
    read = open_model(str(tmp_path))
    assert (read.kind, read.description) == (kind, json.loads(json.dumps(description)))
    assert (read.preprocessing, read.lineage) == (PREPROCESSING, LINEAGE)
    assert read.fingerprint == model.fingerprint
    jax.tree.map(np.testing.assert_array_equal, model.params, read.params)
    jax.tree.map(np.testing.assert_array_equal, model.stats, read.stats)
    assert isinstance(nnx.eval_shape(lambda: build(read.description)(nnx.Rngs(0))), network)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))

    def answer(model):
        params = model.params["encoder"] if kind == "encoder" else model.params
        return nnx.merge(model_graph(build(model.description)), params, *filter(None, [model.stats]))(images)

    outputs = description.get("classes", description.get("outputs"))
    assert answer(read).shape == ((2, len(outputs)) if outputs else (2, 17, 32))
    np.testing.assert_array_equal(answer(read), answer(model))


def test_the_encoder_inside_is_had_of_a_vision_transformer():
    assert isinstance(build(MASKED)(nnx.Rngs(0)), MAE)
    for description in (MASKED, VIT):
        inner = _made(description).encoder()
        assert (inner.kind, inner.description, inner.params.keys()) == ("encoder", BARE, {"encoder"})
    with pytest.raises(InputError, match="these weights are of a resnet50, not of a vision transformer"):
        _made(RESNET).encoder()


def test_the_weights_carry_their_lineage(tmp_path):
    save_model(str(tmp_path), _made(VIT))
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["lineage"]) == LINEAGE
    assert not list(tmp_path.glob("*.incomplete"))


def test_how_it_is_computed_is_chosen_when_it_is_built():
    model = build(VIT, dtype=jnp.bfloat16, drop_path=0.1, freeze=1, attention="xla", scan=False, remat="full")(
        nnx.Rngs(0)
    )
    assert (model.drop_path, model.freeze, model.encoder.dtype) == (0.1, 1, jnp.bfloat16)
    assert (model.encoder.blocks.scan, model.encoder.blocks.remat) == (False, "full")
    assert build(RESNET, freeze=4)(nnx.Rngs(0)).freeze == 4


def test_the_fingerprint_tells_values_names_and_statistics_apart():
    kernel, about = np.zeros((2, 2), np.float32), {"model": "resnet50", "resnet": {}}
    trees = [({"a": kernel}, {}), ({"b": kernel}, {}), ({"a": kernel + 1}, {}), ({"a": kernel}, {"a": kernel})]
    models = [Model(params, about, PREPROCESSING, [], stats) for params, stats in trees]
    assert len({model.fingerprint for model in models}) == 4
    assert Model({"a": kernel.astype(np.float64)}, about, PREPROCESSING, []).fingerprint == models[0].fingerprint


def test_what_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        open_model(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds no encoder, no classifier and no finished checkpoint"):
        open_model(str(tmp_path))
    (tmp_path / "architecture.json").write_text("{")
    with pytest.raises(InputError, match="is not an encoder directory"):
        open_model(str(tmp_path))


def test_a_damaged_directory_is_refused_in_one_sentence(tmp_path):
    save_model(str(tmp_path), _made(VIT))
    about = json.loads((tmp_path / "architecture.json").read_text())
    (tmp_path / "architecture.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(InputError, match="another classifier format than 1; update"):
        open_model(str(tmp_path))
    (tmp_path / "architecture.json").write_text(json.dumps(about | {"model": "perceiver"}))
    with pytest.raises(InputError, match="holds no classifier but other weights, such as an encoder's"):
        open_model(str(tmp_path))
    (tmp_path / "architecture.json").write_text(json.dumps(about))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a classifier directory"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: np.where(value == value.max(), np.nan, value), "values that are not finite numbers"),
        (lambda value: np.where(value == value.max(), np.inf, value), "values that are not finite numbers"),
        (lambda value: value.astype(np.int32), "values of type int32, where parameters are floating-point"),
    ],
)
def test_values_that_are_no_parameters_are_refused(tmp_path, change, says):
    save_model(str(tmp_path), _made(VIT))
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if name.endswith("kernel"))
    safetensors.numpy.save_file(tensors | {name: change(tensors[name])}, file)
    with pytest.raises(InputError, match=f"cannot be used: {name} holds {says}"):
        open_model(str(tmp_path))


def test_parameters_of_half_precision_are_read_as_float32(tmp_path):
    save_model(str(tmp_path), _made(VIT))
    file = tmp_path / "model.safetensors"
    halves = {name: one.astype(np.float16) for name, one in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(halves, file)
    assert {str(leaf.dtype) for leaf in flatten(open_model(str(tmp_path)).params).values()} == {"float32"}


def test_a_damaged_checkpoint_is_refused_in_one_sentence(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    for file in (tmp_path / "checkpoints" / "4" / "state" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(b"")
    for file in (tmp_path / "checkpoints" / "4" / "state" / "d").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"checkpoint 4 in .* cannot be read"):
        open_model(str(tmp_path))


def test_several_members_must_be_chosen_from(tmp_path):
    for name in ("fold-1", "fold-2"):
        save_model(str(tmp_path / "members" / name / "classifier"), _made(VIT))
    (tmp_path / "members" / "fold-3").mkdir()  # not finished
    assert [path[-6:] for path in members(str(tmp_path))] == ["fold-1", "fold-2"]
    with pytest.raises(InputError, match="holds 2 trained models; choose one"):
        open_model(str(tmp_path))
    shutil.rmtree(tmp_path / "members" / "fold-2")
    assert flatten(open_model(str(tmp_path)).params).keys() == flatten(_made(VIT).params).keys()


def _changed(folder, file, change):
    """A directory with a classifier, whose JSON file `change` was made to."""
    save_model(str(folder), _made(VIT))
    path = folder / f"{file}.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))
    return str(folder)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("architecture", {"encoder": ENCODER | {"image_size": [9600, 9600]}}, "image_size is"),
        (
            "architecture",
            {"encoder": ENCODER | {"image_size": [4096, 4096], "patch_size": 1}},
            "none that a model is for",
        ),
        ("architecture", {"encoder": ENCODER | {"image_size": [32, 33]}}, "none that a model is for"),
        ("architecture", {"encoder": ENCODER | {"depth": 10**9}}, "depth is '1000000000'"),
        ("architecture", {"encoder": ENCODER | {"width": "32"}}, "width is '32'"),
        ("architecture", {"encoder": ENCODER | {"num_heads": 3}}, "cannot be split among 3 heads"),
        ("architecture", {"encoder": ENCODER | {"remat": "full"}}, "'remat', which is not known"),
        ("architecture", {"decoder": MASKED["decoder"]}, "'decoder', which is not known"),
        ("architecture", {"encoder": [1]}, "encoder of architecture.json is no object"),
        (
            "architecture",
            {"encoder": ENCODER | {"width": 64}},
            r"is \[2, 32\], and architecture.json says \[2, 64\]",
        ),
        ("architecture", {"encoder": ENCODER | {"depth": 3}}, "and architecture.json says"),
        ("architecture", {"classes": ["a"]}, "and architecture.json says"),
        ("architecture", {"pool": "mean"}, "lacks head_norm"),
        ("architecture", {"pool": "max"}, "pool is 'max'"),
        ("architecture", {"scale": SCALE}, "has a scale, which is for regression"),
        ("architecture", {"task": "regression", "scale": SCALE}, "lacks outputs"),
        ("architecture", {"task": "regression", "outputs": ["a"]}, "lacks scale"),
        (
            "architecture",
            {"task": "regression", "outputs": ["a"], "scale": 2},
            "scale of architecture.json is no object",
        ),
        ("architecture", {"task": "regression", "outputs": ["a", "b"], "scale": SCALE}, "are not one for each of"),
        (
            "architecture",
            {"task": "regression", "outputs": ["a"], "scale": SCALE | {"deviation": [0.0]}},
            r"deviation is '\[0.0\]'",
        ),
        ("preprocessing", {"image_size": [9600, 9600]}, "image_size is"),
        ("preprocessing", {"image_size": [32, 33]}, "none for patches of 8"),
        ("preprocessing", {"std": [0.0]}, "std is"),
        ("preprocessing", {"mean": "0"}, "mean is '0'"),
        ("preprocessing", {"mean": [0.1, 0.2, 0.3]}, "none for a model of 1 channels"),
        ("preprocessing", {"channels": 3}, "none for a model of 1 channels"),
        ("preprocessing", {"image_size": [1024, 32]}, r"none for a model of images of \[32, 32\]"),
        ("lineage", {"stages": [1]}, "a stage of lineage.json is no object"),
        ("lineage", {"stages": [{"data": {"a": 1}}]}, "data is"),
        ("lineage", {"stages": [{"data": [{"frames": "many"}]}]}, "frames is 'many'"),
        ("lineage", {"stages": [{"source": {}}]}, "lacks files"),
        ("lineage", {"stages": [{"config": {"mask": 1}}]}, "mask is no object"),
        ("lineage", {"stages": [{"licence": ["x"]}]}, "licence is"),
    ],
)
def test_what_a_strangers_directory_declares_is_bounded_and_fits_its_tensors(tmp_path, file, change, sentence):
    folder = _changed(tmp_path, file, lambda content: content | change)
    with pytest.raises(InputError, match=f"cannot be used: .*{sentence}"):
        open_model(folder)


@pytest.mark.parametrize("file", ["architecture", "preprocessing"])
@pytest.mark.parametrize("content", [[], 1, None, "x"])
def test_json_that_is_no_object_is_refused(tmp_path, file, content):
    with pytest.raises(InputError, match=r"no object|is not an encoder directory"):
        open_model(_changed(tmp_path, file, lambda _: content))


def _at(place, value):
    """A change to what is stored beside the parameters: `value` at a dotted place below `about`."""

    def change(said):
        *groups, last = f"about.{place}".strip(".").split(".")
        for group in groups:
            said = said[group]
        said[last] = value

    return change


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What looks like a pretraining run before its first step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    about = {"kind": "mae", "description": MASKED, "preprocessing": PREPROCESSING}
    save_parameters(str(folder), _made(MASKED).params, about, {"model": {}, "data": {"channels": 1}})
    assert open_model(str(folder), whole=True).kind == "mae"
    return folder


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("", [1], "what it says of itself is not what a run writes"),
        ("", {}, "is not of a pretraining run"),  # of version 0.1, and the config lacks what that stored
        ("description", [1], "what it says of itself is not what a run writes"),
        ("description.model", "resnet50", "is not of a pretraining run"),
        ("description.encoder", "x", "encoder of its description is no object"),
        ("description.encoder.depth", 1, r"in it is \[2, .*, and its description says \[1, "),
        ("description.encoder.width", 64, "and its description says"),
        ("description.encoder.num_heads", 0, "num_heads is '0'"),
        ("description.encoder.num_heads", "2", "num_heads is '2'"),
        ("description.encoder.patch_size", 0, "patch_size is '0'"),
        ("description.encoder.image_size", "32", "image_size is '32'"),
        ("description.encoder.mlp_ratio", 1e9, "mlp_ratio is"),
        ("description.encoder.mlp_ratio", 2.0, "and its description says"),
        ("description.encoder.attention", "xla", "'attention', which is not known"),
        ("description.decoder", "x", "decoder of its description is no object"),
        ("description.decoder.decoder_depth", 2, "and its description says"),
        ("description.decoder.decoder_num_heads", 3, "cannot be split among 3 heads"),
        ("description.decoder.kind", "x", "kind is 'x'"),
        ("description.decoder.kind", "latent", "outputs are of the kind latent"),
        ("description.decoder.kind", "cross", "it lacks decoder"),
        ("preprocessing", None, "its preprocessing is no object"),
        ("preprocessing.image_size", [1024, 1024], r"none for a model of images of \[32, 32\]"),
        ("preprocessing.channels", 7, "channels is '7'"),
        ("preprocessing.channels", 3, "none for a model of 1 channels"),
        ("preprocessing.mean", "abc", "mean is 'abc'"),
        ("preprocessing.mean", [float("nan")], r"mean is '\[nan\]'"),
        ("preprocessing.mean", [0.1, 0.2, 0.3], "none for a model of 1 channels"),
        ("preprocessing.std", [0.0], "std is"),
    ],
)
def test_what_a_strangers_checkpoint_says_of_itself_is_checked_before_memory_is_taken(
    checkpoint, tmp_path, monkeypatch, place, value, sentence
):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "0" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    metadata["custom_metadata"].pop("digest")  # a stranger can leave it out or compute it
    _at(place, value)(metadata["custom_metadata"])
    path.write_text(json.dumps(metadata))
    monkeypatch.setattr(orbax.training.Checkpointer, "load", None)  # else the sentence would be another
    with pytest.raises(InputError, match=f"^checkpoint 0 in .*{sentence}"):
        open_model(str(tmp_path))


def test_nothing_of_a_lineage_stands_live_in_the_model_card(tmp_path):
    evil = "x\n# <script>alert(1)</script> ![a](http://b) | `c` *d* _e_ \x1b[2J\u202e"
    stage = {"job": evil, "code": evil, "step": 1, "data": [{"dataset": evil, "licence": evil, "frames": 2}]}
    stage |= {"source": {"files": [evil], "sha256": evil}, "licence": evil, "config": {"mask": {"ratio": evil}}}
    made = _made(VIT | {"classes": [evil, "b"]})
    model = Model(made.params, made.description, made.preprocessing, [stage])
    export = {"largest_difference": None, "not_compared": "no runtime"}
    card.write_card(model, "safetensors", str(tmp_path), export)
    text = (tmp_path / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    for live in ("<script", "\n# <", "![a]", "| `c`", "*d*", " _e_", "\x1b", "\u202e"):
        assert live not in body
    assert body.count("&lt;script&gt;") == 11
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert front["datasets"] == [visible(" ".join(evil.split()))]
