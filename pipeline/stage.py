"""One stage of the layer-wise engine: from a checkpoint to a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.target import partial_of
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.weights.layouts import quantization_config

from .calibrate import batches, forward_inputs
from .context import Context
from .identity import PROVENANCE
from .layerwise import Job, compress_blocks
from .measure import open_streamed
from .plan import Plan
from .text import Windows

HIDDEN_SHARE = 0.4
"""Share of the free memory that waiting batches may hold before they spill to disk."""


def stage_fingerprint(context: Context, plan: Plan) -> str:
    """What a resumed stage must share with the interrupted one. The layout may depend on the machine's libraries."""
    return context.fingerprint + plan.layout


def run_stage(
    plan: Plan,
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
    fingerprint = stage_fingerprint(context, plan)
    with CheckpointWriter.open(
        target, source=source, fingerprint=fingerprint, overwrite=overwrite, resume=resume
    ) as writer:
        begin = time.perf_counter()
        streamed = open_streamed(source, context.recipe.dtype, context.device)
        size = context.recipe.calibration.batch_size
        data = [] if windows is None else batches(windows.tokens, size, forward_inputs(streamed.model))
        begin = context.clock.add("open", begin)
        settings = {module.name: module.settings for module in plan.modules}
        job = Job(
            targets=settings,
            propagate=plan.propagate,
            spill_limit=int(HIDDEN_SHARE * psutil.virtual_memory().available),
            spill_folder=partial_of(target),
        )
        compress_blocks(job, streamed, data, writer=writer, clock=context.clock, progress=context.progress)
        records = {name: record for part in writer.done.values() for name, record in part["modules"].items()}
        linears = [name for name, module in streamed.model.named_modules() if isinstance(module, nn.Linear)]
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        config["quantization_config"] = quantization_config(plan.metas, layout=plan.layout, linears=linears)
        begin = time.perf_counter()
        writer.finish(config=config, files={PROVENANCE: describe(records)})
        context.clock.add("write", begin)
    return records
