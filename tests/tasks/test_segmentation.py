"""Segmentation: a tiny model learns to outline discs and squares through the loop that knows neither."""

import dataclasses
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from flax import nnx

from configs import evaluate as evaluation
from configs import segment as configs
from tests.helpers import evaluated, record, stopping
from usfmae_jax.data import annotations, augment, records
from usfmae_jax.data.pipeline import LoadView, Rows
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import DamagedRecord, InputError
from usfmae_jax.evaluation import predictions
from usfmae_jax.evaluation.segmentation import MaskPredictions
from usfmae_jax.finetuning import build
from usfmae_jax.finetuning.loop import finetune
from usfmae_jax.interop.model import flatten, open_model
from usfmae_jax.probing import patches
from usfmae_jax.probing.loop import evaluate
from usfmae_jax.tasks import segmentation

SIZE = (48, 64)


def drawn(index, numbers=(1, 2), size=SIZE):
    """A frame with a bright disc and a grey square, and where they are: uint8 `[H, W]` both."""
    rng = np.random.default_rng(index)
    image, mask = rng.integers(0, 40, size, np.uint8), np.zeros(size, np.uint8)
    radius, x, y = rng.integers(7, 11), rng.integers(14, 28), rng.integers(14, 34)
    for canvas, value in ((image, 230), (mask, numbers[0])):
        cv2.circle(canvas, (int(x), int(y)), int(radius), int(value), -1)
    if index % 3:
        side, left, top = rng.integers(8, 14), rng.integers(40, 48), rng.integers(6, 30)
        image[top : top + side, left : left + side] = 130
        mask[top : top + side, left : left + side] = numbers[1]
    return image, mask


