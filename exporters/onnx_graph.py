"""A model traced to an ONNX graph without its matrices: in place of each linear and embedding stands a marked node.

So no matrix is in memory while torch traces, and none has to be found again in what the tracing made of it.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.loaded import decode_of
from modelzip.checkpoints.reader import materialise, move_buffers
from modelzip.checkpoints.skeleton import UNBUILT, skeleton
from modelzip.weights.module import CompressedModule, shadow

from .source import Source

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN: Final = "modelzip"
"""Of the marked nodes: `Linear` and `Embedding`, whose attribute `module` is the module's path."""

OPSET: Final = 18
BATCH, NEW, PAST = 2, 3, 5
"""Sizes of what is traced: all different, since torch takes equal ones for one and the same."""


@dataclass(frozen=True)
class Signature:
    """inputs: names beside those of the cache. cache: heads and width of keys and of values, a pair a layer; empty for
    models that are run without one. outputs: names of the model's own.
    """

    inputs: tuple[str, ...]
    cache: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    outputs: tuple[str, ...]

    def names(self, stem: str) -> list[str]:
        """Of the tensors of the cache: `past_key_values` or `present`, as optimum has them."""
        return [f"{stem}.{layer}.{part}" for layer in range(len(self.cache)) for part in ("key", "value")]


class _Marked(nn.Module):
    """Gives a node that knows the module whose matrix it stands for; a linear's bias is added to it.

    called, taken: whether the module was, and whether its weight was looked at.
    """

    bias: nn.Parameter | None

    def __init__(self, path: str, shape: tuple[int, int], original: nn.Module) -> None:
        super().__init__()
        self.path, self.shape, self.is_table = path, shape, isinstance(original, nn.Embedding)
        self.register_parameter("bias", getattr(original, "bias", None))
        self.scale = _scale(original) if self.is_table else None
        self.original = (original,)  # in a tuple, so that it is no part of the model
        self.stand_in = torch.zeros(1).expand(shape)
        self.called = self.taken = False

    @property
    def weight(self) -> Tensor:
        """Shape and dtype, for code that asks for these."""
        self.taken = True
        return self.stand_in

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            raise ValueError(f"{self.path} is given what was computed from the weight of a module that is also called")
        self.called = True
        rows, columns = self.shape
        shape = (*x.shape, columns) if self.is_table else (*x.shape[:-1], rows)
        kind = "Embedding" if self.is_table else "Linear"
        y = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{kind}", (x,), attrs={"module": self.path}, dtype=torch.float32, shape=shape, version=1
        )
        if self.scale is not None:
            return y * self.scale
        return y if self.bias is None else y + self.bias


class _Traced(nn.Module):
    """The model as a function of tensors, in the order of a signature."""

    def __init__(self, model: Any, signature: Signature) -> None:
        super().__init__()
        self.model, self.outputs = model, signature.outputs

    def forward(self, inputs: dict[str, Tensor], past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        # Without the model's config, so that layers with a sliding window keep all they have seen: the mask hides it.
        cache = {"past_key_values": DynamicCache(past), "use_cache": True} if past else _uncached(self.model)
        output = self.model(**inputs, **cache, return_dict=True)
        layers = output.past_key_values.layers if past else ()
        return (*(output[name] for name in self.outputs), *(one for each in layers for one in (each.keys, each.values)))


def traced(source: Source) -> ir.Model:
    """The graph, with marked nodes for matrices. Raises CheckpointError for a model that torch can't trace."""
    model: Any = skeleton(source.checkpoint)
    try:
        model.set_attn_implementation("eager")  # plain products and masks, which every runtime has
        move_buffers(model, "cpu")
        _mark(model, source)
        _fill(model, source)
        _signature(model)  # runs the model, which shows whose weights are taken
        _restore(model)
        _fill(model, source)
        signature = _signature(model)
        graph = _trace(model, signature)
    except UNBUILT as error:
        cause = error.__cause__ or error  # what torch.export found, not the exporter's advice
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise CheckpointError(
            f"{source.checkpoint.source}: torch can't turn {type(model).__name__} into an ONNX graph: {first}"
        ) from error
    _check_dynamic(graph, source)
    return graph


def _is_decoder(model: Any) -> bool:
    """Whether the model writes token after token, so that it is run with a cache of keys and values."""
    return bool(model.can_generate())


def _mark(model: nn.Module, source: Source) -> None:
    """Exchange linears and plain embeddings for markers, one for each module, under all its names."""
    marked: dict[nn.Module, _Marked] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if _is_marked(module):
            marker = marked.setdefault(module, _Marked(path, source.shape(path), module))
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, marker)


