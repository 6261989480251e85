"""What a format's consumer makes of an export, in a process of its own.

Run as a module it is that process: `python -m modelzip.exporters.reopen FORMAT PATH INPUTS OUT`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from modelzip.checkpoints.fresh import fresh

from .formats import FORMATS


def reopened(
    format: str, path: Path, inputs: Mapping[str, Tensor], meanwhile: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """The output of the consumer on these inputs, and what `meanwhile` gives. Raises FreshProcessError if it fails."""
    with tempfile.TemporaryDirectory(prefix="modelzip-") as name:
        place = Path(name)
        given, out = place / "inputs.safetensors", place / "output.safetensors"
        save_file({name: tensor.clone() for name, tensor in inputs.items()}, given)  # one tensor may be two inputs
        with fresh(__name__, format, str(path.absolute()), str(given), str(out), place=place):
            wanted = meanwhile()
        return load_file(out)["output"], wanted


def _main(format: str, path: str, inputs: str, out: str) -> None:
    output = FORMATS[format].answer(Path(path), load_file(inputs))
    save_file({"output": output.float().contiguous()}, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
