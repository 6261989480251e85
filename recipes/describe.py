"""Words for a settings field, made from its type and range: for problems, options and `modelzip methods`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

LONGEST = 60
"""Characters of a user's value that a sentence repeats."""


def allowed(field: FieldInfo) -> str:
    """The values that a field takes, as a part of a sentence: `2 to 8`, `none or mse`."""
    own = extra(field, "allowed")
    return own if own else either(_parts(field.annotation, field.metadata))


def member(field: FieldInfo) -> str:
    """The values that a member of a list takes, as a part of a sentence."""
    kinds = (field.annotation, *get_args(field.annotation))
    lists = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
    return either(_parts(lists[0], ())) if lists else "text"


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field takes, for completion and for the nearest word to a wrong one."""
    return tuple(_words(field.annotation))


def words_beside(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field takes as a whole, without those that are only entries of its list."""
    annotation = field.annotation
    ones = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(word for one in ones if get_origin(one) is not tuple for word in _words(one))


def extra(field: FieldInfo, key: str) -> str:
    """A string of the field's json_schema_extra, or ''."""
    found = field.json_schema_extra
    return str(found.get(key, "")) if isinstance(found, dict) else ""


def default(field: FieldInfo) -> str:
    """A field's default as YAML would show it, or '' if it must be given or is nothing."""
    if field.is_required() or field.default_factory is not None or field.default in (None, ""):
        return ""
    return shown(field.default)


def shown(value: object) -> str:
    """A value as YAML would show it, cut where it is long."""
    if isinstance(value, str):
        text = value if value and value.isprintable() and value == value.strip() else json.dumps(value)
    else:
        try:
            text = json.dumps(value, default=str, ensure_ascii=False)
        except (ValueError, TypeError):  # YAML can hold a list within itself, and keys that are no text
            text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def either(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} or {last}" if most else last


def _parts(annotation: Any, metadata: Sequence[object]) -> list[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _parts(inner, [*metadata, *_flat(more)])
    if origin in (Union, types.UnionType):
        return [part for one in get_args(annotation) for part in _parts(one, metadata)]
    if origin is Literal:
        return [shown(value) for value in get_args(annotation)]
    if annotation is bool:
        return ["true", "false"]
    if annotation in (int, float):
        return [_range(annotation is int, metadata)]
    if annotation is type(None):
        return ["null"]
    if origin is tuple:
        return ["a list of texts"]
    if isinstance(origin or annotation, type) and issubclass(origin or annotation, Mapping):
        return ["a mapping"]
    return ["text"]


def _flat(metadata: Iterable[object]) -> list[object]:
    """The constraints themselves, taken out of `Field(...)` where they come in one."""
    flat: list[object] = []
    for one in metadata:
        flat.extend(one.metadata if isinstance(one, FieldInfo) else [one])
    return flat


def _range(whole: bool, metadata: Sequence[object]) -> str:
    limits = {key: getattr(one, key) for one in metadata for key in ("ge", "gt", "le", "lt") if hasattr(one, key)}
    if "ge" in limits and "le" in limits and limits["le"] < 2**53:
        least, most = limits["ge"], limits["le"]
        return f"{least} to {most}" if least < most else f"{least}"
    noun = "a whole number" if whole else "a number"
    words = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}"}
    told = [words[key].format(limit) for key, limit in limits.items() if abs(limit) < 2**53]
    return f"{noun} ({' and '.join(told)})" if told else noun


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for one in get_args(annotation) for word in _words(one)]


def shape(field: FieldInfo) -> Literal["one", "list", "mapping"]:
    """Whether a field takes a single value, a list (perhaps beside words), or a mapping."""
    origins = {get_origin(one) for one in (field.annotation, *get_args(field.annotation))}
    if tuple in origins:
        return "list"
    return "mapping" if any(isinstance(one, type) and issubclass(one, Mapping) for one in origins) else "one"
