"""The command `modelzip` without the seconds that importing torch takes: `python warm.py` imports all, then forks.

An order is a line of JSON on standard input; for each one a fork of this process runs the installed script `modelzip`
in a folder of its own, and leaves in the folder `job`: `out`, `err`, `pid`, and `code` when it has ended. An order may
let a write (`strike_at`: the n-th call that changes the disk) or the start of a process (`strike_at_process`) be the
process's last deed, as kill -9 would, or with `hang` wait there while the file `hanging` in `job` is there. `writes` is
then the number of calls until there.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTED = (
    *(
        "modelzip.cli.progress",
        "modelzip.cli.show",
        "modelzip.evaluation.gates",
        "modelzip.pipeline.evaluate",
        "modelzip.pipeline.run",
    ),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
    *("transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert"),
)
"""What a command imports on its way."""

CHANGES = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "write", "sendfile")


def serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            _mind(json.loads(line))


def _mind(order: dict[str, Any]) -> None:
    """Start the command, and write down how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    job = Path(order["job"])
    pid = os.fork()
    if pid == 0:
        _become(order, job)
    _put(job / "pid", pid)
    _, status = os.waitpid(pid, 0)
    _put(job / "code", os.waitstatus_to_exitcode(status))
    os._exit(0)


def _put(file: Path, number: int) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(str(number))
    draft.rename(file)


def _become(order: dict[str, Any], job: Path) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job / "out", os.O_WRONLY | os.O_CREAT),
        (2, job / "err", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(name, flags), number)
    os.chdir(order["cwd"])
    sys.argv = [order["script"], *order["arguments"]]
    _arm(order, job)
    runpy.run_path(order["script"], run_name="__main__")  # ends by SystemExit


def _arm(order: dict[str, Any], job: Path) -> None:
    """Count the calls that change the disk or start a process, and strike at the one that was ordered."""
    counts = {"strike_at": 0, "strike_at_process": 0}

    def strike() -> None:
        (job / "writes").write_text(str(counts["strike_at"]))
        if not order["hang"]:
            os.kill(os.getpid(), signal.SIGKILL)
        hanging = job / "hanging"
        hanging.touch()
        while hanging.exists():
            time.sleep(0.005)

    def counted(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def instead(*arguments: Any, **more: Any) -> Any:
            counts[kind] += 1
            if counts[kind] == order[kind]:
                if call is write and not order["hang"]:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])  # the write is torn
                strike()
            return call(*arguments, **more)

        return instead

    write = os.write
    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name), "strike_at"))
    subprocess.Popen.__init__ = counted(subprocess.Popen.__init__, "strike_at_process")  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
