"""The parts of a report that come from the plan, the records and the headers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelzip.checkpoints.cached import without_rounded_cache
from modelzip.checkpoints.index import Checkpoint, TensorInfo
from modelzip.compressors.prune.structural_settings import UnitSettings
from modelzip.weights.inputs import SCALE
from modelzip.weights.kinds import empty
from modelzip.weights.layouts import MODELZIP

from .chain import StageDone
from .engines import stage_details
from .forms import described, taken_group
from .layer_plan import LayerPlan
from .plans import Plan
from .structural import StructuralPlan
from .text import Windows
from .unit_pruning import fell_short


def plan_summary(plans: Sequence[Plan]) -> dict[str, Any]:
    """What was predicted, over all stages."""
    return {
        "modules": sum(len(plan.modules) for plan in plans if isinstance(plan, LayerPlan)),
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


def module_rows(stage: int, plan: Plan, records: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each matrix that a layer-wise stage compressed, and a sentence for all that didn't go as asked.

    stage: its number, from 1.
    """
    rows: list[dict[str, Any]] = []
    fallbacks: list[str] = []
    if isinstance(plan, StructuralPlan) and isinstance(plan.settings, UnitSettings):
        fallbacks += filter(None, [fell_short(plan.settings, records)])
    if not isinstance(plan, LayerPlan):
        return rows, fallbacks
    for module in plan.modules:
        record = records[module.name]
        taken = f"{module.note}: {taken_group(module.settings)}" if module.note else ""
        notes = [note for note in (taken, record["note"]) if note]
        weight = module.before if record["weight"] is None else empty(record["weight"])
        if record["fallback"]:
            instead = "left as it was" if record["weight"] is None else INSTEAD[record["method"]]
            notes.append(f"{instead}: {record['fallback']}")
        fallbacks += [f"{module.name}: {note}" for note in notes]
        notes += [record[key] for key in ("scaled", "tuned") if record.get(key)]
        rows.append(
            {
                "stage": stage,
                "name": module.name,
                "method": record["method"],
                "form": described(weight),
                "bits_per_weight": 8 * weight.nbytes / math.prod(weight.shape),
                "shape": weight.shape,
                "error": record["error"],
                "weight_error": record["weight_error"],
                "note": "; ".join(notes),
            }
        )
    return rows, fallbacks


INSTEAD = {
    "rtn": "rounded to nearest",
    "magnitude": "pruned by magnitude",
    "pq": "given the nearest entries of a codebook",
}
"""What is said of a method that took another's place."""


def stage_rows(done: Sequence[StageDone], evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The report's `stages`: what each did and left, and what that costs. evaluation: of the last one."""
    last = len(done) - 1
    return [
        {
            "kind": stage.plan.kind,
            "method": stage.method,
            "bytes_after": stage.bytes_after,
            "seconds": stage.seconds,
            "evaluation": evaluation if number == last else stage.evaluation,
            "details": stage_details(stage.plan, stage.records),
        }
        for number, stage in enumerate(done)
    ]


def size_section(original: Checkpoint | None, result: Checkpoint) -> dict[str, Any]:
    """Bytes and bits. Parameters are counted as a dense model has them, shared ones once."""
    packed = _packed(result)
    packed_bytes = sum(nbytes for nbytes, _ in packed)
    packed_parameters = sum(parameters for _, parameters in packed)
    tensors = without_rounded_cache(result).tensors  # scales of a cache are no parameters
    plain = [math.prod(info.shape) for name, info in tensors.items() if not _is_part(name, result)]
    parameters = sum(plain) + packed_parameters
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


def _is_part(name: str, result: Checkpoint) -> bool:
    """Whether a tensor is one of those that make up a compressed weight; fp8 codes are called as a plain one is."""
    leaf = name.rpartition(".")[2]
    is_scaled = leaf == "weight" and f"{name}_scale" in result.tensors
    return result.quantization is not None and (is_scaled or leaf == SCALE or leaf.startswith("weight_"))


def _packed(result: Checkpoint) -> list[tuple[int, int]]:
    """Bytes, and parameters as a dense model has them, of each compressed matrix."""
    config = result.quantization
    if config is None:
        return []
    if config.get("quant_method") == MODELZIP:
        stored = {name: meta for name, meta in config["modules"].items() if not _is_shared(name, config)}
        weights = [empty(meta) for meta in stored.values() if meta["kind"] != "dense"]
        return [(weight.nbytes, math.prod(weight.shape)) for weight in weights]
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in result.tensors.items():
        if _is_part(name, result):
            stem, _, leaf = name.rpartition(".")
            parts.setdefault(stem, {})[leaf] = info
    shapes = result.read(f"{stem}.weight_shape" for stem, found in parts.items() if "weight_shape" in found)
    counts = {name.rpartition(".")[0]: int(shape.prod()) for name, shape in shapes.items()}
    for stem, found in parts.items():
        if stem not in counts:  # floats, of which two are in a byte where they are packed
            codes = found.get("weight") or found["weight_packed"]
            counts[stem] = math.prod(codes.shape) * (1 if "weight" in found else 2)
    return [(sum(info.nbytes for info in found.values()), counts[stem]) for stem, found in parts.items()]


def _is_shared(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a module's matrix is stored with another one."""
    return any(name.startswith(f"{module}.weight") for name in config.get("shared", {}))
