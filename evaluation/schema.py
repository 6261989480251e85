"""What a report holds: the fields of `report.json`, each with its meaning and its unit. No torch.

The values are frozen and strict: an unknown or missing field is an error. A number that could not be computed is NaN
and is written as the string "NaN", because JSON has no such number; reading it back gives NaN again.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Section(BaseModel):
    """Base of all parts of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)


class Source(Section):
    name: str = Field(description="The model as the user named it: a folder, a hub id or a .gguf file")
    sha256: str = Field(description="SHA-256 over config.json and the headers of the weight files")
    revision: str | None = Field(None, description="Revision of a hub id; null for a local model")


class PlanSummary(Section):
    modules: int = Field(description="Linears that the plan set out to compress")
    bytes_before: int = Field(description="Bytes of all weights before, from the headers")
    bytes_after: int = Field(description="Bytes of all weights after, as predicted")
    memory_bytes: int = Field(description="Memory that the plan asked for, in bytes")
    disk_bytes: int = Field(description="Free disk that the plan asked for, in bytes")
    notes: tuple[str, ...] = Field((), description="What the plan had to say, one sentence each")


class CalibrationData(Section):
    source: str = Field(description='Where the text came from: a file, a hub dataset, or "self"')
    tokens: int = Field(description="Tokens that ran through the model")
    sha256: str = Field(description="SHA-256 of those token ids")
    samples: int = Field(description="Windows of tokens")
    seq_len: int = Field(description="Tokens a window")
    seed: int = Field(description="Seed of the text or of the choice of windows")


class Module(Section):
    stage: int = Field(description="Number of the stage that compressed it, from 1")
    name: str = Field(description="Module name, such as model.layers.3.mlp.down_proj")
    method: str = Field(description="Method that compressed it")
    form: str = Field(description="What it is kept as, such as: 4 bit, group 64; 2:4; rank 144")
    bits_per_weight: float = Field(description="Bits a weight, scales, zero points and positions counted")
    shape: tuple[int, int] = Field(description="Rows and columns: (out, in)")
    error: float | None = Field(
        description="Relative error of the module's output on the calibration tokens: "
        "‖xWᵀ - xŴᵀ‖ / ‖xWᵀ‖, Frobenius norm; null if no tokens ran through it"
    )
    weight_error: float = Field(description="Relative error of the weights: ‖W - Ŵ‖ / ‖W‖, Frobenius norm")
    note: str = Field("", description="What was special about this module: a fallback, another group size")


class Protocol(Section):
    source: str = Field(description="Where the evaluation text came from")
    sha256: str = Field(description="SHA-256 of the evaluated token ids, or of the labelled examples")
    windows: int | None = Field(None, description="Windows of tokens; null for labelled examples")
    seq_len: int = Field(description="Tokens a window, or the most tokens of a labelled example")
    stride: int | None = Field(
        None, description="Tokens from the start of one window to the start of the next; null for labelled examples"
    )
    bos: bool | None = Field(
        None,
        description="Whether each window starts with the tokenizer's beginning-of-sequence token; null for labelled "
        "examples",
    )
    dtype: str = Field(description="Number type that both models ran in")
    tokens: int | None = Field(None, description="Tokens that were predicted and scored; null for labelled examples")
    masked: int | None = Field(
        None, description="Tokens that masked language models were asked for, one at a time; null for other models"
    )
    pooling: str | None = Field(
        None, description="How a text's hidden states became its embedding; null where there are no embeddings"
    )
    examples: int | None = Field(None, description="Labelled examples; null for windows of tokens")
    cut: int | None = Field(
        None, description="Labelled examples that were longer than seq_len and lost their ends; null for windows"
    )


class Perplexity(Section):
    original: float | None = Field(description="Perplexity of the original model; null if it was not run")
    compressed: float | None = Field(
        description="Perplexity of the compressed model; null for models that don't predict the next token"
    )


