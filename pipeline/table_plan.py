"""Matrices outside the blocks that a stage rounds beside the linears within: which ones, and what they become.

These are embedding tables, and square linears between the blocks and the head, such as an encoder's pooler. They are
rounded to nearest on the stage's grid, groups along the hidden size, whatever the stage's method: a look-up has no
inputs whose Hessian could say more. An output head that is tied to a table shares the codes.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from modelzip.checkpoints.blocks import Linear, Structure
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.compressors.methods import ON_TABLES
from modelzip.compressors.settings import MethodSettings
from modelzip.recipes.match import settings_for
from modelzip.recipes.schema import Stage
from modelzip.weights.dense import Dense
from modelzip.weights.layouts import stored
from modelzip.weights.value import CompressedWeight

from .bit_budget import closed
from .forms import expected, fitted
from .module_plan import ModulePlan, method_of, value_dtype
from .tables import Table, refusal, table_of

FEWEST_ROWS: Final = 16
"""Tables with fewer (two kinds of segments, say) weigh nothing, and stay as they are."""


def asks_for_tables(stage: Stage) -> bool:
    """Whether the stage rounds embeddings too."""
    return bool(getattr(stage.settings, "embeddings", False))


def plan_tables(
    stage: Stage, checkpoint: Checkpoint, model: Any, *, names: NameMap, structure: Structure
) -> tuple[list[ModulePlan], dict[str, str]]:
    """The matrices outside the blocks that are rounded, and those that stay as they are, with the reason."""
    planned: list[ModulePlan] = []
    refused: dict[str, str] = {}
    if not asks_for_tables(stage):
        return planned, refused
    rest, seen = set(structure.rest), set()
    for path, module in model.named_modules():
        if f"{path}.weight" not in rest or not (_is_table(module) or _is_inner(module, model)):
            continue
        try:
            table = table_of(path, model, names)
        except CheckpointError as error:
            refused[path] = str(error)
            continue
        if table.module in seen:
            continue
        seen.add(table.module)
        asked = settings_for(stage, table.module)
        if asked is not None:
            plan = _plan(table, asked, checkpoint=checkpoint, model=model, names=names)
            if isinstance(plan, str):
                refused[table.module] = plan
            else:
                planned.append(plan)
    return planned, refused


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.num_embeddings >= FEWEST_ROWS


def _is_inner(module: nn.Module, model: Any) -> bool:
    """Whether a linear outside the blocks leads from the hidden states to others like them, and so isn't a head."""
    hidden = getattr(model.config.get_text_config(), "hidden_size", None)
    is_square = isinstance(module, nn.Linear) and module.in_features == module.out_features == hidden
    return is_square and module is not model.get_output_embeddings()


def _plan(
    table: Table, asked: MethodSettings, *, checkpoint: Checkpoint, model: nn.Module, names: NameMap
) -> ModulePlan | str:
    """The plan of one table, or why it stays as it is."""
    suited = ON_TABLES.get(type(asked))
    settings, note = fitted(closed(asked) if suited is None else suited(closed(asked)), table.shape)
    before = _now(table, checkpoint, names)
    after = expected(method_of(settings), before, settings, value_dtype(before))
    if isinstance(after, str):
        return after
    if problem := refusal(table, model, after):
        return problem
    replaces = tuple(names.parts(table.module).values()) or (table.tensor,)
    linear = Linear(table.module, table.tensor, table.shape, False, table.others)
    return ModulePlan(table.module, settings, before, after, note, linear, replaces, is_table=True)


def _now(table: Table, checkpoint: Checkpoint, names: NameMap) -> CompressedWeight:
    parts = names.parts(table.module)
    if not parts:
        dtype = DTYPES[checkpoint.tensors[table.tensor].dtype]
        return Dense(torch.empty(table.shape, dtype=dtype, device="meta"))
    config = checkpoint.quantization
    assert config is not None
    return stored(config, table.module, {}, table.shape)
