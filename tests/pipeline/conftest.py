"""Runs of the pipeline on pico models, in this process: what a run starts as a fresh process is called here instead."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, chdir, contextmanager, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import modelzip.weights  # noqa: F401  # as the fresh process does for modelzip's own layout
from modelzip.checkpoints.fresh import FreshProcessError
from modelzip.checkpoints.index import Checkpoint
from modelzip.compressors.obs import inverse_factor
from modelzip.compressors.quantize.gptq import gptq
from modelzip.compressors.quantize.grid import fit_grid
from modelzip.compressors.quantize.rtn import rtn
from modelzip.compressors.quantize.settings import Gptq, QuantizeSettings, Rtn
from modelzip.exporters.source import Source
from modelzip.pipeline import selftext, verify
from modelzip.pipeline.clock import Clock
from modelzip.pipeline.context import Context
from modelzip.pipeline.identity import fingerprint_of
from modelzip.pipeline.run import Result, run_recipe
from modelzip.pipeline.training import plan_training, run_training
from modelzip.recipes.load import parse_recipe
from modelzip.recipes.schema import STAGES
from modelzip.weights.affine import Affine
from modelzip.weights.kinds import from_tensors

ALPHABET = string.ascii_lowercase + string.digits + string.punctuation + " \n"
FIRST = 4
"""Token id of the alphabet's first character."""


class Progress:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total

    def say(self, line: str) -> None:
        self.lines.append(line)


@contextmanager
def played(module: str, *arguments: str, place: Path) -> Iterator[Iterator[str]]:
    """A `checkpoints.fresh.fresh` that plays our module in this process."""
    told = StringIO()
    try:
        with chdir(place), redirect_stdout(told):
            importlib.import_module(module)._main(*arguments)
    except SystemExit as error:
        raise FreshProcessError(str(error.code)) from None
    yield iter(told.getvalue().splitlines())


@pytest.fixture(scope="session")
def here() -> Callable[[Callable[[], Any]], Any]:
    """here(action) -> the action's result; fresh processes that it asks for are played in this one, to save seconds."""

    def call(action: Callable[[], Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for module in (verify, selftext):
                patch.setattr(module, "fresh", played)
            return action()

    return call


@pytest.fixture(scope="session")
def recipe_of() -> Callable[..., Any]:
    """recipe_of(model, *stages, calibration=..., ...) -> a recipe: few windows, no evaluation unless asked for.

    A stage is written as in YAML, `{"prune": {...}}`; without its kind it quantizes in groups of 16.
    """

    def make(model: Path, *stages: Mapping[str, Any], calibration: Mapping[str, Any] | None = None, **rest: Any) -> Any:
        data = {
            "model": str(model),
            "calibration": {"samples": 8, "seq_len": 16, **(calibration or {})},
            "stages": [
                dict(stage) if stage.keys() & STAGES.keys() else {"quantize": {"group_size": 16, **stage}}
                for stage in stages
            ],
            "evaluate": {"enabled": False},
            **rest,
        }
        return parse_recipe(data, "test")

    return make


@pytest.fixture(scope="session")
def compress(here, recipe_of) -> Callable[..., Result]:
    """compress(model, output, *stages, ...) -> the result of running that recipe."""

    def run(
        model: Path, output: Path, *stages: Mapping[str, Any], progress: Progress | None = None, **rest: Any
    ) -> Result:
        options = {key: rest.pop(key) for key in ("overwrite", "resume") if key in rest}
        recipe = recipe_of(model, *stages, **rest)
        return here(lambda: run_recipe(recipe, output=output, progress=progress or Progress(), **options))

    return run


@pytest.fixture(scope="session")
def progress() -> Progress:
    return Progress()


class Killed(BaseException):
    """What happens to a run that is killed."""


class Fatal(Progress):
    """Progress that ends the run the `times`-th time that a step of this stage is at this number or past it."""

    def __init__(self, stage: str, done: int, *, times: int) -> None:
        super().__init__()
        self._stage, self._done, self._times = stage, done, times

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage == self._stage and done >= self._done:
            self._times -= 1
            if self._times == 0:
                raise Killed


@pytest.fixture(scope="session")
def killed_at() -> Callable[..., AbstractContextManager[Progress]]:
    """with killed_at("train", 6, times=1) as progress: a run that this progress is given to, which is killed there."""

    @contextmanager
    def fatal(stage: str, done: int, *, times: int = 1) -> Iterator[Progress]:
        with pytest.raises(Killed):
            yield Fatal(stage, done, times=times)

    return fatal


@pytest.fixture(scope="session")
def train_stage(progress) -> Callable[..., dict[str, Any]]:
    """train_stage(model, output, kind, stage, seed=..., resume=..., progress=..., callbacks=...) -> the record of that
    stage, whose output has the tensors that its plan said, and as many bytes if they are to be exact.

    What is left of each matrix when all are pruned together isn't known before, so their shapes are not compared.
    """

    def run(
        model: Path,
        output: Path,
        kind: str,
        stage: Mapping[str, Any],
        *,
        seed: int = 0,
        exact: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        recipe = parse_recipe({"model": str(model), "seed": seed, "stages": [{kind: stage}]}, "test")
        source = Checkpoint.open(str(model))
        plan = plan_training(recipe.stages[0], source, recipe=recipe, output=output)
        shown = options.pop("progress", progress)
        context = Context(recipe, torch.device("cpu"), fingerprint_of(recipe, source), Clock(), shown)
        record = run_training(
            plan,
            source,
            target=output,
            describe=lambda found: json.dumps(found, sort_keys=True).encode(),
            context=context,
            **{"overwrite": False, "resume": False, **options},
        )
        written = Checkpoint.open(str(output))
        made, planned = (
            {name: (info.dtype, info.shape if kind == "distill" else ()) for name, info in one.tensors.items()}
            for one in (written, plan.result)
        )
        assert made == planned
        assert plan.bytes_after == written.nbytes or not exact
        return record

    return run


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Path], dict[str, Tensor]]:
    """tensors_of(folder) -> every stored tensor; a name in two files fails."""

    def read(folder: Path) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            part = load_file(file)
            assert not found.keys() & part.keys()
            found |= part
        return found

    return read


@pytest.fixture(scope="session")
def weights_of(tensors_of) -> Callable[[Path], dict[str, Affine]]:
    """weights_of(folder) -> the compressed weight of each module."""

    def read(folder: Path) -> dict[str, Affine]:
        tensors = tensors_of(folder)
        stages = json.loads((folder / "modelzip.json").read_text())["stages"]
        found = {}
        for name, record in (item for stage in stages for item in stage["records"].items()):
            parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(name)}
            found[name] = from_tensors(parts, record["weight"])
        return found

    return read


