"""Which tensors of a checkpoint make up which parameter of a model.

The names differ in three ways: a base model's prefix that is there or not, old names that transformers renames, and
tensors that it fuses or splits while loading (a mixture's experts, one tensor each on disk, are one 3-D parameter in
memory). The last two follow transformers' own conversion mapping, so every model type that it knows works here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from .errors import CheckpointError
from .index import DTYPES, Checkpoint

_CHUNK = 1 << 24  # bytes compared at a time


@dataclass(frozen=True, eq=False)
class Conversion:
    """One of transformers' converters with the tensors that it takes and the parameters that it yields."""

    converter: WeightConverter
    layer: str  # the name that the sources are renamed to, which the converter needs
    sources: list[tuple[str, str]] = field(default_factory=list)  # (the converter's pattern, checkpoint tensor)

    def run(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From checkpoint tensors to the model's parameters by name."""
        converter: Any = deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.layer, name, pattern, tensors[name])
        made = converter.convert(self.layer, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class NameMap:
    """Parameters and persistent buffers of `model` (its state dict's names) and where they come from."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._state = model.state_dict()
        self._direct: dict[str, str] = {}
        self._conversions: dict[str, Conversion] = {}
        self._parts: dict[str, dict[str, str]] = {}
        self._load_transforms(model)
        layers: dict[str, Conversion] = {}
        unknown = []
        for name in sorted(checkpoint.tensors, key=dot_natural_key):
            target, pattern = self._rename(name)
            if target not in self._state:
                unknown.append(name)
            elif pattern is None:
                self._direct[target] = name
            else:
                conversion = layers.setdefault(target, Conversion(self._by_pattern[pattern], target))
                conversion.sources.append((pattern, name))
        for conversion in layers.values():
            self._add_conversion(conversion, model, checkpoint)
        if checkpoint.quantization is not None:
            unknown = [name for name in unknown if not self._add_part(name, model)]
            for module in self._parts:
                if f"{module}.weight" in self._direct:
                    self._parts[module]["weight"] = self._direct.pop(f"{module}.weight")
        self.unused: tuple[str, ...] = tuple(unknown)
        shared = self._share_parts((checkpoint.quantization or {}).get("shared", {}))
        self.tied = self._find_ties(model, checkpoint, shared)
        self._check_shapes(checkpoint)
        self._check_missing(model, checkpoint)

    def source(self, name: str) -> str | None:
        """The checkpoint tensor that holds this parameter as it is; None if it is converted, compressed or tied."""
        return self._direct.get(name)

    def sources(self, names: Iterable[str]) -> list[str]:
        """All checkpoint tensors that are read to make these parameters, ties and conversions followed."""
        found: dict[str, None] = {}
        for name in names:
            owner = self.owner(name)
            if owner in self._direct:
                found[self._direct[owner]] = None
            elif owner in self._conversions:
                found.update(dict.fromkeys(source for _, source in self._conversions[owner].sources))
            else:
                found.update(dict.fromkeys(self._parts.get(owner.removesuffix(".weight"), {}).values()))
        return list(found)

    def stored(self) -> list[str]:
        """Parameters that the checkpoint holds as they are, and those that it holds compressed."""
        return [*self._direct, *(f"{module}.weight" for module in self._parts)]

    def conversion(self, name: str) -> Conversion | None:
        return self._conversions.get(name)

    def parts(self, module: str) -> dict[str, str]:
        """Of a compressed linear or embedding: {"weight_packed": checkpoint tensor, ...}; empty for other modules."""
        return dict(self._parts.get(module, {}))

    def owner(self, name: str) -> str:
        """The parameter of a tie that the checkpoint stores; `name` itself where it isn't tied."""
        for group in self.tied:
            if name in group:
                return next((member for member in group if self._is_stored(member)), name)
        return name

    def _is_stored(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        return name in self._direct or name in self._conversions or (module != name and module in self._parts)

    def _load_transforms(self, model: Any) -> None:
        transforms = get_model_conversion_mapping(model) or []
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix: str = getattr(model, "base_model_prefix", "")

    def _rename(self, name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        return target, pattern

    def _add_conversion(self, conversion: Conversion, model: nn.Module, checkpoint: Checkpoint) -> None:
        """A rehearsal on the meta device says which parameters come out, and whether the shapes fit."""
        tensors = {}
        for _, name in conversion.sources:
            info = checkpoint.tensors[name]
            tensors[name] = torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        try:
            made = conversion.run(model, tensors)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint.source}: the {len(tensors)} tensors of {conversion.layer} don't fit together ({error})."
            ) from error
        for name, tensor in made.items():
            if name in self._state:
                _require_shape(checkpoint, name, tuple(tensor.shape), tuple(self._state[name].shape))
                self._conversions[name] = conversion

    def _add_part(self, name: str, model: nn.Module) -> bool:
        """Whether `name` is a piece of a compressed module: what stands before some dot in it names that module."""
        pieces = name.split(".")
        for cut in range(len(pieces) - 1, 0, -1):
            target, _ = self._rename(".".join([*pieces[:cut], "weight"]))
            module = target.removesuffix(".weight")
            if target in self._state and isinstance(model.get_submodule(module), nn.Linear | Conv1D | nn.Embedding):
                self._parts.setdefault(module, {})[".".join(pieces[cut:])] = name
                return True
        return False

    def _share_parts(self, shared: Mapping[str, str]) -> dict[str, str]:
        """Give modules the parts that they share with others; {parameter: the one that it is} where all is shared.

        shared: as in config.json's `quantization_config`: parameters and parts of compressed modules, with the owner.
        """
        whole: dict[str, str] = {}
        for target, source in shared.items():
            (to, _, leaf), (of, _, of_leaf) = target.rpartition("."), source.rpartition(".")
            weight, of_weight = self._rename(f"{to}.weight")[0], self._rename(f"{of}.weight")[0]
            parts = self._parts.get(of_weight.removesuffix(".weight"), {})
            if of_leaf in parts:
                self._parts.setdefault(weight.removesuffix(".weight"), {})[leaf] = parts[of_leaf]
                whole[weight] = of_weight
            else:
                whole[self._rename(target)[0]] = self._rename(source)[0]
        return {target: source for target, source in whole.items() if self._are_alike(target, source)}

    def _are_alike(self, first: str, second: str) -> bool:
        """Whether two parameters are stored as parts of the same tensors, or both not in parts."""
        one, other = (self._parts.get(name.removesuffix(".weight"), {}) for name in (first, second))
        return one == other or not (first.endswith(".weight") and second.endswith(".weight"))

    def _find_ties(self, model: Any, checkpoint: Checkpoint, shared: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
        """Groups of parameters that are one, by the model's declaration or config.json's; stored apart and unequal,
        they are not."""
        groups: list[list[str]] = []
        declared = model.get_expanded_tied_weights_keys(all_submodels=True)
        for target, source in (*declared.items(), *shared.items()):
            stored = [self._direct[name] for name in (target, source) if name in self._direct]
            if len(stored) == 2 and not _same_bytes(checkpoint, *stored):
                continue
            if self._is_stored(target) and self._is_stored(source) and not self._are_alike(target, source):
                continue
            joined = [group for group in groups if target in group or source in group]
            groups = [group for group in groups if group not in joined]
            groups.append(list(dict.fromkeys([source, target, *(name for group in joined for name in group)])))
        return tuple(tuple(group) for group in groups)

    def _check_shapes(self, checkpoint: Checkpoint) -> None:
        for name, source in self._direct.items():
            _require_shape(checkpoint, name, checkpoint.tensors[source].shape, tuple(self._state[name].shape))

    def _check_missing(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        missing = [
            name
            for name in self._state
            if not self._is_stored(self.owner(name)) and not any(re.search(pattern, name) for pattern in patterns)
        ]
        if missing:
            others = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{checkpoint.source} lacks {missing[0]}{others} that {type(model).__name__} needs; name a complete "
                'checkpoint, or set "architectures" in its config.json to the class that it was saved from.'
            )


def _require_shape(checkpoint: Checkpoint, name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
    if found != needed:
        raise CheckpointError(
            f"{checkpoint.source}: the tensor for {name} has the shape {list(found)} where config.json asks for "
            f"{list(needed)}; config and weights aren't of the same model."
        )


def _same_bytes(checkpoint: Checkpoint, first: str, second: str) -> bool:
    one, two = checkpoint.tensors[first], checkpoint.tensors[second]
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    with one.file.open("rb") as left, two.file.open("rb") as right:
        left.seek(one.offset)
        right.seek(two.offset)
        for start in range(0, one.nbytes, _CHUNK):
            count = min(_CHUNK, one.nbytes - start)
            if left.read(count) != right.read(count):
                return False
    return True
