"""Checking one flat mapping against its class, with every problem found at once, each with its path and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from modelzip.checkpoints.errors import ProblemsError

from .describe import allowed, choices, member, shown

Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Found:
    """The problems found so far, each as (path, sentence part)."""

    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, sentence: str) -> None:
        """Note a problem at a path such as `stages[1].quantize.bits`."""
        if (path, sentence) not in self.problems:
            self.problems.append((path, sentence))

    def raise_if_any(self, origin: str, renamed: Mapping[str, str]) -> None:
        """Raise all problems. What an option set is called by the option's name, else the path stands after origin."""
        if self.problems:
            raise ProblemsError([_line(origin, path, sentence, renamed) for path, sentence in self.problems])


def _line(origin: str, path: str, sentence: str, renamed: Mapping[str, str]) -> str:
    if path in renamed:
        return f"{renamed[path]}: {sentence}"
    return ": ".join(part for part in (origin, path, sentence) if part)


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that looks most like this one, or None if none looks like it."""
    by_folded = {one.lower().replace("-", "_"): one for one in known}
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), by_folded, n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def suggestion(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {near}?" if near else f"known: {', '.join(names)}"


def inside(path: str, key: object) -> str:
    """The path of a key, or of an index, inside a path."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def as_mapping(data: object, path: str, found: Found) -> Mapping[str, Any] | None:
    """The data as a mapping with text keys; nothing at all counts as an empty one."""
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        found.add(path, f"{shown(data)} is not allowed; it must be a mapping")
        return None
    for key in data:
        if not isinstance(key, str):
            found.add(inside(path, shown(key)), "is not a name; put quotes around it if it is meant as one")
    return {key: value for key, value in data.items() if isinstance(key, str)}


def check(
    cls: type[Model],
    data: Mapping[str, Any],
    path: str,
    *,
    found: Found,
    unknown: Callable[[str], str] | None = None,
) -> Model | None:
    """An object of the class, or None if there is a problem; `unknown` makes the sentence about an unknown key."""
    before = len(found.problems)
    for key in data:
        if key not in cls.model_fields:
            found.add(inside(path, key), unknown(key) if unknown else unknown_key(key, cls.model_fields))
    try:
        result = cls.model_validate({key: value for key, value in data.items() if key in cls.model_fields})
    except ValidationError as error:
        for one in error.errors(include_url=False):
            _note(cls, one, path, found=found, data=data)
        return None
    return result if len(found.problems) == before else None


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What is said of a key that nobody knows."""
    if key in ("trust_remote_code", "remote_code", "allow_remote_code"):
        return "is not a recipe key; a recipe can't enable code that comes with a model"
    return f"is not a known key; {suggestion(key, known)}"


def _note(cls: type[BaseModel], error: ErrorDetails, path: str, *, found: Found, data: Mapping[str, Any]) -> None:
    """Turn one of pydantic's errors into a sentence. A union gives one error a branch: they become one sentence."""
    if not error["loc"]:
        found.add(path, str(error["msg"]).removeprefix("Value error, "))
        return
    name, *rest = error["loc"]
    field_info = cls.model_fields[str(name)]
    where = inside(path, name)
    if error["type"] == "missing":
        found.add(where, f"is missing; it must be {allowed(field_info)}")
    elif rest and isinstance(rest[0], int):
        found.add(inside(where, rest[0]), f"{shown(error['input'])} is not allowed; it must be {member(field_info)}")
    else:
        value = data[str(name)]
        words = choices(field_info)
        near = nearest(value, words) if isinstance(value, str) else None
        hint = f"; did you mean {near}?" if near else ""
        found.add(where, f"{shown(value)} is not allowed; it must be {allowed(field_info)}{hint}")
