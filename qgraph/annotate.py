"""recipe x placement -> which edge gets which QSpec.

A site is an operation with a constant weight: linear, convolution, embedding. The recipe and its rules say which formats a site is
wanted in, the backend's placement says which are possible, and every decision goes to the ledger with its reason. What happens
between sites is solved by regions.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node

from qgraph.backend import Placement
from qgraph.errors import RecipeError, nearest
from qgraph.formats import OVERRIDE, SITES, Override, SiteView, excluded, names_of, sites, wanted
from qgraph.ledger import FLOAT, Entry, Ledger
from qgraph.recipe import Int, Recipe
from qgraph.regions import Group, Regions, kind_in
from qgraph.text import path_of
from qgraph.types import PerGroup, PerTensor, QSpec, type_of
from qgraph.views import Activation, Conv, Embedding, Linear, const_value, is_const, key, table, view, view_any

Decision = tuple[QSpec | None, str]
"""A format (None: float) and why."""


@dataclass
class Annotations:
    """`operands[node][role]`: formats of weights (role "weight") and of dynamic activations ("x"); `groups`: static activations."""

    operands: dict[Node, dict[str, QSpec]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.operands.values())) + sum(len(g.consumers) for g in self.groups)


def annotate(gm: GraphModule, recipe: Recipe, placement: Placement, ledger: Ledger) -> Annotations:
    """Solve one graph (not its nested bodies). Every linear, convolution and embedding gets ledger entries.

    Raises RecipeError when two rules want different formats of one shared value, or when the backend cannot honour a rule."""
    named = labels(gm)
    found, inputs = Annotations(), {}
    for node, v in sites(gm):
        weight, x = _Site(node, v, named[node], recipe, placement, ledger).decide()
        operands = ({"weight": weight} if weight else {}) | ({"x": x} if x and x.dynamic else {})
        if operands:
            found.operands[node] = operands
        if x and not x.dynamic:
            inputs[node] = (_x(v), x)
    _record_unread(gm, named, ledger)
    if inputs:
        outputs = frozenset(n for n, v in sites(gm) if n in inputs and isinstance(v, placement.always_output))
        default = next(iter(sorted((s for _, s in inputs.values()), key=str)))
        regions = Regions(gm, placement, inputs, outputs, default, lambda n: excluded(n, recipe))
        found.groups = regions.groups()
        _record_outputs(found.groups, named, ledger)
    return found


def check_rules(gms: Iterable[GraphModule], recipe: Recipe) -> None:
    """Raises RecipeError for a rule whose pattern matches no operation of any of these graphs."""
    names = {name for gm in gms for node in gm.graph.nodes if node.op == "call_function" for name in names_of(node)}
    for pattern in recipe.rules:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(f"rule {pattern!r} matches no operation{nearest(pattern, names)}")


def _x(v: SiteView) -> Node:
    return v.indices if isinstance(v, Embedding) else v.x


def labels(gm: GraphModule) -> dict[Node, str]:
    """The path of each operation, made unique by the FX name where one module holds several."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    count = Counter(path_of(n) for n in nodes)
    return {n: p if count[p := path_of(n)] == 1 or p == n.name else f"{p}:{n.name}" for n in nodes}


def _kind(node: Node) -> str:
    return str(key(node.target)).removeprefix("::").removesuffix(".default")


def _record_unread(gm: GraphModule, named: dict[Node, str], ledger: Ledger) -> None:
    """Operations that have a weight but are used in a form that the interfaces do not know."""
    for node in gm.graph.nodes:
        unread = [kind for kind in SITES if key(node.target) in table(kind)] if node.op == "call_function" else []
        if unread and view_any(SITES, node) is None:
            ledger.record(Entry(named[node], _kind(node), "x", FLOAT, "annotate", _why_unread(node, unread[0])))


def _why_unread(node: Node, kind: type) -> str:
    ranks = [t.rank for i in node.all_input_nodes[:2] if (t := type_of(i)) is not None and t.rank is not None]
    if kind is Conv and len(ranks) == 2 and ranks[0] < ranks[1]:
        return "its x has no batch axis; add one, with x.unsqueeze(0)"
    return f"this form of {kind.__name__.lower()} is not understood (its attributes or its weight's shape are unknown)"


def _record_outputs(groups: Iterable[Group], named: dict[Node, str], ledger: Ledger) -> None:
    for group in groups:
        for value, maker in group.makers.items():
            absorbed = "" if maker is value else f", after {_kind(value)}"
            reason = f"computed in integers{absorbed}"
            ledger.record(Entry(named[maker], _kind(maker), "output", str(group.spec), "annotate", reason))


