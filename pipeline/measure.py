"""Models opened for measuring: their streamed form, the check in a fresh process, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from modelzip.checkpoints.blocks import is_own
from modelzip.checkpoints.errors import MachineError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import decode_of, products_of, rounds_of
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.evaluation.agreement import measure
from modelzip.evaluation.masked import Hidden, hide, pseudo_perplexity
from modelzip.evaluation.outputs import answer, main_output
from modelzip.weights.layouts import MODELZIP, rounds_inputs

from .bench import Bench
from .calibrate import forward_inputs, has_tokenizer, is_causal, is_masked, longest, tokenizer_of
from .data_kind import Counted
from .opened import WholeModel
from .text import Windows
from .verify import verify

PROBE_TOKENS = 64


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU. Raises MachineError for a device that isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    module = getattr(torch, device.type)
    if not module.is_available() or (device.index or 0) >= module.device_count():
        raise MachineError(f"The device {name} isn't there: choose --device cpu, or leave --device out.")
    return device


def pick_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The type of activations in calibration: the checkpoint's; fp32 for fp16 on CPU, where much of it is missing."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    stored = checkpoint.dtype
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def open_streamed(checkpoint: Checkpoint, dtype: str, device: torch.device) -> StreamedModel:
    """The checkpoint as a streamed model, compressed linears made dense as they are loaded."""
    return streamed_model(checkpoint, pick_dtype(dtype, checkpoint, device), device)


def streamed_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> StreamedModel:
    """The same, activations in this very type. Raises CheckpointError for a model without blocks."""
    return StreamedModel(
        checkpoint,
        dtype=dtype,
        device=device,
        decode=decode_of(checkpoint),
        rounds=rounds_of(checkpoint, device),
        products=products_of(checkpoint, device),
    )


def running_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> StreamedModel | WholeModel:
    """The checkpoint as a streamed model; whole in memory where it is of a kind of our own, which has no blocks."""
    if is_own(checkpoint):
        return WholeModel(checkpoint, dtype=dtype, device=device)
    return streamed_model(checkpoint, dtype, device)


def open_running(checkpoint: Checkpoint, dtype: str, device: torch.device) -> StreamedModel | WholeModel:
    """The same, in the type that `open_streamed` takes."""
    return running_model(checkpoint, pick_dtype(dtype, checkpoint, device), device)


def reopen(result: Checkpoint, *, seed: int, device: torch.device) -> tuple[dict[str, Any] | None, list[str]]:
    """Compare the output, streamed by modelzip, with what transformers opens in a fresh process.

    Returns the report's `verification`, or None and the reason. Raises OutputError if they differ.
    """
    if (dense := dense_bytes(result)) * 1.5 > psutil.virtual_memory().available:
        return None, [f"the output wasn't reopened in a fresh process: that takes {dense / 1e9:,.1f} GB dense in fp32"]
    inputs, expect = probe(result, seed=seed, device=device)
    own = is_own(result) or (result.quantization or {}).get("quant_method") == MODELZIP
    rounds = own and rounds_inputs(result.quantization or {})
    return verify(result.folder, inputs, expect, own_layout=own, rounds=rounds), []


def probe(checkpoint: Checkpoint, *, seed: int, device: torch.device) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """A window of tokens drawn by chance as the model's arguments, and what gives its output on them in fp32."""
    model = running_model(checkpoint, torch.float32, device)
    length = min(PROBE_TOKENS, longest(model.model))
    vocabulary = model.model.config.get_text_config().vocab_size
    window = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
    inputs = dict(forward_inputs(model.model)(window))

    def expect() -> Tensor:
        with torch.no_grad():
            if isinstance(model, StreamedModel):
                return main_output(next(model.outputs([inputs])))
            return answer(model.model, {name: tensor.to(device) for name, tensor in inputs.items()})

    return inputs, expect


def dense_bytes(checkpoint: Checkpoint) -> int:
    """About what a model takes with all its weights dense, in fp32."""
    return 4 * sum(_elements(checkpoint).values())


def _elements(checkpoint: Checkpoint) -> dict[str, int]:
    """Elements of each tensor once it is dense."""
    bits = {"F32": 32, "F16": 16, "BF16": 16, "I32": 4}
    return {name: 8 * info.nbytes // bits.get(info.dtype, 8) for name, info in checkpoint.tensors.items()}


def evaluation_section(
    compressed: Checkpoint,
    original: Checkpoint | None,
    windows: Windows,
    bench: Bench,
    *,
    masked: int,
) -> dict[str, Any]:
    """The report's `evaluation`: figures and the protocol under which they were taken.

    masked: tokens that a masked language model is asked for.
    """
    model = running_model(compressed, bench.exact, bench.device)
    other = None if original is None else running_model(original, bench.exact, bench.device)
    causal = is_causal(model.model)
    figures = measure(
        model,
        other,
        windows.tokens,
        inputs=forward_inputs(model.model),
        causal=causal,
        report=lambda done, total: bench.progress.step("evaluate", done, total),
    )
    count, seq_len = windows.tokens.shape
    tokens = figures.pop("tokens")
    models = (model,) if other is None else (model, other)
    hidden = hidden_tokens(compressed, model.model, windows, count=masked)
    if hidden is not None:
        counted = Counted(bench.progress, len(models) * len(hidden.texts))
        asked = partial(pseudo_perplexity, hidden=hidden, inputs=forward_inputs(model.model), report=counted)
        found = [asked(one) for one in models]
        figures["pseudo_perplexity"] = {"original": None if other is None else found[1], "compressed": found[0]}
    return {
        "protocol": {
            "source": windows.source,
            "sha256": windows.sha256,
            "windows": count,
            "seq_len": seq_len,
            "stride": seq_len,
            "bos": False,
            "dtype": str(bench.exact).removeprefix("torch."),
            "tokens": tokens,
            "masked": None if hidden is None else len(hidden.texts),
        },
        **figures,
    }


def hidden_tokens(checkpoint: Checkpoint, model: Any, windows: Windows, *, count: int) -> Hidden | None:
    """Tokens to be guessed by a masked language model, in texts with its special tokens around; None for other models,
    and where the tokenizer has no mask."""
    if not count or not is_masked(model) or not has_tokenizer(checkpoint):
        return None
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer.mask_token_id is None:
        return None
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    around = None if None in ends else ends
    room = longest(model) - (0 if around is None else 2)
    return hide(windows.tokens[:, :room], count=count, mask=tokenizer.mask_token_id, around=around)
