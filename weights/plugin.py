"""The transformers plug-in for `quant_method: modelzip`: puts `CompressedLinear` in place of linears before loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from modelzip.kernels.bitpack import packed_words

from .affine import Affine
from .layouts import MODELZIP, VERSION
from .linear import CompressedLinear


@register_quantization_config(MODELZIP)
class ModelzipConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json. modules: the scheme of each compressed module, by its name."""

    def __init__(self, modules: Mapping[str, Any], version: int = VERSION, scale_dtype: str = "", **_: Any) -> None:
        if version > VERSION:
            raise ValueError(f"this model is in layout version {version} of modelzip; installed is version {VERSION}")
        self.quant_method = MODELZIP  # type: ignore[assignment]
        self.version = version
        self.scale_dtype = scale_dtype
        self.modules = dict(modules)


@register_quantizer(MODELZIP)
class ModelzipQuantizer(HfQuantizer):
    """Makes room for the packed tensors; transformers then loads them by name like any buffer."""

    requires_calibration = True
    quantization_config: ModelzipConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        scale_dtype = getattr(torch, self.quantization_config.scale_dtype)
        for name, scheme in self.quantization_config.modules.items():
            module = model.get_submodule(name)
            empty = _empty(module, scheme, scale_dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, CompressedLinear(empty, getattr(module, "bias", None)))

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


def _empty(module: nn.Module, scheme: Mapping[str, Any], scale_dtype: torch.dtype) -> Affine:
    """A weight of the module's shape and this scheme, on the meta device."""
    weight = module.get_parameter("weight")
    rows, columns = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
    groups = columns // scheme["group_size"] if scheme["strategy"] == "group" else 1
    scales = (1, 1) if scheme["strategy"] == "tensor" else (rows, groups)
    return Affine(
        torch.empty(rows, packed_words(columns, scheme["bits"]), dtype=torch.int32, device="meta"),
        torch.empty(scales, dtype=scale_dtype, device="meta"),
        None if scheme["symmetric"] else torch.empty(scales, dtype=torch.int8, device="meta"),
        scheme["bits"],
        (rows, columns),
    )
