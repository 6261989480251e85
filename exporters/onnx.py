"""ONNX: a folder as optimum and transformers.js lay it out, packed integers as onnxruntime computes with them.

Encoders and classifiers answer at once; decoders take and give a cache of keys and values. A file of ONNX is one
message, which has to be whole in memory to be written; of models beyond INLINE_BYTES, the message holds no weights, and
these are written one at a time to files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.blocks import find_structure
from modelzip.recipes.export_formats import AUTO
from modelzip.weights.affine import Affine
from modelzip.weights.low_rank import LowRank

from .dense import plain_config
from .files import write_files
from .onnx_graph import traced
from .onnx_nodes import exchange, marked_nodes
from .onnx_weights import GROUP, Matrices, kept_layout
from .request import Request, Written
from .source import Source

if TYPE_CHECKING:
    import onnx_ir as ir

FOLDER: Final = "onnx"
FILES: Final = {"fp32": "model.onnx", "q8": "model_quantized.onnx", "q4": "model_q4.onnx"}
"""Where transformers.js looks for a model of each of its dtypes."""

DTYPES: Final = {"fp32": "fp32", "int8": "q8", "int4": "q4"}
"""Of each scheme, what transformers.js calls it."""

INLINE_BYTES: Final = 1_900_000_000
"""Weights within one file. A message of protobuf ends at 2 GiB, and so does what a browser reads in one go."""

SMALL_BYTES: Final = 1024
"""What is smaller stays in the file: onnxruntime looks at shapes and indices before it reads other files."""

ATTENTION: Final = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose cache is keys and values alone."""

EXPERTS: Final = ("router", "fused experts")
"""Why `find_structure` leaves parts of a mixture of experts alone."""


def write(request: Request) -> Written:
    """Write the folder. `auto`: packed where the source is, dense fp32 elsewhere; `int8`, `int4`: the linears of the
    blocks rounded, but for integers of no more bits, which are kept.

    Raises CheckpointError for a model that torch can't trace, and what `write_files` raises.
    """
    source, config, rounded = request.source, plain_config(request), 0

    def make(folder: Path) -> None:
        nonlocal rounded
        model = traced(source)
        matrices = Matrices(source, request.scheme, model.graph, _tables(model.graph, source), request.report)
        exchange(model.graph, matrices)
        dtype = DTYPES.get(request.scheme) or _narrowest(matrices)
        shards = _shards(model.graph)
        beside = {"use_external_data_format": {FILES[dtype]: len(shards)}} if shards else {}
        config["transformers.js_config"] = {"dtype": dtype, **beside}
        _save(model, folder / FOLDER, FILES[dtype], shards)
        rounded = matrices.rounded

    path = write_files(request, make, config=config)
    return Written(path, (_said(rounded, request.scheme),) if rounded else ())


def misfit(source: Source, scheme: str) -> str | None:
    """Why the model can't be written so, or None."""
    model: Any = source.model
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return f"{name} has an encoder and a decoder, and ONNX is written for models of one stack"
    if model.main_input_name != "input_ids":
        return f"{name} takes {model.main_input_name}, and ONNX is written for models that take input_ids"
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind not in ATTENTION]
    if kinds or getattr(model, "_is_stateful", False):
        told = f"layers of the kind {kinds[0]}" if kinds else "a state that runs along"
        return f"{name} has {told}, and ONNX is written for models whose cache is keys and values"
    structure = find_structure(model, source.checkpoint, names=source.names)
    if router := next((module for module, reason in structure.left_alone if reason in EXPERTS), None):
        return f"{router} is of a mixture of experts, and ONNX is written for models without"
    for module in source.matrices() if scheme == AUTO else ():
        stored = source.stored(module)
        factors = (stored.left, stored.right) if isinstance(stored, LowRank) else (stored,)
        for one in factors:
            if isinstance(one, Affine) and kept_layout(one, scheme) is None:
                return f"{module} has {one.group_size} columns to a scale, and onnxruntime needs a multiple of 16"
    return None


def answer(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output of onnxruntime, on CPU: all tokens are attended to, are of type 0, and follow no others."""
    import onnxruntime

    (file,) = (path / FOLDER).glob("*.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    ids = inputs["input_ids"]
    known = {
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        **inputs,
    }
    feed = {}
    for one in session.get_inputs():
        if one.name in known:
            feed[one.name] = known[one.name].numpy()
        else:
            _, heads, _, width = one.shape
            feed[one.name] = torch.zeros(len(ids), heads, 0, width).numpy()
    names = [one.name for one in session.get_outputs() if not one.name.startswith("present.")]
    outputs = [torch.from_numpy(one) for one in session.run(names, feed)]
    return outputs[0] if len(outputs) == 1 else torch.cat([one.flatten() for one in outputs])


def _tables(graph: ir.Graph, source: Source) -> frozenset[str]:
    """The parameters that embeddings look up."""
    modules = [module for node, module in marked_nodes(graph) if node.op_type == "Embedding"]
    return frozenset(source.names.owner(f"{module}.weight") for module in modules)


def _narrowest(matrices: Matrices) -> str:
    """transformers.js's word for what holds the packed matrices: q8 if any has 8 bits."""
    if not matrices.bits:
        return DTYPES["fp32"]
    return DTYPES["int8" if 8 in matrices.bits else "int4"]


def _shards(graph: ir.Graph) -> list[list[ir.Value]]:
    """The initializers that leave the file, in groups of at most INLINE_BYTES unless one is larger; none if all fit."""
    shards: list[list[ir.Value]] = [[]]
    size = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < SMALL_BYTES:
            continue
        if shards[-1] and size + tensor.nbytes > INLINE_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(value)
        size += tensor.nbytes
    return shards if len(shards) > 1 or size > INLINE_BYTES else []


def _save(model: ir.Model, folder: Path, name: str, shards: list[list[ir.Value]]) -> None:
    """Write the model and, under the names that transformers.js asks for, what lies outside of it."""
    import onnx_ir as ir

    folder.mkdir()
    for number, values in enumerate(shards):
        tensors = [value.const_value for value in values if value.const_value is not None]
        file = f"{name}_data{f'_{number}' if number else ''}"
        moved = ir.external_data.convert_tensors_to_external(tensors, folder, file)
        for value, tensor in zip(values, moved, strict=True):
            value.const_value = tensor
    ir.save(model, folder / name)


def _said(count: int, scheme: str) -> str:
    scales = "a scale to each row" if scheme == "int8" else f"a scale and a zero point to {GROUP} weights"
    return f"{count} matrices were rounded anew to {scheme}, {scales}"
