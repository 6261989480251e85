"""Which linears transformers leaves dense in a quantized model, by its own rules."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module


def converted(model: PreTrainedModel, listed: list[str], *, defaults: bool) -> Callable[[str], bool]:
    """Whether a linear, by its path, isn't left dense if config.json lists these as such.

    defaults: whether output heads and what is tied are left dense too, as awq has it and bitsandbytes doesn't. Linears
    that the model's class keeps in fp32 always are.
    """
    kept = list(model._keep_in_fp32_modules or ())
    patterns = HfQuantizer.get_modules_to_not_convert(model, listed, kept, defaults)
    return lambda name: bool(should_convert_module(name, patterns))
