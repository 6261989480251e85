"""Calibration text that the model writes itself, from a seed: no data and no network needed.

Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", section 3.1: a random first
token, then sampling from the model's own distribution at temperature 1. (The paper takes the most likely token for the
first few steps; here every step samples, so that windows differ from the start.) Models that can't write (encoders,
encoder-decoders) get tokens drawn evenly from the vocabulary instead, and the source says so.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from modelzip.checkpoints.errors import CalibrationError
from modelzip.checkpoints.fresh import FreshProcessError, fresh
from modelzip.checkpoints.streamed import native_bfloat16

from .text import Windows

CACHE_BYTES = 2 << 30
"""What the keys and values of the windows written side by side may take, or as much as the weights if that is more."""

Report = Callable[[int, int], None]
"""Called with the steps done and all steps."""


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
    report: Report,
) -> list[Windows]:
    """Parts of `counts` windows of `seq_len` tokens from the model in `folder`, or even draws if it doesn't write.

    A part doesn't depend on the sizes of the others. The whole model is needed for this, so it runs in a process of its
    own. excluded: special tokens, never drawn evenly. Raises CalibrationError if the model can't be run.
    """
    if not writes:
        allowed = torch.tensor([token for token in range(vocabulary) if token not in excluded], dtype=torch.int64)
        drawn = (
            torch.randint(len(allowed), (count, seq_len), generator=chance(seed, part))
            for part, count in enumerate(counts)
        )
        return [Windows(allowed[part], "self (even draws)") for part in drawn]
    with tempfile.TemporaryDirectory(prefix="modelzip-") as name:
        place = Path(name)
        what = [str(device), str(seq_len), str(seed), *map(str, counts)]
        try:
            with fresh(__name__, str(folder.absolute()), "tokens.pt", *what, place=place) as lines:
                for line in lines:
                    done, total = map(int, line.split())
                    report(done, total)
        except FreshProcessError as error:
            raise CalibrationError(
                f"The model couldn't write its own calibration text ({error}): check the model, or give "
                "--calibration FILE."
            ) from None
        return [Windows(part, "self") for part in torch.load(place / "tokens.pt", weights_only=True)]


def chance(seed: int, part: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A part's own source of random numbers. (Of a CPU generator's seed only 32 bits count, hence the hash.)"""
    digest = hashlib.sha256(f"{seed} {part}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


@torch.inference_mode()
def write(model: Any, *, counts: Sequence[int], seq_len: int, seed: int, report: Report) -> list[Tensor]:
    """Sample parts of `counts` windows from a causal language model, each int64 [count, seq_len].

    Exits if its logits are NaN or infinite.
    """
    most = _most_rows(model, seq_len)
    sizes = [[min(most, count - begin) for begin in range(0, count, most)] for count in counts]
    total, done = sum(map(len, sizes)) * (seq_len - 1), 0
    vocabulary = model.config.get_text_config().vocab_size
    parts = []
    for part, groups in enumerate(sizes):
        generator = chance(seed, part, model.device)
        written = [torch.empty(0, seq_len, dtype=torch.int64)]
        for rows in groups:
            tokens = torch.randint(vocabulary, (rows, 1), generator=generator, device=model.device)
            cache = None
            for _ in range(1, seq_len):
                logits, cache = _next(model, tokens, cache, seq_len)
                tokens = torch.cat([tokens, draw(logits, generator)], 1)
                done += 1
                report(done, total)
            written.append(tokens.cpu())
        parts.append(torch.cat(written))
    return parts


def _next(model: Any, tokens: Tensor, cache: Any, seq_len: int) -> tuple[Tensor, Any]:
    """The logits behind tokens [rows, tokens], and the cache: None if the model gives none that it would take back."""
    if cache is None:
        out = model(input_ids=tokens)
        cache = getattr(out, "past_key_values", None)
        return out.logits[:, -1], None if cache is None else _roomy(cache, seq_len)
    return model(input_ids=tokens[:, -1:], past_key_values=cache).logits[:, -1], cache


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of logits [rows, vocabulary], with the probability that they give it; int64 [rows, 1].

    By inversion: one random number a row. torch.multinomial draws one for every token of the vocabulary.
    """
    heights = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    top = heights[:, -1:]
    if not torch.isfinite(top).all():
        sys.exit("its logits are NaN or infinite, so weights are damaged")
    chance = torch.rand(len(logits), 1, generator=generator, device=logits.device, dtype=torch.float64)
    return torch.searchsorted(heights, chance * top, right=True).clamp_(max=logits.shape[-1] - 1)


def _most_rows(model: Any, seq_len: int) -> int:
    """Windows to be written side by side: the more, the faster, as long as their keys and values find room."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    layers = getattr(getattr(model(input_ids=one), "past_key_values", None), "layers", [])
    kept = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    row = seq_len * sum(int(tensor.nbytes) for tensor in kept if tensor is not None)
    weights = sum(int(parameter.nbytes) for parameter in model.parameters())
    return max(1, max(CACHE_BYTES, weights) // max(row, 1))


class _RoomyLayer(DynamicLayer):
    """Keys and values in tensors that have room for all tokens to come; the base class copies them for each token."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._room = [t.new_empty(*t.shape[:2], length, t.shape[3]) for t in (keys, values)]
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the states [rows, heads, tokens, width] and return all."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values


def _roomy(cache: Any, length: int) -> Any:
    """The cache after the first token, with room in its plain layers; other kinds (sliding windows) stay."""
    for number, layer in enumerate(getattr(cache, "layers", [])):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[number] = _RoomyLayer(layer.keys, layer.values, length)
    return cache


def _main(folder: str, out: str, device: str, seq_len: str, seed: str, *counts: str) -> None:
    from transformers import AutoModelForCausalLM

    import modelzip.weights  # noqa: F401  # so that a model in our own layout can write too

    dtype = torch.bfloat16 if native_bfloat16(torch.device(device)) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    model.config.get_text_config().use_cache = True
    windows = write(
        model,
        counts=[int(count) for count in counts],
        seq_len=int(seq_len),
        seed=int(seed),
        report=lambda done, total: print(done, total, flush=True),
    )
    torch.save(windows, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
