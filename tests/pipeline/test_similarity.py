"""Sentence encoders measured by their embeddings, against plain transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from modelzip.checkpoints.errors import CheckpointError, ModelzipError
from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.embeddings import POOLINGS, compared
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.pipeline.similarity import pooling_of
from modelzip.recipes.schema import Evaluation

TEXTS = 24


@pytest.fixture(scope="module")
def data(prose: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of texts of unlike lengths with scores."""
    draw, text = random.Random(0), prose(4000, seed=3)
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    parts = [text[at : at + draw.randint(3, 60)] for at in range(0, 2 * TEXTS * 60, 60)]
    rows = [
        {"sentence1": a, "sentence2": b, "score": draw.random()} for a, b in zip(parts[::2], parts[1::2], strict=True)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def rounded(speaking: Any, compress: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded") / "out"
    compress(speaking("bert"), folder, {"method": "rtn", "bits": 2})
    return folder


@pytest.fixture(scope="module")
def measured(progress: Any) -> Callable[..., dict[str, Any]]:
    def run(model: Path, against: Path | None, data: Path, **changes: Any) -> dict[str, Any]:
        return evaluate_models(
            str(model),
            against=None if against is None else str(against),
            evaluation=Evaluation(data=str(data), **changes),
            **{"revision": None, "device": "cpu", "dtype": "auto", "progress": progress},
        )["evaluation"]

    return run


@torch.no_grad()
def plainly(folder: Path, texts: list[str]) -> Tensor:
    """Mean of the hidden states of each text, alone."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    limit = model.config.max_position_embeddings
    return torch.stack(
        [
            model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=limit))
            .last_hidden_state[0]
            .mean(0)
            for text in texts
        ]
    ).double()


def ranked(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def test_embeddings_are_compared_as_plain_transformers_makes_them(speaking, rounded, data, measured):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [row[key] for key in ("sentence1", "sentence2") for row in rows]
    one, other = (plainly(folder, texts) for folder in (speaking("bert"), rounded))
    found = measured(rounded, speaking("bert"), data)
    cosines = torch.cosine_similarity(one, other, dim=-1)
    assert found["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert found["cosine_p05"] == pytest.approx(float(cosines.quantile(0.05)), abs=1e-6)
    said = [torch.cosine_similarity(*vectors.chunk(2), dim=-1) for vectors in (one, other)]
    wanted = torch.corrcoef(torch.stack([ranked(each) for each in said]))[0, 1]
    assert found["similarity_agreement"] == pytest.approx(float(wanted), abs=1e-9)
    scores = torch.tensor([row["score"] for row in rows]).double()
    for name, each in zip(("original", "compressed"), said, strict=True):
        wanted = torch.corrcoef(torch.stack([ranked(each), ranked(scores)]))[0, 1]
        assert found["spearman"][name] == pytest.approx(float(wanted), abs=1e-9)
    assert found["cosine"] < 0.999  # the two models differ
    assert found["protocol"]["pooling"] == "mean"
    assert found["protocol"]["examples"] == TEXTS


def test_without_pairs_all_texts_are_compared_with_all_others(speaking, rounded, measured, tmp_path):
    texts = ["abc", "a longer text", "b", "cc dd"]
    (tmp_path / "texts.tsv").write_text("sentence\n" + "\n".join(texts) + "\n")
    found = measured(rounded, speaking("bert"), tmp_path / "texts.tsv")
    one, other = (torch.nn.functional.normalize(plainly(f, texts), dim=-1) for f in (speaking("bert"), rounded))
    above = torch.triu_indices(4, 4, 1)
    said = [(vectors @ vectors.T)[above[0], above[1]] for vectors in (one, other)]
    wanted = float(torch.corrcoef(torch.stack([ranked(each) for each in said]))[0, 1])
    assert found["similarity_agreement"] == pytest.approx(wanted, abs=1e-9)
    assert found["spearman"] is None


def test_an_encoder_alone_is_scored_by_pairs_and_refused_without(speaking, data, measured, tmp_path):
    found = measured(speaking("bert"), None, data)
    assert found["cosine"] is None
    assert found["spearman"]["original"] is None
    assert -1 < found["spearman"]["compressed"] < 1
    (tmp_path / "texts.tsv").write_text("sentence\nabc\n")
    with pytest.raises(ModelzipError, match="has no pairs of texts with scores, so embeddings can only be compared"):
        measured(speaking("bert"), None, tmp_path / "texts.tsv")


def test_encoders_are_timed_over_the_very_texts(speaking, rounded, data, measured):
    found = measured(rounded, speaking("bert"), data, latency=True, batch_size=2, batch_sizes=(1, 3))["latency"]
    assert [row["batch_size"] for row in found["throughput"]] == [1, 3]
    assert found["batched"]["compressed_ms"] > 0
    with pytest.raises(ModelzipError, match="compares two sentence encoders: name an original"):
        measured(rounded, None, data, latency=True)


def test_a_model_with_a_head_has_no_embeddings(speaking, data, measured):
    with pytest.raises(ModelzipError, match=r"evaluate\.task is similarity, but the model is LlamaForCausalLM"):
        measured(speaking("llama"), None, data, task="similarity")


def test_a_condition_on_what_embeddings_do_not_give_is_refused(speaking, data, measured):
    with pytest.raises(ModelzipError, match="texts to be embedded don't give: take cosine or similarity_agreement"):
        measured(speaking("bert"), speaking("bert"), data, fail_if=("kl > 1",))


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_pooling_leaves_padding_out(side):
    states = torch.tensor([[[1.0], [5.0], [9.0]], [[2.0], [3.0], [4.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]) if side == "right" else torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = {name: pool(states, mask).flatten().tolist() for name, pool in POOLINGS.items()}
    right = {"mean": [3, 3], "max": [5, 4], "cls": [1, 2], "lasttoken": [5, 4]}
    assert found == (right if side == "right" else {"mean": [7, 3], "max": [9, 4], "cls": [5, 2], "lasttoken": [9, 4]})


@pytest.mark.parametrize(
    ("told", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 32}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "max"}, "max"),
    ],
)
def test_the_pooling_is_what_sentence_transformers_has_written(saved, tmp_path, told, pooling):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(told))
    assert pooling_of(_moved(saved, tmp_path)) == pooling


def test_a_pooling_that_is_not_known_is_refused(saved, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(
        CheckpointError, match="wants the pooling weightedmean, and modelzip knows one of mean, max, cls"
    ):
        pooling_of(_moved(saved, tmp_path))


def _moved(saved: Any, folder: Path) -> Checkpoint:
    there = Checkpoint.open(str(saved("bert")))
    return Checkpoint(folder, there.config, there.tensors, there.source)


def test_a_model_against_itself_agrees_wholly():
    vectors = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    found = compared(vectors, vectors, None, paired=False)
    assert found == {
        "cosine": pytest.approx(1),
        "cosine_p05": pytest.approx(1),
        "similarity_agreement": pytest.approx(1),
    }
