"""Chains that train, change the vocabulary, are kept, killed, resumed and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modelzip.checkpoints.errors import OutputError, ProblemsError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline.run import plan_recipe, run_recipe
from modelzip.recipes.load import parse_recipe

TRAINED = {"max_steps": 6, "train_batch_size": 32, "learning_rate": 3e-3, "save_every": 2, "log_every": 2}
GPTQ = {"quantize": {"method": "gptq", "bits": 4, "group_size": 16, "clip": "none"}}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@dataclass(frozen=True)
class Place:
    """A folder with an untrained classifier and labelled sentences."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def train(self) -> str:
        return str(self.folder / "train.tsv")

    def labels(self, **more: Any) -> dict[str, Any]:
        return {"distill": {"method": "labels", "data": self.train, **TRAINED, **more}}

    def vocabulary(self) -> dict[str, Any]:
        return {"prune": {"method": "vocabulary", "corpus": self.train, "corpus_field": "sentence"}}

    def recipe(self, *stages: dict[str, Any], **rest: Any) -> Any:
        data = {
            "model": str(self.model),
            "calibration": {"source": self.train, "field": "sentence", "samples": 4, "seq_len": 16},
            "evaluate": {"data": str(self.folder / "dev.tsv")},
            "stages": list(stages),
            **rest,
        }
        return parse_recipe(data, "test")


