"""One stage of the layer-wise engine: from a checkpoint to a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.checkpoints.target import partial_of, workspace_of
from modelzip.checkpoints.unfused import unfused
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.evaluation.cache_report import CACHE
from modelzip.weights.dense import Dense
from modelzip.weights.layouts import MODELZIP, decoder, quantization_config, stored_tensors
from modelzip.weights.value import dtype_name

from .cache_stage import PART, write_scales
from .calibrate import batches, forward_inputs
from .choose_bits import settled
from .context import Context
from .folding import require_same, rotated, scaled, write_changes
from .identity import PROVENANCE
from .layer_plan import LayerPlan
from .layerwise import Job, compress_blocks
from .measure import open_streamed
from .module_plan import looks_at_inputs
from .scales import choose_scales, keep, kept
from .serving import at_sharers, shared_after
from .text import Windows
from .weights_now import weights_now

HIDDEN_SHARE = 0.4
"""Share of the free memory that waiting batches may hold before they spill to disk."""

SCALES = "scales.safetensors"
"""What was chosen in the first pass, in the run's workspace."""


def layer_fingerprint(context: Context, plan: LayerPlan) -> str:
    """What a resumed stage must share with the interrupted one. The layout may depend on the machine's libraries."""
    return context.fingerprint + plan.layout


def run_layers(
    plan: LayerPlan,
    source: Checkpoint,
    *,
    target: Path,
    windows: Windows | None,
    describe: Callable[[dict[str, Any]], bytes],
    overwrite: bool,
    resume: bool,
    context: Context,
) -> dict[str, Any]:
    """Compress what the plan names and publish the result at `target`; returns the record of each module.

    describe: makes modelzip.json from the records. Gradients must be off. Raises what the writer and the engine raise.
    """
    fingerprint = layer_fingerprint(context, plan)
    source = unfused(source) if plan.takes_apart else source
    with CheckpointWriter.open(
        target, source=source, fingerprint=fingerprint, overwrite=overwrite, resume=resume
    ) as writer:
        begin = time.perf_counter()
        limit = int(HIDDEN_SHARE * psutil.virtual_memory().available)
        spill: dict[str, Any] = {"spill_limit": limit, "spill_folder": partial_of(target)}
        source, notes = _folded(plan, source, windows, target=target, context=context, spill=spill)
        begin = context.clock.add("fold", begin)
        streamed = open_streamed(source, context.recipe.dtype, context.device)
        size = context.recipe.calibration.batch_size
        looks = any(looks_at_inputs(module.settings) for module in plan.modules)
        data = [] if windows is None else batches(windows.tokens, size, forward_inputs(streamed.model))
        begin = context.clock.add("open", begin)
        plan, chosen = settled(plan, streamed, data, work=workspace_of(target), context=context, spill=spill)
        begin = context.clock.add("measure", begin)
        claimed = (name for module in plan.modules for name in module.replaces)
        write_changes(source, streamed.structure, claimed=claimed, writer=writer)
        begin = context.clock.add("write", begin)
        job = _job(plan, context.recipe.seed, notes, spill)
        _carry(plan, source, streamed, writer)
        compress_blocks(
            job, streamed, data if looks else [], writer=writer, clock=context.clock, progress=context.progress
        )
        if plan.cache is not None and plan.cache.is_new:
            begin = time.perf_counter()
            write_scales(plan.cache, job, streamed, data, writer=writer, progress=context.progress)
            chosen = {**chosen, CACHE: writer.done[PART][CACHE]}
            context.clock.add("cache", begin)
        records = {name: record for part in writer.done.values() for name, record in part["modules"].items()}
        config = _dense_config(source)
        if (quantization := _quantization(plan, source, streamed, records)) is not None:
            config["quantization_config"] = quantization
        begin = time.perf_counter()
        writer.finish(config=config, files={PROVENANCE: describe(records | chosen)})
        context.clock.add("write", begin)
    return records | chosen


def _job(plan: LayerPlan, seed: int, notes: Mapping[str, str], spill: Mapping[str, Any]) -> Job:
    """What the engine is to do of a settled plan."""
    return Job(
        kind=plan.kind,
        targets={module.name: module for module in plan.modules if not module.is_table},
        tables=tuple(module for module in plan.modules if module.is_table),
        layout=plan.layout,
        seed=seed,
        propagate=plan.propagate,
        scaled=notes,
        **spill,
    )


