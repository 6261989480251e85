"""Which modules a pattern names, and which settings a stage has for a module."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from pydantic import ValidationError

from modelzip.checkpoints.errors import RecipeError
from modelzip.compressors.settings import MethodSettings

from .schema import Stage


def matches(pattern: str, name: str) -> bool:
    """Whether a module's whole name fits: a glob (* also goes over dots), or `re:` and a regular expression."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def settings_for(stage: Stage, module_name: str) -> MethodSettings | None:
    """The stage's settings for a module, or None if it is left alone. The last rule that fits wins, field by field."""
    if any(matches(pattern, module_name) for pattern in stage.ignore):
        return None
    skip = False
    settings: MethodSettings = stage.settings
    data = settings.model_dump()
    changed = False
    for rule in stage.rules:
        if matches(rule.match, module_name):
            skip = rule.skip if "skip" in rule.model_fields_set else skip
            data = settings.overlaid(data, rule.overrides)
            changed = changed or bool(rule.overrides)
    if skip:
        return None
    if not changed:
        return settings
    try:
        return type(settings).model_validate(data)
    except ValidationError as error:
        told = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise RecipeError(f"The rules for {module_name} don't go together: {told}.") from None


def unmatched(stage: Stage, module_names: Iterable[str]) -> list[str]:
    """The patterns of `ignore` and of the rules that fit no module, in the order of the recipe."""
    names = list(module_names)
    patterns = dict.fromkeys([*stage.ignore, *(rule.match for rule in stage.rules)])
    return [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
