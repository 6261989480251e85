"""What is timed of models that write text: the same work on both sides, in turns, with nothing left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modelzip.checkpoints.errors import ModelzipError
from modelzip.pipeline import speed
from modelzip.pipeline.bench import Bench
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.pipeline.run import plan_recipe
from modelzip.pipeline.speed import REPETITIONS, written
from modelzip.recipes.schema import Evaluation


class Ticking:
    """A clock that a tick moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(torch.nn.Module):
    """Takes as many seconds as it reads tokens, and keeps what it was asked."""

    def __init__(self, clock: Ticking, factor: float = 1.0) -> None:
        super().__init__()
        self.clock, self.factor, self.read = clock, factor, []
        self.config = transformers.LlamaConfig(max_position_embeddings=12)

    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = False) -> Any:
        self.read.append((tuple(input_ids.shape), past_key_values))
        self.clock.now += input_ids.numel() * self.factor
        logits = torch.nn.functional.one_hot(input_ids + 1, 50).float()
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits, past_key_values=len(self.read))


def test_a_text_is_read_once_and_each_token_goes_on_from_the_cache():
    clock = Ticking()
    model = Slow(clock)
    prefill, tokens = written(model, torch.tensor([[3, 5, 7]]), 4, clock)
    assert (prefill, tokens) == (3.0, [1.0] * 4)
    assert model.read == [((1, 3), None), *(((1, 1), count) for count in range(1, 5))]


def test_both_sides_do_the_same_work_and_ratios_are_of_the_same_repetition(monkeypatch, progress):
    clock = Ticking()
    slow, fast = Slow(clock, 2.0), Slow(clock)
    models = iter((slow, fast))
    monkeypatch.setattr(speed, "open_by_transformers", lambda *_, **__: next(models))
    monkeypatch.setattr(speed, "device_clock", lambda device: clock)
    monkeypatch.setattr(speed, "resident", lambda *_, **__: None)
    monkeypatch.setattr(speed, "meter", lambda kind: lambda: clock.now)
    evaluation = Evaluation(new_tokens=4, batch_sizes=(1, 3))
    found = speed.speed_section(
        "small",
        "big",
        torch.zeros(2, 10, dtype=torch.int64),
        evaluation,
        Bench("auto", torch.device("cpu"), progress),
    )
    assert found["prompt_tokens"] == 12 - 4
    assert found["prefill"] == {
        "original": dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), 16e3),
        "compressed": dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), 8e3),
        "speedup": 2.0,
    }
    assert found["token"]["compressed"]["p99_ms"] == 1e3
    assert found["token"]["speedup"] == 2.0
    assert [(row["original"], row["compressed"], row["speedup"]) for row in found["throughput"]] == [
        (0.5, 1.0, 2.0)
    ] * 2
    assert found["energy"] == {"original_joules": 2 * (8 + 4) / 4, "compressed_joules": (8 + 4) / 4}
    assert found["memory"] is None
    assert [shape for shape, _ in slow.read] == [shape for shape, _ in fast.read]
    assert sum(shape == (1, 8) for shape, _ in fast.read) == REPETITIONS + 1 + 4


def measured(model: Path, against: Path | None, data: Path, progress: Any, **changes: Any) -> dict[str, Any]:
    return evaluate_models(
        str(model),
        against=None if against is None else str(against),
        evaluation=Evaluation(data=str(data), seq_len=32, windows=2, latency=True, new_tokens=4, **changes),
        **{"revision": None, "device": "cpu", "dtype": "auto", "progress": progress},
    )["evaluation"]


def test_a_compressed_model_is_timed_beside_its_original(speaking, compress, text_file, progress, tmp_path):
    compress(speaking("llama"), tmp_path / "out", {"method": "rtn", "bits": 4})
    found = measured(tmp_path / "out", speaking("llama"), text_file, progress, batch_sizes=(1, 2))["speed"]
    assert (found["prompt_tokens"], found["new_tokens"]) == (32, 4)
    for name in ("prefill", "token"):
        for side in ("original", "compressed"):
            spread = found[name][side]
            assert 0 < spread["p50_ms"] <= spread["p90_ms"] <= spread["p99_ms"]
    assert [row["batch_size"] for row in found["throughput"]] == [1, 2]
    if found["memory"] is not None:
        assert found["memory"]["compressed_peak_mb"] >= found["memory"]["compressed_rest_mb"]


