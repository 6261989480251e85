"""torch-export: a program that torch alone opens, with the compressed matrices as they are stored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.evaluation.outputs import main_output
from modelzip.exporters.formats import export
from modelzip.exporters.request import Request
from modelzip.exporters.torch_export import PROGRAM

CPU = torch.device("cpu")


def exported(source: Path, output: Path, **asked: Any) -> Path:
    return export(Request(Checkpoint.open(str(source)), output, **asked), "torch-export").path


def expected(source: Path, ids: Tensor, mask: Tensor) -> Tensor:
    model = load_whole(Checkpoint.open(str(source)), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        return main_output(model(input_ids=ids, attention_mask=mask))


def texts(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids [rows, tokens] and a mask that hides the end of the last row."""
    ids = torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    return ids, mask


def difference(found: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """Of the logits of tokens that aren't hidden, or of whole texts, as relative Frobenius norm."""
    if found.ndim == 3:
        found, wanted = found[mask.bool()], wanted[mask.bool()]
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"bits": 4}),
        ("llama", {"bits": 3, "symmetric": False, "embeddings": True}),
        ("llama-tied", {"bits": 4, "embeddings": True}),
        ("gpt2", {"bits": 4}),
        ("bert-classifier", {"bits": 4}),
        ("minilm", {"bits": 8, "group_size": "channel"}),
    ],
    ids=str,
)
def test_the_program_computes_what_the_compressed_model_does_for_any_number_and_length_of_texts(
    name: str, settings: dict[str, Any], compressed: Callable[..., Path], tmp_path: Path
) -> None:
    small = compressed(name, **settings)
    program = torch.export.load(exported(small, tmp_path / "out") / PROGRAM).module()
    for rows, tokens in ((1, 1), (1, 40), (3, 11)):
        ids, mask = texts(rows, tokens) if tokens > 1 else (torch.tensor([[5]]), torch.tensor([[1]]))
        found = program(input_ids=ids, attention_mask=mask)
        assert difference(found, expected(small, ids, mask), mask) < 1e-5  # measured: at most 6e-7


def test_matrices_stay_packed_in_the_file(compressed: Callable[..., Path], saved: Any, tmp_path: Path) -> None:
    """The states of the program are those of the checkpoint: integers in words, a tied table once."""
    small = compressed("llama-tied", bits=4, embeddings=True)
    state = torch.export.load(exported(small, tmp_path / "out") / PROGRAM).state_dict
    stored = Checkpoint.open(str(small)).tensors
    distinct = {tensor.data_ptr(): tensor.nbytes for name, tensor in state.items() if not name.endswith("_shape")}
    weights = [info.nbytes for name, info in stored.items() if not name.endswith("_shape")]
    assert sum(distinct.values()) == sum(weights)


def test_torch_alone_opens_it(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = exported(compressed("llama", bits=3), tmp_path / "out")
    program = (
        "import sys, torch; "
        f"program = torch.export.load({str(folder / PROGRAM)!r}).module(); "
        "ids = torch.arange(3, 9)[None]; "
        "assert program(input_ids=ids, attention_mask=torch.ones_like(ids)).shape == (1, 6, 96); "
        "assert not {'modelzip', 'transformers'} & {name.partition('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_dense_model_in_another_type_is_a_program_of_that_type(saved: Any, tmp_path: Path) -> None:
    folder = exported(saved("llama"), tmp_path / "out", dtype=torch.bfloat16)
    program = torch.export.load(folder / PROGRAM)
    assert {tensor.dtype for tensor in program.state_dict.values()} == {torch.bfloat16}
    ids, mask = texts(2, 9)
    found = program.module()(input_ids=ids, attention_mask=mask).float()
    assert difference(found, expected(saved("llama"), ids, mask), mask) < 0.03  # measured: 0.012


@pytest.mark.parametrize(
    ("name", "words"),
    [("t5", "has an encoder and a decoder"), ("mixtral", r"gate sends each token to experts of its own")],
)
def test_what_is_no_program_of_fixed_steps_is_refused(name: str, words: str, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        exported(saved(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()
