"""`evaluate_models` against a computation with plain transformers: whole models in memory, in double precision."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from modelzip.checkpoints.errors import CalibrationError, CheckpointError, RecipeError
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.recipes.schema import Evaluation

WINDOWS, SEQ_LEN = 6, 24


@pytest.fixture(scope="module")
def text_file(prose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("evaluation") / "text.txt"
    file.write_text(prose(WINDOWS * SEQ_LEN + 11, seed=5), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def windows(text_file, spell) -> Tensor:
    return spell(text_file.read_text(encoding="utf-8")[: WINDOWS * SEQ_LEN]).view(WINDOWS, SEQ_LEN)


@pytest.fixture(scope="module")
def rounded(speaking, compress, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama, rounded to 2 bits."""
    folder = tmp_path_factory.mktemp("rounded") / "out"
    compress(speaking("llama"), folder, {"method": "rtn", "bits": 2})
    return folder


@pytest.fixture(scope="module")
def measured(text_file, progress):
    """measured(model, against) -> the report of evaluating on the text."""

    def run(model: Path, against: Path | None, **changes: Any) -> dict[str, Any]:
        evaluation = Evaluation(**{"data": str(text_file), "windows": WINDOWS, "seq_len": SEQ_LEN, **changes})
        return evaluate_models(
            str(model),
            against=None if against is None else str(against),
            evaluation=evaluation,
            revision=None,
            device="cpu",
            dtype="auto",
            progress=progress,
        )

    return run


