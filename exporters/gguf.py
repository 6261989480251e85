"""GGUF, the file that llama.cpp runs: grids that fit GGML's blocks as they are, what doesn't rounded anew.

One matrix is in memory at a time. Norms, biases and learned positions are fp32, as in all files of llama.cpp's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_VERSION
from gguf.quants import quant_shape_to_byte_shape
from torch import Tensor

from modelzip.checkpoints.errors import OutputError
from modelzip.checkpoints.index import DTYPES
from modelzip.recipes.export_formats import AUTO
from modelzip.recipes.naming import model_name
from modelzip.weights.affine import Affine

from . import dense, gguf_model, gguf_tokenizer
from .files import write_files
from .gguf_blocks import FLOATS, fits, packed, rounded, smallest, values_of
from .request import Request, Written
from .source import Source

KEPT: Final = 2**-8
"""How far a grid that is packed as it is may be from the matrix that modelzip computes with, in relation to it: there,
products of codes and scales may be rounded to bf16, here scales and minima to fp16. What is farther is rounded anew."""
SINGLE: Final = ("position_embd.weight", "token_types.weight")
"""Matrices that llama.cpp has in fp32."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file. name: of the parameter in the model. matrix: whether it is a linear's or embedding's."""

    place: str
    name: str
    shape: tuple[int, ...]
    type: Type
    matrix: bool

    @property
    def nbytes(self) -> int:
        return math.prod(quant_shape_to_byte_shape(self.shape, self.type))


@dataclass
class Losses:
    """Of matrices that were rounded anew: how many to each type, and the largest error in relation to a matrix."""

    counts: dict[Type, int] = field(default_factory=dict)
    errors: dict[Type, float] = field(default_factory=dict)

    def add(self, type: Type, error: float) -> None:
        self.counts[type] = self.counts.get(type, 0) + 1
        self.errors[type] = max(self.errors.get(type, 0.0), error)

    def said(self) -> tuple[str, ...]:
        return tuple(
            f"{count} {'matrix was' if count == 1 else 'matrices were'} rounded anew to {type.name}, which changes "
            f"{'it by' if count == 1 else 'them by up to'} {self.errors[type]:.2%}"
            for type, count in self.counts.items()
        )


def write(request: Request) -> Written:
    """Write the folder with `<model>-<scheme>.gguf` in it; without a scheme it is named after most of the weights.

    Raises OutputError for a number that F16 can't hold, and what `write_files` raises.
    """
    source, losses = request.source, Losses()
    tensors = list(_plan(source, request.scheme))
    most = _most(tensors) if request.scheme == AUTO else Type[request.scheme]

    def make(folder: Path) -> None:
        file = folder / f"{model_name(request.checkpoint.source)}-{most.name}.gguf"
        _write_file(file, request, source, tensors, most, losses)

    return Written(write_files(request, make, config=dense.plain_config(request)), losses.said())


def misfit(source: Source, scheme: str) -> str | None:
    """Why llama.cpp can't run the model, or None."""
    return (
        dense.misfit(source, AUTO)
        or gguf_model.misfit(source)
        or gguf_tokenizer.misfit(source.checkpoint, int(source.model.config.vocab_size))
    )


