"""Scales and shifts per channel around a convolution or linear -> the same op with other constants.

After the op, on output channel o:      s (W x + b) + t  =  (s W) x + (s b + t)
Before it, on input channel i:          W (s x + t) + b  =  (W s) x + (b + sum_i W t)
The shift before a convolution folds only where nothing is padded: padding puts in zeros, not t. There a scale that is the same for
all channels still does:                W (s x + t) + b  =  (s W) (x + t / s) + b

A batch norm is s = weight / sqrt(var + eps), t = bias - mean s. Mul, Div, Add and Sub by constants, which exporters leave of a batch norm,
are the cases t = 0 and s = 1. What a batch norm tells of values stays
with their nodes (moments.py): mean = bias and deviation = |weight| of its result, running statistics of what it reads. Constants are computed in float64 and rounded once.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from qgraph.moments import MOMENTS, Moments, normal
from qgraph.pattern import Const, Inputs, Match, OneOf, Op, Opt, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.slots import with_operands
from qgraph.types import type_of
from qgraph.views import Activation, BatchNorm, Conv, Elementwise, Linear, const_value, is_const, view, view_any
from qgraph.weights import Weight


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Folds constants around convolutions and linear layers into their weights. Numbers change by rounding only.

    A weight that other nodes read too is left alone: folding would store it twice."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [fold_after, fold_before])


@dataclass(frozen=True)
class Affine:
    """scale * x + shift in float64, each of one element or one per channel. `norm`: it was written as a batch norm."""

    x: Node
    scale: Tensor
    shift: Tensor
    norm: bool = False

    @property
    def per_channel(self) -> bool:
        return max(self.scale.numel(), self.shift.numel()) > 1


_ONE, _ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def affine(node: Node, axis: int, channels: int, rank: int) -> Affine | None:
    """The node as scale and shift along `axis` (negative) of a value of at least this rank; None when it is something else."""
    if (norm := view(BatchNorm, node)) is not None:
        return _batch_norm(norm) if axis == 1 - rank else None
    found = view(Elementwise, node)
    if found is None or found.kind not in ("add", "sub", "mul", "div") or len(found.inputs) != 2:
        return None
    constants = [_channels(v, axis, channels, rank) for v in found.inputs]
    a, b = found.inputs
    if constants[1] is not None and isinstance(a, Node) and constants[0] is None:
        return _by_constant(found.kind, a, constants[1])
    if constants[0] is not None and isinstance(b, Node) and constants[1] is None and found.kind != "div":
        flipped = _by_constant("add" if found.kind == "sub" else found.kind, b, constants[0])
        return Affine(b, -flipped.scale, flipped.shift) if found.kind == "sub" else flipped
    return None


def _by_constant(kind: str, x: Node, c: Tensor) -> Affine:
    if kind in ("mul", "div"):
        return Affine(x, c if kind == "mul" else 1 / c, _ZERO)
    return Affine(x, _ONE, c if kind == "add" else -c)


def _batch_norm(norm: BatchNorm) -> Affine | None:
    values = [const_value(v) for v in (norm.mean, norm.var)]
    weight, bias = (None if v is None else const_value(v) for v in (norm.weight, norm.bias))
    if any(v is None for v in values) or (weight is None) != (norm.weight is None) or (bias is None) != (norm.bias is None):
        return None
    mean, var = (v.double() for v in values if v is not None)
    scale = (var + norm.eps).rsqrt() * (1.0 if weight is None else weight.double())
    return Affine(norm.x, scale, (0.0 if bias is None else bias.double()) - mean * scale, norm=True)


def _channels(value: Any, axis: int, channels: int, rank: int) -> Tensor | None:
    """A number or constant that broadcasts along `axis` alone, flat; None for anything else."""
    if isinstance(value, int | float):
        return torch.tensor([float(value)], dtype=torch.float64)
    c = const_value(value)
    if c is None or not c.is_floating_point() or c.ndim > rank:
        return None
    flat = c.numel() == 1 or (c.ndim >= -axis and c.shape[axis] == channels == c.numel())
    return c.double().flatten() if flat else None


class Layer:
    """A convolution or linear with constant weight and bias: its channels, and its constants scaled along them."""

    def __init__(self, node: Node, rw: Rewriter) -> None:
        self.node, self.rw = node, rw
        self.view: Conv | Linear = view_any((Conv, Linear), node)
        self.weight = _value(self.view.weight)
        self.channels = Weight(self.view, self.weight)
        spatial = self.weight.ndim - 2
        if isinstance(self.view, Conv):
            self.alpha, self.beta = 1.0, 1.0
            self.rank, self.output_axis, self.input_axis = spatial + 2, -spatial - 1, -spatial - 1
        else:
            if spatial:
                rw.decline(f"the weight has {spatial} batch axes")
            self.alpha, self.beta = self.view.alpha, self.view.beta
            kind = type_of(self.view.x)
            self.rank, self.output_axis, self.input_axis = (kind and kind.rank) or 1, -1, self.view.x_axis

    @property
    def outputs(self) -> int:
        return self.channels.outputs

    @property
    def inputs(self) -> int:
        return self.channels.inputs

    def scaled(self, values: Tensor, axis: int) -> Tensor:
        """The weight in float64 times a value per channel of its `axis`, and of every group."""
        return self.channels.scaled(values, axis)

    def response(self, shift: Tensor) -> Tensor:
        """What the layer without bias gives, on each output channel, for an input that is `shift` everywhere."""
        return self.channels.response(shift) * self.alpha

    def bias(self) -> Tensor:
        """The bias in float64, one element or one per output."""
        if self.view.bias is None:
            return torch.zeros(1, dtype=torch.float64)
        value = _value(self.view.bias).double()
        if value.numel() != 1 and (value.shape[-1] != self.outputs or value.numel() != self.outputs):
            self.rw.decline(f"the bias of shape {list(value.shape)} is not one per output channel")
        return value.flatten()

    def rebuilt(self, *, like: Node, weight: Tensor | None, bias: Tensor | None, **roles: Any) -> Node | None:
        """The same call with other constants (None: its own); None when the target takes no bias."""
        if weight is not None:
            if len(self.view.weight.users) > 1:
                self.rw.decline(
                    f"weight @{self.view.weight.target} is read {len(self.view.weight.users)} times; folding would store it twice"
                )
            roles["weight"] = self.constant(weight, self.view.weight)
        if bias is not None:
            if self.beta == 0:
                self.rw.decline("the bias has factor 0")
            roles["bias"] = self.constant((bias / self.beta).expand(self.outputs), self.view.bias)
        found = with_operands(self.node, **roles)
        return None if found is None else self.rw.call(self.node.target, *found[0], like=like, origin=self.node, **found[1])

    def constant(self, value: Tensor, old: Node | None) -> Node:
        rounded = value.to(self.weight.dtype)
        if not bool(rounded.isfinite().all()):
            self.rw.decline(f"a folded constant does not fit {self.weight.dtype}")
        return self.rw.const(rounded, name=str(old.target) if old is not None else f"{self.view.weight.target}_bias")


def _value(node: Node) -> Tensor:
    found = const_value(node)
    assert found is not None  # the pattern asks for constants
    return found


def _layer(x: Any, *, single_use: bool) -> OneOf:
    """A layer with constant weight and bias, reading x."""
    parts = {"x": x, "weight": Const("weight"), "bias": Opt(Const("bias"))}
    return OneOf(Op(Conv, "op", single_use=single_use, **parts), Op(Linear, "op", single_use=single_use, **parts))


AFTER = _layer(Var("x"), single_use=True)


@rule(OneOf(Op(BatchNorm, x=AFTER), Op(Elementwise, inputs=Inputs(AFTER, Var("constant")))))
def fold_after(m: Match, rw: Rewriter) -> Node | tuple[Node, None, None] | None:
    """s (W x + b) + t -> (s W) x + (s b + t)"""
    if isinstance(m.get("constant"), Node) and not is_const(m.constant):
        return None
    layer = Layer(m.op, rw)
    found = affine(m.root, layer.output_axis, layer.outputs, layer.rank)
    if found is None:
        return None
    scales, shifts = bool((found.scale != 1).any()), bool(found.shift.any())
    weight = layer.scaled(found.scale, layer.view.out_axis) if scales else None
    kept = _moments(m.root, m.op, found, layer.output_axis)
    several = isinstance(m.root.meta.get("val"), tuple | list)
    if several and any(u.target is not operator.getitem or u.args[1] != 0 for u in m.root.users):
        rw.decline("its other outputs are read")
    bias = found.scale * layer.beta * layer.bias() + found.shift if shifts or layer.view.bias is not None else None
    new = layer.rebuilt(like=m.op, weight=weight, bias=bias)
    if new is None and scales:
        rw.decline(f"{m.op.target} takes no bias for the shift")
    if new is not None and kept is not None:
        new.meta[MOMENTS] = kept
    return (new, None, None) if several and new is not None else new


def _moments(root: Node, layer: Node, found: Affine, axis: int) -> Moments | None:
    """What is known of the value of `root`, in which an affine function of `layer` ends."""
    kept: Moments | None = layer.meta.get(MOMENTS)
    if (norm := view(BatchNorm, root)) is not None:
        bias, weight = (default if c is None else _value(c).double() for c, default in ((norm.bias, _ZERO), (norm.weight, _ONE)))
        return normal(_along(bias.expand(found.scale.shape), axis), _along(weight.abs(), axis))
    return None if kept is None else kept.times(_along(found.scale, axis)).plus(_along(found.shift, axis))


def _along(values: Tensor, axis: int) -> Tensor:
    """One value per index of the axis, counted from the end."""
    return values.reshape(-1, *[1] * (-1 - axis))


PRE = OneOf(Op(BatchNorm, "pre", single_use=True), Op(Elementwise, "pre", single_use=True))


@rule(_layer(PRE, single_use=False))
def fold_before(m: Match, rw: Rewriter) -> Node | None:
    """W (s x + t) + b -> (W s) x + (b + sum_i W t)"""
    arithmetic = view(Elementwise, m.pre)
    if arithmetic is not None and not any(is_const(v) or isinstance(v, int | float) for v in arithmetic.inputs):
        return None
    layer = Layer(m.op, rw)
    found = affine(m.pre, layer.input_axis, layer.inputs, _rank_before(m.pre, layer))
    if found is None:
        return None
    shifts = bool(found.shift.any())
    if shifts and not _is_uniform(layer.view):
        return _scale_under_shift(m.pre, found, layer)
    if found.per_channel and not found.norm:
        rw.decline("constants per channel before a layer stay: they end a layer norm or the like, which runtimes fuse as a whole")
    _check_scale(m.pre, found, rw)
    weight = layer.scaled(found.scale, layer.view.in_axis) if bool((found.scale != 1).any()) else None
    bias = layer.beta * layer.bias() + layer.response(found.shift) if shifts else None
    new = layer.rebuilt(like=m.op, weight=weight, bias=bias, x=found.x)
    if (norm := view(BatchNorm, m.pre)) is not None:
        seen = normal(*(_along(t, layer.input_axis) for t in (_value(norm.mean).double(), _value(norm.var).double().sqrt())))
        found.x.meta.setdefault(MOMENTS, seen)
    return new if new is not None else rw.decline(f"{m.op.target} takes no bias for the shift")


def _rank_before(pre: Node, layer: Layer) -> int:
    """The rank that a constant may have without adding axes to the other operand."""
    if view(BatchNorm, pre) is not None:
        return layer.rank
    kinds = [type_of(v) for v in pre.all_input_nodes if not is_const(v)]
    return min((k.rank for k in kinds if k is not None and k.rank is not None), default=1)


def _is_uniform(layer: Conv | Linear) -> bool:
    """A constant input gives a constant output: nothing is padded, and every output reads the same number of inputs."""
    return isinstance(layer, Linear) or (not layer.transposed and layer.padding is not None and not any(b or e for b, e in layer.padding))


def _scale_under_shift(pre: Node, shift: Affine, layer: Layer) -> Node:
    """Padded W (s x + t) + b -> (s W) (x + t / s) + b for one s; t is the constant that `pre` adds."""
    constants = [v for v in pre.all_input_nodes if is_const(v)]
    scale = affine(shift.x, layer.input_axis, layer.inputs, _rank_before(shift.x, layer)) if len(shift.x.users) == 1 else None
    one_scale = scale is not None and not scale.per_channel and not scale.shift.any() and bool(scale.scale.all())
    if scale is None or not one_scale or len(constants) != 1 or bool((shift.scale != 1).any()):
        layer.rw.decline("a shift before padding is not constant at the border")
    _check_scale(shift.x, scale, layer.rw)
    value = _value(constants[0])
    moved = layer.constant((value.double() / scale.scale).reshape(value.shape), constants[0])
    args = map_arg(pre.args, lambda n: moved if n is constants[0] else scale.x if n is shift.x else n)
    added = layer.rw.call(pre.target, *args, like=pre, origin=pre, **pre.kwargs)
    new = layer.rebuilt(like=layer.node, weight=layer.scaled(scale.scale, layer.view.in_axis), bias=None, x=added)
    return new if new is not None else layer.rw.decline(f"{layer.node.target} takes no other weight")


def _check_scale(node: Node, found: Affine, rw: Rewriter) -> None:
    """Declines where the value changes its type, and for the last factor of a gelu spelled out."""
    was, now = type_of(found.x), type_of(node)
    if was is not None and now is not None and was.dtype != now.dtype:
        rw.decline(f"%{node.name} also changes the type from {was.dtype} to {now.dtype}")
    product = view(Elementwise, found.x)
    sums = [view(Elementwise, v) for v in product.inputs] if product is not None and product.kind == "mul" else []
    curves = [view(Activation, v) for s in sums if s is not None and s.kind == "add" for v in s.inputs]
    if any(c is not None and c.kind in ("erf", "tanh") for c in curves):
        rw.decline("the factor ends a gelu, which runtimes fuse as a whole")
