"""`modelzip quantize` from command line to report, on pico models of every kind of input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelzip.evaluation.report import report_markdown, validate

SELF = ("--method", "gptq", "--bits", "4", "--group-size", "32", "--samples", "4", "--seq-len", "32")
GATED = (*SELF, "--json", "--fail-if", "kl > 1e-9")


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_llama) -> Path:
    """A folder with `my-model`: bf16, three blocks, several shards."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "my-model", layers=3, dtype="bfloat16", max_shard_size="100KB")
    assert len(list((folder / "my-model").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def failed_gate(place, modelzip) -> SimpleNamespace:
    """The process with its exit code, and the folder it wrote: no output is named, and the condition holds."""
    done = modelzip.start("quantize", "my-model", *GATED, cwd=place).wait()
    return SimpleNamespace(done=done, folder=place / "my-model-gptq-4bit", source=place / "my-model")


def logits(folder: Path):
    """What plain transformers computes from a folder, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(2, 66).reshape(2, 32)).logits


def test_a_condition_that_holds_is_exit_code_3_and_one_sentence_with_the_value_found(failed_gate):
    assert failed_gate.done.code == 3
    assert len(failed_gate.done.errors) == 1
    assert '"kl > 1e-9": kl is ' in failed_gate.done.errors[0]


def test_without_output_the_folder_is_named_after_model_method_and_bits_and_kept_though_the_gate_failed(failed_gate):
    assert (failed_gate.folder / "config.json").is_file()
    assert [path.name for path in failed_gate.folder.parent.iterdir() if path.name.startswith(".")] == []


def test_json_prints_the_report_and_nothing_else_on_standard_output(failed_gate):
    printed = json.loads(failed_gate.done.out)
    assert printed == json.loads((failed_gate.folder / "report.json").read_text())


def test_the_report_fits_its_schema_and_says_what_was_done(failed_gate):
    report = validate(json.loads((failed_gate.folder / "report.json").read_text()))
    assert report.command == "quantize"
    assert report.output == "my-model-gptq-4bit"
    assert (report.calibration.source, report.calibration.samples, report.calibration.seq_len) == ("self", 4, 32)
    assert {(module.method, module.form) for module in report.modules} == {("gptq", "4 bit, group 32")}
    assert len(report.modules) == 3 * 7
    assert report.evaluation.kl > 1e-9
    assert report.size.bytes_after == sum(
        file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        for file in failed_gate.folder.glob("*.safetensors")
    )
    assert report.verification.max_logit_difference < 1e-3


def test_the_report_for_people_is_made_of_the_one_for_machines(failed_gate):
    report = validate(json.loads((failed_gate.folder / "report.json").read_text()))
    assert (failed_gate.folder / "report.md").read_text(encoding="utf-8") == report_markdown(report)


def test_all_side_files_are_carried_along_as_they_were(failed_gate):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (failed_gate.folder / name).read_bytes() == (failed_gate.source / name).read_bytes(), name
    assert (failed_gate.folder / "LICENSE").read_bytes() == (failed_gate.source / "LICENSE").read_bytes()
    card = (failed_gate.folder / "README.md").read_text(encoding="utf-8")
    assert card.endswith((failed_gate.source / "README.md").read_text(encoding="utf-8"))


def test_the_output_opens_in_plain_transformers_close_to_the_original(failed_gate):
    config = json.loads((failed_gate.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    ours, original = logits(failed_gate.folder), logits(failed_gate.source)
    assert 0 < (ours - original).norm() / original.norm() < 0.3


@pytest.fixture(scope="module")
def again(place, failed_gate, modelzip) -> Callable[[str], Path]:
    """again(seed) -> the output of the same run with a seed (0 is the default), up to its reopening."""
    running = []
    for seed in ("0", "1"):
        command = ("quantize", "my-model", *GATED, "--seed", seed, "--output", f"seed-{seed}")
        running.append(modelzip.fork(*command, cwd=place, strike_at_process=2))
    for one in running:
        one.wait()
    return lambda seed: place / f"seed-{seed}"


def test_the_same_seed_gives_the_same_bytes(again, failed_gate, hashes):
    assert hashes(again("0")) == hashes(failed_gate.folder)


def test_another_seed_gives_other_calibration_text_and_other_weights(again, hashes):
    one, other = hashes(again("0")), hashes(again("1"))
    assert one.keys() == other.keys()
    assert one["config.json"] == other["config.json"]
    assert one["model-00001-of-00004.safetensors"] != other["model-00001-of-00004.safetensors"]


def test_dry_run_prints_the_plan_of_every_module_and_writes_nothing(place, modelzip, tmp_path):
    done = modelzip.fork("quantize", place / "my-model", *SELF, "--dry-run", cwd=tmp_path).wait()
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if "model.layers." in line]
    assert len(rows) == 3 * 7
    assert all("gptq" in row and " 4 " in row and " 32 " in row for row in rows)
    assert "memory needed" in done.out
    assert "disk needed" in done.out
    assert list(tmp_path.iterdir()) == []


def test_the_size_that_a_dry_run_predicts_is_the_size_that_is_written(place, failed_gate, modelzip, tmp_path):
    done = modelzip.fork("quantize", place / "my-model", *SELF, "--dry-run", "--json", cwd=tmp_path).wait()
    (plan,) = json.loads(done.out)["plans"]
    written = json.loads(failed_gate.done.out)["size"]
    assert (plan["bytes_before"], plan["bytes_after"]) == (written["bytes_before"], written["bytes_after"])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, save_llama, save_gguf, write_text, modelzip) -> Callable[[str], SimpleNamespace]:
    """kinds(name) -> done and folder of runs on other inputs, side by side: a recipe, fp16, GGUF."""
    place = tmp_path_factory.mktemp("kinds")
    save_llama(place / "original", layers=2)
    save_llama(place / "halves", layers=2, dtype="float16", max_shard_size="100KB")
    save_gguf(place / "tiny.Q4_0.gguf")
    write_text(place / "wiki.txt", 20_000)
    (place / "modelzip.yaml").write_text(
        "model: original\noutput: three\ncalibration: {source: wiki.txt, samples: 4, seq_len: 32}\n"
        "stages:\n  - quantize: {method: gptq, bits: 3, group_size: 32}\nevaluate: {windows: 2, seq_len: 32}\n"
    )
    rtn = ("--method", "rtn", "--bits", "8", "--group-size", "32", "--asymmetric", "--no-evaluate")
    running = {
        "three": modelzip.fork("quantize", cwd=place),
        "halves-rtn-8bit": modelzip.fork("quantize", "halves", *rtn, cwd=place),
    }
    done = {name: one.wait() for name, one in running.items()}
    done["tiny-rtn-8bit"] = modelzip.fork("quantize", "tiny.Q4_0.gguf", *rtn, cwd=place).wait()
    return lambda name: SimpleNamespace(done=done[name], folder=place / name)


def test_without_a_model_the_recipe_of_the_current_folder_is_taken(kinds):
    three = kinds("three")
    assert three.done.code == 0, three.done.err
    report = validate(json.loads((three.folder / "report.json").read_text()))
    assert report.source.name == "original"
    assert (report.calibration.source, report.evaluation.protocol.source) == (
        "wiki.txt",
        "wiki.txt, held back from calibration",
    )


def test_three_bits_go_through_the_layout_of_modelzip_and_open_once_it_is_imported(kinds):
    import modelzip.weights  # noqa: F401

    three = kinds("three")
    assert json.loads((three.folder / "config.json").read_text())["quantization_config"]["quant_method"] == "modelzip"
    ours, original = logits(three.folder), logits(three.folder.with_name("original"))
    assert 0 < (ours - original).norm() / original.norm() < 0.6


def test_a_checkpoint_in_fp16_shards_ends_nearly_lossless_at_eight_bits(kinds):
    halves = kinds("halves-rtn-8bit")
    assert halves.done.code == 0, halves.done.err
    ours, original = logits(halves.folder), logits(halves.folder.with_name("halves"))
    assert 0 < (ours - original).norm() / original.norm() < 0.02


def test_a_gguf_file_is_quantized_into_a_folder_named_after_it(kinds):
    tiny = kinds("tiny-rtn-8bit")
    assert tiny.done.code == 0, tiny.done.err
    assert "tokenizer.json" in {file.name for file in tiny.folder.iterdir()}
    assert len(validate(json.loads((tiny.folder / "report.json").read_text())).modules) == 7


def test_without_json_the_result_is_a_table_with_the_output_and_the_progress_is_elsewhere(kinds):
    done = kinds("three").done
    assert "KL to the original" in done.out
    assert "output: three" in done.out
    assert "quantize 2/2" in done.err
    assert "quantize 2/2" not in done.out
