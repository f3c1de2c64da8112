"""Names of what goes in and out of a captured module: inputs and outputs from their structure, dimensions from `dynamic_shapes`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree


def input_names(
    placeholders: Sequence[Node], inputs: tuple[tuple[Any, ...], dict[str, Any]], signature: inspect.Signature | None
) -> tuple[str, ...]:
    """The parameters' names; what one of them nests is named by the path that leads to it, "past.0.key".

    Without a signature, and for what *args and **kwargs take, the names are the placeholders' own."""
    names = [str(node.target) for node in placeholders]
    if signature is not None:
        args, kwargs = inputs
        bound = signature.bind(*args, **kwargs).arguments
        plain = {n for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        paths = [path for path, _ in pytree.tree_flatten_with_path(dict(bound))[0]]
        if len(paths) == len(names):
            names = [
                _path_name(path) if len(path) > 1 and _path_name(path[:1]) in plain else name
                for path, name in zip(paths, names, strict=True)
            ]
    return tuple(names)


def output_names(gm: GraphModule, taken: tuple[str, ...]) -> tuple[str, ...]:
    """One name per flat output: the path of keys, fields and positions that leads to it ("logits", "hidden_states.2").

    A single output is "output", members of a bare tuple are "output_0", ...; a name that is in `taken` gets "_out" appended."""
    spec = getattr(gm, "_out_spec", None)
    values = gm.graph.output_node().args[0]
    n = len(values) if isinstance(values, tuple | list) else 1
    if spec is None:
        paths: list[tuple[Any, ...]] = [(pytree.SequenceKey(i),) for i in range(n)] if isinstance(values, tuple | list) else [()]
    else:
        paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(n)), spec))[0]]
    names = [_path_name(path) for path in paths]
    return tuple(f"{name}_out" if name in taken else name for name in names)


def _path_name(path: Sequence[Any]) -> str:
    words = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", "")))) for p in path]
    if not words:
        return "output"
    return ".".join(words) if not isinstance(path[0], pytree.SequenceKey) else "_".join(["output", *words])


def register_output_types(value: Any) -> bool:
    """Makes dataclasses in `value` known to torch.export; False when there are none that it does not know yet."""
    found = {type(leaf) for leaf in pytree.tree_leaves(value) if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
    for cls in found:
        torch.export.register_dataclass(cls)
    return bool(found)


def dim_names(
    placeholders: Sequence[Node], inputs: tuple[tuple[Any, ...], dict[str, Any]], dynamic_shapes: Any, signature: inspect.Signature | None
) -> dict[str, str]:
    """Symbol in the types ("s77") -> the name it was given by torch.export.Dim ("batch"), or "input_dim0" for one without."""
    specs = _leaf_specs(inputs, dynamic_shapes, signature)
    if len(specs) != len(placeholders):
        specs = [None] * len(placeholders)
    names: dict[str, str] = {}
    for node, spec in zip(placeholders, specs, strict=True):
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and str(size).isidentifier():
                given = _given(spec, axis)
                if given is not None or str(size) not in names:
                    names[str(size)] = given or f"{node.target}_dim{axis}"
    return names


def _given(spec: Any, axis: int) -> str | None:
    dim = spec.get(axis) if isinstance(spec, dict) else spec[axis] if isinstance(spec, tuple | list) and axis < len(spec) else None
    return dim if isinstance(dim, str) else getattr(dim, "__name__", None)


def _leaf_specs(inputs: tuple[tuple[Any, ...], dict[str, Any]], dynamic_shapes: Any, signature: inspect.Signature | None) -> list[Any]:
    """The part of `dynamic_shapes` that belongs to each flat input, in the order of the placeholders."""
    args, kwargs = inputs
    if isinstance(dynamic_shapes, tuple | list):
        return _walk([*args, *kwargs.values()], list(dynamic_shapes))
    if not isinstance(dynamic_shapes, dict) or signature is None:
        return []
    bound = signature.bind(*args, **kwargs).arguments
    return [leaf for name, value in bound.items() for leaf in _walk(value, dynamic_shapes.get(name))]


def _walk(value: Any, spec: Any) -> list[Any]:
    if spec is None or isinstance(value, torch.Tensor):
        return [spec] * len(pytree.tree_leaves(value))
    children = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)[0]
    specs = [spec.get(k) for k in value] if isinstance(value, dict) and isinstance(spec, dict) else list(spec)
    return [leaf for child, s in zip(children, specs, strict=False) for leaf in _walk(child, s)]
