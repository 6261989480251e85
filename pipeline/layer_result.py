"""The checkpoint that a layer-wise stage will leave, as far as headers go."""

from __future__ import annotations

from collections.abc import Mapping

from modelzip.checkpoints.index import Checkpoint
from modelzip.weights.layouts import MODELZIP, quantization_config
from modelzip.weights.value import CompressedWeight

from .cache_plan import CachePlan
from .headers import info_of
from .module_plan import ModulePlan
from .serving import at_sharers, shared_after


def planned_result(
    checkpoint: Checkpoint,
    modules: list[ModulePlan],
    weights: Mapping[str, CompressedWeight],
    cache: CachePlan | None,
) -> Checkpoint:
    """The checkpoint once the modules are what they are planned to be. weights: of all that is compressed then."""
    replaced = {name for module in modules for name in module.replaces}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in replaced}
    for module in modules:
        for suffix, tensor in module.after.tensors().items():
            tensors[module.stem + suffix] = info_of(module.stem + suffix, tensor)
    tensors |= {} if cache is None else {name: info_of(name, tensor) for name, tensor in cache.tensors().items()}
    linears = [module.linear for module in modules]
    metas = {name: weight.meta() for name, weight in weights.items()}
    before = checkpoint.quantization or {}
    shared = shared_after(before.get("shared", {}), metas, linears)
    own = quantization_config(at_sharers(metas, linears), layout=MODELZIP, linears=(), shared=shared)
    if before.get("quant_method") == MODELZIP:
        own = {**before, **own, "modules": {**before["modules"], **own["modules"]}}
    config = {**checkpoint.config, "quantization_config": {**own, **({} if cache is None else cache.words(MODELZIP))}}
    return Checkpoint(checkpoint.folder, config, tensors, checkpoint.source)