@pytest.fixture(scope="module")
def place(save_classifier, write_labelled, tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    save_classifier(folder / "model", layers=3)
    write_labelled(folder / "train.tsv", 128)
    write_labelled(folder / "dev.tsv", 64, seed=1)
    return Place(folder)


class Quiet:
    """Progress that nobody watches."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        self.seen.append((stage, done))

    def say(self, line: str) -> None:
        pass


@pytest.fixture
def go(here) -> Callable[..., Any]:
    """go(recipe, output, ...) -> the report."""

    def run(recipe: Any, output: Path, *, progress: Any = None, **options: Any) -> Any:
        return here(lambda: run_recipe(recipe, output=output, progress=progress or Quiet(), **options)).report

    return run


def test_a_fine_tuned_pruned_healed_quantized_classifier_is_exported_dense(place, go, tmp_path):
    teacher = tmp_path / "teacher"
    stages = [
        place.labels(max_steps=40, output=str(teacher)),
        {"prune": {"method": "magnitude", "sparsity": 0.4}},
        {"distill": {"method": "logits", "data": place.train, "teacher": str(place.model), "alpha": 0.1, **TRAINED}},
        GPTQ,
    ]
    report = go(place.recipe(*stages, export=[{"format": "dense"}]), tmp_path / "out")
    assert [stage["method"] for stage in report["stages"]] == ["labels", "magnitude-40", "logits", "gptq-4bit"]
    accuracies = [stage["evaluation"]["accuracy"]["compressed"] for stage in report["stages"]]
    assert min(accuracies) >= 0.9
    sizes = [stage["bytes_after"] for stage in report["stages"]]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-dense", "teacher"]
    for folder in ("teacher", "out-dense"):
        opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert not hasattr(opened.config, "quantization_config")
    kept, found = (Checkpoint.open(str(tmp_path / name)) for name in ("out-dense", "teacher"))
    zeros = [float((kept.read([name])[name] == 0).float().mean()) for name in kept.tensors if "layer.0" in name]
    assert max(zeros) >= 0.4
    assert kept.tensors.keys() == found.tensors.keys()


def test_a_stage_after_the_vocabulary_has_changed_is_calibrated_in_the_new_tokens(place, go, tmp_path):
    report = go(place.recipe(place.vocabulary(), {"prune": {"method": "heads", "share": 0.5}}, GPTQ), tmp_path / "out")
    assert all(stage["evaluation"]["accuracy"] for stage in report["stages"])
    go(place.recipe(place.vocabulary()), tmp_path / "small")
    recipe = place.recipe({"prune": {"method": "heads", "share": 0.5}}, GPTQ, model=str(tmp_path / "small"))
    go(recipe, tmp_path / "again")
    chained, again = (Checkpoint.open(str(tmp_path / name)) for name in ("out", "again"))
    assert chained.tensors.keys() == again.tensors.keys()
    one, other = (read.read(read.tensors) for read in (chained, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["llama", "bert-mlm"])
def test_what_the_model_wrote_itself_is_tokenized_again_or_drawn_again(speaking, compress, text_file, tmp_path, kind):
    stage = {"prune": {"method": "vocabulary", "corpus": str(text_file)}}
    report = compress(speaking(kind), tmp_path / "out", stage, GPTQ, evaluate={"enabled": True, "windows": 2}).report
    assert all(row["tokens"] if "tokens" in row else row["error"] is not None for row in report["modules"])
    assert report["evaluation"] is None
    assert [one for one in report["fallbacks"] if "isn't compared with the original: of 74 tokens it has 23" in one]


def test_a_condition_on_what_cant_be_compared_is_refused_before_any_work(speaking, compress, text_file, tmp_path):
    stage = {"prune": {"method": "vocabulary", "corpus": str(text_file)}}
    with pytest.raises(RecipeError, match=r'"kl < 1" can\'t be checked: the result isn\'t compared'):
        compress(speaking("llama"), tmp_path / "out", stage, evaluate={"fail_if": ["kl < 1"]})
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_whole_texts_reads_the_same_tokens_by_its_own_numbers(place, go, save_classifier, tmp_path):
    """Nothing but unused tokens is gone, so the student says what its teacher says, and has nothing to learn."""
    heal = {"method": "logits", "data": place.train, **TRAINED, "max_steps": 1, "learning_rate": 1e-9, "log_every": 1}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.5}
    save_classifier(tmp_path / "model", **plain)
    whole = str(tmp_path / "model")
    stages = [place.vocabulary(), {"distill": {**heal, "alpha": 1.0}}]
    *_, stage = go(place.recipe(*stages, model=whole), tmp_path / "out")["stages"]
    assert stage["details"]["first_loss"] < 1e-9  # measured: 0; 0.3 if the teacher gets the student's numbers
    cached = {"distill": {**heal, "alpha": 1.0, "cache": str(tmp_path / "cache")}}
    *_, stage = go(place.recipe(place.vocabulary(), cached, model=whole), tmp_path / "cached")["stages"]
    assert stage["details"]["first_loss"] < 1e-6  # measured: 3e-9, of rounding to 16 bits


def test_exits_are_put_on_what_the_stage_before_them_left(place, go, tmp_path):
    """The exits leave the encoder alone, so its last classifier says what the fine-tuned one says."""
    exits = {"distill": {"method": "fastbert", "data": place.train, "exit_size": 16, **TRAINED}}
    go(place.recipe(place.labels(output=str(tmp_path / "tuned")), exits), tmp_path / "out")
    tuned, out = (Checkpoint.open(str(tmp_path / name)) for name in ("tuned", "out"))
    query = "encoder.layer.0.attention.self.query.weight"
    (mine,) = [name for name in out.tensors if name.endswith(query)]
    assert torch.equal(out.read([mine])[mine], tuned.read([f"bert.{query}"])[f"bert.{query}"])


def test_what_lost_heads_is_healed_and_stays_as_narrow(place, go, tmp_path):
    """BERT's config.json can't say that heads are gone, so the layout is modelzip's own."""
    heads = {"prune": {"method": "heads", "share": 0.5, "output": str(tmp_path / "pruned")}}
    heal = {"distill": {"method": "labels", "data": place.train, **TRAINED}}
    report = go(place.recipe(heads, heal), tmp_path / "out")
    before, after = (Checkpoint.open(str(tmp_path / name)) for name in ("pruned", "out"))
    assert {name: one.shape for name, one in before.tensors.items()} == {
        name: one.shape for name, one in after.tensors.items()
    }
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert after.tensors[query].shape == (16, 32)
    old, new = (one.read([query])[query] for one in (before, after))
    assert not torch.equal(old, new)
    losses = [row["loss"] for row in report["stages"][1]["details"]["curve"]]
    assert losses[-1] < losses[0]


def test_a_teacher_of_single_tokens_that_an_earlier_stage_takes_out_is_refused(speaking, recipe_of, text_file):
    stages = [
        {"prune": {"method": "vocabulary", "corpus": str(text_file)}},
        {"distill": {"method": "logits", "data": str(text_file), "max_length": 16, **TRAINED}},
    ]
    with pytest.raises(ProblemsError, match="put the stage vocabulary after this one, or heal with method labels"):
        plan_recipe(recipe_of(speaking("llama"), *stages), output=Path("out"))


def test_a_student_made_anew_after_another_stage_is_refused(place):
    prune = {"prune": {"method": "neurons", "share": 0.25, "multiple": 8}}
    student = {"distill": {"method": "logits", "data": place.train, "layers": [0, 2], **TRAINED}}
    with pytest.raises(ProblemsError, match=r"would be lost: prune before this one, by method layers"):
        plan_recipe(place.recipe(prune, student), output=Path("out"))


def test_a_stage_that_is_kept_opens_by_itself_and_nothing_hidden_is_left(place, go, tmp_path):
    stages = [{"prune": {"method": "magnitude", "output": str(tmp_path / "pruned")}}, GPTQ]
    report = go(place.recipe(*stages), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pruned"]
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert opened.config.num_labels == 2
    recorded = json.loads((tmp_path / "pruned" / "modelzip.json").read_text())["stages"]
    assert [stage["method"] for stage in recorded] == ["magnitude-50"]
    assert report["stages"][0]["evaluation"]["accuracy"]


def test_without_each_stage_only_the_end_is_measured(place, go, tmp_path):
    evaluate = {"data": str(place.folder / "dev.tsv"), "each_stage": False}
    report = go(place.recipe({"prune": {"method": "magnitude"}}, GPTQ, evaluate=evaluate), tmp_path / "out")
    assert [stage["evaluation"] is None for stage in report["stages"]] == [True, False]


def chain_of(place: Place) -> list[dict[str, Any]]:
    return [
        {"prune": {"method": "layers", "drop": [1]}},
        place.labels(),
        {"prune": {"method": "sparsegpt", "sparsity": 0.5}},
        GPTQ,
    ]


@pytest.fixture(scope="module")
def whole(place, here, tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nobody killed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    here(lambda: run_recipe(place.recipe(*chain_of(place)), output=output, progress=Quiet()))
    return files_of(output)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("report.json", "report.md", "report.html")
    }


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        (("train", 4), [".out.measured.json", ".out.stage1", "..out.stage2.partial"]),
        (("prune", 1), [".out.measured.json", ".out.stage1", ".out.stage2", "..out.stage3.partial"]),
        (("quantize", 1), [".out.measured.json", ".out.partial", ".out.stage1", ".out.stage2", ".out.stage3"]),
        (("evaluate", 1), [".out.stage1"]),
    ],
    ids=["training", "pruning", "quantizing", "measuring"],
)
def test_killed_in_any_stage_a_chain_goes_on_where_it_was(place, go, whole, killed_at, tmp_path, moment, left):
    recipe = place.recipe(*chain_of(place))
    with killed_at(*moment) as progress:
        go(recipe, tmp_path / "out", progress=progress)
    assert hidden(tmp_path) == sorted(left)
    with pytest.raises(OutputError, match=r"give --resume to go on with it, or --overwrite to start again"):
        go(recipe, tmp_path / "out")
    assert hidden(tmp_path) == sorted(left)
    finished = [name for name in left if re.fullmatch(r"\.out\.stage\d", name)]
    progress = Quiet()
    report = go(recipe, tmp_path / "out", resume=True, progress=progress)
    assert files_of(tmp_path / "out") == whole
    assert hidden(tmp_path) == []
    assert [stage["seconds"] is None for stage in report["stages"]] == [n < len(finished) for n in range(4)]
    assert all(stage["evaluation"]["accuracy"] for stage in report["stages"])
    measured = sum(step == ("evaluate", 128) for step in progress.seen)
    assert measured == 4 - max(0, len(finished) - (moment[0] == "evaluate"))