def test_a_model_alone_has_times_and_no_ratios(speaking, text_file, progress):
    found = measured(speaking("llama"), None, text_file, progress, batch_sizes=(1,))["speed"]
    assert found["prefill"]["original"] is None
    assert found["token"]["speedup"] is None
    assert found["throughput"][0]["compressed"] > 0


def test_an_encoder_is_not_timed_on_text(speaking, text_file, progress):
    with pytest.raises(ModelzipError, match=r"evaluate\.latency times classifiers .* and models that write text"):
        measured(speaking("bert"), speaking("bert"), text_file, progress)


def test_more_new_tokens_than_the_model_takes_are_refused_before_a_weight_is_read(
    speaking, text_file, progress, monkeypatch
):
    monkeypatch.setattr("modelzip.checkpoints.index.Checkpoint.read", lambda *_: pytest.fail("read weights"))
    evaluation = Evaluation(data=str(text_file), seq_len=16, latency=True, new_tokens=64)
    with pytest.raises(ModelzipError, match=r"new_tokens is 64, and .* takes at most 64 tokens, those that it reads"):
        evaluate_models(
            str(speaking("llama")),
            against=None,
            evaluation=evaluation,
            **{"revision": None, "device": "cpu", "dtype": "auto", "progress": progress},
        )


@pytest.mark.parametrize(
    ("model", "evaluate", "told"),
    [
        ("bert", {"latency": True}, "evaluate.latency times classifiers and sentence encoders on examples, and models"),
        ("llama", {"latency": True, "new_tokens": 64}, "new_tokens is 64, and"),
    ],
)
def test_times_of_a_run_without_data_of_its_own_are_checked_too(speaking, recipe_of, tmp_path, model, evaluate, told):
    recipe = recipe_of(speaking(model), {"method": "rtn"}, evaluate={"enabled": True, **evaluate})
    with pytest.raises(ModelzipError, match=re.escape(told)):
        plan_recipe(recipe, output=tmp_path / "out")


def test_data_of_an_evaluation_that_is_switched_off_are_not_looked_at(speaking, compress, tmp_path):
    section = {"enabled": False, "data": str(tmp_path / "missing.jsonl"), "task": "classification"}
    stages = {"prune": {"method": "magnitude"}}, {"method": "rtn"}
    assert compress(speaking("llama"), tmp_path / "out", *stages, evaluate=section).report


@pytest.mark.parametrize(
    ("evaluate", "told"),
    [
        ({"batch_sizes": (1, 2)}, "evaluate.batch_sizes does nothing without evaluate.latency: true (--latency)"),
        ({"new_tokens": 8, "samples": 0}, "evaluate.new_tokens does nothing without samples or latency"),
        ({"task_limit": 8}, "evaluate.task_limit does nothing without evaluate.tasks (--tasks)"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(speaking, recipe_of, tmp_path, evaluate, told):
    recipe = recipe_of(speaking("llama"), {"method": "rtn"}, evaluate={"enabled": True, **evaluate})
    with pytest.raises(ModelzipError, match=re.escape(told)):
        plan_recipe(recipe, output=tmp_path / "out")


def test_a_condition_on_times_that_are_not_taken_is_refused(speaking, text_file, progress):
    evaluation = Evaluation(data=str(text_file), seq_len=32, fail_if=("token_speedup < 1",))
    with pytest.raises(ModelzipError, match=r"needs times, which are taken with evaluate\.latency: true"):
        evaluate_models(
            str(speaking("llama")),
            against=str(speaking("llama")),
            evaluation=evaluation,
            **{"revision": None, "device": "cpu", "dtype": "auto", "progress": progress},
        )
