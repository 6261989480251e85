"""How many modules may have been served by something plainer than what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from modelzip.checkpoints.errors import ModelzipError
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.settings import MethodSettings

from .module_plan import ModulePlan, looks_at_inputs

MOST_FALLBACKS: Final = 0.1
"""Share of modules that may fall back to rounding; more is an error, since that isn't the method asked for."""


def check_fallbacks(targets: Mapping[str, ModulePlan], writer: CheckpointWriter) -> None:
    """Raise ModelzipError if too many of the modules that were written had to fall back."""
    fallen = [
        (name, record["fallback"])
        for part in writer.done.values()
        for name, record in part["modules"].items()
        if record["fallback"]
    ]
    if len(fallen) > MOST_FALLBACKS * len(targets):
        name, reason = fallen[0]
        raise ModelzipError(
            f"{len(fallen)} of {len(targets)} modules couldn't be compressed as asked, the first {name}: {reason}; "
            f"{_mend(targets[name].settings)}."
        )


def _mend(settings: MethodSettings) -> str:
    if not looks_at_inputs(settings):
        return "choose other settings, or leave these modules out with --ignore"
    return "give more calibration data (--samples), or choose a --method that needs none"
