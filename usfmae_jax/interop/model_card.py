"""The model card of an export: `README.md` as the Hugging Face Hub reads it."""

import os
from typing import Any

from usfmae_jax.interop import examples
from usfmae_jax.interop.licences import licences, non_commercial
from usfmae_jax.interop.model import Model

_LIBRARY = {
    "safetensors": "jax", "timm": "timm", "hf": "transformers", "mae": "pytorch", "onnx": "onnx", "stablehlo": "jax"
}  # fmt: skip


def write_model_card(model: Model, form: str, directory: str, export: dict[str, Any]) -> None:
    """Writes `README.md`: what the model is, how to load it, what it was trained on, and under which licences.

    Args:
      model: what was exported.
      form: the format.
      directory: of the export.
      export: what is in `export.json`.
    """
    stages = [_stage(stage) for stage in model.lineage] or ["Nothing is recorded."]
    terms = [f"| {what} | {licence or 'not stated'} |" for what, licence in licences(model.lineage)]
    size = "x".join(map(str, model.preprocessing["image_size"]))
    about, classes = model.description["encoder"], ", ".join(model.description.get("classes", []))
    lines = [
        "---",
        *_front_matter(model, form),
        "---",
        "",
        f"# ViT {about['width']}/{about['patch_size']} for ultrasound",
        "",
        f"A vision transformer of {about['depth']} blocks, {about['width']} wide, {about['num_heads']} heads, for "
        f"{size} images of {about['channels']} channel{'s' * (about['channels'] > 1)}; "
        + (f"a classifier of {classes}." if classes else "pretrained as a masked autoencoder.")
        + (" The decoder is included." if model.kind == "mae" and form in ("hf", "mae") else ""),
        "Not a medical device: for research.",
        "",
        "## Use",
        "",
        "```python",
        examples.example(model, form, beside=os.path.exists(os.path.join(directory, "model.safetensors"))),
        "```",
        "",
        f"Images are resized to {size} by averaging areas, divided by 255, and normalised with mean "
        f"{model.preprocessing['mean']} and std {model.preprocessing['std']}"
        + (", which the exported program does itself." if form in ("onnx", "stablehlo") else "."),
        "",
        "## Where the weights come from",
        "",
        *[f"{i + 1}. {stage}" for i, stage in enumerate(stages)],
        "",
        *(["| | licence |", "|---|---|", *terms, ""] if terms else []),
        *(
            ["An ancestor of these weights is licensed for non-commercial use only, and so are these weights.", ""]
            if non_commercial(model.lineage)
            else []
        ),
        "## Checked",
        "",
        _checked(export),
    ]
    with open(os.path.join(directory, "README.md"), "w") as file:
        file.write("\n".join(lines) + "\n")


def _front_matter(model: Model, form: str) -> list[str]:
    """YAML that the Hub understands; strings are quoted, because names of datasets can be anything."""
    known = [licence for _, licence in licences(model.lineage)]
    restrictive = {one for one in known if one and "NC" in one.upper()}
    if non_commercial(model.lineage) and all("CC BY-NC 4.0" in one for one in restrictive):
        licence = ["license: cc-by-nc-4.0"]  # terms that are stricter still have no name that the Hub knows
    elif known and all(known):
        licence = ["license: other", f"license_name: {_quoted('; '.join(sorted(set(known))))}"]
    else:
        licence = ["license: unknown"]
    data = sorted({d["dataset"] for stage in model.lineage for d in stage.get("data", ()) if d.get("dataset")})
    return [
        *licence,
        f"library_name: {_LIBRARY[form]}",
        f"pipeline_tag: {'image-classification' if model.kind == 'classifier' else 'image-feature-extraction'}",
        "tags:",
        *[f"- {tag}" for tag in ("ultrasound", "medical-imaging", "masked-autoencoder", "vit")],
        *(["datasets:", *[f"- {_quoted(name)}" for name in data]] if data else []),
    ]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''").replace("\n", " ") + "'"


def _stage(stage: dict[str, Any]) -> str:
    parts = [f"**{stage.get('job', 'unknown')}** ({stage.get('code', 'code not stated')}"]
    parts += [f", {stage['step']} steps)" if stage.get("step") else ")"]
    config = stage.get("config") or {}
    recipe = {
        "mask ratio": config.get("mask", {}).get("ratio"),
        "batch": config.get("train", {}).get("batch_size"),
        "learning rate per 256": config.get("optimizer", {}).get("learning_rate"),
        "weight decay": config.get("optimizer", {}).get("weight_decay"),
    }
    said = [f"{name} {value}" for name, value in recipe.items() if value is not None]
    data = [
        f"{d.get('dataset', 'unnamed')} ({d['frames']} frames)" if d.get("frames") else str(d.get("dataset", ""))
        for d in stage.get("data", ())
    ]
    source = (
        [f"from {', '.join(stage['source']['files'])}, sha256 {stage['source']['sha256'][:12]}"]
        if "source" in stage
        else []
    )
    rest = [*source, *([", ".join(said)] if said else []), *(["data: " + ", ".join(data)] if data else [])]
    return "".join(parts) + (": " + "; ".join(rest) if rest else "")


def _checked(export: dict[str, Any]) -> str:
    if export.get("largest_difference") is None:
        return f"Not compared with another runtime: {export['not_compared']}."
    return (
        f"The same {export['images']} images went through the original model and, with {export['runtime']}, through "
        f"these files: the largest difference is {export['largest_difference']:.1e} (limit {export['limit']:.0e})."
    )
