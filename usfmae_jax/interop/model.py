"""Trained models: one type for all of them, and functions to open and save them and to build their networks.

Layout of an encoder or classifier directory:
  model.safetensors     float32 parameters; blocks stacked along their first axis; running statistics under `stats.`
  architecture.json     format, and for an encoder the arguments of `ViT`, else the description: model "vit" (with
                        encoder: arguments of `ViT`, and pool or head), "resnet50" (with resnet: arguments of
                        `ResNet`) or "unet" (with unet: arguments of `UNet`), and the names of the outputs, in order
  preprocessing.json    how pixels become the model's input
  lineage.json          origin of the weights: one entry for each job that trained them, oldest first
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx

from usfmae_jax import files
from usfmae_jax.errors import InputError
from usfmae_jax.interop import schema
from usfmae_jax.interop.checkpoint import holds_checkpoints, load_parameters
from usfmae_jax.interop.files import from_array, write_safetensors
from usfmae_jax.interop.names import stored_table
from usfmae_jax.models.decoders import Segmenter, UNet
from usfmae_jax.models.heads import Classifier
from usfmae_jax.models.mae import MAE, CrossMAE
from usfmae_jax.models.queries import MaskTransformer
from usfmae_jax.models.resnet import ResNet
from usfmae_jax.models.vit import ViT
from usfmae_jax.weights import find

#: Incremented when older readers can no longer use what is written.
FORMAT = 1

_STATS = "stats."
#: Kinds of models with a head; also the names of their directories.
_WITH_HEAD = ("classifier", "model")

#: One entry for each job that trained the weights, oldest first: `job`, `code`, `step`, `config` and `data`
#: (see `data.provenance.describe_data`).
Lineage = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model: its parameters, architecture, preprocessing and origin.

    Attributes:
      params: nested dict of float32 numpy arrays; for a vision transformer under `encoder`, plus `decoder`, or `head`
        and `head_norm`, or other parts of its objective; for other networks under their own names.
      description: JSON from which `build` makes the network. One of
        `{"model": "vit", "encoder": arguments of ViT}`,
        `{"model": "resnet50", "resnet": arguments of ResNet, "classes": names}` and
        `{"model": "unet", "unet": arguments of UNet, "outputs": names}`.
        A ViT may also have a `decoder` (`decoder_width`, `decoder_depth`, `decoder_num_heads`; `kind` "cross" for a
        `CrossMAE`; `kind` "latent" and their number, `outputs`, if it predicts features), or a head: `pool` and the
        names of its outputs, `classes` (`outputs` for tasks other than classification). For pixels there is `head`
        instead of `pool`, with its `kind` and `width`, see `Segmenter`, and for the kind "queries" also `queries` and
        `blocks`, see `MaskTransformer`. `task` is given unless it is classification. For regression, `scale` holds for
        each output the `mean` and `deviation` that convert it from its standardised value, its `unit`, and `of_frame`:
        whether the result is to be multiplied by the side, in mm, of a square with the area of the frame.
      preprocessing: see `preprocessing`.
      lineage: stages, oldest first.
      stats: nested dict of running statistics (ResNet).
    """

    params: dict[str, Any]
    description: dict[str, Any]
    preprocessing: dict[str, Any]
    lineage: Lineage
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """'encoder', 'mae' (an encoder with its decoder), 'classifier', or 'model' (with a head for another task)."""
        if _has_head(self.description):
            return "model" if "outputs" in self.description else "classifier"
        return "mae" if "decoder" in self.description else "encoder"

    @property
    def task(self) -> str:
        """The task of a model with a head; "" if it is not stated, and for models without a head."""
        stated = self.description.get("task", "") if _has_head(self.description) else ""
        return stated or ("classification" if self.kind == "classifier" else "")

    @property
    def segments(self) -> bool:
        """Whether the model predicts the class of each pixel, see `Segmenter` and `UNet`."""
        return self.kind == "model" and self.task == "segmentation"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of parameter names, shapes and values, description and preprocessing: 12 hex digits."""
        params = self.params["encoder"] if self.kind == "encoder" else self.params
        # For a third-party ResNet without known classes, only the values are certain.
        known = self.description["model"] == "vit" or "classes" in self.description
        return _fingerprint(params, self.stats, (self.description, self.preprocessing) if known else ())

    def encoder(self) -> "Model":
        """The vision transformer alone, without head and decoder.

        Raises:
          InputError: the model is not a vision transformer.
        """
        if self.description["model"] != "vit":
            raise InputError(f"these weights are of a {self.description['model']}, not of a vision transformer")
        description = {name: self.description[name] for name in ("model", "encoder")}
        return Model({"encoder": self.params["encoder"]}, description, self.preprocessing, self.lineage)

    @property
    def image_format(self) -> tuple[tuple[int, int], int]:
        """(height, width) and channels of the decoded images that the model takes."""
        height, width = self.preprocessing["image_size"]
        return (int(height), int(width)), int(self.preprocessing["channels"])

    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in the images that the model is used on."""
        (height, width), _ = self.image_format
        patch = self.description["encoder"]["patch_size"]
        return height // patch, width // patch

    def table_grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of the model's own position table."""
        (height, width), patch = (self.description["encoder"][name] for name in ("image_size", "patch_size"))
        return height // patch, width // patch

    def stored_positions(self) -> np.ndarray:
        """The position table for `grid()` as stored in files: float32 `[1, 1 + N, width]`, see `stored_table`."""
        width, learned = self.description["encoder"]["width"], self.params["encoder"].get("position")
        return stored_table(self.table_grid(), self.grid(), width, learned)


