"""Whole layers taken out: which ones, and the checkpoint that is left, its layers counted anew."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError, ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.checkpoints.rewrite import Cut, Rewrite, expected, opens
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.compressors.prune.structural import every_other, least_influential
from modelzip.compressors.prune.structural_settings import Layers
from modelzip.recipes.schema import Recipe
from modelzip.weights.layouts import MODELZIP

from .calibrate import batches, forward_inputs
from .context import Context
from .importance import change_from, greedy_layers, hidden_input, main_value
from .layer_config import counted_anew, renumbered, require_countable
from .measure import open_streamed
from .room import memory_needed
from .smaller import Headers, StructuralMethod, headers_of
from .text import Windows
from .whole import compute_dtype, data_of, loss_of, loss_problem, whole_bytes

COUNT_KEYS: Final = {
    "encoder": ("encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
"""What configs with two stacks call the number of layers; with one, transformers says."""


@dataclass(frozen=True)
class _Stack:
    """The layers to choose from. path: of their list in the model; stored: of their tensors in the checkpoint.

    keys: how config.json calls their number, where the model has two stacks.
    """

    path: str
    stored: str
    blocks: tuple[str, ...]
    keys: tuple[str, ...]


def plan_layers(settings: Layers, checkpoint: Checkpoint) -> list[int]:
    """The layers that stay; where a criterion will choose them, the first ones. Raises ProblemsError."""
    headers = headers_of(checkpoint)
    stack = _stack(settings, headers)
    layers = len(stack.blocks)
    problems = []
    strange = [layer for layer in (*settings.keep, *settings.drop) if layer >= layers]
    if strange:
        problems.append(f"there is no layer {strange[0]}: the {layers} layers are counted from 0 to {layers - 1}")
    if settings.count is not None and settings.count >= layers:
        problems.append(f"count {settings.count} leaves nothing of {layers} layers: take less")
    elif settings.count is not None and settings.count > layers - len(fixed := needed_layers(settings, checkpoint)):
        problems.append(f"count {settings.count} is too many: layer {min(fixed)} holds what the others need; take less")
    is_greedy = settings.count is not None and settings.criterion == "greedy"
    if is_greedy and (problem := loss_problem(settings.loss, headers.model)):
        problems.append(problem)
    if problems:
        raise ProblemsError(problems)
    if settings.keep:
        kept = sorted(set(settings.keep))
    elif settings.count is not None:
        kept = list(range(layers - settings.count))
    else:
        gone = set(settings.drop) if settings.drop else set(every_other(layers, settings.every or layers + 1))
        kept = [layer for layer in range(layers) if layer not in gone]
    if len(kept) == layers:
        raise ProblemsError([f"none of the {layers} layers goes: name fewer to keep, or some to drop"])
    if not kept:
        raise ProblemsError([f"all {layers} layers go: leave at least one"])
    return kept


def choose_layers(settings: Layers, checkpoint: Checkpoint, windows: Windows | None, context: Context) -> list[int]:
    """The layers that stay, by the criterion."""
    assert settings.count is not None
    headers = headers_of(checkpoint)
    stack = _stack(settings, headers)
    with torch.no_grad():
        if settings.criterion == "similarity":
            streamed = open_streamed(checkpoint, context.recipe.dtype, context.device)
            assert windows is not None
            data = batches(windows.tokens, context.recipe.calibration.batch_size, forward_inputs(streamed.model))
            influence = block_influence(streamed, data)
            every = [block.name for block in streamed.structure.blocks]
            fixed = needed_layers(settings, checkpoint)
            mine = [influence[every.index(name)] for name in stack.blocks]
            gone = least_influential(
                [math.inf if layer in fixed else one for layer, one in enumerate(mine)], settings.count
            )
        else:
            gone = _greedy(settings, checkpoint, stack, windows=windows, context=context)
    return [layer for layer in range(len(stack.blocks)) if layer not in gone]


def block_influence(streamed: StreamedModel, data: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """1 - cosine of each block's input and output, the mean over tokens (Men et al. 2024, equation 1).

    One block's weights in memory at a time. Gradients must be off.
    """
    blocks = streamed.structure.blocks
    sums, tokens = [0.0] * len(blocks), [0] * len(blocks)

    def watch(number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = hidden_input(args, kwargs), output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
            sums[number] += float((1 - cosine).sum())
            tokens[number] += cosine.numel()

        return hook

    handles = [
        streamed.model.get_submodule(block.name).register_forward_hook(watch(number), with_kwargs=True)
        for number, block in enumerate(blocks)
    ]
    try:
        for output in streamed.outputs(data):
            del output
    finally:
        for handle in handles:
            handle.remove()
    return [total / count for total, count in zip(sums, tokens, strict=True)]


def _greedy(
    settings: Layers, checkpoint: Checkpoint, stack: _Stack, *, windows: Windows | None, context: Context
) -> list[int]:
    assert settings.count is not None
    recipe = context.recipe
    dtype = compute_dtype(recipe, checkpoint, context.device)
    model = load_whole(checkpoint, dtype=dtype, device=context.device)
    data = data_of(windows, model, recipe, context.device)
    kind, _ = loss_of(settings.loss, model, checkpoint, seed=recipe.seed)
    # Without labels the change itself can be measured: no gradient of it is needed here.
    change = change_from([main_value(model(**batch)) for batch in data]) if kind == "self" else None

    def loss() -> float:
        if change is not None:
            return sum(change(number, model(**batch)) for number, batch in enumerate(data)) / len(data)
        _, by_sample = loss_of(kind, model, checkpoint, seed=recipe.seed)  # anew, so that it hides the same tokens
        return float(torch.cat([by_sample(model, batch).double() for batch in data]).mean())

    fixed = needed_layers(settings, checkpoint)
    passes = sum(len(stack.blocks) - len(fixed) - gone for gone in range(settings.count))
    gone, _ = greedy_layers(
        model,
        stack.blocks,
        settings.count,
        loss,
        fixed=fixed,
        step=lambda done: context.progress.step("score", done, passes, "layers"),
    )
    return gone


def needed_layers(settings: Layers, checkpoint: Checkpoint) -> frozenset[int]:
    """Layers without which no model opens: T5's first ones hold the positions' bias for all of their stack."""
    headers = headers_of(checkpoint)
    blocks = _stack(settings, headers).blocks
    state = headers.model.state_dict()
    inside = [frozenset(name[len(block) :] for name in state if name.startswith(f"{block}.")) for block in blocks]
    usual, _ = Counter(inside).most_common(1)[0]
    found = set()
    for layer, names in enumerate(inside):
        try:
            if names != usual:
                build_layers(settings, checkpoint, [other for other in range(len(blocks)) if other != layer])
        except CheckpointError:
            found.add(layer)
    return frozenset(found)


def build_layers(settings: Layers, checkpoint: Checkpoint, kept: Sequence[int]) -> Rewrite:
    """The layers that stay under new numbers. Raises CheckpointError if no such model can be opened."""
    headers = headers_of(checkpoint)
    stack = _stack(settings, headers)
    parts: dict[str, dict[str, Cut]] = {}
    dropped: dict[str, str] = {}
    new = {str(old): str(number) for number, old in enumerate(kept)}
    for name in checkpoint.tensors:
        if not name.startswith(f"{stack.stored}."):
            continue
        old, _, rest = name.removeprefix(f"{stack.stored}.").partition(".")
        if old not in new:
            dropped[name] = f"layer {old} is taken out"
        elif new[old] != old:
            parts.setdefault(f"{stack.path}.{new[old]}", {})[f"{stack.stored}.{new[old]}.{rest}"] = Cut(name)
    config = _config(headers.model, checkpoint, stack, kept)
    record = {"method": "layers", "of": len(stack.blocks), "left": len(kept), "kept": list(kept), "note": ""}
    rewrite = Rewrite(config=config, parts=parts, dropped=dropped, records={stack.path: record})
    if problem := opens(expected(rewrite, checkpoint)):
        raise CheckpointError(problem)
    return rewrite


def _config(model: Any, checkpoint: Checkpoint, stack: _Stack, kept: Sequence[int]) -> dict[str, Any]:
    before = model.config.to_dict()
    config = dict(checkpoint.config)
    for key in COUNT_KEYS["encoder"] + COUNT_KEYS["decoder"] if stack.keys else ():
        if isinstance(before.get(key), int):  # said outright, as T5 takes the decoder's from the encoder's
            config[key] = before[key]
    config = counted_anew(config, model.config, kept, keys=stack.keys)
    if checkpoint.quantization is not None:
        config["quantization_config"] = renumbered(checkpoint.quantization, stack.path, kept)
    return config


def _stack(settings: Layers, headers: Headers) -> _Stack:
    model, names, structure = headers.model, headers.names, headers.structure
    paths = list(dict.fromkeys(block.name.rpartition(".")[0] for block in structure.blocks))
    require_countable(model.config)
    if names.checkpoint.quantization is not None and names.checkpoint.quantization.get("quant_method") != MODELZIP:
        raise CheckpointError("it is quantized already: take layers out before quantizing")
    if len(paths) > 1:
        if settings.stack is None:
            raise CheckpointError(f"it has {len(paths)} stacks of layers, {', '.join(paths)}: choose one with stack")
        paths = [path for path in paths if settings.stack in path.split(".")]
        keys: tuple[str, ...] = COUNT_KEYS[settings.stack]
    elif settings.stack is not None and settings.stack not in paths[0].split("."):
        raise CheckpointError(f"it has one stack of layers, {paths[0]}, and no {settings.stack}: leave stack out")
    else:
        keys = ()
    if len(paths) != 1 or model.config.get_text_config() is not model.config:
        raise CheckpointError(f"{type(model).__name__} has its layers in a place that modelzip doesn't know")
    blocks = tuple(block.name for block in structure.blocks if block.name.rpartition(".")[0] == paths[0])
    leaf = paths[0].rpartition(".")[2]
    inside = [name for name in model.state_dict() if name.startswith(f"{blocks[0]}.")]
    first = names.sources(inside)[0]
    before, found, _ = f".{first}".partition(f".{leaf}.0.")
    if not found:
        raise CheckpointError(f"{first}, of its first layer, isn't numbered like the layers of {paths[0]}")
    return _Stack(paths[0], f"{before}.{leaf}".removeprefix("."), blocks, keys)


def _memory(settings: Layers, checkpoint: Checkpoint, recipe: Recipe) -> int:
    headers = headers_of(checkpoint)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    if settings.count is None:
        return 2 * largest
    if settings.criterion == "similarity":
        return memory_needed(recipe, checkpoint, headers.structure, headers.model.config, needs_data=True)
    config = headers.model.config.get_text_config()
    logits: int = 8 * config.vocab_size * recipe.calibration.seq_len * recipe.calibration.batch_size
    kept: int = 4 * config.vocab_size * recipe.calibration.seq_len * recipe.calibration.samples
    is_compared = settings.loss == "self"
    return whole_bytes(recipe, checkpoint) + largest + logits + (kept if is_compared else 0)


def _notes(settings: Layers, rewrite: Rewrite) -> tuple[str, ...]:
    (record,) = rewrite.records.values()
    layers = record["of"]
    if settings.count is not None:
        note = f"{settings.count} of {layers} layers go, chosen by {settings.criterion} once they are measured"
        is_whole = settings.criterion == "greedy"
        return (note, "the whole model is in memory while they are") if is_whole else (note,)
    gone = [str(layer) for layer in range(layers) if layer not in record["kept"]]
    return (f"{len(gone)} of {layers} layers go: {', '.join(gone)}",)


LAYERS: Final = StructuralMethod(plan_layers, build_layers, choose_layers, _memory, _notes)
