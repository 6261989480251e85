"""`modelzip export` and the evaluation of classifiers from the command line: exit codes and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def classifier(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico BERT with two classes and a byte tokenizer, and reviews.tsv beside its folder."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier") / "model"
    tokenizer = AutoTokenizer.from_pretrained(save_llama(folder.with_name("llama"), layers=1))
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(BertConfig(vocab_size=258, pad_token_id=1, **sizes)).save_pretrained(folder)
    rows = "".join(f"review number {place}\t{place % 2}\n" for place in range(20))
    (folder.parent / "reviews.tsv").write_text("sentence\tlabel\n" + rows, encoding="utf-8")
    (folder.parent / "strange.tsv").write_text("sentence\tlabel\na\tgood\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "dense"], "is dense already: there is nothing to do but"),
        (["--to", "guff"], "--to: guff is not known; did you mean gguf?"),
        (["--to", "dense", "--dtype", "bfloat"], "--dtype: bfloat is not known to dense; did you mean bfloat16"),
    ],
)
def test_what_can_not_be_exported_ends_with_code_2_and_one_sentence(
    options: list[str], words: str, modelzip: Any, classifier: Path, tmp_path: Path
) -> None:
    done = modelzip.fork("export", classifier, *options, "-o", tmp_path / "out", cwd=tmp_path).wait()
    assert done.code == 2
    assert len(done.errors) == 1
    assert words in done.errors[0]
    assert not (tmp_path / "out").exists()


def test_another_type_is_written_to_a_folder_named_after_model_and_format(
    modelzip: Any, classifier: Path, tmp_path: Path
) -> None:
    done = modelzip.fork("export", classifier, "--to", "dense", "--dtype", "bfloat16", "--json", cwd=tmp_path).wait()
    assert done.code == 0
    told = json.loads(done.out)
    assert Path(told["output"]) == tmp_path / "model-dense"
    assert told["bytes_after"] * 2 == told["bytes_before"]
    assert (tmp_path / "model-dense" / "tokenizer.json").is_file()


def test_accuracies_are_shown_and_gates_on_them_set_the_exit_code(
    modelzip: Any, classifier: Path, tmp_path: Path
) -> None:
    data = ["--against", classifier, "--data", classifier.parent / "reviews.tsv", "--fail-if"]
    good = modelzip.fork("evaluate", classifier, *data, "accuracy < 0.98 * original.accuracy", cwd=tmp_path).wait()
    assert good.code == 0
    assert "accuracy" in good.out
    bad = modelzip.fork("evaluate", classifier, *data, "accuracy <= 100%", "--json", cwd=tmp_path).wait()
    assert bad.code == 3
    assert json.loads(bad.out)["evaluation"]["protocol"]["examples"] == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "reviews.tsv", "--text", "title"], "no column 'title'; it has sentence, label: name one by --text"),
        (["--data", "strange.tsv"], "strange.tsv line 2: the label 'good'"),
        (["--data", "nowhere.tsv"], "There is no file nowhere.tsv"),
        (["--data", "reviews.tsv", "--fail-if", "perplexity > 3"], "labelled examples don't give"),
        (["--data", "reviews.tsv", "--latency"], "no original with classes is named"),
    ],
)
def test_a_mistake_about_the_examples_is_one_sentence(
    options: list[str], words: str, modelzip: Any, classifier: Path
) -> None:
    done = modelzip.fork("evaluate", "model", *options, cwd=classifier.parent).wait()
    assert done.code == 2
    assert len(done.errors) == 1
    assert words in done.errors[0]
