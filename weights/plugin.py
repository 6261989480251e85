"""The transformers plug-in for `quant_method: modelzip`: makes room for compressed weights before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .attributes import ATTRIBUTES, set_attributes
from .dense import Dense
from .embedding import embedding_of
from .experts import UNFUSED, Experts, unfuse
from .kinds import empty
from .kv_cache import SCALES, CacheScheme, round_cached
from .layouts import MODELZIP, VERSION, check_version
from .linear import linear_of
from .module import CompressedModule


@register_quantization_config(MODELZIP)
class ModelzipConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    modules: the meta of each compressed module's weight, by the module's name. shared: parameters and parts of
    compressed modules that aren't stored, each with the one that it is. attributes: numbers of heads that modules keep,
    where they aren't config.json's. unfused: modules whose experts are stored one by one. kv_cache_scheme,
    kv_cache_scales: how keys and values are rounded as they are cached, and by how many scales in which module.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        shared: Mapping[str, str] | None = None,
        version: int = VERSION,
        attributes: Mapping[str, Mapping[str, int]] | None = None,
        unfused: Sequence[str] = (),
        kv_cache_scheme: Mapping[str, Any] | None = None,
        kv_cache_scales: Mapping[str, int] | None = None,
        **_: Any,
    ) -> None:
        check_version(version)
        self.quant_method = MODELZIP  # type: ignore[assignment]
        self.version = version
        self.modules = dict(modules)
        self.shared = dict(shared or {})
        if attributes:  # written back by save_pretrained, as it was
            self.attributes = dict(attributes)
        if unfused:
            self.unfused = list(unfused)
        if kv_cache_scheme:
            self.kv_cache_scheme = dict(kv_cache_scheme)
            self.kv_cache_scales = dict(kv_cache_scales or {})


@register_quantizer(MODELZIP)
class ModelzipQuantizer(HfQuantizer):
    """Exchanges modules for those that hold the stored tensors; transformers then loads these by name like any other.

    Shared parameters are declared as ties, which transformers knows to load and to save once.
    """

    requires_calibration = True
    quantization_config: ModelzipConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        config = self.quantization_config
        unfuse(model, filter(None, (located(model, path) for path in getattr(config, UNFUSED, ()))))
        compressed = set()
        for name, meta in config.modules.items():
            path = located(model, name)
            if path is None:  # a part of another head than this class has
                continue
            module = compressed_module(model.get_submodule(path), meta)
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
            if isinstance(module, CompressedModule):
                compressed.add(f"{path}.weight")
        set_attributes(model, getattr(config, ATTRIBUTES, {}))
        _round_cache(model, config)
        _drop_ties(model, compressed)
        _tie(model, config.shared)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without those that would put experts together, where the model has them one by one."""
        apart = ((path, one) for path, one in model.named_modules() if isinstance(one, Experts))
        gone = [f"{path}.{leaf}" for path, experts in apart for leaf in experts.parts]
        kept = [one for one in weight_conversions if not (isinstance(one, WeightConverter) and _makes(one, gone))]
        return super().update_weight_conversions(kept, model)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


def _makes(converter: WeightConverter, names: Sequence[str]) -> bool:
    return any(name.endswith(target) for target in converter.target_patterns for name in names)


def _round_cache(model: nn.Module, config: ModelzipConfig) -> None:
    """Have attention modules round keys and values, if the config says so."""
    scheme = CacheScheme.of(vars(config))
    for name, count in getattr(config, SCALES, {}).items() if scheme is not None else ():
        path = located(model, name)
        if path is not None and scheme is not None:
            round_cached(model.get_submodule(path), scheme, count)


def located(model: nn.Module, module: str) -> str | None:
    """Where a module of the checkpoint's model is in this one, which may lack the head or have one; None if nowhere."""
    prefix = getattr(model, "base_model_prefix", "")
    known = dict(model.named_modules(remove_duplicate=False))
    candidates = (module, module.removeprefix(f"{prefix}."), f"{prefix}.{module}")
    return next((name for name in candidates if name in known), None)


def compressed_module(module: nn.Module, meta: Mapping[str, Any]) -> nn.Module:
    """What takes the place of a linear, Conv1D or embedding whose weight is compressed: on the meta device.

    Dense weights get the dtype of the one that they replace. A bias is kept, with as many entries as the weight has
    rows. Raises ValueError for other modules.
    """
    weight = empty(meta)
    dtype = module.get_parameter("weight").dtype
    if isinstance(weight, Dense):
        weight = Dense(weight.weight.to(dtype))
    if isinstance(module, nn.Embedding):
        return embedding_of(weight, module, dtype=dtype)
    if not isinstance(module, nn.Linear | Conv1D):
        raise ValueError(f"a {type(module).__name__} has no weight that could be compressed")
    bias: nn.Parameter | None = module.bias
    if bias is not None and bias.shape[0] != weight.shape[0]:
        bias = nn.Parameter(bias.new_empty(weight.shape[0]), requires_grad=bias.requires_grad)
    return linear_of(weight, bias)


def _drop_ties(model: Any, compressed: set[str]) -> None:
    """Forget the ties of weights that aren't parameters any more; what they share instead is in the config."""
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module._tied_weights_keys:
            stem = f"{prefix}." if prefix else ""
            module._tied_weights_keys = {
                target: source
                for target, source in module._tied_weights_keys.items()
                if compressed.isdisjoint((stem + target, stem + source))
            }
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if compressed.isdisjoint((target, source))
    }


def _tie(model: Any, shared: Mapping[str, str]) -> None:
    """Make each parameter or part the one that the config says it is."""
    ties = {}
    for target, source in shared.items():
        (to, _, leaf), (of, _, of_leaf) = target.rpartition("."), source.rpartition(".")
        here, there = located(model, to), located(model, of)
        if here is None or there is None:
            continue
        module = model.get_submodule(here)
        if isinstance(module, CompressedModule) and leaf != "bias":
            module.share(leaf, model.get_submodule(there), of_leaf)
        else:
            ties[f"{here}.{leaf}"] = f"{there}.{of_leaf}"
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **ties}
    # What save_pretrained asks which of several names for one tensor are to be left out.
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **ties}
