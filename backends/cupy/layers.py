"""What each kernel of a lowered graph has to do, and the time it takes at the roofline of some GPUs: a model of cost, not a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qgraph.api import convert, prepare
from qgraph.backend import Kernel
from qgraph.backends.cupy import Cupy, act_quantize, embedding, norm_quantize, quantizing, w8a8, weight_only
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.roofline import A100, H100, RTX4090, Work
from qgraph.edit import graph_modules
from qgraph.errors import LoweringError, RecipeError
from qgraph.onnx_io import from_onnx
from qgraph.recipe import load_recipe
from qgraph.text import path_of
from qgraph.types import type_of
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


def _embedding(node: Node, got: Operands, sizes: Sizes) -> Work:
    ids, real, k = prod(sizes(got["ids"])), dtype(got["scale"]), got["k"]
    return embedding.work(ids, k, got["dtype"], real, group=got["group"], zero_points=got["zero_point"] is not None)


def _dequantize(node: Node, got: Operands, sizes: Sizes) -> Work:
    count, parameters = prod(sizes(got["q"])), prod(sizes(got["scale"]))
    real, zeros = dtype(got["scale"]).itemsize, got["zero_point"] is not None
    return Work(count * (1 + real) + parameters * (real + zeros), fp32_ops=2 * count)


WORK: dict[Any, Callable[[Node, Operands, Sizes], Work]] = {
    K.w8a8_linear.default: _w8a8,
    K.weight_only_linear.default: _weight_only,
    K.quantize_rows.default: _rows,
    K.quantize_static.default: _tensor,
    K.quantize_tensor.default: _tensor,
    K.norm_quantize.default: _norm,
    K.act_quantize.default: _act,
    K.embedding_dequantize.default: _embedding,
    K.dequantize.default: _dequantize,
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


@dataclass(frozen=True)
class Inspection:
    """The layers of a file lowered to kernels, the sizes that were assumed, and what `Program.kernels` says."""

    layers: list[Layer]
    sizes: Sizes
    kernels: list[Kernel]

    def as_json(self) -> dict[str, Any]:
        torch_runs = [asdict(k) for k in self.kernels if not k.fused]
        dims = {**self.sizes.dims, **dict.fromkeys(sorted(self.sizes.free), 1)}
        return {"layers": [asdict(layer) for layer in self.layers], "dims": dims, "torch": torch_runs}

    def text(self) -> str:
        """A line for each layer, their sum, and what runs in torch."""
        total = sum((layer.work for layer in self.layers), Work(0))
        seconds = {d.name: sum(layer.seconds[d.name] for layer in self.layers) for d in DEVICES}
        rows = [_TITLE, *(_cells(x.node, x.op, x.work, x.seconds, set(x.bound.values())) for x in self.layers)]
        lines = _aligned([*rows, _cells("total", "", total, seconds, set())])
        dims = ", ".join(f"{k}={v}" for k, v in self.as_json()["dims"].items())
        lines.append(
            f"Least time of each kernel by itself, from its maker's numbers for the GPU; nothing is measured{f'; {dims}' if dims else ''}."
        )
        if slow := [k for k in self.kernels if not k.fused]:
            lines.append(f"{len(slow)} quantized operations run in torch and are not counted; {slow[0].node}: {slow[0].reason}.")
        return "\n".join(lines)


_TITLE = ("layer", "kernel", "MB", "GOP", *(f"{d.name} us" for d in DEVICES), "bound by")


def _cells(node: str, op: str, work: Work, seconds: Mapping[str, float], bound: set[str]) -> tuple[str, ...]:
    operations = work.int8_ops + work.fp16_ops + work.fp32_ops
    times = (f"{1e6 * s:.2f}" for s in seconds.values())
    return (node, op, f"{work.bytes / 1e6:.3f}", f"{operations / 1e9:.3f}", *times, ", ".join(sorted(bound)))


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Words to the left, numbers, which are in the middle, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if 1 < i < len(widths) - 1 else str.ljust for i in range(len(widths))]
    return ["  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip() for row in rows]


def inspect(path: str, *, recipe: str | None = None, dims: Mapping[str, int] | None = None) -> Inspection:
    """An ONNX file as this backend would run it, on no device. `recipe`: quantize it first, by one that needs no data.

    Raises RecipeError for a recipe that does, LoweringError where nothing runs a kernel."""
    gm = from_onnx(path)
    if recipe is not None:
        gm = _quantized(gm, recipe)
    program = Cupy(device="cpu").lower(gm)
    found = layers(program.gm, sizes := Sizes(dims or {}))
    if not found:
        reason = next((f" ({k.node}: {k.reason})" for k in program.kernels()), ": it has no quantize and dequantize around weights")
        raise LoweringError(f"no layer of {path} runs a kernel of the cupy backend{reason}; a recipe quantizes it first")
    return Inspection(found, sizes, program.kernels())


def _quantized(gm: GraphModule, name: str) -> GraphModule:
    recipe = load_recipe(name)
    if recipe.needs_data:
        raise RecipeError(f"recipe {name} looks at data: quantize the model first, or take a recipe without it, such as w8a8-token")
    return convert(prepare(gm, recipe=recipe, backend=Cupy(device="cpu")))
