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
    """accelerate takes FSDP on accelerators only, though torch has it for CPUs: here it takes it there, too."""
    began = AcceleratorState.__init__

    def begin(self: AcceleratorState, *args: Any, **options: Any) -> None:
        began(self, *args, **options)
        if options.get("fsdp_plugin") is not None:
            self.fsdp_plugin = options["fsdp_plugin"]
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin  # type: ignore[method-assign]


def main(job: str, step: str | None = None) -> None:
    data = json.loads(Path(job).read_text())
    recipe = parse_recipe({"model": data["model"], "stages": [{"distill": data["stage"]}]}, "test")
    source, output = Checkpoint.open(data["model"]), Path(data["output"])
    plan = plan_training(recipe.stages[0], source, recipe=recipe, output=output)
    progress = Fatal(None if step is None else int(step))
    context = Context(recipe, torch.device("cpu"), fingerprint_of(recipe, source), Clock(), progress)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
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
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert PartialState().distributed_type == DistributedType.FSDP


if __name__ == "__main__":
    main(*sys.argv[1:])
