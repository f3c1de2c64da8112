"""What an ONNX file holds and what ONNX Runtime makes of it: nodes by kind, weights by type, the quantized share, the kernels that run."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from qgraph.backends.onnxruntime.kernels import optimized_graph
from qgraph.backends.onnxruntime.runtime import Options
from qgraph.errors import LoweringError
from qgraph.onnx_read import read_model

COMPUTE = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Gather"})
"""Operations that read a weight; Gather counts where its table is a float or a dequantized weight."""

INTEGER_COMPUTE = frozenset(
    f"{domain}::{op}"
    for domain, ops in {
        "": ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"),
        "com.microsoft": ("MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "GatherBlockQuantized", "QMoE"),
    }.items()
    for op in ops
)
"""Operations that read integer weights directly."""

PACKED = frozenset({"MatMulNBits", "GatherBlockQuantized"})
"""Operations whose uint8 weight holds 8 / bits values in each byte."""


@dataclass(frozen=True)
class Weights:
    """Stored tensors of one element type. `elements` counts values, also where several share a byte."""

    dtype: str
    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """`nodes` and `runs` count operations by "domain::OpType", the default domain as "::OpType"; `runs` is the graph that ONNX Runtime
    really executes on the CPU, None where it cannot load the file (`refusal` says why). `quantized_weights` is the share of float-like
    weight values that are stored in 8 bits or less, `quantized_nodes` (integer, all) operations that read a weight."""

    path: str
    bytes: int
    ir_version: int
    opsets: dict[str, int]
    nodes: dict[str, int]
    weights: tuple[Weights, ...]
    quantized_weights: float
    quantized_nodes: tuple[int, int]
    runs: dict[str, int] | None
    refusal: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: str | PathLike[str]) -> Inspection:
    """Read a file without running it. Raises ModelError when it is missing, corrupt or not ONNX."""
    model = read_model(path)
    low, all_weights = _shares(model)
    runs, refusal = _optimized(Path(path))
    return Inspection(
        path=str(path),
        bytes=file_bytes(Path(path), model),
        ir_version=model.ir_version or 0,
        opsets=dict(model.opset_imports),
        nodes=_count(_nodes(model)),
        weights=_weights(model),
        quantized_weights=low / all_weights if all_weights else 0.0,
        quantized_nodes=_quantized_nodes(model),
        runs=runs,
        refusal=refusal,
    )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes, also of nested bodies and of functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _count(nodes: Iterator[ir.Node]) -> dict[str, int]:
    return dict(Counter(f"{n.domain}::{n.op_type}" for n in nodes).most_common())


def _stored(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers and the tensors of Constant nodes."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
    for node in _nodes(model):
        if node.op_type == "Constant" and (tensor := _constant(node.outputs[0])) is not None:
            yield node.outputs[0], tensor


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, else None."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    return value.const_value if value is not None else None


def _elements(value: ir.Value, tensor: ir.TensorProtocol) -> int:
    for use in value.uses():
        if use.node.op_type in PACKED and tensor.dtype == ir.DataType.UINT8:
            bits = use.node.attributes.get_int("bits", 4)
            return tensor.size * 8 // bits
    return tensor.size


def _weights(model: ir.Model) -> tuple[Weights, ...]:
    found: dict[str, list[int]] = {}
    for value, tensor in _stored(model):
        row = found.setdefault(tensor.dtype.name.lower(), [0, 0, 0])
        row[:] = row[0] + 1, row[1] + _elements(value, tensor), row[2] + tensor.nbytes
    return tuple(Weights(dtype, *row) for dtype, row in sorted(found.items(), key=lambda item: -item[1][2]))


def _shares(model: ir.Model) -> tuple[int, int]:
    """(values in 8 bits or less, values in these or a float type); shapes and indices in int64 are not weights."""
    low = total = 0
    for value, tensor in _stored(model):
        small = tensor.dtype.itemsize <= 1 and tensor.dtype is not ir.DataType.BOOL
        if small or tensor.dtype.is_floating_point():
            total += _elements(value, tensor)
            low += _elements(value, tensor) if small else 0
    return low, total


def _quantized_nodes(model: ir.Model) -> tuple[int, int]:
    integer = every = 0
    for node in _nodes(model):
        if f"{node.domain}::{node.op_type}" in INTEGER_COMPUTE:
            integer, every = integer + 1, every + 1
        elif node.op_type in COMPUTE and node.domain == "":
            weight = node.inputs[0 if node.op_type == "Gather" else 1]
            reads_integers = _dequantized(weight)
            if reads_integers or _float_constant(weight):
                integer, every = integer + reads_integers, every + 1
    return integer, every


def _dequantized(value: ir.Value | None) -> bool:
    """A DequantizeLinear of a constant, through a Transpose or Cast on the way."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "Cast", "Reshape") and node.inputs:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _float_constant(value: ir.Value | None) -> bool:
    tensor = _constant(value)
    return tensor is not None and tensor.dtype.is_floating_point()


def file_bytes(path: Path, model: ir.Model) -> int:
    """The size of the file and of the external data that it refers to."""
    data = {Path(tensor.path).resolve() for _, tensor in _stored(model) if isinstance(tensor, ir.ExternalTensor)}
    return sum(p.stat().st_size for p in {path.resolve(), *data})


def _optimized(path: Path) -> tuple[dict[str, int] | None, str]:
    """(operations of the graph that ONNX Runtime executes on the CPU, ""), or (None, its refusal)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            graph = optimized_graph(str(path), folder, Options())
        except LoweringError as error:
            return None, str(error)
    return _count(ir.serde.deserialize_graph(graph).all_nodes()), ""


def text(found: Inspection) -> str:
    """The inspection as aligned lines."""
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in found.opsets.items())
    integer, every = found.quantized_nodes
    lines = [
        f"{found.path}: {found.bytes / 1e6:.2f} MB, ir version {found.ir_version}, opsets {opsets}",
        f"quantized: {found.quantized_weights:.1%} of the weight values, {integer} of {every} operations with weights",
        "weights",
        *(f"  {w.dtype:<12}{w.bytes / 1e6:>10.2f} MB{w.tensors:>7} tensors{w.elements:>14,} values" for w in found.weights),
        "nodes",
        *_columns(found.nodes),
        f"ONNX Runtime {ort.__version__} runs"
        if found.runs is not None
        else f"ONNX Runtime {ort.__version__} cannot load it: {found.refusal}",
        *_columns(found.runs or {}),
    ]
    return "\n".join(lines)


def _columns(counts: dict[str, int]) -> list[str]:
    return [f"  {count:>6}  {kind.removeprefix('::')}" for kind, count in counts.items()]
