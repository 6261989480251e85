"""Sample texts: what each model itself writes after the beginning of an evaluated text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from modelzip.evaluation.report import report_markdown, validate
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.recipes.schema import Evaluation


def report_of(model: Path, against: Path | None, data: Path, progress: Any, **changes: Any) -> dict[str, Any]:
    return evaluate_models(
        str(model),
        against=None if against is None else str(against),
        evaluation=Evaluation(data=str(data), seq_len=16, windows=4, new_tokens=8, **changes),
        **{"revision": None, "device": "cpu", "dtype": "float32", "progress": progress},
    )


def test_both_models_go_on_with_the_beginnings_of_evaluated_texts(speaking, rounded, text_file, progress):
    found = report_of(rounded, speaking("llama"), text_file, progress, samples=3)["evaluation"]["samples"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(speaking("llama"))
    original = transformers.AutoModelForCausalLM.from_pretrained(speaking("llama"), dtype=torch.float32)
    assert len(found) == 3
    tokens = tokenizer(text_file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    for one, window in zip(found, (0, 1, 3), strict=True):
        ids = torch.tensor([tokens[16 * window : 16 * (window + 1)]])
        assert one["prompt"] == tokenizer.decode(ids[0], skip_special_tokens=True)
        made = original.generate(ids, do_sample=False, min_new_tokens=8, max_new_tokens=8, pad_token_id=0)
        assert one["original"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert one["tokens"] == 8
    assert any(one["compressed"] != one["original"] and one["same_tokens"] < 8 for one in found)


def test_a_model_beside_itself_writes_the_same(speaking, text_file, progress):
    report = report_of(speaking("llama"), speaking("llama"), text_file, progress)
    found = report["evaluation"]["samples"]
    assert [one["same_tokens"] for one in found] == [8, 8]
    assert "both go on: `" in report_markdown(validate(report))


def test_none_are_written_if_none_are_asked_for_or_the_model_writes_no_text(
    speaking, text_file, progress, saved, monkeypatch
):
    silent = Evaluation(data=str(text_file), seq_len=16, windows=4, samples=0)
    machine = {"revision": None, "device": "cpu", "dtype": "float32", "progress": progress}
    report = evaluate_models(str(speaking("llama")), against=None, evaluation=silent, **machine)
    assert report["evaluation"]["samples"] == []
    monkeypatch.setattr("modelzip.pipeline.samples.dense_bytes", lambda checkpoint: 1 << 60)
    assert report_of(speaking("llama"), None, text_file, progress)["evaluation"]["samples"] == []


def test_markup_in_a_text_is_text():
    from modelzip.evaluation.samples_report import sample_list
    from modelzip.evaluation.schema_quality import Sample

    one = Sample(prompt="a `b`\n<script>", original="", compressed="# c | d", tokens=4, same_tokens=0)
    lines = sample_list([one]).splitlines()
    assert lines[0] == "1. `a b <script>`"
    assert lines[1] == "   - the original goes on: (nothing)"
    assert lines[2] == "   - the compressed one, alike for 0 of 4 tokens: `# c | d`"