class Score(Section):
    original: float | None = Field(description="That of the original model; null if it was not run")
    original_low: float | None = Field(None, description="Lower end of its 95 % interval; null where there is none")
    original_high: float | None = Field(None, description="Upper end of it")
    compressed: float = Field(description="That of the compressed model")
    low: float | None = Field(None, description="Lower end of its 95 % interval; null where there is none")
    high: float | None = Field(None, description="Upper end of it")


class Accuracy(Section):
    original: float | None = Field(description="That of the original model, 0 to 1; null if it was not run")
    original_low: float | None = Field(description="Lower end of its 95 % interval (Wilson 1927)")
    original_high: float | None = Field(description="Upper end of it")
    compressed: float = Field(description="That of the compressed model, 0 to 1")
    low: float = Field(description="Lower end of its 95 % interval")
    high: float = Field(description="Upper end of it")
    lost: int | None = Field(description="Examples that only the original model gets right")
    won: int | None = Field(description="Examples that only the compressed model gets right")


class Flips(Section):
    lost: int = Field(description="Tokens that only the original ranks first where they come next")
    won: int = Field(description="Tokens that only the compressed model ranks first where they come next")
    share: float = Field(description="Both, as a share (0 to 1) of the tokens that come next")


class Timed(Section):
    batch_size: int = Field(description="Examples that ran at once")
    examples: int = Field(description="Examples of a repetition")
    original_ms: float = Field(description="Median wall time of the original model, milliseconds an example")
    compressed_ms: float = Field(description="Median wall time of the compressed model, milliseconds an example")
    speedup: float = Field(description="Median of the ratios of both, repetition by repetition")


class Latency(Section):
    single: Timed = Field(description="One example at a time")
    batched: Timed = Field(description="In batches")


class ExitsTaken(Section):
    threshold: float = Field(description="Uncertainty, 0 to 1, below which a text leaves")
    accuracy: float = Field(description="Share of labelled examples put into the right class by the exits they take")
    low: float = Field(description="Lower end of its 95 % interval (Wilson 1927)")
    high: float = Field(description="Upper end of it")
    layers: float = Field(description="Mean number of layers that ran for an example")
    latency: Latency = Field(
        description="Timed in turns with the whole model, which stands as the original: the same one at threshold 0"
    )


class Spread(Section):
    p50_ms: float = Field(description="Median, in milliseconds")
    p90_ms: float = Field(description="What 90 % stay under")
    p99_ms: float = Field(description="What 99 % stay under")


class Times(Section):
    original: Spread | None = Field(description="Of the original model; null if there is none")
    compressed: Spread = Field(description="Of the compressed model")
    speedup: float | None = Field(description="Median of the ratios of both, repetition by repetition")


class Throughput(Section):
    batch_size: int = Field(description="Texts that ran at once")
    original: float | None = Field(description="Tokens a second that the original reads; null if there is none")
    compressed: float = Field(description="Tokens a second that the compressed model reads")
    speedup: float | None = Field(description="Median of the ratios of both, repetition by repetition")


class Resident(Section):
    original_rest_mb: float | None = Field(description="Of the original, opened by transformers; null if there is none")
    compressed_rest_mb: float = Field(description="Of the compressed model, opened by transformers")
    original_peak_mb: float | None = Field(description="Of the original at most, while it reads one text")
    compressed_peak_mb: float = Field(description="Of the compressed model at most, while it reads one text")


class Energy(Section):
    original_joules: float | None = Field(description="Of the original; null if there is none")
    compressed_joules: float = Field(description="Of the compressed model")


class Speed(Section):
    prompt_tokens: int = Field(description="Tokens of a text that is read")
    new_tokens: int = Field(description="Tokens that are written after it")
    repetitions: int = Field(description="Texts that were read and gone on with, after one that isn't counted")
    prefill: Times = Field(description="From a text to its first new token")
    token: Times = Field(description="From each new token to the next")
    throughput: tuple[Throughput, ...] = Field(description="Reading texts of prompt_tokens, at several batch sizes")
    memory: Resident | None = Field(
        description="Memory of each model in a process of its own on the CPU, above that of the libraries, in MB; null "
        "where the system doesn't tell"
    )
    energy: Energy | None = Field(
        description="Joules a new token, reading the text included, by RAPL or NVML; null where the machine is silent"
    )


