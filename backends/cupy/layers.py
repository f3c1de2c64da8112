"""What each kernel of a lowered graph has to do, and the time it takes at the roofline of some GPUs: a model of cost, not a measurement."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from qgraph.api import convert, prepare
from qgraph.backend import Kernel
from qgraph.backends.cupy import Cupy, act_quantize, embedding, kv_cache, norm_quantize, quantizing, tiling, w8a8, w8a8_conv, weight_only
from qgraph.backends.cupy.keep_cache import has_cache
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.program import NAMESPACE
from qgraph.backends.cupy.roofline import A100, H100, RTX4090, Device, Work
from qgraph.backends.cupy.tiling import Launch
from qgraph.edit import graph_modules
from qgraph.errors import LoweringError, RecipeError
from qgraph.onnx_io import from_onnx
from qgraph.recipe import load_recipe
from qgraph.text import path_of
from qgraph.types import type_of
from qgraph.views import operands

DEVICES = (A100, H100, RTX4090)
CAPACITY = 4096
"""Tokens of a cache that is inspected; what is read of it is the size of the past."""


@dataclass(frozen=True)
class Sizes:
    """Shapes as numbers: `dims` says what symbolic dimensions are; others count 1, and are collected in `free`."""

    dims: Mapping[str, int] = field(default_factory=dict)
    free: set[str] = field(default_factory=set)

    def of(self, node: Node) -> Any:
        """The value of a node without its data (device "meta"): by its type, else by the shape function of the op that makes it. Raises
        LoweringError where neither is known."""
        kind = type_of(node)
        dtype = None if kind is None or kind.dtype is None else getattr(torch, kind.dtype, None)
        if kind is not None and kind.shape is not None and isinstance(dtype, torch.dtype):
            shape = [d if isinstance(d, int) else self._symbol("?" if d is None else d) for d in kind.shape]
            return torch.empty(shape, dtype=dtype, device="meta")
        if node.target is torch.ops.aten.sym_size.int:
            return self.of(node.args[0]).shape[node.args[1]]  # type: ignore[arg-type]
        if node.target is operator.getitem or getattr(node.target, "namespace", None) == NAMESPACE:
            args, kwargs = map_arg((node.args, node.kwargs), self.of)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        raise LoweringError(f"the type of %{node.name} is unknown")

    def _symbol(self, dim: str) -> int:
        """A symbol, or a product of some: batch, 2*seq."""
        factors = [int(part) if part.isdigit() else self.dims.get(part) for part in dim.split("*")]
        self.free.update(part for part, value in zip(dim.split("*"), factors, strict=True) if value is None)
        return prod(1 if value is None else value for value in factors)


Operands = Mapping[str, Any]
"""Of an op by name, tensors without data."""


def _row_count(x: Tensor) -> tuple[int, int]:
    """[..., k] -> rows, k."""
    return prod(x.shape[:-1]), x.shape[-1]


def _w8a8(got: Operands, y: Tensor) -> Work:
    n, k = got["weight"].shape
    return w8a8.work(_row_count(y)[0], n, k, y.dtype)


def _conv(got: Operands, y: Tensor) -> Work:
    channels, n = got["x"].shape[1], y.shape[1]
    return w8a8_conv.work(got["x"].shape, (n, channels, *got["kernel"]), y.shape, y.dtype)


def _weight_only(got: Operands, y: Tensor) -> Work:
    (m, k), bits = _row_count(got["x"]), got["codes"].shape[2]
    has = {name: got[name] is not None for name in ("zeros", "bias")}
    return weight_only.work(m, got["n"], k, bits, got["group"], y.dtype, **has)


def _rows(got: Operands, _: Any) -> Work:
    return quantizing.rows_work(*_row_count(got["x"]), got["x"].dtype, dynamic=got["scale"] is None, sums=got["sums"])


def _tensor(got: Operands, _: Any) -> Work:
    return quantizing.tensor_work(got["x"].numel(), got["x"].dtype, dynamic="scale" not in got)


def _norm(got: Operands, _: Any) -> Work:
    has = {name: got[name] is not None for name in ("residual", "bias")}
    return norm_quantize.work(*_row_count(got["x"]), got["x"].dtype, dynamic=got["scale"] is None, keep_y=got["keep_y"], **has)


def _act(got: Operands, _: Any) -> Work:
    return act_quantize.work(*_row_count(got["gate"]), got["gate"].dtype, dynamic=got["scale"] is None, up=got["up"] is not None)


def _embedding(got: Operands, y: Tensor) -> Work:
    zeros = got["zero_point"] is not None
    return embedding.work(got["ids"].numel(), got["k"], got["dtype"], y.dtype, group=got["group"], zero_points=zeros)


def _cached_attention(got: Operands, y: Tensor) -> Work:
    """With what is appended; of a prompt, too, for which torch's attention reads the cache once."""
    (batch, heads, new, head_dim), (_, kv_heads, _, _) = y.shape, got["k"].shape
    attended = kv_cache.work((batch, new, heads, head_dim), kv_heads, got["past"] + new, got["bits"], y.dtype)
    return attended + kv_cache.append_work((batch, new, kv_heads, head_dim), got["bits"], y.dtype)


