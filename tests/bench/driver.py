"""How the rewriting driver scales: synthetic graphs with a match every five nodes.

    python tests/bench/driver.py [--sizes 1000 10000 100000] [--repeat 3]

Prints one JSON object and a table. Three variants: `typed` infers types on fake tensors, `like` takes them from the root, `constants`
makes a new stored tensor per rewrite. The time is CPU time of `apply`, with its final lint and recompile.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from qgraph.pattern import Const, Match, Op, Var
from qgraph.rewrite import Rewriter, Rule, apply

ATEN = torch.ops.aten
PRODUCT = Op(ATEN.mul.Tensor, single_use=True, self=Var("x"), other=Const("w"))
SUM = Op(ATEN.add.Tensor, self=PRODUCT, other=Var("y"))


def typed(m: Match, rw: Rewriter) -> Node:
    return rw.call(ATEN.addcmul.default, m.y, m.x, m.w)


def like(m: Match, rw: Rewriter) -> Node:
    return rw.call(ATEN.addcmul.default, m.y, m.x, m.w, like=m.root)


def constants(m: Match, rw: Rewriter) -> Node:
    return rw.call(ATEN.addcmul.default, m.y, m.x, rw.const(m.w, lambda w: w + 1), like=m.root)


RULES = [Rule(f.__name__, SUM, f) for f in (typed, like, constants)]


def synthetic(nodes: int) -> GraphModule:
    """A chain of weight, mul, add, relu, neg: five nodes a period, one match each."""
    graph, root, mode = Graph(), torch.nn.Module(), FakeTensorMode()
    with mode:
        fake = torch.empty(2, 3)
    y = x = graph.placeholder("x")
    x.meta["val"] = fake
    for i in range(nodes // 5):
        root.register_buffer(f"w{i}", torch.full((3,), 0.5))
        weight = graph.get_attr(f"w{i}")
        product = graph.call_function(ATEN.mul.Tensor, (x, weight))
        total = graph.call_function(ATEN.add.Tensor, (product, y))
        relu = graph.call_function(ATEN.relu.default, (total,))
        y, x = x, graph.call_function(ATEN.neg.default, (relu,))
        for node in (product, total, relu, x):
            node.meta["val"] = fake
    graph.output(x)
    return GraphModule(root, graph)


def measure(rule: Rule, nodes: int) -> float:
    """CPU seconds of one `apply` on a fresh graph."""
    gm = synthetic(nodes)
    gc.collect()
    start = time.process_time()
    applied = apply(gm, [rule])
    seconds = time.process_time() - start
    if applied.count != nodes // 5:
        raise SystemExit(f"{rule.name}: {applied.count} rewrites in a graph with {nodes // 5} matches")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeat", type=int, default=3, help="the fastest of so many runs counts")
    options = parser.parse_args()
    measure(RULES[0], 1_000)  # imports and caches
    rows = {r.name: {n: min(measure(r, n) for _ in range(options.repeat)) for n in options.sizes} for r in RULES}
    result = {
        name: {
            "seconds": {str(n): round(s, 3) for n, s in times.items()},
            "us_per_node": {str(n): round(1e6 * s / n, 2) for n, s in times.items()},
            "ratio": round((times[options.sizes[-1]] / options.sizes[-1]) / (times[options.sizes[-2]] / options.sizes[-2]), 3),
        }
        for name, times in rows.items()
    }
    json.dump(result, sys.stdout)
    print("\n" + f"{'variant':10} " + " ".join(f"{n:>12}" for n in options.sizes) + "   us per node, last: largest to the one before")
    for name, r in result.items():
        print(f"{name:10} " + " ".join(f"{v:12.2f}" for v in r["us_per_node"].values()) + f"   x{r['ratio']}")


if __name__ == "__main__":
    main()
