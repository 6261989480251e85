"""Calibration text: every kind of file gives the same windows, nothing is dropped, and what can't be used is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from modelzip.checkpoints.errors import CalibrationError, ModelzipError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.pipeline import selftext
from modelzip.pipeline.calibrate import calibration_windows
from modelzip.pipeline.run import plan_recipe, run_recipe
from modelzip.pipeline.text import read_windows
from modelzip.recipes.load import parse_recipe
from modelzip.recipes.schema import Calibration


@pytest.fixture(scope="module")
def tokenizer(speaking) -> Any:
    return AutoTokenizer.from_pretrained(speaking("llama"))


@pytest.fixture(scope="module")
def documents(prose) -> list[str]:
    """Of very different lengths, some much shorter than a window."""
    return [prose(length, seed=length) for length in (1, 70, 3, 200, 15, 16, 17, 5)]


def text(file: Path, documents: list[str], field: str) -> None:
    file.write_text("\n\n".join(documents), encoding="utf-8")


def jsonl(file: Path, documents: list[str], field: str) -> None:
    lines = [json.dumps({"title": "a title", field: document}) for document in documents]
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def parquet(file: Path, documents: list[str], field: str) -> None:
    table = pyarrow.table({"title": ["a title"] * len(documents), field: documents})
    pyarrow.parquet.write_table(table, file, row_group_size=3)


WRITERS: dict[str, Callable[[Path, list[str], str], None]] = {".txt": text, ".jsonl": jsonl, ".parquet": parquet}


def sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("field", ["text", "body"])
@pytest.mark.parametrize("suffix", list(WRITERS))
def test_documents_are_joined_by_blank_lines_and_cut_without_dropping_any(
    tokenizer, documents, spell, tmp_path, suffix, field
):
    file = tmp_path / f"data{suffix}"
    WRITERS[suffix](file, documents, field)
    whole = spell("\n\n".join(documents))
    windows = len(whole) // 16
    found = read_windows(str(file), tokenizer, field=field, split="train", count=windows, seq_len=16)
    assert torch.equal(found.tokens.flatten(), whole[: windows * 16])
    assert found.sha256 == sha256(whole[: windows * 16])
    with pytest.raises(CalibrationError, match=f"holds {len(whole)} tokens, enough for {windows} windows of 16"):
        read_windows(str(file), tokenizer, field=field, split="train", count=windows + 1, seq_len=16)


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_reading_on_until_there_is_enough_gives_the_windows_of_the_whole_text(tmp_path, suffix):
    """Words of 30 characters: the first guess at how much text is needed is far too little."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [f"{number:030d}" for number in range(1000)]
    raw = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    raw.pre_tokenizer = WhitespaceSplit()
    file = tmp_path / f"data{suffix}"
    WRITERS[suffix](file, [" ".join(words[start : start + 7]) for start in range(0, 1000, 7)], "text")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    found = read_windows(str(file), tokenizer, field="text", split="train", count=40, seq_len=20)
    assert torch.equal(found.tokens.flatten(), torch.arange(800))


def test_no_special_token_is_put_into_the_windows(tokenizer, tmp_path):
    (tmp_path / "data.txt").write_text("abc" * 20, encoding="utf-8")
    found = read_windows(str(tmp_path / "data.txt"), tokenizer, field="text", split="train", count=15, seq_len=4)
    assert set(found.tokens.flatten().tolist()) == {4, 5, 6}