def write(folder, count=24, numbers=(1, 2), without=(), **fields):
    """Two frames a patient in one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(folder / "made-train.array_record-00000-of-00001"), "group_size:1")
    for index in range(count):
        image, mask = drawn(index, numbers)
        png = [cv2.imencode(".png", one)[1].tobytes() for one in (image, mask)]
        shape = {"height": SIZE[0], "width": SIZE[1], "mask": b"" if index in without else png[1]}
        writer.write(records.encode_record(record(index, png[0], **(shape | fields))))
    writer.close()
    return str(folder)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return write(tmp_path_factory.mktemp("masked"))


def small(path, variant="folder"):
    config = configs.get_config(variant)
    config.data.path = path
    config.model.update(image_size=(48, 64), patch_size=8, width=32, depth=2, num_heads=2, decoder_width=16)
    config.split.update(folds=2, duplicates=False)
    config.train.update(batch_size=8, steps=6, min_steps=0)
    config.stop.every = 1.0
    config.parallel = 1
    config.evaluate.update(batch_size=8, bootstrap=20)
    return config


def test_a_segmenter_is_trained_resumed_scored_and_opened_again(masked, tmp_path):
    config = small(masked)
    with stopping(4):
        assert not finetune(config, str(tmp_path))
    assert finetune(config, str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["task"]["classes"] == ["class 1", "class 2"]
    assert results["counts"] | {"videos": 0} == {"frames": 24, "patients": 12, "videos": 0, "folds": 2, "seeds": 1}
    assert results["per_class"]["class 2"]["frames"] == 16
    found = predictions.read(tmp_path, MaskPredictions)
    assert np.nanmax(found.dice) <= 1
    mask = drawn(0)[1]
    row = [f"{video}/{frame}" for video, frame in zip(found.video, found.frame, strict=True)].index("v0/0")
    assert found.drawn[row].tolist() == [(mask == 1).sum(), (mask == 2).sum()]
    page = (tmp_path / "report.html").read_text()
    assert all(head in page for head in ("Outlines", "The worst", "The best", "Do the areas agree?", "Missed"))
    assert "auroc" not in page.lower()
    model = open_model(str(tmp_path / "members" / "fold-1"))
    assert (model.kind, model.description["task"]) == ("model", "segmentation")
    assert model.description["head"] == {"kind": "decoder", "width": 16}
    said = evaluated(tmp_path, masked, tmp_path / "tested")
    assert said["task"]["protocol"] == "finetuned"
    own = predictions.read(tmp_path / "tested", MaskPredictions)
    order = [own.frame_key.tolist().index(key) for key in found.frame_key.tolist()]
    assert own.fold[order].tolist() == found.fold.tolist()
    np.testing.assert_allclose(own.dice[order], found.dice)
    other = write(tmp_path / "other", 6, dataset="other", patient="a stranger")
    assert evaluated(tmp_path, other, tmp_path / "both")["context"]["members"][0]["models"] == 2
    assert set(predictions.read(tmp_path / "both", MaskPredictions).fold) == {"all"}
    with pytest.raises(InputError, match="was trained for class 1, class 2, but the data has disc, square"):
        evaluated(tmp_path, masked, tmp_path / "renamed", classes=("disc", "square"))
    again = small(masked)
    again.init = str(tmp_path / "members" / "fold-1")
    assert "head" in build.loadable(model, build.prepare(again, str(tmp_path / "again")).description)["params"]


def test_a_run_is_tested_again_as_it_was_tested(tmp_path):
    data = write(tmp_path / "data", without=(2, 5))
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"mask_colours": named("disc", "square")}))
    config = small(data)
    config.unmasked, config.evaluate.flip, config.split.kind = "background", True, "single"
    assert finetune(config, str(tmp_path / "run"))
    own = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["dice"]["value"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"mask_colours": named("disc", "square")[::-1]}))
    assert evaluated(tmp_path / "run", data, tmp_path / "a")["metrics"]["dice"]["value"] == pytest.approx(own)
    other = write(tmp_path / "other", numbers=(2, 1), without=(2, 5))
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"mask_colours": named("square", "disc")}))
    swapped = evaluated(tmp_path / "run", other, tmp_path / "b")
    assert swapped["metrics"]["dice"]["value"] == pytest.approx(own)
    assert swapped["task"]["classes"] == ["disc", "square"]


def named(*names):
    return [{"class": number, "name": name} for number, name in enumerate(names, 1)]


@pytest.mark.parametrize(("arch", "least"), [("", 0.6), ("unet", 0.35)])  # after so few steps
def test_discs_and_squares_are_learnt(masked, tmp_path, arch, least):
    config = small(masked)
    config.model.arch = arch
    if arch:
        config.model.update(width=8, depth=3)
    config.split.kind = "single"
    config.train.steps = 60
    config.optimizer.learning_rate = 0.1
    config.stop.every = 10.0
    config.augment.update(crop_scale=(0.9, 1.0), rotation=(0.0, 0.0))
    assert finetune(config, str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["dice"]["value"] > least


def test_the_linear_head_of_a_frozen_encoder_is_all_that_is_trained(masked, tmp_path):
    config = small(masked, "folder_linear")
    run = build.prepare(config, str(tmp_path))
    assert run.description["head"] == {"kind": "linear"}
    assert build.trained_part(config, run.description)[1] == ("head.", "head_norm.")
    make = build.model_maker(config, run.description, build.trained_part(config, run.description)[0])
    model = make(nnx.Rngs(0))
    gradients = nnx.grad(lambda model: model(jnp.ones((1, 48, 64, 1)), rng=jax.random.key(0), train=True).sum())(model)
    sizes = {name: float(np.abs(leaf).max()) for name, leaf in _flat(gradients).items()}
    assert sizes.pop("head.kernel") > 0
    assert sizes.pop("head.bias") > 0
    assert max(sizes.values()) == 0


def _flat(state):
    return flatten(nnx.to_pure_dict(state))


def test_parts_of_a_split_have_some_of_every_class_that_enough_patients_have(masked):
    table = read_table(masked)
    classes = annotations.classes(table, annotations.survey(table))
    present = np.ones((24, 2), bool)
    present[:20, 1] = False  # two patients
    strata = segmentation.Segmentation(classes, present).strata(table)
    assert (strata.names, set(strata.code.tolist())) == (("class 1",), {0})
    present[:, 1] = np.arange(24) < 20
    strata = segmentation.Segmentation(classes, present).strata(table)
    assert strata.names == ("class 2",)  # the other four frames are too few to be spread
    present[20:] = False
    assert segmentation.Segmentation(classes, present).strata(table).names == ("class 1",)


def test_masks_go_through_the_view_of_their_image(tmp_path):
    path = write(tmp_path, count=6)
    table = read_table(path)
    found = annotations.classes(table, annotations.survey(table))
    how = augment.Augmentation(crop_scale=(0.3, 1.0), rotation=(-30, 30), hflip=0.5, vflip=0.5, interpolation="nearest")
    source = Rows(table.shards, table.index, {})
    with_mask = LoadView((source,), (40, 40), 1, how, found.read)
    for place in range(6):
        batch = with_mask.random_map((0, place), np.random.default_rng(place))
        without = LoadView((source,), (40, 40), 1, how).random_map((0, place), np.random.default_rng(place))
        assert (batch["image"] == without["image"]).all()  # nothing more is drawn
        image, mask = batch["image"][:, :, 0], batch["mask"]
        assert ((image == 230) == (mask == 1)).all()
        assert ((image == 130) == (mask == 2)).all()


def test_the_loss_is_zero_for_what_is_right_and_its_parts_add_up():
    classes = jnp.asarray(np.stack([drawn(1)[1], drawn(2)[1]]).astype(np.int32))
    right = 50.0 * jax.nn.one_hot(classes, 3)
    assert np.asarray(segmentation.pixel_loss(right, classes, 1.0)) == pytest.approx([0, 0], abs=1e-5)
    even = jnp.zeros((2, *SIZE, 3))
    entropy = np.log(3)
    assert np.asarray(segmentation.pixel_loss(even, classes, 0.0)) == pytest.approx([entropy] * 2)
    pixels, counts = np.prod(SIZE), np.stack([(classes == c).sum(axis=(1, 2)) for c in (1, 2)], axis=1)
    soft = 1 - (2 * counts / 3 + 1) / (pixels / 3 + counts + 1)
    assert np.asarray(segmentation.pixel_loss(even, classes, 0.5)) == pytest.approx(entropy + 0.5 * soft.mean(axis=1))


def test_a_frame_is_measured_in_its_own_size(masked):
    table = read_table(masked)
    found = annotations.survey(table)
    task = segmentation.Segmentation(annotations.classes(table, found), np.ones((24, 2), bool))
    rows = np.array([3, 5])
    shares = np.zeros((2, 12, 16, 3), np.uint8)
    shares[..., 0] = 255
    measured = task.measure(table, rows, {"probabilities": shares})
    assert measured["dice"].shape == (2, 2)
    assert measured["drawn"].tolist() == [[(drawn(r)[1] == c).sum() for c in (1, 2)] for r in rows]
    assert measured["predicted"].sum() == 0
    exact = np.stack([np.eye(3, dtype=np.uint8)[drawn(r)[1]] * 255 for r in rows])
    assert task.measure(table, rows, {"probabilities": exact})["dice"][0].tolist() == pytest.approx(
        [1, np.nan], nan_ok=True
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.model.update(head="queries"), r"config\.model\.head='queries' must be 'linear' or 'decoder'"),
        (lambda c: c.regularization.update(mixup=0.8), r"config\.regularization\.mixup=0\.8 is for classes of whole"),
        (lambda c: c.augment.update(randaugment_magnitude=9.0), "they move pixels away from their mask"),
        (lambda c: c.update(classes=("disc",)), "names 1 classes, and the masks hold the numbers 1, 2"),
        (lambda c: c.update(classes=("disc", "disc")), "names must differ"),
        (lambda c: c.update(unmasked="ignore"), r"config\.unmasked='ignore' must be one of drop, background, refuse"),
        (lambda c: c.stop.update(metric="auroc"), r"config\.stop\.metric='auroc' must be one of dice, iou"),
        (lambda c: c.model.update(arch="resnet50"), r"config\.model\.arch='resnet50' must be one of tiny"),
        (lambda c: c.model.update(arch="unet", width=8, depth=5), "must be divisible by 32, for the U-Net"),
        (lambda c: (c.model.update(arch="unet", width=8, depth=2), c.update(mode="frozen")), "U-Net is trained whole"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(masked, tmp_path, change, says):
    config = small(masked)
    change(config)
    with pytest.raises(InputError, match=says):
        finetune(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_frames_without_a_mask_are_dropped_taken_as_background_or_refused(tmp_path):
    config = small(write(tmp_path / "some", without=(2, 3, 9)))
    assert len(build.prepare(config, str(tmp_path / "a")).table) == 21
    config.unmasked = "background"
    run = build.prepare(config, str(tmp_path / "b"))
    assert len(run.table) == 24
    assert not run.task.present[2].any()
    assert run.task.mask(records.decode_record(run.table.shards[2])).shape == SIZE
    config.unmasked = "refuse"
    with pytest.raises(InputError, match=r"3 of 24 frames .* have no mask; --config\.unmasked=drop"):
        build.prepare(config, str(tmp_path / "c"))


def test_masks_that_cannot_be_used_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match="has no masks in 24 records"):
        build.prepare(small(write(tmp_path / "none", without=range(24))), str(tmp_path / "a"))
    other = cv2.imencode(".png", np.ones((9, 9), np.uint8))[1].tobytes()
    with pytest.raises(InputError, match="its mask is 9 x 9 and its image 64 x 48"):
        build.prepare(small(write(tmp_path / "size", mask=other)), str(tmp_path / "b"))
    grey = cv2.imencode(".png", np.arange(48 * 64).reshape(SIZE).astype(np.uint8))[1].tobytes()
    with pytest.raises(InputError, match="hold 255 different numbers, too many to be classes"):
        build.prepare(small(write(tmp_path / "grey", mask=grey)), str(tmp_path / "c"))


def test_names_come_from_the_config_or_the_manifest(tmp_path):
    path = write(tmp_path / "named", numbers=(3, 7))
    table = read_table(path)
    found = annotations.survey(table)
    assert annotations.classes(table, found).names == ("class 3", "class 7")
    assert annotations.classes(table, found, ("disc", "square")).names == ("disc", "square")
    colours = [{"class": 3, "colour": "#ff0000", "name": "red"}, {"class": 7, "colour": "#00ff00", "name": ""}]
    (tmp_path / "named" / "manifest.json").write_text(json.dumps({"mask_colours": colours}))
    classes = annotations.classes(table, found)
    assert classes.names == ("red", "class 7")
    mask = drawn(1, (3, 7))[1]
    assert (classes.read(records.decode_record(table.shards[1])) == np.where(mask == 3, 1, np.where(mask, 2, 0))).all()
    with pytest.raises(DamagedRecord, match="has the number 7, which is none of the classes"):
        dataclasses.replace(classes, codes=np.where(np.arange(256) == 7, 255, classes.codes).astype(np.uint8)).read(
            records.decode_record(table.shards[1])
        )
    (tmp_path / "named" / "manifest.json").write_text(json.dumps({"mask_colours": colours[:1]}))
    with pytest.raises(InputError, match="masks hold the number 7, which the manifest beside the shards does not name"):
        annotations.classes(table, found)
    (tmp_path / "named" / "manifest.json").write_text('{"mask_colours": [5]}')
    with pytest.raises(InputError, match=r"manifest\.json has mask_colours of another kind"):
        annotations.classes(table, found)


def test_a_mask_of_one_thing_takes_the_class_of_its_frame(tmp_path):
    path = write(tmp_path / "one", numbers=(255, 255))
    config = small(path)
    config.mask_classes = "label"
    config.classes = ("benign", "malignant")
    run = build.prepare(config, str(tmp_path / "run"))
    assert run.task.outputs == ("benign", "malignant")
    for row in (0, 2):
        stored = records.decode_record(run.table.shards[row])
        assert set(np.unique(run.task.mask(stored)).tolist()) == {0, 1 + stored["label"]}
        assert run.task.present[row].tolist() == [stored["label"] == 0, stored["label"] == 1]
    config.data.path = write(tmp_path / "two")
    with pytest.raises(InputError, match="is for masks of one thing, and these tell class 1, class 2 apart"):
        build.prepare(config, str(tmp_path / "run2"))
    config.mask_classes = "frame"
    with pytest.raises(InputError, match=r"config\.mask_classes='frame' must be 'masks' or 'label'"):
        build.prepare(config, str(tmp_path / "run3"))


def test_one_class_is_the_foreground_whatever_its_number(tmp_path):
    table = read_table(write(tmp_path, numbers=(255, 255)))
    found = annotations.survey(table)
    classes = annotations.classes(table, found)
    assert (classes.names, classes.codes[255]) == (("foreground",), 1)
    assert annotations.classes(table, found, ("lesion",)).names == ("lesion",)


def probed(path, workdir, checkpoint, **fields):
    config = evaluation.get_config("folder")
    config.data.path = path
    config.update(protocol="segmentation", checkpoint=checkpoint, bootstrap=20, cache=f"{workdir}/cache", batch_size=8)
    config.split.update(folds=2, duplicates=False)
    config.update(fields)
    return evaluate(config, str(workdir / "run"))


@pytest.mark.parametrize("checkpoint", ["pixels", "random"])
def test_frozen_patches_are_probed(masked, tmp_path, checkpoint):
    results = probed(masked, tmp_path, checkpoint)
    assert results["metrics"]["dice"]["value"] > 0.4  # grey levels alone tell the disc from what surrounds it
    assert results["counts"]["frames"] == 24
    for member in results["context"]["members"]:
        assert member["penalty"] in patches.PENALTIES
    assert "Linear segmentation probe" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "predictions.csv").exists()


def test_the_patch_probe_finds_what_is_linear_and_is_bitwise_the_same_again(rng):
    tokens = rng.normal(size=(20, 6, 4)).astype(np.float16)
    targets = np.eye(2, dtype=np.float16)[(tokens[..., 1] > 0.3).astype(int)]
    train, validation = np.arange(12), np.arange(12, 16)
    probe = patches.fit(100 + 5 * tokens, targets, train, validation)
    said = probe.predict(100 + 5 * tokens[16:], (2, 3))["probabilities"]
    assert said.shape == (4, 2, 3, 2)
    assert (said.argmax(axis=-1).ravel() == targets[16:].argmax(axis=-1).ravel()).mean() > 0.9
    again = patches.fit(100 + 5 * tokens, targets, train, validation)
    assert (again.kernel == probe.kernel).all()
    assert patches.fit(tokens, targets, train, np.zeros(0, int), (0.1,)).settings == {"penalty": 0.1}


def test_shares_of_patches_add_up_to_what_is_drawn(masked):
    table, task = segmentation.of_table(read_table(masked), (), "drop", 1)
    found = patches.shares(table, task, (6, 8), 1).astype(np.float64)
    assert found.shape == (24, 48, 3)
    np.testing.assert_allclose(found.sum(axis=2), 1, atol=2e-3)
    assert found[4, :, 1].sum() * 64 == pytest.approx((drawn(4)[1] == 1).sum(), rel=0.01)


def test_a_probe_of_pixels_refuses_what_is_for_whole_frames(masked, tmp_path):
    with pytest.raises(InputError, match=r"config\.positive is for classes of whole frames"):
        probed(masked, tmp_path, "pixels", positive="disc")
    with pytest.raises(InputError, match=r"random:large2 must name one of the sizes tiny"):
        probed(masked, tmp_path, "random:large2")