@torch.no_grad()
def log_probabilities(folder: Path, windows: Tensor) -> Tensor:
    """[windows, seq_len, vocabulary], every window alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat([model(window.unsqueeze(0)).logits for window in windows]).double().log_softmax(-1)


def perplexity(logs: Tensor, windows: Tensor) -> float:
    return float(torch.exp(-logs[:, :-1].gather(-1, windows[:, 1:, None]).mean()))


def test_the_perplexities_are_those_of_plain_transformers(speaking, rounded, windows, measured):
    found = measured(rounded, speaking("llama"))["evaluation"]["perplexity"]
    wanted = [perplexity(log_probabilities(folder, windows), windows) for folder in (speaking("llama"), rounded)]
    assert [found["original"], found["compressed"]] == pytest.approx(wanted, rel=1e-5)  # measured: 7e-9 apart at most
    assert abs(found["original"] / found["compressed"] - 1) > 1e-2  # the two models differ


def test_the_divergence_is_that_of_plain_transformers(speaking, rounded, windows, measured):
    p, q = (log_probabilities(folder, windows) for folder in (speaking("llama"), rounded))
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    found = measured(rounded, speaking("llama"))["evaluation"]["kl"]
    assert found == pytest.approx(wanted, rel=1e-5)  # measured: 8.5e-9 apart
    assert wanted > 0.01  # measured: 0.517


def test_the_top_1_agreement_is_that_of_plain_transformers(speaking, rounded, windows, measured):
    p, q = (log_probabilities(folder, windows) for folder in (speaking("llama"), rounded))
    wanted = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert measured(rounded, speaking("llama"))["evaluation"]["top1_agreement"] == wanted
    assert 0 < wanted < 1


def test_percentiles_top_5_and_flips_are_those_of_plain_transformers(speaking, rounded, windows, measured):
    p, q = (log_probabilities(folder, windows) for folder in (speaking("llama"), rounded))
    found = measured(rounded, speaking("llama"))["evaluation"]
    each = (p.exp() * (p - q)).sum(-1).flatten()
    for name, share in (("kl_p95", 0.95), ("kl_p99", 0.99)):
        assert found[name] == pytest.approx(float(each.quantile(share)), rel=1e-5)
    ours, theirs = ([set(row.topk(5).indices.tolist()) for row in logs.reshape(-1, logs.shape[-1])] for logs in (q, p))
    both = sum(len(one & other) for one, other in zip(ours, theirs, strict=True))
    assert found["top5_agreement"] == both / (5 * windows.numel())
    was_right, is_right = (logs[:, :-1].argmax(-1) == windows[:, 1:] for logs in (p, q))
    lost, won = int((was_right & ~is_right).sum()), int((is_right & ~was_right).sum())
    assert found["flips"] == {"lost": lost, "won": won, "share": (lost + won) / windows[:, 1:].numel()}
    assert lost > 0
    assert won > 0
    assert found["kl"] < found["kl_p95"] < found["kl_p99"]


def test_a_model_alone_has_a_perplexity_and_nothing_to_be_compared_with(speaking, windows, measured):
    report = measured(speaking("llama"), None)
    found = report["evaluation"]
    wanted = perplexity(log_probabilities(speaking("llama"), windows), windows)
    assert found["perplexity"]["compressed"] == pytest.approx(wanted, rel=1e-5)
    assert found["perplexity"]["original"] is None
    compared = ("kl", "kl_p95", "kl_p99", "top1_agreement", "top5_agreement", "flips", "hidden_error")
    assert [found[name] for name in compared] == [None] * len(compared)
    assert report["size"]["bytes_before"] is None


def test_a_model_against_itself_has_no_divergence_and_full_agreement(speaking, measured):
    found = measured(speaking("llama"), speaking("llama"))["evaluation"]
    assert (found["kl"], found["kl_p99"], found["top1_agreement"], found["top5_agreement"]) == (0, 0, 1, 1)
    assert found["flips"] == {"lost": 0, "won": 0, "share": 0}
    assert found["perplexity"]["original"] == found["perplexity"]["compressed"]


def test_the_protocol_says_on_what_it_was_measured(speaking, rounded, text_file, windows, measured):
    protocol = measured(rounded, speaking("llama"))["evaluation"]["protocol"]
    assert protocol == {
        "source": str(text_file),
        "sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "windows": WINDOWS,
        "seq_len": SEQ_LEN,
        "stride": SEQ_LEN,
        "bos": False,
        "dtype": "float32",
        "tokens": WINDOWS * SEQ_LEN,
        "examples": None,
        "cut": None,
        "pooling": None,
        "masked": None,
    }


def test_the_size_is_that_of_the_files_and_the_original_comes_first(speaking, rounded, tensors_of, measured):
    size = measured(rounded, speaking("llama"))["size"]
    before, after = (
        sum(tensor.nbytes for tensor in tensors_of(folder).values()) for folder in (speaking("llama"), rounded)
    )
    assert (size["bytes_before"], size["bytes_after"]) == (before, after)
    assert size["ratio"] == before / after
    assert 2 + 32 / 16 < size["bits_per_weight"] < 4.2  # codes, scales, and shapes that hardly count


@torch.no_grad()
def test_an_encoder_is_measured_by_its_hidden_states(speaking, compress, windows, measured, tmp_path):
    source, folder = speaking("bert"), tmp_path / "out"
    compress(source, folder, {"method": "rtn", "bits": 4})
    found = measured(folder, source)["evaluation"]
    original, compressed = (transformers.AutoModel.from_pretrained(one).eval() for one in (source, folder))
    states = [torch.cat([m(w[None]).last_hidden_state for w in windows]).double() for m in (original, compressed)]
    wanted = float((states[0] - states[1]).norm() / states[0].norm())
    assert found["hidden_error"] == pytest.approx(wanted, rel=1e-5)  # measured: 0.0932, 3e-16 apart
    assert wanted > 0.01
    assert (found["kl"], found["top1_agreement"], found["perplexity"]["compressed"]) == (None, None, None)


@torch.no_grad()
def test_a_masked_language_model_has_a_divergence_but_no_perplexity(speaking, compress, windows, measured, tmp_path):
    source, folder = speaking("bert-mlm"), tmp_path / "out"
    compress(source, folder, {"method": "rtn", "bits": 4})
    found = measured(folder, source)["evaluation"]
    models = [transformers.AutoModelForMaskedLM.from_pretrained(one).eval() for one in (source, folder)]
    p, q = (torch.cat([m(w[None]).logits for w in windows]).double().log_softmax(-1) for m in models)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found["perplexity"] == {"original": None, "compressed": None}
    assert found["flips"] is None
    assert 0 < found["top5_agreement"] < 1


@pytest.fixture(params=[True, False], ids=["ends", "no-ends"])
def masking(request, speaking, tmp_path) -> Path:
    """A masked language model whose tokenizer has a mask, and tokens around a text or none."""
    folder = tmp_path / "masking"
    shutil.copytree(speaking("bert-mlm"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ends = {"cls_token": "<s>", "sep_token": "<pad>"} if request.param else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": "</s>", **ends}))
    return folder


@torch.no_grad()
def test_the_pseudo_perplexity_is_that_of_every_token_hidden_alone(masking, compress, windows, measured, tmp_path):
    folder = tmp_path / "out"
    compress(masking, folder, {"method": "rtn", "bits": 4})
    found = measured(folder, masking, masked=10**6)["evaluation"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(masking)
    first, last = ([] if one is None else [one] for one in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    for name, one in (("original", masking), ("compressed", folder)):
        model, losses = transformers.AutoModelForMaskedLM.from_pretrained(one).eval(), []
        for window in windows.tolist():
            asked = [[*first, *window[:at], tokenizer.mask_token_id, *window[at + 1 :], *last] for at in range(SEQ_LEN)]
            logs = model(torch.tensor(asked)).logits.double().log_softmax(-1)
            losses += [-float(logs[at, at + len(first), token]) for at, token in enumerate(window)]
        wanted = torch.tensor(losses).double().mean().exp()
        assert found["pseudo_perplexity"][name] == pytest.approx(float(wanted), rel=1e-5)
    assert found["protocol"]["masked"] == windows.numel()


def test_a_sample_of_hidden_tokens_is_as_large_as_asked_for_and_the_same_for_all(masking, measured):
    found = [measured(masking, masking, masked=20)["evaluation"] for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["protocol"]["masked"] == 20
    assert found[0]["pseudo_perplexity"]["original"] == found[0]["pseudo_perplexity"]["compressed"]


def test_fewer_windows_than_asked_for_are_taken_and_counted(speaking, measured):
    assert measured(speaking("llama"), None, windows=1000)["evaluation"]["protocol"]["windows"] == WINDOWS


def test_too_little_text_for_one_window_is_one_sentence(speaking, measured, tmp_path):
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"short\.txt holds 3 tokens, enough for 0 windows of 24; 1 were asked"):
        measured(speaking("llama"), None, data=str(tmp_path / "short.txt"))


def test_a_condition_on_the_perplexity_of_an_encoder_is_refused(speaking, measured):
    with pytest.raises(RecipeError, match=r"is a BertModel, which doesn't predict the next token: take kl or hidden"):
        measured(speaking("bert"), None, fail_if=("perplexity > 5",))


def test_models_of_two_vocabularies_are_refused(speaking, saved, measured):
    with pytest.raises(RecipeError, match=r"has a vocabulary of \d+ tokens and .* one of 96: name the original"):
        measured(speaking("llama"), saved("llama"))


def test_a_model_in_a_foreign_layout_is_refused(speaking, measured, tmp_path):

    shutil.copytree(speaking("llama"), tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"foreign is quantized as awq, which modelzip doesn't read: .*\.$"):
        measured(tmp_path / "foreign", None)


def test_kernels_that_are_named_wrong_are_refused_before_anything_is_measured(saved, measured, monkeypatch):
    monkeypatch.setenv("MODELZIP_KERNELS", "fastest")
    monkeypatch.setattr("modelzip.pipeline.evaluate.evaluation_windows", lambda *_: pytest.fail("went on"))
    with pytest.raises(RecipeError, match=r"^MODELZIP_KERNELS is 'fastest'; it must be auto, reference or compiled\.$"):
        measured(saved("llama"), None)
