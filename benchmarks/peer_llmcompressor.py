"""Compress one model with llm-compressor through its public API; run it with the Python of an environment that has it.

    python peer_llmcompressor.py MODEL OUTPUT TEXT [--samples 64 --seq-len 512 --method gptq --dtype float32]

The setting is the protocol's: int4 symmetric weights in groups of 64 (or half of the weights pruned, or weights and
inputs of int8 behind SmoothQuant), every decoder linear, `lm_head` left alone, the first windows of TEXT (tokenized
whole, no BOS, cut without overlap) in their order. Everything else is the peer's default, which for GPTQ means
activation order "static" (the only kind it still has).
Prints its phases as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", choices=("gptq", "rtn", "smoothquant", "sparsegpt", "wanda"), default="gptq")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--mask", default="0:0", help="of the pruning methods: 0:0 is unstructured, else such as 2:4")
    parser.add_argument("--observer", default=None, help="how scales are chosen, for instance mse; default: the peer's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def windows(tokenizer: Any, text: str, samples: int, length: int) -> list[list[int]]:
    """The first `samples` windows of `length` tokens; fewer is an error, never a silent shortening."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < samples * length:
        raise SystemExit(f"the text holds {len(ids)} tokens, {samples} windows of {length} need {samples * length}")
    return [ids[start : start + length] for start in range(0, samples * length, length)]


def modifier(options: argparse.Namespace) -> Any:
    """What the peer calls the method."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if options.method in ("sparsegpt", "wanda"):
        kind = SparseGPTModifier if options.method == "sparsegpt" else WandaPruningModifier
        return kind(sparsity=options.sparsity, mask_structure=options.mask, targets=["Linear"], ignore=["lm_head"])
    if options.method == "smoothquant":
        rounding = QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"])
        return [SmoothQuantModifier(), rounding]
    weights = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=options.group_size, observer=options.observer
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    kind = GPTQModifier if options.method == "gptq" else QuantizationModifier
    return kind(config_groups=groups, ignore=["lm_head"])


def main() -> None:
    options = arguments()
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    marks = [("import", time.perf_counter())]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = windows(tokenizer, options.text.read_text(encoding="utf-8"), options.samples, options.seq_len)
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * options.seq_len] * len(ids)})
    marks.append(("load", time.perf_counter()))

    recipe = modifier(options)
    calibration = {
        "dataset": data,
        "batch_size": options.batch_size,
        "num_calibration_samples": len(ids),
        "max_seq_length": options.seq_len,
        "shuffle_calibration_samples": False,
    }
    oneshot(model=model, recipe=recipe, **({} if options.method == "rtn" else calibration))
    marks.append(("compress", time.perf_counter()))
    model.save_pretrained(options.output, save_compressed=True)
    tokenizer.save_pretrained(options.output)
    marks.append(("save", time.perf_counter()))

    starts = [STARTED, *(mark for _, mark in marks)]
    print(json.dumps({name: round(mark - start, 2) for (name, mark), start in zip(marks, starts, strict=False)}))


if __name__ == "__main__":
    main()
