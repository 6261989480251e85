"""What `export` writes: the formats, how each can store matrices, and what it is called. Known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

FormatName: TypeAlias = Literal["dense", "compressed-tensors", "gptq", "awq", "bnb-nf4", "gguf", "onnx", "torch-export"]
AUTO: Final = "auto"
FLOATS: Final = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExportFormat:
    """title: what it is, after the format's name. schemes: other ways than `auto` to store matrices, with what each is.

    dtypes: types that floating tensors can be given.
    """

    title: str
    schemes: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = FLOATS


FORMATS: Final[Mapping[str, ExportFormat]] = MappingProxyType(
    {
        "dense": ExportFormat("a plain checkpoint, every matrix as the compressed model computes with it"),
        "compressed-tensors": ExportFormat(
            "safetensors that vLLM and transformers open by the compressed-tensors library",
            {
                "W8A8": "int8 weights by channel, activations rounded to int8 by token as it runs",
                "FP8": "fp8 (e4m3) weights by channel, activations rounded to fp8 by token as it runs",
            },
        ),
        "gptq": ExportFormat(
            "GPTQ's layout, which GPTQModel, vLLM and transformers open",
            {"v1": "zero points less one, as most engines read them", "v2": "zero points as they are"},
            dtypes=("bfloat16", "float16"),
        ),
        "awq": ExportFormat("AWQ's gemm layout, 4 bits, for GPTQModel, vLLM and transformers", dtypes=("float16",)),
        "bnb-nf4": ExportFormat("4-bit NormalFloat, which transformers opens by bitsandbytes"),
        "gguf": ExportFormat(
            "a .gguf file for llama.cpp",
            {
                "F32": "4 bytes a weight",
                "F16": "2 bytes a weight",
                "BF16": "2 bytes a weight",
                "Q8_0": "8 bits, 32 weights to a scale",
                "Q4_0": "4 bits symmetric, 32 weights to a scale",
                "Q4_1": "4 bits asymmetric, 32 weights to a scale and a minimum",
                "Q4_K": "4 bits asymmetric, 256 weights to 8 scales and minima of 6 bits",
            },
            dtypes=(),
        ),
        "onnx": ExportFormat(
            "a folder for onnxruntime and transformers.js",
            {
                "fp32": "4 bytes a weight",
                "int8": "8-bit integers with a scale to each row",
                "int4": "4-bit integers with a scale and a zero point to 32 weights",
            },
            dtypes=(),
        ),
        "torch-export": ExportFormat("a program for torch.export.load"),
    }
)


def either_format(*, markdown: bool = False) -> str:
    """The names with what each is, for a help text."""
    quote = "`" if markdown else ""
    return "; ".join(f"{quote}{name}{quote}: {one.title}" for name, one in FORMATS.items())
