"""A model's tokenizer as GGUF keeps it: the one that transformers opens, so that what it overrides counts as well.

llama.cpp knows how texts are split before the merges by a name alone, so the structure of the pre-tokenizer has to be
one of those in `SPLITS`: any other would be tokenized differently without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer

from modelzip.checkpoints.index import Checkpoint

_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2: Final = ("ByteLevel", False, True)
_BYTES: Final = ("ByteLevel", False, False)
SPLITS: Final = MappingProxyType(
    {
        ((_GPT2,), False): "gpt-2",
        ((("Digits", True), _GPT2), False): "smollm",
        ((("Split", _WORDS % r"\p{N}", "Isolated", False), _BYTES), False): "qwen2",
        ((("Split", _WORDS % r"\p{N}{1,3}", "Isolated", False), _BYTES), True): "llama-bpe",
        ((("Split", _WORDS % r"\p{N}{1,3}", "Isolated", False), _BYTES), False): "smaug-bpe",
    }
)
"""llama.cpp's names, by the steps of the pre-tokenizer and whether a word that is a token is taken without merges."""
OTHERS: Final = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files of tokenizers that aren't in the one format that is read here."""
EXTRAS: Final = ("lstrip", "rstrip", "single_word")
PARTS: Final = MappingProxyType(
    {
        "ByteLevel": ("add_prefix_space", "use_regex"),
        "Digits": ("individual_digits",),
        "Split": ("pattern", "behavior", "invert"),
    }
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """whole: as transformers opens it. told: tokenizer.json's content. size: rows of the model's embedding."""

    whole: Any
    told: dict[str, Any]
    size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, size: int) -> Tokenizer | None:
        """None for a model that comes without."""
        if not (checkpoint.folder / "tokenizer.json").is_file():
            return None
        whole = AutoTokenizer.from_pretrained(checkpoint.folder)
        return cls(whole, json.loads(whole.backend_tokenizer.to_str()), size)

    @property
    def kind(self) -> str:
        """BPE, WordPiece, ..."""
        return str(self.told["model"]["type"])

    @property
    def tokens(self) -> dict[int, str]:
        return {number: token for token, number in self.whole.get_vocab().items()}


def misfit(checkpoint: Checkpoint, size: int) -> str | None:
    """Why llama.cpp wouldn't split texts as this model's tokenizer does, as a clause; None if it would, or if there is
    no tokenizer. size: rows of the embedding.
    """
    tokenizer = Tokenizer.of(checkpoint, size)
    if tokenizer is None:
        other = next((name for name in OTHERS if (checkpoint.folder / name).is_file()), None)
        told = "which isn't read here: open it with transformers' AutoTokenizer and save it beside the model"
        return None if other is None else f"its tokenizer is in {other} without a tokenizer.json, {told}"
    if (most := max(tokenizer.tokens, default=-1)) >= size:
        return f"its tokenizer has a token {most}, and its embedding has {size} rows"
    greedy = next((one for one in tokenizer.told["added_tokens"] if any(one[key] for key in EXTRAS)), None)
    if greedy is not None:
        return f"its token {greedy['content']} looks at what stands beside it, which llama.cpp's tokens don't"
    if tokenizer.kind == "BPE":
        return _bpe_misfit(tokenizer) or _frame_misfit(tokenizer)
    if tokenizer.kind == "WordPiece":
        return _word_piece_misfit(tokenizer)
    return f"its tokenizer is {tokenizer.kind}, and GGUF gets byte-level BPE or WordPiece here"


def describe(writer: GGUFWriter, checkpoint: Checkpoint, size: int) -> None:
    """Write the tokenizer; of a model that comes without, that there is none."""
    tokenizer = Tokenizer.of(checkpoint, size)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    if tokenizer.kind == "BPE":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(SPLITS[_structure(tokenizer.told)])
        writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in _merges(tokenizer)])
        first, last = _frame(tokenizer.whole)
        writer.add_add_bos_token(bool(first))
        writer.add_add_eos_token(bool(last))
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model("bert")
        writer.add_tokenizer_pre("default")
        writer.add_bool("tokenizer.ggml.normalizer.lowercase", tokenizer.told["normalizer"]["lowercase"])
    _describe_tokens(writer, tokenizer)
    _describe_special(writer, tokenizer)
    template = tokenizer.whole.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": one} for name, one in template.items()]
    if template:
        writer.add_chat_template(template)


