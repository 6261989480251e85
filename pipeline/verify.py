"""The proof that the output opens: plain transformers loads it in a fresh process, without the source in sight.

The parent streams the same tokens through the output with modelzip's own reader; the logits must agree. Run as a module
it is the fresh process: `python -m modelzip.pipeline.verify FOLDER TOKENS OUT`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelzip.checkpoints.errors import OutputError
from modelzip.checkpoints.fresh import FreshProcessError, fresh
from modelzip.exporters.plain import answer_by_transformers

TOLERANCE = 1e-3
"""Largest allowed difference of a logit, relative to the largest logit; both sides compute in fp32."""

ROUNDED_TOLERANCE = 0.005
"""The same where inputs are rounded as they come, of the norms of all logits. Both sides compute alike, and differ by
nothing where products sum in the same order (measured: 0 on MiniLM by rtn, llm-int8 and quik); elsewhere a difference
of the last digit moves some inputs to the next number, and layer after layer more. A reader that rounds no inputs
is off by 0.0067 at least (measured on a pico model)."""


def verify(
    folder: Path, inputs: dict[str, Tensor], expect: Callable[[], Tensor], *, own_layout: bool, rounds: bool = False
) -> dict[str, Any]:
    """Reopen `folder` in a fresh process on `inputs` and compare its output with what `expect` gives meanwhile.

    own_layout: whether the process must import modelzip.weights first. rounds: whether inputs of linears are rounded as
    they come, so that differences of the last digit may grow. Returns max_logit_difference and tokens.
    Raises OutputError if the folder doesn't open, or opens as another model.
    """
    with tempfile.TemporaryDirectory(prefix="modelzip-") as name:
        place = Path(name)
        tokens, out = place / "inputs.safetensors", place / "output.safetensors"
        save_file({name: tensor.clone() for name, tensor in inputs.items()}, tokens)  # one tensor may be two inputs
        kind = "own" if own_layout else "plain"
        try:
            with fresh(__name__, str(folder.absolute()), str(tokens), str(out), kind, place=place):
                expected = on_half_the_cores(expect)
        except FreshProcessError as error:
            raise OutputError(f"{folder} was written, but transformers can't open it: {error}") from None
        found = load_file(out)["output"]
    expected = expected.float().cpu()
    difference = float((found.float() - expected).abs().max())
    largest = float(expected.abs().max())
    share = float((found.float() - expected).norm() / expected.norm().clamp(min=1e-30))
    is_alike = share <= ROUNDED_TOLERANCE if rounds else difference <= TOLERANCE * max(largest, 1.0)
    if not is_alike:
        raise OutputError(
            f"{folder} was written, but reopened it is another model: its output differs by {difference:.3g} "
            f"(largest value {largest:.3g})."
        )
    return {"max_logit_difference": difference, "tokens": int(next(iter(inputs.values())).numel())}


def on_half_the_cores(action: Callable[[], Tensor]) -> Tensor:
    """Two processes whose threads wait for one another on the same cores take more than twice as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        return action()
    finally:
        torch.set_num_threads(threads)


def _main(folder: str, inputs: str, out: str, kind: str) -> None:
    if kind == "own":
        import modelzip.weights  # noqa: F401
    save_file({"output": answer_by_transformers(Path(folder), load_file(inputs))}, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
