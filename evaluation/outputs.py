"""What of a model's output is compared: the logits, or what it has instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def answer(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The main output; of a model with exits the logits of each, [exits, batch, classes]: which one of them a text
    takes may hang on the last digit.
    """
    every = getattr(model, "every_exit", None)
    return main_output(model(**inputs)) if every is None else torch.stack(every(**inputs))


def main_output(output: Any) -> Tensor:
    """The logits; without a head the last hidden states; else (start and end of an answer, ...) all there is, flat."""
    for name in ("logits", "last_hidden_state"):
        found = output.get(name)
        if isinstance(found, Tensor):
            return found
    numbers = [value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.cat([value.float().flatten() for value in numbers])
