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
from pathlib import Path

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CalibrationError
from modelzip.checkpoints.streamed import native_bfloat16

from .text import Windows

WRITERS = 16
"""Windows written side by side."""


def self_windows(
    folder: Path, *, writes: bool, vocabulary: int, excluded: frozenset[int], count: int, seq_len: int, seed: int
) -> Windows:
    """`count` windows of `seq_len` tokens from the model in `folder`, or even draws if it can't write (`writes`).

    The whole model is needed for this, so it runs in a process of its own. excluded: special tokens, never drawn.
    Raises CalibrationError if the model can't be run.
    """
    if not writes:
        return Windows(_even(vocabulary, excluded, count=count, seq_len=seq_len, seed=seed), "self (even draws)", 0)
    with tempfile.TemporaryDirectory(prefix="modelzip-") as place:
        out = Path(place) / "tokens.pt"
        command = [sys.executable, "-m", "modelzip.pipeline.selftext", str(folder.absolute()), str(out)]
        run = subprocess.run(
            [*command, str(count), str(seq_len), str(seed)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if run.returncode != 0:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise CalibrationError(
                f"The model couldn't write its own calibration text ({last}): give --calibration FILE."
            )
        return Windows(torch.load(out, weights_only=True), "self", 0)


def _even(vocabulary: int, excluded: frozenset[int], *, count: int, seq_len: int, seed: int) -> Tensor:
    allowed = torch.tensor([token for token in range(vocabulary) if token not in excluded], dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    return allowed[torch.randint(len(allowed), (count, seq_len), generator=generator)]


@torch.inference_mode()
def write(folder: Path, *, count: int, seq_len: int, seed: int) -> Tensor:
    """Sample `count` windows from the causal language model in `folder`, int64 [count, seq_len]."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    written = []
    for start in range(0, count, WRITERS):
        rows = min(WRITERS, count - start)
        token = torch.randint(model.config.get_text_config().vocab_size, (rows, 1), generator=generator, device=device)
        tokens, cache = [token], None
        for _ in range(seq_len - 1):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            probabilities = out.logits[:, -1].float().softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)
            tokens.append(token)
        written.append(torch.cat(tokens, 1).cpu())
    return torch.cat(written)


if __name__ == "__main__":
    torch.save(
        write(Path(sys.argv[1]), count=int(sys.argv[3]), seq_len=int(sys.argv[4]), seed=int(sys.argv[5])), sys.argv[2]
    )
