"""A torch module and a quantized checkpoint -> the graph of the module with the checkpoint's integers: what `convert` gives, without data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph import saturation
from qgraph.capture import capture
from qgraph.checkpoints.gguf import by_parameter
from qgraph.checkpoints.load import Checkpoint, load_checkpoint, prefixes
from qgraph.checkpoints.put import Put
from qgraph.checkpoints.tensor import QuantizedTensor, Value
from qgraph.errors import ModelError, nearest
from qgraph.ledger import state
from qgraph.passes import Canonicalize, FoldConstants, InferTypes, MergeEqual, RemoveDead, SinkConstants
from qgraph.pipeline import Context, Pass, Pipeline

Decoders = dict[str, tuple[str, Callable[[], Value]]]
"""The module's name of a parameter -> the checkpoint's name, and what reads it."""

AFTER: tuple[Pass, ...] = (InferTypes(), SinkConstants(), MergeEqual(), Canonicalize(), FoldConstants(), MergeEqual(), RemoveDead())
"""What `prepare` does to every model, but for what changes weights."""


def from_checkpoint(
    module: torch.nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Value],
    example_inputs: Any,
    *,
    dynamic_shapes: Any = None,
) -> GraphModule:
    """The quantized graph of `module` with the parameters of `checkpoint`: a path that `load_checkpoint` takes, what it returned, or a
    mapping of parameter names. Integers, scales and zero points are those of the file (put.py says how they lie in the graph); in a
    float32 module, weights with 16-bit scales are not rounded to 16 bits. The module's own parameters are neither used nor changed; it
    may hold the model under a name of its own, as wrappers do.

    Raises ModelError: a parameter is missing, has another shape, or a float type that does not hold the scales; tied parameters that
    the file has twice with different values; a quantized tensor for which the module has no place. And what `capture` raises."""
    found = checkpoint if isinstance(checkpoint, Mapping) else load_checkpoint(checkpoint)
    gm = capture(module, example_inputs, dynamic_shapes)
    known = set(module.state_dict())
    decoders = _by_parameter(found, known)
    put = Put(gm, found.format if isinstance(found, Checkpoint) else "given")
    aliases = {paths[0]: paths for paths in state(gm).tied}
    used = set()
    for node in gm.graph.find_nodes(op="get_attr"):
        if (target := str(node.target)) in known:
            paths = aliases.get(target, (target,))
            put(node, _value(paths, decoders))
            used |= {decoders[p][0] for p in paths if p in decoders}
    _check_rest(found, used, known, decoders)
    gm.graph.lint()
    gm.recompile()
    Pipeline(*AFTER).run(gm, Context())
    saturation.record(gm)
    state(gm).stage = "converted"
    return gm


def _by_parameter(found: Mapping[str, Value], known: set[str]) -> Decoders:
    """Under the module's names as they are, or without the path under which a wrapper holds the model: what matches more."""
    best: Decoders = {}
    for prefix in prefixes(known):
        inner = {name.removeprefix(prefix) for name in known}
        if isinstance(found, Checkpoint) and found.architecture is not None:
            decoders = by_parameter(found.decoders, found.architecture, sorted(inner))
        else:
            decoders = {name: (name, _reader(found, name)) for name in found if name in inner}
        if len(decoders) > len(best):
            best = {prefix + name: value for name, value in decoders.items()}
    return best


def _reader(found: Mapping[str, Value], name: str) -> Callable[[], Value]:
    return lambda: found[name]


def _value(paths: tuple[str, ...], decoders: Decoders) -> Value:
    """The one value of a parameter that the module knows under these paths."""
    stored = {name: read for p in paths if p in decoders for name, read in [decoders[p]]}
    if not stored:
        raise ModelError(f"the checkpoint has no parameter {paths[0]!r}{nearest(paths[0], decoders)}")
    (first, read), *others = stored.items()
    value = read()
    for name, again in others:
        if not _equal(value, again()):
            raise ModelError(f"the module ties {' and '.join(paths)}, but {first!r} and {name!r} differ in the checkpoint; untie them")
    return value


def _equal(a: Value, b: Value) -> bool:
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return a.equal(b)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def _check_rest(found: Mapping[str, Value], used: set[str], known: set[str], decoders: Decoders) -> None:
    """What the module has no parameter for: a quantized weight, or a bias of a layer that is used, would change results."""
    placed = {stored for stored, _ in decoders.values()}
    layers = {name.rpartition(".")[0] for name in used}
    for name in found:
        if name not in placed:
            value = found[name]
            if isinstance(value, QuantizedTensor) or (name.rpartition(".")[0] in layers and bool(value.any())):
                raise ModelError(f"the module has no parameter for {name!r} of the checkpoint{nearest(name, known)}")
