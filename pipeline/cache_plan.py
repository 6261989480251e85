"""What becomes of the keys and values that a model caches: the plan, from headers and the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.cached import (
    DENSE_WEIGHTS,
    cached_modules,
    scales_of,
    scheme_of,
    unopened_by_compressed_tensors,
)
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.skeleton import skeleton
from modelzip.compressors.methods import METHODS
from modelzip.weights.kv_cache import K_SCALE, SCALES, SCHEME, V_SCALE, CacheScheme
from modelzip.weights.layouts import MODELZIP

from .request import Request


@dataclass(frozen=True)
class CachePlan:
    """scales: how many keys and values have each, by the attention module's name. heads: of keys in each. stems: what
    stands before `k_scale` in its tensors' names. dtype: of the scales. numbers: that are cached of a token, over all
    layers. full_bits: of each as the model computes. is_new: whether the stage is to find the scales, or the
    checkpoint has them."""

    scheme: CacheScheme
    scales: Mapping[str, int]
    heads: Mapping[str, int]
    stems: Mapping[str, str]
    dtype: torch.dtype
    numbers: int
    full_bits: int
    is_new: bool

    @property
    def nbytes(self) -> int:
        """Of scales that the checkpoint hasn't got yet."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are to be written, on the meta device."""
        return {
            self.stems[name] + leaf: torch.empty(self.scheme.shape(count), dtype=self.dtype, device="meta")
            for name, count in (self.scales.items() if self.is_new else ())
            for leaf in (K_SCALE, V_SCALE)
        }

    def words(self, layout: str) -> dict[str, Any]:
        """What a quantization_config of that layout says of it."""
        own = {SCALES: dict(self.scales)} if layout == MODELZIP else {}
        return {SCHEME: self.scheme.words, **own}

    @property
    def bytes_per_token(self) -> tuple[int, int]:
        """Of the cache where it is kept as the model computes, and where codes are kept."""
        return self.numbers * self.full_bits // 8, self.numbers * self.scheme.bits // 8

    def said(self) -> str:
        """The same for a reader."""
        before, after = self.bytes_per_token
        shared = "layer" if self.scheme.strategy == "tensor" else "head"
        return (
            f"keys and values are rounded to {self.scheme.codes}, a scale a {shared}: engines that store the codes "
            f"cache {after:,} bytes a token instead of {before:,} ({self.full_bits} bits a number)"
        )


def plan_cache(request: Request, names: NameMap) -> CachePlan | None:
    """The plan of the stage's `kv_cache`, or of what the checkpoint says already; None where nothing is rounded.

    What is wrong goes to `request.problems`.
    """
    checkpoint, settings = request.checkpoint, request.stage.settings
    asked = getattr(settings, "kv_cache", "none")
    before = scheme_of(checkpoint)
    if before is not None:
        if asked != "none":
            request.problems.append(
                f"{request.where}: kv_cache: what {checkpoint.source} caches is rounded to {before.codes} already: "
                "leave kv_cache out."
            )
        elif getattr(settings, "rotate", "none") != "none" or _scales_inputs(settings):
            request.problems.append(
                f"{request.where}: the stage changes keys or values, and those of {checkpoint.source} are rounded by "
                "known scales: give kv_cache to the last stage alone."
            )
        return _kept(before, checkpoint)
    if asked == "none":
        return None
    try:
        found = cached_modules(skeleton(checkpoint, dtype=torch.bfloat16))
    except CheckpointError as error:
        request.problems.append(f"{request.where}: kv_cache: {error}: leave kv_cache out.")
        return None
    scheme = CacheScheme(asked, "tensor" if asked == "fp8" else "attn_head")
    return CachePlan(
        scheme=scheme,
        scales={one.module: one.heads if scheme.strategy == "attn_head" else 1 for one in found},
        heads={one.module: one.heads for one in found},
        stems={one.module: _stem(one.module, names) for one in found},
        dtype=checkpoint.dtype,
        numbers=sum(one.numbers for one in found),
        full_bits=8 * checkpoint.dtype.itemsize,
        is_new=True,
    )


def cache_obstacle(cache: CachePlan, checkpoint: Checkpoint, *, made_dense: bool) -> str:
    """Why compressed-tensors can't say that the cache is rounded, or "". made_dense: whether transformers is told to
    make the weights dense as it opens them."""
    if made_dense:
        return DENSE_WEIGHTS
    return unopened_by_compressed_tensors(skeleton(checkpoint), cache.heads, by_head=cache.scheme.strategy != "tensor")


def _scales_inputs(settings: Any) -> bool:
    return type(settings) in METHODS and METHODS[type(settings)].scaling is not None


def _kept(scheme: CacheScheme, checkpoint: Checkpoint) -> CachePlan:
    """Of a checkpoint that has the scales."""
    scales = scales_of(checkpoint)
    config = skeleton(checkpoint).config.get_text_config()
    heads = (
        scales if scheme.strategy == "attn_head" else dict.fromkeys(scales, getattr(config, "num_key_value_heads", 1))
    )
    return CachePlan(scheme, scales, heads, {}, checkpoint.dtype, 0, 8 * checkpoint.dtype.itemsize, is_new=False)


def _stem(module: str, names: NameMap) -> str:
    """How the checkpoint calls the module, which the name of a weight in it tells, and a dot."""
    for parameter in names.stored():
        if parameter.startswith(f"{module}.") and parameter.endswith(".weight"):
            leaf = parameter.removeprefix(f"{module}.")
            tensor = f"{names.sources([parameter])[0].rpartition('.')[0]}.weight"
            if tensor.endswith(f".{leaf}"):
                return tensor.removesuffix(leaf)
    return f"{module}."
