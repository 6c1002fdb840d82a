"""Which frames have a class; and the update of a classifier: what it minimises, trains and leaves alone."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.data.tables import made, write_classes, write_records
from tests.training.test_update import _mesh
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError
from usfmae_jax.finetuning.build import trained_part
from usfmae_jax.interop.model import build, flatten, model_graph
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.tasks.classification import (
    Classification,
    cross_entropy,
    erase,
    labelled_images,
    mix,
    select,
    smoothed_targets,
)
from usfmae_jax.training import optimizers
from usfmae_jax.training.state import state_maker
from usfmae_jax.training.update import make_update, pick

VIT = {
    "model": "vit",
    "encoder": dict(image_size=[32, 32], patch_size=8, channels=1, width=32, depth=3, num_heads=2, mlp_ratio=4.0),
    "pool": "mean",
    "classes": ["a", "b"],
}
RESNET = {"model": "resnet50", "resnet": dict(channels=1, depths=(1, 1, 1, 1), width=8), "classes": ["a", "b"]}
HOW = Classification(("a", "b"), smoothing=0.1)


def _batch(count=16, weights=(1.0, 1.0)):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 4 // 3  # three of one class for each of the other
    images = rng.integers(0, 60, (count, 32, 32, 1), np.uint8) + (100 * labels[:, None, None, None]).astype(np.uint8)
    weight = np.broadcast_to(np.asarray(weights, np.float32), (count, 2))
    images = normalize_images(jnp.asarray(images), (0.25,), (0.2,))
    return {"image": images, "label": labels.astype(np.int32), "weight": weight}


@functools.cache
def _parts(kind="vit", mode="full", last_k=1, accumulate=1, how=HOW, devices=1, pool="mean"):
    description = {"vit": VIT | {"pool": pool}, "resnet": RESNET}[kind]
    from configs.finetune import get_config

    config = get_config()
    config.mode, config.last_k = mode, last_k
    freeze, trained, last_blocks = trained_part(config, description)
    make = build(description, freeze=freeze)
    optimizer = optimizers.adamw(weight_decay=0.5, last_blocks=last_blocks)
    mesh = _mesh(devices)
    graph = model_graph(make)
    rate = functools.partial(optimizers.warmup_cosine, learning_rate=0.01, floor=0.01, warmup=0.0)
    update = make_update(graph, how.prepare, how.loss, optimizer, rate, mesh, trained=trained, accumulate=accumulate)
    start = state_maker(make, optimizer, mesh, lambda params: pick(params, trained))
    predict = jax.jit(lambda variables, images: how.predict(nnx.merge(graph, *variables.values()), images))
    return start, jax.jit(update), predict


def test_the_loss_is_the_weighted_mean_over_labels():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    labels = jnp.asarray([0, 1, 2, 0, 0, 1])
    error, count = cross_entropy(logits, jax.nn.one_hot(labels, 3), jnp.ones(3))
    np.testing.assert_allclose(
        error / count, optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), rtol=1e-6
    )
    weights = jnp.asarray([0.5, 2.0, 1.0])
    error, count = cross_entropy(logits, jax.nn.one_hot(labels, 3), weights)
    each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(error / count, (each * weights[labels]).sum() / weights[labels].sum(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_training_learns_and_predicts(kind):
    start, step, predict = _parts(kind)
    state, losses = start(0), []
    for _ in range(12):
        state, metrics = step(state, _batch(), 100)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    assert int(state["step"]) == 12
    assert ("stats" in state) == (kind == "resnet")
    found = predict({name: state[name] for name in ("params", "stats") if name in state}, _batch()["image"])
    found = found["probabilities"]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    if kind == "vit":  # running statistics lag behind after a dozen steps
        np.testing.assert_array_equal(found.argmax(axis=1), _batch()["label"])


def test_accumulation_gives_the_update_of_the_whole_batch():
    batch = _batch(weights=(0.7, 2.0))
    whole = _parts()[1](_parts()[0](0), batch, 100)
    parts = _parts(accumulate=4)[1](_parts()[0](0), batch, 100)
    np.testing.assert_allclose(parts[1]["loss"], whole[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(parts[1]["grad_norm"], whole[1]["grad_norm"], rtol=1e-4)


@pytest.mark.slow  # so they do for any loss, see tests/training/test_update.py
def test_eight_devices_compute_what_one_does():
    one, eight = _parts(), _parts(devices=8)
    a, b = one[1](one[0](0), _batch(), 100), eight[1](eight[0](0), _batch(), 100)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(a[1][name], b[1][name], rtol=1e-4)


def _moved(kind, mode, last_k=1, pool="mean"):
    """Names of the parameters and statistics that two steps change, and of all; stacked blocks one by one."""
    start, step, _ = _parts(kind, mode, last_k, pool=pool)
    state = before = start(0)
    for _ in range(2):
        state, _ = step(state, _batch(), 100)
    moved, everything = set(), set()
    for group in ("params", "stats"):
        for name, old in flatten(before.get(group, {})).items():
            new = flatten(state[group])[name]
            rows = enumerate(zip(old, new, strict=True)) if "blocks." in name else [("", (old, new))]
            for row, (x, y) in rows:
                everything.add(f"{name}{row}")
                if np.asarray(x).tobytes() != np.asarray(y).tobytes():
                    moved.add(f"{name}{row}")
    return moved, everything


def test_full_trains_all_of_a_vit_but_the_norm_that_mean_pooling_does_not_use():
    moved, everything = _moved("vit", "full")
    assert everything - moved == {"encoder.norm.scale", "encoder.norm.bias", "encoder.cls_token"} - moved
    assert "encoder.patch_embed.kernel" in moved


def test_frozen_leaves_the_encoder_bitwise():
    moved, _ = _moved("vit", "frozen")
    assert moved == {"head.kernel", "head.bias", "head_norm.scale", "head_norm.bias"}


@pytest.mark.slow
def test_frozen_leaves_a_resnet_and_its_statistics_bitwise():
    moved, everything = _moved("resnet", "frozen")
    assert moved == {"head.kernel", "head.bias"}
    assert any("var" in name for name in everything)


@pytest.mark.parametrize("pool", [pytest.param("mean", marks=pytest.mark.slow), "cls"])
def test_last_k_leaves_earlier_blocks_bitwise(pool):
    moved, everything = _moved("vit", "last_k", 2, pool)
    blocks = {name for name in everything if name.startswith("encoder.blocks.") and not name.endswith("0")}
    assert blocks <= moved
    assert not [name for name in moved if name.startswith("encoder.blocks.") and name.endswith("0")]
    assert not {name for name in moved if name.startswith(("encoder.patch_embed", "encoder.cls"))}
    assert ("encoder.norm.scale" in moved) == (pool == "cls")


@pytest.mark.slow
def test_last_k_of_a_resnet_counts_stages():
    moved, everything = _moved("resnet", "last_k", 1)
    assert moved == {name for name in everything if name.startswith(("layer4.", "head."))}


def test_the_optimiser_keeps_nothing_for_what_is_frozen():
    state = _parts("vit", "frozen")[0](0)
    sizes = {leaf.size for leaf in jax.tree.leaves(state["opt_state"])}
    assert max(sizes) == 64  # of the head


def test_randomness_is_that_of_the_step_and_the_seed():
    how = Classification(("a", "b"), smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.5)
    start, step, _ = _parts(how=how)

    def losses(seed):
        state, found = start(seed), []
        for _ in range(3):
            state, metrics = step(state, _batch(), 100)
            found.append(float(metrics["loss"]))
        return found

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def _plain_images(count=6, size=16):
    """Image i is all i."""
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, size, size + 4, 1))


def test_smoothed_targets_are_those_of_the_paper():
    targets = smoothed_targets(jnp.asarray([0, 2]), 4, 0.2)
    np.testing.assert_allclose(targets, [[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]], rtol=1e-6)
    np.testing.assert_array_equal(smoothed_targets(jnp.asarray([1]), 2, 0.0), [[0.0, 1.0]])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_are_the_shares_of_pixels(mixup, cutmix):
    images, targets = _plain_images(), jnp.eye(6)
    run = jax.jit(lambda key: mix(key, images, targets, mixup=mixup, cutmix=cutmix))
    kinds = set()
    for seed in range(24):
        mixed, weights = run(jax.random.key(seed))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), weights @ jnp.arange(6.0), atol=1e-4)
        np.testing.assert_allclose(weights[0, 5], weights[5, 0])  # partners are those of the reversed batch
        values = np.unique(np.asarray(mixed[0]))
        kinds.add("cutmix" if set(values) <= {0.0, 5.0} else "mixup")
    assert kinds == ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())


def test_a_cut_is_one_rectangle():
    cut = jax.jit(functools.partial(mix, mixup=0.0, cutmix=1.0))
    mixed, _ = cut(jax.random.key(3), _plain_images(), jnp.eye(6))
    hole = np.asarray(mixed[0, ..., 0]) > 0
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    assert 0 < hole.sum() < hole.size
    assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_what_is_off_changes_nothing():
    images, targets = _plain_images(), jnp.eye(6)
    mixed, weights = mix(jax.random.key(0), images, targets, mixup=0.0, cutmix=0.0)
    assert mixed is images
    assert weights is targets
    assert erase(jax.random.key(0), images, 0.0) is images


def test_some_images_lose_a_rectangle_of_up_to_a_third():
    images = jnp.full((400, 24, 32, 1), 7.0)
    erased = np.asarray(jax.jit(erase, static_argnums=2)(jax.random.key(0), images, 0.25))[..., 0]
    holes = erased != 7.0
    area = holes.mean(axis=(1, 2))
    assert 0.18 < (area > 0).mean() < 0.32
    assert 0.015 < area[area > 0].min() < 0.05
    assert 0.25 < area.max() < 0.36
    for hole in holes[area > 0]:
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    noise = erased[holes]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 frames of two classes, and one without a label."""
    folder = write_records(tmp_path_factory.mktemp("labelled"), [*made(10), *made(1, 10, label=-1), *made(20, 11)])
    write_classes(folder, ["Benign", "malignant"])
    return folder


