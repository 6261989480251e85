from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from modelzip.checkpoints.errors import RecipeError
from modelzip.evaluation.gates import METRICS, metrics
from modelzip.evaluation.html import neighbours_of, report_html
from modelzip.evaluation.report import report_json, report_markdown, report_schema, validate
from modelzip.evaluation.written import write_report

ROOT = Path(__file__).parents[2]
COMMENT_LIMIT = 65_536  # characters in a comment on GitHub


def sample(modules: int = 7, fallbacks: int = 1) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "modelzip": "0.1.0",
        "command": "quantize",
        "recipe": {"model": "my-model", "stages": [{"quantize": {"method": "gptq", "bits": 4}}]},
        "source": {"name": "my-model", "sha256": "a" * 64, "revision": None},
        "output": "my-model-gptq-int4",
        "plan": {
            "modules": modules,
            "bytes_before": 300,
            "bytes_after": 100,
            "memory_bytes": 1000,
            "disk_bytes": 200,
            "notes": [],
        },
        "calibration": {
            "source": "self",
            "tokens": 32768,
            "sha256": "b" * 64,
            "samples": 64,
            "seq_len": 512,
            "seed": 0,
        },
        "modules": [
            {
                "stage": 1,
                "name": f"model.layers.{index}.mlp.down_proj",
                "method": "gptq",
                "form": "4 bit, group 64",
                "bits_per_weight": 4.25,
                "shape": [576, 1536],
                "error": index / 100,
                "weight_error": 0.1,
                "note": "",
            }
            for index in range(modules)
        ],
        "fallbacks": [f"group size 128 does not divide 576 columns of module {index}" for index in range(fallbacks)],
        "evaluation": {
            "protocol": {
                "source": "wiki.txt",
                "sha256": "c" * 64,
                "windows": 40,
                "seq_len": 512,
                "stride": 512,
                "bos": False,
                "dtype": "float32",
                "tokens": 20440,
            },
            "perplexity": {"original": 20.0, "compressed": 25.0},
            "pseudo_perplexity": {"original": 5.0, "compressed": 6.0},
            "kl": 0.1234,
            "kl_p95": 0.5,
            "kl_p99": 0.9,
            "top1_agreement": 0.75,
            "top5_agreement": 0.8,
            "flips": {"lost": 60, "won": 40, "share": 0.005},
            "cosine": 0.98,
            "cosine_p05": 0.95,
            "similarity_agreement": 0.99,
            "hidden_error": 0.0321,
            **{
                name: {
                    **{"original": 0.8, "original_low": 0.78, "original_high": 0.82},
                    **{"compressed": 0.75, "low": 0.73, "high": 0.77},
                }
                for name in ("f1", "matthews", "pearson", "spearman")
            },
            "accuracy": {
                **{"original": 0.9, "original_low": 0.88, "original_high": 0.92},
                **{"compressed": 0.885, "low": 0.86, "high": 0.905, "lost": 17, "won": 4},
            },
            "speed": {
                **{"prompt_tokens": 480, "new_tokens": 32, "repetitions": 5},
                **{
                    name: {
                        "original": {"p50_ms": 20.0, "p90_ms": 22.0, "p99_ms": 30.0},
                        "compressed": {"p50_ms": 10.0, "p90_ms": 11.0, "p99_ms": 15.0},
                        "speedup": 2.0,
                    }
                    for name in ("prefill", "token")
                },
                "throughput": [{"batch_size": 4, "original": 1000.0, "compressed": 1500.0, "speedup": 1.5}],
                "memory": {
                    **{"original_rest_mb": 270.0, "compressed_rest_mb": 120.0},
                    **{"original_peak_mb": 400.0, "compressed_peak_mb": 250.0},
                },
                "energy": None,
            },
            "speculative": {
                **{"draft": "small", "texts": 8, "prompt_tokens": 64, "new_tokens": 32, "acceptance": 0.75},
                **{"tokens_per_pass": 2.5, "identical": 8, "plain_ms": 50.0, "drafted_ms": 25.0, "speedup": 2.0},
            },
            "latency": {
                name: {"batch_size": size, "examples": 64, "original_ms": 3.0, "compressed_ms": 1.5, "speedup": 2.0}
                for name, size in (("single", 1), ("batched", 32))
            },
        },
        "size": {
            "bytes_before": 300_000_000,
            "bytes_after": 100_000_000,
            "ratio": 3.0,
            "parameters": 150_000_000,
            "compressed_parameters": 100_000_000,
            "bits_per_weight": 4.25,
            "bits_per_parameter": 5.3,
        },
        "verification": {"max_logit_difference": 0.0, "tokens": 64},
        "time": {"total_s": 83.4, "phases": {"forward_s": 40.0, "solve_s": 30.0}},
        "peak_memory_mb": 740.0,
        "environment": {
            "products": "reference",
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "compressed_tensors": "0.20.0",
            "platform": "Linux x86_64",
            "cpu": "a processor",
            "device": "cpu",
            "threads": 2,
            "kernels": "compiled",
        },
    }


