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
from functools import partial
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

    Exits if its logits are NaN or infinite, or if it hands out no cache.
    """
    most = most_rows(model, seq_len)
    groups = [
        (part, len(rows))
        for part, count in enumerate(counts)
        for rows in torch.arange(count).tensor_split(-(-count // most) or 1)
        if len(rows)
    ]
    generators = [chance(seed, part, model.device) for part in range(len(counts))]
    parts = [[torch.empty(0, seq_len, dtype=torch.int64)] for _ in counts]
    steps = seq_len - 1
    for number, (part, rows) in enumerate(groups):
        tell = partial(_tell, report, number * steps, len(groups) * steps)
        first = first_tokens(model, rows, generators[part])
        parts[part].append(continued(model, first, seq_len, generator=generators[part], report=tell))
    return [torch.cat(written) for written in parts]


def _tell(report: Report, before: int, total: int, step: int) -> None:
    report(before + step, total)


def first_tokens(model: Any, rows: int, generator: torch.Generator) -> Tensor:
    """Random tokens to begin with, int64 [rows, 1]."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (rows, 1), generator=generator, device=model.device)


def continued(
    model: Any,
    first: Tensor,
    seq_len: int,
    *,
    generator: torch.Generator,
    report: Callable[[int], None],
    temperature: float = 1.0,
) -> Tensor:
    """Windows written side by side, int64 [rows, seq_len], that go on from `first`, int64 [rows, any].

    report: told how many tokens of a window are there.
    """
    token = first
    tokens, cache = [first], None
    for step in range(first.shape[1], seq_len):
        out = model(input_ids=token, **({} if cache is None else {"past_key_values": cache}))
        if cache is None:
            cache = _roomy(out.past_key_values, seq_len)
        token = draw(out.logits[:, -1], generator, temperature)
        tokens.append(token)
        report(step)
    return torch.cat(tokens, 1).cpu()


def draw(logits: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
    """A token for each row of logits [rows, vocabulary], with the probability that they give it; int64 [rows, 1].

    At temperature 0 the likeliest one. By inversion: one random number a row. torch.multinomial draws one for every
    token of the vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    heights = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    top = heights[:, -1:]
    if not torch.isfinite(top).all():
        sys.exit("its logits are NaN or infinite, so weights are damaged")
    height = torch.rand(len(logits), 1, generator=generator, device=logits.device, dtype=torch.float64)
    return torch.searchsorted(heights, height * top, right=True).clamp_(max=logits.shape[-1] - 1)


def most_rows(model: Any, seq_len: int) -> int:
    """Windows to be written side by side: the more, the faster, as long as their keys and values find room.

    Exits if the model hands out no cache.
    """
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    cache = getattr(model(input_ids=one), "past_key_values", None)
    if cache is None:
        sys.exit("it hands out no cache, so that writing would take hours")
    layers = getattr(cache, "layers", [])
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


def open_writer(folder: str, device: str) -> Any:
    """A causal language model ready to write."""
    from transformers import AutoModelForCausalLM

    import modelzip.weights  # noqa: F401  # so that a model in our own layout can write too

    dtype = torch.bfloat16 if native_bfloat16(torch.device(device)) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    model.config.get_text_config().use_cache = True
    return model


def _main(folder: str, out: str, device: str, seq_len: str, seed: str, *counts: str) -> None:
    model = open_writer(folder, device)
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
