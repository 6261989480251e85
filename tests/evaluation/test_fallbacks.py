"""Fallbacks of the same reason are told in one line."""

from __future__ import annotations

from modelzip.evaluation.fallbacks import gathered


def test_a_reason_that_many_modules_share_is_told_once_with_their_number():
    sentences = [f"layers.{n}.q_proj: group 128 doesn't divide 576 columns: 64" for n in range(30)]
    other = "layers.3.v_proj: no calibration token reached it"
    whole = "the output wasn't reopened in a fresh process: that takes 9.1 GB dense in fp32"
    assert gathered([*sentences[:4], other, *sentences[4:], whole, "plain"]) == [
        "layers.0.q_proj and 29 more: group 128 doesn't divide 576 columns: 64",
        other,
        whole,
        "plain",
    ]


def test_nothing_gives_nothing():
    assert gathered([]) == []
