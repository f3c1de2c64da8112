"""What the lowered graph promises: which of its nodes ONNX Runtime is expected to run as which kernel, and what would be in the way.

    PROMISES["::Conv"] = conv        a Conv between DequantizeLinear and QuantizeLinear becomes QLinearConv

Read from the written model, not from the plan, so that it also holds for files that another tool has made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

MICROSOFT = "com.microsoft"
PASSES_THROUGH = ("Relu", "Clip")
"""Activations that an integer kernel performs by saturation, when the quantized range ends where they do."""


@dataclass(frozen=True)
class Promise:
    """`node` should run as one of `kernels` (the first is the usual one). `values` are names of values that the kernel may produce in
    its place. `folded`: its weight should be an initializer. `obstacle`: why this cannot be expected, as far as the graph tells."""

    node: ir.Node
    kernels: tuple[str, ...]
    values: tuple[str, ...]
    obstacle: str = ""
    folded: bool = False

    @property
    def label(self) -> str:
        return self.node.name or self.values[0]


Rule = Callable[[ir.Node], Promise | None]
PROMISES: dict[str, Rule] = {}
"""Operator -> what a node of it promises, None for nothing."""


def promises(*keys: str) -> Callable[[Rule], Rule]:
    """Decorator: this function says what nodes of these operators promise."""

    def register(fn: Rule) -> Rule:
        PROMISES.update(dict.fromkeys(keys, fn))
        return fn

    return register


def promised(model: ir.Model) -> Iterator[Promise]:
    """The promises of a model, in order, nested bodies included."""
    for node in model.graph.all_nodes():
        rule = PROMISES.get(f"{node.domain}::{node.op_type}")
        found = rule(node) if rule is not None else None
        if found is not None:
            yield found


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def chain(node: ir.Node) -> tuple[tuple[str, ...], ir.Node | None, str]:
    """(names of the values from the node on, the QuantizeLinear at their end, why there is none)."""
    names: list[str] = []
    while True:
        value = node.outputs[0]
        names.append(str(value.name))
        readers = {use.node for use in value.uses()}
        if value.is_graph_output() or len(readers) != 1:
            return tuple(names), None, "its output is read in float" if value.is_graph_output() else _several(readers)
        (node,) = readers
        if node.op_type == "QuantizeLinear":
            return (*names, str(node.outputs[0].name)), node, ""
        if node.op_type not in PASSES_THROUGH:
            return tuple(names), None, f"its output goes to {node.op_type} in float"


def _several(readers: set[ir.Node]) -> str:
    kinds = ", ".join(sorted({n.op_type for n in readers}))
    return f"its output is read by several nodes ({kinds})" if kinds else "its output is not read"


def constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and not value.is_graph_input()


def type_obstacle(*dequantized: ir.Node) -> str:
    """Why integer kernels cannot take these dequantized operands."""
    for dq in dequantized:
        q, scale = dq.inputs[0], dq.inputs[1]
        if q is not None and q.dtype in (ir.DataType.INT16, ir.DataType.UINT16):
            return "integer kernels take 8 bits, not 16"
        if q is not None and q.dtype is not None and q.dtype.bitwidth < 8:
            return f"integer kernels with static activations take 8-bit weights, not {q.dtype.name.lower()}"
        if scale is not None and scale.dtype not in (None, ir.DataType.FLOAT):
            return f"integer kernels read float32 scales, not {scale.dtype.name.lower()}"
        if dq.attributes.get_int("block_size", 0):
            return "integer kernels with static activations have no scales per group"
    return ""


def folds(node: ir.Node) -> Promise | None:
    """A float kernel whose weight is multiplied out, or looked up, from stored integers."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if not _from_stored_integers(weight):
        return None
    kernels = (node.op_type, f"Fused{node.op_type}", "Gemm", "FusedMatMul")
    return Promise(node, kernels, chain(node)[0], folded=True)


