"""The real command, as a process or from a warm start, and pico models with a tokenizer for it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCRIPT = shutil.which("modelzip", path=str(Path(sys.executable).parent))
TIMES_AND_PLACES = frozenset({"report.json", "report.md", "report.html", "README.md"})
"""Files of an output that hold times, memory and the output's own name."""


@dataclass(frozen=True)
class Done:
    """A command that has ended. code is negative if a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Running:
    """A command on the way, in a process group of its own, which leaves its traces in the folder `job`."""

    def __init__(self, job: Path, ended: Callable[[], int | None], pid: Callable[[], int]) -> None:
        self.job, self._ended, self._pid = job, ended, pid

    def send(self, number: int) -> None:
        os.kill(self._pid(), number)

    def wait(self, timeout: float = 120) -> Done:
        if not until(lambda: self._ended() is not None, timeout):
            os.killpg(self._pid(), signal.SIGKILL)
            pytest.fail(f"the command didn't end in {timeout} s: {(self.job / 'err').read_text()[-2000:]}")
        code = self._ended()
        assert code is not None
        return Done(code, (self.job / "out").read_text(), (self.job / "err").read_text())

    def until(self, holds: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False if the command has ended before that."""
        assert until(lambda: holds() or self._ended() is not None, 60)
        return self._ended() is None

    def hangs(self) -> None:
        """Wait until the command has come to where it was ordered to hang."""
        assert self.until((self.job / "hanging").exists), (self.job / "err").read_text()

    def release(self) -> None:
        """Let a command that hangs go on."""
        (self.job / "hanging").unlink()


def until(holds: Callable[[], bool], timeout: float) -> bool:
    """Wait until a condition holds; whether it did in time."""
    end = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


class Command:
    """Starts `modelzip`: `start` as anybody would, `fork` from a process that has imported torch already."""

    def __init__(self, jobs: Path) -> None:
        assert SCRIPT is not None, "modelzip isn't installed beside this interpreter"
        self._jobs, self._server, self._count = jobs, None, 0
        fixed = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(jobs / "home"), "MODELZIP_CACHE": str(jobs / "cache")}
        self._environment = {"OMP_NUM_THREADS": "2", **os.environ, **fixed, "NO_COLOR": "1", "COLUMNS": "200"}

    def start(self, *arguments: object, cwd: Path) -> Running:
        job = self._job()
        with (job / "out").open("wb") as out, (job / "err").open("wb") as err:
            process = subprocess.Popen(
                [str(SCRIPT), *map(str, arguments)],
                **{"cwd": cwd, "env": self._environment, "stdin": subprocess.DEVNULL, "process_group": 0},
                stdout=out,
                stderr=err,
            )
        return Running(job, process.poll, lambda: process.pid)

    def fork(
        self,
        *arguments: object,
        cwd: Path,
        strike_at: int | None = None,
        strike_at_process: int | None = None,
        hang: bool = False,
    ) -> Running:
        """See warm.py for what the options mean."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("warm.py"))],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": self._environment},
            )
            assert self._server.stdout.readline() == "ready\n"
        job = self._job()
        order = {"arguments": list(map(str, arguments)), "cwd": str(cwd), "job": str(job), "script": SCRIPT}
        order |= {"strike_at": strike_at, "strike_at_process": strike_at_process, "hang": hang}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        assert until((job / "pid").exists, 20)
        code = job / "code"
        ended = lambda: int(code.read_text()) if code.exists() else None  # noqa: E731
        return Running(job, ended, lambda: int((job / "pid").read_text()))

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(timeout=30)

    def _job(self) -> Path:
        self._count += 1
        folder = self._jobs / f"job-{self._count}"
        folder.mkdir()
        return folder


@pytest.fixture(scope="session")
def modelzip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    command = Command(tmp_path_factory.mktemp("jobs"))
    yield command
    command.close()


@pytest.fixture(scope="session")
def hashes() -> Callable[[Path], dict[str, str]]:
    """hashes(folder) -> SHA-256 of every file below it, hidden ones too, but for the reports, which hold times."""

    def of(folder: Path) -> dict[str, str]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name not in TIMES_AND_PLACES)
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return of


@pytest.fixture(scope="session")
def write_text() -> Callable[[Path, int], Path]:
    """write_text(file, characters) -> a file with that much text of made-up words, always the same."""

    def write(file: Path, characters: int) -> Path:
        draw = random.Random(7)
        words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(300)]
        file.write_text(" ".join(draw.choices(words, k=characters // 4))[:characters], encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def save_llama() -> Callable[..., Path]:
    """save_llama(folder, layers=6, dtype="float32", **save_pretrained's options): a pico Llama with a byte tokenizer,
    a chat template, a generation config, a licence and a README."""

    def save(folder: Path, *, layers: int = 6, dtype: str = "float32", **options: Any) -> Path:
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {byte: index + 2 for index, byte in enumerate(alphabet)} | {"<s>": 0, "</s>": 1}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        fast.save_pretrained(folder)
        config = LlamaConfig(
            **{"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024},
            **{"bos_token_id": 0, "eos_token_id": 1},
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # or else all logits of a random model are nearly zero
        model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, bos_token_id=0, eos_token_id=1)
        model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
        (folder / "LICENSE").write_text("Do with it what you like.\n", encoding="utf-8")
        (folder / "README.md").write_text("# A pico model\n", encoding="utf-8")
        return folder

    return save


@pytest.fixture(scope="session")
def save_gguf() -> Callable[[Path], Path]:
    """save_gguf(file) -> a Llama of one block in fp32, with a tokenizer, in GGUF."""

    def save(file: Path) -> Path:
        import gguf
        import numpy as np

        random, hidden, inner, vocabulary = np.random.default_rng(0), 32, 64, 64
        shapes = {
            **{"token_embd": (vocabulary, hidden), "output": (vocabulary, hidden), "output_norm": (hidden,)},
            **{f"blk.0.{name}_norm": (hidden,) for name in ("attn", "ffn")},
            **{f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")},
            **{f"blk.0.ffn_{name}": (inner, hidden) for name in ("gate", "up")},
            "blk.0.ffn_down": (hidden, inner),
        }
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(inner)
        writer.add_head_count(4)
        writer.add_head_count_kv(4)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(vocabulary)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<s>", "</s>", *(chr(33 + index) for index in range(vocabulary - 3)), "!#"])
        writer.add_token_types([3, 3] + [1] * (vocabulary - 2))
        writer.add_token_merges(["! #"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return save
