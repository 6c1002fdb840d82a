"""What frozen features know: logistic regression, k-NN and effective rank.

Settings of a probe are chosen by the log loss of validation frames: predictions of several folds are pooled, and a fold
whose settings were chosen by rank alone may give probabilities of another scale than the others.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from usfmae_jax.errors import InputError

#: Inverse strengths of regularisation that are tried, as the DINO evaluations do.
REGULARIZATION = tuple(10.0**power for power in range(-6, 6))
#: Numbers of neighbours that are tried, and the temperature of their votes (Caron et al. 2021).
NEIGHBOURS, TEMPERATURE = (10, 20, 100, 200), 0.07
#: Newton's method factorises a square matrix of this many rows at most; above it L-BFGS is quicker.
LARGEST_HESSIAN = 1600


@dataclasses.dataclass(frozen=True)
class Probe:
    """A head fitted on frozen features.

    Attributes:
      predict: features `[N, ...]` to probabilities float64 `[N, C]`.
      settings: what was chosen on the validation frames, and its score there; JSON.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    settings: dict[str, float]


def logistic(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], num_classes: int
) -> Probe:
    """Multinomial logistic regression on standardised features, its regularisation chosen on validation frames.

    Inverse strengths C of 10^-6 to 10^5 are fitted on the training frames alone, each starting from the one before; the
    lowest validation log loss wins and is kept as it is: validation frames are not added to the fit, so that a label
    fraction is that fraction, and every protocol learns from the same frames.

    Args:
      train: features float `[N, D]` and labels int `[N]` with every class in it.
      validation: the same of other patients.
      num_classes: labels are below it.
    """
    mean, scale = train[0].mean(axis=0, dtype=np.float64), train[0].std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * np.abs(mean) + 1e-12, scale, 1.0)  # a constant feature says nothing
    x = (train[0] - mean) / scale
    # With an L2 penalty the weights lie in the span of the training frames: fewer frames than features, fewer unknowns.
    basis = np.linalg.svd(x, full_matrices=False)[2].T if len(x) < x.shape[1] else np.eye(x.shape[1])
    x, held_out = x @ basis, (validation[0] - mean) / scale @ basis
    unknowns = (x.shape[1] + 1) * (num_classes if num_classes > 2 else 1)
    model = LogisticRegression(
        solver="newton-cholesky" if unknowns <= LARGEST_HESSIAN else "lbfgs", max_iter=1000, warm_start=True
    )
    best = (np.inf, 0.0, np.empty(0), np.empty(0))
    for strength in REGULARIZATION:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hardly regularised and separable: the weights grow without end
            model.set_params(C=strength).fit(x, train[1])
        loss = validation_loss(validation[1], model.predict_proba(held_out))
        if loss < best[0]:
            best = (loss, strength, model.coef_.copy(), model.intercept_.copy())
    loss, strength, weights, bias = best
    kernel = basis @ weights.T / scale[:, None]
    bias = bias - mean @ kernel

    def predict(features: np.ndarray) -> np.ndarray:
        logits = features @ kernel + bias
        return softmax(np.concatenate([0 * logits, logits], axis=1) if num_classes == 2 else logits, axis=1)

    return Probe(predict, {"C": strength, "validation_log_loss": loss})


def knn(train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], num_classes: int) -> Probe:
    """Weighted vote of the nearest training frames by cosine similarity (Wu et al. 2018, eq. 4), temperature 0.07.

    The number of neighbours, 10 to 200, is chosen by the log loss of validation frames.

    Args:
      train: features float `[N, D]` and labels int `[N]` with every class in it.
      validation: the same of other patients.
      num_classes: labels are below it.
    """
    known, votes = _unit(train[0]), np.eye(num_classes)[train[1]]
    counts = sorted({min(count, len(known)) for count in NEIGHBOURS})

    def predict(features: np.ndarray, count: int) -> np.ndarray:
        found = np.empty((len(features), num_classes))
        for start in range(0, len(features), 1024):  # similarities of all frames at once may not fit
            similar = _unit(features[start : start + 1024]) @ known.T
            nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
            # Relative to the nearest one: the same shares, and no overflow.
            near = np.take_along_axis(similar, nearest, axis=1)
            weight = np.exp((near - near.max(axis=1, keepdims=True)) / TEMPERATURE)
            found[start : start + 1024] = np.einsum(
                "nk,nkc->nc", weight / weight.sum(axis=1, keepdims=True), votes[nearest]
            )
        return found

    losses = [validation_loss(validation[1], predict(validation[0], count)) for count in counts]
    best = counts[int(np.argmin(losses))]
    return Probe(lambda features: predict(features, best), {"k": best, "validation_log_loss": min(losses)})


def validation_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean log loss of probabilities `[N, C]`, those below 1e-6 taken for it; infinite if any is no number."""
    if not np.isfinite(probabilities).all():
        return np.inf
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-6)).mean())


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


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
        scores[f"{name}_auroc"] = auroc(labels, held_out)
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
            values.append(auroc(labels[chosen], probabilities[chosen]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def auroc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """AUROC of probabilities `[N, C]`, one class against the rest, averaged over classes."""
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    # The probabilities of a fold add up to one but for rounding; scikit-learn wants it exact.
    normalised = probabilities / probabilities.sum(axis=1, keepdims=True)
    return float(roc_auc_score(labels, normalised, multi_class="ovr", average="macro"))
