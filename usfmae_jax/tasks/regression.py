"""Regression: a number of each frame, in its unit."""

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
_BINS = (4, 3, 2)  # strata, where each has so many patients
_LEAST = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Regression(Task):
    """How a quantity is learnt: the model predicts it standardised, as `fitted` finds it in the training part.

    Attributes:
      name: of the quantity.
      unit: of it; "" = none.
      values: float64 `[N]`, of the rows of the table.
      extent: float64 `[N]`, what it is a multiple of: of a length, the side of the frame, see `extents`; else ones.
      pool: "mean" or "cls", of a vision transformer's tokens.
      kind: of the loss, "smooth_l1" (Girshick 2015) or "mse".
      mean: that of `values / extent` in the training part.
      deviation: likewise.
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
        """The quantity."""
        return (self.name,)

    def strata(self, table: Table) -> Strata:
        """Bins of equally many frames from the smallest values to the largest, as many as have ten patients each."""
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
        """The range."""
        low, high = self.values.min(), self.values.max()
        return f"{self.name} from {low:.4g} to {high:.4g} {self.unit}".strip()

    def fitted(self, table: Table, rows: np.ndarray) -> "Regression":
        """With mean and deviation of the training rows."""
        found = self.values[rows] / self.extent[rows]
        mean, deviation = float(found.mean()), float(found.std())
        # Of equal values there is nothing to learn but the value.
        return dataclasses.replace(self, mean=mean, deviation=deviation if deviation > 1e-9 * abs(mean) else 1.0)

    def describe(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """A linear head for the standardised number, and what gives it its unit."""
        pool = {"pool": self.pool} if backbone["model"] == "vit" else {}
        scale = {"mean": [self.mean], "deviation": [self.deviation], "unit": [self.unit]}
        scale["of_frame"] = [bool((self.extent != 1).any())]
        return {**backbone, **pool, "task": "regression", "outputs": [self.name], "scale": scale}

    def targets(self, table: Table, rows: np.ndarray) -> Arrays:
        """`value` float32 `[R]`, standardised."""
        return {"value": ((self.values[rows] / self.extent[rows] - self.mean) / self.deviation).astype(np.float32)}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum over images, and their number."""
        error = model(batch["image"], rng=rng, train=True)[:, 0] - batch["value"]
        each = optax.huber_loss(error) if self.kind == "smooth_l1" else jnp.square(error)
        return each.sum(), jnp.float32(len(each))

    def predict(self, model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
        """See `standardised`."""
        return standardised(model, images)

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
        """As measured and as predicted."""
        return QuantityPredictions(**ids, truth=self.values[rows], value=predicted["value"])

    def examples(
        self, table: Table, tested: Sequence[tuple[np.ndarray, Predictions]], count: int
    ) -> list[dict[str, Any]]:
        """Those frames that are farthest off, and those that are nearest, half of `count` each."""
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
        """The results for a terminal."""
        return tables.overview(results, scoring.titles(self.unit), "mae")


def of_table(table: Table, targets: Targets, of_frame: bool, **how: Any) -> tuple[Table, Regression]:
    """The frames that have a number, and the task that it is.

    Args:
      table: of the frames.
      targets: of one column.
      of_frame: see `extents`.
      **how: fields of `Regression`.

    Raises:
      InputError: there are several columns, no frame has a number, or the size of a frame's pixels is not known.
    """
    if len(targets.names) != 1:
        raise InputError(f"config.target must name one of the columns {', '.join(map(repr, targets.names))}")
    table, targets = known(table, targets)
    ((name,), (unit,)) = targets.names, targets.units
    extent = extents(table) if of_frame else np.ones(len(table))
    about: dict[str, Any] = {"fingerprint": targets.fingerprint, "notes": targets.notes}
    return table, Regression(name, unit, targets.values[:, 0], extent, **about, **how)


def extent(size: tuple[int, int], spacing: Sequence[float]) -> float:
    """The side of a square as large as a frame of (height, width) pixels, in mm; 0 where their size is not known."""
    return float(np.sqrt(np.prod(spacing) * size[0] * size[1]))


def extents(table: Table) -> np.ndarray:
    """The side of a square as large as each frame, in mm, float64 `[N]`: what lengths in a frame are a share of.

    A model sees every frame in one size: without it, no length in mm can be told from a picture.

    Raises:
      InputError: the size of a frame's pixels is not known, or a record is damaged.
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
    """`value` float32 `[B]`, as a multiple of the deviation above the mean of what was learnt."""
    return {"value": model(images)[:, 0].astype(jnp.float32)}
