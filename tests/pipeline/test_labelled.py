"""Labelled examples: which columns are taken, what labels mean, how they are padded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from modelzip.checkpoints.errors import CalibrationError
from modelzip.pipeline.called import TRAINING
from modelzip.pipeline.labelled import batches_by_length, count_cut, encode, read_examples


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_quote_in_a_tab_separated_file_is_a_character_like_any_other(tmp_path: Path) -> None:
    source = write(tmp_path, "dev.tsv", 'sentence\tlabel\n"so bad\t0\nshe said "no"\t1\n')
    found = read_examples(source)
    assert found.texts == ('"so bad', 'she said "no"')
    assert (found.labels, found.pairs) == ((0, 1), None)


def test_a_quoted_field_of_a_comma_separated_file_may_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    source = write(tmp_path, "dev.csv", 'text,label\n"well, ""so"" it\nis",1\nplain,0\n')
    assert read_examples(source).texts == ('well, "so" it\nis', "plain")


def test_pairs_are_found_by_the_names_of_their_columns(tmp_path: Path) -> None:
    row = {"idx": 0, "premise": "a", "hypothesis": "b", "label": "neutral"}
    found = read_examples(write(tmp_path, "dev.jsonl", json.dumps(row)))
    assert (found.texts, found.pairs, found.names) == (("a",), ("b",), ("neutral",))


def test_a_question_with_a_sentence_is_a_pair_though_each_may_stand_alone(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, "dev.tsv", "question\tsentence\tlabel\nq\ts\t0\n"))
    assert (found.texts, found.pairs) == (("q",), ("s",))


def test_a_named_column_wins(tmp_path: Path) -> None:
    source = write(tmp_path, "dev.csv", "text,body,label,mark\nt,b,0,1\n")
    found = read_examples(source, text="body", pair="text", label="mark")
    assert (found.texts, found.pairs, found.labels) == (("b",), ("t",), (1,))


def test_two_columns_that_may_be_the_text_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "dev.csv", "text,sentence,label\nt,s,0\n")
    with pytest.raises(CalibrationError, match=r"may mean text and sentence as its text.*--text"):
        read_examples(source)


def test_a_missing_column_names_what_is_there_and_the_option(tmp_path: Path) -> None:
    source = write(tmp_path, "dev.csv", "text,mark\nt,0\n")
    with pytest.raises(CalibrationError, match=r"it has text, mark: name one by --label"):
        read_examples(source)
    with pytest.raises(CalibrationError, match=r"no column 'title'; it has text, mark: name one by --text"):
        read_examples(source, text="title")
    with pytest.raises(CalibrationError, match=r"no column 'title'; it has text, mark: name one by text_column\.$"):
        read_examples(source, text="title", called=TRAINING)


def test_a_row_with_too_few_columns_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"line 3 has 1 columns, but its first line names 2"):
        read_examples(write(tmp_path, "dev.tsv", "sentence\tlabel\na\t0\nb\n"))


def test_words_get_ids_in_sorted_order_or_in_the_models(tmp_path: Path) -> None:
    source = write(tmp_path, "dev.csv", "text,label\na,pos\nb,neg\n")
    assert (read_examples(source).labels, read_examples(source).names) == ((1, 0), ("neg", "pos"))
    assert read_examples(source, names=("POS", "NEG")).labels == (0, 1)


def test_a_label_that_the_model_does_not_know_is_named_with_its_line(tmp_path: Path) -> None:
    source = write(tmp_path, "dev.csv", "text,label\na,pos\nb,neutral\n")
    with pytest.raises(CalibrationError, match=r"line 3: the label 'neutral' .* none of the 2 classes neg, pos"):
        read_examples(source, names=("neg", "pos"))
    with pytest.raises(CalibrationError, match=r"line 2: the label '2'"):
        read_examples(write(tmp_path, "ids.csv", "text,label\na,2\n"), names=("neg", "pos"))


def test_whole_numbers_are_class_ids_and_others_a_regression(tmp_path: Path) -> None:
    ids = read_examples(write(tmp_path, "ids.csv", "text,label\na,0\nb,2\n"))
    assert (ids.labels, ids.names) == ((0, 2), ("0", "1", "2"))
    numbers = read_examples(write(tmp_path, "numbers.csv", "text,label\na,0.5\nb,2\n"))
    assert (numbers.labels, numbers.names) == ((0.5, 2.0), ())
    assert read_examples(write(tmp_path, "scores.csv", "text,score\na,5\n")).names == ()
    with pytest.raises(CalibrationError, match=r"line 3: the label .* is no number"):
        read_examples(write(tmp_path, "words.csv", "text,label\na,1\nb,many\n"), names=())


def test_class_ids_of_a_dataset_in_another_order_than_the_models_are_matched_by_name(tmp_path: Path) -> None:
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    table = pyarrow.table({"text": ["a", "b"], "label": [1, 0]})
    stated = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(stated), tmp_path / "dev.parquet")
    source = str(tmp_path / "dev.parquet")
    assert read_examples(source).names == ("no", "yes")
    assert read_examples(source, names=("Yes", "No")).labels == (0, 1)
    assert read_examples(source, names=("LABEL_0", "LABEL_1")).labels == (1, 0)


def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"dev\.parquet isn't a parquet file: [^\n]*[^.]\.$"):
        read_examples(write(tmp_path, "dev.parquet", "no parquet at all"))


def test_a_hidden_label_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"line 1 has no label|line 1: the label"):
        read_examples(write(tmp_path, "test.jsonl", '{"text": "a", "label": -1}'), names=("no", "yes"))
    with pytest.raises(CalibrationError, match="line 1 has no label"):
        read_examples(write(tmp_path, "none.jsonl", '{"text": "a", "label": null}'))


def test_splitting_loses_nothing_and_changes_the_hash(tmp_path: Path) -> None:
    whole = read_examples(write(tmp_path, "dev.csv", "text,label\na,x\nb,y\nc,x\n"))
    first, rest = whole.split(2)
    assert first.texts + rest.texts == whole.texts
    assert first.labels + rest.labels == whole.labels
    assert first.names == rest.names == whole.names
    assert len({part.sha256 for part in (whole, first, rest)}) == 3
    assert read_examples(whole.source, count=2).sha256 == first.sha256


def word_tokenizer(*words: str) -> Any:
    raw = Tokenizer(WordLevel({word: place for place, word in enumerate(("[UNK]", *words))}, unk_token="[UNK]"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


def tokenizer(side: str = "right", pad: int | None = 9) -> SimpleNamespace:
    return SimpleNamespace(pad_token_id=pad, pad_token_type_id=0, padding_side=side)


def rows(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [place] * length, "attention_mask": [1] * length} for place, length in enumerate(lengths, 1)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_hold_each_example_once_longest_first_and_padded(side: str) -> None:
    encoded = rows(2, 5, 3, 5, 1)
    batches = batches_by_length(encoded, tokenizer(side), batch_size=2)
    assert torch.cat([batch.rows for batch in batches]).tolist() == [1, 3, 2, 0, 4]
    for batch in batches:
        for place, ids, mask in zip(batch.rows, batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist() == encoded[place]["input_ids"]
            assert (ids[~mask.bool()] == 9).all()
            assert mask[0 if side == "right" else -1] == 1


def test_without_a_padding_token_each_example_is_a_batch() -> None:
    batches = batches_by_length(rows(2, 2, 3), tokenizer(pad=None), batch_size=8)
    assert [len(batch.rows) for batch in batches] == [1, 1, 1]


def test_an_example_is_cut_at_the_most_tokens_and_counted(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, "dev.csv", "text,label\none two three,0\none,1\n"))
    words = word_tokenizer("one", "two", "three")
    encoded = encode(found, words, max_length=2)
    assert [len(one["input_ids"]) for one in encoded] == [2, 1]
    assert count_cut(found, encoded, words, max_length=2) == 1
