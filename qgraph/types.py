"""Value types: TensorType (what flows along an edge) and QSpec (how it is represented in few bits)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

Dim = int | str | None
"""A dimension: a number, a symbol's name, or unknown."""


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of a value; `shape` is None when not even the rank is known.

    `dtype` is torch's name of the element type ("float32", "int64"), or ONNX's lower-case one where torch
    has none ("string", "int4", "float4e2m1").
    """

    dtype: str | None
    shape: tuple[Dim, ...] | None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype in {"float16", "bfloat16", "float32", "float64"}

    def __str__(self) -> str:
        dims = "..." if self.shape is None else ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{_SHORT.get(self.dtype or '', self.dtype or '?')}[{dims}]"


_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "bool": "bool"} | {
    f"{long}{b}": f"{short}{b}" for long, short in (("int", "i"), ("uint", "u")) for b in (2, 4, 8, 16, 32, 64)
}


def _tensor_type(value: Any) -> TensorType | None:
    if isinstance(value, torch.Tensor):
        dims = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
        return TensorType(str(value.dtype).removeprefix("torch."), dims)
    return value if isinstance(value, TensorType) else None


def attribute(node: Node) -> Any:
    """What a get_attr node reads: a tensor, a nested GraphModule, or an onnx_ir tensor of a type that torch lacks."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def type_of(node: Node) -> TensorType | None:
    """The node's tensor type from `meta["type"]` (ONNX dialect, set by rewrites), `meta["val"]` (torch's fake tensor) or the
    constant that it reads; None for values that are not one tensor, or unknown."""
    found = _tensor_type(node.meta.get("type"))
    if found is None:
        found = _tensor_type(node.meta.get("val"))
    if found is None and node.op == "get_attr" and node.graph.owning_module is not None:
        found = _tensor_type(attribute(node))
    return found


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor; scale shape ()."""


@dataclass(frozen=True)
class PerAxis:
    """One scale per index of `axis`; scale shape (n,)."""

    axis: int


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` neighbours along `axis` (the last group may be short); scale has the tensor's rank,
    with ceil(n / size) entries along `axis`."""

    axis: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"group size must be at least 1, got {self.size}")


@dataclass(frozen=True)
class PerToken:
    """One scale per row of the last axis, always dynamic; scale shape (..., 1)."""


Granularity = PerTensor | PerAxis | PerGroup | PerToken

_DTYPE = re.compile(r"(u?)int(\d+)")


@dataclass(frozen=True)
class QSpec:
    """Numbers only: integer type, zero point policy, granularity, and whether scales come from the data at run time.

    `dtype` is "int2" .. "int16" or "uint2" .. "uint16". Symmetric means that the zero point is the middle of the
    type (0, or 2**(bits-1) for unsigned) and that the range is +-(2**(bits-1) - 1) around it. With a `codebook`, the name of a table of
    levels (see codebook.py), the integers are codes, "uint2" .. "uint6": the value is table[code], times the scale.
    Raises ValueError for a combination that has no meaning.
    """

    dtype: str = "int8"
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    dynamic: bool = False
    codebook: str | None = None

    def __post_init__(self) -> None:
        m = _DTYPE.fullmatch(self.dtype)
        if not m or not 2 <= int(m[2]) <= 16:
            raise ValueError(f"QSpec dtype must be int2..int16 or uint2..uint16, got {self.dtype!r}")
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise ValueError("per-token scales exist only at run time: QSpec(granularity=PerToken(), dynamic=True)")
        if self.dynamic and isinstance(self.granularity, PerAxis):
            raise ValueError("dynamic scales are per tensor, per token or per group, not per axis")
        if self.codebook is not None and (self.signed or self.bits > 6 or not self.symmetric or self.dynamic):
            raise ValueError(f"codes of a codebook are symmetric uint2 to uint6, and never dynamic, got {self.dtype!r}")

    @property
    def bits(self) -> int:
        return int(self.dtype.removeprefix("u").removeprefix("int"))

    @property
    def signed(self) -> bool:
        return not self.dtype.startswith("u")

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer of the type: int8 -> (-128, 127)."""
        return int_range(self.dtype)

    @property
    def axis(self) -> int | None:
        """The `axis` argument of the qg ops (see qgraph.ops): None for per tensor."""
        match self.granularity:
            case PerAxis(axis) | PerGroup(axis, _):
                return axis
            case PerToken():
                return -1
        return None

    @property
    def group(self) -> int:
        """The `group` argument of the qg ops: 0 = whole slices along `axis`, -1 = per token, else the group size."""
        match self.granularity:
            case PerGroup(_, size):
                return size
            case PerToken():
                return -1
        return 0

    def __str__(self) -> str:
        per = {PerTensor: "per tensor", PerToken: "per token"}.get(type(self.granularity))
        if isinstance(self.granularity, PerAxis):
            per = f"per axis {self.granularity.axis}"
        elif isinstance(self.granularity, PerGroup):
            per = f"per group of {self.granularity.size} along axis {self.granularity.axis}"
        if self.codebook is not None:
            return f"{self.codebook}{self.bits} {per}"
        return f"{self.dtype} {'sym' if self.symmetric else 'asym'} {per}{' dynamic' if self.dynamic else ''}"


def int_range(dtype: str) -> tuple[int, int]:
    """("int4") -> (-8, 7); ("uint4") -> (0, 15)."""
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def storage(dtype: str) -> torch.dtype:
    """The torch type that holds one value per element of the integer type `dtype` in the reference."""
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    if dtype.startswith("u"):
        return torch.uint8 if bits <= 8 else torch.uint16
    return torch.int8 if bits <= 8 else torch.int16
