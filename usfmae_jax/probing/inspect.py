"""A closer look at what was tested: the most confident errors, where attention went, and images made worse."""

import concurrent.futures
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from tqdm import tqdm

from usfmae_jax.data import table as labelled
from usfmae_jax.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from usfmae_jax.data.table import Table
from usfmae_jax.evaluation.classification import summarise
from usfmae_jax.evaluation.predictions import concatenate
from usfmae_jax.interop.model import Model, build, model_graph
from usfmae_jax.models.heads import Pool
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.models.vit import attention_rollout
from usfmae_jax.training import outcomes
from usfmae_jax.training.outcomes import Attention, Outcome, Tested

#: Metrics whose curve over severities is kept.
CURVES = ("auroc", "balanced_accuracy", "f1_macro", "ece")
#: Decoded images are kept for all corruptions up to this many bytes.
KEPT = 2**30

#: (batches, number of images, name for the bar) to the probabilities of each entry's rows, in order.
Predict = Callable[[Iterator[np.ndarray], int, str], list[np.ndarray]]


def rollout(weights: Model | None, pool: Pool) -> Attention | None:
    """Attention rollout of a vision transformer as `(uint8 [n, H, W, c]) -> float32 [n, gh, gw]`; None for others."""
    if weights is None or weights.description.get("model", "vit") != "vit":
        return None
    encoder = weights.encoder()
    params = encoder.params["encoder"]
    mean, std = tuple(weights.preprocessing["mean"]), tuple(weights.preprocessing["std"])
    follow = _follower(model_graph(build(encoder.description)), mean, std, pool)
    return lambda images: np.asarray(follow(params, images))


@functools.lru_cache(4)  # the members of a run share the compiled program
def _follower(
    graph: Any, mean: tuple[float, ...], std: tuple[float, ...], pool: Pool
) -> Callable[[Any, np.ndarray], jax.Array]:
    return jax.jit(
        lambda params, images: attention_rollout(nnx.merge(graph, params), normalize_images(images, mean, std), pool)
    )


def errors(frames: Table, outcome: Outcome, count: int) -> list[dict[str, Any]]:
    """The most confident errors, most confident first, for `reporting.classification.finish`."""
    wrong = []
    for number in outcomes.foremost(outcome.tested):
        member = outcome.tested[number]
        predicted = member.probabilities.argmax(axis=1)
        for place in np.flatnonzero(predicted != frames.label[member.rows]):
            probability = float(member.probabilities[place, predicted[place]])
            wrong.append((-probability, int(member.rows[place]), int(predicted[place]), number))
    (size, channels), names = outcome.image_format, frames.label_names
    found = []
    for probability, row, predicted_class, number in sorted(wrong)[:count]:
        image = labelled.whole_image(frames, row, size, channels)
        attention = outcome.attention[number]
        found.append(
            {
                "image": image,
                "map": attention(image[None])[0] if attention else None,
                "label": names[frames.label[row]],
                "predicted": names[predicted_class],
                "probability": -probability,
                "frame": str(frames.frame_key[row]),
            }
        )
    return found


def sweep(
    frames: Table,
    tested: Sequence[Tested],
    predict: Predict,
    *,
    size: tuple[int, int],
    channels: int,
    config: ml_collections.ConfigDict,
) -> dict[str, Any]:
    """Metrics on test images under every corruption at every severity; nothing is fitted on corrupted images.

    Args:
      frames: the table.
      tested: members whose rows are corrupted, and their probabilities on clean images.
      predict: of batches that hold the rows of all entries one after the other.
      size: of the images, which are corrupted as the model gets them.
      channels: likewise.
      config: of the evaluation.

    Returns:
      for each corruption, for each of `CURVES`, its values at severity 0 (clean), 1, ..., 5.
    """
    rows = np.concatenate([member.rows for member in tested])
    how: dict[str, Any] = {"size": size, "channels": channels, "threads": config.data.threads}

    def clean() -> Iterator[np.ndarray]:
        return labelled.images(frames, rows, batch_size=config.batch_size, **how)

    kept = list(clean()) if len(rows) * size[0] * size[1] * channels <= KEPT else None
    clean_metrics = _metrics(frames, tested, [member.probabilities for member in tested], config)
    curves = {corruption: {name: [value] for name, value in clean_metrics.items()} for corruption in CORRUPTIONS}
    with tqdm(total=len(CORRUPTIONS) * len(SEVERITIES), desc="corruptions", unit="pass", leave=False) as bar:
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                images = corrupted(kept or clean(), rows, name, severity, config.seed, config.data.threads)
                for metric, value in _metrics(frames, tested, predict(images, len(rows), name), config).items():
                    curves[name][metric].append(value)
                bar.update()
    return curves


def corrupted(
    batches: Any, rows: np.ndarray, name: str, severity: int, seed: int, threads: int = 2
) -> Iterator[np.ndarray]:
    """Batches with a corruption of that severity; what is drawn for a frame follows from (seed, corruption, row).

    Frames keep their draw over severities, so that a curve shows the severity and not the luck.
    """

    def one(image: np.ndarray, row: int) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), int(row)])
        return corrupt(image, name, severity, rng)

    with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        start = 0
        for batch in batches:
            yield np.stack(list(pool.map(one, batch, rows[start : start + len(batch)])))
            start += len(batch)


def _metrics(
    frames: Table, tested: Sequence[Tested], probabilities: Sequence[np.ndarray], config: ml_collections.ConfigDict
) -> dict[str, float | None]:
    parts = [
        outcomes.of_rows(frames, member, member.rows, found)
        for member, found in zip(tested, probabilities, strict=True)
    ]
    metrics = summarise(concatenate(parts), config.positive, resamples=0)["metrics"]
    return {name: metrics[name]["value"] for name in CURVES}
