r"""Test an encoder (with a probe on its features) or a fine-tuned classifier on labelled frames, with intervals.

    python -m usfmae_jax.evaluate --config=evaluate:busbra --config.checkpoint=runs/pretrain-tiny
    python -m usfmae_jax.evaluate --config=evaluate:folder --config.checkpoint=DIR \
        --config.data.path=data/mine --config.protocol=knn --workdir=runs/mine-knn

Writes results.json, results.md, predictions.csv, report.html and splits/splits.csv to the workdir. Features are
computed once and kept for the other protocols. For BUS-BRA's 1,875 frames and the tiny encoder, two CPU cores shared
with other work took 10 to 20 s for the features, 5 s for logistic regression on all five folds, 10 s for the linear
probe and 45 seconds per fold for the attentive one.

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
  finetuned  the classifier of a fine-tuning run, unchanged
  auto       finetuned where the checkpoint has a classifier, else logistic
"""

import ml_collections


def get_config(variant: str = "folder") -> ml_collections.ConfigDict:
    """The settings; every field can be overridden with `--config.field=value`."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of folds
    config.seeds = (0,)  # of label fractions and initial weights; several are averaged
    # "usfmae-tiny", which is included; a workdir, a checkpoint in it, an encoder/ or classifier/ directory; or the
    # floor to beat: "pixels", "random".
    config.checkpoint = ""
    config.step = 0  # of a pretraining workdir's checkpoints; 0 = its encoder/, or else the newest
    config.protocol = "auto"  # how it is tested, see above
    config.pool = "mean"  # of patch tokens, or "cls"
    config.classes = ()  # expected class names, in order; () takes what the shards say
    config.positive = ""  # class that counts as positive where there are two; "" = the last
    config.targets = ""  # of protocol regression: a CSV file of numbers, see configs/finetune.py
    config.target = ""  # name of the column; "" = the only one of numbers
    config.of_frame = False  # a length in mm, learnt as a share of the frame's side
    config.data = dict(
        path="",  # labelled shards: a folder, a glob, gs://...; several separated by commas
        split="",  # only shards of this TFDS split
        threads=2,  # that decode
    )
    config.split = dict(
        # "official", "shards" (their train, validation, test), "group" (k-fold), "single"; "auto": the first there is.
        kind="auto",
        path="",  # a CSV with the columns frame, part and perhaps fold, or a run's splits/splits.csv
        folds=5,  # of kind "group"
        validation=0.2,  # share of the training patients, where the split names none
        test=0.2,  # share of all patients, of a single split
        only=(),  # names of the folds to run; () = all
        duplicates=True,  # look for copies under other patients' names, and keep them on one side
        copies="drop",  # of tested pictures in other parts: drop; or keep, as a split was published
        no_copies="",  # a CSV file: lines of a run's duplicates.csv that a person found to be other pictures
    )
    config.fractions = (1.0,)  # of the training patients that have labels, such as (0.01, 0.05, 0.1, 0.25, 1.0)
    # What was chosen on validation frames is fitted again with them; not where shares of the labels are compared.
    config.refit = True
    config.linear = dict(
        optimizer="lars",  # or "adamw"
        epochs=90,  # passes over the training features
        batch_size=256,  # features of an update
    )
    config.attentive = dict(
        epochs=30,  # passes over the training features, at most
        batch_size=64,  # frames of an update
        patience=5,  # epochs without a better validation score after which it ends
    )
    config.corruptions = False  # also on images with graded ultrasound artefacts: 35 passes over the test frames
    config.bootstrap = 1000  # resamples of the patients
    config.examples = 12  # most confident errors in the report
    config.cache = ""  # folder for features; "" = ~/.cache/usfmae_jax
    config.batch_size = 0  # images per call; 0 = what suits the devices
    config.dtype = "float32"  # of the arithmetic; "bfloat16" on accelerators
    config.mesh = dict(
        data=-1,  # devices that share the batch; -1 = the rest of the devices
        fsdp=1,  # devices that also split parameters and optimiser between them
    )
    VARIANTS[variant](config)
    return config


def folder(config: ml_collections.ConfigDict) -> None:
    """Whatever `config.data.path` holds."""


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
