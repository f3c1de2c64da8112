"""Where sums of 8-bit products leave their accumulator: a statement per machine, and a proof per product from the weights themselves.

A machine that multiplies the unsigned bytes of x with the signed bytes of a weight may add neighbouring products in few bits, with
saturation, before it goes on in int32: two products of 255 * 127 are twice what 16 bits hold. For the weights q of one output channel
in the order in which the kernel walks them, cut into runs of `products` neighbours, all sums are exact for every x exactly when

    x_max * (sum of the positive q of a run) <=  2**(bits-1) - 1    and    x_max * (sum of its negative q) >= -2**(bits-1)

Which neighbours are added was found by experiment with ONNX Runtime 1.31 under `qemu-x86_64 -cpu Haswell`: elements 2i and 2i + 1
along K of a matrix product, and of a convolution's kernel laid out as [position, input channel]. Depthwise convolutions widen first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.edit import graph_modules
from qgraph.errors import RecipeError, nearest
from qgraph.ledger import Entry, Ledger, state
from qgraph.reference import quantize
from qgraph.text import path_of
from qgraph.types import int_range
from qgraph.views import Conv, Dequantize, FakeQuantize, Linear, const_value, key, view_any

ROLE = "accumulator"
"""The role of the ledger's entries that say where sums are exact."""

EXACT = "exact"
"""Their decision when that is everywhere."""

BYTE = 255


