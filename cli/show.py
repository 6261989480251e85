"""The plan and the report as rich tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from modelzip.evaluation.fallbacks import gathered
from modelzip.evaluation.markdown import within
from modelzip.evaluation.speed_report import draft_rows, latency_rows, speed_rows
from modelzip.evaluation.wording import SIZE, SPEED, compared

from .output import write_rich

if TYPE_CHECKING:
    from modelzip.pipeline.plans import Plan


ORIGINAL = ("original", "original_low", "original_high")
COMPRESSED = ("compressed", "low", "high")
"""A figure of a report and the ends of its interval."""


def megabytes(count: float | None) -> str:
    """Bytes as MB (10^6), or nothing."""
    return "" if count is None else f"{count / 1e6:,.2f}" if count < 1e7 else f"{count / 1e6:,.1f}"


def show_plan(plan: Plan, stage: str = "") -> None:
    """A table by module, the totals, what the run needs, and what the user should know.

    stage: which one of several it is, in words.
    """
    title = Text(f"{plan.source} → {plan.output}" + (f" ({stage})" if stage else ""))
    table = Table("module", "method", "kept as", title=title, title_justify="left")
    for heading in ("MB before", "MB after"):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for name, method, form, before, after, note in plan.rows():
        table.add_row(*map(Text, (name, method, form, megabytes(before), megabytes(after), note)))
    needs = Table.grid(padding=(0, 2))
    ratio = compared(plan.bytes_before / plan.bytes_after, SIZE) if plan.bytes_after else ""
    needs.add_row("model", f"{megabytes(plan.bytes_before)} MB → {megabytes(plan.bytes_after)} MB, {ratio}")
    needs.add_row("memory needed", f"{megabytes(plan.memory_bytes)} MB")
    needs.add_row("disk needed", f"{megabytes(plan.disk_bytes)} MB")
    write_rich(table, needs, *(Text(f"note: {note}") for note in plan.notes))


def show_report(report: Mapping[str, Any]) -> None:
    """The figures of a report, whatever of them is there, and where the output lies."""
    table = Table("", "original", "compressed", title="Result", title_justify="left")
    for name, before, after in _figures(report):
        table.add_row(name, before, after)
    fallbacks = gathered(str(one) for one in report.get("fallbacks") or ())
    lines = [Text(f"fallback: {line}") for line in fallbacks[:10]]
    if len(fallbacks) > 10:
        lines.append(Text(f"and {len(fallbacks) - 10} more fallbacks, all in report.json"))
    if report.get("output"):
        lines.append(Text(f"output: {report['output']}"))
    drafted = _drafted((report.get("evaluation") or {}).get("speculative"))
    exits = _exits((report.get("evaluation") or {}).get("exits") or ())
    write_rich(*([table] if table.row_count else []), *([exits] if exits.row_count else []), *drafted, *lines)


def _drafted(found: Mapping[str, Any] | None) -> list[Table]:
    """Writing with a draft beside writing alone."""
    if found is None:
        return []
    table = Table("", "without", "with", "", title=f"With the draft {found['draft']}", title_justify="left")
    for row in draft_rows(found):
        table.add_row(*row)
    return [table]


def _exits(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each threshold of a model with exits, timed against the whole model."""
    table = Table("threshold", "accuracy", "layers", title="Exits", title_justify="left")
    for row in rows[:1]:
        for timed in _ways(row):
            table.add_column(f"ms an example, {timed['batch_size']} at once")
    for row in rows:
        accuracy = f"{row['accuracy']:.2%} ({row['low']:.1%} to {row['high']:.1%})"
        times = (f"{timed['compressed_ms']:.2f} ({compared(timed['speedup'], SPEED)})" for timed in _ways(row))
        table.add_row(f"{row['threshold']:g}", accuracy, f"{row['layers']:.2f}", *times)
    return table


def _ways(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return row["latency"]["single"], row["latency"]["batched"]


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    size, evaluation = report.get("size") or {}, report.get("evaluation") or {}
    perplexity = evaluation.get("perplexity") or {}
    if not isinstance(perplexity, Mapping):
        perplexity = {"compressed": perplexity}
    guessed = evaluation.get("pseudo_perplexity") or {}
    unit = "an example" if evaluation.get("accuracy") else "a token"
    figures = [
        ("size, MB", megabytes(size.get("bytes_before")), megabytes(size.get("bytes_after"))),
        ("parameters", "", _number(size.get("parameters"), ",")),
        ("bits per weight", "", _number(size.get("bits_per_weight"), ".2f")),
        ("perplexity", _number(perplexity.get("original"), ".2f"), _number(perplexity.get("compressed"), ".2f")),
        ("pseudo-perplexity", _number(guessed.get("original"), ".2f"), _number(guessed.get("compressed"), ".2f")),
        ("accuracy", *_accuracies(evaluation.get("accuracy") or {})),
        *((name, *_scores(evaluation.get(name) or {})) for name in ("f1", "matthews", "pearson", "spearman")),
        (f"KL to the original, nats {unit}", "", _number(evaluation.get("kl"), ".4f")),
        ("   of 95 % and of 99 % under", "", _percentiles(evaluation)),
        ("top-1 agreement", "", _number(evaluation.get("top1_agreement"), ".1%")),
        ("top-5 agreement", "", _number(evaluation.get("top5_agreement"), ".1%")),
        ("flips", "", _number((evaluation.get("flips") or {}).get("share"), ".1%")),
        ("cosine to the original's embeddings", "", _number(evaluation.get("cosine"), ".4f")),
        ("agreement on similarities", "", _number(evaluation.get("similarity_agreement"), ".4f")),
        ("difference of the last hidden states", "", _number(evaluation.get("hidden_error"), ".4f")),
        *_noted(latency_rows(evaluation["latency"]) if evaluation.get("latency") else ()),
        *_noted(speed_rows(evaluation["speed"]) if evaluation.get("speed") else ()),
        ("time, s", "", _number((report.get("time") or {}).get("total_s"), ".0f")),
        ("peak memory, MB", "", _number(report.get("peak_memory_mb"), ",.0f")),
    ]
    return [figure for figure in figures if figure[1] or figure[2]]


def _accuracies(accuracy: Mapping[str, Any]) -> tuple[str, str]:
    """Both models' accuracies with their 95 % intervals."""
    shown = []
    for keys in (ORIGINAL, COMPRESSED):
        share, low, high = (accuracy.get(key) for key in keys)
        shown.append("" if share is None else f"{share:.2%} ({low:.1%} to {high:.1%})")
    return shown[0], shown[1]


def _scores(score: Mapping[str, Any]) -> tuple[str, str]:
    """Both models' scores with their 95 % intervals."""
    before, after = ([score.get(key) for key in keys] for keys in (ORIGINAL, COMPRESSED))
    return "" if before[0] is None else within(*before), "" if after[0] is None else within(*after)


def _percentiles(evaluation: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (_number(evaluation.get(key), ".4f") for key in ("kl_p95", "kl_p99"))))


def _noted(rows: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, str, str]]:
    """The note behind the compressed model's figure."""
    return [(name, before, f"{after} ({note})" if note else after) for name, before, after, note in rows]


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "" if value is None else str(value)