def _dequantize(got: Operands, y: Tensor) -> Work:
    parameters = got["scale"].nbytes + (0 if got["zero_point"] is None else got["zero_point"].nbytes)
    return Work(got["q"].nbytes + y.nbytes + parameters, fp32_ops=2 * y.numel())


WORK: dict[Any, Callable[[Operands, Any], Work]] = {
    K.w8a8_linear.default: _w8a8,
    K.w8a8_conv.default: _conv,
    K.weight_only_linear.default: _weight_only,
    K.quantize_rows.default: _rows,
    K.quantize_static.default: _tensor,
    K.quantize_tensor.default: _tensor,
    K.norm_quantize.default: _norm,
    K.act_quantize.default: _act,
    K.embedding_dequantize.default: _embedding,
    K.dequantize.default: _dequantize,
    K.cached_attention.default: _cached_attention,
}
"""What a call of each op has to do, from its operands and its result."""


def _w8a8_launch(got: Operands, y: Tensor, device: Device) -> Launch:
    n, k = got["weight"].shape
    return tiling.integer_linear(_row_count(y)[0], n, k, y.dtype, device)


def _weight_only_launch(got: Operands, y: Tensor, device: Device) -> Launch:
    (m, k), bits, zeros = _row_count(got["x"]), got["codes"].shape[2], got["zeros"] is not None
    return tiling.weight_only_linear(m, got["n"], k, bits, got["group"], y.dtype, device, zeros=zeros)


LAUNCH: dict[Any, Callable[[Operands, Any, Device], Launch]] = {
    K.w8a8_linear.default: _w8a8_launch,
    K.weight_only_linear.default: _weight_only_launch,
}
"""What products move by their tilings; row kernels move what they must, as the table in backends/README.md shows."""


@dataclass(frozen=True)
class Layer:
    """A kernel of a lowered graph: the node's path, its op, what it does; by device seconds at the roofline, what bounds it there, and for
    products the fraction of the roofline that their tiling can reach."""

    node: str
    op: str
    work: Work
    seconds: dict[str, float]
    bound: dict[str, str]
    fraction: dict[str, float]


def layers(gm: GraphModule, sizes: Sizes) -> list[Layer]:
    """The kernels of a lowered graph in order. Raises LoweringError for one whose operands are of unknown shape."""
    return [_layer(node, sizes) for part in graph_modules(gm) for node in part.graph.nodes if node.target in WORK]


def _layer(node: Node, sizes: Sizes) -> Layer:
    got, y, launch = map_arg(operands(node), sizes.of), sizes.of(node), LAUNCH.get(node.target)
    work, op = WORK[node.target](got, y), str(node.target).split(".")[1]
    fraction = {} if launch is None else {d.name: launch(got, y, d).fraction(d, work) for d in DEVICES}
    return Layer(path_of(node), op, work, {d.name: d.time(work) for d in DEVICES}, {d.name: d.bound(work) for d in DEVICES}, fraction)


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
        rows = [_TITLE, *(_cells(x.node, x.op, x.work, x.seconds, x.fraction, set(x.bound.values())) for x in self.layers)]
        lines = _aligned([*rows, _cells("total", "", total, seconds, {}, set())])
        dims = ", ".join(f"{k}={v}" for k, v in self.as_json()["dims"].items())
        lines.append(
            f"Least time of each kernel by itself, from its maker's numbers for the GPU; nothing is measured{f'; {dims}' if dims else ''}."
        )
        lines.append(
            "Reach: what a product's tiles and waves of blocks leave of that roofline on each GPU, without a cache between SMs and memory."
        )
        if slow := [k for k in self.kernels if not k.fused]:
            lines.append(f"{len(slow)} quantized operations run in torch and are not counted; {slow[0].node}: {slow[0].reason}.")
        return "\n".join(lines)


_TITLE = ("layer", "kernel", "MB", "GOP", *(f"{d.name} us" for d in DEVICES), "reach %", "bound by")


def _cells(node: str, op: str, work: Work, seconds: Mapping[str, float], fraction: Mapping[str, float], bound: set[str]) -> tuple[str, ...]:
    operations = work.int8_ops + work.fp16_ops + work.fp32_ops
    times = (f"{1e6 * s:.2f}" for s in seconds.values())
    reach = " ".join(f"{100 * f:.0f}" for f in fraction.values())
    return (node, op, f"{work.bytes / 1e6:.3f}", f"{operations / 1e9:.3f}", *times, reach, ", ".join(sorted(bound)))


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
    program = Cupy(device="cpu", capacity=CAPACITY if has_cache(gm) else None).lower(gm)
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
