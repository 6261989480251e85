"""The model that a checkpoint holds, weight by weight: compressed ones as the values that they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.loaded import decode_of
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.reader import materialise, release
from modelzip.checkpoints.skeleton import skeleton
from modelzip.weights.layouts import decoder, stored
from modelzip.weights.module import CompressedModule
from modelzip.weights.value import CompressedWeight


@dataclass(frozen=True, eq=False)
class Source:
    """model: on the meta device; all names that the methods here take are its own, and modules are named by path.

    names: where each of its parameters is stored.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    names: NameMap

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Source:
        """Reads no weights. Raises CheckpointError for a layout or a model that modelzip doesn't know."""
        decode_of(checkpoint)
        model = skeleton(checkpoint)
        return cls(checkpoint, model, NameMap(model, checkpoint))

    def matrices(self) -> Iterator[str]:
        """Linears and embeddings, each under every name that it has."""
        for path, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding | CompressedModule):
                yield path

    def parts(self, module: str) -> dict[str, str]:
        """Tensors of the checkpoint, by suffix (`weight_packed`, ...), of a matrix that is stored compressed, or tied
        to one; empty for others.
        """
        return self.names.parts(self.owner(module))

    def owner(self, module: str) -> str:
        """The matrix whose weight is stored, of those that are tied to this one; itself if none is."""
        return self.names.owner(f"{module}.weight").removesuffix(".weight")

    def stored(self, module: str) -> CompressedWeight | None:
        """The weight of a matrix that is stored compressed, on the meta device; None for others. Reads no weights."""
        parts = self.parts(module)
        if not parts:
            return None
        infos = {suffix: self.checkpoint.tensors[name] for suffix, name in parts.items()}
        empty = {
            suffix: torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta") for suffix, one in infos.items()
        }
        return stored(self.checkpoint.quantization or {}, self.owner(module), empty, self.shape(module))

    def weight(self, module: str) -> CompressedWeight | None:
        """The weight of a matrix that is stored compressed, read; None for others."""
        parts = self.parts(module)
        if not parts:
            return None
        tensors = self.checkpoint.read(parts.values())
        decode = decoder(self.checkpoint.quantization or {})
        return decode(self.owner(module), {suffix: tensors[name] for suffix, name in parts.items()})

    def dense(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of any matrix, [out, in] also of a Conv1D, compressed or not."""
        weight = self.weight(module)
        if weight is not None:
            return weight.dense(dtype)
        tensor = self.parameter(f"{module}.weight", dtype)
        return tensor.T.contiguous() if isinstance(self.model.get_submodule(module), Conv1D) else tensor

    def parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter or persistent buffer, as its module keeps it, ties followed. dtype: of a floating one; None
        leaves it as stored. Not for a weight that is stored compressed: see `weight` and `dense`.
        """
        materialise(self.model, [name], checkpoint=self.checkpoint, names=self.names, device="cpu", dtype=dtype)
        tensor: Tensor = self.model.state_dict()[name]
        release(self.model, [name])
        return tensor

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a linear, (rows, width) of an embedding."""
        found = self.model.get_submodule(module)
        if isinstance(found, CompressedModule):
            rows, columns = found.weight_meta["shape"]
            return rows, columns
        rows, columns = found.get_parameter("weight").shape
        return (columns, rows) if isinstance(found, Conv1D) else (rows, columns)
