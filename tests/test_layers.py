"""The rooms and their order, kept by reading the source."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGES = {"tests", "benchmarks", "docs", "tools", "build", "dist"}
LIGHT = re.compile(
    r"(cli|recipes)/.*|compressors/(__init__|settings)\.py|compressors/\w+/(__init__|(\w+_)?settings)\.py"
)
LIGHT_FILES = {
    "checkpoints/__init__.py",
    "checkpoints/errors.py",
    "evaluation/__init__.py",
    "evaluation/gates.py",
    "evaluation/fallbacks.py",
}
HEAVY = {"torch", "transformers", "datasets", "accelerate", "numpy", "huggingface_hub", "safetensors"}


def rooms() -> list[str]:
    """The rooms from the highest to the lowest, as docs/architecture.md lists them."""
    return re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)


def sources() -> list[Path]:
    found = (path for room in rooms() if (ROOT / room).is_dir() for path in (ROOT / room).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in found)


def imported(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """The full names of modules that a file imports; relative imports are those of its own room."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in _at_import(tree) if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ["modelzip", *path.parent.parts][: 2 + len(path.parent.parts) - node.level]
                yield ".".join([*base, node.module or ""]).rstrip(".")
            elif node.module == "modelzip":
                yield from (f"modelzip.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those in functions, nor those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _at_import(child)


def test_the_rooms_are_read_from_the_architecture():
    assert rooms()[0] == "cli"
    assert {"recipes", "compressors", "checkpoints", "weights", "kernels"} <= set(rooms())


def test_a_room_imports_only_rooms_below_it():
    order = rooms()
    wrong = [
        f"{path} imports {name}"
        for path in sources()
        for name in imported(path)
        if name.startswith("modelzip.")
        and (name.split(".")[1] not in order or order.index(name.split(".")[1]) < order.index(path.parts[0]))
    ]
    assert wrong == []


def test_nothing_is_imported_under_a_rooms_bare_name():
    wrong = [f"{path} imports {name}" for path in sources() for name in imported(path) if name.split(".")[0] in rooms()]
    assert wrong == []


def test_the_root_and_kernels_have_no_init_that_would_shadow_other_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "modelzip").exists()


def test_every_folder_with_code_is_a_package_of_the_distribution():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in sources() if path.parent.parts[0] not in NOT_PACKAGES}
    named = {".".join(("modelzip", *folder.parts)): str(folder) for folder in folders}
    assert sorted(set(named) - set(setuptools["packages"])) == []
    mapped = setuptools["package-dir"]
    assert {name: mapped.get(name) for name in named} == named


def test_what_help_needs_imports_no_heavy_library_at_module_level():
    light = [path for path in sources() if LIGHT.fullmatch(path.as_posix()) or path.as_posix() in LIGHT_FILES]
    wrong = [
        f"{path} imports {name}"
        for path in light
        for name in imported(path, only_at_import=True)
        if name.split(".")[0] in HEAVY
    ]
    assert len(light) > 20
    assert wrong == []
