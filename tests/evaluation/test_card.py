"""The model card of an output: what was done on top, the original's card below, never wrapped twice."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from modelzip.evaluation.card import MARK, model_card
from modelzip.evaluation.report import Report, validate

ORIGINAL = """---
license: apache-2.0
language: [en]
base_model: someone/large
tags: [chat]
---
# Large

It speaks.
"""
CONFIG = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "compressed-tensors"}}


@pytest.fixture
def report() -> Report:
    where = dict.fromkeys(("python", "torch", "transformers", "compressed_tensors", "platform", "cpu", "device"), "x")
    return validate(
        {
            "modelzip": "0.1.0",
            "command": "quantize",
            "recipe": {
                "model": "/home/ada/large",
                "output": "out/small",
                "stages": [{"quantize": {"method": "rtn", "bits": 4}}],
            },
            "source": {"name": "large", "sha256": "0" * 64},
            "output": "out/small",
            "size": {
                **{"bytes_before": 1000, "bytes_after": 300, "ratio": 3.3, "parameters": 500},
                **{"compressed_parameters": 400, "bits_per_weight": 4.25, "bits_per_parameter": 4.8},
            },
            "time": {"total_s": 1.0, "phases": {}},
            "environment": {**where, "threads": 2, "kernels": "compiled", "products": "compiled"},
        }
    )


def test_it_has_the_figures_the_recipe_and_how_to_open_it(report: Report) -> None:
    card = ModelCard(model_card(report, "", CONFIG))
    assert "| Bits a compressed weight |  | 4.25 | 400 of 500 parameters |" in card.text
    assert 'LlamaForCausalLM.from_pretrained("small")' in card.text
    assert "modelzip.weights" not in card.text
    recipe = yaml.safe_load(card.text.partition("```yaml")[2].partition("```")[0])
    assert recipe == {"model": "large", "stages": [{"quantize": {"method": "rtn", "bits": 4}}]}
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["modelzip"]}


def test_the_originals_card_stays_with_its_front_matter(report: Report) -> None:
    card = ModelCard(model_card(report, ORIGINAL, CONFIG))
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "someone/large"
    assert card.data.tags == ["chat", "modelzip"]
    assert card.text.rstrip().endswith("# Large\n\nIt speaks.")


def test_a_card_that_was_made_before_is_made_anew(report: Report) -> None:
    once = model_card(report, ORIGINAL, CONFIG)
    assert model_card(report, once, CONFIG) == once
    alone = model_card(report, "", CONFIG)
    assert model_card(report, alone, CONFIG) == alone
    assert once.count(MARK) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["BertModel"], "quantization_config": {"quant_method": "modelzip"}}, "import BertModel"),
        ({"architectures": ["BiLstmForSequenceClassification"]}, "import AutoModelForSequenceClassification"),
    ],
)
def test_what_only_modelzip_opens_says_so(report: Report, config: dict[str, Any], words: str) -> None:
    card = model_card(report, "", config)
    assert "import modelzip.weights" in card
    assert words in card


@pytest.mark.parametrize("broken", ["---\na: [\n---\n# Old", "---\n- a\n---\n# Old"])
def test_front_matter_that_is_none_is_kept_as_text(report: Report, broken: str) -> None:
    card = model_card(report, broken, CONFIG)
    assert card.endswith(broken + "\n")
    assert ModelCard(card).data.tags == ["modelzip"]
