"""A program for torch.export.load: the forward pass in torch's own operations, compressed matrices as they are stored.

The graph unpacks integers, multiplies factors and so on by plain torch: what opens it needs neither modelzip nor
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from modelzip.checkpoints.blocks import find_structure
from modelzip.checkpoints.reader import materialise, move_buffers
from modelzip.checkpoints.shards import disk_errors, require_room
from modelzip.evaluation.outputs import main_output
from modelzip.weights.embedding import embedding_of
from modelzip.weights.linear import linear_of
from modelzip.weights.module import CompressedModule
from modelzip.weights.value import CompressedWeight

from .dense import cast_note, plain_config
from .files import write_files
from .request import Request, Written
from .source import Source

PROGRAM: Final = "model.pt2"
OVERHEAD: Final = 16 << 20
"""Room in bytes for the program itself, beside its weights."""


def write(request: Request) -> Written:
    """Write `model.pt2`: a program of input_ids and attention_mask, int64 [batch, tokens] of any batch and length, that
    gives the logits, or the last hidden states of a model without a head.

    torch.export keeps all weights in memory, those that are compressed in their compressed form. Raises what
    `write_files` raises.
    """
    source = request.source
    dtype = request.dtype or request.checkpoint.dtype
    model = assembled(source, dtype)
    ids = torch.ones(2, 7, dtype=torch.int64)  # sizes of one would be taken for fixed
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sizes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in example}
    with torch.no_grad():
        program = torch.export.export(Forward(model), (), example, dynamic_shapes=sizes, strict=False)

    def make(folder: Path) -> None:
        nbytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in program.state_dict.values()}.values())
        require_room(folder, int(1.02 * nbytes) + OVERHEAD)  # torch's writer ends the process on a full disk
        with disk_errors(folder):
            torch.export.save(program, folder / PROGRAM)

    return Written(write_files(request, make, config=plain_config(request)), cast_note(request))


def misfit(source: Source, scheme: str) -> str | None:
    """Why the model can't be a program, or None. Only its forward pass over a whole text is one."""
    config = source.checkpoint.config
    if source.model.config.is_encoder_decoder:
        return f"a {config['model_type']} has an encoder and a decoder, and torch-export holds models of one text"
    structure = find_structure(source.model, source.checkpoint, names=source.names)
    router = next((name for name, reason in structure.left_alone if reason == "router"), None)
    if router is not None:
        return f"{router} sends each token to experts of its own, which no program of fixed steps does"
    return None


def answer(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the program gives, opened by torch alone."""
    program = torch.export.load(path / PROGRAM).module()
    ids = inputs["input_ids"]
    with torch.inference_mode():
        output: Tensor = program(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output.float()


class Forward(nn.Module):
    """The model's forward pass as a function of tensors to a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return main_output(self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True))


def assembled(source: Source, dtype: torch.dtype) -> Any:
    """The model with its compressed matrices as modules that compute with them, and all else in `dtype`."""
    model = source.model
    model.config.use_cache = False
    owners: dict[str, CompressedModule] = {}
    for path in list(source.matrices()):
        owner = source.owner(path)
        weight = source.weight(path) if owner not in owners else owners[owner].weight_value
        if weight is None:
            continue
        module = _module(weight, model.get_submodule(path), dtype)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
        if isinstance(module, CompressedModule):
            owners[owner] = module
    move_buffers(model, "cpu")
    materialise(model, [""], checkpoint=source.checkpoint, names=source.names, device="cpu", dtype=dtype)
    return model


def _module(weight: CompressedWeight, like: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(like, nn.Embedding):
        return embedding_of(weight, like, dtype=dtype)
    return linear_of(weight, getattr(like, "bias", None))