def _restore(model: nn.Module) -> None:
    """Take back the markers of modules that aren't called, but whose weight is taken; after a run.

    The weight that others show from now on has no values, so that nothing can be computed from it unseen.
    """
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, _Marked) and module.taken and not module.called:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.original[0])
        elif isinstance(module, _Marked):
            module.stand_in = shadow(*module.shape, torch.float32)


def _fill(model: nn.Module, source: Source) -> None:
    """Read what isn't there yet of the parameters that modules themselves keep."""
    checkpoint, names, decode = source.checkpoint, source.names, decode_of(source.checkpoint)
    materialise(model, [""], checkpoint=checkpoint, names=names, device="cpu", dtype=torch.float32, decode=decode)


def _is_marked(module: nn.Module) -> bool:
    """Whether a module does nothing with its weight but to multiply by it, or to look up rows."""
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward or _scale(module) is not None
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):  # attention takes its weight itself
        return False
    return isinstance(module, nn.Linear | Conv1D | CompressedModule)


def _scale(module: nn.Module) -> float | None:
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    return None if scale is None else float(scale)


def _uncached(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def _signature(model: Any) -> Signature:
    known = inspect.signature(model.forward).parameters
    inputs = ["input_ids", *(["attention_mask"] if "attention_mask" in known else [])]
    if "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs.append("token_type_ids")
    ids = torch.ones(1, NEW, dtype=torch.long)
    if not _is_decoder(model):
        output = model(input_ids=ids, **_uncached(model), return_dict=True)
        heads = [name for name in ("logits", "last_hidden_state") if isinstance(output.get(name), Tensor)]
        numbers = [name for name, one in output.items() if isinstance(one, Tensor) and one.is_floating_point()]
        return Signature(tuple(inputs), (), tuple(heads[:1] or numbers))
    if "position_ids" in known:
        inputs.append("position_ids")
    cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True, return_dict=True).past_key_values
    sizes = [tuple((one.shape[1], one.shape[3]) for one in (each.keys, each.values)) for each in cache.layers]
    return Signature(tuple(inputs), tuple(sizes), ("logits",))  # type: ignore[arg-type]


def _trace(model: Any, signature: Signature) -> ir.Model:
    past = PAST if signature.cache else 0
    inputs, axes = {}, {}
    for name in signature.inputs:
        spans_all = past and name == "attention_mask"
        inputs[name] = torch.ones(BATCH, past + NEW if spans_all else NEW, dtype=torch.long)
        axes[name] = {0: "batch_size", 1: "total_sequence_length" if spans_all else "sequence_length"}
    cache = [tuple(torch.zeros(BATCH, heads, past, width) for heads, width in pair) for pair in signature.cache]
    # The names are optimum's: transformers.js makes an empty cache of as many rows as "batch_size" says.
    grows = {0: "batch_size", 2: "past_sequence_length"}
    with _quiet():
        program = torch.onnx.export(
            _Traced(model, signature).eval(),
            (inputs, cache),
            input_names=[*signature.inputs, *signature.names("past_key_values")],
            output_names=[*signature.outputs, *signature.names("present")],
            dynamic_shapes=(axes, [(grows, grows) for _ in cache]),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            optimize=False,  # its search for patterns takes longer than all the rest, and onnxruntime has its own
        )
    assert program is not None
    return _tidied(program.model)


def _tidied(model: ir.Model) -> ir.Model:
    """Constants computed, what nothing needs left out, and the lines of Python that made each node forgotten."""
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    steps = (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.ClearMetadataAndDocStringPass(),
    )
    tidied: ir.Model = Sequential(*steps)(model).model
    return tidied


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's words on packages that aren't there, and on axes that have the same name."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_dynamic(graph: ir.Model, source: Source) -> None:
    """Raises CheckpointError if the tracing fixed a size that is a text's."""
    for value in graph.graph.inputs:
        sizes = list(value.shape or ())
        if any(isinstance(sizes[axis], int) for axis in ((0, 2) if len(sizes) == 4 else (0, 1))):
            kind = type(source.model).__name__
            raise CheckpointError(f"{source.checkpoint.source}: torch traced {kind} for {value.name} of one size only.")
