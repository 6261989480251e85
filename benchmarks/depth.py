"""Peak memory of `modelzip quantize` by depth: the same block 4, 16 and 64 times must take the same memory.

    python depth.py [--layers 4 16 64] [--modelzip COMMAND]

Builds Llama models with random weights and a tiny tokenizer in a temporary folder, quantizes each in a process of its
own and writes results/depth.json. The largest process is the one that opens the finished result with plain
transformers, as a user would: that one holds the whole model, so it grows.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import markdown, run_once

RESULTS = Path(__file__).parent / "results"
VOCABULARY, SPECIAL = 1000, ("<unk>", "<s>", "</s>")
HIDDEN, INNER, GROUP = 256, 688, 16
SAMPLES, SEQ_LEN = 16, 128


def build(folder: Path, layers: int) -> None:
    """Write the model; called in a process of its own, for the measuring one must not grow."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQ_LEN,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokens = [*SPECIAL, *words()]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, begin, end = SPECIAL
    names: dict[str, Any] = {"unk_token": unknown, "bos_token": begin, "eos_token": end}
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def words() -> list[str]:
    return [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--modelzip", default=shlex.quote(str(Path(sys.executable).with_name("modelzip"))))
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(options.build, options.layers[0])
        return

    settings = f"--method gptq --bits 4 --group-size {GROUP} --samples {SAMPLES} --seq-len {SEQ_LEN}"
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        text = work / "words.txt"
        text.write_text(" ".join(random.Random(0).choices(words(), k=2 * SAMPLES * SEQ_LEN)), encoding="utf-8")
        for layers in options.layers:
            model = work / f"llama-{layers}"
            subprocess.run([sys.executable, __file__, "--build", model, "--layers", str(layers)], check=True)
            paths = [str(model), "-o", str(work / f"out-{layers}"), "--calibration", str(text)]
            command = [*shlex.split(options.modelzip), "quantize", *paths, *settings.split(), "--no-evaluate"]
            run = run_once(command, work / f"{layers}.log")
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            rows.append({"layers": layers, "model_mb": round(size / 1e6, 1), **vars(run)})
    for row in rows:
        row["main_ratio_to_first"] = round(row["main_mb"] / rows[0]["main_mb"], 3)

    RESULTS.mkdir(exist_ok=True)
    report = {"command": "python benchmarks/depth.py", "settings": settings, "depths": rows}
    (RESULTS / "depth.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    header = ("layers", "model MB", "wall s", "peak MB, main", "peak MB, largest", "main, ratio to first")
    print(markdown(header, [tuple(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
