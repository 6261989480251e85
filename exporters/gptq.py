"""GPTQ's layout (Frantar et al. 2022; as AutoGPTQ wrote it first, and GPTQModel, vLLM and transformers read it).

Of a linear: `qweight` int32 [in * bits / 32, out], codes of a column packed from the lowest bit on; `qzeros` int32
[groups, out * bits / 32], zero points of a row packed so; `scales` float16 [groups, out]; `g_idx` int32 [in], the group
of each input. Version 1 stores zero points less one, and readers add ones to whole words: a zero point of 0 would take
its one from a neighbour. Version 2 stores zero points as they are. All readers know version 1, which symmetric grids
get; GPTQModel takes asymmetric ones that it didn't make itself in version 2 alone, so that is theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.blocks import Linear, find_structure
from modelzip.checkpoints.errors import OutputError
from modelzip.kernels.bitpack import pack
from modelzip.recipes.export_formats import AUTO
from modelzip.weights.affine import Affine

from . import columns
from .dense import cast_entries, cast_note, plain_config
from .folder import write_folder
from .plain import answer_by_transformers
from .request import Request, Written
from .source import Source

LAYOUT: Final = columns.Layout("gptq", bits=(2, 3, 4, 8), groups=(16, 32, 64, 128, 256, 512, 1024))
"""What GPTQModel's plain kernel takes; vLLM takes groups of 32, 64, 128 or all."""

V1, V2 = "v1", "v2"
NAMES: Final = {V1: "gptq", V2: "gptq_v2"}
"""What config.json calls the versions."""


def misfit(source: Source, scheme: str) -> str | None:
    """Why gptq can't hold the model, or None."""
    if source.model.main_input_name != "input_ids":
        return f"it reads {source.model.main_input_name}, and transformers opens gptq of models of text alone"
    return columns.misfit(source, LAYOUT)


def write(request: Request) -> Written:
    """Write the checkpoint with its integers in GPTQ's layout, one linear in memory at a time.

    Raises OutputError for a scale beyond float16, and for a zero point that version 1 can't hold.
    """
    source = request.source
    linears = columns.packed_linears(source)
    size = columns.group_size(linears.values())
    version, notes = _version(request, source, linears)

    def parts(linear: Linear, weight: Affine) -> dict[str, Tensor]:
        scales, _ = columns.fitting_scales(source, linear, weight, size)
        stored = columns.unsigned_zero_points(scales) - int(version == V1)
        group = torch.arange(scales.scale.shape[1], dtype=torch.int32)
        return {
            "qweight": weight.packed.T,
            "qzeros": pack(stored, weight.bits),
            "scales": scales.scale.T,
            "g_idx": group.repeat_interleave(scales.group_size),
        }

    claimed = {part for linear in linears for part in source.parts(linear.name).values()}
    entries = [*columns.entries(source, linears, parts), *cast_entries(request.checkpoint, request.dtype, claimed)]
    config = {**plain_config(request), "quantization_config": _config(source, linears, version)}
    return Written(write_folder(request, entries, format=f"gptq-{version}", config=config), notes)


def _version(request: Request, source: Source, linears: Mapping[Linear, Affine]) -> tuple[str, tuple[str, ...]]:
    """The version to write, and what is to be said of rounding: all scales are read before anything is written."""
    is_symmetric = all(weight.zero_point is None for weight in linears.values())
    version = request.scheme if request.scheme != AUTO else V1 if is_symmetric else V2
    coarse = 0
    for linear, weight in linears.items():
        scales, is_coarse = columns.fitting_scales(source, linear, weight, -1)
        coarse += is_coarse
        if version == V1 and not bool(columns.unsigned_zero_points(scales).all()):
            raise OutputError(
                f"{linear.name} has zero points of 0, which version 1 of gptq can't hold: choose --scheme v2."
            )
    return version, (*columns.coarse_note(coarse), *cast_note(request))


def _config(source: Source, linears: Mapping[Linear, Affine], version: str) -> dict[str, Any]:
    """quantization_config: the grid, and which linears are packed, in the words of each reader.

    transformers (by optimum) packs all linears under one path, or those that it is given a list of; GPTQModel and vLLM
    pack all linears of the blocks but those that `dynamic` takes out.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": next(iter(linears.values())).bits,
        "group_size": columns.group_size(linears.values()),
        "sym": all(weight.zero_point is None for weight in linears.values()),
        "desc_act": False,
        "checkpoint_format": NAMES[version],
        "lm_head": False,
        "pack_dtype": "int32",
    }
    packed = {linear.name for linear in linears}
    structure = find_structure(source.model, source.checkpoint, names=source.names)
    stacks = {block.name.rpartition(".")[0] for block in structure.blocks}
    path = config["block_name_to_quantize"] = stacks.pop() if len(stacks) == 1 else ""
    under = {name for name, module in source.model.named_modules() if name.startswith(path) and _is_matrix(module)}
    if under != packed:
        config["modules_in_block_to_quantize"] = [sorted(packed)]
    if left := [linear.name for block in structure.blocks for linear in block.linears if linear.name not in packed]:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
    return config


def _is_matrix(module: nn.Module) -> bool:
    """Whether optimum takes the module for one that is packed."""
    return type(module) is nn.Linear or isinstance(module, Conv1D | nn.Conv2d)


def answer(folder: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output of the model opened by transformers, which takes optimum and GPTQModel: activations in fp32, weights
    as GPTQModel's plain kernel makes them of integers and scales.
    """
    from transformers import GPTQConfig

    bits = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["bits"]
    return answer_by_transformers(folder, inputs, quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"))
