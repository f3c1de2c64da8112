"""Methods x bits on a language model: perplexity relative to float, as the papers' tables, from one protocol.

    python -m tests.bench.llm [--bits W4g32 W3g32 ...] [--methods RTN GPTQ ...] [--windows 80] [--json FILE] [--markdown]

SmolLM2-135M (see tests/models/smollm2.py), 48 windows of 256 tokens to calibrate, 80 others to measure. Linears alone are quantized, in
groups of symmetric integers; the table of embeddings, which is the last weight, too, stays in float. Each cell is quantized in a process of
its own from the torch module; perplexity is that of the reference program. Other tools take part where they are installed (llm_peers.py):
their weights are read back and run in the float module."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import qgraph
from examples.demo import machine
from qgraph.edit import add_constant
from qgraph.perplexity import perplexity
from qgraph.recipe import from_dict, named
from qgraph.types import attribute
from qgraph.views import Dequantize, Lookup, view_any
from tests.bench.llm_peers import PEERS, with_weights
from tests.models import smollm2

BITS = {f"W{bits}g{group}": f"w{bits}a16-g{group}-sym" for bits, group in ((4, 128), (4, 64), (4, 32), (3, 32), (2, 32))}

METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"weight_range": "minmax"},
    "searched scales": {},
    "HQQ": {"weight_range": "hqq"},
    "AWQ": {"stages": ["awq"]},
    "GPTQ": {"stages": [{"gptq": {"feedback": 0.0}}]},
    "GPTQ, scales of HQQ": {"weight_range": "hqq", "stages": [{"gptq": {"feedback": 0.0, "scales": "keep"}}]},
    "AWQ, GPTQ": {"stages": ["awq", {"gptq": {"feedback": 0.0}}]},
    "GPTQ with feedback": {"stages": ["gptq"]},
    "AWQ, GPTQ with feedback": {"stages": ["awq", "gptq"]},
}
"""Name -> fields of the recipe beside its scheme."""


def quantized(module: torch.nn.Module, recipe: qgraph.Recipe) -> torch.fx.GraphModule:
    calibration, _ = smollm2.windows()
    batches = [(torch.from_numpy(window[None]),) for window in calibration]
    shapes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=2, max=2048)},)
    return qgraph.quantize(
        module, batches, example_inputs=(torch.from_numpy(calibration[:2]),), recipe=recipe, dynamic_shapes=shapes, backend="reference"
    )


def with_float_weights(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Weights dequantized once instead of for each window."""
    for node in list(graph.graph.nodes):
        if view_any((Dequantize, Lookup), node) is not None and all(i.op == "get_attr" for i in node.all_input_nodes):
            value = node.target(*(attribute(a) if isinstance(a, torch.fx.Node) else a for a in node.args))
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(add_constant(graph, node.name, value)))
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def worker(method: str, bits: str, windows: int) -> dict[str, float]:
    """One cell; runs in a child. The perplexity, seconds to quantize with the capture of the model, and peak resident memory in MB."""
    scheme = named(BITS[bits])
    lm, evaluation = smollm2.causal_lm(), smollm2.windows()[1][:windows]
    quantize = peer(method) if method in PEERS else ours(method)
    start = perf_counter()
    result = quantize(lm, scheme)
    seconds, peak = perf_counter() - start, _peak()
    return {"perplexity": perplexity(result(), evaluation).value, "seconds": seconds, "memory_mb": peak / 1e6}


Quantize = Callable[[Any, qgraph.Recipe], Callable[[], torch.nn.Module]]
"""(the transformers model, the scheme) -> what makes of the result the module to evaluate, which is no part of the cost."""


def ours(method: str) -> Quantize:
    def quantize(lm: Any, scheme: qgraph.Recipe) -> Callable[[], torch.nn.Module]:
        graph = quantized(smollm2.LogitsOnly(lm), from_dict({"embeddings": None, **METHODS[method]}, base=scheme))
        return lambda: with_float_weights(graph)

    return quantize


def peer(method: str) -> Quantize:
    tool = PEERS[method].load()

    def quantize(lm: Any, scheme: qgraph.Recipe) -> Callable[[], torch.nn.Module]:
        form = scheme.weights
        assert form is not None and form.group is not None
        bits, group = form.bits, form.group
        weights = tool(lm, bits, group)
        return lambda: with_weights(weights(), bits, group)

    return quantize


def _peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def show(cells: dict[str, dict[str, dict[str, float]]], reference: float, markdown: bool) -> None:
    bits = list(dict.fromkeys(b for row in cells.values() for b in row))
    rows = []
    for method, row in cells.items():
        ratios = [f"{row[b]['perplexity'] / reference:.3f}" if b in row else "" for b in bits]
        rows.append((method, *ratios, f"{max(c['seconds'] for c in row.values()):.0f}", f"{max(c['memory_mb'] for c in row.values()):.0f}"))
    columns = ("method", *bits, "seconds", "memory MB")
    caption = f"perplexity / float ({reference:.3f}); {machine()}"
    if markdown:
        print(f"{caption}\n", *(f"| {' | '.join(r)} |" for r in (columns, ("---",) * len(columns), *rows)), sep="\n")
        return
    table = Table(*columns, caption=caption)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *PEERS], default=[*METHODS, *PEERS])
    parser.add_argument("--windows", type=int, default=smollm2.EVALUATION)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(*args.worker, args.windows)))
        return
    reference = perplexity(smollm2.LogitsOnly(smollm2.causal_lm()), smollm2.windows()[1][: args.windows]).value
    cells: dict[str, dict[str, dict[str, float]]] = {}
    for method in args.methods:
        if method in PEERS and not PEERS[method].installed:
            print(f"{method} is left out: {PEERS[method].package} is not installed", file=sys.stderr)
            continue
        for bits in args.bits:
            child = [sys.executable, "-m", "tests.bench.llm", "--windows", str(args.windows), "--worker", method, bits]
            result = subprocess.run(child, check=False, capture_output=True, text=True)
            if result.returncode:
                print(f"{method}, {bits} failed: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            cells.setdefault(method, {})[bits] = json.loads(result.stdout.splitlines()[-1])
            print(f"{method}, {bits}: {cells[method][bits]}", file=sys.stderr, flush=True)
    show(cells, reference, args.markdown)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "float": reference, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