@pytest.fixture(scope="module")
def measured_run(speaking, compress, prose, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A text, and the report of a run that was calibrated on its first and evaluated on its next windows."""
    folder = tmp_path_factory.mktemp("calibrated")
    whole = prose(16 * 11 + 5)
    (folder / "text.txt").write_text(whole, encoding="utf-8")
    calibration = {"source": str(folder / "text.txt"), "samples": 8}
    evaluate = {"windows": 40}
    result = compress(
        speaking("llama"), folder / "out", {"method": "gptq"}, calibration=calibration, evaluate=evaluate, seed=3
    )
    return whole, result.report


def test_the_report_states_source_count_and_hash_of_the_calibration_tokens(measured_run, spell):
    whole, report = measured_run
    section = report["calibration"]
    assert section["source"].endswith("text.txt")
    assert (section["samples"], section["seq_len"], section["tokens"], section["seed"]) == (8, 16, 128, 3)
    assert section["sha256"] == sha256(spell(whole[:128]))


def test_the_windows_after_the_calibration_windows_are_the_evaluation_windows(measured_run, spell):
    whole, report = measured_run
    protocol = report["evaluation"]["protocol"]
    assert protocol["windows"] == 3  # of the 40 asked for: all that is left of 11
    assert protocol["tokens"] == 3 * 16
    assert protocol["sha256"] == sha256(spell(whole[128:176]))
    assert protocol["source"].endswith("text.txt, held back from calibration")


def windows_of(model: Path, calibration: Calibration, *, needed: bool = True, held_back: int = 0, seed: int = 0) -> Any:
    checkpoint = Checkpoint.open(str(model))
    return calibration_windows(
        calibration,
        checkpoint,
        skeleton(checkpoint),
        seed=seed,
        needed=needed,
        held_back=held_back,
        device=torch.device("cpu"),
        progress=SimpleNamespace(step=lambda *_: None),
    )


SELF = Calibration(source="self", samples=20, seq_len=8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_self_is_the_same_for_a_seed_and_other_for_another(saved, here, name):
    some, same, other = (here(lambda s=seed: windows_of(saved(name), SELF, seed=s))[0] for seed in (1, 1, 2))
    assert some.tokens.shape == (20, 8)
    assert torch.equal(some.tokens, same.tokens)
    assert not torch.equal(some.tokens, other.tokens)
    assert some.source == ("self" if name in ("llama", "gpt2") else "self (even draws)")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_held_back_neither_changes_nor_repeats_the_calibration_windows(saved, here, name):
    alone, none = here(lambda: windows_of(saved(name), SELF))
    nothing, same = here(lambda: windows_of(saved(name), SELF, needed=False, held_back=8))
    some, held = here(lambda: windows_of(saved(name), SELF, held_back=8))
    assert none is None
    assert nothing is None
    assert torch.equal(alone.tokens, some.tokens)
    assert torch.equal(same.tokens, held.tokens)
    assert held.tokens.shape == (8, 8)
    assert not set(map(tuple, held.tokens.tolist())) & set(map(tuple, some.tokens.tolist()))


def test_the_models_own_text_follows_its_own_distribution(saved, models, here):
    """The likelihood of text that the model wrote is far above that of even draws."""
    model = models.FAMILIES["llama"].build()
    calibration = Calibration(source="self", samples=64, seq_len=16)
    written = here(lambda: windows_of(saved("llama"), calibration))[0].tokens
    drawn = torch.randint(models.VOCABULARY, written.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, chance = (float(model(tokens, labels=tokens).loss) for tokens in (written, drawn))
    assert own < chance - 0.5  # measured: 4.06 and 5.12


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_the_text_is_what_the_model_gives_run_anew_on_every_prefix(models, name, monkeypatch):
    model = models.FAMILIES[name].build()
    monkeypatch.setattr(selftext, "most_rows", lambda *_: 3)
    reports: list[tuple[int, int]] = []
    written = selftext.write(model, counts=[4, 0, 2], seq_len=12, seed=1, report=lambda *step: reports.append(step))
    naive = []
    for part, groups in ((0, (2, 2)), (2, (2,))):
        generator = selftext.chance(1, part)
        for count in groups:
            tokens = torch.randint(models.VOCABULARY, (count, 1), generator=generator)
            while tokens.shape[1] < 12:
                logits = model(input_ids=tokens, use_cache=False).logits[:, -1]
                tokens = torch.cat([tokens, selftext.draw(logits, generator)], 1)
            naive.append(tokens)
    assert [part.shape[0] for part in written] == [4, 0, 2]
    assert torch.equal(torch.cat(written), torch.cat(naive))
    assert reports == [(done, 33) for done in range(1, 34)]


def test_a_model_that_hands_out_no_cache_is_refused_before_it_takes_hours(models):
    model = models.FAMILIES["llama"].build()
    model.config.use_cache = False
    with pytest.raises(SystemExit, match="it hands out no cache"):
        selftext.write(model, counts=[2], seq_len=6, seed=0, report=lambda *_: None)


def test_tokens_are_drawn_as_often_as_the_logits_say():
    wanted = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    logits = wanted.log().repeat(20_000, 1)
    drawn = selftext.draw(logits, torch.Generator().manual_seed(0)).flatten()
    found = drawn.bincount(minlength=5) / len(drawn)
    assert found[1] == 0
    assert torch.allclose(found, wanted, atol=4 * (0.25 / len(drawn)) ** 0.5)


def test_windows_are_written_side_by_side_as_far_as_memory_goes(models, monkeypatch):
    model = models.FAMILIES["llama"].build()
    config = model.config
    row = 12 * 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    monkeypatch.setattr(selftext, "CACHE_BYTES", 50_000 * row)
    assert selftext.most_rows(model, 12) == 50_000
    monkeypatch.setattr(selftext, "CACHE_BYTES", 0)
    assert selftext.most_rows(model, 12) == sum(p.nbytes for p in model.parameters()) // row


def test_even_draws_leave_special_tokens_out(saved, here):
    found = here(lambda: windows_of(saved("bert"), Calibration(source="self", samples=64, seq_len=64)))[0]
    assert set(found.tokens.flatten().tolist()) == set(range(3, 96))  # 0 pads, 1 begins, 2 ends


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


BROKEN = {
    "an empty file": ("data.txt", "", "{file} is empty: give a file with text."),
    "an empty jsonl": ("data.jsonl", "", "{file} is empty: give a file with text."),
    "a field that isn't there": (
        *("data.jsonl", '{"title": "a", "body": "b"}\n'),
        "{file} line 1 has no text in the field 'text'; it has title, body: name one by --field.",
    ),
    "a field that isn't text": (
        *("data.jsonl", '{"text": 5, "body": "b"}\n'),
        "{file} line 1: the field 'text' holds int, not text.",
    ),
    "a line that isn't an object": (
        *("data.jsonl", '["text"]\n'),
        "{file} line 1 has no text in the field 'text'; it has list: name one by --field.",
    ),
    "a line that isn't JSON": ("data.jsonl", '{"text": "b"\n', "{file} line 1 isn't JSON: Expecting ',' delimiter."),
    "another kind of file": (
        *("data.json", "text\nabc\n"),
        "{file} is of no known kind: text comes from .txt, .jsonl, .parquet, .csv or .tsv files.",
    ),
    "text that isn't UTF-8": (
        *("data.txt", b"abc \xff def"),
        "{file} isn't UTF-8 text: invalid start byte at byte 4; convert it, or give another file.",
    ),
    "a line that isn't UTF-8": (
        *("data.jsonl", b'{"text": "\xff"}\n'),
        "{file} line 1 isn't UTF-8 text: invalid start byte at byte 10; convert it, or give another file.",
    ),
}


@pytest.mark.parametrize(("name", "content", "sentence"), BROKEN.values(), ids=BROKEN)
def test_unusable_text_is_one_sentence_before_anything_is_done(saved, recipe_of, tmp_path, name, content, sentence):
    file = write(tmp_path, name, content)
    recipe = recipe_of(saved("llama"), {"method": "gptq"}, calibration={"source": str(file)})
    with pytest.raises(CalibrationError) as caught:
        plan_recipe(recipe, output=tmp_path / "out")
    assert str(caught.value) == sentence.format(file=file)


def test_a_parquet_file_without_the_column_names_those_it_has(saved, recipe_of, tmp_path):
    parquet(tmp_path / "data.parquet", ["abc"], "body")
    recipe = recipe_of(
        saved("llama"), {"method": "gptq"}, calibration={"source": str(tmp_path / "data.parquet"), "field": "txt"}
    )
    with pytest.raises(CalibrationError, match=r"has no column 'txt'; it has title, body: name one by --field\.$"):
        plan_recipe(recipe, output=tmp_path / "out")


def test_a_damaged_parquet_file_is_one_sentence(saved, recipe_of, tmp_path):
    file = write(tmp_path, "data.parquet", "no parquet at all")
    recipe = recipe_of(saved("llama"), {"method": "gptq"}, calibration={"source": str(file)})
    with pytest.raises(CalibrationError, match=r"data\.parquet isn't a parquet file: [^\n]*[^.]\.$"):
        plan_recipe(recipe, output=tmp_path / "out")


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet"])
def test_a_file_that_is_not_there_is_one_sentence(saved, recipe_of, tmp_path, name):
    recipe = recipe_of(saved("llama"), {"method": "gptq"}, calibration={"source": str(tmp_path / name)})
    with pytest.raises(CalibrationError, match=rf"^There is no file [^\n]*{name}: check the path [^\n]*\.$"):
        plan_recipe(recipe, output=tmp_path / "out")


def test_a_bad_line_after_good_ones_is_told_with_its_number(speaking, compress, tmp_path):
    file = write(tmp_path, "data.jsonl", '{"text": "abc"}\n' * 6 + '{"body": "abc"}\n')
    with pytest.raises(CalibrationError, match=r"data\.jsonl line 7 has no text in the field 'text'; it has body"):
        compress(speaking("llama"), tmp_path / "out", {"method": "gptq"}, calibration={"source": str(file)})


@pytest.mark.parametrize("content", [" \n \n", "\n"])
def test_a_file_of_blanks_holds_no_text(speaking, compress, tmp_path, content):
    file = write(tmp_path, "data.txt", content)
    with pytest.raises(CalibrationError, match=r"data\.txt holds no text: give a file with at least 128 tokens\.$"):
        compress(speaking("llama"), tmp_path / "out", {"method": "gptq"}, calibration={"source": str(file)})


def test_text_that_is_too_short_says_how_much_there_is_and_how_much_was_asked_for(speaking, compress, tmp_path):
    file = write(tmp_path, "data.txt", "a" * 127)
    with pytest.raises(CalibrationError) as caught:
        compress(speaking("llama"), tmp_path / "out", {"method": "gptq"}, calibration={"source": str(file)})
    assert str(caught.value) == (
        f"{file} holds 127 tokens, enough for 7 windows of 16; 8 were asked for: "
        "give more text, or lower --samples or --seq-len."
    )
    assert not (tmp_path / "out").exists()


def test_windows_longer_than_the_model_takes_are_refused(saved, compress, tmp_path):
    with pytest.raises(CalibrationError, match=r"^--seq-len is 65, but the model takes at most 64 tokens\.$"):
        compress(saved("llama"), tmp_path / "out", {"method": "gptq"}, calibration={"seq_len": 65})


def test_windows_of_no_stated_length_are_as_long_as_a_short_model_takes(saved, here, progress, tmp_path):
    stages = [{"quantize": {"method": "gptq", "group_size": 16}}]
    data = {"model": str(saved("llama")), "stages": stages, "calibration": {"samples": 2}, "evaluate": {"windows": 1}}
    report = here(lambda: run_recipe(parse_recipe(data, "test"), output=tmp_path / "out", progress=progress)).report
    assert report["calibration"]["seq_len"] == 64
    assert report["evaluation"]["protocol"]["seq_len"] == 64


def test_a_model_without_a_tokenizer_can_calibrate_on_its_own_text_only(saved, compress, prose, tmp_path):
    file = write(tmp_path, "data.txt", prose(500))
    with pytest.raises(ModelzipError, match=r"has no tokenizer that transformers can open [^\n]*--calibration self\.$"):
        compress(saved("llama"), tmp_path / "out", {"method": "gptq"}, calibration={"source": str(file)})
