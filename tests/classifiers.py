"""A pico BERT classifier with a WordPiece tokenizer, and labelled sentences that it can learn.

A sentence is positive (label 1) if more of its words praise than blame. There is always an odd number of such words,
and neutral ones between them: which words matter has to be learnt, their order doesn't.
"""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

PRAISE = ("good", "great", "warm", "clever", "charming", "moving", "honest", "funny")
BLAME = ("bad", "dull", "cold", "stupid", "tedious", "hollow", "false", "boring")
NEUTRAL = ("the", "a", "film", "story", "actor", "scene", "is", "was", "and", "with", "very", "plot", "camera", "music")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = string.ascii_lowercase
PIECES = ("##s", "##ly", "##er", "##est", *LETTERS, *(f"##{letter}" for letter in LETTERS))
"""Beside whole words: endings and letters, so that any word of Latin letters can be spelled in pieces."""

VOCABULARY = tuple(dict.fromkeys((*SPECIAL, *NEUTRAL, *PRAISE, *BLAME, *PIECES, ".", ",", "!")))
POSITIONS = 64


def save_classifier(folder: Path, *, layers: int = 2, seed: int = 0, **changes: Any) -> Path:
    """A pico BertForSequenceClassification of two classes as transformers initializes it; `changes` are BertConfig's.

    Not one of models.FAMILIES, whose large random weights take far longer to train.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    BertTokenizer(vocab=vocabulary, model_max_length=POSITIONS).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    shape = {"vocab_size": len(VOCABULARY), "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertForSequenceClassification(BertConfig(**{**sizes, **shape, **names, **changes})).save_pretrained(folder)
    return folder


def write_labelled(file: Path, count: int, *, seed: int = 0) -> Path:
    """A tsv of `count` sentences with the header `sentence<tab>label`; half of them, give or take one, are positive."""
    draw = random.Random(seed)
    lines = ["sentence\tlabel"]
    for label in draw.sample([0, 1] * ((count + 1) // 2), k=count):
        minority = int(draw.random() < 1 / 3)
        sides = (PRAISE, BLAME) if label == 1 else (BLAME, PRAISE)
        words = draw.choices(sides[0], k=minority + 1) + draw.choices(sides[1], k=minority)
        words += draw.choices(NEUTRAL, k=draw.randint(2, 8))
        draw.shuffle(words)
        lines.append(f"{' '.join(words)} .\t{label}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