class Speculative(Section):
    draft: str = Field(description="The model that wrote ahead")
    texts: int = Field(description="Texts that were gone on with, after one that isn't counted")
    prompt_tokens: int = Field(description="Tokens of each")
    new_tokens: int = Field(description="Tokens that were written after each, greedily")
    acceptance: float = Field(description="Share (0 to 1) of the draft's tokens that the model took")
    tokens_per_pass: float = Field(description="Tokens written in a forward pass of the model; 1 without a draft")
    identical: int = Field(description="Texts of which every token was that written without the draft")
    plain_ms: float = Field(description="Median wall time without the draft, milliseconds a new token")
    drafted_ms: float = Field(description="Median wall time with the draft, milliseconds a new token")
    speedup: float = Field(description="Median of the ratios of both, text by text")


class EvaluationResult(Section):
    protocol: Protocol = Field(description="How it was measured; figures compare only under the same protocol")
    perplexity: Perplexity = Field(description="exp of the mean negative log-likelihood a token")
    pseudo_perplexity: Perplexity | None = Field(
        None,
        description="Of masked language models: exp of the mean negative log-likelihood of a hidden token (Salazar et "
        "al. 2020)",
    )
    kl: float | None = Field(
        description="Mean KL(original ‖ compressed), nats a token, or an example; null without an original or logits"
    )
    top1_agreement: float | None = Field(
        description="Share of tokens (0 to 1) where both models rank the same token first, or of examples the same "
        "class; null without an original or logits"
    )
    kl_p95: float | None = Field(
        None, description="What 95 % of the tokens, or examples, stay under with their divergence; null like kl"
    )
    kl_p99: float | None = Field(None, description="What 99 % of them stay under")
    top5_agreement: float | None = Field(
        None,
        description="Share (0 to 1) of the original's five likeliest tokens that are among the compressed model's five;"
        " null without an original or logits, and for labelled examples",
    )
    flips: Flips | None = Field(
        None,
        description="Tokens of the text that one of both models alone ranks first (Dutta et al. 2024); null without an "
        "original, and for models that don't predict the next token",
    )
    hidden_error: float | None = Field(
        None,
        description="Relative difference of the last hidden states, Frobenius norm; null for models with logits, and "
        "without an original",
    )
    accuracy: Accuracy | None = Field(
        None,
        description="Share of labelled examples put into the right class; null for windows of tokens, and "
        "for models that predict a number",
    )
    f1: Score | None = Field(
        None,
        description="F1 of class 1 where there are two classes, else the mean over classes; intervals by bootstrap",
    )
    matthews: Score | None = Field(
        None, description="Matthews' correlation coefficient, -1 to 1 (Gorodkin 2004); intervals by bootstrap"
    )
    pearson: Score | None = Field(
        None, description="Correlation of the numbers that a model predicts with the labels, -1 to 1 (Fisher 1921)"
    )
    spearman: Score | None = Field(
        None,
        description="The same of their ranks (interval: Bonett & Wright 2000); of sentence encoders, of the cosines "
        "that they find between paired texts",
    )
    cosine: float | None = Field(
        None, description="Mean cosine between both models' embeddings of a text; null for models with a head"
    )
    cosine_p05: float | None = Field(None, description="What 5 % of the texts stay under with that cosine")
    similarity_agreement: float | None = Field(
        None,
        description="Spearman's correlation between the cosines that the two models find between paired texts, or else "
        "between all of the first 256; null like cosine",
    )
    latency: Latency | None = Field(
        None, description="Both classifiers timed in turns in one process; null unless it was asked for"
    )
    speed: Speed | None = Field(
        None,
        description="Models that write text, opened by transformers and timed in turns in one process; null unless it "
        "was asked for",
    )
    speculative: Speculative | None = Field(
        None, description="Writing with a draft that the model checks, beside writing alone; null without a draft"
    )
    exits: tuple[ExitsTaken, ...] = Field(
        (), description="A row for each threshold that was asked for of a model with exits"
    )