def test_a_chain_killed_while_the_end_is_measured_only_measures_that(place, go, whole, killed_at, tmp_path):
    recipe = place.recipe(*chain_of(place))
    with killed_at("evaluate", 128, times=4) as progress:
        go(recipe, tmp_path / "out", progress=progress)
    progress = Quiet()
    report = go(recipe, tmp_path / "out", resume=True, progress=progress)
    assert files_of(tmp_path / "out") == whole
    assert hidden(tmp_path) == []
    assert {stage for stage, _ in progress.seen} == {"evaluate"}
    assert sum(step == ("evaluate", 128) for step in progress.seen) == 1
    assert all(stage["evaluation"]["accuracy"] for stage in report["stages"])


@pytest.fixture
def killed(place, go, killed_at, tmp_path) -> Path:
    """The output of a chain killed in its third stage."""
    with killed_at("prune", 1) as progress:
        go(place.recipe(*chain_of(place)), tmp_path / "out", progress=progress)
    return tmp_path / "out"


def test_another_recipe_is_not_resumed_and_the_difference_is_named(place, go, killed):
    stages = [*chain_of(place)[:-1], {"quantize": {**GPTQ["quantize"], "bits": 8}}]
    before = hidden(killed.parent)
    with pytest.raises(
        OutputError, match=r"another recipe, model or version \(stages\[3\]\.quantize\.bits was 4 and is 8\)"
    ):
        go(place.recipe(*stages), killed, resume=True)
    assert hidden(killed.parent) == before


