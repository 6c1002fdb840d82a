r"""Test an encoder (with a probe on its features) or a fine-tuned model on labelled frames, with intervals.

    python -m usfmae_jax.evaluate --config=evaluate:busbra --config.checkpoint=runs/pretrain-tiny
    python -m usfmae_jax.evaluate --config=evaluate:folder --config.checkpoint=DIR \
        --config.data.path=data/mine --config.protocol=knn --workdir=runs/mine-knn

Writes results.json, results.md, predictions.csv, report.html and, for probes, splits/splits.csv to the workdir.
Features are computed once and kept for the other protocols. For BUS-BRA's 1,875 frames and the tiny encoder, two CPU
cores shared with other work took 10 to 20 s for the features, 5 s for logistic regression on all five folds, 10 s for
the linear probe and 45 seconds per fold for the attentive one.

Variants
  :folder   any labelled shards, --config.data.path=DIR
  :busbra   BUS-BRA, benign or malignant, its five official folds
  :mmotu    MMOTU-2D, eight kinds of ovarian tumour, its official test set
  :gist514  GIST514-DB, GIST or leiomyoma, its five official folds

Protocols (`config.protocol`)
  logistic   logistic regression; the strength of regularisation is chosen on validation frames
  knn        weighted vote of the nearest neighbours; their number is chosen on validation frames
  linear     MAE's linear probe: BatchNorm and a linear layer, LARS or AdamW
  attentive  one learned query attends to the frozen patch tokens
  segmentation  for shards with masks: a linear layer from the frozen patch tokens to the classes of their pixels
  regression  for a number from a table, --config.targets=FILE.csv: ridge regression, chosen on validation frames
  finetuned  the models of a fine-tuning run, of any task, unchanged; on other data their predictions are averaged
  auto       finetuned where the checkpoint has been fine-tuned, else logistic
"""

import ml_collections


def get_config(variant: str = "folder") -> ml_collections.ConfigDict:
    """The settings; every field can be overridden with `--config.field=value`."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # seed of the folds
    config.seeds = (0,)  # seeds of label fractions and initial weights; results of several seeds are averaged
    # "usfmae-tiny", which is included; a workdir, a checkpoint in it, an encoder/, classifier/ or model/ folder; or a
    # baseline: "pixels" or "random".
    config.checkpoint = ""
    config.step = 0  # checkpoint of a pretraining workdir; 0 = its encoder/, or else its newest checkpoint
    config.protocol = "auto"  # how the encoder is tested, see above
    config.pool = "mean"  # the mean of the patch tokens; or "cls", the class token
    config.mask_classes = (
        "masks"  # for protocol segmentation; "label": each mask outlines one object, of the frame's class
    )
    config.classes = ()  # expected class names, in order; () = those of the shards
    config.positive = ""  # the positive class where there are two; "" = the last
    config.targets = ""  # a CSV file of the numbers or labels of each frame, see configs/finetune.py
    config.target = ""  # name of the target column; "" = the model's, or the only numeric column
    config.of_frame = False  # True for a length in mm: learnt as a fraction of the frame's side; needs pixel sizes
    config.data = dict(
        path="",  # labelled shards: a folder, a glob, gs://...; separate several with commas
        split="",  # only shards of this TFDS split
        threads=2,  # decoding threads
    )
    config.split = dict(
        # "official"; "shards" (their train, validation and test parts); "group" (k-fold by patient); "single" (one
        # split by patient); "auto": path if given, else official, else shards, else group.
        kind="auto",
        path="",  # a CSV file with the columns frame, part and optionally fold, or a run's splits/splits.csv
        folds=5,  # number of folds for kind "group"
        validation=0.2,  # fraction of the training patients, if the split has no validation part
        test=0.2,  # fraction of all patients, for kind "single"
        only=(),  # names of folds to run; () = all
        duplicates=True,  # look for the same image under two patients, and keep it on one side of the split
        copies="drop",  # copies of test images in other parts: "drop", or "keep" to follow a published split exactly
        no_copies="",  # a CSV file: rows of a run's duplicates.csv that a person judged to be different images
    )
    config.fractions = (1.0,)  # fractions of the training patients to use, such as (0.01, 0.05, 0.1, 0.25, 1.0)
    # Once hyperparameters are chosen, fit again on training and validation frames together; not for label fractions.
    config.refit = True
    config.linear = dict(
        optimizer="lars",  # "lars" or "adamw"
        epochs=90,  # passes over the training features
        batch_size=256,  # features per update
    )
    config.attentive = dict(
        epochs=30,  # maximum number of passes over the training features
        batch_size=64,  # frames per update
        patience=5,  # stop after this many epochs without a better validation score
    )
    config.corruptions = False  # also test on images with graded ultrasound artefacts: 35 passes over the test frames
    config.bootstrap = 1000  # bootstrap resamples of the patients
    config.examples = 12  # how many of the most confident errors the report shows
    config.cache = ""  # folder that caches features; "" = ~/.cache/usfmae_jax
    config.batch_size = 0  # images per call; 0 = chosen for the devices
    config.dtype = "float32"  # compute dtype; "bfloat16" on accelerators
    config.mesh = dict(
        data=-1,  # devices that the batch is split over; -1 = all remaining devices
        fsdp=1,  # devices that split the batch and also shard parameters and optimiser state
    )
    VARIANTS[variant](config)
    return config


def folder(config: ml_collections.ConfigDict) -> None:
    """The labelled shards in `config.data.path`."""


def busbra(config: ml_collections.ConfigDict) -> None:
    """BUS-BRA (Gomez-Flores et al. 2024): 1,875 breast images of 1,064 patients."""
    config.data.path = "data/bus_bra"
    config.classes = ("benign", "malignant")
    config.positive = "malignant"


def mmotu(config: ml_collections.ConfigDict) -> None:
    """MMOTU-2D (Zhao et al. 2022): 1,469 ovarian images; patients are not known."""
    config.data.path = "data/mmotu_2d"


def gist514(config: ml_collections.ConfigDict) -> None:
    """GIST514-DB (He et al. 2023): 514 endoscopic images; patients are not known."""
    config.data.path = "data/gist514_db"
    config.positive = "GIST"


VARIANTS = {f.__name__: f for f in (folder, busbra, mmotu, gist514)}
