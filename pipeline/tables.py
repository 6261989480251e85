"""Embedding tables, and the modules that use the same matrix: found in any model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.names import NameMap
from modelzip.weights.embedding import embedding_of
from modelzip.weights.value import CompressedWeight


@dataclass(frozen=True)
class Table:
    """A matrix that is looked up.

    module: the one under whose name the checkpoint holds it. tensor: of its weight there; of a compressed one, the name
    that the weight would have. others: modules that use the same matrix, such as a tied output head.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    others: tuple[str, ...]


def input_table(model: Any, names: NameMap) -> Table:
    """The table of the tokens. Raises CheckpointError if it can't be told, or what uses it can't use another form."""
    module = model.get_input_embeddings()
    path = next((name for name, one in model.named_modules() if one is module), None)
    if path is None or not isinstance(module, nn.Embedding):
        raise CheckpointError(f"{type(model).__name__} has no embedding of tokens that modelzip knows")
    return table_of(path, model, names)


def table_of(path: str, model: nn.Module, names: NameMap) -> Table:
    """The table of the embedding at this path. Raises CheckpointError as `input_table` does."""
    weight = f"{path}.weight"
    group = next((group for group in names.tied if weight in group), (weight,))
    owner = names.owner(weight)
    parts = names.parts(owner.removesuffix(".weight"))
    suffix, tensor = next(iter(parts.items()), ("weight", names.source(owner)))
    if tensor is None:
        raise CheckpointError(f"{owner} isn't stored as it is, but fused with others")
    users = [name.removesuffix(".weight") for name in group]
    for user, name in zip(users, group, strict=True):
        if user == name or not isinstance(model.get_submodule(user), nn.Embedding | nn.Linear):
            raise CheckpointError(f"{name} is the same matrix as {owner}, and is neither an embedding's nor a linear's")
    module = owner.removesuffix(".weight")
    rows, columns = model.get_parameter(weight).shape
    others = tuple(user for user in users if user != module)
    return Table(module, tensor.removesuffix(suffix) + "weight", (rows, columns), others)


def refusal(table: Table, model: nn.Module, made: CompressedWeight) -> str | None:
    """Why what uses the table can't look it up in this form, or None."""
    for name in (table.module, *table.others):
        module = model.get_submodule(name)
        try:
            if isinstance(module, nn.Embedding):
                embedding_of(made, module)
        except ValueError as error:
            return str(error)
    return None
