"""Pico models for every room's tests: the fixture `models` is the module tests/models.py, and classifiers with data."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def models() -> ModuleType:
    return load_models()


def load_models() -> ModuleType:
    return _beside("models")


def _beside(stem: str) -> ModuleType:
    """A module of this folder, which is no package."""
    name = f"modelzip_pico_{stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{stem}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `family` runs for every one of them."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(load_models().FAMILIES), scope="session")


@pytest.fixture(scope="session")
def saved(models: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """saved("llama") -> a folder with that pico model, written once a session and not to be changed."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = models.saved(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder_of


@pytest.fixture(scope="session")
def save_classifier() -> Callable[..., Path]:
    """save_classifier(folder, layers=2, seed=0, **BertConfig's) -> that folder: a pico BERT classifier of two classes,
    with a WordPiece tokenizer."""
    save: Callable[..., Path] = _beside("classifiers").save_classifier
    return save


@pytest.fixture(scope="session")
def write_labelled() -> Callable[..., Path]:
    """write_labelled(file, count, seed=0) -> that tsv of `sentence` and `label`, which such a classifier can learn."""
    write: Callable[..., Path] = _beside("classifiers").write_labelled
    return write
