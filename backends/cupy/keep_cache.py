"""A decoder's cache stays in integers, on the device (`Cupy(capacity=n)`):

    k = cat(past_k, dequantize(dynamic_quantize(new_k))), v likewise
    attention(q, k, v, mask)  ->  cached_attention(q, new_k, new_v, codes, params, lengths, starts, past)

The presents are no outputs any more. The past tensors stay inputs of which only sizes are read, so that the rest of the graph is as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from qgraph.attention import Rows, attentions, known_shape, rows_of
from qgraph.backends.cupy import cached_attention  # noqa: F401  (registers the op)
from qgraph.backends.cupy.causal import check_causal
from qgraph.backends.cupy.kv_cache import Bits, choose, row_bytes
from qgraph.backends.cupy.ops import K
from qgraph.edit import erase, replace
from qgraph.errors import LoweringError
from qgraph.feeds import inputs_of
from qgraph.ledger import state
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.rewriter import Rewriter
from qgraph.text import where
from qgraph.tokens import Roles, roles
from qgraph.types import TensorType, type_of
from qgraph.views import Attention, Dequantize, DynamicQuantize, Size, view

CACHE = "kv_cache"
"""The key of a graph's meta under which its KeptCache is."""

LEAST = 4
"""Tokens of the smallest cache: of as many that come at once the mask is tried."""


@dataclass(frozen=True)
class Layer:
    """What kv_cache.QuantizedCache.allocate needs to know of the cache of one attention."""

    kv_heads: int
    head_dim: int
    bits: Bits
    symmetric: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class KeptCache:
    """Of a graph whose cache is kept: its inputs are those of `names`, which `known` tells apart, then lengths int32 [batch], starts int32
    [batch], and codes and params of each layer."""

    layers: tuple[Layer, ...]
    known: Roles
    names: tuple[str, ...]
    capacity: int


@dataclass(frozen=True)
class KeepCache(Pass):
    """For a cache of up to `capacity` tokens; None changes nothing. Stands in front of passes that take the quantized rows apart.

    Raises LoweringError where there is no such cache, or one of its attentions is not what the kernels compute; ModelError for a graph
    whose inputs are not a decoder's."""

    capacity: int | None = None

    contract: ClassVar[Contract] = LOSSY

    def run(self, gm: GraphModule, ctx: Context) -> int:
        if self.capacity is None or CACHE in gm.meta:
            return 0
        if self.capacity < LEAST:
            raise LoweringError(f"a cache has room for {LEAST} tokens or more, not {self.capacity}")
        cached = _cached(gm)
        if not cached:
            raise LoweringError("no attention of this graph reads a cache: export the model through qgraph.decoder.Decoder")
        known, names = roles(inputs_of(gm)), tuple(i.name for i in inputs_of(gm))
        for mask, node in {a.mask: node for node, a, _, _ in cached}.items():
            check_causal(gm, mask, node, known, self.capacity)
        layers = tuple(_layer(node, k, v) for node, _, k, v in cached)
        inputs = _Inputs.add(gm, layers, known, self.capacity)
        for i, (node, a, k, v) in enumerate(cached):
            _attend(gm, node, a, k, v, layers[i], inputs, i)
        presents = {r.present for _, _, k, v in cached for r in (k, v)}
        _drop(gm, cast(set[Node], presents))
        for past in {r.past for _, _, k, v in cached for r in (k, v)}:
            _check_sizes_alone(cast(Node, past))
        gm.graph.set_codegen(CodeGen())
        gm.graph.lint()
        gm.recompile()
        gm.meta[CACHE] = KeptCache(layers, known, names, self.capacity)
        return len(cached)


def has_cache(gm: GraphModule) -> bool:
    """Whether an attention reads a cache whose new rows are in integers."""
    return any(_source(k.new) is not None for _, _, k, _ in _cached(gm))


def _cached(gm: GraphModule) -> list[tuple[Node, Attention, Rows, Rows]]:
    """Attentions that read a cache, with their keys and values."""
    found = [(node, a, *_rows(node, a, None if chain is None else chain.k_perm)) for node, a, chain in attentions(gm.graph)]
    return [(node, a, k, v) for node, a, k, v in found if k.past is not None or v.past is not None]


def _rows(node: Node, found: Attention, perm: tuple[int, ...] | None) -> tuple[Rows, Rows]:
    keys, values = rows_of(found.k, node), rows_of(found.v, node)
    if keys.past is not None and perm is not None:
        raise LoweringError(f"the keys of {where(node)} are cached with their axes in the order {perm}")
    return keys, values


