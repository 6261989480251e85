"""The proof that an export opens: its consumer runs it in a fresh process, and the logits are compared with ours."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from modelzip.checkpoints.errors import OutputError
from modelzip.checkpoints.fresh import FreshProcessError
from modelzip.checkpoints.index import Checkpoint
from modelzip.exporters.formats import FORMATS, held, missing_reader
from modelzip.exporters.reopen import reopened
from modelzip.exporters.request import Written

from .measure import dense_bytes, probe
from .verify import on_half_the_cores


def check_export(checkpoint: Checkpoint, format: str, written: Written, *, seed: int = 0) -> dict[str, Any]:
    """Open an export with its consumer, and give the largest difference of a logit, the largest logit and the tokens;
    or, as `skipped`, why that wasn't done.

    Raises OutputError if it doesn't open, or opens as another model. What was rounded anew may differ by any amount.
    """
    if missing := missing_reader(format):
        return {"skipped": f"{missing} isn't installed"}
    if (dense := dense_bytes(checkpoint)) * 1.5 > psutil.virtual_memory().available:
        return {"skipped": f"that takes {dense / 1e9:,.1f} GB of memory"}
    inputs, expect = probe(held(checkpoint, format), seed=seed, device=torch.device("cpu"))
    try:
        found, wanted = reopened(format, written.path, inputs, lambda: on_half_the_cores(expect))
    except FreshProcessError as error:
        raise OutputError(f"{written.path} was written, but can't be opened as {format}: {error}") from None
    if found.shape != wanted.shape:
        raise OutputError(
            f"{written.path} was written, but opened it answers {list(found.shape)} numbers instead of "
            f"{list(wanted.shape)}."
        )
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    allowed = float("inf") if written.rounded else FORMATS[format].precision * max(largest, 1.0)
    if not difference <= allowed:
        raise OutputError(
            f"{written.path} was written, but opened it is another model: its output differs by {difference:.3g} "
            f"(largest value {largest:.3g})."
        )
    return {
        "max_logit_difference": difference,
        "largest_logit": largest,
        "tokens": int(next(iter(inputs.values())).numel()),
    }


def said(verification: dict[str, Any]) -> str:
    """The same as a line for a reader."""
    if "skipped" in verification:
        return f"not opened by its consumer: {verification['skipped']}"
    difference, largest = verification["max_logit_difference"], verification["largest_logit"]
    return f"opened by its consumer: logits differ by at most {difference:.2g} of {largest:.3g}"
