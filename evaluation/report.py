"""The report of a run: `report.json` for machines, `report.md` for people and pull requests. No torch.

`Report` says what a run read, wrote, lost and won. The clock is never read here: `created` is what the caller gives,
and without it the same run gives the same words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelzip.checkpoints.errors import RecipeError

from .bits_report import bits_lines
from .cache_report import cache_lines
from .exits_report import exits_table
from .fallbacks import gathered
from .markdown import code as _code
from .markdown import fold as _fold
from .markdown import number as _number
from .markdown import share as _share
from .markdown import table as _table
from .markdown import within as _within
from .samples_report import sample_list
from .schema import Module, Report, StageResult
from .schema_quality import EvaluationResult, Protocol
from .speed_report import draft_rows, latency_rows, speed_rows
from .tasks_report import task_table
from .training_report import training_lines
from .wording import SIZE, compared

__all__ = ["Report", "report_json", "report_markdown", "report_parts", "report_schema", "validate"]

# A pull-request comment on GitHub holds 65,536 characters; these limits keep well below with names of usual length.
WORST_SHOWN = 5
MODULES_SHOWN = 300
FALLBACKS_SHOWN = 20


def validate(data: Mapping[str, Any], *, origin: str = "report.json") -> Report:
    """The report that a dictionary stands for. Raises RecipeError that names every field that is wrong."""
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc'])) or 'report'}: {item['msg']}" for item in error.errors()]
        raise RecipeError(f"{origin} is not a modelzip report of version 1 ({'; '.join(faults)}).") from error


def report_json(report: Report) -> bytes:
    """report.json: UTF-8, two spaces, a newline at the end. Without `created`, the key is left out."""
    leave_out = {"created"} if report.created is None else set()
    return (report.model_dump_json(indent=2, exclude=leave_out) + "\n").encode()


def report_schema() -> dict[str, Any]:
    """JSON schema of report.json."""
    return Report.model_json_schema(mode="serialization")


@dataclass(frozen=True)
class Part:
    """A piece of the report in Markdown. summary: what is shown of it at first; None if it isn't folded."""

    body: str
    summary: str | None = None


def report_markdown(report: Report) -> str:
    """report.md: the headline first, then what it took, then details that fold."""
    parts = report_parts(report)
    return "\n\n".join(one.body if one.summary is None else _fold(one.summary, one.body) for one in parts) + "\n"


def report_parts(report: Report) -> list[Part]:
    """The pieces of the report in their order, the title first; those that would be empty are left out."""
    bodies = [
        _title(report),
        _headline(report),
        _stages(report.stages),
        exits_table(() if report.evaluation is None else report.evaluation.exits),
        task_table(() if report.evaluation is None else report.evaluation.tasks),
        _speed(report.evaluation),
        bits_lines(report.stages),
        cache_lines(report.stages),
        training_lines(report.stages),
        _cost(report),
        _protocol(report),
        _fallbacks(report.fallbacks),
        _worst(report.modules),
    ]
    return [*(Part(body) for body in bodies if body), *_details(report)]


def _title(report: Report) -> str:
    source, output = (_code(_short(name)) for name in (report.source.name, report.output or ""))
    return f"# modelzip {report.command}: {source}" + (f" → {output}" if report.output else "")


def _short(name: str) -> str:
    """A path's last part; hub ids stay whole."""
    return Path(name).name if Path(name).is_absolute() else name


def _headline(report: Report) -> str:
    size, evaluation = report.size, report.evaluation
    before = "–" if size.bytes_before is None else f"{size.bytes_before / 1e6:,.1f} MB"
    times = "" if size.ratio is None else compared(size.ratio, SIZE, times="×")
    rows = [("Weights on disk", before, f"{size.bytes_after / 1e6:,.1f} MB", times)]
    if size.bits_per_weight is not None:
        share = f"{size.compressed_parameters:,} of {size.parameters:,} parameters"
        rows.append(("Bits a compressed weight", "", f"{size.bits_per_weight:.2f}", share))
    rows.append(("Bits a parameter, whole model", "", f"{size.bits_per_parameter:.2f}", ""))
    return _table(("", "original", "compressed", ""), [*rows, *(_quality(evaluation) if evaluation else [])])