@pytest.fixture(scope="session")
def prose() -> Callable[..., str]:
    """prose(characters, seed=0) -> words and lines, every character of them in the alphabet."""

    def write(characters: int, *, seed: int = 0) -> str:
        draw = random.Random(seed)
        words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(200)]
        return "".join(draw.choice(words) + draw.choice("   \n") for _ in range(characters))[:characters]

    return write


@pytest.fixture(scope="session")
def spell() -> Callable[[str], Tensor]:
    """spell(text) -> its token ids, made without any tokenizer: one a character."""
    return lambda text: torch.tensor([FIRST + ALPHABET.index(character) for character in text], dtype=torch.int64)


@pytest.fixture(scope="session")
def speaking(models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """speaking("llama") -> that pico model with a tokenizer of one token a character."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folder = folders[name] = tmp_path_factory.mktemp(f"{name}-speaking")
            models.FAMILIES[name].build(vocab_size=FIRST + len(ALPHABET)).save_pretrained(folder)
            vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
            vocabulary |= {character: FIRST + index for index, character in enumerate(ALPHABET)}
            tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
        return folders[name]

    return folder_of


@pytest.fixture(scope="session")
def weights_in() -> Callable[[Path], dict[str, Any]]:
    """weights_in(folder) -> the compressed weights of a checkpoint, by module."""

    def read(folder: Path) -> dict[str, Any]:
        source = Source.of(Checkpoint.open(str(folder)))
        return {name: weight for name in source.matrices() if (weight := source.weight(name)) is not None}

    return read


@pytest.fixture(scope="session")
def rounded(speaking, compress, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speaking llama, rounded to 3 bits."""
    folder = tmp_path_factory.mktemp("rounded") / "out"
    compress(speaking("llama"), folder, {"method": "rtn", "bits": 3})
    return folder


@pytest.fixture(scope="session")
def names(models) -> list[str]:
    """The pico Llama's linears, in the order in which they run."""
    return models.FAMILIES["llama"].expected_linears()


def _inputs_of(model: nn.Module, name: str, windows: Tensor) -> Tensor:
    """What flows into a linear, [tokens, in]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(windows)
    hook.remove()
    (x,) = seen
    return x.reshape(-1, x.shape[-1])


def _alone(weight: Tensor, x: Tensor, settings: QuantizeSettings) -> Affine:
    """One weight compressed for the inputs x [tokens, in], whose second moment is taken in double precision."""
    grid = {"bits": settings.bits, "symmetric": settings.symmetric, "clip": settings.clip, "dtype": torch.float32}
    grid["group_size"] = settings.group_size if isinstance(settings.group_size, int) else weight.shape[1]
    if isinstance(settings, Rtn):
        return rtn(weight, fit_grid(weight, **grid))
    assert isinstance(settings, Gptq)
    hessian = (x.double().T @ x.double() / len(x)).float()
    factor = inverse_factor(hessian, damping=settings.damping, max_damping=settings.max_damping, order=settings.order)
    grid["importance"] = factor.importance()
    return gptq(weight, factor, fit_grid(weight, **grid), block_size=settings.block_size)


@pytest.fixture(scope="session")
def naive(names) -> Callable[..., dict[str, tuple[Affine, float]]]:
    """The engine's truth: transformers' Llama whole in memory, one forward pass for each linear.

    naive(folder, windows, targets) -> the compressed weight of each target and the relative error of its output.
    before: compressed weights to start from.
    """

    @torch.no_grad()
    def compress(
        folder: Path,
        windows: Tensor,
        targets: Mapping[str, QuantizeSettings],
        *,
        propagate: str = "compressed",
        before: Mapping[str, Affine] | None = None,
    ) -> dict[str, tuple[Affine, float]]:
        original = LlamaForCausalLM.from_pretrained(folder).eval()
        for name, weight in (before or {}).items():
            original.get_submodule(name).weight.copy_(weight.dense())
        model = deepcopy(original)
        found = {}
        for name in (name for name in names if name in targets):
            x = _inputs_of(model if propagate == "compressed" else original, name, windows)
            weight = original.get_submodule(name).weight.data
            made = _alone(weight, x, targets[name])
            found[name] = made, float((x @ (weight - made.dense()).T).norm() / (x @ weight.T).norm())
            model.get_submodule(name).weight.copy_(made.dense())
        return found

    return compress


@pytest.fixture(scope="session")
def agreement() -> Callable[[Mapping[str, Affine], Mapping[str, Affine]], float]:
    """agreement(some, others) -> the share of equal codes, over all modules.

    Where the clip search chooses scales (`clip: mse`), the order of sums may tip one, and its whole group with it.
    """

    def share(some: Mapping[str, Affine], others: Mapping[str, Affine]) -> float:
        assert some.keys() == others.keys()
        same = [(some[name].codes() == others[name].codes()).flatten() for name in some]
        return float(torch.cat(same).double().mean())

    return share


@pytest.fixture(scope="module")
def text_file(prose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(prose(2000), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def windows(spell, text_file) -> Tensor:
    """The windows that a run must cut from `text_file`, made without its reader."""
    return spell(text_file.read_text(encoding="utf-8")[:128]).view(8, 16)


@pytest.fixture(scope="session")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Callable[[str, Tensor], None]], Path]:
    """edited(folder, change) -> a copy whose tensors change(name, tensor) has been called on."""

    def copy_of(folder: Path, change: Callable[[str, Tensor], None]) -> Path:
        target = tmp_path_factory.mktemp("edited") / "model"
        shutil.copytree(folder, target)
        tensors = load_file(target / "model.safetensors")
        for name, tensor in tensors.items():
            change(name, tensor)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return copy_of


@pytest.fixture(scope="session")
def lopsided(speaking, edited) -> Path:
    """A llama with two inputs of each block 60 times as large as the others, as in large trained models."""

    def change(name: str, tensor: Tensor) -> None:
        if name.endswith("layernorm.weight"):
            tensor[[3, 17]] *= 60
        if name.endswith(tuple(f"{leaf}_proj.weight" for leaf in ("q", "k", "v", "gate", "up"))):
            tensor[:, [3, 17]] /= 60

    return edited(speaking("llama"), change)
