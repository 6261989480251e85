"""What a model is made of: parameters, bytes and arithmetic by component, from headers alone.

FLOPs are those of the products in one forward pass, two for each multiplication with its addition, counted by torch
while the model runs on the meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modelzip.checkpoints.errors import CheckpointError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.skeleton import skeleton
from modelzip.weights.dense import Dense
from modelzip.weights.kronecker import Kronecker
from modelzip.weights.kv_cache import K_SCALE, V_SCALE
from modelzip.weights.layouts import MODELZIP
from modelzip.weights.low_rank import LowRank
from modelzip.weights.plugin import compressed_module, located
from modelzip.weights.tensor_train import TensorTrain

from .calibrate import forward_inputs, longest
from .component_times import measured_components
from .components import COMPONENTS, Parts
from .measure import pick_device

LENGTH: Final = 512
"""Tokens of a text where nobody said."""


def _grouped(tokens: Sequence[int], experts: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of each token [tokens, in] with the matrix of its expert, [experts, in, out]."""
    return 2 * math.prod(tokens) * experts[-1]


GROUPED: Final = {torch.ops.aten._grouped_mm: _grouped}
"""The product that transformers computes experts by, which torch doesn't count itself."""


def inspect_models(
    checkpoints: Sequence[Checkpoint], *, batch_size: int, seq_len: int | None, device: str | None
) -> list[dict[str, Any]]:
    """What `modelzip inspect` and `compare` show of each model, as plain data, for texts of the same length.

    seq_len: without one, LENGTH or what all of the models take. device: where each component is measured as well; None
    for nowhere. Raises RecipeError for more tokens than a model takes, CheckpointError for one that can't be opened.
    """
    models = [skeleton(checkpoint) for checkpoint in checkpoints]
    limits = [longest(model) for model in models]
    for checkpoint, limit in zip(checkpoints, limits, strict=True):
        if seq_len is not None and seq_len > limit:
            raise RecipeError(f"--seq-len is {seq_len}, but {checkpoint.source} takes at most {limit} tokens.")
    length = min(LENGTH, *limits) if seq_len is None else seq_len
    where = None if device is None else pick_device(device)
    found = []
    for checkpoint, model in zip(checkpoints, models, strict=True):
        parts = Parts(model, checkpoint)
        one = inspected(checkpoint, model, parts, batch_size=batch_size, seq_len=length)
        if where is not None:
            measured = measured_components(checkpoint, parts, batch_size=batch_size, seq_len=length, device=where)
            for row in one["components"]:
                row.update(measured[row["name"]])
        found.append(one)
    return found


def inspected(
    checkpoint: Checkpoint, model: nn.Module, parts: Parts, *, batch_size: int, seq_len: int
) -> dict[str, Any]:
    """Parameters, bytes and FLOPs by component, from headers. model: the checkpoint's skeleton."""
    rows: dict[str, dict[str, Any]] = {
        name: {"name": name, "parameters": 0, "bytes": 0, "flops": None} for name in COMPONENTS
    }
    for name, parameters, nbytes in _stored(model, checkpoint):
        row = rows[parts.of(name.rpartition(".")[0])]
        row["parameters"] += parameters
        row["bytes"] += nbytes
    counted, reason = _flops(checkpoint, parts, batch_size=batch_size, seq_len=seq_len)
    for name, row in rows.items():
        row["flops"] = None if counted is None else counted.get(name, 0)
    return {
        "model": checkpoint.source,
        "architecture": type(model).__name__,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "components": list(rows.values()),
        "parameters": sum(row["parameters"] for row in rows.values()),
        "bytes": sum(row["bytes"] for row in rows.values()),
        "flops": None if counted is None else sum(counted.values()),
        "note": reason,
    }


def _stored(model: nn.Module, checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Each parameter or persistent buffer with its numbers, as a dense model has them, and its bytes; tied ones and
    tensors that several are made of count once, and scales of a cache are no numbers of a dense model."""
    names, seen, found = NameMap(model, checkpoint), set[str](), []
    for name, tensor in model.state_dict().items():
        sources = [source for source in names.sources([name]) if source not in seen]
        seen |= set(sources)
        is_parameter = names.owner(name) == name and name.rpartition(".")[2] not in (K_SCALE, V_SCALE)
        numbers = math.prod(tensor.shape) if is_parameter else 0
        found.append((name, numbers, sum(checkpoint.tensors[source].nbytes for source in sources)))
    return found


def _flops(
    checkpoint: Checkpoint, parts: Parts, *, batch_size: int, seq_len: int
) -> tuple[dict[str, int] | None, str | None]:
    """FLOPs by component, or None and why they can't be counted."""
    model: Any = skeleton(checkpoint, dtype=torch.bfloat16)  # experts are multiplied together in that type alone
    _mount(model, checkpoint)
    model = model.to("meta")
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
            model(**forward_inputs(model)(tokens))
    except (CheckpointError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        return None, f"FLOPs aren't counted: {type(model).__name__} can't run without values ({told.rstrip('.')})."
    totals = {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items() if path != "Global"}
    own = dict(totals)
    for path, total in totals.items():
        if (outer := _around(path, totals)) is not None:
            own[outer] -= total
    found: dict[str, int] = {}
    for path, count in own.items():
        if count:
            name = parts.computing(path.partition(".")[2])
            found[name] = found.get(name, 0) + count
    return found, None


def _around(path: str, paths: Container[str]) -> str | None:
    """The innermost of these modules that the module lies in; None if there is none."""
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return path
    return None


def _mount(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Modules that compute with factors take the place of dense ones, which would multiply more."""
    config = checkpoint.quantization or {}
    for name, meta in config["modules"].items() if config.get("quant_method") == MODELZIP else ():
        path = located(model, name)
        if path is not None and meta["kind"] in (LowRank.kind, Kronecker.kind, TensorTrain.kind):
            parent, _, leaf = path.rpartition(".")
            made = compressed_module(model.get_submodule(path), _plain(meta))
            setattr(model.get_submodule(parent), leaf, made)


def _plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The same with dense factors: integers are multiplied no less often."""
    if meta["kind"] != LowRank.kind:
        return dict(meta)
    sides = {
        side: {"kind": Dense.kind, "shape": meta[side]["shape"], "dtype": "bfloat16"} for side in ("left", "right")
    }
    return {**meta, **sides}
