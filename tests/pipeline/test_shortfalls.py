"""A share of heads or neurons that can't be taken out in full: the report says so among its fallbacks."""

from __future__ import annotations

import pytest

from modelzip.compressors.prune.structural_settings import Heads
from modelzip.pipeline.unit_pruning import fell_short

SHORT = [
    ("llama", {"method": "heads", "share": 0.99}, "4 of 8 heads (50.0%) go, fewer than the share 0.99 "),
    ("llama", {"method": "heads", "share": 0.99, "scope": "global"}, "4 of 8 heads (50.0%) go"),
    ("bert", {"method": "neurons", "share": 0.5, "multiple": 16}, "32 of 96 neurons (33.3%) go"),
]


@pytest.mark.parametrize(("name", "stage", "sentence"), SHORT)
def test_units_that_stay_though_they_were_to_go_are_a_fallback(name, stage, sentence, saved, compress, tmp_path):
    report = compress(saved(name), tmp_path / "out", {"prune": stage}).report
    assert [one for one in report["fallbacks"] if one.startswith(sentence)]
    assert [one for one in report["plan"]["notes"] if one.startswith(sentence)]


def test_a_layers_last_head_stays_which_is_a_fallback():
    records = {"first": {"of": 1, "left": 1}, "second": {"of": 3, "left": 2}}
    told = fell_short(Heads(share=0.5), records)
    assert told == "1 of 4 heads (25.0%) go, fewer than the share 0.5 that was asked for"


def test_the_nearest_whole_number_of_units_is_no_fallback(saved, compress, tmp_path):
    report = compress(saved("bert"), tmp_path / "out", {"prune": {"method": "heads", "share": 0.3}}).report
    assert report["fallbacks"] == []