def preprocessing(
    image_size: Sequence[int], channels: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """How pixels become a model's input, JSON.

    Args:
      image_size: (height, width) that images are resized to.
      channels: of decoded images; grey images are repeated for a model with three channels.
      mean: for normalisation, one number per channel of the model, for pixels in [0, 1].
      std: likewise.
    """
    return {
        "image_size": list(image_size),
        "channels": channels,
        "resize": "area, aspect not kept",
        "scale": 1 / 255,
        "mean": list(mean),
        "std": list(std),
    }


def build(
    description: Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
    drop_path: float = 0.0,
    freeze: int = 0,
    **computation: Any,
) -> Callable[[nnx.Rngs], nnx.Module]:
    """A function that makes the described network, one of those in `usfmae_jax.models`, from `nnx.Rngs`.

    Args:
      description: see `Model`.
      dtype: compute dtype.
      drop_path: maximum stochastic depth rate, for a ViT with a head; a ResNet has none.
      freeze: number of leading blocks (for a ResNet: of its four stages) that are not trained, for models with a head.
      **computation: `attention`, `scan`, `remat` and `lora` of `ViT`; ignored for other networks.
    """
    outputs = len(output_names(description))
    if description["model"] == "unet":
        return lambda rngs: UNet(num_classes=1 + outputs, dtype=dtype, **description["unet"], rngs=rngs)
    if description["model"] == "resnet50":
        resnet = description["resnet"]
        return lambda rngs: ResNet(num_classes=outputs, freeze=freeze, dtype=dtype, **resnet, rngs=rngs)
    encoder = dict(description["encoder"]) | {"dtype": dtype} | computation
    encoder["image_size"] = tuple(encoder["image_size"])
    head = description.get("head")
    if head and head["kind"] == "queries":
        shape = {"decoder_width": head["width"], "queries": head["queries"], "blocks": head["blocks"]}
        return lambda rngs: MaskTransformer(
            num_classes=1 + outputs, **shape, drop_path=drop_path, freeze=freeze, rngs=rngs, **encoder
        )
    if head:
        shape = {"kind": head["kind"], "num_classes": 1 + outputs, "decoder_width": head.get("width", 0)}
        return lambda rngs: Segmenter(**shape, drop_path=drop_path, freeze=freeze, rngs=rngs, **encoder)
    if _has_head(description):
        pool = description["pool"]
        return lambda rngs: Classifier(
            num_classes=outputs, pool=pool, drop_path=drop_path, freeze=freeze, rngs=rngs, **encoder
        )
    if "decoder" in description:
        decoder = dict(description["decoder"])
        network: Any = CrossMAE if decoder.pop("kind", "") == "cross" else MAE
        return lambda rngs: network(rngs=rngs, **encoder, **decoder)
    return lambda rngs: ViT(rngs=rngs, **encoder)


def output_names(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a model's outputs: its classes, for pixels without the background; () for an encoder."""
    return tuple(description.get("classes") or description.get("outputs", ()))


def model_graph(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """The static part of a network: `nnx.merge(model_graph(make), params)` is the network (with `stats` if any).

    The parameters of a bare `ViT` are those under `encoder` in `Model.params`; those of all others are `Model.params`.
    """
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def open_model(path: str, step: int | None = None, *, whole: bool = False) -> Model:
    """Reads a model.

    Args:
      path: a pretraining workdir (its `encoder/`, else its newest checkpoint), its `checkpoints/` or one checkpoint
        there; an encoder or classifier directory, or the output of `usfmae_jax.convert`; a member of a fine-tuning run,
        or a run with a single member; or the name of weights included in the package, see `usfmae_jax.weights`.
      step: of a run's checkpoints; None = `encoder/` if there is one, else the newest.
      whole: include the decoder if there is one, by preferring the checkpoint in a workdir to `encoder/`.

    Raises:
      InputError: nothing there, or it cannot be read.
    """
    path = find(os.fspath(path))
    try:
        root = epath.Path(path)
        root = root if "://" in path else root.expanduser().resolve()
        there = bool(path) and root.is_dir()
    except (KeyError, ValueError, ImportError) as error:  # a kind of address that is unknown or needs a package
        raise InputError(f"checkpoint {path!r} cannot be opened: {error}") from error
    if not there:
        raise InputError(
            f"checkpoint {path!r} is no folder; give the workdir of a run, one of its checkpoints, or a directory "
            "with an encoder or a classifier"
        )
    if step is None and not (whole and is_pretraining(path)):
        # for a classifier, convert writes both
        for directory in (root, *(root / kind for kind in _WITH_HEAD), root / "encoder"):
            if (directory / "architecture.json").exists():
                return _from_directory(os.fspath(directory))
    found = members(path)
    if len(found) == 1 and found[0] != os.fspath(root):
        return open_model(found[0], step, whole=whole)
    if found:
        raise InputError(
            f"{path} holds {len(found)} trained models; choose one of them, such as "
            f"{os.path.join(path, 'members', os.path.basename(found[0]))}"
        )
    for directory in (root / "checkpoints", root):
        if holds_checkpoints(directory):
            return _from_checkpoint(directory, step, whole)
    if root.name.isdigit() and step is None:
        return _from_checkpoint(root.parent, int(root.name), whole)
    if any((root / name).exists() for name in ("results.json", "suite.json")):
        raise InputError(
            f"{path} is an evaluation, which keeps no model; give a fine-tuning run (one with --config.mode=frozen is "
            "a probe that is kept), or the encoder that it tested"
        )
    if (root / "config.json").exists():
        raise InputError(f"{path} is a run without a finished model; the command that began it goes on with it")
    raise InputError(f"{path} holds no encoder, no classifier and no finished checkpoint")


def is_pretraining(path: str) -> bool:
    """Whether a folder is the workdir of a pretraining run, or output of `usfmae_jax.convert` without a head."""
    root = epath.Path(path)
    return (root / "checkpoints").is_dir() and (root / "config.json").exists()


def members(path: str) -> list[str]:
    """Folders of the trained members of a fine-tuning run, in order; [] if `path` is not one.

    A member counts as trained if it has a `classifier/`, or a `model/` for other tasks.
    """
    folder = epath.Path(path) / "members"
    if not folder.is_dir():
        return []
    return sorted(
        os.fspath(child)
        for child in folder.iterdir()
        if any((child / kind / "architecture.json").exists() for kind in _WITH_HEAD)
    )


def save_model(directory: str, model: Model) -> None:
    """Writes an encoder directory, or for a model with a head a classifier directory; a decoder is left out.

    `model.safetensors` is renamed into place last, so that no reader sees an incomplete one.

    Args:
      directory: local or `gs://`; created if absent.
      model: its lineage is also stored in the safetensors metadata, which stays with the weights.
    """
    if _has_head(model.description):
        params, about = model.params, model.description
    else:
        params, about = model.params["encoder"], model.description["encoder"]
    flat = flatten(params) | {_STATS + name: value for name, value in flatten(model.stats).items()}
    root = epath.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    files.write(root / "architecture.json", json.dumps({"format": FORMAT, **about}, indent=2) + "\n")
    files.write(root / "preprocessing.json", json.dumps(model.preprocessing, indent=2) + "\n")
    write_lineage(directory, model.lineage)
    tensors = {name: from_array(np.asarray(value, np.float32)) for name, value in flat.items()}
    write_safetensors(root / "model.safetensors", tensors, {"lineage": json.dumps(model.lineage)})


def write_lineage(directory: str, lineage: Lineage) -> None:
    """Writes `lineage.json` to an encoder directory or a workdir."""
    files.write(epath.Path(directory) / "lineage.json", json.dumps({"stages": lineage}, indent=2) + "\n")


def read_lineage(directory: str) -> Lineage:
    """The stages in `lineage.json` of an encoder directory or a workdir; [] if there is no readable one.

    Raises:
      InputError: its contents are not a valid lineage.
    """
    try:
        stages = list(files.parse((epath.Path(directory) / "lineage.json").read_bytes())["stages"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    schema.check_lineage(stages)
    return stages


def flatten(params: Any) -> dict[str, Any]:
    """Nested dict to `{"a.b.c": leaf}`."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    params: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params


def _has_head(description: Mapping[str, Any]) -> bool:
    return "pool" in description or "head" in description or description["model"] != "vit"


def _fingerprint(params: Any, stats: Any, about: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode() if about else b"")
    for prefix, tree in (("", params), (_STATS, stats)):
        for name, leaf in sorted(flatten(tree).items()):
            value = np.ascontiguousarray(leaf, np.float32)
            digest.update(f"{prefix}{name}{value.shape}".encode())
            digest.update(value.data)
    return digest.hexdigest()[:12]


def _from_directory(directory: str) -> Model:
    root, what = epath.Path(directory), "an encoder"
    try:
        about = files.parse((root / "architecture.json").read_bytes())
        what = "a classifier" if "model" in about or "classes" in about else what
        pixels = files.parse((root / "preprocessing.json").read_bytes())
        flat = safetensors.numpy.load((root / "model.safetensors").read_bytes())
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{directory} is not {what} directory: {error}") from error
    except KeyError as error:  # NumPy has no such type
        raise InputError(
            f"{directory}/model.safetensors holds numbers of type {error.args[0]}, which only usfmae_jax.convert reads"
        ) from error
    if not isinstance(about, dict):
        raise InputError(f"{directory} is not {what} directory: architecture.json is no object")
    if about.pop("format", None) != FORMAT:
        raise InputError(f"{directory} has another {what.split()[1]} format than {FORMAT}; update usfmae_jax")
    if what == "an encoder":
        about, flat = {"model": "vit", "encoder": about}, {f"encoder.{name}": value for name, value in flat.items()}
    if about.get("model") not in ("vit", "resnet50", "unet"):
        raise InputError(f"{directory} holds no classifier but other weights, such as an encoder's")
    try:
        schema.check_description(about)
        schema.check_preprocessing(pixels, about)
        schema.check_shapes(_described(about, _shapes(about)), _described(about, flat))
        flat = schema.as_float32(flat)
        lineage = read_lineage(directory)
    except InputError as error:
        raise InputError(f"{directory} cannot be used: {error}") from error
    stats = {name.removeprefix(_STATS): flat.pop(name) for name in list(flat) if name.startswith(_STATS)}
    return Model(unflatten(flat), about, pixels, lineage, unflatten(stats))


def _shapes(about: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the described model; nothing is allocated."""
    network = nnx.eval_shape(lambda: build(about)(nnx.Rngs(0)))
    kinds = {"" if _has_head(about) or "decoder" in about else "encoder.": nnx.Param, _STATS: nnx.BatchStat}
    states = {prefix: flatten(nnx.to_pure_dict(nnx.state(network, kind))) for prefix, kind in kinds.items()}
    return {prefix + name: tuple(leaf.shape) for prefix, state in states.items() for name, leaf in state.items()}


def _described(about: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that the description determines: all but the head of a third-party task."""
    ours = "outputs" not in about or "task" in about
    return {name: one for name, one in tensors.items() if ours or name.startswith("encoder.")}


def _from_checkpoint(directory: epath.Path, step: int | None, whole: bool) -> Model:
    """The model in a checkpoint of a pretraining run."""
    found: dict[str, Any] = {}
    params, _, step = load_parameters(
        os.fspath(directory), step, lambda said, stored: found.update(_checked_about(said, stored))
    )
    try:
        params = unflatten(schema.as_float32({name: np.asarray(one) for name, one in flatten(params).items()}))
        lineage = read_lineage(os.fspath(directory.parent))
    except InputError as error:
        raise InputError(f"checkpoint {step} in {directory} cannot be used: {error}") from error
    lineage[-1:] = [stage | {"step": step} for stage in lineage[-1:]]
    model = Model(params, found["description"], found["preprocessing"], lineage)
    return model if whole else model.encoder()


def _checked_about(said: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The description and preprocessing stored in a checkpoint of a pretraining run, checked.

    Raises:
      InputError: it is of another kind of run, its description is invalid, or its arrays do not match the description.
    """
    try:
        about = said.get("about") or _about_0_1(said["config"], stored)
        about = {name: about[name] for name in ("description", "preprocessing")}
        if _has_head(about["description"]):
            raise KeyError("pool")
    except KeyError as error:
        raise InputError("is not of a pretraining run; finish the run to get its classifier/") from error
    except (TypeError, AttributeError) as error:
        raise InputError("cannot be used: what it says of itself is not what a run writes") from error
    description = about["description"]
    try:
        schema.check_description(description, "its description", decoder=True)
        schema.check_preprocessing(about["preprocessing"], description, "its preprocessing")
        arrays, groups = flatten(stored), ("encoder", *["decoder"] * ("decoder" in description))
        described = {name: one for name, one in arrays.items() if name.partition(".")[0] in groups}
        schema.check_shapes(_shapes(description), described, "it", "its description")
        sizes = [sum(math.prod(one.shape) for one in group.values()) for group in (arrays, described)]
        if sizes[0] > 2 * sizes[1]:  # a custom objective may have parts that are not in the description
            raise InputError("it holds more than twice what its description says")
    except InputError as error:
        raise InputError(f"cannot be used: {error}") from error
    return about


def _about_0_1(config: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Description and preprocessing of a checkpoint of version 0.1, which stored only the config of its run.

    Raises:
      KeyError: it is not of a pretraining run.
      TypeError, AttributeError: the config is invalid.
    """
    if "head" in params:
        raise KeyError("head")
    model = config["model"]
    size = (list(model["image_size"]) * 2)[:2]
    names = ("patch_size", "channels", "width", "depth", "num_heads", "mlp_ratio")
    encoder = {"image_size": size} | {name: model[name] for name in names}
    encoder |= {name: model[name] for name in ("learned_positions", "norm_eps") if model.get(name)}  # from convert
    description = {"model": "vit", "encoder": encoder}
    if "decoder" in params:
        decoder = ("decoder_width", "decoder_depth", "decoder_num_heads")
        description["decoder"] = {name: model[name] for name in decoder}
    pixels = config.get("preprocessing")  # from convert
    pixels = pixels or preprocessing(size, config["data"]["channels"], model["mean"], model["std"])
    return {"description": description, "preprocessing": pixels}