@dataclass(frozen=True)
class Accumulator:
    """`products` neighbouring products are added in `bits` bits, saturating; the rest is exact in int32. products=1: all of it is."""

    products: int = 1
    bits: int = 32

    def limits(self, x_max: int) -> tuple[int, int]:
        """(smallest, largest) sum of the weights of one sign in a run: in 16 bits, with x up to 255, (-128, 128)."""
        return -(2 ** (self.bits - 1) // x_max), (2 ** (self.bits - 1) - 1) // x_max


TARGETS: dict[str, Accumulator] = {
    "x86-vnni": Accumulator(),
    "x86-avx2": Accumulator(products=2, bits=16),
    "arm64-dot": Accumulator(),
}
"""Machines, by how they add 8-bit products: vpdpbusd (AVX-VNNI, AVX512-VNNI); vpmaddubsw (AVX2, and AVX-512 without VNNI); udot, sdot."""


def accumulator(target: str) -> Accumulator:
    """Raises RecipeError for an unknown machine."""
    if target not in TARGETS:
        raise RecipeError(f"unknown target {target!r}{nearest(target, TARGETS) or '; known: ' + ', '.join(TARGETS)}")
    return TARGETS[target]


@dataclass(frozen=True)
class Product:
    """`node`, seen as `v`, multiplies bytes of x, up to `x_max`, with signed bytes q [N, K] in the order of the kernel.

    int8 x counts as uint8, to which runtimes move it."""

    node: Node
    v: Linear | Conv
    q: Tensor
    x_max: int

    def excess(self, on: Accumulator) -> Tensor:
        """[N]: the largest sum that x can make as a share of what the accumulator holds; above 1 it saturates."""
        low, high = on.limits(self.x_max)
        negative, positive = run_sums(self.q, on.products)
        return torch.maximum(negative / low, positive / high)

    def exact(self, on: Accumulator) -> bool:
        return on.products == 1 or not bool((self.excess(on) > 1).any())


def run_sums(q: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """q [N, K] -> (lowest, highest) sum [N] of the weights of one sign in a run of `products` neighbours along K."""
    padded = torch.nn.functional.pad(q, (0, -q.shape[1] % products)).to(torch.int16)
    members = torch.stack([padded[:, i::products] for i in range(products)])
    low, high = (m.sum(0, dtype=torch.int16) for m in (members.clamp(max=0), members.clamp(min=0)))
    return low.amin(1), high.amax(1)


def find_products(gm: GraphModule) -> Iterator[Product]:
    """The products of a calibrated graph (fake_quantize) or a converted one (dequantize), nested bodies left out."""
    return (p for node in gm.graph.nodes if (p := product_of(node)) is not None)


def product_of(node: Node) -> Product | None:
    """The product that a linear or convolution computes, None where no signed bytes are multiplied, or products are widened first.

    A weight that is computed at run time can be anything: [[lowest, lowest, highest, highest]] stands for it."""
    v = view_any((Linear, Conv), node)
    x, weight = (None, None) if v is None else (view_any((FakeQuantize, Dequantize), n) for n in (v.x, v.weight))
    if x is None or weight is None or x.group > 0 or weight.group > 0:  # products of groups are added in int32
        return None
    (low, high), x_max = int_range(weight.dtype), _span(x.dtype)
    if low == 0 or max(x_max, high - low) > BYTE or _is_widened(v, weight):
        return None
    q = _integers(weight)
    return Product(node, v, torch.tensor([[low, low, high, high]]) if q is None else in_kernel_order(v, q), x_max)


def _span(dtype: str) -> int:
    low, high = int_range(dtype)
    return high - low


def _is_widened(v: Linear | Conv, weight: FakeQuantize | Dequantize) -> bool:
    """Depthwise convolutions widen bytes before they multiply, transposed ones have no integer kernel."""
    q = const_value(weight.q if isinstance(weight, Dequantize) else weight.x)
    return isinstance(v, Conv) and (v.transposed or (q is not None and q.shape[0] == v.groups and q.shape[1] == 1))


def _integers(weight: FakeQuantize | Dequantize) -> Tensor | None:
    if isinstance(weight, Dequantize):
        return const_value(weight.q)
    value, scale = const_value(weight.x), const_value(weight.scale)
    zero_point = None if weight.zero_point is None else const_value(weight.zero_point)
    return None if value is None or scale is None else quantize(value, scale, zero_point, weight.dtype, weight.axis, weight.group)


def in_kernel_order(v: Linear | Conv, weight: Tensor) -> Tensor:
    """A constant weight of any layout as [N, K], leading axes of a batch with N."""
    if isinstance(v, Conv):
        return weight.movedim(1, -1).flatten(1)
    return weight.movedim(v.in_axis, -1).reshape(-1, weight.shape[v.in_axis])


def record(gm: GraphModule) -> None:
    """Writes into the ledger, for every product, on which machines its sums are exact, and what happens on the others."""
    ledger = state(gm).ledger
    for part in graph_modules(gm):
        for p in find_products(part):
            reasons = {name: reason for name, on in TARGETS.items() if (reason := _saturates(p, name, on))}
            decision = f"exact on {', '.join(name for name in TARGETS if name not in reasons)}" if reasons else EXACT
            label, kind = label_of(p.node, ledger), str(key(p.node.target)).removeprefix("::").removesuffix(".default")
            ledger.record(Entry(label, kind, ROLE, decision, "saturation", "; ".join(reasons.values())))


def label_of(node: Node, ledger: Ledger) -> str:
    """The name under which the ledger knows the operation."""
    path = path_of(node)
    return next((name for name in (path, f"{path}:{node.name}") if ledger.get(name, "weight")), path)


def _saturates(p: Product, name: str, on: Accumulator) -> str:
    """A sentence, or "" where every sum is exact."""
    excess = torch.zeros(1) if on.products == 1 else p.excess(on)
    count = int((excess > 1).sum())
    if not count:
        return ""
    worst = float(excess.max())
    return f"on {name} {on.products} products reach {worst:.2f} times what int{on.bits} holds, in {count} of {len(excess)} channels"


def coverage(ledger: Ledger) -> dict[str, int]:
    """Machine -> number of products whose sums may saturate there. Empty when nothing was recorded."""
    found = [e.decision for e in ledger if e.role == ROLE]
    return {name: sum(d != EXACT and name not in d.removeprefix("exact on ").split(", ") for d in found) for name in TARGETS if found}


def covered(ledger: Ledger) -> str:
    """'exact on x86-vnni, arm64-dot; x86-avx2: 36 products may saturate', or '' when nothing was recorded."""
    found = coverage(ledger)
    exact = ", ".join(name for name, count in found.items() if not count)
    parts = [f"exact on {exact}"] if exact else []
    return "; ".join([*parts, *(f"{name}: {count} products may saturate" for name, count in found.items() if count)])
