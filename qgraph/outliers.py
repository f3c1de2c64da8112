"""outlier_split(site, kept): W x -> (W - S) x + S x, where S = W at `kept` and 0 elsewhere: a few numbers stay in float.

    x ----------------------- linear, W - S ---- (bias) ---- add     the linear that was there: all later stages know it
    x ---- x[columns] ------- product, S ---------------------'      no format is noted for it, so nothing quantizes it

Case 1: S lies in few columns (input channels): these are gathered, and S is a small dense matrix.
Case 2: S is spread over many: the product reads all of x, and its weight is mostly zeros; how to store such a one is a backend's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.annotate import labels
from qgraph.biases import bias_of
from qgraph.edit import Prologue, graph_modules
from qgraph.formats import QUANTIZE, TIED
from qgraph.ledger import FLOAT, Entry, state
from qgraph.migrate import drop_constants
from qgraph.onnx_ops import OnnxOp, op
from qgraph.pipeline import Context
from qgraph.rewrite import BISECTION, Decline
from qgraph.rewriter import Rewriter
from qgraph.text import path_of, target_name
from qgraph.types import QSpec, TensorType, type_of
from qgraph.views import Conv, Linear, view_any
from qgraph.watch import Watch
from qgraph.weights import Weight, constant_weight

SPLIT = "split"
"""The key of a linear's meta that names the stages that have split it: none does so twice."""

FEW = 4
"""Columns are gathered when they are at most 1 / FEW of all."""

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Site:
    """A linear with a constant weight that is wanted in the format `spec`; `name` is what the ledger calls it."""

    part: GraphModule
    node: Node
    name: str
    v: Linear
    spec: QSpec

    @property
    def watch(self) -> Node | None:
        """The observer of x, where x has a static range."""
        found = self.v.x.op == "call_module" and isinstance(self.part.get_submodule(str(self.v.x.target)), Watch)
        return self.v.x if found else None

    @property
    def x(self) -> Node:
        """The float value that the linear reads."""
        return self.v.x if self.watch is None else self.v.x.all_input_nodes[0]

    @property
    def quantizes_x(self) -> bool:
        return self.watch is not None or "x" in self.node.meta.get(QUANTIZE, {})

    @cached_property
    def stored(self) -> Tensor:
        """The weight as it lies in the module."""
        found = constant_weight(self.v)
        assert found is not None  # split_sites looked
        return found.value

    @property
    def weight(self) -> Tensor:
        """[out, in]"""
        return self.turned(self.stored)

    def turned(self, weight: Tensor) -> Tensor:
        """From the stored layout to [out, in], or back."""
        return weight if self.v.in_axis % 2 else weight.T


def split_sites(gm: GraphModule, ctx: Context, *, by: str) -> Iterator[Site]:
    """The linears of an observed graph and its bodies whose weights are to be quantized; refusals go to the context and the ledger."""
    for part in graph_modules(gm):
        names = labels(part)
        for node in list(part.graph.nodes):
            spec, v = node.meta.get(QUANTIZE, {}).get("weight"), view_any((Linear, Conv), node)
            if spec is None or v is None:
                continue
            if isinstance(v, Conv):
                ctx.declines.append(Decline(by, node.name, path_of(node), "it is a convolution; linears are split"))
                continue
            site = Site(part, node, names[node], v, spec)
            if by in node.meta.get(SPLIT, ()):
                ctx.declines.append(Decline(by, node.name, path_of(node), "it is split already"))
            elif why := _obstacle(site):
                refuse(gm, ctx, site, why, by=by)
            else:
                yield site


def _obstacle(site: Site) -> str:
    if site.v.x_axis != -1:
        return f"rows of x run along its axis {site.v.x_axis}, not along the last"
    if TIED in site.node.meta and site.spec.group:
        return f"its weight is tied to the table @{site.node.meta[TIED]}, with which it may share its integers"
    return "its weight is read elsewhere, too" if len(site.v.weight.users) > 1 else ""


def refuse(gm: GraphModule, ctx: Context, site: Site, reason: str, *, by: str) -> None:
    """Says that the site is left alone, and why."""
    ctx.declines.append(Decline(by, site.node.name, path_of(site.node), reason))
    if not site.node.meta.get(SPLIT):
        state(gm).ledger.record(Entry(site.name, target_name(site.node), "outliers", "none", by, reason))