def test_overwrite_starts_a_killed_chain_anew_and_sweeps_up_what_it_has_no_use_for(place, go, killed):
    report = go(place.recipe({"prune": {"method": "layers", "drop": [1]}}, GPTQ), killed, overwrite=True)
    assert all(stage["seconds"] is not None for stage in report["stages"])
    assert hidden(killed.parent) == []


def test_a_folder_that_a_stage_is_to_be_kept_as_is_not_replaced_unasked(place, go, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "diary.txt").write_text("dear")
    recipe = place.recipe({"prune": {"method": "magnitude", "output": str(tmp_path / "kept")}}, GPTQ)
    with pytest.raises(OutputError, match=r"kept, which stages\[0\] is to be kept as, exists already"):
        go(recipe, tmp_path / "out")
    with pytest.raises(OutputError, match="is no model, so it isn't replaced"):
        go(recipe, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_the_problems_of_all_stages_are_told_at_once_before_a_weight_is_read(place, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda *_, **__: pytest.fail("a weight was read"))
    stages = [
        {"prune": {"method": "magnitude", "output": "same", "ignore": ["*.nothing"]}},
        {"prune": {"method": "magnitude", "output": "same", "sparsity": 0.8}},
        {"quantize": {"group_size": 24, "strict_groups": True, "output": str(place.model / "x")}},
        {"prune": {"method": "magnitude", "sparsity": 0.9, "output": "out"}},
        {"distill": {"method": "labels", "data": "lacking.tsv"}},
        {"distill": {"method": "labels", "data": "also-lacking.tsv"}},
    ]
    with pytest.raises(ProblemsError) as error:
        plan_recipe(place.recipe(*stages, calibration={"source": "no.txt"}), output=Path("out"))
    wanted = [
        ("stages[1].prune: output: same and what stages[0] is kept as", "overlap"),
        ("stages[2].quantize: output: ", "and the model"),
        ("stages[3].prune: output: out and the output", "overlap"),
        ("stages[0].prune: the pattern '*.nothing' matches no module", ""),
        ("stages[2].quantize: group_size 24 doesn't divide", ""),
        ("stages[3].prune: bert.encoder.layer.0.attention.self.query", "quantized already; prune before quantizing"),
        ("stages[4].distill: ", "as integers, which have no gradient"),
        ("stages[4].distill: There is no file lacking.tsv", ""),
        ("stages[5].distill: data: there is no file also-lacking.tsv", ""),
        ("There is no file no.txt", ""),
    ]
    assert len(error.value.sentences) == len(wanted)
    for sentence, (start, inside) in zip(error.value.sentences, wanted, strict=True):
        assert sentence.startswith(start)
        assert inside in sentence


def test_the_disk_is_asked_for_all_stages_since_none_goes_before_the_end(place):
    plans = plan_recipe(place.recipe(*chain_of(place)), output=Path("out"))
    sizes = [plan.bytes_after for plan in plans]
    assert [plan.disk_bytes for plan in plans][2:] == [sum(sizes[:3]), sum(sizes)]
