"""README.md of an output: a model card with the figures and the recipe, the original's card below it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import transformers
import yaml
from huggingface_hub import ModelCard

from .report import Report, report_parts

OWN: Final = "modelzip"
"""`quant_method` of modelzip's own layout."""

MARK: Final = "<!-- The card of the original model follows. -->"
"""What stands between this card and the original's, so that a card is never wrapped twice."""


def model_card(report: Report, original: str, config: Mapping[str, Any]) -> str:
    """The card. original: README.md of the model that was compressed, or of an earlier output of it; "" for none.

    What its front matter says (licence, languages, base model) is kept. config: config.json of the output.
    """
    front, text = _parted(original)
    kept = {"library_name": "transformers", **front}
    tags = front.get("tags") or []
    kept["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else map(str, tags)), "modelzip"]))
    title, headline, *_ = report_parts(report)
    pieces = [
        "---\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip() + "\n---",
        title.body,
        "A smaller version of the model, made by modelzip. What was lost and won:",
        headline.body,
        _opening(report, config),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(_told(report.recipe), sort_keys=False, allow_unicode=True)}```",
    ]
    if text:
        pieces += [MARK, text]
    return "\n\n".join(pieces) + "\n"


def _parted(card: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card and the text of the original's."""
    if not card.strip():
        return {}, ""
    try:
        found = ModelCard(card, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):  # front matter that is none
        return {}, card.strip()
    front: dict[str, Any] = found.data.to_dict()  # type: ignore[no-untyped-call]
    text = found.text.strip()
    if MARK in text:
        text = text.partition(MARK)[2].strip()
    elif "modelzip" in (front.get("tags") or ()):
        text = ""
    return front, text


def _opening(report: Report, config: Mapping[str, Any]) -> str:
    """How the output is opened in Python."""
    quantized = (config.get("quantization_config") or {}).get("quant_method")
    architecture = next(iter(config.get("architectures") or ()), "AutoModel")
    lines = []
    known = architecture in dir(transformers)
    if quantized == OWN or not known:
        lines.append("import modelzip.weights  # teaches transformers what this model is made of\n")
    if not known:  # a student of a kind of our own, all of which are classifiers
        architecture = "AutoModelForSequenceClassification"
    name = Path(report.output or "").name
    lines.append(f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained("{name}")')
    return "```python\n" + "".join(lines) + "\n```"


def _told(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what was left at null, and without the user's folders: a card is for others to read."""
    return {key: _public(value) for key, value in recipe.items() if value not in (None, [], {}) and key != "output"}


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _told(value)
    if isinstance(value, list):
        return [_public(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value
