"""The parts of a report that come from the plan, the records and the headers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modelzip.checkpoints.index import Checkpoint

from .plan import Plan
from .text import Windows

PACKED = ".weight_packed"


def plan_summary(plans: Sequence[Plan]) -> dict[str, Any]:
    """What was predicted, over all stages."""
    return {
        "modules": sum(len(plan.modules) for plan in plans),
        "bytes_before": plans[0].bytes_before,
        "bytes_after": plans[-1].bytes_after,
        "memory_bytes": max(plan.memory_bytes for plan in plans),
        "disk_bytes": max(plan.disk_bytes for plan in plans),
        "notes": list(dict.fromkeys(note for plan in plans for note in plan.notes)),
    }


def calibration_section(windows: Windows | None, seed: int) -> dict[str, Any] | None:
    """The text that methods looked at."""
    if windows is None:
        return None
    samples, seq_len = windows.tokens.shape
    return {
        "source": windows.source,
        "tokens": windows.tokens.numel(),
        "sha256": windows.sha256,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
    }


def module_rows(plans: Iterable[Plan], records: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each compressed module, and a sentence for everything that didn't go as asked."""
    rows, fallbacks = [], []
    for module in (module for plan in plans for module in plan.modules):
        record = records[module.name]
        notes = [note for note in (module.note and f"{module.note}: {module.group}", record["note"]) if note]
        if record["fallback"]:
            notes.append(f"rounded to nearest: {record['fallback']}")
        fallbacks += [f"{module.name}: {note}" for note in notes]
        rows.append(
            {
                "name": module.name,
                "method": record["method"],
                "bits": module.bits,
                "group_size": module.group,
                "shape": module.shape,
                "error": record["error"],
                "weight_error": record["weight_error"],
                "note": "; ".join(notes),
            }
        )
    return rows, fallbacks


def size_section(original: Checkpoint | None, result: Checkpoint) -> dict[str, Any]:
    """Bytes and bits. Parameters are counted as a dense model has them, tied ones once."""
    packed_bytes = packed_parameters = 0
    parameters = 0
    for name, info in result.tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf.startswith("weight_") and f"{stem}{PACKED}" in result.tensors:
            packed_bytes += info.nbytes
        else:
            parameters += math.prod(info.shape)
    shapes = result.read(name for name in result.tensors if name.endswith(".weight_shape"))
    packed_parameters = sum(int(shape.prod()) for shape in shapes.values())
    parameters += packed_parameters
    before = None if original is None else original.nbytes
    return {
        "bytes_before": before,
        "bytes_after": result.nbytes,
        "ratio": None if before is None else before / result.nbytes,
        "parameters": parameters,
        "compressed_parameters": packed_parameters,
        "bits_per_weight": 8 * packed_bytes / packed_parameters if packed_parameters else None,
        "bits_per_parameter": 8 * result.nbytes / parameters,
    }
