"""A tokenizer with fewer tokens: its files with the others taken out and the rest numbered anew.

What stays gives the same pieces as before for every text whose pieces all stay: WordPiece takes the longest piece that
fits, Unigram the best path, and BPE the first merge that fits, and each of these is still there; `with_derivations`
adds the pieces that BPE puts the kept ones together from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from .errors import CheckpointError

SENTENCEPIECE: Final = frozenset({"spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model"})
"""Files that hold the old tokens in a form that isn't written here; tokenizer.json stands for them."""
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """All pieces of a tokenizer.json with their ids, added ones too. Raises CheckpointError for an unknown kind."""
    model = tokenizer["model"]
    if model.get("type") not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise CheckpointError(f"its tokenizer is a {model.get('type')}, of which modelzip can't take tokens out")
    if model["type"] == "Unigram":
        found = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    else:
        found = dict(model["vocab"])
    return {**found, **{added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}}


def always_kept(tokenizer: Mapping[str, Any], characters: Iterable[str]) -> set[int]:
    """Ids without which a tokenizer fails on some text: added and unknown tokens, bytes, pieces of these characters."""
    vocabulary = vocabulary_of(tokenizer)
    model = tokenizer["model"]
    names = {added["content"] for added in tokenizer.get("added_tokens", [])}
    names |= {name for name in vocabulary if _BYTE.fullmatch(name)} if model.get("byte_fallback") else set()
    if _is_byte_level(tokenizer):
        names |= set(_byte_alphabet())
    if isinstance(model.get("unk_token"), str):
        names.add(model["unk_token"])
    prefix = str(model.get("continuing_subword_prefix") or "")
    for character in characters:
        names |= {character, f"{prefix}{character}"}
    names.add("▁")  # the space of SentencePiece
    found = {vocabulary[name] for name in names if name in vocabulary}
    return found | ({model["unk_id"]} if isinstance(model.get("unk_id"), int) else set())


def with_derivations(tokenizer: Mapping[str, Any], kept: Iterable[int]) -> set[int]:
    """`kept`, and for BPE all pieces that merges put the kept ones together from."""
    kept = set(kept)
    model = tokenizer["model"]
    if model["type"] != "BPE":
        return kept
    vocabulary = model["vocab"]
    ranks = {pair: rank for rank, pair in enumerate(map(_pair, model["merges"]))}
    names = {index: name for name, index in vocabulary.items()}
    for index in sorted(kept & names.keys()):
        for piece in _derivation(names[index], ranks):
            if piece in vocabulary:
                kept.add(vocabulary[piece])
    return kept


def _derivation(name: str, ranks: Mapping[tuple[str, str], int]) -> Iterable[str]:
    """The pieces from which merges put `name` together, itself and single characters included."""
    pieces = list(name)
    yield from pieces
    while len(pieces) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(pieces)))
        if rank == len(ranks):
            return
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        yield pieces[place]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def fewer(tokenizer: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json with the tokens of `new` (old id -> new id) alone."""
    result = deepcopy(dict(tokenizer))
    model = result["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {name: new[index] for name, index in model["vocab"].items() if index in new}
    if model["type"] == "BPE":
        stay = model["vocab"]
        model["merges"] = [merge for merge in model["merges"] if {*_pair(merge), "".join(_pair(merge))} <= stay.keys()]
    for added in result.get("added_tokens", []):
        added["id"] = new[added["id"]]
    if isinstance(result.get("padding"), dict):
        result["padding"]["pad_id"] = new[result["padding"]["pad_id"]]
    if result.get("post_processor"):
        _renumber_processor(result["post_processor"], new)
    return result


def _renumber_processor(processor: dict[str, Any], new: Mapping[int, int]) -> None:
    for inner in processor.get("processors", []):
        _renumber_processor(inner, new)
    if isinstance(processor.get("special_tokens"), dict):
        for token in processor["special_tokens"].values():
            token["ids"] = [new[index] for index in token["ids"]]
    for key in ("sep", "cls"):
        if isinstance(processor.get(key), list):
            name, index = processor[key]
            processor[key] = [name, new[index]]


def tokenizer_files(
    folder: Path, side_files: Iterable[Path], tokenizer: Mapping[str, Any], new: Mapping[int, int]
) -> tuple[dict[str, bytes], frozenset[str]]:
    """The files of the smaller tokenizer and of the ids that lie beside it, and those that have no use any more."""
    names = {str(path) for path in side_files}
    smaller = fewer(tokenizer, new)
    files = {"tokenizer.json": _json(smaller)}
    model = smaller["model"]
    if "vocab.txt" in names:
        ordered = sorted(vocabulary_of(smaller).items(), key=lambda item: item[1])
        files["vocab.txt"] = "".join(f"{name}\n" for name, _ in ordered).encode()
    if "vocab.json" in names:
        files["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False).encode()
    if "merges.txt" in names and "merges" in model:
        lines = "".join(" ".join(_pair(merge)) + "\n" for merge in model["merges"])
        files["merges.txt"] = f"#version: 0.2\n{lines}".encode()
    if "tokenizer_config.json" in names:
        config = _read(folder / "tokenizer_config.json")
        added = config.get("added_tokens_decoder")
        if isinstance(added, dict):
            config["added_tokens_decoder"] = {
                str(new[int(key)]): value for key, value in added.items() if int(key) in new
            }
        files["tokenizer_config.json"] = _json(config)
    if "added_tokens.json" in names:
        ids = _read(folder / "added_tokens.json")
        files["added_tokens.json"] = _json({name: new[index] for name, index in ids.items() if index in new})
    if "generation_config.json" in names:
        files["generation_config.json"] = _json(renumbered(_read(folder / "generation_config.json"), new))
    return files, frozenset(names & SENTENCEPIECE)


def token_ids(config: Mapping[str, Any]) -> set[int]:
    """The ids of special tokens that a config names: each `..._token_id`, one or several."""
    found: set[int] = set()
    for key, value in config.items():
        if key.endswith(("_token_id", "_token_ids")):
            found |= {one for one in (value if isinstance(value, list) else [value]) if _is_id(one)}
    return found


def renumbered(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A config with the ids that it names under their new numbers; those in lists that are gone are left out."""
    result = dict(config)
    for key, value in config.items():
        if key.endswith(("_token_id", "_token_ids")) or key in ("suppress_tokens", "begin_suppress_tokens"):
            if isinstance(value, list):
                result[key] = [new[one] for one in value if one in new]
            elif _is_id(value):
                result[key] = new.get(value, value)
        elif key == "bad_words_ids" and isinstance(value, list):
            result[key] = [[new[one] for one in word] for word in value if all(one in new for one in word)]
    return result


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])


def _byte_alphabet() -> list[str]:
    """The characters that stand for bytes in GPT-2's tokenizer: printable ones for themselves, others after 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, sorted(printable)), *(chr(256 + place) for place in range(len(others)))]


def _read(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} doesn't hold a JSON object; download or save it again.")
    return found


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
