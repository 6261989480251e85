"""Whether processes that `accelerate launch` has started share out a model's weights, and who can't train then."""

from __future__ import annotations

import importlib.util
from typing import Final

from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env

from modelzip.compressors.distill.settings import DistillSettings
from modelzip.compressors.prune.settings_training import PruneTrainingSettings

from .fit import Problems

FSDP: Final = "FSDP"
ZERO_3: Final = "DeepSpeed's ZeRO 3"


def check_spread(settings: DistillSettings, problems: Problems) -> None:
    """What accelerate was told must suit the method, and leave a way to gather the weights at the end."""
    spread = FSDP if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        if importlib.util.find_spec("deepspeed") is None:
            problems.add("accelerate was told to use DeepSpeed, which isn't installed: install the package deepspeed.")
            return
        try:
            plugin = DeepSpeedPlugin()
        except ValueError as error:
            problems.add(f"accelerate can't use what it was told of DeepSpeed: {' '.join(str(error).split())}")
            return
        spread = ZERO_3 if plugin.zero_stage == 3 else spread
        if spread == ZERO_3 and not plugin.zero3_save_16bit_model:
            problems.add(
                f"{ZERO_3} was told not to gather the weights at the end: give --zero3_save_16bit_model true to "
                "accelerate launch, or stage3_gather_16bit_weights_on_model_save in DeepSpeed's own file."
            )
    if spread is not None and isinstance(settings, PruneTrainingSettings):
        problems.add(
            f"{settings.method} compares the weights of whole matrices, which {spread} spreads over the processes: "
            "launch without it."
        )
