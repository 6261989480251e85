"""The files of a report in the output's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .card import model_card
from .html import neighbours_of, report_html
from .report import Report, report_json, report_markdown


def write_report(folder: Path, report: Report) -> tuple[Path, ...]:
    """Write report.json, report.md, report.html and the model card into a model's folder, each in one rename."""
    card, config = folder / "README.md", json.loads((folder / "config.json").read_text(encoding="utf-8"))
    original = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    contents = {
        "report.json": report_json(report),
        "report.md": report_markdown(report).encode(),
        "report.html": report_html(report, neighbours_of(folder, report)).encode(),
        "README.md": model_card(report, original, config).encode(),
    }
    for name, content in contents.items():
        draft = folder / f".{name}.partial"
        draft.write_bytes(content)
        os.replace(draft, folder / name)
    return tuple(folder / name for name in contents)
