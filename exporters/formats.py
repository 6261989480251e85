"""The formats that a checkpoint can be written in, by name: what writes each, and what opens it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final

from torch import Tensor

from modelzip.checkpoints.blocks import is_own
from modelzip.checkpoints.cached import without_rounded_cache
from modelzip.checkpoints.errors import CheckpointError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.export_formats import AUTO
from modelzip.weights.experts import UNFUSED
from modelzip.weights.layouts import COMPRESSED_TENSORS, rounds_inputs

from . import awq, bnb_nf4, compressed_tensors, dense, gguf, gptq, onnx, torch_export
from .plain import answer_by_transformers
from .request import Request, Written
from .source import Source


@dataclass(frozen=True)
class Format:
    """write: what makes the output. misfit: why it can't hold the model, from headers alone and as a clause, or None.

    answer: the output of the consumer on inputs, in a process of its own. writers, readers: packages that writing and
    `answer` take, by the names that they are imported by. precision: how far a logit may be from modelzip's own, as a
    part of the largest, where no weight was rounded.
    """

    write: Callable[[Request], Written]
    misfit: Callable[[Source, str], str | None]
    answer: Callable[[Path, Mapping[str, Tensor]], Tensor]
    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    precision: float = 1e-3


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "dense": Format(dense.write, dense.misfit, answer_by_transformers),
        "compressed-tensors": Format(
            compressed_tensors.write,
            compressed_tensors.misfit,
            answer_by_transformers,
            readers=("compressed_tensors",),
        ),
        "gptq": Format(gptq.write, gptq.misfit, gptq.answer, readers=("gptqmodel", "optimum"), precision=0.04),
        "awq": Format(awq.write, awq.misfit, awq.answer, readers=("gptqmodel",), precision=0.1),
        "bnb-nf4": Format(
            bnb_nf4.write,
            bnb_nf4.misfit,
            answer_by_transformers,
            writers=("bitsandbytes",),
            readers=("bitsandbytes",),
        ),
        "gguf": Format(gguf.write, gguf.misfit, gguf.answer, readers=("llama_cpp",), precision=0.12),
        "onnx": Format(
            onnx.write,
            onnx.misfit,
            onnx.answer,
            writers=("onnx", "onnxscript"),
            readers=("onnxruntime",),
            precision=0.02,
        ),
        "torch-export": Format(torch_export.write, torch_export.misfit, torch_export.answer, precision=0.03),
    }
)


PACKAGES: Final = MappingProxyType({"llama_cpp": "llama-cpp-python"})
"""What a package is installed by, where that isn't what it is imported by."""


def refusal(request: Request, format: str) -> str | None:
    """Why the checkpoint can't be written so, with the formats that can hold it; from headers alone. None if it can."""
    request = replace(request, checkpoint=held(request.checkpoint, format))
    checkpoint = request.checkpoint
    if lacking := _lacking(FORMATS[format].writers):
        return f"To write {format}, install {lacking}: pip install 'modelzip[export]'."
    if is_own(checkpoint) and format != "dense":
        return f"{checkpoint.source} is a student of a kind that only modelzip opens, which {format} can't hold."
    source = request.source
    if rounds_inputs(checkpoint.quantization or {}) and format != COMPRESSED_TENSORS:
        return (
            f"{checkpoint.source}: its linears round their inputs, which {format} doesn't say; export the "
            "original, or another result of it."
        )
    misfit = _misfit(format, source, request.scheme)
    if misfit is None:
        return None
    others = [name for name in FORMATS if name != format and _holds(name, source)]
    can = f"what can hold it is {', '.join(others)}" if others else "keep it in modelzip's own layout"
    return f"{checkpoint.source}: {misfit}; {can}."


def export(request: Request, format: str) -> Written:
    """Write a checkpoint in a format of FORMATS. Raises RecipeError for one that isn't there, CheckpointError if the
    format can't hold the checkpoint, and what the format's own function raises.
    """
    if format not in FORMATS:
        raise RecipeError(f"There is no format {format}: take {' or '.join(FORMATS)}.")
    if (problem := refusal(request, format)) is not None:
        raise CheckpointError(problem)
    stripped = held(request.checkpoint, format)
    if stripped is request.checkpoint:
        return FORMATS[format].write(request)
    written = FORMATS[format].write(replace(request, checkpoint=stripped))
    return replace(written, notes=(*written.notes, f"keys and values are rounded no more, which {format} doesn't say"))


def held(checkpoint: Checkpoint, format: str) -> Checkpoint:
    """What of the checkpoint's model the format can say: only compressed-tensors, that keys and values are rounded."""
    return checkpoint if format == COMPRESSED_TENSORS else without_rounded_cache(checkpoint)


def missing_reader(format: str) -> str | None:
    """The package that opens the format, if it isn't installed."""
    return _lacking(FORMATS[format].readers)


def _misfit(format: str, source: Source, scheme: str) -> str | None:
    if format != "dense" and (source.checkpoint.quantization or {}).get(UNFUSED):
        return f"its experts are compressed one by one, which {format} doesn't say"
    return FORMATS[format].misfit(source, scheme)


def _holds(format: str, source: Source) -> bool:
    try:
        return _misfit(format, source, AUTO) is None
    except CheckpointError:  # of a model that the format knows nothing of
        return False


def _lacking(packages: tuple[str, ...]) -> str | None:
    return next((PACKAGES.get(one, one) for one in packages if find_spec(one) is None), None)
