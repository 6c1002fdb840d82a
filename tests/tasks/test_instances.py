"""Instances: what is one, which query learns which, and that the loop teaches, resumes, tests and reports them."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from configs.segment import get_config
from tests.data.tables import write_records
from tests.helpers import evaluated, record, stopping
from usfmae_jax.data.augment import Augmentation
from usfmae_jax.data.pipeline import LoadView
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import predictions
from usfmae_jax.evaluation.instances import InstancePredictions
from usfmae_jax.finetuning import build, tasks
from usfmae_jax.finetuning.loop import finetune
from usfmae_jax.interop.model import open_model
from usfmae_jax.tasks import segmentation
from usfmae_jax.tasks.instances import Instances, detections, drawn_masks, instances_of, matched, numbered, set_loss


def frame(number, side=48):
    """A dark picture with none to two discs (class 1) and one or no square (class 2), apart from each other."""
    rng = np.random.default_rng(number)
    pixels, mask = rng.integers(10, 60, (side, side), np.uint8), np.zeros((side, side), np.uint8)
    quarters = rng.permutation(4)[: number % 4]
    for i, quarter in enumerate(quarters):
        y, x = (int(one) for one in side // 2 * np.array(divmod(quarter, 2)) + side // 4)
        if i < 2:
            cv2.circle(pixels, (x, y), 7, 220, -1)
            cv2.circle(mask, (x, y), 7, 1, -1)
        else:
            pixels[y - 6 : y + 6, x - 6 : x + 6] = 140
            mask[y - 6 : y + 6, x - 6 : x + 6] = 2
    return pixels, mask


def masked(number):
    encoded = [cv2.imencode(".png", part)[1].tobytes() for part in frame(number)]
    return record(number, encoded[0], height=48, width=48, mask=encoded[1], label=-1, patient=f"p{number // 2}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("discs"), [masked(i) for i in range(64)])


def _config(folder, **train):
    config = get_config("folder_instances")
    config.data.path = str(folder)
    config.model.update(image_size=(48, 48), patch_size=8, width=32, depth=1, num_heads=2)
    config.model.update(queries=6, query_blocks=1, decoder_width=16)
    config.split.update(kind="single", duplicates=False)
    config.train.update(batch_size=8, **train)
    config.evaluate.update(batch_size=16, bootstrap=20)
    return config


def test_instances_are_connected_areas_of_a_class_the_largest_first():
    classes = np.zeros((6, 12), np.uint8)
    classes[0:2, 0:2] = 1  # 4 pixels
    classes[2:4, 2:4] = 1  # touches it at a corner: one instance of 8
    classes[4:6, 2:12] = 2  # 20, below it and another class
    classes[0, 6:9] = 1  # 3
    classes[0, 11] = 2  # too small
    found = numbered(classes, 2, min_pixels=3)
    assert found.shape == (6, 12, 2)
    expected = {(4, 5): ([2, 1], 20), (0, 0): ([1, 2], 8), (3, 3): ([1, 2], 8), (0, 7): ([1, 3], 3)}
    assert {at: (found[at].tolist(), int((found[..., 1] == found[at][1]).sum())) for at in expected} == expected
    assert found[0, 11].tolist() == [0, 0]
    assert [one["class"] for one in instances_of(found)] == [1, 0, 0]
    assert numbered(np.zeros((6, 12), np.uint8), 2, 3).max() == 0


def test_a_view_keeps_the_number_and_the_class_of_each_pixel(folder):
    table = read_table(str(folder))
    _, task = tasks.find_instances(_config(folder), table)
    load = LoadView((), (48, 48), 1, Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0), task.mask)
    view = load.draw(masked(3), np.random.default_rng(0))
    assert view["mask"].shape == (48, 48, *task.mask_layers)
    np.testing.assert_array_equal(view["mask"][..., 0], frame(3)[1])
    assert view["mask"][..., 1].max() == task.most == 3


def test_what_is_drawn_is_compared_as_shares_of_larger_pixels():
    masks = np.zeros((1, 8, 8, 2), np.uint8)
    masks[0, 0:4, 0:3] = 2, 1  # 12 pixels
    masks[0, 7, 7] = 1, 2  # the rest of one that the view cuts off
    drawn, classes = drawn_masks(jnp.asarray(masks), 3, (2, 4), min_pixels=4)
    np.testing.assert_allclose(drawn[0, 0], [[1, 0.5, 0, 0], [0, 0, 0, 0]])
    assert classes.tolist() == [[2, 0, 0]]


@pytest.mark.parametrize("queries", [3, 7])
def test_the_matching_is_the_cheapest(queries, rng):
    cost = rng.normal(size=(5, 3, queries)).astype(np.float32)
    there = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1]], bool)
    found = np.asarray(jax.jit(matched)(cost, there))
    for one, some, chosen in zip(cost, there, found, strict=True):
        assert len(set(chosen.tolist())) == 3
        rows, columns = linear_sum_assignment(one[some])
        assert one[some][np.arange(some.sum()), chosen[some]].sum() == pytest.approx(one[some][rows, columns].sum())


def test_a_cost_that_is_no_number_still_ends():
    assert jax.jit(matched)(jnp.full((1, 2, 3), jnp.nan), jnp.ones((1, 2), bool)).shape == (1, 2)


def _answer(rng, queries=4):
    classes, masks = rng.normal(size=(2, queries, 3)), rng.normal(size=(2, queries, 4, 4))
    return {"classes": jnp.asarray(classes, jnp.float32), "masks": jnp.asarray(masks, jnp.float32)}


def _drawn():
    masks = np.zeros((2, 2, 4, 4), np.float32)
    masks[0, 0, :2], masks[0, 1, 3:] = 1, 1
    return jnp.asarray(masks), jnp.asarray([[2, 1], [0, 0]])


def test_the_order_of_queries_does_not_matter_and_the_right_answer_costs_nothing(rng):
    how = {"no_object": 0.1, "dice": 1.0}
    said, (drawn, classes) = _answer(rng), _drawn()
    loss = jax.jit(lambda said: set_loss(said, drawn, classes, **how))
    turned = jax.tree.map(lambda one: one[:, ::-1], said)
    np.testing.assert_allclose(loss(said), loss(turned), rtol=1e-5)
    right = {"classes": np.zeros((2, 4, 3)), "masks": np.full((2, 4, 4, 4), -40.0)}
    right["classes"][..., 0] = 20
    for query, number, c in ((3, 0, 2), (1, 1, 1)):
        right["classes"][0, query] = 20 * np.eye(3)[c]
        right["masks"][0, query] = 80 * np.asarray(drawn[0, number]) - 40
    np.testing.assert_allclose(loss(jax.tree.map(jnp.float32, right)), 0, atol=1e-3)


def test_the_loss_is_its_definition(rng):
    said, (drawn, classes) = _answer(rng), _drawn()
    found = jax.jit(lambda: set_loss(said, drawn, classes, no_object=0.1, dice=1.0))()
    logs = np.asarray(jax.nn.log_softmax(said["classes"]))
    x, t = (np.asarray(one).reshape(2, -1, 16) for one in (said["masks"], drawn))
    p = 1 / (1 + np.exp(-x))
    entropy = -(t[:, :, None] * np.log(p)[:, None] + (1 - t[:, :, None]) * np.log(1 - p)[:, None]).mean(axis=-1)
    both, either = (t[:, :, None] * p[:, None]).sum(axis=-1), (t[:, :, None] + p[:, None]).sum(axis=-1)
    apart = 5 * entropy + 5 * (1 - (2 * both + 1) / (either + 1))
    cost = apart[0] - 2 * np.exp(logs[0])[:, np.array([2, 1])].T
    rows, columns = linear_sum_assignment(cost)
    wanted, weight = np.zeros(4, int), np.full(4, 0.1)
    wanted[columns], weight[columns] = np.array([2, 1])[rows], 1
    about = -(weight * logs[0][np.arange(4), wanted]).sum() / weight.sum()
    assert found[0] == pytest.approx(2 * about + apart[0][rows, columns].mean(), rel=1e-4)
    assert found[1] == pytest.approx(-2 * logs[1][:, 0].mean(), rel=1e-4)  # nothing is drawn: no masks


def test_a_query_is_one_detection_of_its_best_class():
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[0, :2], masks[1, 2:], masks[2, 0, 0] = 255, 204, 100
    found = detections(np.array([[0.1, 0.8], [0.5, 0.2], [0.9, 0.0]]), masks, (8, 8))  # the last has no pixel
    assert [(one["class"], one["score"]) for one in found] == [(1, 0.8), (0, 0.4)]
    assert found[0]["mask"]["size"] == [8, 8]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model.head": "decoder"}, "config.model.head='decoder' must be 'queries'"),
        ({"model.queries": 0}, "config.model.queries=0 must be between 1 and 255"),
        ({"model.query_blocks": 0}, "config.model.query_blocks=0 must be at least 1"),
        ({"model.query_blocks": 3}, "config.model.query_blocks=3 is more than the model's 1 blocks"),
        ({"model.arch": "unet"}, "config.model.arch='unet' must be one of"),
        ({"model.arch": "resnet50"}, "config.model.arch='resnet50' must be one of"),
        ({"min_pixels": 0}, "config.min_pixels=0 must be at least 1"),
        ({"min_pixels": 10_000}, "config.min_pixels=10000 leaves no instance"),
        ({"no_object": 0.0}, "config.no_object=0 must be between 0.001 and 1"),
        ({"stop.metric": "dice"}, "config.stop.metric='dice' must be one of map, map50, map75"),
        ({"regularization.mixup": 0.5}, "is for classes of whole frames"),
        ({"evaluate.flip": True}, "config.evaluate.flip must be False"),
    ],
)
def test_fields_that_do_not_fit_are_refused(folder, tmp_path, fields, match):
    config = _config(folder, steps=4)
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=match):
        build.prepare(config, str(tmp_path / "run"))


def test_it_is_taught_interrupted_continued_tested_and_reported(folder, tmp_path):
    config = _config(folder, steps=6)
    config.stop.every, config.save_masks = 0.5, True
    with stopping(3):
        assert not finetune(config, str(tmp_path))
    assert finetune(config, str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["metrics"]) == {"map", "map50", "map75"}
    assert set(results["per_class"]) == {"class 1", "class 2"}
    found = predictions.read(tmp_path, InstancePredictions)
    assert found.drawn.sum() == sum(map(len, found.truth)) > 0
    assert len(list((tmp_path / "masks" / "single").rglob("*.png"))) == results["counts"]["frames"]
    coco = json.loads((tmp_path / "masks" / "single" / "coco.json").read_text())
    said = [round(one["score"], 5) for some in found.detections for one in some]
    assert sorted(one["score"] for one in coco["annotations"]) == sorted(said)
    page = (tmp_path / "report.html").read_text()
    assert all(word in page for word in ("mAP@50", "Outlines", "class 2", "full as drawn"))
    model = open_model(str(tmp_path))
    assert model.description["head"] == {"kind": "queries", "width": 16, "queries": 6, "blocks": 1}
    again = evaluated(tmp_path, config.data.path, tmp_path / "tested")
    assert {name: one["value"] for name, one in again["metrics"].items()} == {
        name: one["value"] for name, one in results["metrics"].items()
    }
    config.init, config.mode = str(tmp_path), "frozen"
    again = build.prepare(config, str(tmp_path / "again"))
    assert "head" in build.loadable(again.init, again.description)["params"]


def test_models_that_find_the_same_are_as_good_together_as_each_alone(folder):
    rows = np.arange(8)
    table = read_table(str(folder)).take(rows)
    task = Instances(segmentation.of_table(table, (), "drop", 1)[1], 0)
    masks = np.stack([[255 * (frame(row)[1] == c) for c in (1, 2)] for row in range(8)]).astype(np.uint8)
    said = {"classes": np.broadcast_to(np.eye(2, dtype=np.float32), (8, 2, 2)), "masks": masks}
    alone, both = (task.measure(table, rows, one) for one in (said, task.together([said, said], [{}, {}])))
    assert [len(some) for some in alone["detections"]] == [min(row % 4, 1) + (row % 4 == 3) for row in range(8)]
    assert alone["detections"].tolist() == both["detections"].tolist()
    nothing = {"classes": np.zeros((8, 2, 2), np.float32), "masks": masks}
    half = task.measure(table, rows, task.together([said, nothing], [{}, {}]))
    assert {one["score"] for some in half["detections"] for one in some} == {0.5}


@pytest.mark.slow
def test_discs_and_squares_are_found(folder, tmp_path):
    config = _config(folder, steps=600)
    config.model.update(depth=3, query_blocks=2, decoder_width=32)
    config.stop.every = 20.0
    config.optimizer.learning_rate = 6e-2
    assert finetune(config, str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"]["map50"]["value"] > 0.8
