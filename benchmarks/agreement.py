"""How far a compressed model is from its original, computed the plain way as a check on the project's own evaluation.

    python agreement.py ORIGINAL COMPRESSED TEXT [--windows 40 --seq-len 512]

Both models are opened whole by transformers and run in fp32, one window at a time, densely unless inputs are rounded.
TEXT is tokenized whole with the original's tokenizer, no BOS, and cut without overlap. Perplexity is over the
`seq-len - 1` predictions of each window; KL(original ‖ compressed) and top-1 agreement are means over the same
positions.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

REINITIALISED = ("missing_keys", "mismatched_keys", "unexpected_keys")


def open_dense(model: str) -> torch.nn.Module:
    """The model in fp32 with its weights decompressed; a tensor without its place is an error, not noise."""
    stored = getattr(AutoConfig.from_pretrained(model), "quantization_config", None)
    options: dict[str, Any] = {"output_loading_info": True}
    if stored is not None and stored["quant_method"] == "compressed-tensors" and not _rounds_inputs(stored):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    opened: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    network, info = opened
    if any(info[kind] for kind in REINITIALISED):
        raise SystemExit(f"{model} did not open whole: { {kind: sorted(info[kind])[:5] for kind in REINITIALISED} }")
    result: torch.nn.Module = network.eval()
    for name, module in list(result.named_modules()):
        if hasattr(module, "weight_value") and hasattr(module, "in_features"):  # decodes its weight in every pass
            result.set_submodule(name, plain(module))
    return result


def _rounds_inputs(stored: dict[str, Any]) -> bool:
    """Whether what compressed-tensors holds is more than weights."""
    return any(group.get("input_activations") for group in stored["config_groups"].values())


def plain(module: Any) -> torch.nn.Module:
    """A linear with the same weight, dense."""
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(module.weight_value.dense(torch.float32), requires_grad=False)
    linear.bias = module.bias
    return linear


def compare(original: Tensor, compressed: Tensor, ids: Tensor) -> list[float]:
    """Sums over one window's predictions: both negative log likelihoods, KL, and how often the best tokens agree."""
    p, q, targets = original[0, :-1], compressed[0, :-1], ids[0, 1:]
    p_log, q_log = p.log_softmax(-1).double(), q.log_softmax(-1).double()
    return [
        cross_entropy(p_log, targets, reduction="sum").item(),
        cross_entropy(q_log, targets, reduction="sum").item(),
        (p_log.exp() * (p_log - q_log)).sum().item(),
        (p.argmax(-1) == q.argmax(-1)).sum().item(),
    ]


@torch.inference_mode()
def agreement(original: str, compressed: str, text: str, *, windows: int, length: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(original)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < windows * length:
        raise SystemExit(f"the text holds {len(ids)} tokens, {windows} windows of {length} need {windows * length}")
    first, second = open_dense(original), open_dense(compressed)
    totals = [0.0] * 4
    for start in range(0, windows * length, length):
        window = torch.tensor([ids[start : start + length]])
        sums = compare(first(window).logits, second(window).logits, window)
        totals = [total + value for total, value in zip(totals, sums, strict=True)]
    dense, other, kl, same = (total / (windows * (length - 1)) for total in totals)
    return {
        "perplexity_original": round(math.exp(dense), 4),
        "perplexity": round(math.exp(other), 4),
        "kl": round(kl, 6),
        "top1_percent": round(100 * same, 3),
        "windows": windows,
        "seq_len": length,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("compressed")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    if importlib.util.find_spec("modelzip") and importlib.util.find_spec("modelzip.weights"):
        importlib.import_module("modelzip.weights")  # registers our own layout, where the format can't hold a model
    text = options.text.read_text(encoding="utf-8")
    found = agreement(options.original, options.compressed, text, windows=options.windows, length=options.seq_len)
    size = sum(file.stat().st_size for file in Path(options.compressed).glob("*.safetensors"))
    print(json.dumps({**found, "disk_mb": round(size / 1e6, 1)}))


if __name__ == "__main__":
    main()