class Size(Section):
    bytes_before: int | None = Field(description="Bytes of the original's weights; null if there is no original")
    bytes_after: int = Field(description="Bytes of the compressed model's weight files")
    ratio: float | None = Field(description="bytes_before / bytes_after")
    parameters: int = Field(description="Parameters of the whole model, tied ones counted once")
    compressed_parameters: int = Field(description="Parameters of the compressed linears")
    bits_per_weight: float | None = Field(
        description="Bits a parameter over the compressed linears, scales and zero points counted; "
        "null if nothing is compressed"
    )
    bits_per_parameter: float = Field(description="Bits a parameter over the whole model")


class Verification(Section):
    max_logit_difference: float = Field(
        description="Largest difference of a logit between the model in memory and the output reopened in a new process"
    )
    tokens: int = Field(description="Tokens that were compared")


class Time(Section):
    total_s: float = Field(description="Wall time from start to end, in seconds")
    phases: dict[str, float] = Field(
        default_factory=dict,
        description="Wall time of each phase, in seconds: forward_s, statistics_s, solve_s, write_s and others",
    )


class StageResult(Section):
    kind: str = Field(description="Kind of stage: quantize, prune, factorize or distill")
    method: str = Field(description="Its method with the setting that matters most, such as gptq-4bit")
    bytes_after: int = Field(description="Bytes of all weights after it")
    seconds: float | None = Field(description="Wall time, in seconds; null if an interrupted run had finished it")
    evaluation: EvaluationResult | None = Field(description="Quality after it; null if it was not measured")
    details: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="What it did: of training data, teacher, steps, losses, the best and the kept measurement and the "
        "curve; of structural pruning what was removed, by module; empty where it is told in modules",
    )


class Environment(Section):
    python: str = Field(description="Version of Python")
    torch: str = Field(description="Version of PyTorch")
    transformers: str = Field(description="Version of transformers")
    compressed_tensors: str = Field(description="Version of compressed-tensors")
    platform: str = Field(description="Operating system and machine type")
    cpu: str = Field(description="Name of the processor")
    device: str = Field(description="Device that the work ran on: cpu or cuda with its name")
    threads: int = Field(description="Threads that PyTorch used")
    kernels: str = Field(description='Path that the kernels took: "compiled", or "reference", which is plain PyTorch')
    products: str = Field(description="The same for matrix products, which are compiled for CPUs with AVX2")


class Report(Section):
    schema_version: Literal[1] = Field(1, description="Version of this format")
    modelzip: str = Field(description="Version of modelzip")
    created: str | None = Field(None, description="When the report was made, ISO 8601; left out if not given")
    command: str = Field(description="Command that made it: quantize, run or evaluate")
    recipe: dict[str, JsonValue] = Field(description="The recipe with every default filled in")
    source: Source = Field(description="The model that was read")
    output: str | None = Field(description="Folder that was written; null if none was")
    plan: PlanSummary | None = Field(None, description="What was predicted before a weight was read")
    calibration: CalibrationData | None = Field(None, description="Calibration tokens; null if none were needed")
    stages: tuple[StageResult, ...] = Field((), description="What each stage left, in their order")
    modules: tuple[Module, ...] = Field((), description="The compressed linears")
    fallbacks: tuple[str, ...] = Field((), description="Everything that did not go as asked, one sentence each")
    evaluation: EvaluationResult | None = Field(None, description="Quality; null if it was switched off")
    size: Size = Field(description="What it weighs")
    verification: Verification | None = Field(None, description="The output reopened; null if none was written")
    time: Time = Field(description="Where the time went")
    peak_memory_mb: float | None = Field(None, description="Peak resident memory of the process, in MB (10^6 bytes)")
    environment: Environment = Field(description="Where it ran")