LOOKUP = ("Gather", "GatherElements", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
"""From stored codes to levels."""


def _from_stored_integers(value: ir.Value | None) -> bool:
    while node := producer(value, "Cast", "Mul", "Sub", "Reshape", "Slice", "Transpose", *LOOKUP):
        value = node.inputs[node.op_type.startswith("Gather")]
    return constant(value) and value is not None and value.dtype is not None and value.dtype.is_integer()


@promises("::Conv")
def conv(node: ir.Node) -> Promise | None:
    x, w = (producer(v, "DequantizeLinear") for v in node.inputs[:2])
    if x is None or w is None:
        return folds(node)
    names, q, why = chain(node)
    obstacle = type_obstacle(x, w)
    if not obstacle and q is None:
        obstacle = f"{why}, and the integer convolution has integer output only"
    if not obstacle and not constant(w.inputs[0]):
        obstacle = "its weight is not a constant"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if not obstacle and bias is not None and not producer(bias, "DequantizeLinear") and not constant(bias):
        obstacle = "its bias is not a constant"
    return Promise(node, ("QLinearConv",), names, obstacle)


@promises("::MatMul")
def matmul(node: ir.Node) -> Promise | None:
    x, w = (producer(v, "DequantizeLinear") for v in node.inputs)
    if x is None or w is None:
        return folds(node)
    names, q, _ = chain(node)
    usual = ("QLinearMatMul", "MatMulIntegerToFloat") if q is not None else ("MatMulIntegerToFloat", "QLinearMatMul")
    return Promise(node, (*usual, "DynamicQuantizeMatMul", "QGemm"), names, type_obstacle(x, w))


@promises("::Gemm")
def gemm(node: ir.Node) -> Promise | None:
    x, w = (producer(v, "DequantizeLinear") for v in node.inputs[:2])
    if x is None or w is None:
        return folds(node)
    obstacle = type_obstacle(x, w)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if not obstacle and bias is not None and not producer(bias, "DequantizeLinear"):
        obstacle = "its bias is not quantized"
    if not obstacle and node.attributes.get_float("beta", 1.0) != 1.0:
        obstacle = "beta is not 1"
    return Promise(node, ("QGemm",), chain(node)[0], obstacle)


@promises("::ConvTranspose")
def conv_transpose(node: ir.Node) -> Promise | None:
    return folds(node)


@promises("::MatMulInteger")
def matmul_integer(node: ir.Node) -> Promise | None:
    """Cast, Mul and the addition of a bias belong to it."""
    names = [str(node.outputs[0].name)]
    value = node.outputs[0]
    while len(readers := {use.node for use in value.uses()}) == 1 and (reader := next(iter(readers))).op_type in ("Cast", "Mul", "Add"):
        value = reader.outputs[0]
        names.append(str(value.name))
    quantizer = producer(node.inputs[0], "DynamicQuantizeLinear")
    alone = quantizer is not None and len(quantizer.outputs[0].uses()) == 1
    usual = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
    return Promise(node, usual if alone else usual[::-1], tuple(names))


@promises(*(f"{MICROSOFT}::{kind}" for kind in ("MatMulNBits", "MatMulIntegerToFloat", "GatherBlockQuantized", "QLinearMul")))
def native(node: ir.Node) -> Promise | None:
    return Promise(node, (node.op_type,), chain(node)[0])


QLINEAR = ("Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "LeakyRelu", "Sigmoid", "Softmax", "Where")
"""Operators with a com.microsoft::QLinear form on the CPU."""


@promises(*(f"::{op_type}" for op_type in QLINEAR))
def pointwise(node: ir.Node) -> Promise | None:
    """Between integers on all sides. Otherwise it is float on purpose, and promises nothing."""
    data = node.inputs[1:] if node.op_type == "Where" else node.inputs
    sources = [producer(v, "DequantizeLinear") for v in data]
    names, q, _ = chain(node)
    if q is None or not all(sources) or len(names) != 2:
        return None
    return Promise(node, (f"QLinear{node.op_type}",), names, type_obstacle(*(s for s in sources if s is not None)))
