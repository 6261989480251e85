"""Where models are measured, and who is told how far that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .progress import Progress


@dataclass(frozen=True)
class Bench:
    """dtype: of activations, by its name in torch; auto where each measurement takes the one that suits it."""

    dtype: str
    device: torch.device
    progress: Progress

    @property
    def exact(self) -> torch.dtype:
        """The type in which figures of quality are taken: fp32 unless another one is named."""
        number = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        assert isinstance(number, torch.dtype)
        return number
