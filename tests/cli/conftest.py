"""A stand-in for the pipeline, so that the command line is tested alone."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPORT = {
    "size": {"bytes_before": 269_000_000, "bytes_after": 92_000_000, "bits_per_weight": 4.5, "parameters": 134_515_008},
    "evaluation": {"perplexity": {"original": 25.62, "compressed": 30.1}, "kl": 0.155, "top1_agreement": 0.78},
    "fallbacks": ["model.layers.0.mlp.up_proj: damping 0.1"],
}


@dataclass(frozen=True)
class Module:
    name: str = "model.layers.0.mlp.up_proj"
    method: str = "gptq"
    bits: int = 4
    group: int = 64
    shape: tuple[int, int] = (1536, 576)
    bytes_before: int = 1_769_472
    bytes_after: int = 470_000
    note: str = "group 64 instead of 128"


@dataclass(frozen=True)
class Plan:
    source: str = "model"
    output: Path = Path("out")
    modules: tuple[Module, ...] = (Module(),)
    bytes_before: int = 269_000_000
    bytes_after: int = 92_000_000
    memory_bytes: int = 500_000_000
    disk_bytes: int = 92_000_000
    notes: tuple[str, ...] = ("lm_head is left alone",)

    def rows(self) -> list[tuple[str, str, str, int, int, str]]:
        (module,) = self.modules
        return [(module.name, module.method, "4 bit", module.bytes_before, module.bytes_after, module.note)]

    def as_dict(self) -> dict[str, Any]:
        return {"source": self.source, "modules": [module.name for module in self.modules]}


@dataclass
class FakePipeline:
    """Stands for modelzip.pipeline.run: keeps what it was asked, and answers or fails as told."""

    report: dict[str, Any] = field(default_factory=lambda: dict(REPORT))
    plan: Plan = field(default_factory=Plan)
    error: BaseException | None = None
    asked: dict[str, Any] = field(default_factory=dict)

    def run_recipe(self, recipe, *, output, overwrite, resume, progress):
        self.asked = {"recipe": recipe, "output": output, "overwrite": overwrite, "resume": resume}
        progress.step("quantize", 1, 30, "block 0")
        progress.say("something happened")
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(folder=output, report=self.report)

    def plan_recipe(self, recipe, *, output, overwrite, resume):
        self.asked = {"recipe": recipe, "output": output}
        if self.error is not None:
            raise self.error
        return [self.plan]

    def evaluate_models(self, model, *, against, draft, evaluation, revision, device, dtype, progress):
        self.asked = {"model": model, "against": against, "draft": draft, "evaluation": evaluation, "device": device}
        return self.report


@pytest.fixture
def pipeline(monkeypatch, tmp_path) -> FakePipeline:
    monkeypatch.chdir(tmp_path)
    fake = FakePipeline()
    for place, names in {"run": ("run_recipe", "plan_recipe"), "evaluate": ("evaluate_models",)}.items():
        module = types.ModuleType(f"modelzip.pipeline.{place}")
        for name in names:
            setattr(module, name, getattr(fake, name))
        monkeypatch.setitem(sys.modules, f"modelzip.pipeline.{place}", module)
    return fake