def _layer(node: Node, keys: Rows, values: Rows) -> Layer:
    """Raises LoweringError where k and v are not alike, in float, or in a form that the kernels have not."""
    k, v = (_source(r.new) for r in (keys, values))
    if k is None or v is None:
        raise LoweringError(
            f"the cache of {where(node)} is in float: take a recipe that stores it in integers, such as w4a16kv8-g128, or leave capacity out"
        )
    shapes = [known_shape(r.past) if r.past is not None and r.past.op == "placeholder" else None for r in (keys, values)]
    alike = (k.dtype, k.symmetric, shapes[0], keys.times) == (v.dtype, v.symmetric, shapes[1], values.times)
    if not alike or shapes[0] is None or len(shapes[0]) != 4:
        raise LoweringError(f"keys and values of {where(node)} do not come from two inputs of one shape [batch, heads, past, head_dim]")
    kv_heads, head_dim = shapes[0][1], shapes[0][3]
    kind = type_of(keys.new)
    dtype = getattr(torch, str(kind.dtype if kind is not None else None), None)
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int) or not isinstance(dtype, torch.dtype):
        raise LoweringError(f"heads, their size or the element type of the cache of {where(node)} are not known")
    bits = cast(Bits, int(k.dtype.removeprefix("uint")))
    choose(dtype, bits, head_dim, 1)
    return Layer(kv_heads, head_dim, bits, k.symmetric, dtype)


def _source(node: Node) -> DynamicQuantize | None:
    """How the rows that `node` dequantizes were quantized: each by itself, unsigned."""
    stored = view(Dequantize, node)
    made = None if stored is None else next((v for n in stored.q.all_input_nodes if (v := view(DynamicQuantize, n)) is not None), None)
    return made if made is not None and made.group == -1 and made.dtype.startswith("uint") else None


@dataclass(frozen=True)
class _Inputs:
    """New inputs of the graph, and how many tokens the cache holds."""

    lengths: Node
    starts: Node
    layers: tuple[tuple[Node, Node], ...]

    @classmethod
    def add(cls, gm: GraphModule, layers: tuple[Layer, ...], known: Roles, capacity: int) -> _Inputs:
        batch = known.cache[0].type.shape[0] if known.cache[0].type is not None and known.cache[0].type.shape else None
        per_row = TensorType("int32", (batch,))
        types = {"cache_lengths": per_row, "cache_starts": per_row}
        for i, layer in enumerate(layers):
            shape = (2, batch, layer.kv_heads, capacity)
            types[f"cache_{i}_codes"] = TensorType("uint8", (*shape, row_bytes(layer.head_dim, layer.bits)))
            types[f"cache_{i}_params"] = TensorType(str(layer.dtype).removeprefix("torch."), (*shape, 2))
        last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
        made = []
        for name, kind in types.items():
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(name)
            last.meta["type"] = kind
            made.append(last)
        state(gm).input_names += tuple(types)
        lengths, starts, *rest = made
        return cls(lengths, starts, tuple(zip(rest[0::2], rest[1::2], strict=True)))


def _attend(gm: GraphModule, node: Node, found: Attention, keys: Rows, values: Rows, layer: Layer, inputs: _Inputs, i: int) -> None:
    new = [cast(DynamicQuantize, _source(r.new)).x for r in (keys, values)]
    scale = layer.head_dim**-0.5 if found.scale is None else found.scale
    rw = Rewriter(gm, node, by=KeepCache.name)
    past = rw.call(torch.ops.aten.sym_size.int, keys.past, 2)
    of_cache = (*inputs.layers[i], inputs.lengths, inputs.starts, past, float(scale), layer.bits, layer.symmetric)
    replace(node, rw.call(K.cached_attention.default, found.q, *new, *of_cache, like=node))


def _drop(gm: GraphModule, presents: set[Node]) -> None:
    """The presents are not returned. Raises LoweringError where something else reads them."""
    output = gm.graph.output_node()
    (values,) = output.args
    flat: list[Any] = list(values) if isinstance(values, list | tuple) else [values]
    names = state(gm).output_names
    if len(names) == len(flat):
        state(gm).output_names = tuple(n for n, v in zip(names, flat, strict=True) if v not in presents)
    output.args = (tuple(v for v in flat if v not in presents),)
    for present in presents:
        if present.users:
            raise LoweringError(f"%{present.name}, a cache that attention reads, is read by {where(next(iter(present.users)))} as well")
        erase(present)


def _check_sizes_alone(past: Node) -> None:
    """Raises LoweringError where the graph reads numbers of the cache itself."""
    for user in past.users:
        if user.target is not torch.ops.aten.sym_size.int and view(Size, user) is None:
            raise LoweringError(f"{where(user)} reads the cache %{past.name} itself, which is in integers now")
