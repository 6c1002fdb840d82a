"""What a report rests on: where weights and data come from, what was left out, how to repeat it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from usfmae_jax.reporting import markup
from usfmae_jax.reporting.verdict import counted


def provenance(results: Mapping[str, Any]) -> str:
    """Weights with their lineage, data with their licences, excluded near-duplicates and settings."""
    context = results.get("context") or {}
    weights, prints = context.get("weights") or {}, context.get("fingerprint")
    facts = {
        "Weights": weights.get("source"),
        "Kind of weights": weights.get("kind"),
        "Fingerprint of the weights": weights.get("fingerprint"),
        "Fingerprint of the data": prints if isinstance(prints, str) else ", ".join(map(str, prints or ())),
    }
    page = markup.table(["", ""], [[name, str(value)] for name, value in facts.items() if value])
    page += _lineage(context.get("lineage") or ())
    page += markup.table(
        ["Dataset", "Frames", "Licence", "Please cite"], [_dataset(one) for one in context.get("data") or ()],
        "Tested and trained on here", stack=True,
    )  # fmt: skip
    excluded = context.get("excluded")
    rows = [[*(str(one.get(key, "")) for key in ("frame", "patient", "fold", "reason"))] for one in excluded or ()]
    name = f"Left out of training: {counted(len(rows), 'near-duplicate')} of tested frames"
    page += markup.table(["Frame", "Patient", "Fold", "Why"], rows, name, stack=True)
    if excluded is not None and not rows:
        looked = context.get("config", {}).get("split", {}).get("duplicates", True)
        said = "No near-duplicates of tested frames had to be left out of training."
        page += f'<p class="soft">{said if looked else "Near-duplicates were not looked for."}</p>'
    settings = [[name, value] for name, value in _flat(context.get("config") or {})]
    return page + markup.folded("All settings", markup.table(["Setting", "Value"], settings, most=len(settings)))


def _lineage(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in stages:
        data = [_dataset(dataset) for dataset in one.get("data") or ()]
        what = "; ".join(f"{name} ({counted(frames, 'frame')}, {licence})" for name, frames, licence, _ in data)
        step = one.get("step")
        rows.append(
            [
                str(one.get("job", "")),
                f"{step:,}" if isinstance(step, int) else "",
                str(one.get("code", "")).replace(" ", "\u00a0"),
                what,
            ]
        )
    return markup.table(
        ["Stage", "Steps", "With", "On data, and its licence"],
        rows,
        "Where the weights come from, oldest first",
        stack=True,
    )


def _dataset(data: Mapping[str, Any]) -> list[Any]:
    licence, citation = (str(data.get(key) or "not stated") for key in ("licence", "citation"))
    if len(licence) < 20:  # a short one stays on one line
        licence = licence.replace(" ", "\u00a0")
    return [str(data.get("dataset", "")), data.get("frames") or 0, licence, citation]


def repeat(results: Mapping[str, Any]) -> str:
    """The command, and which files hold what."""
    command = (results.get("context") or {}).get("command")
    if not command:
        return ""
    return (
        f'<p class="soft">Where the same weights and data are:</p><pre>{markup.escape(command)}</pre>'
        '<p class="soft">The frames of every part are in splits/splits.csv, what the model said of each in '
        "predictions.csv, these numbers in results.json.</p>"
    )


def _flat(config: Mapping[str, Any], parent: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{parent}{name}.")
        else:
            found.append((f"{parent}{name}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return found
