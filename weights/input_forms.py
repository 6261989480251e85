"""All ways in which inputs are rounded, by the name that they have in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from torch import Tensor

from .inputs import InputRounding, Inputs, OutlierRounding
from .mixed_columns import ColumnRounding

_Form: TypeAlias = type[InputRounding] | type[OutlierRounding] | type[ColumnRounding]

FORMS: Final[Mapping[str, _Form]] = MappingProxyType(
    {InputRounding.form: InputRounding, OutlierRounding.form: OutlierRounding, ColumnRounding.form: ColumnRounding}
)


def inputs_from(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Inputs:
    """What `meta` and `tensors` of a weight say of its inputs. Raises ValueError for a form that isn't known."""
    if meta["form"] not in FORMS:
        raise ValueError(f"inputs of the form {meta['form']!r}; installed are {', '.join(FORMS)}")
    return FORMS[meta["form"]].from_tensors(tensors, meta)
