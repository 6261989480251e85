"""The nodes that compute with the matrices of an ONNX graph: products, and rows of tables, packed ones in part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .onnx_graph import DOMAIN
from .onnx_packing import Layout
from .onnx_weights import MICROSOFT, Dense, Matrices, Matrix, Packed

if TYPE_CHECKING:
    import onnx_ir as ir


def marked_nodes(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    """The nodes that stand for matrices, with the path of the module."""
    for node in graph:
        if node.domain == DOMAIN:
            yield node, node.attributes["module"].as_string()


def exchange(graph: ir.Graph, matrices: Matrices) -> None:
    """Put what computes with the matrices in the place of the marked nodes."""
    import onnx_ir as ir

    for node, module in list(marked_nodes(graph)):
        nodes = _Nodes(graph)
        (x,) = node.inputs
        assert x is not None
        matrix = matrices.of(module)
        made = nodes.rows(matrix, x) if node.op_type == "Embedding" else nodes.product(x, matrix)
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes.made, node.outputs, [made])
    graph.opset_imports.pop(DOMAIN, None)
    graph.opset_imports[MICROSOFT] = 1


class _Nodes:
    """Nodes under way, in order. Small constants become initializers of the graph, each once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self.made: list[ir.Node] = []

    def product(self, x: ir.Value, matrix: Matrix) -> ir.Value:
        """x [..., in] times the transpose of a matrix [out, in]."""
        if isinstance(matrix, Packed):
            layout = matrix.layout
            sizes = {"K": layout.columns, "N": layout.rows, "bits": layout.bits, "block_size": layout.block}
            return self._op("MatMulNBits", x, *matrix.parts.values(), domain=MICROSOFT, **sizes)
        if isinstance(matrix, Dense):
            value = matrix.value if matrix.transposed else self._op("Transpose", matrix.value, perm=[1, 0])
            return self._op("MatMul", x, value)
        return self.product(self.product(x, matrix.right), matrix.left)

    def rows(self, matrix: Matrix, ids: ir.Value) -> ir.Value:
        """Rows [..., in] of a matrix [out, in] that is stored row by row; of a packed one, these alone are unpacked."""
        if isinstance(matrix, Dense):
            return self._op("Gather", matrix.value, ids, axis=0)
        if isinstance(matrix, Packed):
            return self._unpacked(matrix, ids)
        assert isinstance(matrix.right, Dense)
        return self._op("MatMul", self.rows(matrix.left, ids), matrix.right.value)

    def _unpacked(self, matrix: Packed, ids: ir.Value) -> ir.Value:
        layout, kept = matrix.layout, [0] * _rank(ids)  # a 0 in the shape of Reshape leaves a size as it is
        found = {name: self._op("Gather", value, ids, axis=0) for name, value in matrix.parts.items()}
        codes = self._codes(found["codes"], layout, [*kept, layout.blocks, layout.block])
        zero: ir.Value = self._constant(1 << (layout.bits - 1), "float32")
        if not layout.symmetric:
            zero = self._codes(found["zeros"], layout, [*kept, -1, 1])
            if layout.bits == 4 and layout.blocks % 2:
                zero = self._cut(zero, layout.blocks, axis=-2)
        scale = self._op("Unsqueeze", found["scales"], self._constant([-1], "int64"))
        values = self._op("Mul", self._op("Sub", codes, zero), scale)
        flat = self._op("Reshape", values, self._constant([*kept, layout.blocks * layout.block], "int64"))
        return flat if layout.columns == layout.blocks * layout.block else self._cut(flat, layout.columns, axis=-1)

    def _codes(self, stored: ir.Value, layout: Layout, shape: list[int]) -> ir.Value:
        """Bytes -> unsigned codes of this shape, as floats; of 4 bits, the low ones of a byte come first."""
        import onnx_ir as ir

        if layout.bits == 4:
            low = self._op("BitwiseAnd", stored, self._constant(15, "uint8"))
            high = self._op("BitShift", stored, self._constant(4, "uint8"), direction="RIGHT")
            last = self._constant([-1], "int64")
            stored = self._op("Concat", self._op("Unsqueeze", low, last), self._op("Unsqueeze", high, last), axis=-1)
        floats = self._op("Cast", stored, to=int(ir.DataType.FLOAT))
        return self._op("Reshape", floats, self._constant(shape, "int64"))

    def _cut(self, x: ir.Value, size: int, *, axis: int) -> ir.Value:
        start, end, axes = (self._constant([one], "int64") for one in (0, size, axis))
        return self._op("Slice", x, start, end, axes)

    def _op(self, kind: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes=attributes, domain=domain)
        self.made.append(node)
        return node.outputs[0]

    def _constant(self, value: int | list[int], dtype: str) -> ir.Value:
        import numpy as np
        import onnx_ir as ir

        name = f"constant_{dtype}_{value}"
        if name not in self._graph.initializers:
            array = np.array(value, dtype=dtype)
            self._graph.register_initializer(
                ir.Value(
                    name=name,
                    shape=ir.Shape(array.shape),
                    type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                    const_value=ir.Tensor(array, name=name),
                )
            )
        return self._graph.initializers[name]


def _rank(ids: ir.Value) -> int:
    assert ids.shape is not None
    return len(ids.shape)
