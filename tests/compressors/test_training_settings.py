"""Settings of the methods that train: their examples are read, and what can't go together is refused in words."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from modelzip.compressors.distill.settings_students import BiLstm, FastBert, Lsq, Sequence
from modelzip.compressors.prune.settings_training import GradualMagnitude, Lottery, Movement

ALL = [BiLstm, FastBert, Sequence, Lsq, GradualMagnitude, Movement, Lottery]


@pytest.mark.parametrize("settings", ALL)
def test_an_example_is_what_it_is_an_example_of(settings):
    (stage,) = yaml.safe_load(settings.example)
    (fields,) = stage.values()
    found = settings(**fields)
    assert found.method == settings.model_fields["method"].default
    assert found.engine == "training"
    assert settings.summary
    assert settings.citation
    assert all(field.description for field in settings.model_fields.values())
    assert settings.whole_stage == frozenset(settings.model_fields)


def test_labels_say_how_much():
    assert Lsq(bits=3).label == "lsq-3bit"
    assert Movement(sparsity=0.85).label == "movement-85"


@pytest.mark.parametrize(
    ("settings", "fields", "words"),
    [
        (FastBert, {"exit_heads": 3}, "must divide"),
        (Sequence, {"prompt_length": 8}, "give data as well"),
        (Sequence, {"prompt_length": 8, "text_length": 8, "data": "a.txt"}, "must be less"),
        (Lsq, {"start": "mean", "symmetric": False}, "symmetric grid"),
        (Movement, {"begin": 0.8}, "must not be less than begin"),
        (Movement, {"initial_sparsity": 0.9}, "must not be more than sparsity"),
        (Movement, {"penalty": 1.0}, "needs masking: threshold"),
        (Movement, {"masking": "threshold"}, "prunes nothing"),
        (Movement, {"masking": "threshold", "penalty": 1.0, "sparsity": 0.8}, "penalty decides how many"),
        (Lottery, {"controls": ("random", "random")}, "once each"),
        (Movement, {"alpha": 0.7}, "alpha says how a teacher is learned from"),
        (Movement, {"alpha": 0.5}, "alpha says how a teacher is learned from"),
        (Lottery, {"temperature": 2.0}, "temperature says how a teacher is learned from"),
        (Lottery, {"temperature": 3.0, "teacher": None}, "temperature says how a teacher is learned from"),
    ],
)
def test_what_cannot_go_together_is_refused(settings, fields, words):
    with pytest.raises(ValidationError, match=words):
        settings(**fields)


def test_settings_with_every_default_written_out_are_read_back():
    for settings in (Movement(), Lottery(), GradualMagnitude(teacher="t", alpha=0.5)):
        assert type(settings)(**settings.model_dump(mode="json")) == settings
