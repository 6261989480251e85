"""Recipe files: where they are, and YAML read strictly (a key that stands twice is a mistake)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

from modelzip.checkpoints.errors import ProblemsError, RecipeError

from .problems import inside, suggestion

LARGEST_BYTES: Final = 1_000_000


def library() -> dict[str, str]:
    """The shipped recipes: name -> YAML."""
    folder = resources.files("modelzip.recipes.library")
    found = {one.name: one for one in folder.iterdir() if one.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): found[name].read_text(encoding="utf-8") for name in sorted(found)}


def read_recipe_file(path: str) -> tuple[dict[str, Any], str]:
    """The data of a recipe file or of a shipped recipe, and what to call it in problems. Raises RecipeError."""
    file = Path(path).expanduser()
    shipped = library()
    if not file.exists() and path in shipped:
        return read_yaml(shipped[path], path), path
    if not file.exists():
        plain = not file.suffix and len(file.parts) == 1
        hint = f"; shipped recipes: {', '.join(shipped)}" if plain else ""
        near = suggestion(path, shipped) if plain and suggestion(path, shipped).startswith("did") else ""
        raise RecipeError(f"{path}: there is no such recipe file{'; ' + near if near else hint}")
    if not file.is_file():
        raise RecipeError(f"{path}: is not a file; name the recipe file itself")
    if file.stat().st_size > LARGEST_BYTES:
        raise RecipeError(f"{path}: has {file.stat().st_size} bytes, which is too large for a recipe; is it the model?")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not a text file in UTF-8, so it can't be a recipe") from None
    return read_yaml(text, path), path


def read_yaml(text: str, origin: str) -> dict[str, Any]:
    """A YAML mapping. Raises RecipeError with the line of a mistake, or ProblemsError with all keys given twice."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        doubled = [] if node is None else list(_doubled(node, "", set()))
        if doubled:
            raise ProblemsError([f"{origin}: {one}" for one in doubled])
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise RecipeError(f"{origin}{where}: is not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{origin}: is not valid YAML: {error}".splitlines()[0]) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(f"{origin}: is not a recipe; it must be a mapping that begins with a line such as `stages:`")
    return data


def _doubled(node: yaml.Node, path: str, seen: set[int]) -> Iterator[str]:
    """Sentences about keys that stand twice in one mapping. An alias is looked at once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            where = inside(path, name)
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                yield f"{where}: is given twice, in lines {lines[name]} and {line}; keep one"
            lines[name] = line
            yield from _doubled(value, where, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _doubled(value, inside(path, index), seen)
