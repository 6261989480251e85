"""Who leaves a batch early: the rule, and hooks by which samples leave an encoder between two of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class EverybodyLeftError(Exception):
    """Not a mistake: it ends a forward pass in which no sample is left."""


def uncertainty(logits: Tensor) -> Tensor:
    """Entropy of the softmax of logits [..., classes] as a share of the largest that there is: 0 sure, 1 uniform.

    Liu et al. 2020, "FastBERT", equation 7.
    """
    logs = torch.log_softmax(logits.float(), -1)
    return -(logs.exp() * logs).sum(-1) / math.log(logits.shape[-1])


def leaves(logits: Tensor, speed: float) -> Tensor:
    """bool [...]: who leaves at an exit with these logits [..., classes]; at speed 1 everybody, also the uniform."""
    unsure = uncertainty(logits)
    return unsure < (speed if speed < 1 else torch.inf)


def exits_taken(every: Sequence[Tensor], speed: float) -> tuple[Tensor, Tensor]:
    """Which exit each sample takes at this speed, from what all of them say: its logits, and its layers [batch].

    every: logits [batch, classes] of each exit, and of the whole model last. It is what running only the layers that
    are needed gives, so that one pass is enough for a curve over all speeds.
    """
    said = torch.stack(tuple(every))  # [layers, batch, classes]
    goes = leaves(said, speed)
    goes[-1] = True
    first = goes.to(torch.uint8).argmax(0)
    return said[first, torch.arange(said.shape[1], device=said.device)], first + 1


class Departures:
    """One forward pass from which samples leave: who is still in the batch, and what was said of those who left.

    batch: samples at the start. mask: bool [batch, length], False where a token is padding, or None.
    logits, layers: [batch, classes] and int64 [batch], complete once the pass has ended.
    """

    def __init__(self, batch: int, speed: float, mask: Tensor | None) -> None:
        self.batch, self.speed, self.mask = batch, speed, mask
        self.logits = torch.empty(0)
        self.layers = torch.zeros(batch, dtype=torch.int64)
        self.active: Tensor | None = None  # indices of those who are left; None while nobody has gone

    @contextmanager
    def attached(self, layers: nn.ModuleList, exits: nn.ModuleList) -> Iterator[None]:
        """While this is open, samples leave after layers that have an exit; the last layer has none.

        Every tensor that a layer is given whose first size is that of the whole batch is narrowed to those who are
        left: hidden states, masks and biases alike.
        """
        handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in list(layers)[1:]]
        for number, (layer, exit_) in enumerate(zip(layers, exits, strict=False), start=1):
            handles.append(layer.register_forward_hook(partial(self._leave, exit_, number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, logits: Tensor, layers: int) -> None:
        """The whole model's logits [samples that are left, classes]."""
        self._note(logits, torch.arange(len(logits), device=logits.device), layers)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self.active is None:
            return None
        return tuple(map(self._narrow, args)), {name: self._narrow(value) for name, value in inputs.items()}

    def _narrow(self, value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 1 and len(value) == self.batch
        return value[self.active] if whole else value

    def _leave(self, exit_: Callable[..., Tensor], number: int, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        mask = self.mask if self.mask is None or self.active is None else self.mask[self.active]
        logits = exit_(hidden, mask)
        goes = leaves(logits, self.speed)
        if not goes.any():
            return None
        going, staying = goes.nonzero().flatten(), (~goes).nonzero().flatten()
        self._note(logits[going], going, number)
        self.active = staying if self.active is None else self.active[staying]
        if not len(staying):
            raise EverybodyLeftError
        hidden = hidden[staying]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _note(self, logits: Tensor, places: Tensor, layers: int) -> None:
        """Keep the logits of these places among those who are left."""
        if not len(self.logits):
            self.logits = logits.new_empty(self.batch, logits.shape[1])
            self.layers = self.layers.to(logits.device)
        samples = places if self.active is None else self.active[places]
        self.logits[samples], self.layers[samples] = logits, layers
