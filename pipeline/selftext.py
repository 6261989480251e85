"""Calibration text that the model writes itself, from a seed: no data and no network needed.

Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", section 3.1: a random first
token, then sampling from the model's own distribution at temperature 1. (The paper takes the most likely token for the
first few steps; here every step samples, so that windows differ from the start.) Models that can't write (encoders,
encoder-decoders) get tokens drawn evenly from the vocabulary instead, and the source says so.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from modelzip.checkpoints.errors import CalibrationError
from modelzip.checkpoints.streamed import native_bfloat16

from .fresh import FreshProcessError, fresh
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
    count: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    report: Report,
) -> Windows:
    """`count` windows of `seq_len` tokens from the model in `folder`, or even draws if it can't write (`writes`).

    The whole model is needed for this, so it runs in a process of its own. excluded: special tokens, never drawn
    evenly. Raises CalibrationError if the model can't be run.
    """
    if not writes:
        allowed = torch.tensor([token for token in range(vocabulary) if token not in excluded], dtype=torch.int64)
        drawn = torch.randint(len(allowed), (count, seq_len), generator=torch.Generator().manual_seed(seed))
        return Windows(allowed[drawn], "self (even draws)")
    with tempfile.TemporaryDirectory(prefix="modelzip-") as name:
        place = Path(name)
        what = [str(device), str(count), str(seq_len), str(seed)]
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
        return Windows(torch.load(place / "tokens.pt", weights_only=True), "self")


@torch.inference_mode()
def write(model: Any, *, count: int, seq_len: int, seed: int, report: Report) -> Tensor:
    """Sample windows from a causal language model, int64 [count, seq_len]. Exits if its logits are NaN or infinite."""
    generator = torch.Generator(model.device).manual_seed(seed)
    groups = torch.arange(count).tensor_split(-(-count // _most_rows(model, seq_len)))
    written = []
    for number, group in enumerate(groups):
        token = _even(model, len(group), generator)
        tokens, cache = [token], None
        for step in range(1, seq_len):
            out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if cache is None:
                cache = _roomy(out.past_key_values, seq_len)
            token = draw(out.logits[:, -1], generator)
            tokens.append(token)
            report(number * seq_len + step + 1, len(groups) * seq_len)
        written.append(torch.cat(tokens, 1).cpu())
    return torch.cat(written)


def _even(model: Any, rows: int, generator: torch.Generator) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (rows, 1), generator=generator, device=model.device)


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
    cache = model(input_ids=one, use_cache=True).past_key_values
    kept = [t for layer in getattr(cache, "layers", []) for t in (layer.keys, layer.values) if t is not None]
    row = seq_len * sum(int(tensor.nbytes) for tensor in kept)
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


def _main(folder: str, out: str, device: str, count: str, seq_len: str, seed: str) -> None:
    from transformers import AutoModelForCausalLM

    import modelzip.weights  # noqa: F401  # so that a model in our own layout can write too

    dtype = torch.bfloat16 if native_bfloat16(torch.device(device)) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    windows = write(
        model,
        count=int(count),
        seq_len=int(seq_len),
        seed=int(seed),
        report=lambda done, total: print(done, total, flush=True),
    )
    torch.save(windows, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