def _quality(evaluation: EvaluationResult) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    original, compressed = evaluation.perplexity.original, evaluation.perplexity.compressed
    if compressed is not None:
        change = f"{100 * (compressed / original - 1):+.1f} %" if original else ""
        rows.append(("Perplexity", _number(original, ".3f"), _number(compressed, ".3f"), change))
    if (guessed := evaluation.pseudo_perplexity) is not None and guessed.compressed is not None:
        change = f"{100 * (guessed.compressed / guessed.original - 1):+.1f} %" if guessed.original else ""
        figures = _number(guessed.original, ".3f"), _number(guessed.compressed, ".3f")
        rows.append(("Pseudo-perplexity", *figures, change))
    if (found := evaluation.accuracy) is not None:
        before = _share(found.original, found.original_low, found.original_high)
        change = "" if found.original is None else f"{100 * (found.compressed - found.original):+.2f} points"
        rows.append(("Accuracy (95 % interval)", before, _share(found.compressed, found.low, found.high), change))
    for name, score in (
        *(("F1", evaluation.f1), ("Matthews' coefficient", evaluation.matthews)),
        *(("Pearson's correlation", evaluation.pearson), ("Spearman's correlation", evaluation.spearman)),
    ):
        if score is not None:
            change = "" if score.original is None else f"{score.compressed - score.original:+.4f}"
            before = _within(score.original, score.original_low, score.original_high)
            rows.append((name, before, _within(score.compressed, score.low, score.high), change))
    unit = "nats a token" if evaluation.protocol.examples is None else "nats an example"
    if evaluation.kl is not None:
        tail = "" if evaluation.kl_p99 is None else f", 99 % under {_number(evaluation.kl_p99, '.4f')}"
        rows.append(("KL to the original", "", _number(evaluation.kl, ".4f"), unit + tail))
    if evaluation.top1_agreement is not None:
        top5 = "" if evaluation.top5_agreement is None else f"top-5 {100 * evaluation.top5_agreement:.1f} %"
        rows.append(("Top-1 agreement", "", _number(100 * evaluation.top1_agreement, ".1f") + " %", top5))
    if (flips := evaluation.flips) is not None:
        rows.append(("Flips", "", f"{100 * flips.share:.1f} %", f"{flips.lost:,} tokens lost, {flips.won:,} won"))
    if evaluation.cosine is not None:
        under = f"5 % under {_number(evaluation.cosine_p05, '.4f')}"
        rows.append(("Cosine to the original's embeddings", "", _number(evaluation.cosine, ".4f"), under))
        rows.append(
            ("Agreement on similarities", "", _number(evaluation.similarity_agreement, ".4f"), "rank correlation")
        )
    if evaluation.hidden_error is not None:
        rows.append(("Difference of the last hidden states", "", _number(evaluation.hidden_error, ".4f"), "relative"))
    if evaluation.latency is not None:
        rows += latency_rows(evaluation.latency.model_dump())
    return rows


def _speed(evaluation: EvaluationResult | None) -> str:
    tables = []
    if evaluation is not None and evaluation.speed is not None:
        rows = speed_rows(evaluation.speed.model_dump())
        tables.append(_table(("speed and memory", "original", "compressed", ""), rows))
    if evaluation is not None and (found := evaluation.speculative) is not None:
        header = (f"with the draft {_code(_short(found.draft))}", "without", "with", "")
        tables.append(_table(header, draft_rows(found.model_dump())))
    return "\n\n".join(tables)


