"""What the doors do, as functions: for notebooks and scripts.

    from usfmae_jax import api

    data = api.build_dataset("folder", input="images", labels="parent")
    run = api.pretrain("pretrain:tiny", data={"path": data}, workdir="runs/mine")
    results = api.finetune("finetune:folder", init=run, data={"path": data})
    features = api.embed(run, data)["features"]

A config is named as on the command line and its fields are keywords, groups of them dicts. The same call goes on where
an earlier one was interrupted. Mistakes are `errors.InputError`, with the sentence that a door would print.
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import ml_collections
import numpy as np
from absl import flags
from etils import epath

from usfmae_jax import cli
from usfmae_jax.errors import InputError, check_guard
from usfmae_jax.loading import load_encoder as load_encoder

#: A config itself, or what `--config` of a door takes: NAME[:variant] or FILE.py[:variant].
Config: TypeAlias = ml_collections.ConfigDict | str
_Result = TypeVar("_Result")


def pretrain(config: Config = "pretrain:tiny", *, workdir: str = "", **fields: Any) -> str:
    """Pretrains an encoder, as `python -m usfmae_jax.main` does.

    Args:
      config: see `configs/pretrain.py`.
      workdir: where the run lives; "" = `runs/<config>-<variant>`.
      **fields: of the config, for example `data={"path": "data/mine"}, train={"steps": 500}`.

    Returns:
      the workdir; `load_encoder` and `init` of the others take it.

    Raises:
      InputError: something given cannot be used.
      KeyboardInterrupt: it was stopped, after it had saved.
    """
    from usfmae_jax.pretraining import loop

    chosen, workdir = configured(config, fields, workdir)
    _train(workdir, lambda: loop.pretrain(chosen, workdir))
    return workdir


def finetune(config: Config = "finetune:folder", *, workdir: str = "", **fields: Any) -> dict[str, Any]:
    """Teaches a task and tests it, as `python -m usfmae_jax.finetune` does.

    Args:
      config: see `configs/finetune.py` and `configs/segment.py`.
      workdir: where the run lives, with report.html; "" = `runs/<config>-<variant>`.
      **fields: of the config, for example `init="runs/mine", data={"path": "data/mine"}`.

    Returns:
      what results.json holds, see `evaluation.results`.

    Raises:
      InputError: something given cannot be used.
      KeyboardInterrupt: it was stopped, after it had saved.
    """
    from usfmae_jax.finetuning import loop

    chosen, workdir = configured(config, fields, workdir)
    _train(workdir, lambda: loop.finetune(chosen, workdir))
    return json.loads(pathlib.Path(workdir, "results.json").read_text(encoding="utf-8"))


def evaluate(config: Config = "evaluate:folder", *, workdir: str = "", **fields: Any) -> dict[str, Any]:
    """Tests an encoder under a probe, or a fine-tuned classifier, as `python -m usfmae_jax.evaluate` does.

    Args:
      config: see `configs/evaluate.py` and `configs/suite.py`.
      workdir: receives report.html and the rest; "" = `runs/<config>-<variant>`.
      **fields: of the config, for example `checkpoint="runs/mine", data={"path": "data/mine"}, protocol="knn"`.

    Returns:
      what results.json holds, see `evaluation.results`; of a suite suite.json.

    Raises:
      InputError: something given cannot be used.
    """
    from usfmae_jax.probing import loop, suite

    chosen, workdir = configured(config, fields, workdir)
    run = suite.run if chosen.protocol == "suite" else loop.evaluate
    return _alone(workdir, lambda: run(chosen, workdir))


def predict(checkpoint: str, data: str | Sequence[str], output: str, **options: Any) -> list[dict[str, str]]:
    """Predicts files, folders or shards, as `python -m usfmae_jax.predict` does.

    Args:
      checkpoint: a fine-tuning run, or one of its members.
      data: one or several.
      output: folder; receives predictions.csv, and masks and overlays where there are some.
      **options: those of `usfmae_jax.predict.predict`.

    Returns:
      the rows of predictions.csv; `pandas.DataFrame` takes them.

    Raises:
      InputError: something given cannot be used.
    """
    from usfmae_jax import predict as door
    from usfmae_jax.data import cells

    with _ready():
        door.predict(checkpoint, [data] if isinstance(data, str) else list(data), output, **options)
    with open(os.path.join(output, "predictions.csv"), encoding="utf-8", newline="") as lines:
        return [dict(row) for row in cells.read_dicts(lines)]


def embed(checkpoint: str, data: str, output: str = "", pool: str = "mean", **options: Any) -> dict[str, np.ndarray]:
    """Computes features, as `python -m usfmae_jax.embed` does.

    Args:
      checkpoint: a run, an encoder or a classifier.
      data: shards, or a folder of picture files.
      output: .npz that keeps them; "" = none.
      pool: 'mean', 'cls' or 'patches'.
      **options: those of `usfmae_jax.embed.embed`.

    Returns:
      what the file holds: `features`, float32 `[N, D]` (of patches float16 `[N, T, D]`), and who the rows are.

    Raises:
      InputError: something given cannot be used.
    """
    from usfmae_jax import embed as door

    if output and not output.endswith(".npz"):
        raise InputError(f"output={output!r} must end in .npz")
    if pool not in door.POOLS:
        raise InputError(f"pool={pool!r} must be 'mean', 'cls' or 'patches'")
    with _ready(), tempfile.TemporaryDirectory() as folder:
        path = output or os.path.join(folder, "features.npz")
        door.embed(checkpoint, data, path, pool, **options)
        with np.load(path) as found:
            return dict(found)


def export(checkpoint: str, output: str, format: str = "safetensors") -> str:
    """Writes weights for others to use and checks them, as `python -m usfmae_jax.export` does.

    Args:
      checkpoint: a run, an encoder or a classifier.
      output: folder.
      format: 'safetensors', 'timm', 'hf', 'mae', 'onnx' or 'stablehlo'.

    Returns:
      the folder, with the weights, their lineage and a model card.

    Raises:
      InputError: something given cannot be used, or the export differs from the model.
    """
    from usfmae_jax import export as door

    if format not in door.FORMATS:
        raise InputError(f"format={format!r} must be one of {', '.join(door.FORMATS)}")
    with _ready():
        door.export(checkpoint, output, form=format)
    return output


def reconstruct(run: str, images: Sequence[np.ndarray], *, seed: int = 0) -> dict[str, np.ndarray]:
    """What a masked autoencoder makes of images of which it sees a part.

    Args:
      run: a pretraining run, or one of its checkpoints; or what `usfmae_jax.convert` wrote of weights with a decoder.
      images: uint8 `[B, H, W, C]` or `[B, H, W]`, or a list of different sizes.
      seed: of the masks.

    Returns:
      `input`, `masked`, `reconstruction` and `pasted`, the prediction where it was masked: each uint8 `[B, H, W, C]`,
      in the size of the model.

    Raises:
      InputError: there is no decoder of pixels, or no images, or images of another kind; or `config.json` of the run
        says what none can be, or something else than the checkpoint.
    """
    import jax
    from flax import nnx

    from usfmae_jax.interop import schema
    from usfmae_jax.interop.model import model_graph, open_model
    from usfmae_jax.loading import Encoder
    from usfmae_jax.pretraining import build

    model = open_model(run, whole=True)
    if model.kind != "mae":
        raise InputError(f"{run} has no decoder, which reconstructions need; give the workdir of a pretraining run")
    if model.description["decoder"].get("kind") == "latent":
        raise InputError(f"{run} was pretrained to predict features and no pixels; there is nothing to reconstruct")
    place = epath.Path(run).expanduser().resolve()  # or its checkpoints, or one of them
    places = [one / "config.json" for one in (place, *list(place.parents)[:2])]
    found = next((one for one in places if one.exists()), None)
    if found is None:
        raise InputError(f"{run} has no config.json, which says how patches are hidden")
    settings = cli.load_config("pretrain").to_dict()
    stored = schema.read_run(found, model.description, model.preprocessing)
    settings |= {name: settings[name] | stored[name] for name in ("model", "mask", "loss")}
    settings["objective"] = stored["objective"]
    objective = build.objective(ml_collections.ConfigDict(settings))
    graph, encoder = model_graph(objective.make), Encoder(model.encoder())
    prepared = encoder.batch(images)
    draw = jax.jit(lambda params, images: objective.pictures(nnx.merge(graph, params), images, jax.random.key(seed)))
    drawn = draw(model.params, prepared)
    return {name: np.asarray(drawn[name]) for name in ("input", "masked", "reconstruction", "pasted")}


def build_dataset(dataset: str, input: str = "", output: str = "data", **options: Any) -> str:
    """Makes shards of files, as `python -m data_prep.build` does.

    Args:
      dataset: a name of the catalogue, such as "folder" or "phantom", or a .toml file.
      input: folder with the files.
      output: folder of datasets.
      **options: those of the command line, without dashes, for example `labels="parent"`.

    Returns:
      the folder of the dataset, for `data={"path": ...}`.

    Raises:
      InputError: something given cannot be used.
    """
    from data_prep import build as door

    given = {"dataset": dataset, "input": input, "output": output} | options
    said = {name: value for name, value in given.items() if value is not False and value != ""}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in said.items()]
    return str(door.build_one(door.parse(words)).parent)


def read_dataset(data: str, split: str = "", *, colour: bool = False) -> Iterator[dict[str, Any]]:
    """The frames of shards, one after the other.

    Args:
      data: the folder of a dataset, a glob; several separated by commas.
      split: only shards of this split, such as "train" or "test"; "" = all.
      colour: images are read as RGB.

    Yields:
      of each frame `image`, uint8 `[H, W]` or, in colour, `[H, W, 3]`; `mask`, uint8 `[H, W]`, or None; `label`, by its
      name, or ""; `dataset`, `patient`, `video`, `frame` and `source`.

    Raises:
      InputError: there are no such shards.
      DamagedRecord: an image cannot be decoded.
    """
    from usfmae_jax.data import records, table

    frames = table.read_table(data, split)
    for row in range(len(frames)):
        record = table.read_row(frames, row)
        image = records.decode_image(record["image"], 3 if colour else 1)
        yield {
            "image": image if colour else image[..., 0],
            "mask": records.decode_image(record["mask"])[..., 0] if record["mask"] else None,
            "label": str(frames.label_name[row]),
            **{name: record[name] for name in ("dataset", "patient", "video", "frame", "source")},
        }


def configured(config: Config, fields: Mapping[str, Any], workdir: str) -> tuple[ml_collections.ConfigDict, str]:
    """The config with its fields, and the workdir.

    Raises:
      InputError: there is no such config, variant or field, or a value has another type.
    """
    if isinstance(config, ml_collections.ConfigDict):
        name, chosen = "run", config.copy_and_resolve_references()
    else:
        name, chosen = config, cli.load_config(config)
    cli.override(chosen, fields, name)
    return chosen, workdir or cli.default_workdir(name)


@contextlib.contextmanager
def _ready() -> Iterator[None]:
    """What a door does before its work: the memory, and grain's flags, without which it starts no processes."""
    from usfmae_jax.training import mesh

    check_guard()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    mesh.keep_memory()
    yield


def _alone(workdir: str, run: Callable[[], _Result]) -> _Result:
    with _ready(), cli.alone_in(workdir):
        return run()


def _train(workdir: str, loop: Callable[[], bool]) -> None:
    if not _alone(workdir, loop):
        raise KeyboardInterrupt("stopped after saving; the same call goes on")