def _carry(plan: LayerPlan, source: Checkpoint, streamed: StreamedModel, writer: CheckpointWriter) -> None:
    """Write weights that the stage leaves alone as the output's layout calls them, where the source calls them
    otherwise."""
    config = source.quantization or {}
    if config.get("quant_method") in (None, plan.layout):
        return
    changed = {module.name for module in plan.modules}
    for name, weight in weights_now(source, streamed.structure, streamed.names).items():
        parts = streamed.names.parts(name)
        is_kept = name in changed or name in writer.done or not parts
        if is_kept or stored_tensors(weight, plan.layout).keys() == parts.keys():
            continue
        read = source.read(parts.values())
        found = decoder(config)(name, {suffix: read[tensor] for suffix, tensor in parts.items()})
        suffix, tensor = next(iter(parts.items()))
        stem = tensor.removesuffix(suffix)
        tensors = {stem + suffix: part for suffix, part in stored_tensors(found, plan.layout).items()}
        writer.write_part(name, tensors, replaces=parts.values(), record={"modules": {}})


def _folded(
    plan: LayerPlan,
    source: Checkpoint,
    windows: Windows | None,
    *,
    target: Path,
    context: Context,
    spill: Mapping[str, Any],
) -> tuple[Checkpoint, Mapping[str, str]]:
    """The source with what is changed across modules, found to be the same model, and notes of its scales by module.

    Raises ModelzipError if it isn't.
    """
    if plan.folding is None:
        return source, {}
    seed, notes = context.recipe.seed, {}
    view = rotated(plan.folding, source, seed=seed) if plan.folding.rotates else source
    if plan.folding.scaled and windows is not None:
        file = workspace_of(target) / SCALES
        chosen = kept(file, plan.folding.scaled)
        if chosen is None:
            streamed = open_streamed(view, context.recipe.dtype, context.device)
            data = batches(windows.tokens, context.recipe.calibration.batch_size, forward_inputs(streamed.model))
            targets = {module.name: module for module in plan.modules if not module.is_table}
            chosen = choose_scales(plan.folding.scaled, targets, streamed, data, progress=context.progress, **spill)
            keep(chosen, file)
        view, notes = scaled(plan.folding, view, chosen.scales), dict(chosen.notes)
    off = require_same(view, source, seed=seed, device=context.device)
    context.progress.say(f"what is folded between modules changes the model's output by {off:.1g}, before any rounding")
    return view, notes


def _dense_config(source: Checkpoint) -> dict[str, Any]:
    """config.json without what it says of compressed modules, the type of the others named: where it isn't,
    transformers takes that of the first tensor that it meets, which may be of codes."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    return config if {"dtype", "torch_dtype"} & config.keys() else {**config, "dtype": dtype_name(source.dtype)}


def _quantization(
    plan: LayerPlan, source: Checkpoint, streamed: StreamedModel, records: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The result's quantization_config, None if nothing in it is compressed."""
    metas = {name: weight.meta() for name, weight in weights_now(source, streamed.structure, streamed.names).items()}
    metas |= {name: record["weight"] for name, record in records.items() if record["weight"] is not None}
    before = source.quantization or {}
    own = before if before.get("quant_method") == MODELZIP else {"modules": {}, "shared": {}}
    changed = [module.linear for module in plan.modules if records[module.name]["weight"] is not None]
    shared = shared_after(own["shared"], metas, changed)
    metas = at_sharers({name: meta for name, meta in metas.items() if meta["kind"] != Dense.kind}, changed)
    metas = {**own["modules"], **metas}
    if not metas and not shared and plan.cache is None:
        return None
    linears = [name for name, module in streamed.model.named_modules() if isinstance(module, nn.Linear)]
    made = quantization_config(metas, layout=plan.layout, linears=linears, shared=shared)
    cached = {} if plan.cache is None else plan.cache.words(plan.layout)
    return {**(own if plan.layout == MODELZIP else {}), **made, **cached}
