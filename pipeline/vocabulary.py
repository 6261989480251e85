"""Tokens that a corpus doesn't use, taken out of the embedding, the output head and the tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from modelzip.checkpoints.errors import CalibrationError, CheckpointError, ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.rewrite import Cut, Rewrite, expected, opens, with_number
from modelzip.checkpoints.skeleton import skeleton
from modelzip.checkpoints.tokenizer_files import (
    always_kept,
    renumbered,
    token_ids,
    tokenizer_files,
    vocabulary_of,
    with_derivations,
)
from modelzip.compressors.prune.structural import tokens_to_keep
from modelzip.compressors.prune.structural_settings import Vocabulary
from modelzip.recipes.schema import Recipe

from .calibrate import has_tokenizer, tokenizer_of
from .called import CORPUS
from .smaller import StructuralMethod, headers_of
from .text import check_source, documents

LONGEST: Final = 1 << 20
"""Characters of one text that are tokenized in one go."""
AT_ONCE: Final = 64
"""Texts that are tokenized side by side."""


def plan_tokens(settings: Vocabulary, checkpoint: Checkpoint) -> list[int]:
    """The ids that stay, ascending. Reads the whole corpus. Raises ProblemsError, CheckpointError, CalibrationError."""
    check_source(settings.corpus, field=settings.corpus_field, called=CORPUS)
    tokenizer = _tokenizer(checkpoint)
    data = json.loads(tokenizer.to_str())
    model = headers_of(checkpoint).model
    rows = model.config.get_text_config().vocab_size
    vocabulary = vocabulary_of(data)
    over = [name for name, index in vocabulary.items() if index >= rows]
    if over:
        raise CheckpointError(f"its tokenizer has the token {over[0]!r}, for which the model has no row")
    corpus = Path(settings.corpus)
    if not any(text.strip() for text in texts(corpus, settings.corpus_field)):
        raise CalibrationError(f"{corpus} holds no text: give a corpus of what the model will read.")
    counts, characters = count_tokens(tokenizer, texts(corpus, settings.corpus_field))
    named = {index for index in token_ids({**model.config.to_dict(), **checkpoint.config}) if index < rows}
    always = always_kept(data, characters) | named
    kept = tokens_to_keep(counts, always, min_count=settings.min_count, most=settings.max_tokens)
    every = sorted(with_derivations(data, kept))
    if len(every) >= rows:
        fixed = len(with_derivations(data, always))
        used = f", and {corpus} uses the others: raise min_count or lower max_tokens" if fixed < rows else ""
        raise ProblemsError([f"none of the {rows} tokens can go: {fixed} are special or spell any text{used}"])
    return every


def texts(corpus: Path, field: str) -> Iterator[str]:
    """The documents of a corpus, long ones cut at a line's end, so that none takes much memory."""
    for document in documents(corpus, field, called=CORPUS):
        start = 0
        while len(document) - start > LONGEST:
            end = document.rfind("\n", start, start + LONGEST)
            end = end if end > start else start + LONGEST
            yield document[start:end]
            start = end
        yield document[start:]


def count_tokens(tokenizer: Tokenizer, corpus: Iterator[str]) -> tuple[Counter[int], set[str]]:
    """How often each id stands in the corpus, and the characters in it as they are after normalizing."""
    counts: Counter[int] = Counter()
    characters: set[str] = set()
    while some := list(islice(corpus, AT_ONCE)):
        for text in some:
            characters.update(tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text)
        for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts, characters


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if not has_tokenizer(checkpoint):
        raise CheckpointError("it has no tokenizer beside it, of which tokens could be taken out")
    backend = getattr(tokenizer_of(checkpoint), "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError("its tokenizer isn't one of the tokenizers library, of which tokens can be taken out")
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def build_tokens(settings: Vocabulary, checkpoint: Checkpoint, kept: Sequence[int]) -> Rewrite:
    """The kept rows of whatever has one a token, and the files of the tokenizer. Raises CheckpointError."""
    headers = headers_of(checkpoint)
    model, names = headers.model, headers.names
    if model.config.get_text_config() is not model.config:
        raise CheckpointError(f"{type(model).__name__} has its vocabulary in a place that modelzip doesn't know")
    new = {old: number for number, old in enumerate(kept)}
    rows = model.config.vocab_size
    # Ids that the file leaves to the class's defaults have to be said now: the defaults are the old numbers.
    known = model.config.to_dict()
    said = {key: value for key, value in known.items() if key not in checkpoint.config and token_ids({key: value})}
    said = {key: value for key, value in said.items() if token_ids({key: value}) <= new.keys()}
    aliases = model.config.attribute_map
    config = with_number(
        renumbered({**checkpoint.config, **said}, new), aliases, aliases.get("vocab_size", "vocab_size"), len(kept)
    )
    index = torch.tensor(kept)
    cuts = {}
    smaller = skeleton(Checkpoint(checkpoint.folder, config, checkpoint.tensors, checkpoint.source)).state_dict()
    for name, before in model.state_dict().items():
        changed = [dim for dim in range(before.ndim) if before.shape[dim] != smaller[name].shape[dim]]
        if not changed or names.owner(name) != name:
            continue
        source = names.source(name)
        if source is None:
            raise CheckpointError(f"{name} is compressed or fused: take tokens out before it is")
        if any(before.shape[dim] != rows for dim in changed):
            raise CheckpointError(f"{name} has another size than the vocabulary, and depends on it")
        cuts[source] = Cut(source, dict.fromkeys(changed, index))
    if not cuts:
        raise CheckpointError(f"nothing in {type(model).__name__} has the size of the vocabulary")
    data = json.loads(_tokenizer(checkpoint).to_str())
    files, left_out = tokenizer_files(checkpoint.folder, checkpoint.side_files, data, new)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    rewrite = Rewrite(
        config=config,
        parts={"vocabulary": cuts},
        files=files,
        left_out=left_out,
        records={embedding: {"method": "vocabulary", "of": rows, "left": len(kept), "note": ""}},
    )
    if problem := opens(expected(rewrite, checkpoint)):
        raise CheckpointError(problem)
    return rewrite


def _memory(settings: Vocabulary, checkpoint: Checkpoint, recipe: Recipe) -> int:
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    return 3 * largest + AT_ONCE * 64 * LONGEST


def _notes(settings: Vocabulary, rewrite: Rewrite) -> tuple[str, ...]:
    (record,) = rewrite.records.values()
    gone = record["of"] - record["left"]
    notes = [f"{gone:,} of {record['of']:,} tokens go, which {settings.corpus} uses too seldom"]
    notes += [f"{name} is left out: tokenizer.json stands for it" for name in sorted(rewrite.left_out)]
    return tuple(notes)


VOCABULARY: Final = StructuralMethod(plan_tokens, build_tokens, None, _memory, _notes)
