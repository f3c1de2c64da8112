"""What ONNX's versions changed: (operator, version) -> the rewrite of a node in place. Source: ONNX's Changelog.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from qgraph.edit import add_constant
from qgraph.onnx_ops import OnnxOp, op
from qgraph.types import TensorType, type_of


class Refusal(Exception):
    """Why a node cannot be carried over."""


class Edit:
    """One node under change."""

    def __init__(self, gm: GraphModule, node: Node) -> None:
        self.gm, self.node = gm, node

    @property
    def target(self) -> OnnxOp:
        assert isinstance(self.node.target, OnnxOp)
        return self.node.target

    def names(self) -> set[str]:
        return set(self.node.kwargs) | {name for name, _ in self.target.fixed}

    def take(self, name: str, default: Any = None) -> Any:
        """Removes an attribute and returns its value."""
        if name in self.target.references:
            raise Refusal(f"attribute {name!r} comes from a function's caller")
        kwargs = dict(self.node.kwargs)
        found = kwargs.pop(name, default)
        self.node.kwargs = kwargs
        return found

    def set(self, **attributes: Any) -> None:
        self.node.kwargs = {**self.node.kwargs, **attributes}

    def constant(self, values: Any, dtype: torch.dtype) -> Node:
        """A new constant before the node."""
        tensor = torch.tensor(values, dtype=dtype)
        name = add_constant(self.gm, f"{self.node.name}_input", tensor)
        with self.node.graph.inserting_before(self.node):
            found = self.node.graph.get_attr(name)
        found.meta["type"] = TensorType(str(dtype).removeprefix("torch."), tuple(tensor.shape))
        return found

    def inputs(self, *more: Node | None) -> None:
        """Appends inputs after the first one; absent ones at the end are left out."""
        found = [self.node.args[0], *more]
        while found[-1] is None:
            found.pop()
        self.node.args = tuple(found)

    def float_type(self) -> torch.dtype:
        known = type_of(self.node.args[0]) if isinstance(self.node.args[0], Node) else None
        if known is None or known.dtype is None:
            raise Refusal("the element type of its input is not known")
        found: torch.dtype = getattr(torch, known.dtype)
        return found


def at_version(target: OnnxOp, version: int) -> OnnxOp:
    return op(
        target.op_type, domain=target.domain, version=version, fixed=target.fixed, outputs=target.outputs, overload=target.overload
    )  # fmt: skip


ADAPTERS: dict[tuple[str, int], Callable[[Edit], None]] = {}
"""(operator, version that changed it) -> rewrite of the node in place."""


def changed(version: int, *op_types: str) -> Callable[[Callable[[Edit], None]], Callable[[Edit], None]]:
    def register(fn: Callable[[Edit], None]) -> Callable[[Edit], None]:
        for op_type in op_types:
            ADAPTERS[op_type, version] = fn
        return fn

    return register


@changed(13, "Squeeze", "Unsqueeze", "ReduceSum")
@changed(18, *(f"Reduce{n}" for n in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")))
def _axes_to_input(edit: Edit) -> None:
    axes = edit.take("axes")
    if axes is not None:
        edit.inputs(edit.constant(list(axes), torch.int64))


@changed(13, "Split")
def _split_to_input(edit: Edit) -> None:
    sizes = edit.take("split")
    if sizes is not None:
        edit.inputs(edit.constant(list(sizes), torch.int64))


@changed(18, "Split")
def _split_count(edit: Edit) -> None:
    if len(edit.node.args) < 2 or edit.node.args[1] is None:
        edit.set(num_outputs=edit.target.outputs)


@changed(5, "Reshape")
def _shape_to_input(edit: Edit) -> None:
    edit.inputs(edit.constant(list(edit.take("shape")), torch.int64))


@changed(10, "Slice")
def _slice_to_inputs(edit: Edit) -> None:
    starts, ends, axes = edit.take("starts"), edit.take("ends"), edit.take("axes")
    along = None if axes is None else edit.constant(list(axes), torch.int64)
    edit.inputs(edit.constant(list(starts), torch.int64), edit.constant(list(ends), torch.int64), along)


@changed(10, "TopK")
def _count_to_input(edit: Edit) -> None:
    edit.inputs(edit.constant([edit.take("k")], torch.int64))


@changed(11, "Clip")
def _limits_to_inputs(edit: Edit) -> None:
    limits = [edit.take("min"), edit.take("max")]
    edit.inputs(*(None if v is None else edit.constant(v, edit.float_type()) for v in limits))


@changed(2, "Pad")
def _rename_paddings(edit: Edit) -> None:
    edit.set(pads=edit.take("paddings"))


@changed(11, "Pad")
def _pads_to_inputs(edit: Edit) -> None:
    pads, value = edit.take("pads"), edit.take("value", 0.0)
    edit.inputs(edit.constant(list(pads), torch.int64), edit.constant(value, edit.float_type()) if value else None)


@changed(12, "Dropout")
def _drop_ratio(edit: Edit) -> None:
    # Dropout without the input `training_mode` is the identity, so its ratio has no effect.
    edit.take("ratio")


@changed(9, "BatchNormalization")
def _drop_spatial(edit: Edit) -> None:
    if not edit.take("spatial", 1):
        raise Refusal("statistics per element (spatial=0) are gone")


@changed(14, "BatchNormalization")
def _no_statistics(edit: Edit) -> None:
    if edit.target.outputs > 1:
        raise Refusal("its training outputs changed")


@changed(13, "Softmax", "LogSoftmax", "Hardmax")
def _one_axis(edit: Edit) -> None:
    """Before 13 all axes from `axis` on were normalised together."""
    axis = edit.take("axis", 1)
    known = type_of(edit.node.args[0])  # type: ignore[arg-type]
    if axis == -1 or (known is not None and known.rank is not None and axis % known.rank == known.rank - 1):
        edit.set(axis=-1)
        return
    node, graph = edit.node, edit.node.graph
    x = node.args[0]
    with graph.inserting_before(node):
        shape = graph.call_function(op("Shape", version=13), (x,))
        flat = graph.call_function(op("Flatten", version=13), (x,), {"axis": axis})
    with graph.inserting_after(node):
        # The result keeps the value's name; the node itself now makes a matrix.
        back = graph.call_function(op("Reshape", version=13), (node, shape))
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    back.meta.update({k: node.meta.pop(k) for k in ("onnx_value", "type") if k in node.meta})
    if (source := node.meta.pop("onnx", None)) is not None:
        node.meta["name"] = source.name
    node.args = (flat,)
    edit.set(axis=-1)


@changed(10, "Upsample")
def _to_resize(edit: Edit) -> None:
    edit.node.target = at_version(_renamed(edit.target, "Resize"), 10)
    _resize_asymmetric(edit)


@changed(9, "Upsample")
def _scales_to_input(edit: Edit) -> None:
    edit.inputs(edit.constant(list(edit.take("scales")), torch.float32))


@changed(11, "Resize")
def _resize_asymmetric(edit: Edit) -> None:
    """Before 11 coordinates were scaled without an offset and rounded down."""
    x, scales = edit.node.args
    edit.node.args = (x, None, scales)
    edit.set(coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@changed(13, "Resize")
def _resize_mode(edit: Edit) -> None:
    if edit.node.kwargs.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        raise Refusal("coordinate_transformation_mode 'tf_half_pixel_for_nn' is gone")


@changed(11, "Scatter")
def _to_scatter_elements(edit: Edit) -> None:
    edit.node.target = at_version(_renamed(edit.target, "ScatterElements"), 11)


@changed(16, "RoiAlign")
def _no_half_pixel(edit: Edit) -> None:
    edit.set(coordinate_transformation_mode="output_half_pixel")


@changed(20, "GridSample")
def _grid_modes(edit: Edit) -> None:
    mode = edit.node.kwargs.get("mode", "bilinear")
    edit.set(mode={"bilinear": "linear", "bicubic": "cubic"}.get(str(mode), mode))


@changed(20, "DFT")
def _axis_to_input(edit: Edit) -> None:
    axis = edit.constant(edit.take("axis", 1), torch.int64)
    args: Sequence[Any] = edit.node.args
    edit.inputs(args[1] if len(args) > 1 else None, axis)


@changed(4, "Concat")
def _concat_axis(edit: Edit) -> None:
    if "axis" not in edit.names():
        edit.set(axis=1)


@changed(6, "Cast")
def _cast_number(edit: Edit) -> None:
    edit.set(to=int(ir.DataType[str(edit.take("to"))]))


@changed(9, "Scan")
def _scan_batch(edit: Edit) -> None:
    raise Refusal("its batch axis is gone")


@changed(21, "GroupNormalization")
def _group_scale(edit: Edit) -> None:
    raise Refusal("its scale is per channel and was per group")


def _renamed(target: OnnxOp, op_type: str) -> OnnxOp:
    return op(op_type, domain=target.domain, version=target.version, fixed=target.fixed, outputs=target.outputs)
