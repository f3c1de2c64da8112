"""softmax(q (k + b)^T) -> softmax(q k^T)        W (softmax(..) (v + b)) + c -> W (softmax(..) v) + (c + W b)

The bias of the keys adds q . b to all scores of a row, which softmax does not see. The weights of a row sum to 1, so the bias of the values
comes through attention as it is, and goes into the bias of the layer behind it. Two additions fewer for each attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.annotate import labels
from qgraph.attention import find_attention
from qgraph.biases import Bias, bias_of, source_of
from qgraph.commute import moved
from qgraph.edit import graph_modules, has_writes
from qgraph.fields import Field, with_rank
from qgraph.ledger import Entry, Ledger, state
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import BISECTION
from qgraph.rewriter import Decline
from qgraph.text import path_of, target_name
from qgraph.types import type_of
from qgraph.views import Attention, DataMovement, Linear, const_value, view
from qgraph.weights import Weight, constant_weight


@dataclass(frozen=True)
class FoldAttentionBiases(Pass):
    """Attention as one op or as a chain, whose keys and values layers make for it alone, with nothing but movement of elements in between.

    A row whose mask blocks every key is no mean of values: in a chain it is NaN before and after, in torch's op 0, to which the layer behind
    it then adds W b. Where a constant mask has such a row, the bias of the values stays."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(self._run(part, state(gm).ledger, ctx) for part in graph_modules(gm) if not has_writes(part))

    def _run(self, part: GraphModule, ledger: Ledger, ctx: Context) -> int:
        found, count = list(_attentions(part)), 0
        names = labels(part) if found else {}
        for a in found:
            for change in (_keys(a), _values(a)):
                if isinstance(change, str):
                    ctx.declines.append(Decline(self.name, a.y.name, path_of(a.y), change))
                elif change is not None and BISECTION.allows(self.name, change.bias.layer):
                    layer = change.bias.layer
                    ledger.record(Entry(names[layer], target_name(layer), "shift", change.decision, self.name, change.reason))
                    change.apply(part, by=self.name)
                    count += 1
        if count:
            part.graph.lint()
            part.recompile()
        return count


@dataclass(frozen=True, eq=False)
class Attended:
    """Attention `y` on keys [.., S, D], which are `k` with its axes in the order `k_perm`, and values v [.., S, E]. `private`: no other node
    reads what is between k and y."""

    y: Node
    k: Node
    v: Node
    mask: Node | None
    k_perm: tuple[int, ...] | None = None
    private: bool = True


def _attentions(part: GraphModule) -> Iterator[Attended]:
    for node in part.graph.nodes:
        whole, chain = view(Attention, node), find_attention(node)
        if whole is not None:
            yield Attended(node, whole.k, whole.v, whole.mask)
        elif chain is not None:
            private = all(len(n.users) == 1 for n in chain.nodes[:-1])
            yield Attended(node, chain.k, chain.v, chain.mask, chain.k_perm, private)


@dataclass(frozen=True, eq=False)
class Change:
    """The bias goes, into those of `readers` with these shifts, if it is not lost."""

    bias: Bias
    decision: str
    reason: str
    readers: tuple[tuple[Bias, Tensor], ...] = ()

    def apply(self, part: GraphModule, *, by: str) -> None:
        for bias, shift in self.readers:
            bias.add(part, shift, by=by)
        self.bias.remove()


def _keys(a: Attended) -> Change | str | None:
    """None where no layer with a bias makes the keys; a sentence where its bias has to stay."""
    made = _made(a.k)
    if made is None or isinstance(made, str):
        return made
    keys = made.field if a.k_perm is None else made.field.permute(a.k_perm)
    if not a.private:
        return "what its keys become on the way to the scores is read by others too"
    if keys.shape[-2] > 1:
        return f"the bias of {path_of(made.bias.layer)} is not the same for all keys"
    return Change(made.bias, "bias dropped", f"all scores of a row of {path_of(a.y)} share it")


def _values(a: Attended) -> Change | str | None:
    """None where no layer with a bias makes the values; a sentence where its bias has to stay."""
    made = _made(a.v)
    if made is None or isinstance(made, str):
        return made
    if made.field.shape[-2] > 1 or _rank(a.y) != made.field.ndim:
        return f"the bias of {path_of(made.bias.layer)} is not the same for all values"
    if _blocks_a_row(a.mask):
        return "its mask blocks all keys of a row, whose result is then no mean of values"
    value, field = made.follow(a.y)
    readers = [_reader(user, value, field, made.shift) for user in value.users]
    if any(r is None for r in readers) or not readers:
        return f"what reads %{value.name} is not a layer with a bias, alone"
    behind = ", ".join(path_of(r[0].layer) for r in readers if r is not None)
    return Change(made.bias, f"bias moved to {behind}", f"the weights of a row of {path_of(a.y)} sum to 1", tuple(r for r in readers if r))


@dataclass(frozen=True, eq=False)
class Made:
    """Keys or values as a layer with a bias makes them for nobody else. `field` has the number of the element of `shift`, float64
    [channels], that each element of the value contains."""

    bias: Bias
    shift: Tensor
    field: Field

    def follow(self, y: Node) -> tuple[Node, Field | None]:
        """What becomes of y, which has the same field, by movement of elements alone."""
        field: Any = self.field
        while len(y.users) == 1 and (v := _movement(user := next(iter(y.users)))) is not None and v.x is y:
            y, field = user, moved(user, v, field)
        return y, field if isinstance(field, Tensor) else None


def _made(value: Node) -> Made | str | None:
    path: list[Node] = []
    while (v := _movement(value)) is not None:
        path, value = [value, *path], v.x
    found, rank = source_of(value), _rank(value)
    shift = None if found is None else found[1].value
    if found is None or shift is None or rank is None:
        return None
    axis, bias = found
    field: Any = with_rank(torch.arange(bias.channels).reshape(-1, *[1] * (-1 - axis)), rank)
    for node in path:
        field = moved(node, _movement(node), field)  # type: ignore[arg-type]  # the path has nothing else
    name = path_of(bias.layer)
    if not isinstance(field, Tensor) or field.ndim < 2:
        return f"it is not known where the bias of {name} goes"
    if any(len(n.users) != 1 for n in (value, *path)):
        return f"what {name} makes is read by others too"
    return Made(bias, shift, field) if bias.without is not None else f"{target_name(bias.layer)} {name} has no form without a bias"


def _reader(user: Node, x: Node, field: Field | None, shift: Tensor) -> tuple[Bias, Tensor] | None:
    """The bias behind attention and what it takes in; None where there is none: then one addition would only take another's place."""
    v = view(Linear, user)
    weight = None if v is None else constant_weight(v)
    bias = None if weight is None else bias_of(user, weight)
    if v is None or weight is None or bias is None or bias.value is None or v.x is not x or field is None:
        return None
    channels = field.movedim(v.x_axis, -1)
    if channels.numel() != channels.shape[-1]:
        return None
    return bias, Weight(v, weight.value).response(shift[channels.flatten().expand(weight.inputs)]) * v.alpha


def _movement(node: Node) -> DataMovement | None:
    return view(DataMovement, node)


def _blocks_a_row(mask: Node | None) -> bool:
    value = const_value(mask)
    if value is None:
        return False
    blocked = ~value if value.dtype == torch.bool else value == -torch.inf
    return value.ndim > 0 and bool(blocked.all(-1).any())


def _rank(node: Node) -> int | None:
    kind = type_of(node)
    return None if kind is None else kind.rank
