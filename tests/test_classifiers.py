"""The classifier and the sentences that other tests train on."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def folder(save_classifier, tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


def rows(file: Path) -> tuple[list[str], torch.Tensor]:
    with file.open(encoding="utf-8", newline="") as lines:
        found = list(csv.DictReader(lines, delimiter="\t"))
    return [row["sentence"] for row in found], torch.tensor([int(row["label"]) for row in found])


def test_its_tokenizer_opens_without_a_network_and_spells_words_in_pieces(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("The films, dulLest!").tokens() == [
        "[CLS]",
        "the",
        "film",
        "##s",
        ",",
        "dull",
        "##est",
        "!",
        "[SEP]",
    ]
    assert tokenizer("wax", "ö 7").tokens() == ["[CLS]", "w", "##a", "##x", "[SEP]", "o", "[UNK]", "[SEP]"]
    assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


def test_sentences_are_drawn_anew_from_each_seed_half_of_them_positive(write_labelled, tmp_path):
    first, again, other = (rows(write_labelled(tmp_path / f"{seed}.tsv", 101, seed=seed)) for seed in (0, 0, 1))
    assert first[0] == again[0]
    assert first[0] != other[0]
    assert len(first[0]) == 101
    assert int(first[1].sum()) in (50, 51)


def test_it_learns_the_labels_of_sentences_that_it_has_not_seen(folder, write_labelled, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sentences, labels = rows(write_labelled(tmp_path / "train.tsv", 512))
    unseen, truth = rows(write_labelled(tmp_path / "dev.tsv", 200, seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(6):
        for at in range(0, len(sentences), 32):
            batch = tokenizer(sentences[at : at + 32], padding=True, return_tensors="pt")
            model(**batch, labels=labels[at : at + 32]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        found = model(**tokenizer(unseen, padding=True, return_tensors="pt")).logits.argmax(dim=1)
    accuracy = float((found == truth).float().mean())
    assert accuracy > 0.95  # measured: 1.0; guessing gives 0.5