def _stages(stages: Sequence[StageResult]) -> str:
    """A line for each stage, if there are several."""
    if len(stages) < 2:
        return ""
    rows = []
    for number, stage in enumerate(stages, 1):
        quality = stage.evaluation
        figures: list[tuple[float | None, str]] = [(None, "")] * 4
        if quality is not None:
            accuracy = None if quality.accuracy is None else 100 * quality.accuracy.compressed
            figures = [(quality.perplexity.compressed, ".3f"), (accuracy, ".2f")]
            figures += [(quality.kl, ".4f"), (quality.hidden_error, ".4f")]
        cells = [_number(figure, form) for figure, form in figures]
        seconds = "–" if stage.seconds is None else f"{stage.seconds:,.0f} s"
        rows.append((str(number), stage.kind, stage.method, f"{stage.bytes_after / 1e6:,.1f} MB", *cells, seconds))
    header = ("", "stage", "method", "weights", "perplexity", "accuracy %", "KL", "hidden difference", "time")
    kept = [index for index in range(len(header)) if index < 4 or any(row[index] != "–" for row in rows)]
    return _table([header[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _cost(report: Report) -> str:
    memory = "" if report.peak_memory_mb is None else f" and {report.peak_memory_mb:,.0f} MB of memory at the peak"
    threads = report.environment.threads
    where = f"{report.environment.device}, {threads} {'thread' if threads == 1 else 'threads'}"
    lines = [f"Took {report.time.total_s:,.1f} s{memory} ({where})."]
    if report.verification:
        difference = report.verification.max_logit_difference
        away = "equal to those" if difference == 0 else f"within {_number(difference, '.2e')} of those"
        tokens = f"{report.verification.tokens:,} tokens"
        lines.append(f"Reopened in a new process: logits {away} of the model in memory over {tokens}.")
    return " ".join(lines)


def _protocol(report: Report) -> str:
    lines = []
    if (data := report.calibration) is not None:
        lines.append(
            f"Calibration: {data.samples} × {data.seq_len} tokens of {_code(data.source)}, seed {data.seed}, "
            f"SHA-256 {data.sha256[:12]}."
        )
    if report.evaluation is None:
        lines.append("Quality was not measured in this run.")
    else:
        lines.append(protocol_line(report.evaluation.protocol))
    return "  \n".join(lines)


def protocol_line(how: Protocol) -> str:
    """What was evaluated on, as a sentence."""
    labelled = f"Evaluation: {how.examples} labelled examples of {_code(how.source)}, {how.cut} of them cut at "
    if how.examples is not None:
        return f"{labelled}{how.seq_len} tokens, {how.dtype}, SHA-256 {how.sha256[:12]}."
    return (
        f"Evaluation: {how.windows} × {how.seq_len} tokens of {_code(how.source)}, stride {how.stride}, "
        f"{'with' if how.bos else 'no'} BOS, {how.dtype}, {how.tokens:,} tokens scored, SHA-256 {how.sha256[:12]}."
    )


def _fallbacks(sentences: Sequence[str]) -> str:
    if not sentences:
        return "Everything went as asked: no fallbacks."
    lines = gathered(sentences)
    shown = [f"- {line}" for line in lines[:FALLBACKS_SHOWN]]
    if len(lines) > FALLBACKS_SHOWN:
        shown.append(f"- and {len(lines) - FALLBACKS_SHOWN} more in report.json")
    return f"Fallbacks ({len(sentences)}):\n\n" + "\n".join(shown)


def _worst(modules: Sequence[Module]) -> str:
    if not modules:
        return ""
    worst = sorted(modules, key=_badness, reverse=True)[:WORST_SHOWN]
    return f"Worst {len(worst)} of {len(modules)} modules:\n\n{_modules_table(worst)}"


def _details(report: Report) -> list[Part]:
    parts = []
    if report.evaluation is not None and report.evaluation.samples:
        parts.append(Part(sample_list(report.evaluation.samples), "Sample texts"))
    if report.modules:
        shown = report.modules[:MODULES_SHOWN]
        note = f"First {len(shown)}; all are in report.json.\n\n" if len(shown) < len(report.modules) else ""
        parts.append(Part(note + _modules_table(shown), f"All {len(report.modules)} modules"))
    if report.time.phases:
        rows = [(name.removesuffix("_s"), f"{seconds:,.2f} s") for name, seconds in report.time.phases.items()]
        parts.append(Part(_table(("phase", "wall time"), rows), "Time by phase"))
    recipe = f"````json\n{json.dumps(report.recipe, indent=2, ensure_ascii=False)}\n````"
    where = [("modelzip", report.modelzip), *((k, str(v)) for k, v in report.environment.model_dump().items())]
    if report.created is not None:
        where.append(("created", report.created))
    return [*parts, Part(recipe, "Recipe"), Part(_table(("", ""), where), "Environment")]


def _modules_table(modules: Sequence[Module]) -> str:
    rows = [
        (
            _code(module.name),
            module.method,
            module.form,
            "×".join(map(str, module.shape)),
            _number(module.error, ".4f"),
            _number(module.weight_error, ".4f"),
            module.note,
        )
        for module in modules
    ]
    return _table(("module", "method", "kept as", "shape", "output error", "weight error", "note"), rows)


def _badness(module: Module) -> float:
    """Output error where it was measured, else weight error; NaN counts as worst."""
    error = module.weight_error if module.error is None else module.error
    return math.inf if math.isnan(error) else error
