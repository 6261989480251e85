"""Text that a teacher writes for its student: from nothing, or from the beginnings of real texts.

Kim & Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2: a student that learns from the teacher's own
sentences learns from its distribution over whole sequences. They take the most likely one that a beam search finds for
each source sentence; a language model has none, so that here texts are sampled, at any temperature (0: greedily).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CalibrationError
from modelzip.checkpoints.fresh import FreshProcessError, fresh

from .selftext import Report, chance, continued, first_tokens, most_rows, open_writer


def teacher_texts(
    folder: Path,
    prompts: Tensor | None,
    *,
    count: int,
    length: int,
    temperature: float,
    seed: int,
    device: torch.device,
    report: Report,
) -> Tensor:
    """Texts int64 [count, length] by the causal language model in `folder`, which runs in a process of its own.

    prompts: int64 [any, tokens], what texts go on from, in turns; None: each starts with a random token.
    Raises CalibrationError if the model can't be run.
    """
    with tempfile.TemporaryDirectory(prefix="modelzip-") as name:
        place = Path(name)
        torch.save(prompts, place / "prompts.pt")
        what = [str(device), str(count), str(length), str(temperature), str(seed)]
        try:
            with fresh(__name__, str(folder.absolute()), "prompts.pt", "texts.pt", *what, place=place) as lines:
                for line in lines:
                    done, total = map(int, line.split())
                    report(done, total)
        except FreshProcessError as error:
            raise CalibrationError(
                f"The teacher couldn't write text ({error}): check {folder}, or name another teacher."
            ) from None
        texts: Tensor = torch.load(place / "texts.pt", weights_only=True)
    return texts


def _main(
    folder: str, prompts: str, out: str, device: str, count: str, length: str, temperature: str, seed: str
) -> None:
    model = open_writer(folder, device)
    given: Tensor | None = torch.load(prompts, weights_only=True)
    generator = chance(int(seed), 0, model.device)
    groups = torch.arange(int(count)).tensor_split(-(-int(count) // most_rows(model, int(length))))
    steps = int(length)
    texts = []
    for number, rows in enumerate(groups):
        first = first_tokens(model, len(rows), generator) if given is None else given[rows % len(given)]

        def tell(step: int, before: int = number * steps) -> None:
            print(before + step, len(groups) * steps, flush=True)

        begun = first.to(model.device)
        heat = float(temperature)
        texts.append(continued(model, begun, int(length), generator=generator, report=tell, temperature=heat))
    torch.save(torch.cat(texts), out)


if __name__ == "__main__":
    with torch.inference_mode():
        _main(*sys.argv[1:])
