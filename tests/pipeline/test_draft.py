"""A draft changes nothing of what is written, only how soon: counted passes, the same tokens, the same distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modelzip.checkpoints.errors import ModelzipError
from modelzip.pipeline.draft import Found, Passes, _one_text, continued
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.pipeline.run import plan_recipe
from modelzip.recipes.schema import Evaluation


def drafted(model: Path, draft: Path, data: Path, progress: Any, **changes: Any) -> dict[str, Any]:
    report = evaluate_models(
        str(model),
        against=None,
        draft=str(draft),
        evaluation=Evaluation(data=str(data), seq_len=16, windows=4, new_tokens=8, **changes),
        **{"revision": None, "device": "cpu", "dtype": "float32", "progress": progress},
    )
    found: dict[str, Any] = report["evaluation"]["speculative"]
    return found


def test_every_token_is_that_written_without_the_draft(speaking, rounded, text_file, progress):
    found = drafted(speaking("llama"), rounded, text_file, progress)
    assert found["identical"] == found["texts"] == 8
    assert 0 < found["acceptance"] < 1
    assert 1 < found["tokens_per_pass"] < 8


def test_a_model_that_drafts_for_itself_is_always_right(speaking, text_file, progress):
    found = drafted(speaking("llama"), speaking("llama"), text_file, progress)
    assert found["acceptance"] == pytest.approx(1, abs=0.15)  # the last guesses may be one too many
    assert found["tokens_per_pass"] > 1.5  # an unsure draft stops early: measured 1.88


def test_passes_are_counted_and_the_first_text_is_not(models):
    model, helper = models.FAMILIES["llama"].build(), models.FAMILIES["llama"].build()
    found, ticks = Found(), iter(range(100))
    prompt = torch.tensor([[3, 4, 5]])
    for counts in (False, True):
        _one_text(model, helper, prompt, 4, found, lambda: float(next(ticks)), counts=counts, first=1)
    assert (found.tokens, found.same, found.plain, found.drafted) == (4, [True], [1.0], [1.0])
    checks = Passes()
    with checks.of(model):
        continued(model, prompt, 4)
    assert checks.count == 4
    model(prompt)
    assert checks.count == 4
    assert 0 < found.checks.count < 4


def test_drafts_that_do_not_fit_are_refused_before_a_weight_is_read(speaking, saved, text_file, progress, monkeypatch):
    monkeypatch.setattr("modelzip.checkpoints.index.Checkpoint.read", lambda *_: pytest.fail("read weights"))
    with pytest.raises(ModelzipError, match=r"--draft: .* is BertModel, which writes no text: name two that do"):
        drafted(speaking("llama"), speaking("bert"), text_file, progress)
    with pytest.raises(
        ModelzipError, match=r"--draft: .* has 96 tokens and .* has \d+: name a draft that was made from"
    ):
        drafted(speaking("llama"), saved("llama"), text_file, progress)


def test_the_result_of_a_recipe_drafts_for_its_original(speaking, compress, tmp_path):
    settings = {"enabled": True, "as_draft": True, "new_tokens": 8, "fail_if": ["acceptance < 1%"]}
    report = compress(speaking("llama"), tmp_path / "out", {"method": "rtn", "bits": 3}, evaluate=settings).report
    found = report["evaluation"]["speculative"]
    assert found["draft"] == str(tmp_path / "out")
    assert found["identical"] == found["texts"] == 8


def test_a_recipe_for_an_encoder_has_no_draft(speaking, recipe_of, tmp_path):
    recipe = recipe_of(speaking("bert"), {"method": "rtn"}, evaluate={"enabled": True, "as_draft": True})
    with pytest.raises(ModelzipError, match=r"evaluate\.as_draft: .* is BertModel, which writes no text"):
        plan_recipe(recipe, output=tmp_path / "out")


def test_a_condition_on_a_draft_needs_one(speaking, text_file, progress):
    with pytest.raises(ModelzipError, match=r"needs a draft: name one by evaluate --draft"):
        evaluate_models(
            str(speaking("llama")),
            against=None,
            evaluation=Evaluation(data=str(text_file), seq_len=16, fail_if=("acceptance < 50%",)),
            **{"revision": None, "device": "cpu", "dtype": "auto", "progress": progress},
        )


@pytest.mark.slow
@torch.no_grad()
def test_sampling_with_a_draft_keeps_the_distribution(models):
    """Pairs of drawn tokens over a vocabulary of 6: each as often as the model itself says, by a chi-squared test."""
    build = models.FAMILIES["llama"].build
    target, helper = (build(seed=seed, vocab_size=6, eos_token_id=None, bos_token_id=None) for seed in (0, 1))
    prompt, draws = torch.tensor([[1, 2, 3]]), 3000
    first = target(prompt).logits[0, -1].softmax(-1)
    after = torch.stack(
        [target(torch.cat([prompt, torch.tensor([[t]])], 1)).logits[0, -1].softmax(-1) for t in range(6)]
    )
    wanted = (first[:, None] * after).flatten() * draws
    guess = helper(prompt).logits[0, -1].softmax(-1)
    counts = torch.zeros(36)
    transformers.set_seed(0)
    for _ in range(draws):
        made = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=helper,
            do_sample=True,
            max_new_tokens=2,
            top_k=0,
            pad_token_id=0,
        )
        counts[6 * made[0, 3] + made[0, 4]] += 1
    kept = wanted >= 5
    groups = [torch.cat([one[kept], one[~kept].sum()[None]]) for one in (counts, wanted)]
    chi_squared = float(((groups[0] - groups[1]).square() / groups[1].clamp(min=1e-9)).sum())
    freedom = int(kept.sum())
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5  # p = 6e-5 at most
    instead = (guess[:, None] * after).flatten() * draws  # were the draft's tokens taken as they are
    assert float(((instead - wanted).square() / wanted.clamp(min=1e-9)).sum()) > 10 * (
        freedom + 4 * (2 * freedom) ** 0.5
    )
