"""The matrices of an ONNX graph: packed integers for onnxruntime's MatMulNBits, products of factors, or dense fp32.

Each is read only when the file is written, one at a time. A matrix that several modules share is stored once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from modelzip.checkpoints.blocks import find_structure
from modelzip.compressors.quantize.grid import fit_grid
from modelzip.compressors.quantize.rtn import rtn
from modelzip.weights.affine import Affine
from modelzip.weights.low_rank import LowRank
from modelzip.weights.value import CompressedWeight

from .onnx_packing import Layout
from .source import Source

if TYPE_CHECKING:
    import onnx_ir as ir

BITS: Final = {"int8": 8, "int4": 4}
"""Of the schemes that round."""

GROUP: Final = 32
"""Columns to a scale and a zero point where a matrix is rounded to 4 bits."""

MICROSOFT: Final = "com.microsoft"
"""Domain of onnxruntime's own operators."""

T = TypeVar("T")
_Reader: TypeAlias = Callable[[], CompressedWeight | Tensor]


@dataclass(frozen=True)
class Dense:
    """value: a matrix [out, in], or [in, out] if transposed."""

    value: ir.Value
    transposed: bool


@dataclass(frozen=True)
class Packed:
    """parts: `codes`, `scales` and, unless symmetric, `zeros` of a layout."""

    layout: Layout
    parts: dict[str, ir.Value]


@dataclass(frozen=True)
class Product:
    """left [out, rank] times right [rank, in]."""

    left: Matrix
    right: Matrix


Matrix: TypeAlias = Dense | Packed | Product


def kept_layout(weight: Any, scheme: str) -> Layout | None:
    """How a stored weight's own integers are packed under a scheme; None if they aren't kept, or are none."""
    kept = isinstance(weight, Affine) and scheme != "fp32" and weight.bits <= BITS.get(scheme, 8)
    return Layout.of(weight.meta()) if kept else None


class _Last(Generic[T]):
    """What was made last: the tensors of one matrix are asked for one after the other."""

    def __init__(self) -> None:
        self._held: tuple[str, T] | None = None

    def of(self, name: str, make: Callable[[], T]) -> T:
        if self._held is None or self._held[0] != name:
            self._held = None  # before the next one takes its room
            self._held = name, make()
        return self._held[1]


class Matrices:
    """The matrices of one export.

    graph: takes the initializers. tables: parameters that embeddings look up, whose rows stay together. report: told
    how many bytes of all are made. rounded: how many matrices are. bits: of the packed ones.
    """

    def __init__(
        self, source: Source, scheme: str, graph: ir.Graph, tables: frozenset[str], report: Callable[[int, int], None]
    ) -> None:
        self._source, self._scheme, self._graph, self._report = source, scheme, graph, report
        self._tables = tables
        structure = find_structure(source.model, source.checkpoint, names=source.names)
        self._blocks = {source.names.owner(f"{one.name}.weight") for block in structure.blocks for one in block.linears}
        self._made: dict[str, Matrix] = {}
        self._weight, self._parts = _Last[CompressedWeight | Tensor](), _Last[dict[str, Tensor]]()
        self.bits: set[int] = set()
        self.rounded = self._nbytes = self._done = 0

    def of(self, module: str) -> Matrix:
        """The matrix of a linear or an embedding."""
        owner = self._source.names.owner(f"{module}.weight")
        if owner not in self._made:
            stored = self._source.stored(module)

            def load() -> CompressedWeight | Tensor:
                weight = self._source.weight(module)
                return self._source.dense(module) if weight is None else weight

            def read() -> CompressedWeight | Tensor:
                return self._weight.of(owner, load)

            self._made[owner] = self._planned(owner, stored, self._source.shape(module), read, owner)
        return self._made[owner]

    def _planned(
        self, name: str, stored: CompressedWeight | None, shape: tuple[int, int], read: _Reader, owner: str
    ) -> Matrix:
        is_table = owner in self._tables
        if isinstance(stored, LowRank):
            left, right = stored.left, stored.right
            return Product(
                self._planned(f"{name}_left", left, left.shape, lambda: _factors(read()).left, owner),
                self._dense(f"{name}_right", right.shape, lambda: _factors(read()).right, rows=True)
                if is_table
                else self._planned(f"{name}_right", right, right.shape, lambda: _factors(read()).right, owner),
            )
        if (layout := kept_layout(stored, self._scheme)) is not None:
            return self._packed(name, layout, read)
        if self._scheme in BITS and owner in self._blocks:
            self.rounded += 1
            layout = _rounded_layout(shape, BITS[self._scheme])
            return self._packed(name, layout, lambda: _rounded(_dense(read()), BITS[self._scheme]))
        return self._dense(name, shape, read, rows=is_table)

    def _packed(self, name: str, layout: Layout, read: _Reader) -> Packed:
        def pack() -> dict[str, Tensor]:
            weight = read()
            assert isinstance(weight, Affine)
            return layout.pack(weight)

        self.bits.add(layout.bits)
        return Packed(
            layout,
            {
                part: self._initializer(
                    f"{name}_{part}",
                    torch.float32 if part == "scales" else torch.uint8,
                    shape,
                    lambda part=part: self._parts.of(name, pack)[part],  # type: ignore[misc]
                )
                for part, shape in layout.shapes.items()
            },
        )

    def _dense(self, name: str, shape: tuple[int, int], read: _Reader, *, rows: bool) -> Dense:
        def dense() -> Tensor:
            matrix = _dense(read())
            return matrix if rows else matrix.T.contiguous()

        return Dense(self._initializer(name, torch.float32, shape if rows else shape[::-1], dense), not rows)

    def _initializer(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> ir.Value:
        import onnx_ir as ir

        def made() -> ir.TensorProtocol:
            tensor = ir.Tensor(make().numpy(), name=name)
            self._done += tensor.nbytes
            self._report(self._done, self._nbytes)
            return tensor

        kind = ir.DataType.FLOAT if dtype == torch.float32 else ir.DataType.UINT8
        tensor = ir.LazyTensor(made, kind, ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=tensor)
        self._graph.register_initializer(value)
        self._nbytes += tensor.nbytes
        return value


def _factors(weight: CompressedWeight | Tensor) -> LowRank:
    assert isinstance(weight, LowRank)
    return weight


def _dense(weight: CompressedWeight | Tensor) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dense(torch.float32)


def _rounded_layout(shape: tuple[int, int], bits: int) -> Layout:
    if bits == 4:
        return Layout(*shape, bits=4, block=GROUP, symmetric=False)
    by_channel = Layout.of({"shape": shape, "bits": 8, "group_size": None, "symmetric": True})
    assert by_channel is not None
    return by_channel


def _rounded(dense: Tensor, bits: int) -> Affine:
    """Rounded to nearest: 8 bits symmetric by row, or 4 bits asymmetric by group, of columns padded to whole groups.

    Zeros don't change a group's range, which always spans zero.
    """
    by_channel = bits == 8
    whole = dense if by_channel else pad(dense, (0, -dense.shape[1] % GROUP))
    size = whole.shape[1] if by_channel else GROUP
    grid = fit_grid(whole, bits=bits, group_size=size, symmetric=by_channel, clip="mse", dtype=torch.float32)
    return rtn(whole, grid)
