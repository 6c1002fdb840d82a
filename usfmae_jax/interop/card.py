"""The model card of an export, a `README.md` for the Hugging Face Hub, and the licences stated in a lineage."""

import html
import os
import pathlib
import re
from typing import Any

import jinja2

from usfmae_jax.errors import visible
from usfmae_jax.interop.model import Lineage, Model

_LIBRARY = {
    "safetensors": "jax", "timm": "timm", "hf": "transformers", "mae": "pytorch", "onnx": "onnx", "stablehlo": "jax"
}  # fmt: skip

#: File name patterns of well-known published weights, with the training stage behind them.
_PUBLISHED = (
    (
        r"(mae_(pretrain|finetuned|finetune)_vit_|vit-mae-)(base|large|huge)",
        {
            "job": "mae",
            "code": "published by the authors of MAE (He et al. 2022)",
            "licence": "CC BY-NC 4.0",
            "data": [
                {"dataset": "imagenet-1k", "licence": "research and education only", "citation": "Deng et al. 2009"}
            ],
        },
    ),
)


def published_stage(name: str) -> dict[str, Any] | None:
    """The training stage behind weights published under this file or folder name; None if unknown."""
    return next((dict(stage) for pattern, stage in _PUBLISHED if re.search(pattern, name, re.IGNORECASE)), None)


def licences(lineage: Lineage) -> list[tuple[str, str]]:
    """(what, licence) of all ancestors' weights and all training data, without duplicates; "" = not stated."""
    found: dict[tuple[str, str], None] = {}
    for stage in lineage:
        if "licence" in stage:
            found[f"weights of the job '{stage.get('job', 'unknown')}'", str(stage["licence"])] = None
        for data in stage.get("data", ()):
            found[f"data: {data.get('dataset', 'unnamed')}", str(data.get("licence", ""))] = None
    return list(found)


def citations(lineage: Lineage) -> list[tuple[str, str]]:
    """(dataset, citation) of all training data that have one, without duplicates; most licences require citation."""
    found = [
        (str(data.get("dataset", "unnamed")), str(data["citation"]))
        for stage in lineage
        for data in stage.get("data", ())
        if data.get("citation")
    ]
    return list(dict.fromkeys(found))


def non_commercial(lineage: Lineage) -> bool:
    """Whether any ancestor's weights or data are restricted to non-commercial use, which derived models inherit."""
    return any(
        re.search(r"\bNC\b|non-?commercial|research (and education )?only", licence, re.IGNORECASE)
        for _, licence in licences(lineage)
    )


