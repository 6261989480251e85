"""Tokens for calibration and evaluation, and how they are handed to a model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CalibrationError, CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.checkpoints.tokenizer_files import SENTENCEPIECE
from modelzip.recipes.schema import Calibration, Evaluation
from modelzip.weights.exits import ExitsForSequenceClassification

from .called import CALIBRATION, Called
from .progress import Progress
from .selftext import self_windows
from .text import Windows, read_windows

Section = TypeVar("Section", Calibration, Evaluation)

SELF_HELD_BACK = 8
"""Windows that a model writes for its own evaluation, at most: they take minutes."""


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there are files of a tokenizer: without any, transformers makes up an empty one for some model types."""
    names = {path.name for path in checkpoint.side_files}
    return bool(names & {"tokenizer.json", "vocab.txt", "vocab.json", *SENTENCEPIECE})


def tokenizer_of(checkpoint: Checkpoint, *, instead: str = "") -> Any:
    """The checkpoint's tokenizer. Raises CheckpointError if it has none that transformers can open.

    instead: what else its reader can do, as the end of a sentence.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        told = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{checkpoint.source} has no tokenizer that transformers can open ({told}): add the tokenizer files"
            f"{instead}."
        ) from None


def forward_inputs(model: Any) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """A function from token windows [batch, seq_len] to the arguments of the model's forward."""
    parameters = inspect.signature(model.forward).parameters
    if getattr(model.config, "is_encoder_decoder", False):
        return lambda windows: {"input_ids": windows, "decoder_input_ids": windows}
    if "input_ids" not in parameters:
        raise CheckpointError(
            f"{type(model).__name__} doesn't take token ids, which is all that modelzip calibrates with."
        )
    return lambda windows: {"input_ids": windows}


def is_causal(model: Any) -> bool:
    """Whether the logits at each position predict the next token."""
    name = type(model).__name__
    return (name.endswith("ForCausalLM") or name.endswith("LMHeadModel")) and not model.config.is_encoder_decoder


def is_masked(model: Any) -> bool:
    """Whether the logits at each position say which token is hidden there."""
    return type(model).__name__.endswith("ForMaskedLM")


def calibration_windows(
    calibration: Calibration,
    checkpoint: Checkpoint,
    model: Any,
    *,
    seed: int,
    needed: bool,
    held_back: int,
    device: torch.device,
    progress: Progress,
) -> tuple[Windows | None, Windows | None]:
    """The windows to calibrate on if they are `needed`, and up to `held_back` others of the same source.

    Each None if there are none; neither depends on whether the other is wanted. device: where the model writes, if it
    is its own source.
    """
    if calibration.seq_len > (limit := longest(model)):
        raise CalibrationError(f"--seq-len is {calibration.seq_len}, but the model takes at most {limit} tokens.")
    samples, seq_len = calibration.samples, calibration.seq_len
    if calibration.source == "self":
        held_back = min(held_back, SELF_HELD_BACK)
        used, held = self_windows(
            checkpoint.folder,
            writes=is_causal(model),
            vocabulary=model.config.get_text_config().vocab_size,
            excluded=_special(model.config),
            counts=(samples if needed else 0, held_back),
            seq_len=seq_len,
            seed=seed,
            device=device,
            report=lambda done, total: progress.step("write text", done, total, "the model's own"),
        )
        return used if needed else None, Windows(held.tokens, f"{held.source}, held back") if held_back else None
    every = read_windows(
        calibration.source,
        tokenizer_of(checkpoint, instead=CALIBRATION.instead),
        field=calibration.field,
        split=calibration.split,
        count=samples + held_back,
        seq_len=seq_len,
        least=samples,
    )
    used, kept = every.split(samples, rest=f"{calibration.source}, held back from calibration")
    return used if needed else None, kept


def shortened(section: Section, limit: int | None) -> Section:
    """A recipe's section with windows of no more tokens than `limit`, where nobody said how long they are to be."""
    if limit is None or "seq_len" in section.model_fields_set or section.seq_len <= limit:
        return section
    return section.model_copy(update={"seq_len": limit})


def window_limit(checkpoint: Checkpoint) -> int | None:
    """Most tokens that the model takes; None if it can't be told, which a plan says with all other mistakes."""
    try:
        return longest(skeleton(checkpoint))
    except CheckpointError:
        return None


def evaluation_windows(evaluation: Evaluation, checkpoint: Checkpoint, model: Any, *, called: Called) -> Windows:
    """The windows of `evaluation.data`. Raises CalibrationError if it holds fewer than one."""
    assert evaluation.data is not None
    if evaluation.seq_len > (limit := longest(model)):
        raise CalibrationError(
            f"The evaluation's seq_len is {evaluation.seq_len}; the model takes at most {limit} tokens."
        )
    return read_windows(
        evaluation.data,
        tokenizer_of(checkpoint),
        field=evaluation.field,
        split=evaluation.split,
        count=evaluation.windows,
        seq_len=evaluation.seq_len,
        least=1,
        called=called,
    )


def longest(model: Any) -> int:
    """Most tokens that the model's positions allow."""
    if isinstance(model, ExitsForSequenceClassification):
        return longest(model.base)
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return 1 << 30
    padding = getattr(config, "pad_token_id", None)
    offset = type(model).__module__.rpartition(".")[2] in {
        "modeling_roberta",
        "modeling_xlm_roberta",
        "modeling_camembert",
    }
    return limit - (padding or 0) - 1 if offset else limit


def _special(config: Any) -> frozenset[int]:
    ids = (
        getattr(config.get_text_config(), f"{name}_token_id", None) for name in ("bos", "eos", "pad", "decoder_start")
    )
    return frozenset(token for token in ids if isinstance(token, int))


def batches(windows: Tensor, size: int, inputs: Callable[[Tensor], Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """The forward's arguments for each batch of `size` windows."""
    return [inputs(part.to(torch.int64)) for part in torch.split(windows, size)]
