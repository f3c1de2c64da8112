"""What `qgraph quantize` says of a model that it has written: sizes, what is in integers, which kernels came out, what
stayed float and why, what stages refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qgraph.backend import Kernel
from qgraph.inspect import file_bytes
from qgraph.ledger import State
from qgraph.onnx_read import read_model
from qgraph.saturation import covered

ROWS = 10
"""Decisions for float, and refusals, that the text lists; the plain values have them all."""


def report(source: str, output: Path, found: State, kernels: list[Kernel]) -> dict[str, Any]:
    """Plain values for --json."""
    ledger, searched = found.ledger, found.tradeoff
    return {
        "output": str(output),
        "recipe": found.recipe.name if found.recipe else "float",
        "bytes": _bytes(output),
        "source_bytes": _bytes(Path(source)) if Path(source).is_file() else None,
        **ledger.summary(),
        "sums": covered(ledger),
        "kernels_promised": len(kernels),
        "kernels_fused": sum(k.fused for k in kernels),
        "unfused": [{"node": k.node, "promised": k.promised, "became": k.became, "reason": k.reason} for k in kernels if not k.fused],
        "float": [{"node": e.node, "role": e.role, "reason": e.reason} for e in ledger if not e.quantized and e.role != "bias"],
        "declined": [{"by": d.rule, "node": d.path, "reason": d.reason} for d in found.declines],
        **({"tradeoff": searched.as_json()} if searched else {}),
    }


def _bytes(path: Path) -> int:
    """With the external data of the model."""
    return file_bytes(path, read_model(path))


def report_text(made: dict[str, Any]) -> str:
    """What `report` has made, for people."""
    mb, was = made["bytes"] / 1e6, made["source_bytes"]
    lines = [
        f"{made['output']}: {mb:.2f} MB{f' (was {was / 1e6:.2f} MB)' if was else ''}, recipe {made['recipe']}",
        f"  weights      {made['weights_quantized']} of {made['weights']} quantized",
        f"  activations  {made['activations_quantized']} of {made['activations']} edges quantized",
        f"  kernels      {made['kernels_fused']} of {made['kernels_promised']} fused",
    ]
    lines += [f"  unfused      {k['node']}: promised {k['promised']}, became {k['became']}: {k['reason']}" for k in made["unfused"]]
    if made["sums"]:
        lines.append(f"  sums         {made['sums']}")
    lines += _rows("float", [f"{e['node']}.{e['role']}: {e['reason']}" for e in made["float"]])
    lines += _rows("declined", [f"{d['by']} at {d['node']}: {d['reason']}" for d in made["declined"]])
    return "\n".join(lines)


def _rows(title: str, found: list[str]) -> list[str]:
    more = [f"... {len(found) - ROWS} more (--json lists all)"] if len(found) > ROWS else []
    return [f"  {title:12} {row}" for row in found[:ROWS] + more]
