"""Which modules of a model put keys and values into its cache, and what a checkpoint says of rounding them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelzip.weights.kv_cache import K_SCALE, SCALES, SCHEME, V_SCALE, CacheScheme, change_cached, round_cached
from modelzip.weights.layouts import MODELZIP
from modelzip.weights.plugin import located

from .errors import CheckpointError
from .index import Checkpoint

PROBE_TOKENS: Final = 7
"""Of the forward that finds the modules: a number that is hardly a number of heads."""

PROJECTIONS: Final = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
"""What compressed-tensors knows attention with a cache by (`is_cached_attention_module`)."""

DENSE_WEIGHTS: Final = "transformers rounds no keys and values where compressed-tensors' weights are made dense at load"
"""Why a rounded cache can't go with some weights (`opened_dense`)."""


@dataclass(frozen=True)
class Cached:
    """A module that caches keys [batch, heads, tokens, widths[0]] and values [..., widths[1]]."""

    module: str
    heads: int
    widths: tuple[int, int]

    @property
    def numbers(self) -> int:
        """That it caches of one token."""
        return self.heads * sum(self.widths)


def cached_modules(model: PreTrainedModel) -> tuple[Cached, ...]:
    """The modules of a skeleton, found in a forward on the meta device, to which it is moved.

    Raises CheckpointError, with a part of a sentence, for models that keep no cache, or one that isn't known.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{kind} keeps two caches, of its own text and of the encoder's")
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def watcher(path: str) -> Any:
        def watch(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            found.append((path, tuple(keys.shape), tuple(values.shape)))
            return keys, values

        return watch

    inside = {path: module for path, module in model.named_modules() if not isinstance(module, PreTrainedModel)}
    handles = [change_cached(module, watcher(path), only_real=True) for path, module in inside.items()]
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            on_meta: Any = model.to("meta")  # type: ignore[arg-type]  # transformers' wrapper hides the types
            on_meta(input_ids=tokens, use_cache=True)
    except TypeError:
        raise CheckpointError(f"{kind} keeps no cache of keys and values") from None
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"where {kind} caches keys can't be found, since it can't run without values ({told})"
        ) from None
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()
    if not found:
        raise CheckpointError(f"{kind} keeps no cache of keys and values")
    for path, keys, values in found:
        if (
            len(keys) != 4
            or keys[:3] != values[:3]
            or keys[2] != PROBE_TOKENS
            or len({one[0] for one in found}) != len(found)
        ):
            raise CheckpointError(f"{path} caches keys {list(keys)} and values {list(values)} of {PROBE_TOKENS} tokens")
    return tuple(Cached(path, keys[1], (keys[3], values[3])) for path, keys, values in found)


def unopened_by_compressed_tensors(model: PreTrainedModel, heads: Mapping[str, int], *, by_head: bool) -> str:
    """Why compressed-tensors' reader in transformers wouldn't round what these modules cache, or "".

    heads: of keys, by the modules' names. by_head: whether each has a scale of its own.
    """
    known = {
        path
        for path, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
        and any(hasattr(module, one) for one in PROJECTIONS)
        and _takes_cache(module)
    }
    if other := next(iter(sorted(known ^ heads.keys())), None):
        return f"compressed-tensors looks for attention with k_proj and v_proj, and {other} is not where it looks"
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_key_value_heads", None)
    if count is None:
        return "compressed-tensors rounds no cache where config.json has no num_key_value_heads"
    if by_head and set(heads.values()) != {count}:
        return "compressed-tensors knows one number of heads for all layers"
    return ""


def _takes_cache(module: nn.Module) -> bool:
    handle = change_cached(module, lambda keys, values: (keys, values))
    if handle is not None:
        handle.remove()
    return handle is not None


def scheme_of(checkpoint: Checkpoint) -> CacheScheme | None:
    """How the checkpoint's model rounds what it caches; None if it doesn't. Raises CheckpointError for unknown ways."""
    try:
        return CacheScheme.of(checkpoint.quantization or {})
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.source} is {error}, which modelzip doesn't read: it reads fp8, int8 and int4 by tensor or "
            "by head."
        ) from None


def scales_of(checkpoint: Checkpoint) -> dict[str, int]:
    """How many scales keys and values have, by the name of the attention module; empty where nothing is rounded."""
    config = checkpoint.quantization or {}
    if config.get("quant_method") == MODELZIP:
        return dict(config.get(SCALES) or {})
    if config.get(SCHEME) is None:
        return {}
    ending = f".{K_SCALE}"
    return {
        name.removesuffix(ending): info.shape[0] if info.shape else 1
        for name, info in checkpoint.tensors.items()
        if name.endswith(ending)
    }


def round_cache(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Have a skeleton round what it caches, if the checkpoint says so.

    Raises CheckpointError if the scales are missing, or what is to have them keeps no cache.
    """
    scheme = scheme_of(checkpoint)
    if scheme is None:
        return
    scales = scales_of(checkpoint)
    if not scales:
        raise CheckpointError(f"{checkpoint.source} says that it rounds what it caches, and has no scales for it.")
    for name, count in scales.items():
        path = located(model, name)
        if path is not None:
            try:
                round_cached(model.get_submodule(path), scheme, count)
            except ValueError as error:
                raise CheckpointError(f"{checkpoint.source}: {name}: {error}.") from None


def without_rounded_cache(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with keys and values cached as they are."""
    before = checkpoint.quantization or {}
    if before.get(SCHEME) is None:
        return checkpoint
    own = {key: value for key, value in before.items() if key not in (SCHEME, SCALES)}
    tensors: Mapping[str, Any] = {
        name: info for name, info in checkpoint.tensors.items() if name.rpartition(".")[2] not in (K_SCALE, V_SCALE)
    }
    return replace(checkpoint, config={**checkpoint.config, "quantization_config": own}, tensors=tensors)
