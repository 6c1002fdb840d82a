"""ClassPredictions that several tests look at."""

import dataclasses

import numpy as np

from usfmae_jax.evaluation.intervals import bootstrap_chunks
from usfmae_jax.evaluation.predictions import ClassPredictions, concatenate

BINARY = ("benign", "malignant")


def predictions(
    rng: np.random.Generator,
    patients: int = 40,
    frames: int = 2,
    classes: tuple[str, ...] = BINARY,
    folds: int = 1,
    seed: int = 0,
    skill: float = 1.0,
    decimals: int = 8,
) -> ClassPredictions:
    """Patients of each class in turn, in folds in turn; fewer decimals make ties."""
    patient = np.repeat(np.arange(patients), frames)
    label = patient % len(classes)
    logits = rng.normal(size=(len(label), len(classes)))
    logits[np.arange(len(label)), label] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = np.round(probabilities, decimals)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return ClassPredictions(
        classes=classes,
        dataset=np.full(len(label), "made", object),
        patient=np.array([f"p{i}" for i in patient], object),
        video=np.array([f"v{i}" for i in range(len(label))], object),
        frame=np.full(len(label), "0", object),
        fold=np.array([str(1 + i // len(classes) % folds) for i in patient], object),
        label=label,
        probabilities=probabilities,
        seed=np.full(len(label), seed),
        fraction=np.ones(len(label)),
    )


def several(rng: np.random.Generator) -> ClassPredictions:
    """Two label fractions, two seeds, three folds."""
    parts = []
    for fraction, skill in ((0.1, 0.5), (1.0, 1.5)):
        for seed in (0, 1):
            part = predictions(rng, patients=40, folds=3, seed=seed, skill=skill)
            parts.append(dataclasses.replace(part, fraction=np.full(len(part), fraction)))
    return concatenate(parts)


def bootstrap_weights(patients: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """All rows of `bootstrap_chunks` at once."""
    return np.concatenate(list(bootstrap_chunks(patients, resamples, seed)))
