"""Against the libraries themselves: their files come in, ours go out, and the numbers agree."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.interop import made, torch_models
from tests.interop.torch_models import need
from usfmae_jax import convert, export, load_encoder
from usfmae_jax.interop import names, verify
from usfmae_jax.interop.checkpoint import load_parameters
from usfmae_jax.interop.files import Tensor
from usfmae_jax.interop.model import build, flatten, model_graph, open_model
from usfmae_jax.interop.stablehlo import run_stablehlo
from usfmae_jax.models.layers import NORM_EPS
from usfmae_jax.models.mae import mask_from_noise, masked_error, patch_targets
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.models.vit import SIZES


@pytest.fixture(scope="module")
def theirs():
    """A ViTMAE of Hugging Face with random weights."""
    return torch_models.vit_mae()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """It as a directory, as a PyTorch file of either set of names, and as all of them are converted."""
    import torch

    root = tmp_path_factory.mktemp("live")
    torch_models.saved(theirs, root / "hf")
    torch.save(theirs.state_dict(), root / "modules.pth")
    torch.save(torch_models.original_state(theirs), root / "usf-mae.pt")
    torch.save({"model": torch_models.original_state(theirs)}, root / "mae_pretrain_vit_base_full.pth")
    for name in ("hf", "modules.pth", "usf-mae.pt", "mae_pretrain_vit_base_full.pth"):
        arguments = () if name == "hf" else made.HEADS
        assert convert.main([f"--input={root / name}", f"--output={root / 'from' / name}", *arguments]) == 0
    return root


def test_the_same_weights_under_all_names_are_the_same_parameters(folder):
    first = flatten(load_parameters(str(folder / "from" / "hf"))[0])
    assert len(first) == 36
    for name in ("modules.pth", "usf-mae.pt", "mae_pretrain_vit_base_full.pth"):
        other = flatten(load_parameters(str(folder / "from" / name))[0])
        assert other.keys() == first.keys()
        for key, value in first.items():
            np.testing.assert_array_equal(value, other[key], err_msg=f"{name}: {key}")


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published_shapes_are_understood_name_by_name(size):
    need("torch", "transformers", "timm")
    torch_models.declare_torchvision()
    import timm
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    about = SIZES[size]
    decoder = {"decoder_width": 512, "decoder_depth": 8, "decoder_num_heads": 16}
    config = ViTMAEConfig(
        hidden_size=about["width"],
        num_hidden_layers=about["depth"],
        num_attention_heads=about["num_heads"],
        intermediate_size=4 * about["width"],
        patch_size=about["patch_size"],
    )
    with torch.device("meta"):  # names and shapes without a gigabyte of numbers
        theirs = ViTMAEForPreTraining(config).state_dict()
        patch = about["patch_size"]
        of_timm = timm.create_model(f"vit_{size}_patch{patch}_224", num_classes=0).state_dict()
    n = 1 + (224 // patch) ** 2
    for state, origin, expected in (
        (theirs, "hf", names.expected_shapes(about, decoder) | {"decoder_pos_embed": (1, n, 512)}),
        (of_timm, "timm", names.expected_shapes(about, None)),
    ):
        tensors = {name: Tensor(tuple(value.shape), list) for name, value in state.items()}
        assert names.recognise(set(tensors)) == origin
        found, left, unknown = names.from_others(tensors, origin)
        assert not left
        assert not unknown
        shapes = {name: tensor.shape for name, tensor in found.items()}
        assert shapes == expected | {"pos_embed": (1, n, about["width"])}


def test_features_and_loss_agree_with_hugging_face(theirs, folder):
    import torch

    model = open_model(str(folder / "from" / "hf"), whole=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    noise = np.random.default_rng(1).random((3, 16), np.float32)
    x = normalize_images(jnp.asarray(images), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        expected = theirs(pixels, noise=torch.from_numpy(noise))
        theirs.config.mask_ratio, ratio = 0.0, theirs.config.mask_ratio
        order = torch.arange(16.0).expand(3, -1)  # shows all patches, in their order
        tokens = theirs.vit(pixels, noise=order).last_hidden_state.numpy()
        theirs.config.mask_ratio = ratio

    graph = model_graph(build(model.description))

    @jax.jit
    def run(params):
        network = nnx.merge(graph, params)
        keep, restore, mask = mask_from_noise(noise, 0.75)
        error, count = masked_error(network(x, keep, restore), patch_targets(x, 8, normalize=True), mask)
        return network.encoder(x), error / count

    features, loss = run(model.params)
    np.testing.assert_allclose(features, tokens, atol=1e-4)
    np.testing.assert_allclose(loss, expected.loss.numpy(), rtol=1e-5)


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_features_agree_with_hugging_face_at_another_size_and_with_the_eps_of_its_config(tmp_path, eps):
    need("torch", "transformers")
    torch_models.declare_torchvision()
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 40, 3), np.uint8)
    sizes = torch_models.SIZE | torch_models.IMAGES | {"layer_norm_eps": eps}
    network = ViTModel(ViTConfig(**sizes), add_pooling_layer=False).eval()  # as initialised: the class token is small
    network.save_pretrained(tmp_path / "hf")
    assert convert.main([f"--input={tmp_path / 'hf'}", f"--output={tmp_path / 'in'}", "--licence=MIT"]) == 0
    found = load_encoder(tmp_path / "in")(images, resized=False)
    x = normalize_images(jnp.asarray(images), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        pixels = torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())
        tokens = network(pixels, interpolate_pos_encoding=True).last_hidden_state.numpy()
    np.testing.assert_allclose(found.class_token, tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.patch_grid.reshape(2, 30, -1), tokens[:, 1:], atol=1e-5)
    if eps != NORM_EPS:
        assert export.main([f"--checkpoint={tmp_path / 'in'}", "--format=onnx", f"--output={tmp_path / 'onnx'}"]) == 0
        assert export.main([f"--checkpoint={tmp_path / 'in'}", "--format=hf", f"--output={tmp_path / 'out'}"]) == 0
        assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_norm_eps"] == eps


@pytest.mark.parametrize(
    ("form", "packages"),
    [
        ("timm", ("torch", "timm")),
        ("hf", ("torch", "transformers")),
        ("mae", ("torch",)),
        ("onnx", ("onnx", "onnxruntime")),
        ("stablehlo", ("flatbuffers",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", ["mae", "mean", "cls"])
def test_an_export_agrees_and_its_example_runs(tmp_path, monkeypatch, kind, form, packages):
    need(*packages)
    if "timm" in packages or "transformers" in packages:
        torch_models.declare_torchvision()
    pool = "" if kind == "mae" else kind
    source = made.write(tmp_path / "w.safetensors", made.tensors(decoder=not pool, pool=pool))
    assert convert.main([f"--input={source}", f"--output={tmp_path / 'in'}", *made.HEADS]) == 0
    status = export.main([f"--checkpoint={tmp_path / 'in'}", f"--format={form}", f"--output={tmp_path / 'out'}"])
    if (form, kind) == ("hf", "mean"):
        assert status == 2  # Hugging Face has no such classifier
        return
    assert status == 0
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    outputs = {"probabilities"} if pool else {"class_token", "mean_patch", "patch_grid"}
    outputs |= {"loss"} if kind == "mae" and form in ("hf", "mae") else set()
    assert about["differences"].keys() == outputs
    assert about["largest_difference"] < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(example.splitlines()) <= 12
    monkeypatch.chdir(tmp_path / "out")
    exec(example, {})


def test_hugging_face_loads_encoder_and_decoder_and_misses_nothing(folder, tmp_path):
    from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel

    exported = tmp_path / "hf"
    assert export.main([f"--checkpoint={folder / 'from' / 'hf'}", "--format=hf", f"--output={exported}"]) == 0
    _, report = ViTMAEForPreTraining.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values())
    _, report = ViTModel.from_pretrained(exported, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(name.startswith("decoder.") for name in report["unexpected_keys"])
    source = made.write(tmp_path / "w.safetensors", made.tensors(decoder=False, pool="cls"))
    assert convert.main([f"--input={source}", f"--output={tmp_path / 'in'}", *made.HEADS]) == 0
    assert export.main([f"--checkpoint={tmp_path / 'in'}", "--format=hf", f"--output={tmp_path / 'c'}"]) == 0
    classifier, report = ViTForImageClassification.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(report.values())
    # And back in, as Hugging Face writes it, with names for the classes.
    classifier.config.id2label = {0: "benign", 1: "malignant", 2: "normal"}
    classifier.save_pretrained(tmp_path / "d")
    assert convert.main([f"--input={tmp_path / 'd'}", f"--output={tmp_path / 'e'}"]) == 0
    about = open_model(str(tmp_path / "e")).description
    assert (about["pool"], about["classes"]) == ("cls", ["benign", "malignant", "normal"])


def test_timm_loads_an_export_by_its_own_settings(folder, tmp_path):
    need("timm")
    import timm

    assert export.main([f"--checkpoint={folder / 'from' / 'hf'}", "--format=timm", f"--output={tmp_path / 't'}"]) == 0
    network = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True)
    assert network.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]
    weight = network.state_dict()["patch_embed.proj.weight"].numpy()
    original = load_parameters(str(folder / "from" / "hf"))[0]["encoder"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(weight.transpose(2, 3, 1, 0).reshape(-1, 32), original)


def test_a_vit_of_timm_with_learned_positions_comes_in_and_agrees_with_every_export(tmp_path):
    need("torch", "timm", "transformers", "onnxruntime")
    torch_models.declare_torchvision()
    import timm
    from safetensors.torch import save_file

    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    network = torch_models.randomise(timm.create_model("vit_base_patch16_224", **arguments))
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    source = tmp_path / "timm.safetensors"
    assert convert.main([f"--input={source}", f"--output={tmp_path / 'in'}", "--num_heads=4", "--licence=MIT"]) == 0
    model = open_model(str(tmp_path / "in"))
    about = model.description
    assert (model.kind, about["pool"], about["encoder"]["learned_positions"]) == ("classifier", "cls", True)
    images = verify.sample_images(model)
    ours = verify.expected(model, images)["probabilities"]
    import torch

    with torch.inference_mode():
        theirs = network(verify._normalised(model, images)).softmax(dim=-1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for form in ("timm", "hf", "mae", "onnx"):
        assert export.main([f"--checkpoint={tmp_path / 'in'}", f"--format={form}", f"--output={tmp_path / form}"]) == 0
        assert json.loads((tmp_path / form / "export.json").read_text())["largest_difference"] < 1e-5


def test_graphs_take_any_batch_size(folder, tmp_path):
    need("onnx", "onnxruntime", "flatbuffers")
    import onnx
    import onnxruntime

    checkpoint = folder / "from" / "hf"
    for form in ("onnx", "stablehlo"):
        assert export.main([f"--checkpoint={checkpoint}", f"--format={form}", f"--output={tmp_path / form}"]) == 0
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 32, 32, 3]
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    whole = session.run(["mean_patch"], {"images": images})[0]
    for count in (1, 5):
        single = session.run(["mean_patch"], {"images": images[:count]})[0]
        np.testing.assert_allclose(single, whole[:count], atol=1e-5)
        outputs = run_stablehlo(str(tmp_path / "stablehlo"), images[:count])
        np.testing.assert_allclose(outputs["mean_patch"], whole[:count], atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "stablehlo"])
def test_a_large_program_keeps_its_weights_in_a_file_beside_it(folder, tmp_path, monkeypatch, form):
    need(*(("onnx", "onnxruntime") if form == "onnx" else ("flatbuffers",)))
    monkeypatch.setattr("usfmae_jax.interop.files.EXTERNAL", 1000)
    checkpoint = folder / "from" / "hf"
    assert export.main([f"--checkpoint={checkpoint}", f"--format={form}", f"--output={tmp_path / 'o'}"]) == 0
    beside = "model.onnx.data" if form == "onnx" else "model.safetensors"
    assert (tmp_path / "o" / beside).stat().st_size > 90_000
    assert json.loads((tmp_path / "o" / "export.json").read_text())["largest_difference"] < 1e-5
    (example,) = re.findall(r"```python\n(.*?)```", (tmp_path / "o" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "o")
    exec(example, {})
