"""The model that a checkpoint's config.json describes, without its weights: what plans look at."""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

from modelzip.weights.attributes import ATTRIBUTES, set_attributes
from modelzip.weights.dense import Dense
from modelzip.weights.experts import UNFUSED, unfuse
from modelzip.weights.layouts import MODELZIP
from modelzip.weights.plugin import compressed_module, located
from modelzip.weights.students import OWN_MODELS
from modelzip.weights.value import dtype_name

from .cached import round_cache
from .errors import CheckpointError
from .index import Checkpoint

UNBUILT: Final = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What transformers raises where config.json makes no model, beside its StrictDataclassError."""


def skeleton(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The model with parameters on the meta device, real buffers (the persistent ones unset), in eval mode.

    It rounds what it caches where the checkpoint says so.
    """
    config_class, model_class = _classes(checkpoint)
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    try:
        config = config_class.from_dict(plain)
        with init_empty_weights(include_buffers=False):
            model: transformers.PreTrainedModel = model_class._from_config(config, dtype=dtype)
    except (*UNBUILT, StrictDataclassError) as error:
        told = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} can't be turned into a {model_class.__name__}: {told}"
        ) from error
    unfuse(model, (checkpoint.quantization or {}).get(UNFUSED, ()))
    _resize(model, checkpoint)
    try:
        set_attributes(model, (checkpoint.quantization or {}).get(ATTRIBUTES, {}))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {error}.") from None
    round_cache(model, checkpoint)
    model.requires_grad_(False)
    model.train(False)
    return model


def _resize(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Exchange linears and embeddings whose weight the checkpoint holds in another shape than config.json has.

    Dense weights always lie [out, in] there, also those of a Conv1D.
    """
    config = checkpoint.quantization or {}
    if config.get("quant_method") != MODELZIP:
        return
    for name, meta in config["modules"].items():
        path = located(model, name)
        module = None if path is None else model.get_submodule(path)
        if path is None or not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            continue
        shape = tuple(reversed(module.weight.shape)) if isinstance(module, Conv1D) else tuple(module.weight.shape)
        if shape != tuple(meta["shape"]) or (meta["kind"] == Dense.kind and isinstance(module, Conv1D)):
            dense = {"kind": Dense.kind, "shape": meta["shape"], "dtype": dtype_name(module.weight.dtype)}
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, compressed_module(module, dense))


def _classes(checkpoint: Checkpoint) -> tuple[Any, Any]:
    config, where = checkpoint.config, checkpoint.folder / "config.json"
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if "auto_map" in config:
            raise CheckpointError(
                f"{checkpoint.source} needs Python code from its own repository, which modelzip doesn't run: "
                f"transformers {transformers.__version__} has no model type {model_type!r} itself."
            )
        raise CheckpointError(
            f"{where} has the model type {model_type!r}, which transformers {transformers.__version__} doesn't know; "
            "update transformers or check the file."
        )
    config_class = CONFIG_MAPPING[model_type]
    if model_type in OWN_MODELS:
        return config_class, OWN_MODELS[model_type]
    architectures = config.get("architectures") or [None]
    named = getattr(transformers, str(architectures[0]), None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return config_class, named
    if "auto_map" in config and architectures[0] is not None:
        raise CheckpointError(
            f"{checkpoint.source} needs the class {architectures[0]} from its own repository, whose code modelzip "
            "doesn't run."
        )
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if config_class in mapping:
            found = mapping[config_class]
            return config_class, found[0] if isinstance(found, tuple) else found
    raise CheckpointError(f"{where} names no architecture, and transformers has none for the type {model_type!r}.")
