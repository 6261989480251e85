"""What the settings of those who read data are called, so that a message names what its reader can set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Called:
    """field, length: of running text, and of its windows. text, pair, label: columns of labelled examples.

    instead: what else can be done where there is no data, as the end of a sentence.
    """

    field: str
    length: str
    text: str = ""
    pair: str = ""
    label: str = ""
    instead: str = ""


CALIBRATION: Final = Called("--field", "--samples or --seq-len", instead=", or use --calibration self")
EVALUATE: Final = Called("--field", "--seq-len", "--text", "--pair", "--label")
"""Options of the verb `evaluate`."""
EVALUATION: Final = Called("evaluate.field", "evaluate.seq_len", "evaluate.text", "evaluate.pair", "evaluate.label")
"""Keys of a recipe, most of which no other verb has an option for."""
TRAINING: Final = Called("text_column", "max_length", "text_column", "pair_column", "label_column")
PROMPTS: Final = Called("text_column", "prompt_length")
CORPUS: Final = Called("corpus_field", "")
