"""Teach a model to draw the outlines that masks show, and test it on patients that it has not seen.

    python -m usfmae_jax.finetune --config=segment:busbra --config.init=runs/pretrain-tiny
    python -m usfmae_jax.finetune --config=segment:folder --config.data.path=data/mine
    python -m usfmae_jax.finetune --config=segment:busbra --config.model.arch=unet

Everything in `configs/finetune.py` applies here too: folds, seeds, label fractions, resuming, the files in the workdir.
The metrics are Dice, IoU, boundary F1 and HD95 of each class, averaged by patient, with intervals; report.html shows
the best, median and worst outlines. The baselines to beat: without --config.init the same model starts from random
weights, and --config.model.arch=unet is a small U-Net. ViT-B at 224 pixels with batch 32 takes 2.2 GiB of each of four
TPU v5e (from the compiler, see docs/scale.md).

Variants
  :folder  any shards with masks (data_prep.build of images with masks beside them); 5 folds by patient
  :busbra  BUS-BRA, the lesion, its official 5 folds
  :hc18    HC18, the fetal head
  :camus   CAMUS, ventricle, myocardium and atrium
  :mmotu   MMOTU-2D, eight classes of ovaries and their contents, its official train and test parts
  :phantom simulated frames with three classes of lesions: a small model on a CPU
  :folder_linear :busbra_linear   one linear layer on the frozen encoder, as a probe: minutes on a CPU
  :folder_instances :mmotu_instances :phantom_instances   each lesion of a frame separately: queries on the
           encoder learn the connected areas of a class; the metrics are COCO's mAP, mAP@50 and mAP@75
"""

import ml_collections

from usfmae_jax.configs import finetune


def get_config(variant: str = "folder") -> ml_collections.ConfigDict:
    """The run's settings; every field can be overridden with `--config.field=value`."""
    config = finetune.get_config("folder")
    config.task = "segmentation"
    config.classes = ()  # class names in order, without the background; () = those of the shards
    config.mask_classes = "masks"  # or "label": each mask outlines one object, whose class is the frame's label
    config.unmasked = "drop"  # frames without a mask: drop, background (keep them as empty), refuse (an error)
    config.save_masks = False  # save predicted masks of the test frames, as PNG and COCO JSON, to masks/ in the workdir
    config.dice = 1.0  # weight of the soft Dice loss relative to the cross-entropy; 0 = off
    config.min_pixels = 10  # for instances: smaller areas are ignored
    config.no_object = 0.1  # for instances: weight in the loss of queries matched to no object
    # "decoder": convolutions that upsample from four levels of the encoder; or "linear"; for instances "queries".
    config.model.head = "decoder"
    config.model.queries = 20  # for instances: maximum number found on a frame
    config.model.query_blocks = 3  # for instances: number of last encoder blocks that process the queries
    config.model.decoder_width = 128  # channels of the decoder at the resolution of the patch grid
    config.augment.update(crop_scale=(0.5, 1.0), rotation=(-15.0, 15.0))
    config.regularization.smoothing = 0.0
    config.optimizer.learning_rate = 8e-3  # peak rate per 256 images; 1e-3 at batch 32
    config.train.update(epochs=40.0, min_steps=400)
    config.stop.update(metric="dice", every=2.0)
    VARIANTS[variant](config)
    return config


def folder(config: ml_collections.ConfigDict) -> None:
    """Any shards with masks: nothing to change."""


def busbra(config: ml_collections.ConfigDict) -> None:
    """BUS-BRA (Gomez-Flores et al. 2024): 1,875 outlines of breast lesions."""
    config.data.path = "data/bus_bra"
    config.classes = ("lesion",)


def hc18(config: ml_collections.ConfigDict) -> None:
    """HC18 (van den Heuvel et al. 2018): 999 outlines of fetal heads."""
    config.data.path = "data/hc"
    config.classes = ("head",)


def camus(config: ml_collections.ConfigDict) -> None:
    """CAMUS (Leclerc et al. 2019): 2,000 outlines of two views of 500 hearts."""
    config.data.path = "data/camus"
    config.classes = ("ventricle", "myocardium", "atrium")


def mmotu(config: ml_collections.ConfigDict) -> None:
    """MMOTU-2D (Zhao et al. 2022): 1,469 outlines of eight classes, one class per frame."""
    config.data.path = "data/mmotu_2d"
    config.mask_classes = "label"


def _linear(config: ml_collections.ConfigDict) -> None:
    config.mode = "frozen"
    config.model.update(head="linear", drop_path=0.0)


def folder_linear(config: ml_collections.ConfigDict) -> None:
    """Any shards with masks: one linear layer on the frozen encoder."""
    _linear(config)


def busbra_linear(config: ml_collections.ConfigDict) -> None:
    """BUS-BRA: one linear layer on the frozen encoder."""
    busbra(config)
    _linear(config)


def folder_instances(config: ml_collections.ConfigDict) -> None:
    """Any shards with masks, instance segmentation; the recipe of EoMT (Kerssies et al. 2025) for a small model."""
    config.task = "instances"
    config.model.update(head="queries", drop_path=0.0)
    config.optimizer.learning_rate = 8e-3
    config.train.update(epochs=60.0, min_steps=1000)
    config.stop.update(metric="map", every=5.0)


def mmotu_instances(config: ml_collections.ConfigDict) -> None:
    """MMOTU-2D, instance segmentation."""
    mmotu(config)
    folder_instances(config)


def phantom(config: ml_collections.ConfigDict) -> None:
    """Simulated frames with three classes of lesions: a small model, 44 minutes on one core.

    data_prep.build --dataset=phantom --lesions=several --patients=20000 --frames=1. Another patient helps more than
    another frame of the same patient or an augmented copy, so there is hardly any augmentation. Duplicates are not
    looked for: simulated frames look alike, and none is a copy.
    """
    _phantoms(config)
    config.augment.update(crop_scale=(0.8, 1.0), rotation=(0.0, 0.0))
    config.augment.update(brightness=(0.0, 0.0), contrast=(1.0, 1.0), gamma=(1.0, 1.0))
    config.split.validation = 0.02
    config.train.epochs = 5.0
    config.stop.every = 0.5


def _phantoms(config: ml_collections.ConfigDict) -> None:
    config.data.path = "data/phantom"
    config.model.update(image_size=(96, 96), decoder_width=64)
    config.optimizer.learning_rate = 1.6e-2  # 1e-3 at batch 16
    config.train.batch_size = 16
    config.split.duplicates = False


def phantom_instances(config: ml_collections.ConfigDict) -> None:
    """Simulated frames, instance segmentation: 400 patients with four frames each."""
    _phantoms(config)
    folder_instances(config)
    config.model.update(queries=10, query_blocks=2)
    config.optimizer.learning_rate = 1.6e-2
    config.train.epochs = 40.0


VARIANTS = {
    f.__name__: f
    for f in (
        *(folder, busbra, hc18, camus, mmotu, phantom, folder_linear, busbra_linear),
        *(folder_instances, mmotu_instances, phantom_instances),
    )
}
