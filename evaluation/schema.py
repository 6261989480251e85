"""What a report holds: the fields of `report.json`, each with its meaning and its unit. No torch.

The values are frozen and strict: an unknown or missing field is an error. A number that could not be computed is NaN
and is written as the string "NaN", because JSON has no such number; reading it back gives NaN again.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from .schema_quality import EvaluationResult, Section


class Source(Section):
    name: str = Field(description="The model as the user named it: a folder, a hub id or a .gguf file")
    sha256: str = Field(description="SHA-256 over config.json and the headers of the weight files")
    revision: str | None = Field(None, description="Revision of a hub id; null for a local model")


class PlanSummary(Section):
    modules: int = Field(description="Linears that the plan set out to compress")
    bytes_before: int = Field(description="Bytes of all weights before, from the headers")
    bytes_after: int = Field(description="Bytes of all weights after, as predicted")
    memory_bytes: int = Field(description="Memory that the plan asked for, in bytes")
    disk_bytes: int = Field(description="Free disk that the plan asked for, in bytes")
    notes: tuple[str, ...] = Field((), description="What the plan had to say, one sentence each")


class CalibrationData(Section):
    source: str = Field(description='Where the text came from: a file, a hub dataset, or "self"')
    tokens: int = Field(description="Tokens that ran through the model")
    sha256: str = Field(description="SHA-256 of those token ids")
    samples: int = Field(description="Windows of tokens")
    seq_len: int = Field(description="Tokens a window")
    seed: int = Field(description="Seed of the text or of the choice of windows")


class Module(Section):
    stage: int = Field(description="Number of the stage that compressed it, from 1")
    name: str = Field(description="Module name, such as model.layers.3.mlp.down_proj")
    method: str = Field(description="Method that compressed it")
    form: str = Field(description="What it is kept as, such as: 4 bit, group 64; 2:4; rank 144")
    bits_per_weight: float = Field(description="Bits a weight, scales, zero points and positions counted")
    shape: tuple[int, int] = Field(description="Rows and columns: (out, in)")
    error: float | None = Field(
        description="Relative error of the module's output on the calibration tokens: "
        "‖xWᵀ - xŴᵀ‖ / ‖xWᵀ‖, Frobenius norm; null if no tokens ran through it"
    )
    weight_error: float = Field(description="Relative error of the weights: ‖W - Ŵ‖ / ‖W‖, Frobenius norm")
    note: str = Field("", description="What was special about this module: a fallback, another group size")


class Size(Section):
    bytes_before: int | None = Field(description="Bytes of the original's weights; null if there is no original")
    bytes_after: int = Field(description="Bytes of the compressed model's weight files")
    ratio: float | None = Field(description="bytes_before / bytes_after")
    parameters: int = Field(description="Parameters of the whole model, tied ones counted once")
    compressed_parameters: int = Field(description="Parameters of the compressed linears")
    bits_per_weight: float | None = Field(
        description="Bits a parameter over the compressed linears, scales and zero points counted; "
        "null if nothing is compressed"
    )
    bits_per_parameter: float = Field(description="Bits a parameter over the whole model")


class Verification(Section):
    max_logit_difference: float = Field(
        description="Largest difference of a logit between the model in memory and the output reopened in a new process"
    )
    tokens: int = Field(description="Tokens that were compared")


class Time(Section):
    total_s: float = Field(description="Wall time from start to end, in seconds")
    phases: dict[str, float] = Field(
        default_factory=dict,
        description="Wall time of each phase, in seconds: forward_s, statistics_s, solve_s, write_s and others",
    )


class StageResult(Section):
    kind: str = Field(description="Kind of stage: quantize, prune, factorize or distill")
    method: str = Field(description="Its method with the setting that matters most, such as gptq-4bit")
    bytes_after: int = Field(description="Bytes of all weights after it")
    seconds: float | None = Field(description="Wall time, in seconds; null if an interrupted run had finished it")
    evaluation: EvaluationResult | None = Field(description="Quality after it; null if it was not measured")
    details: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="What it did: of training data, teacher, steps, losses, the best and the kept measurement and the "
        "curve; of structural pruning what was removed, by module; of bits chosen by measurement how many matrices got "
        "which, and the expected losses; of a rounded cache its codes, bytes a token and errors; empty where it is "
        "told in modules",
    )


class Environment(Section):
    python: str = Field(description="Version of Python")
    torch: str = Field(description="Version of PyTorch")
    transformers: str = Field(description="Version of transformers")
    compressed_tensors: str = Field(description="Version of compressed-tensors")
    platform: str = Field(description="Operating system and machine type")
    cpu: str = Field(description="Name of the processor")
    device: str = Field(description="Device that the work ran on: cpu or cuda with its name")
    threads: int = Field(description="Threads that PyTorch used")
    kernels: str = Field(description='Path that the kernels took: "compiled", or "reference", which is plain PyTorch')
    products: str = Field(description="The same for matrix products, which are compiled for CPUs with AVX2")


class Report(Section):
    schema_version: Literal[1] = Field(1, description="Version of this format")
    modelzip: str = Field(description="Version of modelzip")
    created: str | None = Field(None, description="When the report was made, ISO 8601; left out if not given")
    command: str = Field(description="Command that made it: quantize, run or evaluate")
    recipe: dict[str, JsonValue] = Field(description="The recipe with every default filled in")
    source: Source = Field(description="The model that was read")
    output: str | None = Field(description="Folder that was written; null if none was")
    plan: PlanSummary | None = Field(None, description="What was predicted before a weight was read")
    calibration: CalibrationData | None = Field(None, description="Calibration tokens; null if none were needed")
    stages: tuple[StageResult, ...] = Field((), description="What each stage left, in their order")
    modules: tuple[Module, ...] = Field((), description="The compressed linears")
    fallbacks: tuple[str, ...] = Field((), description="Everything that did not go as asked, one sentence each")
    evaluation: EvaluationResult | None = Field(None, description="Quality; null if it was switched off")
    size: Size = Field(description="What it weighs")
    verification: Verification | None = Field(None, description="The output reopened; null if none was written")
    time: Time = Field(description="Where the time went")
    peak_memory_mb: float | None = Field(None, description="Peak resident memory of the process, in MB (10^6 bytes)")
    environment: Environment = Field(description="Where it ran")
