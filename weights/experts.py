"""Experts of a mixture one by one, as linears: what can be compressed of those that transformers keeps in one tensor.

transformers holds the experts of a layer as 3-D parameters, gate_up_proj [experts, 2·inner, hidden] and down_proj
[experts, hidden, inner] (up_proj [experts, inner, hidden] where nothing is gated; the last two dimensions exchanged in
classes that say so). Here each expert has a linear for each of them, under the parameter's name: `experts.3.down_proj`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

UNFUSED: Final = "unfused"
"""Entry of modelzip's `quantization_config`: the modules whose experts are stored one by one."""
BIAS: Final = "_bias"
"""What follows a projection's name in that of its biases, [experts, out]."""


class Expert(nn.Module):
    """One expert: its linears by the names of the parameters that they are slices of."""

    def __init__(self, fused: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        for name in names:
            _, *shape = fused.get_parameter(name).shape
            rows, columns = reversed(shape) if fused.is_transposed else shape
            parameter = fused.get_parameter(name)
            like: dict[str, Any] = {"device": "meta", "dtype": parameter.dtype}
            linear = nn.Linear(columns, rows, bias=name + BIAS in fused._parameters, **like)
            self.add_module(name, linear.requires_grad_(parameter.requires_grad))


class Experts(nn.ModuleList):
    """Takes the place of a module of fused experts and does what it does, each expert for the tokens sent to it.

    The module's class says what happens between the two products; its tensors are let go.
    """

    def __init__(self, fused: nn.Module) -> None:
        projections = projections_of(fused)
        count = fused.get_parameter(projections[-1]).shape[0]
        super().__init__(Expert(fused, projections) for _ in range(count))
        for name in list(fused._parameters):
            fused._parameters[name] = None
        self.num_experts = count
        self.parts = projections
        self._fused = (fused,)  # in a tuple, so that it is no part of the model

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden]. top_k_index, top_k_weights: the experts of each token and what each counts
        for, [tokens, k]; numbers beyond the last expert are of none."""
        out = hidden_states.new_zeros(hidden_states.shape)
        for expert, tokens, slots in self._shares(top_k_index):
            made = self._one(expert, hidden_states[tokens]) * top_k_weights[tokens, slots, None]
            out.index_add_(0, tokens, made.to(out.dtype))
        return out

    def _one(self, expert: Any, x: Tensor) -> Tensor:
        fused: Any = self._fused[0]
        between = fused._apply_gate if fused.has_gate else fused.act_fn
        first, last = (expert.get_submodule(name) for name in self.parts)
        y: Tensor = last(between(first(x)))
        return y

    def _shares(self, chosen: Tensor) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """Each expert that is chosen, with the tokens that chose it and at which place of theirs.

        On the meta device, where nothing was chosen, all experts get alike.
        """
        if chosen.is_meta:
            shares = torch.arange(chosen.numel()).tensor_split(len(self))
            for expert, places in zip(self, shares, strict=True):
                yield expert, places.to("meta") // chosen.shape[1], places.to("meta") % chosen.shape[1]
            return
        for number in torch.unique(chosen).tolist():
            if number < len(self):
                tokens, slots = torch.where(chosen == number)
                yield self[number], tokens, slots


def projections_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the first and the last product's parameter of a module of fused experts that this knows to take apart;
    empty for other modules."""
    known: Any = module
    if not hasattr(module, "_apply_gate") or getattr(module, "has_post_expert_norm", True):
        return ()
    names = ("gate_up_proj" if known.has_gate else "up_proj", "down_proj")
    biases = tuple(name + BIAS for name in names) if known.has_bias else ()
    own = {name for name, _ in module.named_parameters()}
    shapes = [module._parameters[name].ndim for name in names if module._parameters.get(name) is not None]  # type: ignore[union-attr]
    has_state = any(True for _ in module.buffers())
    return names if own == {*names, *biases} and shapes == [3, 3] and not has_state else ()


def fused_experts(model: nn.Module) -> list[str]:
    """Paths of the modules of fused experts that can be taken apart."""
    return [name for name, module in model.named_modules() if projections_of(module)]


def unfuse(model: nn.Module, paths: Iterable[str]) -> None:
    """Put `Experts` in the place of these modules; one that isn't in this model, or isn't fused, is passed over."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        fused = model.get_submodule(path)
        if projections_of(fused):
            setattr(model.get_submodule(parent), leaf, Experts(fused))
