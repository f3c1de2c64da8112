"""A user's batch -> one checked tensor per placeholder, in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qgraph.errors import CalibrationError, nearest
from qgraph.ledger import State
from qgraph.types import TensorType, type_of
from qgraph.views import Embedding, view


@dataclass(frozen=True)
class Input:
    """One graph input: the name that users know, the placeholder's own, and its type (None: not a tensor, or unknown).

    `limit`: rows of the smallest table that is read at these indices, None where there is no table."""

    name: str
    placeholder: str
    type: TensorType | None
    limit: int | None = None


def inputs_of(gm: GraphModule) -> tuple[Input, ...]:
    """The graph's inputs in order, under the names of its State."""
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    state = gm.meta.get("qgraph")
    names = state.input_names if isinstance(state, State) else ()
    if len(names) != len(nodes):
        names = tuple(str(n.target) for n in nodes)
    return tuple(Input(name, str(node.target), type_of(node), _rows(node)) for name, node in zip(names, nodes, strict=True))


def of_argument(argument: Any) -> Input:
    """An input or output of an ONNX Runtime session; its type "tensor(float16)" is float16."""
    name = argument.type.removeprefix("tensor(").removesuffix(")")
    kind = {"float": "float32", "double": "float64"}.get(name, name)
    return Input(argument.name, argument.name, TensorType(kind, tuple(argument.shape)))


def _rows(indices: Node) -> int | None:
    found = [type_of(v.weight) for user in indices.users if (v := view(Embedding, user)) is not None and v.indices is indices]
    return min((t.shape[0] for t in found if t is not None and t.shape and isinstance(t.shape[0], int)), default=None)


def arrange(feed: Any, inputs: Sequence[Input], *, where: str) -> list[Any]:
    """The feed's values in the order of `inputs`, each checked and converted to a torch tensor.

    `feed` is a dict by input name, a tuple or list in order, or the only value itself; values are torch tensors or arrays. What the
    tuple nests (the lists and dicts that a torch module takes) is flattened, as the capture did.
    The element type must be the input's, or another of its kind (float, integer) in which the values are exactly representable:
    float64 data that was float32, int32 token ids for an int64 input. Rank and fixed dimensions must match.
    Raises CalibrationError naming the input and `where` ("batch 3").
    """
    values = _by_name(feed, inputs, where) if isinstance(feed, Mapping) else _in_order(feed, inputs, where)
    return [_checked(value, i, where) for value, i in zip(values, inputs, strict=True)]


def _by_name(feed: Mapping[Any, Any], inputs: Sequence[Input], where: str) -> list[Any]:
    known = {i.name: i.name for i in inputs} | {i.placeholder: i.name for i in inputs if i.placeholder not in {j.name for j in inputs}}
    named = {}
    for name, value in feed.items():
        if name not in known:
            raise CalibrationError(f"{where} has an array {str(name)!r}, but the model has no such input{nearest(str(name), known)}")
        named[known[name]] = value
    if missing := [i.name for i in inputs if i.name not in named]:
        raise CalibrationError(f"{where} lacks the model's input {missing[0]!r}; it has: {', '.join(map(str, feed)) or 'nothing'}")
    return [named[i.name] for i in inputs]


def _in_order(feed: Any, inputs: Sequence[Input], where: str) -> list[Any]:
    values = pytree.tree_leaves(list(feed) if isinstance(feed, tuple | list) else [feed])
    if len(values) != len(inputs):
        names = ", ".join(i.name for i in inputs)
        raise CalibrationError(f"{where} has {len(values)} values, but the model has {len(inputs)} inputs: {names}")
    return values


def _checked(value: Any, i: Input, where: str) -> Any:
    known = i.type
    if known is None or known.dtype == "string":
        return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value
    who = f"{where}: input {i.name!r}"
    x = _tensor(value, known, who)
    if known.shape is not None:
        fits = len(x.shape) == len(known.shape) and all(
            not isinstance(d, int) or d < 0 or d == n for d, n in zip(known.shape, x.shape, strict=True)
        )
        if not fits:
            raise CalibrationError(f"{who} has shape {list(x.shape)}, the model takes {known}{_shape_hint(x, known)}")
    if known.dtype is not None:
        x = _convert(x, known.dtype, who)
    if i.limit is not None and x.numel() and int(x.max()) >= i.limit:
        raise CalibrationError(f"{who} holds index {int(x.max())}, but the table that it is read from has {i.limit} rows")
    if x.is_floating_point() and math.isnan(x.sum()) and bool(x.isnan().any()):
        raise CalibrationError(f"{who} contains NaN ({int(x.isnan().sum())} of {x.numel()} elements)")
    return x


def _tensor(value: Any, known: TensorType, who: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.asarray(value)
    except ValueError as e:
        raise CalibrationError(f"{who} is not an array: {e}") from e
    if known.dtype == "bfloat16" and array.dtype.itemsize == 2 and (array.dtype.kind == "V" or array.dtype.name == "bfloat16"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiub":
        raise CalibrationError(f"{who} has type {array.dtype}, the model takes {known}")
    # Byte order and strides that torch does not take, and memory that must not be written to.
    array = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _convert(x: Tensor, dtype: str, who: str) -> Tensor:
    want = getattr(torch, dtype, None)
    if not isinstance(want, torch.dtype) or x.dtype == want:
        return x
    given = str(x.dtype).removeprefix("torch.")
    kind = (x.is_floating_point(), x.dtype == torch.bool, x.is_complex())
    if kind != (want.is_floating_point, want == torch.bool, want.is_complex):
        raise CalibrationError(f"{who} has type {given}, the model takes {dtype}; convert the calibration data")
    y = x.to(want)
    back = y.to(x.dtype)
    if not bool(((back == x) | x.isnan()).all()):
        raise CalibrationError(
            f"{who} has type {given}, the model takes {dtype}, and the values do not survive the conversion; convert them"
        )
    return y


def _shape_hint(x: Tensor, known: TensorType) -> str:
    if known.rank is not None and x.dim() + 1 == known.rank:
        return "; add the batch axis"
    if known.rank == x.dim() and known.shape is not None and isinstance(known.shape[0], int) and known.shape[1:] == tuple(x.shape[1:]):
        return "; feed batches of that size, or capture the model with a dynamic batch axis"
    return ""
