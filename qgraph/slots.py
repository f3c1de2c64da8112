"""Where a call takes what an interface names: arguments of the same call with another weight, bias or padding.

A pass that changes constants reuses the call it found, whatever its dialect: `rw.call(node.target, *args, **kwargs)` with the
arguments that `with_operands` gives. A dialect adds its targets through `takes`, beside `implements`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qgraph.views import key, operands

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

SLOTS: dict[Any, dict[str, str | int]] = {}
"""target key -> role -> schema name (OpOverload) or input position (ONNX)."""


def takes(*targets: Any, **slots: str | int) -> None:
    """These targets take the role `weight` at ..., `bias` at ..., `x` at ..."""
    for target in targets:
        SLOTS[key(target)] = slots


def with_operands(node: Node, **roles: Any) -> Arguments | None:
    """(args, kwargs) of the call with these operands in place of its own; None when the target has no place for one.

    Roles are field names of the node's interface: x, weight, bias, and padding as ((begin, end), ...)."""
    slots = SLOTS.get(key(node.target), {})
    if not roles.keys() <= slots.keys():
        return None
    placed = {slots[role]: value for role, value in roles.items() if role != "padding"}
    build = _onnx if hasattr(node.target, "op_type") else _aten
    return build(node, placed, roles.get("padding"))


def _onnx(node: Node, placed: dict[Any, Any], padding: tuple[tuple[int, int], ...] | None) -> Arguments:
    args = list(node.args) + [None] * (max(placed, default=-1) + 1 - len(node.args))
    for position, value in placed.items():
        args[position] = value
    kwargs = dict(node.kwargs)
    if padding is not None:
        kwargs.pop("auto_pad", None)
        kwargs["pads"] = [begin for begin, _ in padding] + [end for _, end in padding]
    return tuple(args), kwargs


def _aten(node: Node, placed: dict[Any, Any], padding: tuple[tuple[int, int], ...] | None) -> Arguments | None:
    values: dict[str, Any] = operands(node) | placed
    if padding is not None:
        if isinstance(values["padding"], str) or any(begin != end for begin, end in padding):
            return None  # one number per axis
        values["padding"] = [begin for begin, _ in padding]
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    args = [values[a.name] for a in schema if not a.kwarg_only]
    defaults = [a.default_value if a.has_default_value() else ... for a in schema if not a.kwarg_only]
    while args and args[-1] is defaults[-1]:  # spelled as short as before: None and small defaults are not written out
        args.pop(), defaults.pop()
    return tuple(args), {a.name: values[a.name] for a in schema if a.kwarg_only and values[a.name] != a.default_value}


aten = torch.ops.aten

takes("::Conv", "::ConvTranspose", x=0, weight=1, bias=2, padding="pads")
takes("::Gemm", x=0, weight=1, bias=2)
takes("::MatMul", x=0, weight=1)
takes(
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.convolution.default),
    x="input",
    weight="weight",
    bias="bias",
    padding="padding",
)
takes(aten.linear.default, x="input", weight="weight", bias="bias")
takes(aten.addmm.default, x="mat1", weight="mat2", bias="self")
takes(aten.mm.default, aten.bmm.default, x="self", weight="mat2")
takes(aten.matmul.default, x="self", weight="other")
takes(aten.layer_norm.default, aten.group_norm.default, x="input", weight="weight", bias="bias")
takes(aten.rms_norm.default, x="input", weight="weight")
takes(aten.instance_norm.default, aten.batch_norm.default, x="input", weight="weight", bias="bias")
takes("::LayerNormalization", "::GroupNormalization", "::InstanceNormalization", "::BatchNormalization", x=0, weight=1, bias=2)
takes("::RMSNormalization", "::SimplifiedLayerNormalization", "com.microsoft::SimplifiedLayerNormalization", x=0, weight=1)
