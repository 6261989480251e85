"""What a report says of quality and speed: the fields of `evaluation`, each with its meaning and its unit. No torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all parts of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)


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
    original: float | None = Field(
        description="What the original reads a second: tokens in `speed`, examples in `latency`; null without one"
    )
    compressed: float = Field(description="The same of the compressed model")
    speedup: float | None = Field(description="Median of the ratios of both, repetition by repetition")


class Latency(Section):
    single: Timed = Field(description="One example at a time")
    batched: Timed = Field(description="In batches")
    text: Times | None = Field(
        default=None, description="Of each example alone, over all repetitions; null for single exits"
    )
    throughput: tuple[Throughput, ...] = Field(
        default=(), description="In batches of examples of like length, by how many ran at once; none for single exits"
    )


class ExitsTaken(Section):
    threshold: float = Field(description="Uncertainty, 0 to 1, below which a text leaves")
    accuracy: float = Field(description="Share of labelled examples put into the right class by the exits they take")
    low: float = Field(description="Lower end of its 95 % interval (Wilson 1927)")
    high: float = Field(description="Upper end of it")
    layers: float = Field(description="Mean number of layers that ran for an example")
    latency: Latency = Field(
        description="Timed in turns with the whole model, which stands as the original: the same one at threshold 0"
    )


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


class Sample(Section):
    prompt: str = Field(description="The beginning of an evaluated text, which both models read")
    original: str | None = Field(description="What the original wrote after it, the likeliest token each; null without")
    compressed: str = Field(description="What the compressed model wrote")
    tokens: int = Field(description="Tokens that each wrote")
    same_tokens: int | None = Field(description="Tokens before the first that differs; null without an original")


class TaskResult(Section):
    task: str = Field(description="Name in lm-evaluation-harness")
    metric: str = Field(description="Its metric, such as acc or acc_norm")
    examples: int | None = Field(description="Examples that were asked; null for a group of tasks")
    original: float | None = Field(description="The original's figure; null without an original")
    original_error: float | None = Field(description="Standard error; null where the harness gives none")
    compressed: float | None = Field(description="The compressed model's figure")
    compressed_error: float | None = Field(description="Standard error; null where the harness gives none")


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
    samples: tuple[Sample, ...] = Field((), description="Texts that both models went on with")
    tasks: tuple[TaskResult, ...] = Field((), description="Tasks of lm-evaluation-harness that were asked for")
    exits: tuple[ExitsTaken, ...] = Field(
        (), description="A row for each threshold that was asked for of a model with exits"
    )
