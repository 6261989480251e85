"""Pruning while training: gradual magnitude, movement and the lottery, on a pico classifier that learns in seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from modelzip.checkpoints.errors import ProblemsError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.compressors.prune.schedule import cubic_sparsity
from modelzip.pipeline.plans import make_plans
from modelzip.pipeline.train.rounds import rewind_step
from modelzip.recipes.load import load_recipe
from modelzip.weights.linear import CompressedLinear
from modelzip.weights.sparse import Sparse

BASE = {"learning_rate": 5e-3, "train_batch_size": 32, "log_every": 1, "max_steps": 30}


@pytest.fixture(scope="module")
def material(save_classifier, write_labelled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained classifier, train.tsv and dev.tsv."""
    folder = tmp_path_factory.mktemp("sparse-training")
    save_classifier(folder / "fresh")
    write_labelled(folder / "train.tsv", 512, seed=1)
    write_labelled(folder / "dev.tsv", 256, seed=2)
    return folder


@pytest.fixture(scope="module")
def stage(material) -> dict[str, Any]:
    return {**BASE, "data": str(material / "train.tsv")}


@pytest.fixture(scope="module")
def measured(stage, material) -> dict[str, Any]:
    return {**stage, "validation": str(material / "dev.tsv"), "log_every": 20, "max_steps": 60, "eval_every": 60}


@pytest.fixture(scope="module")
def dense(material, measured, train_stage) -> Path:
    """The classifier, trained."""
    train_stage(material / "fresh", material / "dense", "distill", {**measured, "method": "labels"})
    return material / "dense"


def opened(folder: Path) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def sparse_weights(folder: Path) -> dict[str, Sparse]:
    return {
        name: module.weight_value
        for name, module in opened(folder).named_modules()
        if isinstance(module, CompressedLinear)
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(weights: dict[str, Sparse]) -> int:
    return sum(weight.shape[0] * weight.shape[1] for weight in weights.values())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_gradual_pruning_follows_the_cubic_schedule_to_exactly_its_sparsity(dense, stage, train_stage, tmp_path, scope):
    asked = {**stage, "method": "gradual-magnitude", "sparsity": 0.9, "scope": scope}
    asked |= {"begin": 0.2, "end": 0.8, "prune_every": 4, "initial_sparsity": 0.1}
    record = train_stage(dense, tmp_path / "out", "prune", asked)
    schedule = {"final": 0.9, "initial": 0.1, "begin": 6, "end": 24, "every": 4}
    for row in record["curve"]:
        # counts are whole: half an entry in each of the twelve matrices, the smallest of 1024
        assert row["sparsity"] == pytest.approx(cubic_sparsity(row["step"], **schedule), abs=0.5 / 1024)
    weights = sparse_weights(tmp_path / "out")
    assert len(weights) == 12
    shares = {name: weight.count / (weight.shape[0] * weight.shape[1]) for name, weight in weights.items()}
    if scope == "global":
        assert sum(weight.count for weight in weights.values()) == entries(weights) - round(0.9 * entries(weights))
        assert max(shares.values()) > 2 * min(shares.values())
    else:
        sizes = [weight.shape[0] * weight.shape[1] for weight in weights.values()]
        assert [weight.count for weight in weights.values()] == [size - round(0.9 * size) for size in sizes]


def test_movement_follows_the_schedule_and_reopens_as_it_was_trained(dense, measured, train_stage, tmp_path):
    asked = {**measured, "method": "movement", "sparsity": 0.9, "log_every": 1, "max_steps": 30, "eval_every": 30}
    record = train_stage(dense, tmp_path / "out", "prune", asked)
    for row in record["curve"]:
        formula = cubic_sparsity(row["step"], final=0.9, begin=3, end=21, every=10)
        assert row["sparsity"] == pytest.approx(formula, abs=0.5 / 1024)
    weights = sparse_weights(tmp_path / "out").values()
    sizes = [weight.shape[0] * weight.shape[1] for weight in weights]
    assert [weight.count for weight in weights] == [size - round(0.9 * size) for size in sizes]
    rows = [line.split("\t") for line in Path(measured["validation"]).read_text().splitlines()[1:]]
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(dense), opened(tmp_path / "out")
    with torch.no_grad():
        logits = model(**tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)).logits
    right = (logits.argmax(-1) == torch.tensor([int(label) for _, label in rows])).float().mean()
    assert float(right) == pytest.approx(record["curve"][-1]["accuracy"])


