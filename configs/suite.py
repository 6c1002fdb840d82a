r"""Test one frozen encoder on every labelled or masked dataset that you have, beside what it has to beat.

    python -m usfmae_jax.evaluate --config=suite \
        --config.suite.checkpoints=runs/pretrain-tiny,random,pixels --config.data.path=data/bus_bra,data/aul,data/hc

A foundation model should carry over from one anatomy to the next; this measures whether it does. Whichever of these a
dataset has is tested: its classes by logistic regression, its masks by a linear layer, and numbers from a table,
--config.suite.targets=hc=HC.csv, by ridge regression. The resulting table gives a score with its interval for every
encoder, and the difference from the first one under the same resampled patients. suite.md and report.html hold the
table, DATASET-KIND/ENCODER the report of each test. The same command resumes where it was interrupted, and more
encoders or datasets may be added to it.

To test an encoder from another library, convert it with `usfmae_jax.convert` first. `random` is an untrained encoder
(`random:base` one of another size), `pixels` are raw pixels.
"""

import ml_collections

from usfmae_jax.configs import evaluate


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    """The settings; every field can be overridden with `--config.field=value`."""
    config = evaluate.get_config("folder")
    config.protocol = "suite"  # runs the protocols named below
    config.suite = dict(
        checkpoints=(),  # encoders, as for config.checkpoint of configs/evaluate.py; each is compared with the first
        labels="logistic",  # protocol for frame labels: logistic, knn, linear, attentive; "" = none
        masks="segmentation",  # protocol for masks; "" = none
        numbers="regression",  # protocol for the tables in targets; "" = none
        targets=(),  # DATASET=FILE.csv or DATASET=FILE.csv#COLUMN; lengths in mm or cm: as a fraction of the side
    )
    VARIANTS[variant](config)
    return config


def base(config: ml_collections.ConfigDict) -> None:
    """Nothing to change."""


VARIANTS = {f.__name__: f for f in (base,)}
