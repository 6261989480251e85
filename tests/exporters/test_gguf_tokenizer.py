"""The tokenizer in a GGUF file: llama.cpp makes the same tokens of a text, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from modelzip.checkpoints.index import Checkpoint
from modelzip.exporters.formats import export, refusal
from modelzip.exporters.request import Request

TEXTS = ("Hello world", "  two  spaces\n\n\ttab", "1234567 and 3.14", "naïve café 東京 🎉", "don't WE'LL I'm")


def exported(source: Path, output: Path) -> Path:
    (file,) = export(Request(Checkpoint.open(str(source)), output), "gguf").path.glob("*.gguf")
    return file


def tokenizer_of(folder: Path, *, digits: bool = False, split: Any = None, merges: bool = True) -> Any:
    """A byte-level BPE of 288 tokens, the last one added, put into a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False) if split is None else split)
    whole.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300 if merges else 258, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    whole.train_from_iterator(["a world of 123 words and 456 spaces, don't we " * 9], trainer)
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["<note>"])
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def speaking(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """speaking(digits=True) -> a pico llama with 320 rows of embedding, and its tokenizer."""

    def of(rows: int = 320, **options: Any) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("speaking") / "pico"
        models.FAMILIES["llama"].build(hidden_size=64, vocab_size=rows).save_pretrained(folder)
        return folder, tokenizer_of(folder, **options)

    return of


def test_the_tokenizer_with_its_special_tokens_and_template_is_in_the_file(
    speaking: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    source, tokenizer = speaking()
    fields = GGUFReader(exported(source, tmp_path / "out")).fields
    told = {name.removeprefix("tokenizer."): one.contents() for name, one in fields.items() if "tokenizer." in name}
    assert (told["ggml.model"], told["ggml.pre"]) == ("gpt2", "gpt-2")
    assert told["ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = told["ggml.token_type"]
    assert (kinds[0], kinds[2], kinds[len(tokenizer) - 1], kinds[-1]) == (3, 1, 4, 5)
    assert len(told["ggml.tokens"]) == len(kinds) == 320
    assert (told["ggml.bos_token_id"], told["ggml.eos_token_id"]) == (0, 1)
    assert (told["ggml.add_bos_token"], told["ggml.add_eos_token"]) == (True, False)
    assert told["chat_template"] == tokenizer.chat_template
    assert len(told["ggml.merges"]) == len(tokenizer) - 1 - 2 - 256
    assert told["ggml.merges"][0] == "Ġ w"


@pytest.mark.parametrize("digits", [False, True])
def test_llama_cpp_makes_the_same_tokens_of_a_text(
    digits: bool, speaking: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    source, tokenizer = speaking(digits=digits)
    file = exported(source, tmp_path / "out")
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (*TEXTS, "<s>a <note>b</s>"):
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"]


def test_tokenizers_that_llama_cpp_would_take_for_others_are_refused(
    speaking: Callable[..., tuple[Path, Any]],
) -> None:
    from tokenizers import AddedToken, pre_tokenizers

    unknown, _ = speaking(split=pre_tokenizers.ByteLevel(add_prefix_space=True))
    assert "its pre-tokenizer is none that llama.cpp's gpt-2, smollm, qwen2" in _refused(unknown)
    small, _ = speaking(rows=200)
    assert "its tokenizer has a token 287, and its embedding has 200 rows" in _refused(small)
    bare, _ = speaking(merges=False)
    assert "its tokenizer has no merges, without which llama.cpp opens no BPE" in _refused(bare)
    greedy, tokenizer = speaking()
    tokenizer.add_tokens([AddedToken("<wide>", lstrip=True)])
    tokenizer.save_pretrained(greedy)
    assert "its token <wide> looks at what stands beside it" in _refused(greedy)
    (greedy / "tokenizer.json").rename(greedy / "tokenizer.model")
    assert "its tokenizer is in tokenizer.model without a tokenizer.json" in _refused(greedy)


def _refused(folder: Path) -> str:
    return refusal(Request(Checkpoint.open(str(folder)), folder / "out"), "gguf") or ""
