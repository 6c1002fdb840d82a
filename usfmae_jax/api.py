"""The commands as functions, for notebooks and scripts.

    from usfmae_jax import api

    data = api.build_dataset("folder", input="images", labels="parent")
    run = api.pretrain("pretrain:tiny", data={"path": data}, workdir="runs/mine")
    results = api.finetune("finetune:folder", init=run, data={"path": data})
    features = api.embed(run, data)["features"]

A config is named as on the command line; its fields are keyword arguments, groups of fields are dicts. Repeating a call
resumes an interrupted one. Bad input raises `errors.InputError` with the message that the command would print.
"""

import contextlib
import difflib
import inspect
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

Path: TypeAlias = str | os.PathLike[str]
#: A config itself, or a value for `--config`: NAME[:variant] or FILE.py[:variant].
Config: TypeAlias = ml_collections.ConfigDict | Path
_Result = TypeVar("_Result")


def pretrain(config: Config = "pretrain:tiny", *, workdir: Path = "", **fields: Any) -> str:
    """Pretrains an encoder, as `python -m usfmae_jax.main` does.

    Args:
      config: see `configs/pretrain.py`.
      workdir: folder of the run; "" = `runs/<config>-<variant>`.
      **fields: config fields, for example `data={"path": "data/mine"}, train={"steps": 500}`.

    Returns:
      the workdir, which `load_encoder` and the `init` field of other configs accept.

    Raises:
      InputError: an argument is invalid.
      KeyboardInterrupt: the run was stopped; it has saved a checkpoint.
    """
    from usfmae_jax.pretraining import loop

    chosen, workdir = configured("pretrain", config, fields, workdir)
    _train(workdir, lambda: loop.pretrain(chosen, workdir))
    return workdir


def finetune(config: Config = "finetune:folder", *, workdir: Path = "", **fields: Any) -> dict[str, Any]:
    """Fine-tunes a model on a task and tests it, as `python -m usfmae_jax.finetune` does.

    Args:
      config: see `configs/finetune.py` and `configs/segment.py`.
      workdir: folder of the run and its report.html; "" = `runs/<config>-<variant>`.
      **fields: config fields, for example `init="runs/mine", data={"path": "data/mine"}`.

    Returns:
      the contents of results.json, see `evaluation.results`.

    Raises:
      InputError: an argument is invalid.
      KeyboardInterrupt: the run was stopped; it has saved a checkpoint.
    """
    from usfmae_jax.finetuning import loop

    chosen, workdir = configured("finetune", config, fields, workdir)
    _train(workdir, lambda: loop.finetune(chosen, workdir))
    return json.loads(pathlib.Path(workdir, "results.json").read_text(encoding="utf-8"))


def evaluate(config: Config = "evaluate:folder", *, workdir: Path = "", **fields: Any) -> dict[str, Any]:
    """Tests an encoder with a probe, or a fine-tuned model, as `python -m usfmae_jax.evaluate` does.

    Args:
      config: see `configs/evaluate.py` and `configs/suite.py`.
      workdir: folder for report.html and the other results; "" = `runs/<config>-<variant>`.
      **fields: config fields, for example `checkpoint="runs/mine", data={"path": "data/mine"}, protocol="knn"`.

    Returns:
      the contents of results.json, see `evaluation.results`; for a suite, those of suite.json.

    Raises:
      InputError: an argument is invalid.
    """
    from usfmae_jax.probing import loop, suite

    chosen, workdir = configured("evaluate", config, fields, workdir)
    run = suite.run if chosen.protocol == "suite" else loop.evaluate
    return _alone(workdir, lambda: run(chosen, workdir))


