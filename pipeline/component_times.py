"""How long each component of a model takes in a forward pass, and how much memory its operations put out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modelzip.checkpoints.index import Checkpoint

from .calibrate import forward_inputs
from .clock import device_clock
from .components import COMPONENTS, Parts
from .opened import open_by_transformers

REPETITIONS: Final = 5


class Running:
    """The component whose module is running; told when one begins and ends. A module's own work is what is left of it
    without the modules inside."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stack: list[tuple[str, float, float]] = []  # component, begin, seconds inside of it that others took
        self.seconds = dict.fromkeys(COMPONENTS, 0.0)

    @property
    def component(self) -> str:
        """Of the innermost module that runs."""
        return self._stack[-1][0] if self._stack else COMPONENTS[-1]

    def begin(self, component: str) -> None:
        """The forward of a module of this component begins."""
        self._stack.append((component, self._clock(), 0.0))

    def end(self) -> None:
        """The innermost module's forward has ended."""
        component, begin, inside = self._stack.pop()
        total = self._clock() - begin
        self.seconds[component] += total - inside
        if self._stack:
            outer, started, others = self._stack[-1]
            self._stack[-1] = (outer, started, others + total)


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make anew, by the component that runs."""

    def __init__(self, running: Running) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._running = running
        self.nbytes = dict.fromkeys(COMPONENTS, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(one) for one in tree_leaves((args, kwargs or {})) if isinstance(one, Tensor)}
        made = func(*args, **(kwargs or {}))
        fresh = {_storage(one): one for one in tree_leaves(made) if isinstance(one, Tensor)}
        for storage, tensor in fresh.items():
            if storage not in given:
                self.nbytes[self._running.component] += tensor.untyped_storage().nbytes()
        return made


def measured_components(
    checkpoint: Checkpoint, parts: Parts, *, batch_size: int, seq_len: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Of each component `seconds` (median of some passes, after one that isn't counted) and `activation_bytes`.

    The model is opened by transformers, as a user would open it, and given tokens drawn from a seed.
    """
    model = open_by_transformers(checkpoint, device, dtype="auto")
    model.config.use_cache = False
    size = model.config.get_text_config().vocab_size
    tokens = torch.randint(size, (batch_size, seq_len), generator=torch.Generator().manual_seed(0))
    inputs = {name: value.to(device) for name, value in forward_inputs(model)(tokens).items()}
    passes = []
    with torch.no_grad():
        model(**inputs)
        for _ in range(REPETITIONS):
            running = Running(device_clock(device))
            with watched(model, parts, running):
                model(**inputs)
            passes.append(running.seconds)
        running = Running(time.perf_counter)
        with watched(model, parts, running), Allocated(running) as allocated:
            model(**inputs)
    return {
        name: {
            "seconds": median(seconds[name] for seconds in passes),
            "activation_bytes": allocated.nbytes[name],
        }
        for name in COMPONENTS
    }


@contextmanager
def watched(model: nn.Module, parts: Parts, running: Running) -> Iterator[None]:
    """Tell `running` of every module's forward."""

    def begin(path: str) -> Callable[..., None]:
        component = parts.computing(path)  # found beforehand: it would count as time of the module around
        return lambda *_: running.begin(component)

    hooks = [module.register_forward_pre_hook(begin(path)) for path, module in model.named_modules()]
    hooks += [module.register_forward_hook(lambda *_: running.end()) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