def _describe_tokens(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    """Every row of the embedding has a token; those that the tokenizer lacks are marked as unused."""
    tokens, kinds = [], []
    known, added = tokenizer.tokens, {one["id"]: one for one in tokenizer.told["added_tokens"]}
    for number in range(tokenizer.size):
        token = known.get(number)
        if token is None:
            kinds.append(TokenType.UNUSED)
        elif number in added:
            kinds.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
            token = _marked(token) if tokenizer.kind == "WordPiece" else token
        tokens.append(f"[PAD{number}]" if token is None else token)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)


def _marked(token: str) -> str:
    """A word's beginning is marked in GGUF, where WordPiece marks what continues one."""
    return token.removeprefix("##") if token.startswith("##") else "\u2581" + token


def _describe_special(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    whole, bert = tokenizer.whole, tokenizer.kind == "WordPiece"
    numbers = {
        writer.add_bos_token_id: whole.cls_token_id if bert else whole.bos_token_id,
        writer.add_eos_token_id: whole.eos_token_id,
        writer.add_unk_token_id: whole.unk_token_id,
        writer.add_pad_token_id: whole.pad_token_id,
        writer.add_sep_token_id: whole.sep_token_id if bert else None,
        writer.add_mask_token_id: whole.mask_token_id if bert else None,
    }
    for add, number in numbers.items():
        if number is not None:
            add(number)


def _bpe_misfit(tokenizer: Tokenizer) -> str | None:
    model, told = tokenizer.told["model"], tokenizer.told
    if model.get("byte_fallback") or (told["decoder"] or {}).get("type") != "ByteLevel":
        return "its tokenizer is sentencepiece-like BPE, and GGUF gets byte-level BPE or WordPiece here"
    if not model["merges"]:
        return "its tokenizer has no merges, without which llama.cpp opens no BPE"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its tokenizer marks words by prefixes or suffixes, which llama.cpp's BPE doesn't know"
    if (normalizer := told["normalizer"]) is not None and normalizer["type"] != "NFC":
        return f"its tokenizer normalizes texts by {normalizer['type']}, which llama.cpp's BPE doesn't do"
    if _structure(told) not in SPLITS:
        known = ", ".join(SPLITS.values())
        return f"its pre-tokenizer is none that llama.cpp's {known} stand for: {json.dumps(told['pre_tokenizer'])}"
    return None


def _frame_misfit(tokenizer: Tokenizer) -> str | None:
    first, last = _frame(tokenizer.whole)
    if first not in ([], [tokenizer.whole.bos_token_id]) or last not in ([], [tokenizer.whole.eos_token_id]):
        return f"its tokenizer puts the tokens {first} before a text and {last} after it, and llama.cpp bos and eos"
    return None


def _word_piece_misfit(tokenizer: Tokenizer) -> str | None:
    told, whole = tokenizer.told, tokenizer.whole
    normalizer = told["normalizer"] or {}
    lower, strip = normalizer.get("lowercase"), normalizer.get("strip_accents")
    if normalizer.get("type") != "BertNormalizer" or strip not in (None, lower):
        return f"its tokenizer normalizes texts as llama.cpp's WordPiece doesn't: {json.dumps(normalizer)}"
    if (told["pre_tokenizer"] or {}).get("type") != "BertPreTokenizer":
        return f"its pre-tokenizer isn't BERT's: {json.dumps(told['pre_tokenizer'])}"
    if _frame(whole) != ([whole.cls_token_id], [whole.sep_token_id]):
        return "its tokenizer doesn't put [CLS] before a text and [SEP] after it, as llama.cpp's WordPiece does"
    return None


def _frame(whole: Any) -> tuple[list[int], list[int]]:
    """The tokens that are put before a text, and those behind it."""
    framed, bare = whole("a")["input_ids"], whole("a", add_special_tokens=False)["input_ids"]
    place = next(at for at in range(len(framed)) if framed[at : at + len(bare)] == bare)
    return framed[:place], framed[place + len(bare) :]


def _merges(tokenizer: Tokenizer) -> list[Any]:
    merges: list[Any] = tokenizer.told["model"]["merges"]
    return merges


def _structure(told: dict[str, Any]) -> tuple[tuple[Any, ...], bool]:
    """The steps of a tokenizer.json's pre-tokenizer, and whether words that are tokens are left whole."""
    whole = told["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
    steps = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    return tuple(_step(step) for step in steps), bool(told["model"].get("ignore_merges"))


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    values = [step[key] for key in PARTS.get(step["type"], ())]
    return (step["type"], *(one.get("Regex", "") if isinstance(one, dict) else one for one in values))
