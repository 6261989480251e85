"""A process that trains what a JSON file says, and may kill itself at a step: `python runs_training.py JOB [STEP]`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline.clock import Clock
from modelzip.pipeline.context import Context
from modelzip.pipeline.identity import fingerprint_of
from modelzip.pipeline.training import plan_training, run_training
from modelzip.recipes.load import parse_recipe


class Fatal:
    """Progress that ends the process at a step."""

    def __init__(self, step: int | None) -> None:
        self._step = step

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        if done == self._step:
            os.kill(os.getpid(), signal.SIGKILL)

    def say(self, line: str) -> None:
        pass


def shard_on_cpus() -> None:
    """accelerate takes FSDP and DeepSpeed on accelerators only, though both run on CPUs: here it takes them there."""
    began = AcceleratorState.__init__

    def begin(self: AcceleratorState, *args: Any, **options: Any) -> None:
        began(self, *args, **options)
        kind = None
        if options.get("fsdp_plugin") is not None:
            kind, self.fsdp_plugin = DistributedType.FSDP, options["fsdp_plugin"]
        if (plugin := options.get("deepspeed_plugin")) is not None:
            plugin.set_mixed_precision("no")
            plugin.select(_from_accelerator_state=True)
            kind, self.deepspeed_plugins = DistributedType.DEEPSPEED, {"default": plugin}
        if kind is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = kind

    AcceleratorState.__init__ = begin  # type: ignore[method-assign]


def main(job: str, step: str | None = None) -> None:
    data = json.loads(Path(job).read_text())
    recipe = parse_recipe({"model": data["model"], "stages": [{"distill": data["stage"]}]}, "test")
    source, output = Checkpoint.open(data["model"]), Path(data["output"])
    plan = plan_training(recipe.stages[0], source, recipe=recipe, output=output)
    progress = Fatal(None if step is None else int(step))
    context = Context(recipe, torch.device("cpu"), fingerprint_of(recipe, source), Clock(), progress)
    shard_on_cpus()
    torch.set_grad_enabled(False)  # as a run of several stages does
    run_training(
        plan,
        source,
        target=output,
        describe=lambda found: json.dumps(found, sort_keys=True).encode(),
        overwrite=False,
        resume=False,
        context=context,
    )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            assert PartialState().distributed_type == DistributedType[name]


if __name__ == "__main__":
    main(*sys.argv[1:])
