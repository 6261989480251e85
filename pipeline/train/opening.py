"""A student or a teacher in memory: all weights of a checkpoint, some of its layers, a leading part, or chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.weights.embedding import CompressedEmbedding
from modelzip.weights.linear import CompressedLinear
from modelzip.weights.trainable import trainable, unfreeze

from .own import fill_base, fill_embedding
from .student import Student, layer_names


def open_student(student: Student, *, seed: int, attention: str | None = None) -> Any:
    """The student in fp32, ready to be trained; what is random is drawn from the seed.

    attention: transformers' attn_implementation, None for its own choice. Raises CheckpointError if weights lack.
    """
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed % (1 << 63))
        model = skeleton(replace(student.origin, config=dict(student.config)))
        if student.start == "whole":
            if student.quantization is not None:
                model.config.quantization_config = student.quantization
            made = _pretrained(type(model), student.origin, model.config, attention, has_new_head=student.has_new_head)
        else:
            model_class: Any = type(model)
            made = model_class._from_config(model.config, dtype=torch.float32, attn_implementation=attention)
            _begin(made, student)
    for name, change in student.changes.items():
        made.set_submodule(name, change.mounted(made.get_submodule(name)))
    _make_trainable(made)
    for name, owner in student.shared.items():
        _share(made, name, owner)
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return made.train()


def _make_trainable(model: Any) -> None:
    """Compressed modules get parameters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            model.set_submodule(name, trainable(module.weight_value, module.bias))
        elif isinstance(module, CompressedEmbedding):
            unfreeze(module)


def _share(model: Any, name: str, owner: str) -> None:
    """Make a parameter the one that another module has; tables that share look for theirs in that module anyway."""
    (path, _, leaf), (of, _, of_leaf) = name.rpartition("."), owner.rpartition(".")
    module, source = model.get_submodule(path), getattr(model.get_submodule(of), of_leaf)
    if leaf in module._parameters and isinstance(source, nn.Parameter):
        module.register_parameter(leaf, source)


def open_whole(checkpoint: Checkpoint, *, attention: str | None = None) -> Any:
    """A model to learn from: in fp32, in eval mode, without gradients."""
    model = skeleton(checkpoint)
    if checkpoint.quantization is not None:  # which a skeleton's config hasn't got
        model.config.quantization_config = checkpoint.quantization
    with _quiet():
        found = _pretrained(type(model), checkpoint, model.config, attention, has_new_head=False)
    return found.requires_grad_(False).eval()


def _pretrained(model_class: Any, origin: Checkpoint, config: Any, attention: str | None, *, has_new_head: bool) -> Any:
    model, info = model_class.from_pretrained(
        origin.folder,
        config=config,
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
        local_files_only=True,
    )
    lacking = [name for name in info["missing_keys"] if not has_new_head or name.startswith(_body(model))]
    if lacking:
        raise CheckpointError(f"{origin.source} lacks {sorted(lacking)[0]}, which {model_class.__name__} needs.")
    return model


def _begin(made: Any, student: Student) -> None:
    """Put what the start says of the origin's weights into a student that is random."""
    match student.start:
        case "principal":
            fill_embedding(made, open_whole(student.origin))
        case "exits":
            fill_base(made, open_whole(student.origin))
        case "layers" | "copy":
            _fill(made, student)


def _body(model: Any) -> str:
    """What the names of the layers begin with: a new head, and a pooler that was never trained, are outside."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            return str(name)
    return str(model.base_model_prefix)


def _fill(made: Any, student: Student) -> None:
    """Copy what fits of the origin's weights into the student."""
    origin = open_whole(student.origin)
    weights = origin.state_dict()
    stack = layer_names(student.origin)[0].rpartition(".")[0]
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            source = weights.get(_in_origin(name, stack, student.layers) if student.start == "layers" else name)
            if student.start == "layers" and (source is None or source.shape != tensor.shape):
                raise CheckpointError(
                    f"{student.origin.source} has nothing that {name} of its student could start from."
                )
            if source is None or source.ndim != tensor.ndim:
                continue
            if any(mine > theirs for mine, theirs in zip(tensor.shape, source.shape, strict=True)):
                continue
            tensor.copy_(source[tuple(slice(size) for size in tensor.shape)])


def _in_origin(name: str, stack: str, layers: Sequence[int]) -> str:
    """The name in the origin of a tensor of the student."""
    if not name.startswith(f"{stack}."):
        return name
    place, _, rest = name.removeprefix(f"{stack}.").partition(".")
    return f"{stack}.{layers[int(place)]}.{rest}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says while it loads."""
    log: Any = transformers.utils.logging
    level, shows_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shows_bar:
            log.enable_progress_bar()
