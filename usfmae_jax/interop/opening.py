"""From a folder with weights to a `Model` with everything that can be exported, the decoder included."""

from typing import Any

import numpy as np
from etils import epath

from usfmae_jax.errors import InputError
from usfmae_jax.interop.checkpoint import describe_encoder, load_parameters
from usfmae_jax.interop.encoder import flatten
from usfmae_jax.interop.model import Model
from usfmae_jax.interop.weights import lineage_of, open_weights

_DECODER = ("decoder_width", "decoder_depth", "decoder_num_heads")


def open_model(path: str, step: int | None = None) -> tuple[Model, str]:
    """Reads weights, decoder included where there is one.

    Args:
      path: workdir of a pretraining run or of `usfmae_jax.convert`, or an encoder or classifier directory.
      step: of the run's checkpoints; default is the newest.

    Returns:
      the model, and what it is, for a person.

    Raises:
      InputError: none of these, or it cannot be read.
    """
    root = epath.Path(path)
    if (root / "checkpoints").is_dir() and (root / "config.json").exists():
        return _from_run(path, step)
    if step is not None:
        raise InputError(f"--step={step}: {path} is not the workdir of a run, so it has no steps to choose from")
    weights = open_weights(path)
    if weights.kind == "encoder":
        architecture = weights.description["encoder"]
        params = _flat({"encoder": weights.params})
        return Model(params, architecture, None, "", (), weights.preprocessing, weights.lineage), "encoder"
    about = weights.description
    if about["model"] != "vit":
        raise InputError(f"{path} holds a {about['model']}; only vision transformers can be exported")
    params, classes = _flat(weights.params), tuple(about["classes"])
    model = Model(params, about["encoder"], None, about["pool"], classes, weights.preprocessing, weights.lineage)
    return model, "classifier"


def _from_run(path: str, step: int | None) -> tuple[Model, str]:
    params, config, step = load_parameters(path, step)
    try:
        architecture, preprocessing = describe_encoder(config)
        _ = params["encoder"]
    except KeyError as error:
        raise InputError(
            f"{path} is not a pretraining run; give a classifier/ directory of a fine-tuned one"
        ) from error
    decoder = {name: config["model"][name] for name in _DECODER} if "decoder" in params else None
    model = Model(_flat(params), architecture, decoder, "", (), preprocessing, lineage_of(path, step))
    return model, f"encoder after step {step}"


def _flat(params: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in flatten(params).items()}
