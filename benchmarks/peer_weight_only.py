"""Compress one model with a library of weight-only quantization, through its public API.

    python peer_weight_only.py hqq|bitsandbytes|gptqmodel|auto-round MODEL OUTPUT TEXT [--samples 64 --seq-len 512]
    python peer_weight_only.py LIBRARY MODEL OUTPUT TEXT --dense

The setting is the protocol's: 4 bits, groups of 64, every decoder linear, `lm_head` left alone, the first windows of
TEXT (tokenized whole, no BOS, cut without overlap) in their order. Everything else is the library's default. What it
saves lies in OUTPUT. Not every such file is opened by other tools, so --dense writes what the library itself makes of
its weights to OUTPUT/dense, in fp32, for agreement.py. All but gptqmodel, whose file is opened, compress once more for
that, which is why it is a command apart that isn't timed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peer_llmcompressor import windows as first_windows

STARTED = time.perf_counter()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=sorted(LIBRARIES))
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--axis", type=int, default=1, help="of hqq: along which groups lie")
    parser.add_argument("--iters", type=int, default=200, help="of auto-round: steps a block")
    parser.add_argument("--batch-size", type=int, default=8, help="of auto-round: windows a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="to compute in")
    parser.add_argument("--dense", action="store_true")
    return parser.parse_args()


def opened(options: argparse.Namespace, **more: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **more)


def windows(options: argparse.Namespace) -> list[list[int]]:
    from transformers import AutoTokenizer

    text = options.text.read_text(encoding="utf-8")
    return first_windows(AutoTokenizer.from_pretrained(options.model), text, options.samples, options.seq_len)


def hqq(options: argparse.Namespace) -> Mapping[str, Any]:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = opened(options)
    config = BaseQuantizeConfig(nbits=4, group_size=options.group_size, axis=options.axis)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=getattr(torch, options.dtype), device="cpu")
    if not options.dense:
        AutoHQQHFModel.save_quantized(model, str(options.output))
    return {name: one.dequantize for name, one in model.named_modules() if type(one).__name__ == "HQQLinear"}


def bitsandbytes(options: argparse.Namespace) -> Mapping[str, Any]:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, options.dtype)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = opened(options, quantization_config=config, device_map="cpu")
    if not options.dense:
        model.save_pretrained(options.output)
    linears = {name: one for name, one in model.named_modules() if isinstance(one, Linear4bit)}
    return {
        name: lambda weight=one.weight: dequantize_4bit(weight.data, weight.quant_state)
        for name, one in linears.items()
    }


def gptqmodel(options: argparse.Namespace) -> Mapping[str, Any]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it can't be imported on two cores without
    options.model, options.output, options.text = (
        Path(one).resolve() for one in (options.model, options.output, options.text)
    )
    os.chdir(options.output.parent)  # it writes logs into the current folder
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    if options.dense:
        model = GPTQModel.load(str(options.output), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        named = model.model.named_modules()
        return {
            name: lambda one=one: one.dequantize_weight().T for name, one in named if hasattr(one, "dequantize_weight")
        }
    model = GPTQModel.load(str(options.model), QuantizeConfig(bits=4, group_size=options.group_size), device="cpu")
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows(options)]
    model.quantize(samples, batch_size=1)
    model.save(str(options.output))
    return {}


def auto_round(options: argparse.Namespace) -> Mapping[str, Any]:
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = [torch.tensor([ids]) for ids in windows(options)]
    shape = {"nsamples": options.samples, "seqlen": options.seq_len}
    steps = {"iters": options.iters, "batch_size": options.batch_size}
    how = {"bits": 4, "group_size": options.group_size, "sym": True, **steps, **shape}
    rounded = AutoRound(opened(options), tokenizer, dataset=data, device_map="cpu", **how)
    if not options.dense:
        rounded.quantize_and_save(str(options.output), format="auto_round")
        return {}
    model, _ = rounded.quantize()
    linears = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    return {name: lambda one=one: one.weight for name, one in linears.items() if name != "lm_head"}


LIBRARIES: Mapping[str, Callable[[argparse.Namespace], Mapping[str, Any]]] = {
    "hqq": hqq,
    "bitsandbytes": bitsandbytes,
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
}


def write_dense(options: argparse.Namespace, weights: Mapping[str, Any]) -> None:
    """The original with these weights, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if not weights:
        raise SystemExit(f"{options.library} has compressed nothing")
    for name, made in weights.items():
        own = model.get_submodule(name).weight
        own.data.copy_(made().detach().reshape(own.shape))
    model.save_pretrained(options.output / "dense")
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output / "dense")


def main() -> None:
    options = arguments()
    weights = LIBRARIES[options.library](options)
    if options.dense:
        write_dense(options, weights)
    print(json.dumps({"all": round(time.perf_counter() - STARTED, 2), "linears": len(weights)}))


if __name__ == "__main__":
    main()
