"""Tokens taken out: the smaller model on renumbered ids gives what the whole one gives, and no text fails."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modelzip.checkpoints.errors import CalibrationError, ProblemsError
from modelzip.checkpoints.index import Checkpoint

spec = importlib.util.spec_from_file_location("structural_help", Path(__file__).with_name("structural.py"))
help = importlib.util.module_from_spec(spec)
spec.loader.exec_module(help)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
NAMED = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
ROWS = 330
KINDS = {"wordpiece": "bert-mlm", "bpe": "gpt2", "unigram": "llama", "bpe-llama": "llama-tied"}


def words(count: int, *, seed: int) -> str:
    draw = random.Random(seed)
    stems = ["walk", "talk", "quick", "brown", "jump", "lazy", "über", "naïve", "show", "light", "dark", "read"]
    endings = ["", "ed", "ing", "ness", "ly", "s", "er"]
    return " ".join(draw.choice(stems) + draw.choice(endings) for _ in range(count))


def trained(kind: str) -> Tokenizer:
    """A tokenizer as models of that kind have it, its vocabulary learned from the words and their mixtures."""
    if kind == "wordpiece":
        tokenizer = Tokenizer(WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=ROWS - 10, special_tokens=SPECIAL)
    elif kind == "unigram":
        tokenizer = Tokenizer(Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=ROWS - 10, special_tokens=SPECIAL, unk_token="<unk>")
    elif kind == "bpe":
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=ROWS - 10, special_tokens=SPECIAL, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=ROWS - 10, special_tokens=SPECIAL + bytes_)
    tokenizer.train_from_iterator([words(3000, seed=seed) for seed in range(2)], trainer)
    if kind == "bpe-llama":  # bytes are pieces of the model, not added tokens
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] in SPECIAL]
        tokenizer = Tokenizer.from_str(json.dumps(data))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    if kind == "wordpiece":
        tokenizer.post_processor = processors.BertProcessing(ends[1], ends[0])
    else:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def pruned(request, models, tmp_path_factory):
    """(folder before, folder after, text): with the tokens that half of the words use."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    models.FAMILIES[KINDS[request.param]].build(vocab_size=ROWS, **sizes).save_pretrained(folder / "in")
    PreTrainedTokenizerFast(
        tokenizer_object=trained(request.param),
        **NAMED,
    ).save_pretrained(folder / "in")
    text = " ".join(word for word in words(300, seed=5).split() if word[0] in "wqjl")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    help.prune(folder / "in", folder / "out", method="vocabulary", corpus=str(folder / "text.txt"))
    return folder / "in", folder / "out", text