@dataclass(frozen=True)
class _Site:
    """One operation with a weight, and how its formats are decided."""

    node: Node
    v: SiteView
    label: str
    recipe: Recipe
    placement: Placement
    ledger: Ledger

    def decide(self) -> tuple[QSpec | None, QSpec | None]:
        """(format of the weight, format of x), None for float; both recorded with their reason."""
        weight: Decision
        x: Decision
        obstacle = self.obstacle()
        if obstacle:
            weight = x = (None, obstacle)
        else:
            rule, wanted_weight, wanted_x = wanted(self.node, self.recipe)
            loss = self.loss(rule, wanted_x)
            if loss:
                wanted_weight = wanted_x = None
            weight = (None, loss) if loss else self.weight(wanted_weight, rule)
            x = (None, loss) if loss else self.x(wanted_x, rule, weight[0])
            if weight[0] and not x[0] and (reason := self.not_alone(weight[0])):
                weight = (None, x[1] if wanted_x else self.refuse(rule, reason))
        self.record("weight" if is_const(self.v.weight) else "operand", *weight)
        if not isinstance(self.v, Embedding):
            self.record("x", *x)
        return weight[0], x[0]

    def not_alone(self, weight: QSpec) -> str:
        """Why this weight cannot be in integers beside a float x, or ""."""
        if not isinstance(self.v, self.placement.weight_only):
            return "the backend has no kernel for an integer weight with float x"
        return self.placement.accepts(self.v, "weight alone", weight) or ""

    def record(self, role: str, spec: QSpec | None, reason: str) -> None:
        self.ledger.record(Entry(self.label, _kind(self.node), role, str(spec) if spec else FLOAT, "annotate", reason))

    def obstacle(self) -> str:
        """Why this operation can have no integer format at all, or ""."""
        value = const_value(self.v.weight)
        if value is None:
            if isinstance(self.v, Linear):
                return (
                    "its constant operand is the first, kernels take it second" if is_const(self.v.x) else "both operands are activations"
                )
            return "its weight is not a constant"
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            kind = str(value.dtype).removeprefix("torch.")
            return f"its weight is {kind}, not float32 or a 16-bit float; convert the model if it should be quantized"
        if not isinstance(self.v, Conv) and value.dim() != 2:
            return f"its weight has {value.dim()} axes, integer kernels take 2"
        return "its weight is empty" if value.numel() == 0 else ""

    @property
    def override(self) -> Override | None:
        found: Override | None = self.node.meta.get(OVERRIDE)
        return found

    def refuse(self, rule: str | None, reason: str) -> str:
        """A refused format: an error if a rule asked for it by name, otherwise the ledger's reason."""
        if rule is not None and self.recipe.rules[rule] is not None:
            raise RecipeError(f"rule {rule!r} cannot be honoured at {self.label}: {reason}")
        return reason

    def source(self, rule: str | None) -> str:
        if rule:
            return f"rule {rule!r}"
        return self.override.by if self.override is not None else f"recipe {self.recipe.name}"

    def weight(self, wanted: Int | None, rule: str | None) -> Decision:
        if wanted is None:
            return None, f"{self.source(rule)} leaves it in float"
        rank = self.rank()
        in_axis, out_axis = (1, 0) if isinstance(self.v, Embedding) else (self.v.in_axis % rank, self.v.out_axis % rank)
        spec = wanted.weight_spec(in_axis=in_axis, out_axis=out_axis)
        if isinstance(self.v, Conv) and wanted.group is not None:
            return None, self.refuse(rule, "there is no kernel for group-wise convolution weights")
        refusal = self.placement.accepts(self.v, "weight", spec)
        return (None, self.refuse(rule, refusal)) if refusal else (spec, self.source(rule))

    def rank(self) -> int:
        value = const_value(self.v.weight)
        return value.dim() if value is not None else 0

    def loss(self, rule: str | None, wanted: Int | None) -> str:
        """Why integers gain nothing here, or "". A rule that names the operation, or a pass that measured it, knows better."""
        if wanted is None or rule is not None or self.override is not None or isinstance(self.v, Embedding):
            return ""
        found = self.placement.pays(self.v, self.x_spec(wanted), self.from_float(), self.to_float())
        return f"does not pay: {found}" if found else ""

    def from_float(self) -> bool:
        """No integer kernel can make x."""
        node = _x(self.v)
        while (act := view(Activation, node)) is not None and act.kind in self.placement.absorb:
            node = act.x
        return not self.in_integers(node)

    def to_float(self) -> bool:
        """Some reader of the result has no integer kernel."""
        node = self.node
        while len(node.users) == 1 and (act := view(Activation, reader := next(iter(node.users)))) and act.kind in self.placement.absorb:
            node = reader
        return not all(self.in_integers(reader) for reader in node.users)

    def in_integers(self, node: Node) -> bool:
        followers = (self.placement.follow, self.placement.share)
        return view_any(self.placement.compute, node) is not None or any(kind_in(kinds, node) for kinds in followers)

    def x_spec(self, wanted: Int) -> QSpec:
        """The recipe's format; the backend's form of it where the recipe leaves that open."""
        spec, form = wanted.activation_spec(), self.placement.x_format
        open_ = wanted.symmetric is None and isinstance(spec.granularity, PerTensor) and not spec.dynamic
        return form if form is not None and open_ and form.bits == spec.bits else spec

    def x(self, wanted: Int | None, rule: str | None, weight: QSpec | None) -> Decision:
        if isinstance(self.v, Embedding) or wanted is None:
            return None, f"{self.source(rule)} leaves it in float"
        if weight is None and not isinstance(self.v, self.placement.activation_only):
            return None, "its weight is in float"
        if weight is not None and weight.codebook is not None:
            return None, self.refuse(rule, "levels of a codebook are multiplied in float")
        spec = self.x_spec(wanted)
        if weight is not None and isinstance(spec.granularity, PerGroup) and weight.group > 0:
            spec = replace(spec, granularity=PerGroup(-1, weight.group))  # kernels quantize rows in the weight's groups
        capable = self.placement.dynamic if spec.dynamic else self.placement.compute
        kind = type(self.v).__name__.lower()
        if not isinstance(self.v, capable):
            return None, self.refuse(rule, f"the backend has no fast integer {kind} with {'run-time' if spec.dynamic else 'static'} ranges")
        if isinstance(self.v, Linear) and self.v.x_axis != -1 and spec.axis is not None:
            return None, self.refuse(rule, f"rows of x run along its axis {self.v.x_axis}, not along the last")
        if is_const(self.v.x):
            return None, "x is a constant"
        refusal = self.placement.accepts(self.v, "x", spec)
        return (None, self.refuse(rule, refusal)) if refusal else (spec, self.source(rule))
