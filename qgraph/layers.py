"""QuantizedLayer: a convolution or linear with a fake-quantized weight, as y = W p(x) + b per group, for what corrects its constants.

p(x) are the columns that the weight's rows are multiplied with: x itself for a linear, patches of x ("im2col") for a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.codebook import TableLevels
from qgraph.edit import add_constant, graph_modules
from qgraph.hessian import Grid, Levels
from qgraph.isolate import evaluate
from qgraph.ledger import Entry, Ledger, state
from qgraph.lockstep import ORIGINAL
from qgraph.pipeline import Context
from qgraph.reference import spread
from qgraph.rewrite import Decline
from qgraph.rewriter import Rewriter
from qgraph.slots import with_operands
from qgraph.text import path_of
from qgraph.types import PerAxis, PerGroup, QSpec, int_range
from qgraph.views import Conv, Elementwise, FakeLookup, FakeQuantize, Linear, const_value, is_const, key, view, view_any

FAKE = (FakeQuantize, FakeLookup)


@dataclass(frozen=True)
class QuantizedLayer:
    """`fake` is the weight's fake quantization. `bias_reader` reads the bias: the node itself, or the addition behind a product that
    takes none."""

    node: Node
    view: Conv | Linear
    fake: FakeQuantize | FakeLookup
    bias_reader: Node
    bias_node: Node | None

    @property
    def row_spec(self) -> QSpec | None:
        """The format of the weight's `rows`: one scale per row, or per group of a row's columns; None for any other, and for a codebook."""
        f, out_axis = self.fake, self.view.out_axis % self.weight.dim()
        if isinstance(f, FakeLookup):
            return None
        axis = None if f.axis is None else f.axis % self.weight.dim()
        if axis is None or f.group < 0 or (f.group > 0) == (axis == out_axis):
            return None
        zero, (low, high) = None if f.zero_point is None else const_value(f.zero_point), int_range(f.dtype)
        symmetric = zero is None or bool((zero == (low + high + 1) // 2).all())
        return QSpec(f.dtype, symmetric, PerGroup(1, f.group) if f.group else PerAxis(0))

    @property
    def bits(self) -> int:
        """Of a code."""
        if isinstance(self.fake, FakeQuantize):
            return QSpec(self.fake.dtype).bits
        table = const_value(self.fake.table)
        assert table is not None  # tables are constants
        return (table.shape[-1] - 1).bit_length()

    def grid(self) -> Levels:
        """The numbers that the weight's `rows` may become."""
        fake, ones = self.fake, torch.ones_like(self.weight, dtype=torch.float32)

        def by_row(node: Node) -> Tensor:
            value = const_value(node)
            assert value is not None  # fake quantization of weights has constant scales
            return self.rows(ones * spread(value.float(), ones, fake.axis, fake.group))

        if isinstance(fake, FakeLookup):
            table, scale = const_value(fake.table), None if fake.scale is None else by_row(fake.scale)
            assert table is not None  # tables are constants
            rows = table if table.dim() == 1 else table.reshape(*self.rows(ones).shape[:2], -1)
            return TableLevels(rows.float(), scale)
        zero = None if fake.zero_point is None else by_row(fake.zero_point)
        return Grid(by_row(fake.scale), zero if zero is not None and zero.any() else None, *int_range(fake.dtype))

    @property
    def weight(self) -> Tensor:
        """The float weight as it is stored."""
        value = const_value(self.fake.x)
        assert value is not None  # `layers` looked
        return value

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def kind(self) -> str:
        return str(key(self.node.target)).removeprefix("::").removesuffix(".default")

    def label(self, ledger: Ledger) -> str:
        """What the ledger calls the node."""
        path = path_of(self.node)
        unique = f"{path}:{self.node.name}"
        return unique if ledger.get(unique, "weight") is not None else path

    @property
    def outputs(self) -> int:
        across = self.view.groups if isinstance(self.view, Conv) and self.view.transposed else 1
        return int(self.weight.shape[self.view.out_axis]) * across

    @property
    def output_axis(self) -> int:
        """The axis of y, from the end, along which the output channels run."""
        return 1 - self.weight.dim() if isinstance(self.view, Conv) else -1

    @property
    def beta(self) -> float:
        return self.view.beta if isinstance(self.view, Linear) and self.bias_reader is self.node else 1.0

    def has_cases(self, x: Tensor) -> bool:
        """Whether the first axis of x holds cases that the layer treats alike and apart."""
        return x.dim() > 1 and (isinstance(self.view, Conv) or self.view.x_axis % x.dim() != 0)

    def bias(self) -> Tensor:
        """What is added to each output, float64 [N]."""
        value = None if self.bias_node is None else const_value(self.bias_node)
        if value is None:
            return torch.zeros(self.outputs, dtype=torch.float64)
        return value.double().flatten().expand(self.outputs) * self.beta

    @property
    def has_rows(self) -> bool:
        """Whether `rows` and `columns` know this layer: no transposed convolution, and no padding that depends on the size of x."""
        return self.weight.dim() == 2 if isinstance(self.view, Linear) else not self.view.transposed and self.view.padding is not None

    def rows(self, weight: Tensor) -> Tensor:
        """The weight, or what is of its shape, as [groups, outputs, inputs * kernel]."""
        if isinstance(self.view, Linear):
            return weight.movedim(self.view.out_axis, 0)[None]
        return weight.reshape(self.view.groups, weight.shape[0] // self.view.groups, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return rows[0].movedim(0, self.view.out_axis) if isinstance(self.view, Linear) else rows.reshape(self.weight.shape)

    def columns(self, x: Tensor, limit: int) -> Tensor:
        """p(x) as [groups, inputs * kernel, positions], at about `limit` positions spread over x."""
        v = self.view
        if isinstance(v, Linear):
            columns = x.movedim(v.x_axis, 0).reshape(1, x.shape[v.x_axis], -1)
            return columns[..., :: max(1, columns.shape[-1] // limit)]
        assert v.padding is not None  # has_rows
        n = len(v.stride)
        x = torch.nn.functional.pad(x, [p for pair in reversed(v.padding) for p in pair])
        for axis in range(n):
            size = self.weight.shape[2 + axis]
            x = x.unfold(2 + axis, (size - 1) * v.dilation[axis] + 1, v.stride[axis])[..., :: v.dilation[axis]]
        step = max(1, round((math.prod(x.shape[2 : 2 + n]) * len(x) / limit) ** (1 / n)))
        x = x[(slice(None), slice(None), *[slice(step // 2, None, step)] * n)]
        x = x.unflatten(1, (v.groups, -1)).movedim(0, 2)  # [groups, inputs, batch, *positions, *kernel]
        return x.movedim(tuple(range(3 + n, 3 + 2 * n)), tuple(range(2, 2 + n))).reshape(v.groups, self.weight[0].numel(), -1)

    def set_grid(self, gm: GraphModule, scale: Tensor, zero: Tensor | None, *, by: str) -> QuantizedLayer:
        """Stores scales and zero points [rows, groups] of the weight's rows, and returns the layer with them."""
        assert isinstance(self.fake, FakeQuantize)  # row_spec is None for a codebook
        for old, value in ((self.fake.scale, scale.to(self.dtype)), (self.fake.zero_point, zero)):
            if old is None or value is None:
                continue
            shape = value.movedim(0, self.view.out_axis) if self.fake.group else value.flatten()
            new = Rewriter(gm, self.view.weight, by=by).const(shape.contiguous(), name=str(old.target))
            self.view.weight.replace_input_with(old, new)
            if not old.users:
                gm.graph.erase_node(old)
        fake = view(FakeQuantize, self.view.weight)
        assert fake is not None  # it was one before
        return replace(self, fake=fake)

    def store(self, gm: GraphModule, rows: Tensor, *, by: str, reason: str) -> bool:
        """Stores rows of the grid as the weight, and says so in the ledger; returns whether that changed it."""
        weight: Tensor = evaluate(self.view.weight, {self.fake.x: self.from_rows(rows).to(self.dtype).contiguous()})
        if torch.equal(weight, self.weight):
            return False
        self.set_weight(gm, weight, by=by)
        ledger = state(gm).ledger
        entry = ledger.get(self.label(ledger), "weight")
        if entry is not None:
            ledger.record(Entry(entry.node, entry.kind, "weight", entry.decision, by, reason))
        return True

    def set_weight(self, gm: GraphModule, weight: Tensor, *, by: str) -> None:
        """Stores a weight that this layer's fake quantization alone reads."""
        old = self.fake.x
        new = Rewriter(gm, self.view.weight, by=by).const(weight, name=str(old.target))
        new.meta[ORIGINAL] = old.meta.get(ORIGINAL, old.target)
        self.view.weight.replace_input_with(old, new)
        if not old.users:
            gm.graph.erase_node(old)

    def set_bias(self, gm: GraphModule, value: Tensor, *, by: str) -> None:
        """Stores the bias [N]; one that several nodes read is changed for this one alone."""
        old, rw = self.bias_node, Rewriter(gm, self.bias_reader, by=by)
        shape: tuple[int, ...] = (self.outputs,)
        if old is not None and (stored := const_value(old)) is not None and stored.numel() == self.outputs:
            shape = tuple(stored.shape)
        hint = str(old.target) if old is not None else f"{self.fake.x.target}_bias"
        new = rw.const((value / self.beta).to(self.dtype).reshape(shape), name=hint)
        if old is None:
            new.meta[ORIGINAL] = add_constant(gm, f"{hint}_absent", torch.zeros(shape, dtype=self.dtype))
            found = with_operands(self.node, bias=new)
            assert found is not None  # `layers` looked
            self.node.args, self.node.kwargs = found
        else:
            new.meta[ORIGINAL] = old.meta.get(ORIGINAL, old.target)
            self.bias_reader.replace_input_with(old, new)
            if not old.users:
                gm.graph.erase_node(old)


def layers(gm: GraphModule, ctx: Context, *, by: str, biases: bool = True) -> dict[Node, QuantizedLayer]:
    """The layers of this graph (not of its bodies) whose constants can be corrected; refusals go to the context.

    With `biases`, only those that have a place for one."""
    found = {}
    ctx.declines += [
        Decline(by, n.name, path_of(n), "it is in a body of control flow; layers of the graph itself are corrected") for n in _nested(gm)
    ]
    for node in gm.graph.nodes:
        v = view_any((Conv, Linear), node)
        fake = view_any(FAKE, v.weight) if v is not None else None
        weight = const_value(fake.x) if fake is not None else None
        if fake is None or weight is None or is_const(v.x):
            continue
        layer = QuantizedLayer(node, v, fake, node, v.bias)
        slot = _bias_slot(layer)
        if isinstance(slot, str) and not biases:
            found[node] = layer
        elif isinstance(slot, str):
            ctx.declines.append(Decline(by, node.name, path_of(node), slot))
        else:
            found[node] = replace(layer, bias_reader=slot[0], bias_node=slot[1])
    return found


def _nested(gm: GraphModule) -> Iterator[Node]:
    """Quantized layers of bodies."""
    for node in (n for part in list(graph_modules(gm))[1:] for n in part.graph.nodes):
        v = view_any((Conv, Linear), node)
        if v is not None and view_any(FAKE, v.weight) is not None:
            yield node


def _bias_slot(layer: QuantizedLayer) -> tuple[Node, Node | None] | str:
    """(the node that reads the bias, the bias or None), or why there is no place for one."""
    node, v = layer.node, layer.view
    if isinstance(v, Linear) and v.beta == 0:
        return "its bias has factor 0"
    if v.bias is not None:
        return (node, v.bias) if _is_bias(v.bias, layer.outputs) else f"its bias %{v.bias.name} is no constant per output channel"
    if with_operands(node, bias=None) is not None:
        return node, None
    (user, *others) = node.users
    added = view(Elementwise, user)
    terms = [i for i in added.inputs if i is not node] if added is not None and added.kind == "add" and not others else []
    if len(terms) == 1 and isinstance(terms[0], Node) and _is_bias(terms[0], layer.outputs):
        return user, terms[0]
    return f"{layer.kind} takes no bias, and no constant per output channel is added behind it"


def _is_bias(node: Node, outputs: int) -> bool:
    value = const_value(node)
    return value is not None and (value.numel() == 1 or value.numel() == outputs == value.shape[-1])