def outlier_split(gm: GraphModule, site: Site, kept: Tensor, reason: str, *, by: str) -> int:
    """Keeps the entries `kept` (bool [out, in], at least one) of the weight in float; 1, or 0 where bisection holds it back.

    What the graph computes stays; the caller recompiles it. `reason` is the ledger's."""
    if not BISECTION.allows(by, site.node):
        return 0
    rw = Rewriter(site.part, site.node, by=by)
    product = _product(rw, site, kept)
    _add(site, product, [n for n in rw.created if n.op == "call_function"], by=by)
    _store(rw, site, torch.where(kept, 0, site.weight))
    site.node.meta[SPLIT] = (*site.node.meta.get(SPLIT, ()), by)
    count, columns = int(kept.sum()), int(kept.any(0).sum())
    decision = f"{columns} of {kept.shape[1]} input channels in {FLOAT}" if count == columns * len(kept) else f"{count} weights in {FLOAT}"
    state(gm).ledger.record(Entry(site.name, target_name(site.node), "outliers", decision, by, reason))
    return 1


def recompile(gm: GraphModule, count: int) -> int:
    """After `count` changes; returns it."""
    for part in graph_modules(gm) if count else ():
        part.graph.lint()
        part.recompile()
    return count


def without_columns(part: GraphModule, sites: list[Site], columns: Tensor, *, by: str) -> Node:
    """Lets these linears, all readers of one x, read x with zeros in `columns` (indices); returns that value, which they share.

    Their observer sees that, too: the caller makes sure that nothing else reads it, and recompiles the graph."""
    first = sites[0]
    rw = Rewriter(part, Prologue(part).after(first.x), by=by)
    mask = torch.ones(first.stored.shape[first.v.in_axis], dtype=first.stored.dtype)
    mask[columns] = 0
    found = _call(rw, first, "Mul", aten.mul.Tensor, first.x, rw.const(mask, name=f"{first.x.name}_inliers"), like=first.x, name="inliers")
    for reader in {site.watch or site.node for site in sites}:
        reader.replace_input_with(first.x, found)
    return found


def _product(rw: Rewriter, site: Site, kept: Tensor) -> Node:
    """S x, where S is the weight at `kept`."""
    columns = kept.any(0).nonzero().flatten()
    x, turned = site.x, torch.where(kept, site.weight * site.v.alpha, 0).T
    if len(columns) * FEW <= kept.shape[1]:
        index, turned = rw.const(columns, name=f"{site.node.name}_columns"), turned[columns]
        if isinstance(site.node.target, OnnxOp):
            x = _call(rw, site, "Gather", None, x, index, name="columns", axis=-1)
            if (t := type_of(site.x)) is not None and t.shape is not None:
                x.meta["type"] = TensorType(t.dtype, (*t.shape[:-1], len(columns)))
        else:
            x = _call(rw, site, "", aten.index_select.default, x, -1, index, name="columns")
    weight = rw.const(turned, name=f"{site.v.weight.target}_outliers")
    return _call(rw, site, "MatMul", aten.matmul.default, x, weight, like=site.node, name="outliers")


def _call(rw: Rewriter, site: Site, onnx: str, target: Any, *args: Any, name: str, like: Node | None = None, **attributes: Any) -> Node:
    """A node in the site's dialect that says from which linear it comes."""
    version = getattr(site.node.target, "version", None)
    node = rw.call(target if version is None else op(onnx, version=version), *args, like=like, origin=site.node, **attributes)
    node.meta["name"] = f"{path_of(site.node)}/{name}"
    return node


def _store(rw: Rewriter, site: Site, rest: Tensor) -> None:
    """The linear gets another weight [out, in]."""
    old = site.v.weight
    site.node.replace_input_with(old, rw.const(site.turned(rest), name=str(old.target)))
    drop_constants(site.part, [old])


def _add(site: Site, product: Node, made: list[Node], *, by: str) -> None:
    """The product is added behind the bias: backends know a linear with its bias as one. It is also computed there, with the nodes that
    were `made` for it: what is known before a linear and added to it is a residual for stages that round."""
    bias = bias_of(site.node, Weight(site.v, site.stored))
    end = site.node if bias is None else bias.node
    readers: Callable[[Node], bool] = set(end.users).__contains__
    for node in reversed(made):
        end.append(node)
    total = _call(Rewriter(site.part, product.next, by=by), site, "Add", aten.add.Tensor, end, product, like=end, name="sum")
    end.replace_all_uses_with(total, delete_user_cb=readers)
