"""Regression: a quantity of each frame, in its unit."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from usfmae_jax.data.splits import Strata
from usfmae_jax.data.table import Table, read_row
from usfmae_jax.data.targets import Targets, known
from usfmae_jax.errors import DamagedRecord, InputError
from usfmae_jax.evaluation import regression as scoring
from usfmae_jax.evaluation import tables
from usfmae_jax.evaluation.predictions import Predictions, identify
from usfmae_jax.evaluation.regression import LOSSES, QuantityPredictions
from usfmae_jax.reporting import regression as reporting
from usfmae_jax.tasks import Arrays, Task

KINDS = ("smooth_l1", "mse")
_BINS = (4, 3, 2)  # numbers of strata to try; each needs `_LEAST` patients
_LEAST = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Regression(Task):
    """How a quantity is learnt: the model predicts it standardised with the mean and deviation from `fitted`.

    Attributes:
      name: of the quantity.
      unit: of the quantity; "" = none.
      values: float64 `[N]`, for the rows of the table.
      extent: float64 `[N]`, divisor of the values: for lengths relative to the frame, its side (`extents`); else 1.
      pool: pooling of a vision transformer's tokens, "mean" or "cls".
      kind: loss, "smooth_l1" (Girshick 2015) or "mse".
      mean: mean of `values / extent` in the training part.
      deviation: standard deviation of the same.
      fingerprint: of the tables that `values` come from.
      notes: see `Task`.
    """

    name: str
    unit: str
    values: np.ndarray
    extent: np.ndarray
    pool: str = "mean"
    kind: str = "smooth_l1"
    mean: float = 0.0
    deviation: float = 1.0
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    metrics = ("mae", "rmse")
    losses = LOSSES
    tie = ""
    predictions = QuantityPredictions

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The name of the quantity."""
        return (self.name,)

    def strata(self, table: Table) -> Strata:
        """Quantile bins of the values: the largest number, at most four, with at least ten patients in each bin."""
        for count in _BINS:
            edges = np.unique(np.quantile(self.values, np.arange(1, count) / count))
            code = np.searchsorted(edges, self.values, side="right")
            patients = [len(np.unique(table.patient_key[code == one])) for one in range(len(edges) + 1)]
            if min(patients) >= _LEAST:
                ends = [f"{edge:.4g}" for edge in edges]
                between = [f"{low} to {high}" for low, high in itertools.pairwise(ends)]
                names = [f"below {ends[0]}", *between, f"{ends[-1]} or more"]
                return Strata(code, tuple(f"{name} {self.unit}".strip() for name in names))
        return super().strata(table)

    def summary(self, table: Table) -> str:
        """The range of the values."""
        low, high = self.values.min(), self.values.max()
        return f"{self.name} from {low:.4g} to {high:.4g} {self.unit}".strip()

    def fitted(self, table: Table, rows: np.ndarray) -> "Regression":
        """The task with mean and deviation of the training rows."""
        found = self.values[rows] / self.extent[rows]
        mean, deviation = float(found.mean()), float(found.std())
        # If all values are equal, the mean is all there is to learn.
        return dataclasses.replace(self, mean=mean, deviation=deviation if deviation > 1e-9 * abs(mean) else 1.0)

    def describe(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """A linear head for the standardised value, and the scale that converts it back to its unit."""
        pool = {"pool": self.pool} if backbone["model"] == "vit" else {}
        scale = {"mean": [self.mean], "deviation": [self.deviation], "unit": [self.unit]}
        scale["of_frame"] = [bool((self.extent != 1).any())]
        return {**backbone, **pool, "task": "regression", "outputs": [self.name], "scale": scale}

    def targets(self, table: Table, rows: np.ndarray) -> Arrays:
        """`value` float32 `[R]`, standardised."""
        return {"value": ((self.values[rows] / self.extent[rows] - self.mean) / self.deviation).astype(np.float32)}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss summed over images, and their number."""
        error = model(batch["image"], rng=rng, train=True)[:, 0] - batch["value"]
        each = optax.huber_loss(error) if self.kind == "smooth_l1" else jnp.square(error)
        return each.sum(), jnp.float32(len(each))

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """See `standardised`."""
        return standardised(model, images)

    def together(self, predicted: Sequence[Arrays], models: Sequence[Mapping[str, Any]]) -> Arrays:
        """The mean `value`, standardised by this task's scale; each model has been trained with a scale of its own."""
        scales = [(one["scale"]["mean"][0], one["scale"]["deviation"][0]) for one in models]
        values = [
            said["value"].astype(np.float64) * deviation + mean
            for said, (mean, deviation) in zip(predicted, scales, strict=True)
        ]
        return {"value": (np.mean(values, axis=0) - self.mean) / self.deviation}

    def measure(self, table: Table, rows: np.ndarray, predicted: Arrays) -> Arrays:
        """`value` float64 `[n]`, in its unit."""
        values = predicted["value"].astype(np.float64)
        return {"value": (values * self.deviation + self.mean) * self.extent[rows]}

    def score(self, table: Table, rows: np.ndarray, predicted: Arrays) -> dict[str, float]:
        """See `evaluation.regression.score`."""
        made = self.record(identify(table, rows, "", 0, 1.0), table, rows, predicted)
        found = {name: float(one[0]) for name, one in scoring.score(made, np.ones((1, len(rows)))).items()}
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def record(self, ids: Arrays, table: Table, rows: np.ndarray, predicted: Arrays) -> QuantityPredictions:
        """True and predicted values."""
        return QuantityPredictions(**ids, truth=self.values[rows], value=predicted["value"])

    def examples(
        self, table: Table, tested: Sequence[tuple[np.ndarray, Predictions]], count: int
    ) -> list[dict[str, Any]]:
        """The frames with the largest and the smallest errors, half of `count` each."""
        found = []
        for member, (rows, predictions) in enumerate(tested):
            assert isinstance(predictions, QuantityPredictions)
            pairs = zip(rows.tolist(), predictions.truth.tolist(), predictions.value.tolist(), strict=True)
            found += [{"member": member, "row": row, "truth": truth, "value": value} for row, truth, value in pairs]
        found.sort(key=lambda one: (-abs(one["value"] - one["truth"]), one["row"]))
        half = min(count // 2, -(-len(found) // 2))
        near = found[half:][::-1][:half]
        return [one | {"group": "far"} for one in found[:half]] + [one | {"group": "near"} for one in near]

    def finish(self, workdir: str, predictions: Predictions, validation: Predictions | None, **found: Any) -> Any:
        """See `reporting.regression.finish`."""
        assert isinstance(predictions, QuantityPredictions)
        return reporting.finish(workdir, predictions, name=self.name, unit=self.unit, **found)

    def table(self, results: Mapping[str, Any]) -> str:
        """The results as text for a terminal."""
        return tables.overview(results, scoring.titles(self.unit), "mae")


def of_table(table: Table, targets: Targets, of_frame: bool, **how: Any) -> tuple[Table, Regression]:
    """The frames with a known value, and the regression task on them.

    Args:
      table: of the frames.
      targets: with one column.
      of_frame: see `extents`.
      **how: fields of `Regression`.

    Raises:
      InputError: there are several columns, no frame has a value, or the pixel size of a frame is unknown.
    """
    if len(targets.names) != 1:
        raise InputError(f"config.target must name one of the columns {', '.join(map(repr, targets.names))}")
    table, targets = known(table, targets)
    ((name,), (unit,)) = targets.names, targets.units
    extent = extents(table) if of_frame else np.ones(len(table))
    about: dict[str, Any] = {"fingerprint": targets.fingerprint, "notes": targets.notes}
    return table, Regression(name, unit, targets.values[:, 0], extent, **about, **how)


def extent(size: tuple[int, int], spacing: Sequence[float]) -> float:
    """Side in mm of the square with the area of a frame of (height, width) pixels; 0 if `spacing` is unknown (0)."""
    return float(np.sqrt(np.prod(spacing) * size[0] * size[1]))


def extents(table: Table) -> np.ndarray:
    """`extent` of each frame in mm, float64 `[N]`, by which lengths are divided.

    A model sees every frame at the same size, so lengths in mm cannot be inferred from the image alone.

    Raises:
      InputError: the pixel size of a frame is unknown, or a record is damaged.
    """
    found = np.zeros(len(table))
    for row in range(len(table)):
        try:
            record = read_row(table, row)
        except DamagedRecord as error:
            path, number = table.shards.locate(int(table.index[row]))
            raise InputError(f"record number {number} of {path} is damaged: {error}; rebuild the shards") from error
        found[row] = extent((record["height"], record["width"]), record["spacing"])
    unknown = np.flatnonzero(found == 0)
    if len(unknown):
        raise InputError(
            f"config.of_frame=true needs the size of the pixels, which {len(unknown)} of {len(table)} frames do not "
            f"have, first {str(table.frame_key[unknown[0]])!r}; build the shards again, with the column spacing in "
            "--labels where files do not say it"
        )
    return found


def standardised(model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
    """`value` float32 `[B]`, in standard deviations from the mean of the training values."""
    return {"value": model(images)[:, 0].astype(jnp.float32)}
