"""From the values of the options to one recipe: built-in defaults, then the recipe file, then options."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from modelzip.checkpoints.errors import ProblemsError, RecipeError
from modelzip.compressors.settings import MethodSettings
from modelzip.evaluation.gates import parse_gates, require_measured
from modelzip.recipes.describe import choices
from modelzip.recipes.files import read_recipe_file
from modelzip.recipes.load import NOT_RENAMED, parse_recipe
from modelzip.recipes.schema import STAGES, Recipe, Stage

from .model import own_recipe
from .options import STAGE, Option, shape

Path_ = tuple[str | int, ...]


def recipe_from(options: Sequence[Option], values: Mapping[str, Any], kind: str | None) -> Recipe:
    """The recipe of a command. kind: the verb's kind of stage, or None for `run`, which takes stages as they are."""
    file = values.get("recipe")
    if file is None and values.get("model") is None and kind is not None:
        own = own_recipe(Path.cwd())
        file = None if own is None else str(own.relative_to(Path.cwd()))
    data, origin = read_recipe_file(file) if file is not None else ({}, "")
    data = copy.deepcopy(data)
    given = [
        (option.path, values[option.name], option.said)
        for option in options
        if option.path and values.get(option.name) is not None
    ]
    given += [_assignment(one) for one in values.get("set") or ()]
    stage = () if kind is None else _stage_path(data, kind, origin)
    renamed: dict[str, str] = {}
    method = None if kind is None else _method(data, stage, STAGES[kind], asked=values.get("set_stage_method"))
    for path, value, said in given:
        if path[0] == STAGE and method is not None and path[1] in method.model_fields:
            value = _taken_apart(method.model_fields[path[1]], value, said)
        whole: Path_ = (*stage, *path[1:]) if path[0] == STAGE else path
        if _put(data, whole, value):
            renamed[_dotted(whole)] = said
    return checked(data, origin, renamed=renamed)


def checked(
    data: Mapping[str, Any], origin: str, *, renamed: Mapping[str, str] = NOT_RENAMED, least_stages: int = 1
) -> Recipe:
    """The recipe, with its conditions such as `kl > 0.3` checked too. Raises ProblemsError that lists all mistakes."""
    problems: list[str] = []
    recipe = None
    try:
        recipe = parse_recipe(data, origin, renamed=renamed, least_stages=least_stages)
    except ProblemsError as error:
        problems += error.sentences
    section = data.get("evaluate")
    conditions = section.get("fail_if") if isinstance(section, Mapping) else None
    for text in conditions if isinstance(conditions, list) else []:
        try:
            gates = parse_gates([str(text)])
            require_measured(gates, evaluation=recipe is None or recipe.evaluate.enabled)
        except RecipeError as error:
            problems.append(str(error))
    if recipe is None or problems:
        raise ProblemsError(problems)
    return recipe


def _assignment(text: str) -> tuple[tuple[str, ...], Any, str]:
    """`key=value` of --set. A key with a dot, or of the recipe's top, starts from there; others go to the stage."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text}: must be KEY=VALUE, such as --set block_size=64")
    keys = tuple(part.strip().replace("-", "_") for part in key.split("."))
    top = len(keys) > 1 or (keys[0] in Recipe.model_fields and keys[0] != "stages")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text}: the value is not valid YAML") from None
    plain = value.strip() if isinstance(parsed, str | int | float) and not isinstance(parsed, bool) else parsed
    return keys if top else (STAGE, *keys), plain, f"--set {key}"


def _stage_path(data: dict[str, Any], kind: str, origin: str) -> Path_:
    """Where the verb's own stage stands in the data. It is made if there are no stages at all."""
    stages = data.setdefault("stages", [])
    if stages is None or stages == []:
        data["stages"] = stages = [{kind: {}}]
    if not isinstance(stages, list):
        return ("stages", 0, kind)
    for index, one in enumerate(stages):
        if isinstance(one, str) and one in STAGES:
            stages[index] = {one: {}}
        elif isinstance(one, dict) and len(one) == 1 and next(iter(one.values())) is None:
            stages[index] = {next(iter(one)): {}}
    found = [index for index, one in enumerate(stages) if isinstance(one, dict) and kind in one]
    known = all(isinstance(one, dict) and set(one) <= set(STAGES) for one in stages)
    if known and len(found) != 1:
        count = "no" if not found else str(len(found))
        raise RecipeError(
            f"{origin}: has {count} stages of the kind {kind}, but `modelzip {kind}` takes a recipe with one; "
            f"use `modelzip run {origin}`"
        )
    return ("stages", found[0] if found else 0, kind)


def _method(
    data: Mapping[str, Any], stage: Path_, cls: type[Stage], *, asked: str | None
) -> type[MethodSettings] | None:
    """The settings class of the verb's own stage, None if there is none of that name."""
    found: Any = data
    for key in stage:
        if isinstance(found, list) and isinstance(key, int) and key < len(found):
            found = found[key]
        else:
            found = found.get(key) if isinstance(found, Mapping) else None
    written = found.get("method") if isinstance(found, Mapping) else None
    return cls.methods.get(str(asked or written or cls.default_method))


def _taken_apart(field: FieldInfo, value: Any, said: str) -> Any:
    """What an option's words mean to this method: `0,2` is a list to one that takes a list."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in texts):
        return value
    parts = [part.strip() for one in texts for part in one.split(",")]
    if shape(field) == "list" or ("tuple[" in str(field.annotation) and value not in choices(field)):
        return parts
    if shape(field) == "mapping":
        pairs = [part.partition("=") for part in parts]
        if not all(key and equals for key, equals, _ in pairs):
            raise RecipeError(f"{said} {','.join(texts)}: must be KEY=VALUE, several separated by commas")
        return {key.strip(): yaml.safe_load(text) for key, _, text in pairs}
    if len(texts) > 1:
        raise RecipeError(f"{said}: is given {len(texts)} times, but is one value to this method")
    return texts[0]


def _put(data: Any, path: Path_, value: Any) -> bool:
    """Set the value at a path; False where the data have another shape, which parsing will complain about."""
    *parents, last = path
    for key in parents:
        if isinstance(data, dict):
            if data.get(key) is None:
                data[key] = {}
            data = data[key]
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return False
    if not isinstance(data, dict):
        return False
    data[last] = value
    return True


def _dotted(path: Path_) -> str:
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in path).removeprefix(".")
