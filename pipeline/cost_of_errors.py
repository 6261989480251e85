"""What the error of a matrix costs the model's output, from gradients: no model with the error in it is ever run.

A small change δ of what a linear puts out changes the model's distribution by KL ≈ ½ δᵀ F δ (Kullback 1959), with F the
Fisher information: the mean of g gᵀ, g the gradient of how unlikely a prediction is that the model has drawn from its
own output. An error ΔW makes δ = ΔW x at every position of a text, so that a text costs ½ (Σ_t gₜᵀ ΔW xₜ)².

Errors of different rows are taken for independent, as rows are rounded apart from each other:
½ Σ_o (Σ_t g_to (ΔW xₜ)_o)² has the same mean then, and far less noise. The sum over positions stays inside the square:
errors of a value projection are alike at all positions, and attention adds them up. Inputs and gradients are those of
the same positions, which matters too: a position whose input is huge may be one that nothing turns on. (K-FAC, Martens
& Grosse 2015, averages both apart; tried on SmolLM2-135M, it told less well which matrix costs how much.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .importance import Batch, surprise


def costs_of_errors(
    model: nn.Module,
    modules: Mapping[str, str],
    errors: Callable[[str], Iterable[Tensor]],
    texts: Sequence[Batch],
    generator: torch.Generator,
    *,
    step: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """What each of a matrix's errors costs alone, in nats a position of the output: fp64, [errors].

    modules: for each linear the name of its matrix, which may serve several. errors: from such a name to ΔW [out, in],
    one after the other. texts: one sample each, which the errors shouldn't have been fitted to. The model must be whole
    in memory. A matrix that no token reaches isn't in the result. step: told the number of texts done.
    """
    totals: dict[str, Tensor] = {}
    positions = 0
    for number, text in enumerate(texts, 1):
        sums: dict[str, Tensor] = {}
        with torch.enable_grad(), _watched(model, modules, errors, sums):
            unlikely, _ = surprise(model(**text), generator)
            torch.autograd.backward(unlikely.sum())
        positions += unlikely.numel()
        for name, rows in sums.items():
            squares = rows.double().square().sum(1).cpu()
            totals[name] = totals[name] + squares if name in totals else squares
        step(number)
    return {name: total / (2 * positions) for name, total in totals.items()}


@contextmanager
def _watched(
    model: nn.Module, modules: Mapping[str, str], errors: Callable[[str], Iterable[Tensor]], sums: dict[str, Tensor]
) -> Iterator[None]:
    """Hooks that sum g (ΔW x) over positions, for each row of each error, [errors, out], as the gradient comes back."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()

            def add(gradient: Tensor) -> None:
                changes = (nn.functional.linear(x, one.to(x)) for one in errors(name))
                rows = torch.stack([(gradient * change).flatten(0, -2).float().sum(0) for change in changes])
                sums[name] = sums[name] + rows if name in sums else rows

            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = [model.get_submodule(module).register_forward_hook(watch(name)) for module, name in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