def ids(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def pieces(folder: Path, text: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_text_of_the_corpus_has_the_same_pieces(pruned):
    before, after, text = pruned
    assert pieces(after, text) == pieces(before, text)


def test_ids_are_numbered_without_gaps_and_fewer_than_before(pruned):
    _, after, _ = pruned
    vocabulary = AutoTokenizer.from_pretrained(after).get_vocab()
    rows = json.loads((after / "config.json").read_text())["vocab_size"]
    assert sorted(vocabulary.values()) == list(range(rows))
    assert rows < ROWS


def test_the_smaller_model_gives_the_logits_of_the_kept_tokens(pruned):
    before, after, text = pruned
    one, other = torch.tensor([ids(before, text)[:60]]), torch.tensor([ids(after, text)[:60]])
    old = AutoTokenizer.from_pretrained(before).get_vocab()
    new = AutoTokenizer.from_pretrained(after).get_vocab()
    kept = torch.tensor([old[name] for name in sorted(new, key=new.__getitem__)])
    with torch.no_grad():
        whole = help.opened(before)(one, output_hidden_states=True)
        less = help.opened(after)(other, output_hidden_states=True)
    for a, b in zip(less.hidden_states, whole.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert help.distance([less.logits], [whole.logits[..., kept]]) < 1e-6  # measured 1e-7: sums in another order


def test_words_that_the_corpus_lacks_fall_into_smaller_pieces(pruned):
    _, after, _ = pruned
    tokenizer = AutoTokenizer.from_pretrained(after)
    rows = json.loads((after / "config.json").read_text())["vocab_size"]
    for text in ("darkness shows quickened wall", "中文 🙂 Zebra", ""):
        assert all(0 <= index < rows for index in tokenizer(text)["input_ids"])
    if "bpe" in str(after):
        assert tokenizer.decode(tokenizer("quick 中🙂")["input_ids"], skip_special_tokens=True).strip() == "quick 中🙂"
    assert tokenizer.unk_token_id not in tokenizer("wall quill")["input_ids"]


def test_special_tokens_keep_their_meaning_under_their_new_numbers(pruned):
    _, after, text = pruned
    tokenizer = AutoTokenizer.from_pretrained(after)
    config = json.loads((after / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("</s>") == tokenizer.eos_token_id
    assert tokenizer(text)["input_ids"][0] == tokenizer.convert_tokens_to_ids("<s>") == config["bos_token_id"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.mask_token_id) == "<mask>"


def test_without_the_corpus_tokens_those_are_left_that_no_text_can_do_without(pruned, tmp_path):
    before, _, _ = pruned
    source = Checkpoint.open(str(before))
    corpus = str(before.parent / "text.txt")
    least = help.plan_of(source, tmp_path, method="vocabulary", corpus=corpus, max_tokens=1)
    most = help.plan_of(source, tmp_path, method="vocabulary", corpus=corpus)
    never = help.plan_of(source, tmp_path, method="vocabulary", corpus=corpus, min_count=10_000)
    assert set(least.choice) == set(never.choice) < set(most.choice)


def test_a_corpus_that_uses_every_token_is_refused(models, tmp_path):
    names = [*SPECIAL, "walk", "talk"]
    models.FAMILIES["bert-mlm"].build(vocab_size=len(names)).save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMED).save_pretrained(tmp_path)
    (tmp_path / "all.jsonl").write_text('{"text": "walk"}\n{"text": "talk"}')
    with pytest.raises(
        ProblemsError, match=r"none of the 7 tokens can go: 5 are special .*, and \S+ uses the others: raise min_count"
    ):
        help.plan_of(
            Checkpoint.open(str(tmp_path)), tmp_path / "out", method="vocabulary", corpus=str(tmp_path / "all.jsonl")
        )


def test_a_blank_corpus_is_refused(speaking, tmp_path):
    (tmp_path / "blank.txt").write_text("  \n\n \t \n")
    with pytest.raises(
        CalibrationError, match=r"blank\.txt holds no text: give a corpus of what the model will read\.$"
    ):
        help.plan_of(
            Checkpoint.open(str(speaking("llama"))),
            tmp_path / "out",
            method="vocabulary",
            corpus=str(tmp_path / "blank.txt"),
        )


def test_tokens_that_always_stay_are_not_said_to_be_used(models, tmp_path):
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    models.FAMILIES["llama"].build(vocab_size=256).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "few.txt").write_text("a few words")
    with pytest.raises(ProblemsError) as told:
        help.plan_of(
            Checkpoint.open(str(tmp_path)), tmp_path / "out", method="vocabulary", corpus=str(tmp_path / "few.txt")
        )
    assert told.value.sentences == ("prune: none of the 256 tokens can go: 256 are special or spell any text.",)


@pytest.mark.parametrize(
    ("name", "content"), [("a.tsv", "text\tlabel\nit's \"so\tx\n"), ("a.csv", 'text,label\n"a, b",x\n')]
)
def test_a_corpus_may_be_a_table(name, content, tmp_path):
    from modelzip.pipeline.vocabulary import texts

    (tmp_path / name).write_text(content)
    assert list(texts(tmp_path / name, "text")) == ([""" it's "so""".strip()] if name == "a.tsv" else ["a, b"])
    with pytest.raises(CalibrationError, match="has no text in the field 'words'"):
        list(texts(tmp_path / name, "words"))


def test_a_long_text_is_cut_at_lines_and_nothing_is_lost(tmp_path, monkeypatch):
    from modelzip.pipeline import vocabulary

    monkeypatch.setattr(vocabulary, "LONGEST", 20)
    text = "".join(f"line {number}\n" for number in range(30))
    (tmp_path / "a.txt").write_text(text)
    found = list(vocabulary.texts(tmp_path / "a.txt", "text"))
    assert "".join(found) == text
    assert max(map(len, found)) <= 20