def answer(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """llama.cpp's logits, [1, tokens, vocabulary], or of an encoder its hidden states, [1, tokens, width]; the cache of
    keys and values is fp32."""
    import llama_cpp

    (file,) = path.glob("*.gguf")
    tokens: list[int] = inputs["input_ids"].flatten().tolist()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if model is None:
        raise RuntimeError("llama.cpp doesn't open the file")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(tokens)
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which would multiply in fp16
    options.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    options.embeddings = is_encoder = _architecture(file) == "bert"
    context = llama_cpp.llama_init_from_model(model, options)
    if context is None:
        raise RuntimeError("llama.cpp opens the file, but can't run it")
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama.cpp opens the file, but fails as it runs")
    width = llama_cpp.llama_model_n_embd(model)
    found = llama_cpp.llama_get_embeddings(context)
    if not is_encoder:
        width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        found = llama_cpp.llama_get_logits(context)
    return torch.from_numpy(np.ctypeslib.as_array(found, (1, len(tokens), width)).copy())


def _architecture(file: Path) -> str:
    told = GGUFReader(file).fields["general.architecture"].contents()
    return str(told)


def _plan(source: Source, scheme: str) -> Iterator[Planned]:
    matrices, state = set(source.matrices()), source.model.state_dict()
    for name, place in gguf_model.names(source):
        module, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and module in matrices
        assert place is not None  # or else it was refused
        if is_matrix and place not in SINGLE:
            shape = source.shape(module)
            yield Planned(place, name, shape, _type(source, module, scheme, in_block=place.startswith("blk.")), True)
        else:
            yield Planned(place, name, tuple(state[name].shape), Type.F32, is_matrix)


def _type(source: Source, module: str, scheme: str, *, in_block: bool) -> Type:
    """Of a matrix. What the type that is asked for can't hold, because its rows are no whole blocks, gets the one that
    llama.cpp takes in its place: Q5_0 for Q4_K, and F16 for the others.
    """
    columns = source.shape(module)[1]
    if scheme == AUTO:
        return _own_type(source, module, columns)
    asked = Type[scheme]
    if asked in FLOATS:
        return asked
    wanted = (asked, Type.Q5_0, Type.F16) if asked == Type.Q4_K else (asked, Type.F16)
    return next(type for type in (wanted if in_block else (Type.Q8_0, Type.F16)) if fits(columns, type))


def _own_type(source: Source, module: str, columns: int) -> Type:
    """The smallest type that holds the weight as it is; of a grid that fits none, one of about as many bits."""
    weight = source.stored(module)
    if isinstance(weight, Affine):
        if (type := smallest(weight)) is not None:
            return type
        if fits(columns, Type.Q8_0):
            return Type.Q8_0 if weight.bits > 4 else Type.Q4_0 if weight.zero_point is None else Type.Q4_1
    dtype = _stored_dtype(source, module) if weight is None else weight.dtype
    return next((type for type, one in FLOATS.items() if one == dtype), Type.F32)


def _stored_dtype(source: Source, module: str) -> torch.dtype:
    first = source.names.sources([f"{module}.weight"])[0]
    return DTYPES[source.checkpoint.tensors[first].dtype]


def _most(tensors: list[Planned]) -> Type:
    """The type of most of the weights."""
    counts: dict[Type, int] = {}
    for one in tensors:
        if one.matrix:
            counts[one.type] = counts.get(one.type, 0) + math.prod(one.shape)
    return max(counts, key=counts.__getitem__)


def _write_file(
    file: Path, request: Request, source: Source, tensors: list[Planned], most: Type, losses: Losses
) -> None:
    with closing(GGUFWriter(file, gguf_model.architecture(source))) as writer:
        writer.add_type("model")
        writer.add_name(model_name(request.checkpoint.source))
        writer.add_file_type(LlamaFileType.ALL_F32 if most == Type.F32 else _file_type(most))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        gguf_model.describe(writer, source)
        gguf_tokenizer.describe(writer, source.checkpoint, int(source.model.config.vocab_size))
        factors = gguf_model.rope_factors(source)
        if factors is not None:
            _announce(writer, Planned("rope_freqs.weight", "", tuple(factors.shape), Type.F32, False))
        for one in tensors:
            _announce(writer, one)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        total, done = sum(one.nbytes for one in tensors), 0
        for one in tensors:
            writer.write_tensor_data(_bytes_of(source, one, losses).numpy())
            done += one.nbytes
            request.report(done, total)
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _file_type(most: Type) -> LlamaFileType:
    return LlamaFileType[f"MOSTLY_{most.name}_S" if most == Type.Q4_K else f"MOSTLY_{most.name}"]


def _announce(writer: GGUFWriter, one: Planned) -> None:
    shape = quant_shape_to_byte_shape(one.shape, one.type)
    writer.add_tensor_info(one.place, shape, np.dtype(np.uint8), one.nbytes, raw_dtype=one.type)


def _bytes_of(source: Source, one: Planned, losses: Losses) -> Tensor:
    """The tensor as it lies in the file: uint8 [out, bytes]."""
    data = _matrix(source, one, losses) if one.matrix else rounded(source.parameter(one.name, torch.float32), one.type)
    order = gguf_model.row_order(source, one.name)
    if order is None:
        return data
    return data.reshape(len(order), -1)[order].contiguous()


def _matrix(source: Source, one: Planned, losses: Losses) -> Tensor:
    module = one.name.removesuffix(".weight")
    weight = source.weight(module)
    values = source.dense(module) if weight is None else weight.dense(torch.float32)
    data = packed(weight, one.type) if isinstance(weight, Affine) else None
    if data is not None and _distance(data, one.type, values) <= KEPT:
        return data
    data = rounded(values, one.type)
    if one.type not in FLOATS:
        losses.add(one.type, _distance(data, one.type, values))
    elif one.type == Type.F16 and not bool(data.view(torch.float16).isfinite().all()):
        raise OutputError(f"{one.name} has numbers beyond the range of F16: choose --scheme BF16 or F32.")
    return data


def _distance(data: Tensor, type: Type, values: Tensor) -> float:
    """Of what the file holds from a matrix, in relation to the matrix; infinite where a scale was."""
    found = (values_of(data, type) - values).norm() / values.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float(found.nan_to_num(torch.inf))
