"""Weights into chosen modules of a model, and out again, so that only what is needed is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D

from .errors import CheckpointError
from .index import Checkpoint
from .names import NameMap

__all__ = ["Decode", "NameMap", "materialise", "move_buffers", "release"]

# From a module's name and its parts ({"weight_packed": tensor, ...}) to the weight, [out, in].
Decode: TypeAlias = Callable[[str, dict[str, Tensor]], Tensor]


def materialise(
    model: nn.Module,
    prefixes: Iterable[str],
    *,
    checkpoint: Checkpoint,
    names: NameMap,
    device: torch.device | str,
    dtype: torch.dtype | None,
    decode: Decode | None = None,
) -> None:
    """Give the parameters under these modules (or parameters of these names) their weights from the checkpoint.

    `dtype` is that of floating tensors, None leaves them as stored; parameters that transformers keeps in fp32 stay
    so. Tied parameters are one object. A compressed linear's weight comes from `decode`, or stays on meta without it.
    """
    chosen = tuple(prefixes)
    missing = dict.fromkeys(name for name in _state_names(model, chosen) if not _is_parameter_real(model, name))
    casts = _casts(model, dtype)
    while missing:
        name = next(iter(missing))
        owner = names.owner(name)
        real = _real_twin(model, names, name)
        if real is not None:
            made: dict[str, Tensor] = {name: real}
        elif names.conversion(owner) is not None:
            made = _converted(model, owner, checkpoint=checkpoint, names=names, device=device, dtype=casts(owner))
        elif (source := names.source(owner)) is not None:
            made = {name: checkpoint.read([source], dtype=casts(owner), device=device)[source]}
        elif decode is not None and (parts := names.parts(owner.removesuffix(".weight"))):
            made = {name: _decoded(model, owner, parts, checkpoint=checkpoint, decode=decode).to(device, casts(owner))}
        else:
            made = {}
        del missing[name]
        for target, tensor in made.items():
            if target == name or target in missing:
                _assign(model, target, tensor)
                missing.pop(target, None)
    for prefix, module in model.named_modules():
        if _is_under(prefix, chosen):
            _move_own_buffers(module, device)


def release(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Put the parameters under these modules (or of these names) back on the meta device; buffers stay."""
    chosen = tuple(prefixes)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if _is_under(name, chosen) and not parameter.is_meta:
            _assign(model, name, torch.empty_like(parameter, device="meta"))


def move_buffers(model: nn.Module, device: torch.device | str) -> None:
    """All buffers of the model (rotary frequencies, masks) to the device where it will run."""
    for module in model.modules():
        _move_own_buffers(module, device)


def _move_own_buffers(module: nn.Module, device: torch.device | str) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(prefix == "" or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _state_names(model: nn.Module, prefixes: tuple[str, ...]) -> list[str]:
    return [name for name in model.state_dict() if _is_under(name, prefixes)]


def _is_parameter_real(model: nn.Module, name: str) -> bool:
    """Persistent buffers are never on meta, but hold nothing before they are read: they are read each time."""
    module, _, leaf = name.rpartition(".")
    parameter = model.get_submodule(module)._parameters.get(leaf)
    return parameter is not None and not parameter.is_meta


def _real_twin(model: nn.Module, names: NameMap, name: str) -> Tensor | None:
    group: tuple[str, ...] = next((group for group in names.tied if name in group), ())
    for member in group:
        if member != name and _is_parameter_real(model, member):
            return model.get_parameter(member)
    return None


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _casts(model: nn.Module, dtype: torch.dtype | None) -> Callable[[str], torch.dtype | None]:
    """The dtype of a parameter: `dtype`, but fp32 where the model's class says that half precision breaks it."""
    kept: set[str] = set()
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if not kept:
        return lambda name: dtype
    matches, *_ = build_glob_alternation([*sorted(kept)])
    return lambda name: torch.float32 if matches.search(name) else dtype


def _converted(
    model: nn.Module,
    name: str,
    *,
    checkpoint: Checkpoint,
    names: NameMap,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    conversion = names.conversion(name)
    assert conversion is not None
    tensors = checkpoint.read((source for _, source in conversion.sources), dtype=dtype, device=device)
    return {target: tensor.contiguous() for target, tensor in conversion.run(model, tensors).items()}


def _decoded(model: nn.Module, name: str, parts: dict[str, str], *, checkpoint: Checkpoint, decode: Decode) -> Tensor:
    """The weight as its module stores it: transposed for a Conv1D."""
    module = name.removesuffix(".weight")
    tensors = checkpoint.read(parts.values())
    weight = decode(module, {suffix: tensors[source] for suffix, source in parts.items()})
    if not weight.is_floating_point():
        raise CheckpointError(f"{checkpoint.source}: {module} decodes to {weight.dtype}, which isn't a weight's dtype.")
    return weight.T.contiguous() if isinstance(model.get_submodule(module), Conv1D) else weight
