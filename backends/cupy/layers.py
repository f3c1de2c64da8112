"""What each kernel of a lowered graph has to do, and the time it takes at the roofline of some GPUs: a model of cost, not a measurement."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qgraph.backend import Kernel
from qgraph.backends.cupy import act_quantize, norm_quantize, quantizing, w8a8, weight_only
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.roofline import A100, H100, RTX4090, Work
from qgraph.edit import graph_modules
from qgraph.errors import LoweringError
from qgraph.text import path_of
from qgraph.types import TensorType, type_of
from qgraph.views import operands

DEVICES = (A100, H100, RTX4090)


@dataclass(frozen=True)
class Sizes:
    """Shapes as numbers: `dims` says what symbolic dimensions are; others count 1, and are collected in `free`."""

    dims: Mapping[str, int] = field(default_factory=dict)
    free: set[str] = field(default_factory=set)

    def __call__(self, node: Node) -> tuple[int, ...]:
        """Raises LoweringError for a value of unknown rank."""
        kind = type_of(node)
        if kind is None or kind.shape is None:
            raise LoweringError(f"the shape of %{node.name} is unknown")
        return tuple(d if isinstance(d, int) else self._symbol("?" if d is None else d) for d in kind.shape)

    def _symbol(self, dim: str) -> int:
        """A symbol, or a product of some: batch, 2*seq."""
        factors = [int(part) if part.isdigit() else self.dims.get(part) for part in dim.split("*")]
        self.free.update(part for part, value in zip(dim.split("*"), factors, strict=True) if value is None)
        return prod(1 if value is None else value for value in factors)

    def rows(self, node: Node) -> tuple[int, int]:
        """[..., k] -> rows, k."""
        *outer, k = self(node)
        return prod(outer), k


Operands = Mapping[str, Any]


def _w8a8(node: Node, got: Operands, sizes: Sizes) -> Work:
    (m, _), (n, k) = sizes.rows(node), sizes(got["weight"])
    return w8a8.work(m, n, k, dtype(node))


def _weight_only(node: Node, got: Operands, sizes: Sizes) -> Work:
    (m, k), bits = sizes.rows(got["x"]), sizes(got["codes"])[2]
    has = {name: got[name] is not None for name in ("zeros", "bias")}
    return weight_only.work(m, got["n"], k, bits, got["group"], dtype(node), **has)


def _rows(node: Node, got: Operands, sizes: Sizes) -> Work:
    return quantizing.rows_work(*sizes.rows(got["x"]), dtype(got["x"]), dynamic=got["scale"] is None, sums=got["sums"])


def _tensor(node: Node, got: Operands, sizes: Sizes) -> Work:
    return quantizing.tensor_work(prod(sizes(got["x"])), dtype(got["x"]), dynamic="scale" not in got)


def _norm(node: Node, got: Operands, sizes: Sizes) -> Work:
    has = {name: got[name] is not None for name in ("residual", "bias")}
    return norm_quantize.work(*sizes.rows(got["x"]), dtype(got["x"]), dynamic=got["scale"] is None, keep_y=got["keep_y"], **has)


def _act(node: Node, got: Operands, sizes: Sizes) -> Work:
    return act_quantize.work(*sizes.rows(got["gate"]), dtype(got["gate"]), dynamic=got["scale"] is None, up=got["up"] is not None)


WORK: dict[Any, Callable[[Node, Operands, Sizes], Work]] = {
    K.w8a8_linear.default: _w8a8,
    K.weight_only_linear.default: _weight_only,
    K.quantize_rows.default: _rows,
    K.quantize_static.default: _tensor,
    K.quantize_tensor.default: _tensor,
    K.norm_quantize.default: _norm,
    K.act_quantize.default: _act,
}
"""What a call of each op has to do, from the node, its operands and the sizes of their values."""


def dtype(node: Node) -> torch.dtype:
    """The element type of a value. Raises LoweringError where it is unknown."""
    kind = type_of(node)
    found = None if kind is None or kind.dtype is None else getattr(torch, kind.dtype, None)
    if not isinstance(found, torch.dtype):
        raise LoweringError(f"the element type of %{node.name} is unknown")
    return found


@dataclass(frozen=True)
class Layer:
    """A kernel of a lowered graph: the node's path, its op, what it does, seconds at the roofline by device, and what bounds it there."""

    node: str
    op: str
    work: Work
    seconds: dict[str, float]
    bound: dict[str, str]


def layers(gm: GraphModule, sizes: Sizes) -> list[Layer]:
    """The kernels of a lowered graph in order. Raises LoweringError for one whose shape is unknown."""
    return [_layer(node, sizes) for part in graph_modules(gm) for node in part.graph.nodes if node.target in WORK]


def _layer(node: Node, sizes: Sizes) -> Layer:
    work = WORK[node.target](node, operands(node), sizes)
    op = str(node.target).split(".")[1]
    return Layer(path_of(node), op, work, {d.name: d.time(work) for d in DEVICES}, {d.name: d.bound(work) for d in DEVICES})


def as_json(found: Iterable[Layer]) -> list[dict[str, Any]]:
    return [asdict(layer) for layer in found]


def text(found: list[Layer], sizes: Sizes, kernels: Iterable[Kernel]) -> str:
    """The layers as aligned lines, their sum, and what runs in torch."""
    rows = [_cells(layer.node, layer.op, layer.work, layer.seconds, set(layer.bound.values())) for layer in found]
    total = sum((layer.work for layer in found), Work(0))
    rows.append(_cells("total", "", total, {d.name: sum(layer.seconds[d.name] for layer in found) for d in DEVICES}, set()))
    title = ("layer", "kernel", "MB", "GOP", *(f"{d.name} us" for d in DEVICES), "bound by")
    widths = [max(len(row[i]) for row in (title, *rows)) for i in range(len(title))]
    lines = ["  ".join(c.ljust(w) if i < 2 or i == len(title) - 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in (title, *rows)]
    dims = ", ".join([*(f"{k}={v}" for k, v in sizes.dims.items()), *(f"{k}=1" for k in sorted(sizes.free))])
    slow = [k for k in kernels if not k.fused]
    notes = [f"Times at the roofline of each GPU (its maker's numbers), each kernel alone{f'; {dims}' if dims else ''}."]
    if slow:
        notes.append(f"{len(slow)} quantized operations run in torch and are not counted, the first {slow[0].node}: {slow[0].reason}.")
    return "\n".join(line.rstrip() for line in [*lines, *notes])


def _cells(node: str, op: str, work: Work, seconds: Mapping[str, float], bound: set[str]) -> tuple[str, ...]:
    operations = work.int8_ops + work.fp16_ops + work.fp32_ops
    times = (f"{1e6 * s:.2f}" for s in seconds.values())
    return (node, op, f"{work.bytes / 1e6:.3f}", f"{operations / 1e9:.3f}", *times, ", ".join(sorted(bound)))