class Seen(TrainerCallback):
    """What the scores are after the first step, and what the gradients of the loss were."""

    def __init__(self) -> None:
        self.scores: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.groups: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, module in kwargs["model"].student.named_modules():
            if hasattr(module, "scores"):
                self.weights[name] = module.weight.detach().clone()
                self.gradients[name] = module.weight.grad.clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.groups = kwargs["optimizer"].param_groups
        for name, module in kwargs["model"].student.named_modules():
            if hasattr(module, "scores"):
                self.scores[name] = module.scores.detach().clone()


def test_scores_move_against_gradient_times_weight_at_their_own_rate_without_decay(dense, stage, train_stage, tmp_path):
    asked = {**stage, "method": "movement", "sparsity": 0.5, "score_rate": 0.03, "max_steps": 1, "begin": 0.5, "end": 1}
    asked |= {"schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}
    seen = Seen()
    train_stage(dense, tmp_path / "out", "prune", asked, callbacks=[seen])
    for name, scores in seen.scores.items():
        # nothing is masked yet, so the weight's gradient is that of W ⊙ M; Adam's first step is the rate by sign
        product = seen.gradients[name] * seen.weights[name]
        expected = -0.03 * product / (product.abs() + 1e-8)
        assert (scores - expected).norm() / expected.norm() < 1e-4  # measured: 4e-8
    own = next(group for group in seen.groups if group["initial_lr"] == 0.03)
    assert (len(own["params"]), own["weight_decay"]) == (12, 0.0)


def test_soft_movement_prunes_by_its_penalty(dense, stage, train_stage, tmp_path):
    asked = {**stage, "method": "movement", "masking": "threshold", "penalty": 30, "score_rate": 0.2}
    # How many weights go is learned, so that bytes are an estimate.
    found = train_stage(dense, tmp_path / "out", "prune", asked, exact=False)["curve"]
    assert found[0]["sparsity"] == 0
    assert 0.2 < found[-1]["sparsity"] < 1
    weights = sparse_weights(tmp_path / "out")
    kept = sum(weight.count for weight in weights.values())
    assert 1 - kept / entries(weights) == pytest.approx(found[-1]["sparsity"])


def test_soft_movement_whose_penalty_prunes_too_little_is_told_so_and_nothing_is_published(
    dense, stage, train_stage, tmp_path
):
    asked = {**stage, "method": "movement", "masking": "threshold", "penalty": 1e-6, "max_steps": 4}
    with pytest.raises(RecipeError, match=r"movement let so few weights go .* raise penalty \(it is 1e-06\)"):
        train_stage(dense, tmp_path / "out", "prune", asked)
    assert not (tmp_path / "out").exists()


def test_what_came_in_pruned_stays_zero_and_ignored_linears_stay_dense(dense, stage, train_stage, tmp_path):
    half = {**stage, "method": "gradual-magnitude", "sparsity": 0.5, "max_steps": 4}
    train_stage(dense, tmp_path / "half", "prune", half)
    asked = {**half, "sparsity": 0.8, "ignore": ["*.layer.0.*"], "max_steps": 8}
    train_stage(tmp_path / "half", tmp_path / "more", "prune", {**half, "sparsity": 0.8, "max_steps": 8})
    before, after = sparse_weights(tmp_path / "half"), sparse_weights(tmp_path / "more")
    for name, weight in after.items():
        assert not (weight.kept & ~before[name].kept).any()
        assert weight.count == round(0.2 * weight.shape[0] * weight.shape[1])
    train_stage(dense, tmp_path / "one", "prune", asked)
    assert all(".layer.1." in name for name in sparse_weights(tmp_path / "one"))
    name = "bert.encoder.layer.0.output.dense.weight"
    old, new = (load_file(folder / "model.safetensors")[name] for folder in (dense, tmp_path / "one"))
    assert not torch.equal(old, new)


class Watch(TrainerCallback):
    """The masks and the weights that each training of the lottery starts with."""

    def __init__(self) -> None:
        self.starts: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        student = kwargs["model"].student
        self.starts.append({name: tensor.clone() for name, tensor in student.state_dict().items()})


@pytest.fixture(scope="module")
def drawn(material, measured, train_stage) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """The lottery's record and what each of its trainings started with."""
    watch = Watch()
    asked = {**measured, "method": "lottery", "sparsity": 0.8, "round_share": 0.5, "controls": ["random", "shuffled"]}
    record = train_stage(material / "fresh", material / "ticket", "prune", asked, callbacks=[watch])
    return record, watch.starts


def test_lottery_masks_are_nested_and_weights_are_the_initial_ones_bit_for_bit(material, drawn):
    _, starts = drawn
    initial = load_file(material / "fresh" / "model.safetensors")
    first, second, third, _, _, ticket = starts
    sparsities = []
    for before, after in zip([first, second, third], [second, third, ticket], strict=True):
        kept = [name for name in after if name.endswith(".kept")]
        assert len(kept) == 12
        assert not any((after[name] & ~before[name]).any() for name in kept)
        pruned = sum(int((~after[name]).sum()) for name in kept)
        sparsities.append(pruned / sum(after[name].numel() for name in kept))
        assert all(torch.equal(after[name], tensor) for name, tensor in initial.items())
    assert sparsities == pytest.approx([0.5, 0.75, 0.8], abs=1e-4)


def test_the_ticket_is_better_than_a_random_mask_and_all_trainings_are_recorded(material, drawn):
    record, _ = drawn
    runs = {run["name"]: run for run in record["runs"]}
    assert list(runs) == ["round 1", "round 2", "round 3", "ticket", "random", "shuffled"]
    assert runs["ticket"]["sparsity"] == runs["random"]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert runs["ticket"]["eval_loss"] < 0.5 * runs["random"]["eval_loss"]  # measured: 0.009 and 0.64
    assert runs["ticket"]["eval_loss"] < runs["shuffled"]["eval_loss"]  # measured: 0.009 and 0.034
    weights = sparse_weights(material / "ticket")
    assert sum(weight.count for weight in weights.values()) == entries(weights) - round(0.8 * entries(weights))


def test_a_share_of_few_steps_to_rewind_to_is_one_of_them():
    assert [rewind_step(share, 6) for share in (0.0, 0.05, 0.3, 0.9)] == [0, 1, 2, 5]


def test_each_training_has_curves_of_its_own(material, stage, train_stage, tmp_path, monkeypatch):
    """Without TensorBoard itself: where it would write."""
    folders: list[Path] = []
    find_spec = importlib.util.find_spec

    class Board(TrainerCallback):
        def __init__(self, folder: Path) -> None:
            folders.append(folder)

    monkeypatch.setitem(sys.modules, "modelzip.pipeline.train.board", SimpleNamespace(Board=Board))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorboard" or find_spec(name))
    asked = {**stage, "method": "lottery", "sparsity": 0.6, "round_share": 0.4, "max_steps": 1, "tensorboard": True}
    train_stage(material / "fresh", tmp_path / "out", "prune", {**asked, "controls": ["random"]})
    assert [folder.parent for folder in folders] == [tmp_path / "out.tensorboard"] * 4
    assert [folder.name for folder in folders] == ["round 1", "round 2", "control random", "ticket"]


@pytest.mark.parametrize("moment", [("round 2", 5), ("control random", 2), ("ticket", 6)])
def test_a_killed_lottery_goes_on_where_it_stopped(material, stage, train_stage, killed_at, tmp_path, moment):
    asked = {**stage, "method": "lottery", "sparsity": 0.6, "round_share": 0.4, "controls": ["random"], "rewind": 0.3}
    asked |= {"max_steps": 7, "save_every": 3}
    whole = train_stage(material / "fresh", tmp_path / "whole", "prune", asked)
    with killed_at(*moment) as progress:
        train_stage(material / "fresh", tmp_path / "killed", "prune", asked, progress=progress)
    watch = Watch()
    resumed = train_stage(material / "fresh", tmp_path / "killed", "prune", asked, resume=True, callbacks=[watch])
    order = ["round 1", "round 2", "control random", "ticket"]
    assert len(watch.starts) == len(order) - order.index(moment[0])
    assert resumed == whole
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_killed_gradual_pruning_ends_in_the_same_bytes(dense, stage, train_stage, killed_at, tmp_path):
    asked = {**stage, "method": "gradual-magnitude", "sparsity": 0.9, "max_steps": 9, "save_every": 4, "prune_every": 3}
    whole = train_stage(dense, tmp_path / "whole", "prune", asked)
    with killed_at("train", 6) as progress:
        train_stage(dense, tmp_path / "killed", "prune", asked, progress=progress)
    assert train_stage(dense, tmp_path / "killed", "prune", asked, resume=True) == whole
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_weights_before_the_final_sparsity_are_never_the_best(dense, measured, train_stage, tmp_path):
    asked = {**measured, "method": "gradual-magnitude", "sparsity": 0.97, "keep": "loss", "max_steps": 20}
    record = train_stage(dense, tmp_path / "out", "prune", {**asked, "eval_every": 2, "end": 0.6})
    assert record["kept_step"] >= record["settled"] == 12
    weights = sparse_weights(tmp_path / "out")
    assert all(weight.count == round(0.03 * weight.shape[0] * weight.shape[1]) for weight in weights.values())


def test_a_teacher_helps_where_there_are_no_labels(dense, material, stage, train_stage, tmp_path):
    texts = [line.split("\t")[0] for line in (material / "train.tsv").read_text().splitlines()[1:]]
    (tmp_path / "texts.tsv").write_text("\n".join(["sentence", *texts]) + "\n")
    asked = {**stage, "method": "movement", "data": str(tmp_path / "texts.tsv"), "teacher": str(dense), "max_steps": 4}
    record = train_stage(dense, tmp_path / "out", "prune", asked)
    assert record["teacher"] == str(dense)


def sentences(train_stage: Any, model: Path, stage: dict[str, Any], output: Path) -> tuple[str, ...]:
    with pytest.raises(ProblemsError) as caught:
        train_stage(model, output, "prune", stage)
    return caught.value.sentences


def test_what_cannot_be_pruned_is_told_before_anything_runs(dense, stage, train_stage, tmp_path):
    def told(**changes: Any) -> str:
        (sentence,) = sentences(train_stage, dense, {**stage, **changes}, tmp_path / "out")
        return sentence

    assert "nothing is left to prune: all 12 linears" in told(method="lottery", ignore=["*.layer.*"])
    assert "would not be smaller than they are" in told(method="movement", sparsity=0.01)
    with pytest.raises(ProblemsError, match="alpha says how a teacher is learned from"):
        train_stage(dense, tmp_path / "out", "prune", {**stage, "method": "movement", "alpha": 0.7})
    half = {**stage, "method": "gradual-magnitude", "max_steps": 1}
    train_stage(dense, tmp_path / "half", "prune", half)
    found = sentences(train_stage, tmp_path / "half", {**half, "method": "movement"}, tmp_path / "out")
    assert "it is sparse already, and scores would bring pruned weights back; take gradual-magnitude" in found[0]
    assert Checkpoint.open(str(tmp_path / "half")).nbytes < Checkpoint.open(str(dense)).nbytes


@pytest.mark.parametrize("name", ["gradual-90", "movement-85", "lottery-60", "lsq-int2"])
def test_shipped_recipes_are_planned_smaller(dense, material, name, monkeypatch, tmp_path):
    monkeypatch.chdir(material)
    recipe = load_recipe(name)
    source = Checkpoint.open(str(dense))
    (plan,) = make_plans(recipe.model_copy(update={"model": str(dense)}), source, output=tmp_path / "out")
    assert plan.bytes_after < plan.bytes_before
    assert plan.result.quantization is not None
