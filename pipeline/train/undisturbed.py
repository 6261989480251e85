"""A training leaves the process as it found it, whatever transformers' Trainer sets for all."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@contextmanager
def undisturbed() -> Iterator[None]:
    """transformers and accelerate say nothing but errors; the global generators are left as they were.

    The Trainer seeds those of Python and NumPy, too. DeepSpeed's settings are forgotten: by ZeRO 3's, transformers
    would go on to make models that are spread over the processes.
    """
    loggers = [logging.getLogger(name) for name in ("accelerate", "transformers")]
    levels = [one.level for one in loggers]
    verbosity = transformers.utils.logging.get_verbosity()
    drawn, numbers = random.getstate(), np.random.get_state()
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        random.setstate(drawn)
        np.random.set_state(numbers)
        transformers.utils.logging.set_verbosity(verbosity)
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