def predict(checkpoint: Path, data: Path | Sequence[Path], output: Path, **options: Any) -> list[dict[str, Any]]:
    """Predicts on files, folders or shards, as `python -m usfmae_jax.predict` does.

    Args:
      checkpoint: a fine-tuning run, or one of its members.
      data: one path or several.
      output: folder for predictions.csv and, if the model segments, masks and overlays.
      **options: keyword arguments of `usfmae_jax.predict.predict`.

    Returns:
      the rows of predictions.csv, with numbers as numbers and None for an empty one, ready for `pandas.DataFrame`.

    Raises:
      InputError: an argument is invalid.
    """
    from usfmae_jax import predict as door
    from usfmae_jax.data import cells

    options = _checked_options(door.predict, options)
    some = [data] if isinstance(data, (str, os.PathLike)) else list(data or ())
    if not some:
        raise InputError("data names no file: give a path, or a list of them")
    with _ready():
        door.predict(os.fspath(checkpoint), [os.fspath(one) for one in some], os.fspath(output), **options)
    with open(os.path.join(output, "predictions.csv"), encoding="utf-8", newline="") as lines:
        rows: list[dict[str, Any]] = [dict(row) for row in cells.read_dicts(lines)]
    return _with_numbers(rows)


def embed(checkpoint: Path, data: Path, output: Path = "", pool: str = "mean", **options: Any) -> dict[str, np.ndarray]:
    """Computes features, as `python -m usfmae_jax.embed` does.

    Args:
      checkpoint: a run, an encoder or a classifier.
      data: shards, or a folder of image files.
      output: .npz file to write; "" = none.
      pool: 'mean', 'cls' or 'patches'.
      **options: keyword arguments of `usfmae_jax.embed.embed`.

    Returns:
      the contents of the file: `features`, float32 `[N, D]` (patches: float16 `[N, T, D]`), and what each row is.

    Raises:
      InputError: an argument is invalid.
    """
    from usfmae_jax import embed as door

    checkpoint, data, output = os.fspath(checkpoint), os.fspath(data), os.fspath(output)
    if output and not output.endswith(".npz"):
        raise InputError(f"output={output!r} must end in .npz")
    if pool not in door.POOLS:
        raise InputError(f"pool={pool!r} must be 'mean', 'cls' or 'patches'")
    options = _checked_options(door.embed, options)
    with _ready(), tempfile.TemporaryDirectory() as folder:
        path = output or os.path.join(folder, "features.npz")
        door.embed(checkpoint, data, path, pool, **options)
        with np.load(path) as found:
            return dict(found)


def export(checkpoint: Path, output: Path, format: str = "safetensors") -> str:
    """Exports weights and verifies them, as `python -m usfmae_jax.export` does.

    Args:
      checkpoint: a run, an encoder or a classifier.
      output: folder to write.
      format: 'safetensors', 'timm', 'hf', 'mae', 'onnx' or 'stablehlo'.

    Returns:
      the folder, with the weights, their lineage and a model card.

    Raises:
      InputError: an argument is invalid, or the export differs from the model.
    """
    from usfmae_jax import export as door

    if format not in door.FORMATS:
        raise InputError(f"format={format!r} must be one of {', '.join(door.FORMATS)}")
    with _ready():
        door.export(os.fspath(checkpoint), os.fspath(output), form=format)
    return os.fspath(output)


