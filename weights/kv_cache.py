"""Keys and values rounded as they go into a model's cache: the codes, the rounding, and its place in attention modules.

The words of config.json are those of compressed-tensors, in both layouts: `kv_cache_scheme` (num_bits, type, strategy).
Attention modules hold the scales as `k_scale` and `v_scale`. What is cached after rotary embedding is what is rounded,
in every forward, with or without a cache, as compressed-tensors does in transformers; engines store the codes instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

SCHEME: Final = "kv_cache_scheme"
SCALES: Final = "kv_cache_scales"
"""In modelzip's own layout: how many scales keys and values have, by the name of the attention module."""

K_SCALE, V_SCALE = "k_scale", "v_scale"
ARGUMENTS: Final = ("past_key_values", "past_key_value", "layer_past")
"""What forwards call the cache."""

Change: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From keys and values [batch, heads, tokens, dim], which may differ in the last, to what is cached in their place."""

_CODES: Final = MappingProxyType(
    {"fp8": (8, "float", -448.0, 448.0), "int8": (8, "int", -128.0, 127.0), "int4": (4, "int", -8.0, 7.0)}
)
"""Of each kind of codes: bits, compressed-tensors' word, the lowest and the highest code."""


@dataclass(frozen=True)
class CacheScheme:
    """codes: `fp8` (e4m3), `int8` or `int4`. strategy: what shares a scale: `tensor` (all keys of a layer, and all its
    values) or `attn_head` (those of a head)."""

    codes: str
    strategy: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> CacheScheme | None:
        """What a quantization_config says, None if nothing. Raises ValueError, a part of a sentence, for other words
        than `words` gives."""
        words = config.get(SCHEME)
        if words is None:
            return None
        found = next((one for one, (b, t, *_) in _CODES.items() if (b, t) == (words["num_bits"], words["type"])), None)
        plain = words.get("symmetric", True) and not words.get("dynamic", False)
        if found is None or not plain or words.get("strategy") not in ("tensor", "attn_head"):
            told = f"{words.get('num_bits')}-bit {words.get('type')} by {words.get('strategy')}"
            raise ValueError(f"quantized with a cache of {told}{'' if plain else ', dynamic or asymmetric'}")
        return cls(found, words["strategy"])

    @property
    def bits(self) -> int:
        """Of one key's or value's number in the cache."""
        return _CODES[self.codes][0]

    @property
    def highest(self) -> float:
        """The highest code."""
        return _CODES[self.codes][3]

    @property
    def words(self) -> dict[str, Any]:
        """What config.json says of it."""
        bits, kind, *_ = _CODES[self.codes]
        return {"num_bits": bits, "type": kind, "strategy": self.strategy, "symmetric": True, "dynamic": False}

    def shape(self, count: int) -> tuple[int, ...]:
        """Of `count` scales of keys, or of values, as they are stored."""
        return (count,) if self.strategy == "tensor" else (count, 1, 1)

    def rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        """x [batch, heads, tokens, dim] as its codes stand for it, computed in x's dtype as compressed-tensors does.

        scale: of the stored shape. Its gradient is that of the identity.
        """
        _, kind, lowest, highest = _CODES[self.codes]
        scale = scale.to(x.dtype)
        codes = (x.detach() / scale).clamp(lowest, highest)
        codes = codes.round() if kind == "int" else codes.to(torch.float8_e4m3fn).to(x.dtype)
        made = codes * scale
        return x + (made - x).detach() if x.requires_grad and torch.is_grad_enabled() else made


class CacheView:
    """What an attention module is given in place of its cache (or of none): keys and values are changed on their way.

    Everything but `update` is the cache's own.
    """

    def __init__(self, cache: Any, change: Change) -> None:
        self._cache, self._change = cache, change

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' caches have it."""
        keys, values = self._change(keys, values)
        if self._cache is None:
            return keys, values
        found: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return found

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Of the cache; 0 without one."""
        return 0 if self._cache is None else int(self._cache.get_seq_length(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        cache = self.__dict__.get("_cache")
        if cache is None:
            raise AttributeError(f"there is no cache that could have a {name}")
        return getattr(cache, name)


def change_cached(module: nn.Module, change: Change, *, only_real: bool = False) -> RemovableHandle | None:
    """From now on, what the module's forward puts into its cache is changed; None if no argument of it is a cache.

    only_real: leave calls alone that are given no cache. A view of another change that it is given is taken away.
    """
    return _hooked(module, lambda module: change, only_real=only_real)


def _hooked(module: nn.Module, change_of: Callable[[nn.Module], Change], *, only_real: bool) -> RemovableHandle | None:
    parameters = list(inspect.signature(module.forward).parameters)
    name = next((one for one in ARGUMENTS if one in parameters), None)
    if name is None:
        return None
    hook = _Hook(name, parameters.index(name), change_of, only_real)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


@dataclass(frozen=True)
class _Hook:
    """Gives a forward a view of its cache. It holds no module, so that a copied or pickled one has what is its own.

    name, place: of the argument. change_of: from the module that is called to what changes its keys and values.
    """

    name: str
    place: int
    change_of: Callable[[nn.Module], Change]
    only_real: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        given = args[self.place] if self.place < len(args) else kwargs.get(self.name)
        cache = given.__dict__["_cache"] if isinstance(given, CacheView) else given
        if cache is None and self.only_real:
            return None
        view = CacheView(cache, self.change_of(module))
        if self.place < len(args):
            return (*args[: self.place], view, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.name: view}


@dataclass(frozen=True)
class _Rounding:
    """From an attention module to the rounding by its scales."""

    scheme: CacheScheme

    def __call__(self, module: nn.Module) -> Change:
        def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            scales = module.get_buffer(K_SCALE), module.get_buffer(V_SCALE)
            return self.scheme.rounded(keys, scales[0]), self.scheme.rounded(values, scales[1])

        return change


def round_cached(module: nn.Module, scheme: CacheScheme, count: int) -> None:
    """Make room for the scales of an attention module, and have it round what it caches by them. count: of the scales
    of its keys, and of its values. Raises ValueError for a module without a cache."""
    for name in (K_SCALE, V_SCALE):
        module.register_buffer(name, torch.ones(scheme.shape(count)))

    if _hooked(module, _Rounding(scheme), only_real=False) is None:
        raise ValueError(f"a {type(module).__name__} has no cache of keys and values")
