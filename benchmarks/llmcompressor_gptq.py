"""Compress one model with llm-compressor through its public API; run it with the Python of an environment that has it.

    python llmcompressor_gptq.py MODEL OUTPUT TEXT [--samples 64 --seq-len 512 --method gptq --dtype float32]

The setting is the protocol's: int4 symmetric weights in groups of 64, every decoder linear, `lm_head` left alone, the
first windows of TEXT (tokenized whole, no BOS, cut without overlap) in their order. Everything else is the peer's
default, which for GPTQ means activation order "static" (the only kind it still has). Prints its phases as JSON.
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
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--observer", default=None, help="how scales are chosen, for instance mse; default: the peer's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def windows(tokenizer: Any, text: str, samples: int, length: int) -> list[list[int]]:
    """The first `samples` windows of `length` tokens; fewer is an error, never a silent shortening."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < samples * length:
        raise SystemExit(f"the text holds {len(ids)} tokens, {samples} windows of {length} need {samples * length}")
    return [ids[start : start + length] for start in range(0, samples * length, length)]


def main() -> None:
    options = arguments()
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    marks = [("import", time.perf_counter())]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = windows(tokenizer, options.text.read_text(encoding="utf-8"), options.samples, options.seq_len)
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * options.seq_len] * len(ids)})
    marks.append(("load", time.perf_counter()))

    weights = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=options.group_size, observer=options.observer
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifier = GPTQModifier if options.method == "gptq" else QuantizationModifier
    recipe = modifier(config_groups=groups, ignore=["lm_head"])
    calibration = {
        "dataset": data,
        "batch_size": options.batch_size,
        "num_calibration_samples": len(ids),
        "max_seq_length": options.seq_len,
        "shuffle_calibration_samples": False,
    }
    oneshot(model=model, recipe=recipe, **(calibration if options.method == "gptq" else {}))
    marks.append(("compress", time.perf_counter()))
    model.save_pretrained(options.output, save_compressed=True)
    tokenizer.save_pretrained(options.output)
    marks.append(("save", time.perf_counter()))

    starts = [STARTED, *(mark for _, mark in marks)]
    print(json.dumps({name: round(mark - start, 2) for (name, mark), start in zip(marks, starts, strict=False)}))


if __name__ == "__main__":
    main()
