"""What plain transformers makes of a folder: its output on given inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelzip.evaluation.outputs import answer


@torch.inference_mode()
def answer_by_transformers(folder: Path, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The output of the model in fp32, as far as its layout lets it; layouts with other libraries' need these.

    Activations are fp32 where modules are plain or know no better; compressed weights stay what they are. options: of
    `from_pretrained`.
    """
    import transformers

    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    # A class that isn't transformers' own is a classifier.
    known = getattr(transformers, architecture, transformers.AutoModelForSequenceClassification)
    model = known.from_pretrained(folder, dtype="auto", **options).eval()
    model(**{name: tensor[:, :1] for name, tensor in inputs.items()})  # compressed-tensors makes weights dense here
    _to_float(model)
    return answer(model, inputs).float().contiguous()


def _to_float(model: Any) -> None:
    """Everything in fp32 but what makes up compressed weights: the dtype of scales is part of the weights' values."""
    for module in model.modules():
        is_ours = hasattr(module, "compute_dtype")
        if is_ours:
            module.compute_dtype = torch.float32
        if is_ours or hasattr(module, "weight_packed") or hasattr(module, "qweight"):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.float()