def selected(paths, classes=()):
    return select(read_table(str(paths)), classes)


def test_frames_without_a_label_are_left_out_and_counted(folder):
    frames = selected(folder)
    assert (len(frames), frames.left_out, frames.damaged) == (30, 1, 0)
    assert set(frames.label) == {0, 1}
    assert frames.index.tolist() == [*range(10), *range(11, 31)]
    assert frames.label_names == ("Benign", "malignant")


def test_the_fingerprint_of_labelled_frames_is_that_of_earlier_versions(tmp_path):
    written = [one | {"image": b"not decoded %d" % i, "sha256": f"{i}"} for i, one in enumerate(made(6))]
    written[2]["label"] = -1
    write_classes(write_records(tmp_path, written), ["Benign", "malignant"])
    assert selected(tmp_path).fingerprint == "5e91da43c39d"  # runs are continued and features kept by it


def test_classes_without_names_are_numbers(tmp_path):
    assert selected(write_records(tmp_path, made(8))).label_names == ("0", "1")


def test_class_names_may_come_from_the_manifest(tmp_path):
    write_records(tmp_path, made(8))
    (tmp_path / "manifest.json").write_text(json.dumps({"label_names": ["x", "y"]}))
    assert selected(tmp_path).label_names == ("x", "y")
    (tmp_path / "manifest.json").unlink()
    assert selected(tmp_path, ("u", "v")).label_names == ("u", "v")


