"""The files of a report in the output's folder."""

from __future__ import annotations

import os
from pathlib import Path

from .html import neighbours_of, report_html
from .report import Report, report_json, report_markdown


def write_report(folder: Path, report: Report) -> tuple[Path, ...]:
    """Write report.json, report.md and report.html into a folder, each in one rename."""
    contents = {
        "report.json": report_json(report),
        "report.md": report_markdown(report).encode(),
        "report.html": report_html(report, neighbours_of(folder, report)).encode(),
    }
    for name, content in contents.items():
        draft = folder / f".{name}.partial"
        draft.write_bytes(content)
        os.replace(draft, folder / name)
    return tuple(folder / name for name in contents)
