"""What a lineage says about who may use the weights, and for what."""

import re
from typing import Any

from usfmae_jax.interop.model import Lineage

#: File names of published weights whose origin is known, with the stages behind them.
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
    """The stage behind weights that are published under that file or folder name; None if it is not known here."""
    return next((dict(stage) for pattern, stage in _PUBLISHED if re.search(pattern, name, re.IGNORECASE)), None)


def licences(lineage: Lineage) -> list[tuple[str, str]]:
    """(what, licence) of every ancestor's weights and of all training data, without repetition; "" = not stated."""
    found: dict[tuple[str, str], None] = {}
    for stage in lineage:
        if "licence" in stage:
            found[f"weights of the job '{stage['job']}'", str(stage["licence"])] = None
        for data in stage.get("data", ()):
            found[f"data: {data.get('dataset', 'unnamed')}", str(data.get("licence", ""))] = None
    return list(found)


def non_commercial(lineage: Lineage) -> bool:
    """Whether any ancestor's weights or data may be used without commerce only; what starts from them inherits that."""
    return any(
        re.search(r"\bNC\b|non-?commercial|research (and education )?only", licence, re.IGNORECASE)
        for _, licence in licences(lineage)
    )
