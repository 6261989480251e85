"""A structural method as the engine sees it: what will go, what the checkpoint becomes, and how the choice is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from modelzip.checkpoints.blocks import Structure, find_structure
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.rewrite import Rewrite
from modelzip.checkpoints.skeleton import skeleton
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.recipes.schema import Recipe

from .context import Context
from .text import Windows


@dataclass(frozen=True)
class Headers:
    """A checkpoint's model on the meta device, not to be changed, its names and its structure."""

    model: Any
    names: NameMap
    structure: Structure


@lru_cache(maxsize=2)
def headers_of(checkpoint: Checkpoint) -> Headers:
    """Made once for all that a stage's plan asks of it."""
    model = skeleton(checkpoint)
    names = NameMap(model, checkpoint)
    return Headers(model, names, find_structure(model, checkpoint, names=names))


class WholeSettings(Protocol):
    """What the engine asks the settings of a structural method."""

    @property
    def method(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def needs_data(self) -> bool: ...
    @property
    def is_given(self) -> bool: ...
    def model_dump(self, *, mode: str = ...) -> dict[str, Any]: ...
    def model_dump_json(self) -> str: ...


@dataclass(frozen=True)
class StructuralMethod:
    """first: the choice as far as headers and settings tell it; raises ProblemsError or CheckpointError.

    build: what the checkpoint becomes by a choice; raises the same. choose: the choice by what the model does; None
    where `first`'s is final. memory: bytes that all of it needs, beside the interpreter's. notes: for the plan.
    fill: writes the parts whose tensors take more than the pieces can give, such as a run of the model.
    """

    first: Callable[[Any, Checkpoint], Any]
    build: Callable[[Any, Checkpoint, Any], Rewrite]
    choose: Callable[[Any, Checkpoint, Windows | None, Context], Any] | None
    memory: Callable[[Any, Checkpoint, Recipe], int]
    notes: Callable[[Any, Rewrite], tuple[str, ...]]
    fill: Callable[[Any, Checkpoint, Rewrite, CheckpointWriter, Windows | None, Context], None] | None = None
