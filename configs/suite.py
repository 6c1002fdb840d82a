r"""One frozen encoder on every labelled and masked dataset there is, beside what it has to beat.

    python -m usfmae_jax.evaluate --config=suite \
        --config.suite.checkpoints=runs/pretrain-tiny,random,pixels --config.data.path=data/bus_bra,data/aul,data/hc18

What a foundation model is asked for is to carry over from one anatomy to the next: this measures it. Each dataset is
tested by logistic regression of its classes, by a linear layer for its masks, and by ridge regression of the numbers
that a table has of it, --config.suite.targets=hc=HC.csv, as far as it has them; the table gives every encoder with its
interval, and its difference to the first one under the same resampled patients. suite.md and report.html hold the
table, DATASET-KIND/ENCODER the report of each test. The same command goes on where it was interrupted, and more
encoders or datasets may be added to it.

An encoder of another library is made ours by `usfmae_jax.convert` first. `random` is an untrained one (`random:base` of
another size), `pixels` are raw pixels.
"""

import ml_collections

from usfmae_jax.configs import evaluate


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    """The settings; every field can be overridden with `--config.field=value`."""
    config = evaluate.get_config("folder")
    config.protocol = "suite"  # all that are named below
    config.suite = dict(
        checkpoints=(),  # encoders, as config.checkpoint of configs/evaluate.py; the first is compared with the others
        labels="logistic",  # protocol for the classes of frames: logistic, knn, linear, attentive; "" = none
        masks="segmentation",  # protocol for masks; "" = none
        numbers="regression",  # protocol for the tables of numbers below; "" = none
        targets=(),  # DATASET=FILE.csv or DATASET=FILE.csv#COLUMN; lengths in mm or cm as a share of the frame's side
    )
    VARIANTS[variant](config)
    return config


def base(config: ml_collections.ConfigDict) -> None:
    """Nothing to change."""


VARIANTS = {f.__name__: f for f in (base,)}
