"""What the tests of the structural engine share: a stage planned and run on a folder, without the rest of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import modelzip.weights  # noqa: F401  # teaches transformers the layout of results that config.json can't say
from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline.clock import Clock
from modelzip.pipeline.context import Context
from modelzip.pipeline.structural import StructuralPlan, plan_structural, run_structural
from modelzip.pipeline.text import Windows
from modelzip.recipes.load import parse_recipe


class Progress:
    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total

    def say(self, line: str) -> None:
        raise AssertionError(line)


def recipe_of(*, kind: str = "prune", **settings: Any) -> Any:
    return parse_recipe({"model": "x", "calibration": {"seq_len": 12, "samples": 4}, "stages": [{kind: settings}]}, "")


def plan_of(source: Checkpoint, output: Path, **settings: Any) -> StructuralPlan:
    """The plan; raises ProblemsError as the plan of a whole recipe does."""
    recipe, problems = recipe_of(**settings), []
    (stage,) = recipe.stages
    plan = plan_structural(stage, source, recipe=recipe, output=output, where=stage.kind, problems=problems)
    if problems:
        raise ProblemsError(problems)
    assert plan is not None
    return plan


def prune(
    folder: Path, output: Path, *, windows: Tensor | None = None, resume: bool = False, **settings: Any
) -> tuple[StructuralPlan, dict[str, Any]]:
    """Plan and run; what comes out must be what the plan said."""
    source = Checkpoint.open(str(folder))
    plan = plan_of(source, output, **settings)
    records = run(plan, source, output, windows=windows, resume=resume, **settings)
    made = Checkpoint.open(str(output))
    assert made.nbytes == plan.bytes_after < plan.bytes_before
    assert made.tensors.keys() == plan.result.tensors.keys()
    return plan, records


def run(
    plan: StructuralPlan,
    source: Checkpoint,
    output: Path,
    *,
    windows: Tensor | None = None,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Run a plan."""
    context = Context(recipe_of(**settings), torch.device("cpu"), "print", Clock(), Progress())
    return run_structural(
        plan,
        source,
        target=output,
        windows=None if windows is None else Windows(windows, "test"),
        describe=lambda found: json.dumps(found).encode(),
        overwrite=False,
        resume=resume,
        context=context,
    )


def opened(folder: Path) -> nn.Module:
    """The folder's model as transformers opens it, in fp32."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def is_plain(folder: Path) -> bool:
    return "quantization_config" not in json.loads((folder / "config.json").read_text())


@torch.no_grad()
def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest relative Frobenius distance of outputs."""
    assert len(one) == len(other) > 0
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))