def write_card(model: Model, form: str, directory: str, export: dict[str, Any]) -> None:
    """Writes `README.md`: what the model is, how to load it, what it was trained on, and under which licences.

    Args:
      model: the exported model.
      form: the export format.
      directory: of the export.
      export: contents of `export.json`.
    """
    description, has_head = model.description, model.kind in ("classifier", "model")
    outputs = "class_token, mean_patch, patch_grid"
    if has_head:
        chances = model.kind == "classifier" or model.task == "multilabel"
        outputs = "probabilities" if chances else "outputs"
        outputs = "classes [B, H, W] and probabilities [B, H, W, 1 + C] of the pixels" if model.segments else outputs
        if model.task == "instances":
            outputs = "of each query probabilities [B, Q, C] of the classes and masks [B, Q, H, W] of the pixels"
    named_outputs, units = description.get("outputs", []), description.get("scale", {}).get("unit", [])
    if units and description["scale"]["of_frame"][0]:
        side = "as a share of the frame's side, the square root of its area in mm2"
        named_outputs, units = [f"{name}, {side}" for name in named_outputs], []
    if units:
        named_outputs = [f"{name} ({unit})" if unit else name for name, unit in zip(named_outputs, units, strict=True)]
    height, width = model.preprocessing["image_size"]
    known = {licence for _, licence in licences(model.lineage)}
    restricted = non_commercial(model.lineage)
    by_nc = restricted and all("CC BY-NC 4.0" in one for one in known if "NC" in one.upper())
    environment = jinja2.Environment(  # Markdown: no HTML escaping; values in the front matter are quoted
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"quoted": _quoted, "plain": _plain}
    template = environment.from_string((pathlib.Path(__file__).parent / "card.md").read_text())
    text = template.render(
        form=form,
        kind=model.kind,
        export=export,
        library=_LIBRARY[form],
        # The Hub has no name for terms stricter than CC BY-NC.
        hub_licence="cc-by-nc-4.0" if by_nc else "unknown",
        licence="; ".join(sorted(known)) if all(known) and not by_nc else "",
        datasets=sorted({d["dataset"] for stage in model.lineage for d in stage.get("data", ()) if d.get("dataset")}),
        about=description.get("encoder") or description["unet"],
        network=description["model"],
        segments=model.segments,
        queries=description["head"]["queries"] if model.task == "instances" else 0,
        pool=description.get("pool"),
        classes=description.get("classes", []),
        named_outputs=named_outputs,
        has_head=has_head,
        height=height,
        width=width,
        pixels=model.preprocessing,
        outputs=outputs,
        beside=os.path.exists(os.path.join(directory, "model.safetensors")),  # weights of an exported program
        stages=[_stage(stage) for stage in model.lineage],
        learnt=_learnt(model.lineage),
        licences=licences(model.lineage),
        citations=citations(model.lineage),
        non_commercial=restricted,
    )
    with open(os.path.join(directory, "README.md"), "w") as file:
        file.write(text)


def _quoted(text: str) -> str:
    """A quoted YAML string, since dataset names can contain anything."""
    return "'" + visible(" ".join(text.split())).replace("'", "''") + "'"


def _plain(value: Any) -> str:
    """Untrusted text from the lineage on one line, with HTML and Markdown escaped."""
    text = html.escape(visible(" ".join(str(value).split())), quote=False)
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _learnt(lineage: Lineage) -> str:
    """How the model was pretrained last, in words; third-party weights are those of masked autoencoders."""
    configs = [stage.get("config") or {} for stage in lineage if stage.get("job") == "pretrain" and "role" not in stage]
    objective = _plain(configs[-1].get("objective", "mae") if configs else "mae")
    return "as a masked autoencoder" if objective.endswith("mae") else f"without labels (objective {objective})"


def _stage(stage: dict[str, Any]) -> str:
    parts = [f"**{_plain(stage.get('job', 'unknown'))}** ({_plain(stage.get('code', 'code not stated'))}"]
    parts += [f", {stage['step']} steps)" if stage.get("step") else ")"]
    parts += [" of the teacher"] * (stage.get("role") == "teacher")
    config = stage.get("config") or {}
    recipe = {
        "objective": config.get("objective"),
        "optimizer": "Muon" if config.get("optimizer", {}).get("muon") else None,
        "mask ratio": config.get("mask", {}).get("ratio"),
        "batch": config.get("train", {}).get("batch_size"),
        "learning rate per 256": config.get("optimizer", {}).get("learning_rate"),
        "weight decay": config.get("optimizer", {}).get("weight_decay"),
    }
    said = [f"{name} {_plain(value)}" for name, value in recipe.items() if value is not None]
    data = [
        f"{_plain(d.get('dataset', 'unnamed'))} ({d['frames']} frames)"
        if d.get("frames")
        else _plain(d.get("dataset", ""))
        for d in stage.get("data", ())
    ]
    source = (
        [_plain(f"from {', '.join(stage['source']['files'])}, sha256 {stage['source']['sha256'][:12]}")]
        if "source" in stage
        else []
    )
    rest = [*source, *([", ".join(said)] if said else []), *(["data: " + ", ".join(data)] if data else [])]
    return "".join(parts) + (": " + "; ".join(rest) if rest else "")
