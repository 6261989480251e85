"""Parameters, bytes and FLOPs by component, against sums by hand and against torch's counter on the running model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.pipeline.component_times import Running, measured_components
from modelzip.pipeline.components import COMPONENTS, Parts
from modelzip.pipeline.inspection import inspect_models

BATCH, LENGTH = 2, 16
HIDDEN, INNER, VOCABULARY, LAYERS = 32, 48, 96, 2


def inspected(folder: Path, **changes: Any) -> dict[str, Any]:
    options = {"batch_size": BATCH, "seq_len": LENGTH, "device": None, **changes}
    (found,) = inspect_models([Checkpoint.open(str(folder))], **options)
    return found


def by_name(found: dict[str, Any], key: str) -> dict[str, Any]:
    return {row["name"]: row[key] for row in found["components"]}


def test_a_decoder_is_taken_apart_as_by_hand(saved):
    found = inspected(saved("llama"))
    heads = HIDDEN * (2 * HIDDEN + 2 * HIDDEN // 2)  # two of four key and value heads
    assert by_name(found, "parameters") == {
        "embedding": VOCABULARY * HIDDEN,
        "attention projections": LAYERS * heads,
        "attention matrix": 0,
        "feed-forward": LAYERS * 3 * HIDDEN * INNER,
        "head": VOCABULARY * HIDDEN,
        "norms and others": (2 * LAYERS + 1) * HIDDEN,
    }
    tokens = 2 * BATCH * LENGTH
    assert by_name(found, "flops") == {
        "embedding": 0,
        "attention projections": tokens * LAYERS * heads,
        "attention matrix": 2 * tokens * LENGTH * HIDDEN * LAYERS,
        "feed-forward": tokens * LAYERS * 3 * HIDDEN * INNER,
        "head": tokens * VOCABULARY * HIDDEN,
        "norms and others": 0,
    }
    assert found["bytes"] == 4 * found["parameters"] == Checkpoint.open(str(saved("llama"))).nbytes


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt-neox", "phi3", "bert", "bert-mlm", "distilbert", "t5"])
def test_every_byte_and_parameter_is_in_one_component_and_all_products_are_counted(models, saved, name):
    found, checkpoint = inspected(saved(name)), Checkpoint.open(str(saved(name)))
    model = models.FAMILIES[name].build()
    assert found["bytes"] == checkpoint.nbytes
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    model.set_attn_implementation("eager")  # whose products torch counts on CPUs, too
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert found["flops"] == counter.get_total_flops()
    assert all(
        by_name(found, "parameters")[part] > 0 for part in ("embedding", "attention projections", "feed-forward")
    )


def test_of_experts_those_that_a_token_goes_to_are_counted(saved):
    found = by_name(inspected(saved("mixtral")), "flops")["feed-forward"]
    tokens = 2 * BATCH * LENGTH
    experts, chosen = 4, 2
    assert found == LAYERS * tokens * (chosen * 3 * HIDDEN * INNER + experts * HIDDEN)


def test_a_model_that_can_not_run_without_values_says_so_and_shows_the_rest(saved):
    found = inspected(saved("bart"))
    assert found["flops"] is None
    assert found["note"].startswith("FLOPs aren't counted: BartForConditionalGeneration can't run without values")
    assert found["bytes"] == Checkpoint.open(str(saved("bart"))).nbytes


def test_a_compressed_model_has_fewer_bytes_and_as_many_parameters(speaking, compress, tmp_path):
    compress(speaking("llama"), tmp_path / "out", {"method": "rtn", "bits": 4})
    before, after = inspected(speaking("llama")), inspected(tmp_path / "out")
    assert after["parameters"] == before["parameters"]
    assert after["flops"] == before["flops"]
    assert after["bytes"] == Checkpoint.open(str(tmp_path / "out")).nbytes
    changed = {part for part in COMPONENTS if by_name(after, "bytes")[part] != by_name(before, "bytes")[part]}
    assert changed == {"attention projections", "feed-forward"}


def test_factors_multiply_less(speaking, compress, tmp_path):
    stage = {"factorize": {"method": "svd", "rank": 8}}
    compress(speaking("llama"), tmp_path / "out", stage)
    found = by_name(inspected(tmp_path / "out"), "flops")
    assert found["feed-forward"] == 2 * BATCH * LENGTH * LAYERS * 3 * 8 * (HIDDEN + INNER)


def test_two_models_are_given_texts_that_both_can_take(saved):
    found = inspect_models(
        [Checkpoint.open(str(saved(name))) for name in ("llama", "bert")], batch_size=1, seq_len=None, device=None
    )
    assert [one["seq_len"] for one in found] == [64, 64]
    with pytest.raises(RecipeError, match=r"--seq-len is 65, but .* takes at most 64 tokens"):
        inspected(saved("llama"), seq_len=65)


def test_a_modules_time_is_what_is_left_without_the_modules_inside():
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    running = Running(lambda: next(now))
    running.begin("feed-forward")
    running.begin("norms and others")
    running.end()
    running.end()
    running.begin("head")
    running.end()
    found = {name: seconds for name, seconds in running.seconds.items() if seconds}
    assert found == {"feed-forward": 4.0, "norms and others": 2.0, "head": 5.0}


def test_what_operations_put_out_is_counted_by_component(saved):
    checkpoint = Checkpoint.open(str(saved("llama")))
    parts = Parts(skeleton(checkpoint), checkpoint)
    device = torch.device("cpu")
    found = measured_components(checkpoint, parts, batch_size=BATCH, seq_len=LENGTH, device=device)
    assert set(found) == set(COMPONENTS)
    tokens = 4 * BATCH * LENGTH
    assert found["embedding"]["activation_bytes"] == tokens * HIDDEN
    assert found["head"]["activation_bytes"] == tokens * VOCABULARY
    assert found["attention projections"]["activation_bytes"] == LAYERS * tokens * 3 * HIDDEN
    assert found["feed-forward"]["activation_bytes"] == LAYERS * tokens * (4 * INNER + HIDDEN)  # with SiLU and product
    assert all(row["seconds"] > 0 for name, row in found.items())


def test_unpacked_weights_show_in_what_is_put_out(speaking, compress, tmp_path):
    compress(speaking("llama"), tmp_path / "out", {"prune": {"method": "magnitude", "sparsity": 0.5}})
    device, rows = torch.device("cpu"), []
    for folder in (speaking("llama"), tmp_path / "out"):
        checkpoint = Checkpoint.open(str(folder))
        parts = Parts(skeleton(checkpoint), checkpoint)
        rows.append(measured_components(checkpoint, parts, batch_size=BATCH, seq_len=LENGTH, device=device))
    before, after = (row["feed-forward"]["activation_bytes"] for row in rows)
    assert after >= before + LAYERS * 3 * HIDDEN * INNER * 4
