"""Views of aten targets that move, select, join, pool, look up, normalise rows or change the type."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from qgraph.types import type_of
from qgraph.views import Attention, Cast, Concat, DataMovement, Embedding, Pad, Pool, Reduce, Size, Softmax, implements, operands

aten = torch.ops.aten


def _rank(node: Any) -> int | None:
    t = type_of(node) if isinstance(node, Node) else None
    return None if t is None else t.rank


# Data movement

_MOVES: dict[str, tuple[Any, ...]] = {
    "reshape": (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default,
                aten.unflatten.int, aten._reshape_alias.default),
    "flatten": (aten.flatten.using_ints,),
    "slice": (aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.slice_copy.Tensor),
    "gather": (aten.index_select.default, aten.gather.default),
    "squeeze": (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    "unsqueeze": (aten.unsqueeze.default,),
    "expand": (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default),
    "split": (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
              aten.tensor_split.sections, aten.tensor_split.indices),
    "copy": (aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default),
    "tile": (aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int),
    "space_to_depth": (aten.pixel_unshuffle.default,),
    "depth_to_space": (aten.pixel_shuffle.default,),
}  # fmt: skip


def _move(kind: str) -> Callable[[Node], DataMovement]:
    return lambda node: DataMovement(kind, operands(node)["self"])


for _kind, _targets in _MOVES.items():
    implements(DataMovement, *_targets)(_move(_kind))


@implements(DataMovement, operator.getitem)
def _getitem(node: Node) -> DataMovement | None:
    source = node.args[0]
    return DataMovement("getitem", source) if isinstance(source, Node) else None


@implements(DataMovement, aten.permute.default)
def _permute(node: Node) -> DataMovement:
    o = operands(node)
    return DataMovement("transpose", o["self"], tuple(d % len(o["dims"]) for d in o["dims"]))


def _swap(x: Node, a: int, b: int) -> DataMovement:
    rank = _rank(x)
    if not rank:
        return DataMovement("transpose", x)
    perm = list(range(rank))
    perm[a], perm[b] = perm[b], perm[a]
    return DataMovement("transpose", x, tuple(perm))


@implements(DataMovement, aten.transpose.int, aten.swapaxes.default)
def _transpose(node: Node) -> DataMovement:
    o = operands(node)
    x, first, second = o.values()
    return _swap(x, first, second)


@implements(DataMovement, aten.t.default, aten.numpy_T.default)
def _t(node: Node) -> DataMovement:
    x = operands(node)["self"]
    return _swap(x, 0, 1) if _rank(x) == 2 else DataMovement("transpose", x)


@implements(DataMovement, aten.mT.default)
def _m_t(node: Node) -> DataMovement:
    return _swap(operands(node)["self"], -2, -1)


@implements(DataMovement, aten.movedim.int)
def _movedim(node: Node) -> DataMovement:
    o = operands(node)
    rank = _rank(o["self"])
    if not rank:
        return DataMovement("transpose", o["self"])
    perm = [d for d in range(rank) if d != o["source"] % rank]
    perm.insert(o["destination"] % rank, o["source"] % rank)
    return DataMovement("transpose", o["self"], tuple(perm))


@implements(DataMovement, aten.pad.default)
def _edge_pad(node: Node) -> DataMovement | None:
    o = operands(node)
    return DataMovement("gather", o["self"]) if o["mode"] != "constant" else None


@implements(Concat, aten.cat.default, aten.concat.default, aten.concatenate.default, aten.stack.default)
def _cat(node: Node) -> Concat | None:
    o = operands(node)
    inputs = tuple(o["tensors"])
    return Concat(inputs, o["dim"]) if all(isinstance(i, Node) for i in inputs) else None


# Pools and pads


def _pool(kind: str) -> Callable[[Node], Pool]:
    return lambda node: Pool(kind, operands(node)["self"])


implements(Pool, aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)(_pool("max"))
implements(Pool, aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)(_pool("average"))


@implements(
    Pool,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def _adaptive_avg_pool(node: Node) -> Pool:
    o = operands(node)
    return Pool("global_average" if all(s == 1 for s in o["output_size"]) else "average", o["self"])


@implements(Pool, aten.mean.dim)
def _mean(node: Node) -> Pool | None:
    o = operands(node)
    rank, dims = _rank(o["self"]), o["dim"]
    if rank is None or rank < 3 or not dims or o["dtype"] is not None:
        return None
    return Pool("global_average", o["self"]) if sorted(d % rank for d in dims) == list(range(2, rank)) else None


def _reduce(kind: str, node: Node, dims: Any) -> Reduce | None:
    o = operands(node)
    rank, axes = _rank(o["self"]), dims if isinstance(dims, list | tuple) else [dims]
    if not rank or not o["keepdim"] or o.get("dtype") is not None or not axes or not all(isinstance(d, int) for d in axes):
        return None
    return Reduce(kind, o["self"], tuple(sorted(d % rank - rank for d in axes)))


def _reduction(kind: str) -> Callable[[Node], Reduce | None]:
    return lambda node: _reduce(kind, node, operands(node)["dim"])


implements(Reduce, aten.mean.dim)(_reduction("mean"))
implements(Reduce, aten.sum.dim_IntList)(_reduction("sum"))
implements(Reduce, aten.amax.default)(_reduction("max"))


@implements(Reduce, aten.var.dim, aten.var.correction)
def _variance(node: Node) -> Reduce | None:
    o = operands(node)
    correction = o["unbiased"] if "unbiased" in o else o["correction"]  # None stands for 1
    return _reduce("variance", node, o["dim"]) if correction in (0, False) and correction is not None else None


@implements(Reduce, operator.getitem)
def _largest(node: Node) -> Reduce | None:
    """max(dim) gives values and where they are."""
    source = node.args[0]
    if not isinstance(source, Node) or source.target is not aten.max.dim or node.args[1] != 0:
        return None
    return _reduce("max", source, operands(source)["dim"])


@implements(Pad, aten.constant_pad_nd.default, aten.pad.default)
def _pad(node: Node) -> Pad | None:
    o = operands(node)
    x, flat, value = o["self"], o["pad"], o["value"]
    rank = _rank(x)
    if o.get("mode", "constant") != "constant" or isinstance(value, Node):
        return None
    if rank is None or not all(isinstance(p, int) for p in flat):
        return Pad(x, None, float(value or 0))
    # torch lists (begin, end) from the last axis backwards.
    pads = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    pads += [(0, 0)] * (rank - len(pads))
    return Pad(x, tuple(reversed(pads)), float(value or 0))


# Sizes, lookups, softmax, attention, casts


@implements(Size, aten.sym_size.int, aten.sym_size.default, aten.sym_numel.default)
def _size(node: Node) -> Size:
    return Size(operands(node)["self"])


@implements(Embedding, aten.embedding.default)
def _embedding(node: Node) -> Embedding:
    o = operands(node)
    return Embedding(o["weight"], o["indices"])


def _softmax(*, log: bool) -> Callable[[Node], Softmax]:
    return lambda node: Softmax(operands(node)["self"], operands(node)["dim"], log)


implements(Softmax, aten.softmax.int, aten._softmax.default)(_softmax(log=False))
implements(Softmax, aten.log_softmax.int, aten._log_softmax.default)(_softmax(log=True))


@implements(Attention, aten.scaled_dot_product_attention.default)
def _attention(node: Node) -> Attention | None:
    o = operands(node)
    if o["dropout_p"] != 0 or o["enable_gqa"] or isinstance(o["scale"], Node):
        return None
    return Attention(o["query"], o["key"], o["value"], o["attn_mask"], o["scale"], bool(o["is_causal"]))


def _to(node: Node, dtype: Any) -> Cast | None:
    return Cast(operands(node)["self"], str(dtype).removeprefix("torch.")) if isinstance(dtype, torch.dtype) else None


@implements(Cast, aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device)
def _cast(node: Node) -> Cast | None:
    return _to(node, operands(node)["dtype"])


@implements(Cast, aten.type_as.default, aten.to.other)
def _cast_like(node: Node) -> Cast | None:
    own = type_of(node)
    return Cast(operands(node)["self"], own.dtype) if own is not None and own.dtype is not None else None
