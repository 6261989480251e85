"""Experts that are stored one by one, put together again under the names that the model's makers gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from modelzip.weights.experts import BIAS, UNFUSED
from modelzip.weights.plugin import located

from .folder import Entry
from .source import Source


def fused_entries(
    source: Source, model: Any, dtype: torch.dtype, check: Callable[[Tensor, str], Tensor]
) -> Iterator[Entry]:
    """The experts of each projection of each mixture, dense. model: on the meta device, as plain transformers has it.

    check: gives a tensor of that name back, or raises. A dense model has one 3-D parameter; what goes to the folder is
    what `save_pretrained` would write of it.
    """
    for path in (source.checkpoint.quantization or {}).get(UNFUSED, ()):
        whole = located(model, path)
        assert whole is not None, "config.json names the module"
        fused = model.get_submodule(whole)
        for leaf, parameter in fused._parameters.items():
            linear, name = leaf.removesuffix(BIAS), "bias" if leaf.endswith(BIAS) else "weight"
            modules = [f"{path}.{expert}.{linear}" for expert in range(parameter.shape[0])]
            replaces = tuple(source.names.sources(f"{module}.{name}" for module in modules))
            is_turned = fused.is_transposed and name == "weight"

            def make(
                target: str = f"{whole}.{leaf}", modules: list[str] = modules, name: str = name, turn: bool = is_turned
            ) -> Mapping[str, Tensor]:
                made = [_part(source, module, name, dtype) for module in modules]
                stacked = torch.stack([one.T if turn else one for one in made])
                written = revert_weight_conversion(model, {target: check(stacked, target)})
                return {key: tensor.contiguous() for key, tensor in written.items()}

            yield Entry(parameter.numel() * dtype.itemsize, replaces, make)


def _part(source: Source, module: str, name: str, dtype: torch.dtype) -> Tensor:
    return source.dense(module, dtype) if name == "weight" else source.parameter(f"{module}.{name}", dtype)