def test_expected_classes_do_not_mind_case(folder):
    assert selected(folder, ("BENIGN", "Malignant")).label_names == ("Benign", "malignant")


@pytest.mark.parametrize("classes", [("malignant", "benign"), ("benign",), ("benign", "malignant", "normal")])
def test_other_classes_than_expected_are_refused(folder, classes):
    with pytest.raises(InputError, match=r"config.classes=.*" + classes[-1] + r".* but the shards have .*Benign,mal"):
        selected(folder, classes)


def test_data_without_labels_is_refused(tmp_path):
    write_records(tmp_path, made(4, label=-1))
    with pytest.raises(InputError, match="--labels"):
        selected(tmp_path)


def test_one_class_only_is_refused(tmp_path):
    write_records(tmp_path, made(4, label=1))
    write_classes(tmp_path, ["a", "b"])
    with pytest.raises(InputError, match="one class only, 'b'"):
        selected(tmp_path)


def test_a_label_outside_of_the_class_list_is_refused(tmp_path):
    write_records(tmp_path, [*made(4), *made(1, 4, label=2)])
    write_classes(tmp_path, ["a", "b"])
    with pytest.raises(InputError, match="label 2 is outside the class list, whose 2 names are a, b"):
        selected(tmp_path)


def test_sources_with_different_classes_are_refused(folder, tmp_path):
    other = write_records(tmp_path, made(4), "other")
    with pytest.raises(InputError, match="some sources name their classes"):
        selected(f"{folder},{other}")
    write_classes(other, ["no", "yes"])
    with pytest.raises(InputError, match="different classes: Benign, malignant and no, yes"):
        selected(f"{folder},{other}")


def test_images_for_a_probe_are_spread_over_the_labelled_frames(folder):
    found = labelled_images(read_table(str(folder)), size=(16, 24), channels=1, limit=10)
    assert found["image"].shape == (10, 16, 24, 1)
    assert len(set(found["patient"])) == 10
    assert set(found["label"]) == {0, 1}


def test_a_probe_passes_over_damaged_images(tmp_path):
    written = made(8)
    written[3]["image"] = b"\xff\xd8\xff broken"
    table = read_table(str(write_records(tmp_path, written)))
    found = labelled_images(table, size=(16, 16), channels=1, limit=100)
    np.testing.assert_array_equal(found["label"], [0, 0, 1, 0, 0, 1, 1])


def test_a_probe_needs_two_classes(tmp_path):
    write_records(tmp_path, [*made(3, label=-1), *made(3, 3, label=1)])
    with pytest.raises(InputError, match="fewer than two labelled classes"):
        labelled_images(read_table(str(tmp_path)), size=(16, 16), channels=1, limit=100)


def test_balanced_weights_are_inverse_to_the_classes_share(folder):
    table = selected(folder)
    rows = np.flatnonzero(table.label == 0)[:6].tolist() + np.flatnonzero(table.label == 1)[:2].tolist()
    even = Classification(table.label_names).targets(table, np.asarray(rows))
    np.testing.assert_array_equal(even["label"], [0] * 6 + [1] * 2)
    np.testing.assert_array_equal(even["weight"], np.ones((8, 2)))
    balanced = Classification(table.label_names, balanced=True).targets(table, np.asarray(rows))
    np.testing.assert_allclose(balanced["weight"], np.broadcast_to([8 / 12, 2.0], (8, 2)), rtol=1e-6)
