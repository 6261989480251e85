"""AWQ's layout in its version `gemm` (Lin et al. 2023; as AutoAWQ wrote it, and GPTQModel, vLLM and transformers read
it).

Of a linear: `qweight` int32 [in, out / 8], 4-bit codes of a row, eight to a word in the order of ORDER; `qzeros` int32
[groups, out / 8], zero points packed so; `scales` float16 [groups, out]. A symmetric grid is one with zero points of 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from modelzip.checkpoints.blocks import Linear
from modelzip.kernels.bitpack import pack, unpack
from modelzip.weights.affine import Affine

from . import columns
from .dense import cast_entries, cast_note, plain_config
from .folder import write_folder
from .plain import answer_by_transformers
from .request import Request, Written
from .skipped import converted
from .source import Source

LAYOUT: Final = columns.Layout("awq", bits=(4,), groups=(16, 32, 64, 128))
"""What GPTQModel's kernels for CPU take; vLLM takes groups of 32, 64, 128 or all."""

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight codes lies at bits 0 ... 3 of a word, which at bits 4 ... 7, and so on."""


def misfit(source: Source, scheme: str) -> str | None:
    """Why awq can't hold the model, or None."""
    if (clause := columns.misfit(source, LAYOUT)) is not None:
        return clause
    packed = [linear.name for linear in columns.packed_linears(source)]
    is_packed = converted(source.model, _dense(source, packed), defaults=True)
    if left := next((name for name in packed if not is_packed(name)), None):
        return f"{left} is compressed, and transformers opens it dense in a model of this type"
    return None


def write(request: Request) -> Written:
    """Write the checkpoint with its integers in AWQ's layout, one linear in memory at a time.

    Raises OutputError for a scale beyond float16.
    """
    source = request.source
    linears = columns.packed_linears(source)
    size = columns.group_size(linears.values())
    coarse = sum(columns.fitting_scales(source, *pair, size)[1] for pair in linears.items())

    def parts(linear: Linear, weight: Affine) -> dict[str, Tensor]:
        scales, _ = columns.fitting_scales(source, linear, weight, size)
        codes = unpack(weight.packed, weight.bits, weight.shape[1])
        return {
            "qweight": _words(codes.T),
            "qzeros": _words(columns.unsigned_zero_points(scales)),
            "scales": scales.scale.T,
        }

    claimed = {part for linear in linears for part in source.parts(linear.name).values()}
    entries = [*columns.entries(source, linears, parts), *cast_entries(request.checkpoint, request.dtype, claimed)]
    config = {**plain_config(request), "quantization_config": _config(source, linears)}
    notes = (*columns.coarse_note(coarse), *cast_note(request))
    return Written(write_folder(request, entries, format="awq", config=config), notes)


def _words(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, columns] of 4 bits to int32 words [rows, columns / 8]."""
    return pack(codes.reshape(len(codes), -1, 8)[..., list(ORDER)].flatten(1), 4)


def _config(source: Source, linears: Mapping[Linear, Affine]) -> dict[str, Any]:
    packed = [linear.name for linear in linears]
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": columns.group_size(linears.values()),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _dense(source, packed),
    }


def _dense(source: Source, packed: list[str]) -> list[str]:
    return [
        name for name, module in source.model.named_modules() if isinstance(module, nn.Linear) and name not in packed
    ]


def answer(folder: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output of the model opened by transformers, which takes GPTQModel: linears in fp16 by its plain kernel, the
    rest in fp32.
    """
    from transformers.utils.quantization_config import AwqBackend, AwqConfig

    return answer_by_transformers(folder, inputs, quantization_config=AwqConfig(backend=AwqBackend.TORCH_AWQ))
