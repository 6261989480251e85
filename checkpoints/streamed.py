"""A model whose weights come and go: a skeleton, one block's weights at a time, matrix products at the CPU's best."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modelzip.kernels.mixed_linear import mixed_linear
from modelzip.weights.inputs import Rounds, rounds_of_weight, straight_through
from modelzip.weights.value import CompressedWeight

from .blocks import Block, Structure, find_structure
from .index import Checkpoint
from .memory import give_back
from .reader import Decode, NameMap, materialise, move_buffers, release
from .skeleton import skeleton
from .spill import Spill
from .walk import Stop, Walk

RoundsOf: TypeAlias = Callable[[str, Mapping[str, str]], Rounds | None]

HEAD_ROWS = 8192
"""Rows of an output head that are cast to the type of the product at once."""

KEPT_BYTES = 256 << 20
"""A head up to this size stays while outputs are made; to read a larger one for each takes little beside its blocks."""


def native_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are fast there: always on accelerators, on CPUs with AVX-512 BF16 or AMX."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class StreamedModel:
    """Checkpoint `checkpoint` as a model on the meta device, with `load` and `free` for a block's weights.

    dtype: of activations, norms and biases. Matrix products run in fp32 where the CPU has no fast units for `dtype`.
    decode: makes the dense weight of a linear that the checkpoint holds compressed. rounds: what becomes of the inputs
    of such a linear, by its name and parts (suffix: tensor); None for those that take them as they come.
    products: the weight itself of such a linear whose product is to be the weight's own, since the reopened model's is:
    where inputs are rounded, a sum in another order can move the next linear's inputs to other numbers. Used without
    gradients.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        decode: Decode | None = None,
        rounds: RoundsOf | None = None,
        products: Callable[[str, Mapping[str, str]], CompressedWeight] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.product_dtype = torch.float32 if dtype != torch.float32 and not native_bfloat16(device) else dtype
        self.model = skeleton(checkpoint)
        for module in self.model.modules():  # stacks of encoder-decoders have configs of their own
            config: Any = getattr(module, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = False
        self.names = NameMap(self.model, checkpoint)
        self.structure: Structure = find_structure(self.model, checkpoint, names=self.names)
        move_buffers(self.model, device)
        self._decode = decode
        self._outside: set[str] = set()
        self._stand_ins: dict[str, Callable[[], Tensor]] = {}
        self._rounds: dict[str, Rounds] = {}
        self._products = products
        self._held: dict[str, CompressedWeight] = {}
        self._modules = dict(self.model.named_modules())
        for name, module in self._modules.items():
            if isinstance(module, nn.Linear | Conv1D):
                if rounds is not None and (parts := self.names.parts(name)):
                    self._round(name, rounds(name, parts))
                product = _product(module, self.product_dtype)
                module.forward = self._of_rounded(name, product)  # type: ignore[method-assign]
            elif isinstance(module, nn.Embedding):
                module.register_forward_hook(_cast(dtype))

    def load(self, block: Block) -> None:
        """Give the block's parameters real values; the weights of its linears in the type of the products."""
        self._fill([block.name], self.dtype)
        for name in (*(linear.name for linear in block.linears), *block.sharers):
            self.set_weight(name, self.linear(name).weight.data)
            if self._products is not None and name in self._rounds:
                self._held[name] = self._products(name, self.names.parts(name))

    def free(self, block: Block) -> None:
        """Take the block's values away."""
        self._held.clear()
        release(self.model, [block.name])

    def linear(self, name: str) -> nn.Linear | Conv1D:
        module = self._modules[name]
        assert isinstance(module, nn.Linear | Conv1D)
        return module

    def weight(self, name: str) -> Tensor:
        """The weight of a loaded linear, [out, in]."""
        module = self.linear(name)
        return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data

    def set_weight(self, name: str, stored: Tensor) -> None:
        """Exchange the weight of a loaded linear; `stored` lies as the module stores it ([in, out] for a Conv1D)."""
        self.linear(name).weight.data = stored.to(self.product_dtype)
        self._held.pop(name, None)

    def replace(self, name: str, weight: Tensor) -> None:
        """Exchange the weight [out, in] of a loaded linear."""
        self.set_weight(name, weight.T if isinstance(self.linear(name), Conv1D) else weight)

    def hold(self, name: str, weight: CompressedWeight) -> None:
        """Let a loaded linear compute as this weight does: with its matrix, and with inputs that it rounds."""
        self.replace(name, weight.dense(torch.float32).to(self.device))
        self._round(name, rounds_of_weight(weight))

    def _round(self, name: str, rounds: Rounds | None) -> None:
        if rounds is not None:
            self._rounds[name] = straight_through(rounds)

    def _of_rounded(self, name: str, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if name in self._held and not torch.is_grad_enabled():
                made, bias = self._held[name].matmul(x), self.linear(name).bias
                return made if bias is None else made + bias
            rounds = self._rounds.get(name)
            return product(x if rounds is None else rounds(x))

        return forward

    def stand_in(self, name: str, read: Callable[[], Tensor]) -> None:
        """From now on, a module outside the blocks gets this weight when it is reached, not the checkpoint's."""
        self._stand_ins[name] = read

    def free_outside(self) -> None:
        """Take away what modules outside the blocks (embeddings, heads, final norms) were given."""
        if self._outside:
            release(self.model, sorted(self._outside))
            self._outside.clear()
            give_back()

    def walk(self, batches: Sequence[Mapping[str, Tensor]], *, spill_limit: int, spill_folder: Path | None) -> Walk:
        """The batches' forwards, stopping at every block."""
        return Walk(
            self.model,
            [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches],
            blocks=[block.name for block in self.structure.blocks],
            outside=self._load_outside,
            spill=Spill(spill_limit, spill_folder),
        )

    def through(self, walk: Walk, block: Block) -> None:
        """Load a block, let all batches that wait at it run through it unchanged, free it."""
        self.load(block)
        for batch in range(len(walk)):
            if walk.at[batch].module == block.name:
                walk.advance(batch)
        self.free_outside()
        self.free(block)

    def outputs(self, batches: Sequence[Mapping[str, Tensor]]) -> Generator[Any, None, None]:
        """The forward's output for each batch, one in memory at a time; all go through each block together."""
        walk = self.walk(batches, spill_limit=sys.maxsize, spill_folder=None)
        *before, last = self.structure.blocks
        try:
            start(walk, self)
            for block in before:
                self.through(walk, block)
            self.load(last)
            for batch in range(len(walk)):
                output = walk.advance(batch).output
                if self._outside_bytes() > KEPT_BYTES:
                    self.free_outside()
                yield output
                del output
        finally:
            walk.close()
            self.free(last)
            self.free_outside()

    def _outside_bytes(self) -> int:
        """Of what modules outside the blocks hold now."""
        modules = (self._modules[name] for name in self._outside)
        return sum(
            parameter.nbytes for module in modules for parameter in module._parameters.values() if parameter is not None
        )

    def _load_outside(self, name: str) -> None:
        if name not in self._outside:
            if name in self._stand_ins:
                weight = self._stand_ins[name]().to(self.device)
                self._modules[name]._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            module = self._modules[name]
            # Scaled embeddings multiply: that must be done in the type of the activations.
            as_stored = isinstance(module, nn.Linear) or type(module).forward is nn.Embedding.forward
            dtype = None if as_stored else self.dtype
            if isinstance(module, nn.Linear) and module.weight.numel() * self.product_dtype.itemsize <= KEPT_BYTES:
                dtype = self.product_dtype
            self._fill(_own_state(name, module), dtype)
            self._outside.add(name)

    def _fill(self, prefixes: Sequence[str], dtype: torch.dtype | None) -> None:
        materialise(
            self.model,
            prefixes,
            checkpoint=self.checkpoint,
            names=self.names,
            device=self.device,
            dtype=dtype,
            decode=self._decode,
        )


def _own_state(name: str, module: nn.Module) -> list[str]:
    """Names of a module's own parameters and persistent buffers, not those of its children."""
    persistent = [leaf for leaf in module._buffers if leaf not in module._non_persistent_buffers_set]
    return [f"{name}.{leaf}".strip(".") for leaf in (*module._parameters, *persistent)]


def start(walk: Walk, streamed: StreamedModel) -> None:
    """Bring every batch to its first block."""
    for batch in range(len(walk)):
        walk.advance(batch)
    streamed.free_outside()


def _product(module: nn.Linear | Conv1D, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The module's forward, its product in `dtype`, the result in the input's type."""

    def forward(x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.to(dtype)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        if weight.dtype == dtype == x.dtype:
            return nn.functional.linear(x, weight, bias)
        if torch.is_grad_enabled():  # the product below has no gradient
            return nn.functional.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)
        if weight.dtype == dtype == torch.float32:
            return mixed_linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        y = x.to(dtype)
        for begin in range(0, weight.shape[0], HEAD_ROWS):
            rows = slice(begin, begin + HEAD_ROWS)
            out[..., rows] = nn.functional.linear(y, weight[rows].to(dtype), None if bias is None else bias[rows])
        return out

    return forward


def _cast(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(dtype)

    return hook


__all__ = ["Decode", "Stop", "StreamedModel", "native_bfloat16", "start"]
