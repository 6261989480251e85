"""Calibration text that the model writes itself, from a seed: no data and no network needed.

Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", section 3.1: a random first
token, then sampling from the model's own distribution at temperature 1. (The paper takes the most likely token for the
first few steps; here every step samples, so that windows differ from the start.) Models that can't write (encoders,
encoder-decoders) get tokens drawn evenly from the vocabulary instead, and the source says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CalibrationError
from modelzip.checkpoints.streamed import native_bfloat16

from .text import Windows

WRITERS = 16
"""Windows written side by side."""


def self_windows(
    folder: Path,
    *,
    writes: bool,
    vocabulary: int,
    excluded: frozenset[int],
    counts: Sequence[int],
    seq_len: int,
    seed: int,
    device: torch.device,
) -> Windows:
    """Windows of `seq_len` tokens from the model in `folder`, or even draws if it can't write (`writes`).

    counts: windows to write, part by part; a part doesn't depend on those behind it. The whole model is needed for
    this, so it runs in a process of its own. excluded: special tokens, never drawn evenly.
    Raises CalibrationError if the model can't be run.
    """
    if not writes:
        drawn = _even(vocabulary, excluded, counts=counts, seq_len=seq_len, seed=seed)
        return Windows(drawn, "self (even draws)")
    with tempfile.TemporaryDirectory(prefix="modelzip-") as place:
        out = Path(place) / "tokens.pt"
        command = [sys.executable, "-m", "modelzip.pipeline.selftext", str(folder.absolute()), str(out)]
        run = subprocess.run(
            [*command, str(device), str(seq_len), str(seed), *map(str, counts)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if run.returncode != 0:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise CalibrationError(
                f"The model couldn't write its own calibration text ({last}): check the model, or give "
                "--calibration FILE."
            )
        return Windows(torch.load(out, weights_only=True), "self")


def _even(vocabulary: int, excluded: frozenset[int], *, counts: Sequence[int], seq_len: int, seed: int) -> Tensor:
    allowed = torch.tensor([token for token in range(vocabulary) if token not in excluded], dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(allowed), (count, seq_len), generator=generator) for count in counts]
    return allowed[torch.cat(drawn)]


@torch.inference_mode()
def write(folder: Path, *, counts: Sequence[int], seq_len: int, seed: int, device: torch.device) -> Tensor:
    """Sample windows from the causal language model in `folder`, int64 [sum(counts), seq_len]."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    generator = torch.Generator(device).manual_seed(seed)
    written = []
    for rows in (min(WRITERS, count - start) for count in counts for start in range(0, count, WRITERS)):
        token = torch.randint(model.config.get_text_config().vocab_size, (rows, 1), generator=generator, device=device)
        tokens, cache = [token], None
        for _ in range(seq_len - 1):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if not torch.isfinite(logits).all():
                sys.exit("its logits are NaN or infinite, so weights are damaged")
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens.append(token)
        written.append(torch.cat(tokens, 1).cpu())
    return torch.cat(written)


def _main(folder: str, out: str, device: str, seq_len: str, seed: str, *counts: str) -> None:
    import modelzip.weights  # noqa: F401  # so that a model in our own layout can write too

    windows = write(
        Path(folder),
        counts=[int(count) for count in counts],
        seq_len=int(seq_len),
        seed=int(seed),
        device=torch.device(device),
    )
    torch.save(windows, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
