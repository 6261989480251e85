"""Tasks of lm-evaluation-harness: its answers are those of the models that are compared, on data of any folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modelzip.checkpoints.errors import CalibrationError, GateError, RecipeError
from modelzip.evaluation.gates import check_gates, metrics, parse_gates
from modelzip.evaluation.report import report_markdown, validate
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.recipes.schema import Evaluation

TASK = """
task: ending
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def tasks(prose: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task `ending`, of twelve texts with two endings each, and text.txt."""
    folder = tmp_path_factory.mktemp("tasks")
    words = prose(3000, seed=7).split()
    (folder / "text.txt").write_text(prose(200, seed=5), encoding="utf-8")
    rows = [
        {
            "text": " ".join(words[12 * n : 12 * n + 8]),
            "choices": [words[12 * n + 8], words[12 * n + 9] + " " + words[12 * n + 10]],
            "label": n % 2,
        }
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "ending.yaml").write_text(TASK.replace("FILE", str(folder / "rows.jsonl")), encoding="utf-8")
    return folder


def report_of(model: Path, against: Path | None, folder: Path, progress: Any, **changes: Any) -> dict[str, Any]:
    asked = {"tasks": ("ending",), "task_path": str(folder), "samples": 0, **changes}
    return evaluate_models(
        str(model),
        against=None if against is None else str(against),
        evaluation=Evaluation(data=str(folder / "text.txt"), seq_len=16, windows=2, **asked),
        **{"revision": None, "device": "cpu", "dtype": "float32", "progress": progress},
    )


@torch.no_grad()
def share_right(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Of how many texts the likelier ending is the right one, by hand."""
    import modelzip.weights  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in rows:
        scores = []
        for ending in row["choices"]:
            start = len(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
            ids = torch.tensor(tokenizer(f"{row['text']} {ending}", add_special_tokens=False)["input_ids"])
            each = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])
            scores.append(float(each[start - 1 :].sum()))
        right += scores.index(max(scores)) == row["label"]
    return right / len(rows)


def test_both_models_get_the_share_that_a_computation_by_hand_gives(speaking, rounded, tasks, progress):
    pytest.importorskip("lm_eval")
    report = report_of(rounded, speaking("llama"), tasks, progress)
    (found,) = report["evaluation"]["tasks"]
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    assert (found["task"], found["metric"]) == ("ending", "acc")
    assert found["examples"] == 12
    assert found["original"] == pytest.approx(share_right(speaking("llama"), rows))
    assert found["compressed"] == pytest.approx(share_right(rounded, rows))
    assert found["original_error"] > 0
    assert "| `ending`, acc | 0." in report_markdown(validate(report))


def test_a_condition_may_speak_of_a_task(speaking, rounded, tasks, progress):
    pytest.importorskip("lm_eval")
    limit = ("tasks.ending.acc < 0.5 * original.tasks.ending.acc", "tasks.ending.acc > 101%")
    report = report_of(rounded, speaking("llama"), tasks, progress, fail_if=limit)
    (row,) = report["evaluation"]["tasks"]
    values = metrics(report)
    assert values["tasks.ending.acc"] == row["compressed"]
    assert values["original.tasks.ending.acc"] == row["original"]
    check_gates(parse_gates(("tasks.ending.acc < 0",)), values)
    with pytest.raises(GateError, match=r"tasks\.ending\.acc is"):
        check_gates(parse_gates(("tasks.ending.acc >= 0%",)), values)
    with pytest.raises(RecipeError, match=r"needs the task other: name it in evaluate\.tasks"):
        report_of(rounded, speaking("llama"), tasks, progress, fail_if=("tasks.other.acc < 0.5",))


def test_a_limit_asks_fewer_examples(speaking, tasks, progress):
    pytest.importorskip("lm_eval")
    (found,) = report_of(speaking("llama"), None, tasks, progress, task_limit=3)["evaluation"]["tasks"]
    assert (found["examples"], found["original"]) == (3, None)


def test_unknown_tasks_and_data_that_are_not_there_are_told_before_any_work(speaking, tasks, progress, tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(RecipeError, match=r"there is no task endin; did you mean ending\?"):
        report_of(speaking("llama"), None, tasks, progress, tasks=("endin",))
    (tmp_path / "ending.yaml").write_text(TASK.replace("FILE", "/nowhere.jsonl"), encoding="utf-8")
    (tmp_path / "text.txt").write_bytes((tasks / "text.txt").read_bytes())
    with pytest.raises(CalibrationError, match="the data of ending can't be read"):
        report_of(speaking("llama"), None, tmp_path, progress)


def test_a_harness_that_is_not_installed_is_told(speaking, tasks, progress, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("modelzip.pipeline.tasks.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs lm-evaluation-harness: pip install 'modelzip\[tasks\]'"):
        report_of(speaking("llama"), None, tasks, progress)
