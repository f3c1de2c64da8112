"""ONNX nodes that move, select or pad elements, seen through the interfaces of qgraph.views (the rest: onnx_views)."""

from __future__ import annotations

from torch.fx import Node

from qgraph.onnx_node import arg, attr, const_ints, op_type, rank, scalar, single, version
from qgraph.views import (
    DataMovement,
    Dequantize,
    Embedding,
    FakeLookup,
    FakeQuantize,
    Lookup,
    Pad,
    Quantize,
    Size,
    const_value,
    implements,
    is_const,
    view_any,
)

_KINDS = {
    "Reshape": "reshape",
    "Slice": "slice",
    "GatherElements": "gather",
    "GatherND": "gather",
    "Squeeze": "squeeze",
    "Unsqueeze": "unsqueeze",
    "Flatten": "flatten",
    "Expand": "expand",
    "Split": "split",
    "Tile": "tile",
    "Identity": "copy",
    "DepthToSpace": "depth_to_space",
    "SpaceToDepth": "space_to_depth",
}


@implements(DataMovement, *("::" + name for name in _KINDS))
def movement(node: Node) -> DataMovement:
    return DataMovement(_KINDS[op_type(node)], arg(node, 0))


@implements(Size, "::Shape", "::Size")
def size(node: Node) -> Size:
    return Size(arg(node, 0))


@implements(DataMovement, "::Transpose")
def transpose(node: Node) -> DataMovement:
    dims = rank(arg(node, 0))
    reverse = None if dims is None else tuple(reversed(range(dims)))
    return DataMovement("transpose", arg(node, 0), tuple(attr(node, "perm")) if "perm" in node.kwargs else reverse)


def is_inference_dropout(node: Node) -> bool:
    """`is_test` up to opset 6, no `training_mode` but a constant false one from 12."""
    if version(node) < 7:
        return bool(attr(node, "is_test", 0))
    return arg(node, 2) is None or scalar(const_value(arg(node, 2))) == 0


@implements(DataMovement, "::Dropout")
def dropout(node: Node) -> DataMovement | None:
    """Inference form with one output."""
    return DataMovement("copy", arg(node, 0)) if single(node) and is_inference_dropout(node) else None


@implements(DataMovement, "::Resize", "::Upsample")
def resize(node: Node) -> DataMovement | None:
    """Nearest neighbour selects elements; cropping may put in a value of its own, other modes interpolate."""
    crops = attr(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return DataMovement("gather", arg(node, 0)) if attr(node, "mode", "nearest") == "nearest" and not crops else None


def _table(node: object) -> Node | None:
    """The constant behind an embedding's weight: the node itself, or what is behind quantize, dequantize or an observer."""
    while isinstance(node, Node) and not is_const(node):
        if node.op == "call_module":
            node = arg(node, 0)
            continue
        match view_any((Dequantize, Quantize, FakeQuantize, Lookup, FakeLookup), node):
            case Dequantize(q=inner) | Lookup(q=inner) | Quantize(x=inner) | FakeQuantize(x=inner) | FakeLookup(x=inner):
                node = inner
            case _:
                return None
    return node if isinstance(node, Node) else None


@implements(Embedding, "::Gather")
def embedding(node: Node) -> Embedding | None:
    weight, indices = arg(node, 0), arg(node, 1)
    return Embedding(weight, indices) if attr(node, "axis", 0) in (0, -2) and rank(_table(weight)) == 2 else None


@implements(DataMovement, "::Gather")
def gather(node: Node) -> DataMovement | None:
    return None if embedding(node) else DataMovement("gather", arg(node, 0))


def _pads(node: Node) -> tuple[tuple[int, int], ...] | None:
    pads = const_ints(node, 1, "paddings" if version(node) < 2 else "pads")
    if pads is None:
        return None
    half = len(pads) // 2
    pairs = tuple(zip(pads[:half], pads[half:], strict=True))
    if arg(node, 3) is None:
        return pairs
    axes, dims = const_ints(node, 3, "axes"), rank(arg(node, 0))  # opset 18: the other axes are not padded
    if axes is None or dims is None:
        return None
    chosen = {axis % dims: pair for axis, pair in zip(axes, pairs, strict=True)}
    return tuple(chosen.get(axis, (0, 0)) for axis in range(dims))


@implements(Pad, "::Pad")
def pad(node: Node) -> Pad | None:
    """Constant mode; the value is an attribute up to opset 10, then an optional constant input."""
    if attr(node, "mode", "constant") != "constant":
        return None
    value = attr(node, "value", 0.0) if arg(node, 2) is None else scalar(const_value(arg(node, 2)))
    return None if value is None else Pad(arg(node, 0), _pads(node), value)


@implements(DataMovement, "::Pad")
def pad_by_copies(node: Node) -> DataMovement | None:
    """Reflect, edge and wrap repeat elements of x."""
    return DataMovement("gather", arg(node, 0)) if attr(node, "mode", "constant") != "constant" else None
