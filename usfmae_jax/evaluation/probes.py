"""What frozen features know: k-NN, logistic regression and effective rank."""

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from usfmae_jax.errors import InputError


def rankme(features: np.ndarray) -> float:
    """Effective rank of features `[N, D]`, in [1, min(N, D)] (Garrido et al. 2023, eq. 1).

    The exponential of the entropy of the normalised singular values: low when features collapse onto few directions.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    share = values / max(values.sum(), 1e-12) + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def probe(features: np.ndarray, labels: np.ndarray, groups: Sequence[str], *, seed: int = 0) -> dict[str, float]:
    """Scores frozen features by 5-fold cross-validation with every group in one fold.

    Two classifiers with fixed settings, so that nothing is tuned on what is measured: k-NN (k = 20, cosine similarity
    weighted with temperature 0.07) and logistic regression on standardised features (C = 0.01).

    Args:
      features: float `[N, D]`.
      labels: int `[N]`.
      groups: patient of each frame; a group is never on both sides.
      seed: of the folds.

    Returns:
      `{knn,logistic}_{auroc,balanced_accuracy}` over the pooled held-out predictions (AUROC one-vs-rest, macro); the
      ends of the AUROC's 95% interval, `{knn,logistic}_auroc_{low,high}`; and `rankme`.

    Raises:
      InputError: a class has frames of fewer than two groups.
    """
    folds = group_folds(labels, groups, seed=seed)
    classifiers = {
        "knn": make_pipeline(Normalizer(), KNeighborsClassifier(20, weights=_temperature)),
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)),
    }
    classes = np.unique(labels)
    scores = {}
    for name, classifier in classifiers.items():
        held_out = np.zeros((len(labels), len(classes)))
        for train, test in folds:
            if name == "knn":
                classifier.set_params(kneighborsclassifier__n_neighbors=min(20, len(train)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # early in a run features are ill-conditioned
                held_out[test] = classifier.fit(features[train], labels[train]).predict_proba(features[test])
        scores[f"{name}_auroc"] = _auroc(labels, held_out)
        low, high = _bootstrap_auroc(labels, held_out, groups, seed)
        scores |= {f"{name}_auroc_low": low, f"{name}_auroc_high": high}
        scores[f"{name}_balanced_accuracy"] = float(balanced_accuracy_score(labels, classes[held_out.argmax(axis=1)]))
    return scores | {"rankme": rankme(features)}


def group_folds(
    labels: np.ndarray, groups: Sequence[str], *, count: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stratified folds as (train, test) indices, every group in one test fold; fewer where a class has fewer groups.

    Raises:
      InputError: a class has frames of fewer than two groups.
    """
    group_array = np.asarray(groups)
    fewest = min((len(np.unique(group_array[labels == label])), label) for label in np.unique(labels))
    if fewest[0] < 2:
        raise InputError(
            f"class {fewest[1]} has frames of one patient only, so that it cannot be tested on another one"
        )
    splitter = StratifiedGroupKFold(min(count, fewest[0]), shuffle=True, random_state=seed)
    folds = list(splitter.split(labels, labels, group_array))
    if any(len(np.unique(labels[train])) < len(np.unique(labels)) for train, _ in folds):
        raise InputError(f"class {fewest[1]} has too few patients ({fewest[0]}) to be in every training fold")
    return folds


def _temperature(distances: np.ndarray) -> np.ndarray:
    # On the unit sphere a squared distance is 2 - 2 cos; the constant cancels.
    return np.exp(-(distances**2) / 2 / 0.07)


def _bootstrap_auroc(
    labels: np.ndarray, probabilities: np.ndarray, groups: Sequence[str], seed: int, resamples: int = 200
) -> tuple[float, float]:
    """Percentile interval over resampled patients: frames of one patient are no independent evidence."""
    rng = np.random.default_rng(seed)
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    frames = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    values: list[float] = []
    while len(values) < resamples:
        chosen = np.concatenate([frames[i] for i in rng.integers(len(frames), size=len(frames))])
        if len(np.unique(labels[chosen])) == probabilities.shape[1]:  # else AUROC is not defined: draw again
            values.append(_auroc(labels[chosen], probabilities[chosen]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _auroc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    # The probabilities of a fold add up to one but for rounding; scikit-learn wants it exact.
    normalised = probabilities / probabilities.sum(axis=1, keepdims=True)
    return float(roc_auc_score(labels, normalised, multi_class="ovr", average="macro"))