def reconstruct(run: Path, images: Sequence[np.ndarray], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Reconstructs masked images with a masked autoencoder.

    Args:
      run: a pretraining run, or one of its checkpoints; or converted weights (`usfmae_jax.convert`) with a decoder.
      images: uint8 `[B, H, W, C]` or `[B, H, W]`, or a list of different sizes.
      seed: seed of the masks.

    Returns:
      `input`, `masked`, `reconstruction` and `pasted` (the input with the masked patches predicted): each uint8
      `[B, H, W, C]`, at the model's image size.

    Raises:
      InputError: there is no pixel decoder; no images, or images of another shape or dtype; or `config.json` of the run
        is invalid or does not match the checkpoint.
    """
    import jax
    from flax import nnx

    from usfmae_jax.interop import schema
    from usfmae_jax.interop.model import model_graph, open_model
    from usfmae_jax.loading import Encoder
    from usfmae_jax.pretraining import build

    run = os.fspath(run)
    model = open_model(run, whole=True)
    if model.kind != "mae":
        raise InputError(
            f"{run} has no decoder, which reconstructions need; give the workdir of a run that predicts pixels"
        )
    if model.description["decoder"].get("kind") == "latent":
        raise InputError(f"{run} was pretrained to predict features and no pixels; there is nothing to reconstruct")
    place = epath.Path(run).expanduser().resolve()  # the run, its checkpoints folder, or one checkpoint
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
    """Builds shards from files, as `python -m data_prep.build` does.

    Args:
      dataset: a name from the catalogue, such as "folder" or "phantom", or a .toml file.
      input: folder with the files.
      output: folder that holds the datasets.
      **options: options of the command line without the dashes, for example `labels="parent"`.

    Returns:
      the folder of the new dataset, for `data={"path": ...}`.

    Raises:
      InputError: an argument is invalid.
    """
    from data_prep import build as door

    given = {"dataset": dataset, "input": input, "output": output} | options
    if missing := [name for name, value in given.items() if value is None]:
        raise InputError(f"{missing[0]}=None: leave it out instead")
    said = {name: value for name, value in given.items() if value is not False and value != ""}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in said.items()]
    return str(door.build_one(door.parse(words)).parent)


def read_dataset(data: Path, split: str = "", *, colour: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the frames of shards, one at a time.

    Args:
      data: the folder of a dataset, or a glob; separate several with commas.
      split: only shards of this split, such as "train" or "test"; "" = all.
      colour: read images as RGB.

    Yields:
      for each frame `image`, uint8 `[H, W]` or, in colour, `[H, W, 3]`; `mask`, uint8 `[H, W]`, or None; `label`, the
      class name or ""; `dataset`, `patient`, `video`, `frame` and `source`.

    Raises:
      InputError: there are no such shards.
      DamagedRecord: an image cannot be decoded.
    """
    from usfmae_jax.data import records, table

    frames = table.read_table(os.fspath(data), split)
    for row in range(len(frames)):
        record = table.read_row(frames, row)
        image = records.decode_image(record["image"], 3 if colour else 1)
        yield {
            "image": image if colour else image[..., 0],
            "mask": records.decode_image(record["mask"])[..., 0] if record["mask"] else None,
            "label": str(frames.label_name[row]),
            **{name: record[name] for name in ("dataset", "patient", "video", "frame", "source")},
        }


def configured(
    door: str, config: Config, fields: Mapping[str, Any], workdir: Path
) -> tuple[ml_collections.ConfigDict, str]:
    """Returns the config with the given fields set, and the workdir.

    Raises:
      InputError: there is no such config, variant or field, a value has the wrong type, or the config is for another
        function than the one called `door`.
    """
    if isinstance(config, ml_collections.ConfigDict):
        name, chosen = "run", config.copy_and_resolve_references()
    else:
        name = os.fspath(config)
        chosen = cli.load_config(name)
    cli.check_door(chosen, name, door)
    cli.override(chosen, fields, name)
    return chosen, os.fspath(workdir) or cli.default_workdir(name)


def _with_numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of text with the numbers of whole columns as numbers, and None where such a column is empty."""
    for name in rows[0].keys() - {"file", "predicted"} if rows else ():  # a file or a class may be called 7
        number = int if name == "frame" else float
        with contextlib.suppress(ValueError):  # a column of words
            for row, value in zip(rows, [number(row[name]) if row[name] else None for row in rows], strict=True):
                row[name] = value
    return rows


def _checked_options(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options; raises InputError unless they are keywords of `function`, with values of their defaults' types."""
    found = {}
    parameters = inspect.signature(function).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    for name, value in options.items():
        if name not in known:
            near = (difflib.get_close_matches(name, known, n=1) or [""])[0]
            said = f"did you mean {near}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"there is no argument {name!r}; {said}")
        found[name] = value.item() if isinstance(value, np.generic) else value
        if type(found[name]) is not type(known[name]):
            raise InputError(f"{name}={value!r} must be of type {type(known[name]).__name__}")
    return found


@contextlib.contextmanager
def _ready() -> Iterator[None]:
    """Does what every command does first: grain's flags, without which it starts no processes, and their memory."""
    check_guard()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    os.environ.update(cli.huge_pages())  # for processes that train members; this one has started
    yield


def _alone(workdir: str, run: Callable[[], _Result]) -> _Result:
    with _ready(), cli.alone_in(workdir):
        return run()


def _train(workdir: str, loop: Callable[[], bool]) -> None:
    if not _alone(workdir, loop):
        raise KeyboardInterrupt("stopped after saving; the same call goes on")