def fields(schema: dict[str, Any], node: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Every field of a JSON schema: its dotted path (`[]` for members of a list) and its description.

    What a stage's evaluation holds is what the whole run's does, so it is given once.
    """
    for name, field in node["properties"].items():
        here = f"{path}{name}"
        yield here, field["description"]
        if here == "stages[].evaluation":
            continue
        for choice in [field, *field.get("anyOf", [])]:
            for target, mark in ((choice, "."), (choice.get("items", {}), "[].")):
                if "$ref" in target:
                    yield from fields(schema, schema["$defs"][target["$ref"].split("/")[-1]], here + mark)


def test_a_report_survives_the_way_to_json_and_back() -> None:
    report = validate(sample())
    assert validate(json.loads(report_json(report))) == report


def test_the_same_report_gives_the_same_bytes_and_no_clock_is_read() -> None:
    first, second = validate(sample()), validate(sample())
    assert report_json(first) == report_json(second)
    assert report_markdown(first) == report_markdown(second)
    assert "created" not in json.loads(report_json(first))
    assert "created" not in report_markdown(first)


def test_the_creation_time_is_what_the_caller_gave() -> None:
    report = validate(sample() | {"created": "2026-01-02T03:04:05Z"})
    assert json.loads(report_json(report))["created"] == "2026-01-02T03:04:05Z"
    assert "2026-01-02T03:04:05Z" in report_markdown(report)


def test_nan_is_written_as_valid_json_and_read_back_as_nan() -> None:
    data = sample()
    data["evaluation"]["kl"] = math.nan
    text = report_json(validate(data)).decode()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    again = json.loads(text, parse_constant=refuse)
    assert again["evaluation"]["kl"] == "NaN"
    evaluation = validate(again).evaluation
    assert evaluation is not None
    assert evaluation.kl is not None
    assert math.isnan(evaluation.kl)


def test_every_wrong_field_is_named() -> None:
    data = sample() | {"surprise": 1, "schema_version": 2}
    del data["size"]["parameters"]
    with pytest.raises(RecipeError) as caught:
        validate(data, origin="old/report.json")
    for word in ("old/report.json", "surprise", "schema_version", "size.parameters"):
        assert word in str(caught.value)


def test_every_metric_of_a_condition_is_a_field_of_a_full_report() -> None:
    found = set(metrics(json.loads(report_json(validate(sample())))))
    assert {name for name in found if "tasks." not in name} == set(METRICS)


def test_the_markdown_states_the_headline_numbers_and_the_protocol() -> None:
    text = report_markdown(validate(sample()))
    for words in (
        "300.0 MB | 100.0 MB | 3.00 × smaller",
        "20.000 | 25.000 | +25.0 %",
        "0.1234 | nats a token",
        "75.0 %",
        "Took 83.4 s and 740 MB",
        "64 × 512 tokens of `self`, seed 0",
        "40 × 512 tokens of `wiki.txt`, stride 512, no BOS, float32",
        "group size 128 does not divide",
    ):
        assert words in text


def test_the_worst_modules_come_first_and_nan_is_the_worst_of_all() -> None:
    data = sample(modules=8)
    data["modules"][2]["error"] = math.nan
    table = report_markdown(validate(data)).split("Worst 5 of 8 modules:")[1].split("<details>")[0]
    order = [line.split("layers.")[1].split(".")[0] for line in table.splitlines() if "layers." in line]
    assert order == ["2", "7", "6", "5", "4"]


def test_the_markdown_of_a_large_model_fits_a_comment_and_says_what_it_left_out() -> None:
    text = report_markdown(validate(sample(modules=3000, fallbacks=3000)))
    assert len(text) < COMMENT_LIMIT  # measured: 29,364
    assert "and 2980 more in report.json" in text
    assert "First 300; all are in report.json." in text
    assert text.count("<details>") == text.count("</details>") == 4


def test_a_report_without_quality_or_original_says_so() -> None:
    data = sample(modules=0, fallbacks=0) | {"evaluation": None, "calibration": None, "output": None}
    data["size"] |= {"bytes_before": None, "ratio": None, "bits_per_weight": None}
    text = report_markdown(validate(data))
    assert "Quality was not measured" in text
    assert "Everything went as asked" in text
    assert "Calibration" not in text
    assert "Worst" not in text


def test_a_model_without_logits_shows_how_far_its_hidden_states_are_and_no_perplexity() -> None:
    data = sample()
    nothing = {"perplexity": {"original": None, "compressed": None}, "kl": None, "top1_agreement": None}
    data["evaluation"] |= nothing
    text = report_markdown(validate(data))
    assert "| Difference of the last hidden states |  | 0.0321 | relative |" in text
    for name in ("Perplexity", "KL to", "Top-1"):
        assert name not in text
    assert metrics(data)["hidden_error"] == 0.0321
    assert not {"perplexity", "kl"} & set(metrics(data))


def test_a_pipe_in_a_note_does_not_break_the_table() -> None:
    data = sample(modules=1)
    data["modules"][0]["note"] = "a|b"
    assert "a\\|b" in report_markdown(validate(data))


def test_the_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    report = validate(sample())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}", encoding="utf-8")
    paths = write_report(tmp_path / "out", report)
    assert sorted((tmp_path / "out").iterdir()) == sorted([tmp_path / "out" / "config.json", *paths])
    assert paths[0].read_bytes() == report_json(report)
    assert paths[1].read_text(encoding="utf-8") == report_markdown(report)
    assert paths[2].read_text(encoding="utf-8") == report_html(report)


class Page(HTMLParser):
    """What a page shows, which elements it has, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.shown += data


def test_the_page_shows_what_the_markdown_says_and_fetches_nothing() -> None:
    report = validate(sample())
    text = report_html(report)
    page = Page(text)
    assert [link for link in page.fetched if not link.startswith("#")] == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert re.findall(r"url\((?!#)", text) == []
    for figure in ("20.000", "25.000", "88.50 % (86.0 to 90.5)", "Reading 480 tokens", "Joules a token written"):
        assert figure in page.shown, figure
    assert page.tags.count("svg") == 2
    assert page.tags.count("details") == 4
    for summary in ("All 7 modules", "Time by phase", "Recipe", "Environment"):
        assert summary in page.shown
    assert "perplexity" in page.shown
    assert "relative error" in page.shown  # text of a chart stays text
    assert "#010203" not in text


def test_the_same_report_gives_the_same_page() -> None:
    assert report_html(validate(sample())) == report_html(validate(sample()))


def test_what_looks_like_html_is_shown_as_text() -> None:
    data = sample()
    data["fallbacks"] = ["<script>alert(1)</script>"]
    data["source"]["name"] = "<b>model</b>"
    data["modules"][0]["note"] = "<img src=x onerror=alert(1)>"
    page = Page(report_html(validate(data)))
    assert not {"script", "img", "b"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.shown


def test_runs_on_the_same_model_and_evaluation_beside_it_are_shown(tmp_path: Path) -> None:
    def put(name: str, **changes: Any) -> None:
        data = sample()
        data["size"]["bytes_after"] = changes.get("size", 80_000_000)
        data["evaluation"]["accuracy"]["compressed"] = changes.get("accuracy", 0.8)
        data["source"]["sha256"] = changes.get("source", data["source"]["sha256"])
        data["evaluation"]["protocol"]["sha256"] = changes.get("text", data["evaluation"]["protocol"]["sha256"])
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_bytes(report_json(validate(data)))

    put("here")
    put("small", size=50_000_000, accuracy=0.7)
    put("other-model", source="d" * 64)
    put("other-text", text="e" * 64)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "report.json").write_text('{"schema_version": 9}')
    report = validate(sample())
    found = neighbours_of(tmp_path / "here", report)
    assert [(one.name, one.nbytes, one.quality) for one in found] == [("small", 50_000_000, 0.7)]
    page = Page(report_html(report, found))
    assert page.tags.count("svg") == 3
    assert "small" in page.shown
    assert "this run" in page.shown


def test_a_page_needs_neither_modules_nor_an_evaluation() -> None:
    data = sample()
    data["modules"], data["evaluation"], data["size"]["bytes_before"], data["size"]["ratio"] = [], None, None, None
    page = Page(report_html(validate(data)))
    assert page.tags.count("svg") == 1
    assert "Quality was not measured in this run." in page.shown


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1000, 1), (400, 1), (1000, 0)], ids=["wide", "phone", "dark"])
def test_a_browser_draws_the_page(width: int, scheme: int, tmp_path: Path) -> None:
    """Headless: the page isn't empty, has the background of its scheme, and is no wider than the window."""
    from PIL import Image

    (tmp_path / "report.html").write_text(report_html(validate(sample())), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    options += [f"--window-size={width},3000", f"--screenshot={tmp_path / 'page.png'}"]
    subprocess.run([str(BROWSER), *options, (tmp_path / "report.html").as_uri()], check=True, capture_output=True)
    drawn = Image.open(tmp_path / "page.png").convert("RGB")
    corner = drawn.getpixel((2, 2))
    assert isinstance(corner, tuple)
    assert (min(corner) > 240) if scheme else (max(corner) < 60)
    colours = {colour for _, colour in drawn.getcolors(1 << 24) or []}
    assert (0x2A, 0x7D, 0xE1) in colours  # the bars


def test_every_field_is_documented_in_the_words_of_the_schema() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    schema = report_schema()
    rows = [f"| `{path}` | {description} |" for path, description in fields(schema, schema)]
    assert len(rows) > 60
    assert [row for row in rows if row not in page] == []
    assert page.count("\n| `") == len(rows) + len(METRICS)


def test_reports_and_conditions_need_no_torch() -> None:
    code = "import sys, modelzip.evaluation.report, modelzip.evaluation.gates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_markdown_of_a_classifier_states_accuracies_with_intervals_and_times() -> None:
    data = sample()
    data["evaluation"] |= {"perplexity": {"original": None, "compressed": None}, "hidden_error": None}
    data["evaluation"]["protocol"] = {
        **{"source": "dev.tsv", "sha256": "d" * 64, "examples": 872, "cut": 3, "seq_len": 128, "dtype": "float32"}
    }
    words = report_markdown(validate(data))
    assert "| Accuracy (95 % interval) | 90.00 % (88.0 to 92.0) | 88.50 % (86.0 to 90.5) | -1.50 points |" in words
    assert "| Time an example, 32 at once | 3.00 ms | 1.50 ms | 2.00 × faster |" in words
    assert "872 labelled examples of `dev.tsv`, 3 of them cut at 128 tokens, float32, SHA-256 dddddddddddd." in words
    assert "nats an example" in words
    assert "None" not in words


@pytest.mark.parametrize(
    ("ratio", "told"),
    [(2.5, "2.50 × smaller"), (0.2, "5.00 × larger"), (1.004, "the same size"), (0.996, "the same size"), (0.0, "")],
)
def test_a_result_that_is_larger_is_called_larger(ratio: float, told: str) -> None:
    data = sample()
    data["size"]["ratio"] = ratio
    assert f"100.0 MB | {told} |" in report_markdown(validate(data))


def test_a_result_that_is_slower_is_called_slower() -> None:
    data = sample()
    data["evaluation"]["latency"]["batched"] |= {"speedup": 0.5}
    assert "| 2.00 × slower |" in report_markdown(validate(data))


def exits(speedup: float) -> list[dict[str, Any]]:
    timed = {"batch_size": 1, "examples": 64, "original_ms": 3.0, "compressed_ms": 2.0, "speedup": speedup}
    latency = {"single": timed, "batched": {**timed, "batch_size": 32}}
    return [{"threshold": 0.5, "accuracy": 0.9, "low": 0.8, "high": 0.95, "layers": 1.5, "latency": latency}]


def test_exits_that_are_slower_than_the_whole_model_are_called_slower() -> None:
    data = sample()
    data["evaluation"]["exits"] = exits(0.5)
    assert "| 2.00 | 2.00 × slower |" in report_markdown(validate(data))


@pytest.mark.parametrize(
    ("curve", "told"),
    [
        ([{"step": 2, "epoch": 1.0, "loss": 0.5}], "1.0 epochs; loss 0.5000 on average."),
        (
            [{"step": 2, "epoch": 1.0, "loss": 0.5}, {"step": 4, "epoch": 2.0, "loss": 0.25}],
            "1.0 epochs; loss 0.5000 at first, 0.2500 at last.",
        ),
    ],
)
def test_a_loss_that_was_logged_once_is_told_once(curve: list[dict[str, Any]], told: str) -> None:
    details = {"steps": 4, "epochs": 1.0, "stopped_early": False, "kept": None, "curve": curve}
    details |= {"first_loss": curve[0]["loss"], "last_loss": curve[-1]["loss"]}
    data = sample()
    data["stages"] = [
        {"kind": "distill", "method": "labels", "bytes_after": 2, "seconds": 1, "evaluation": None, "details": details}
    ]
    assert told in report_markdown(validate(data))


def test_the_markdown_states_speed_memory_and_that_energy_was_not_measured() -> None:
    data = sample()
    text = report_markdown(validate(data))
    assert (
        "| Reading 480 tokens, ms at p50, p90, p99 | 20.0 / 22.0 / 30.0 | 10.0 / 11.0 / 15.0 | 2.00 × faster |" in text
    )
    assert "| Tokens read a second, 4 texts at once | 1,000 | 1,500 | 1.50 × faster |" in text
    assert "| Memory at most while reading, MB | 400 | 250 |  |" in text
    assert "| Joules a token written |  | not measured | this machine doesn't tell |" in text
    assert "| with the draft `small` | without | with |  |" in text
    assert "| Each token written, ms | 50.0 | 25.0 | 2.00 × faster |" in text
    assert "| 1 | 2.50 | 75.0% of the draft's tokens taken, 8 of 8 texts the same |" in text
    data["evaluation"]["speed"] |= {"energy": {"original_joules": 1.25, "compressed_joules": 0.5}, "memory": None}
    text = report_markdown(validate(data))
    assert "| Joules a token written | 1.25 | 0.5 |  |" in text
    assert "Memory" not in text
