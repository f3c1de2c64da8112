"""Fast paths of arithmetic: ONNX operators in torch. A path that does not fit its operands gives way to onnx.reference.

A function `fn(op, *inputs, *, attributes)` is entered in `FAST`; it may return NotImplemented. The guard around it declines inputs
that are not tensors of a type torch computes with, and attributes that the function does not name (those of old opset versions).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.onnx_values import TORCH_DTYPES
from qgraph.parts import PART

FAST: dict[str, Callable[..., Any]] = {}

# torch stores these types but has few kernels for them.
_STORED_ONLY = {torch.uint16, torch.uint32, torch.uint64} | {t for t in TORCH_DTYPES.values() if t.is_floating_point and t.itemsize == 1}


def fast(
    *op_types: str, domain: str = "", stored: bool = False, values: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function runs operators of these types. `stored`: it moves elements of any torch type;
    `values`: it takes any value (arrays, sequences, None)."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        allowed = {p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY}

        @functools.wraps(fn)
        def guarded(op: Any, *inputs: Any, **attrs: Any) -> Any:
            fits = values or all(x is None or isinstance(x, Tensor) and (stored or x.dtype not in _STORED_ONLY) for x in inputs)
            return fn(op, *inputs, **attrs) if fits and attrs.keys() <= allowed else NotImplemented

        for op_type in op_types:
            FAST[f"{domain}::{op_type}"] = guarded
        return fn

    return register


def _unary(op_type: str, fn: Callable[[Tensor], Tensor], *, floats: bool = False) -> None:
    @fast(op_type)
    def run(op: Any, x: Tensor) -> Any:
        return NotImplemented if floats and not x.is_floating_point() else fn(x)


_POINTWISE: dict[str, Callable[..., Tensor]] = {
    "Relu": torch.relu,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sign": torch.sign,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
    "BitwiseNot": torch.bitwise_not,
}
_POINTWISE_FLOAT: dict[str, Callable[..., Tensor]] = {
    "Sigmoid": torch.sigmoid,
    "Erf": torch.erf,
    "Sqrt": torch.sqrt,
    "Exp": torch.exp,
    "Log": torch.log,
    "Reciprocal": torch.reciprocal,
    "Ceil": torch.ceil,
    "Floor": torch.floor,
    "Round": torch.round,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Tanh": torch.tanh,
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Mish": F.mish,
    "HardSwish": F.hardswish,
}
for _name, _fn in _POINTWISE.items():
    _unary(_name, _fn)
for _name, _fn in _POINTWISE_FLOAT.items():
    _unary(_name, _fn, floats=True)


def _binary(op_type: str, fn: Callable[..., Tensor]) -> None:
    @fast(op_type)
    def run(op: Any, a: Tensor, b: Tensor) -> Any:
        # Operators before opset 7 broadcast by rules of their own.
        return NotImplemented if op.version < 7 and a.shape != b.shape else fn(a, b)


_BINARY: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}
for _name, _fn in _BINARY.items():
    _binary(_name, _fn)


@fast("Div")
def div(op: Any, a: Tensor, b: Tensor) -> Any:
    if op.version < 7 and a.shape != b.shape:
        return NotImplemented
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@fast("Pow")
def power(op: Any, a: Tensor, b: Tensor) -> Any:
    return NotImplemented if op.version < 7 else torch.pow(a, b).to(a.dtype)


@fast("Mod")
def mod(op: Any, a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@fast("Min", "Max", "Sum", "Mean")
def variadic(op: Any, *xs: Tensor) -> Any:
    if len({x.shape for x in xs}) > 1 and op.version < 8:
        return NotImplemented
    step = {"Min": torch.minimum, "Max": torch.maximum}.get(op.op_type, torch.add)
    total = functools.reduce(step, xs)
    return total / len(xs) if op.op_type == "Mean" else total


@fast("Where")
def where(op: Any, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@fast("Clip")
def clip(
    op: Any, x: Tensor, low: Tensor | None = None, high: Tensor | None = None, *, min: float | None = None, max: float | None = None
) -> Tensor:
    low, high = (min if low is None else low), (max if high is None else high)  # type: ignore[assignment]
    return x if low is None and high is None else torch.clamp(x, low, high)


@fast("Gelu")
def gelu(op: Any, x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@fast("HardSigmoid")
def hard_sigmoid(op: Any, x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(x * alpha + beta, 0, 1)


@fast("LeakyRelu")
def leaky_relu(op: Any, x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return torch.where(x >= 0, x, x * alpha)


@fast("PRelu")
def prelu(op: Any, x: Tensor, slope: Tensor) -> Any:
    return NotImplemented if op.version < 9 else torch.where(x < 0, x * slope, x)


@fast("Elu")
def elu(op: Any, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@fast("Selu")
def selu(op: Any, x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@fast("Swish")
def swish(op: Any, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


@fast("MatMul")
def matmul(op: Any, a: Tensor, b: Tensor) -> Tensor:
    return product(a, b)


def product(a: Tensor, b: Tensor) -> Tensor:
    """torch.matmul; half matrices in float32, for on CPUs torch takes up to 20 times as long in this layout.

    A large weight is converted part by part: as a whole it would take twice its size once more."""
    if a.dtype != torch.float16 or b.dtype != torch.float16 or a.device.type != "cpu" or b.dim() != 2:
        return torch.matmul(a, b)
    parts = b.split(max(1, 4 * PART // max(len(b), 1)), 1)
    return torch.cat([torch.matmul(a.float(), part.float()).half() for part in parts], -1)


@fast("Gemm")
def gemm(
    op: Any, a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Any:
    if op.version < 7 or not a.is_floating_point():
        return NotImplemented
    a, b = a.T if transA else a, b.T if transB else b
    y = product(a, b)
    y = y if alpha == 1 else y * alpha
    if c is None or beta == 0:
        return y
    return y + (c if beta == 1 else c * beta)


@fast("Einsum")
def einsum(op: Any, *xs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *xs)


@fast("Softmax", "LogSoftmax")
def softmax(op: Any, x: Tensor, *, axis: int | None = None) -> Any:
    fn = F.softmax if op.op_type == "Softmax" else F.log_softmax
    if not x.is_floating_point():
        return NotImplemented
    if op.version >= 13:
        return fn(x, -1 if axis is None else axis)
    axis = 1 if axis is None else axis % x.dim()
    return fn(x.reshape(int(torch.tensor(x.shape[:axis]).prod()), -1), 1).reshape(x.shape)


@fast("Cast")
def cast(op: Any, x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    dtype = TORCH_DTYPES.get(ir.DataType(to))
    return NotImplemented if dtype is None or dtype in _STORED_ONLY else x.to(dtype)


@fast("CastLike")
def cast_like(op: Any, x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(like.dtype)


@fast("CumSum")
def cum_sum(op: Any, x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = int(axis)
    x = x.flip(dim) if reverse else x
    total = torch.cumsum(x, dim, dtype=x.dtype)
    total = total - x if exclusive and not x.is_floating_point() else total
    if exclusive and x.is_floating_point():
        total = torch.cat([torch.zeros_like(x.narrow(dim, 0, min(1, x.shape[dim]))), total.narrow(dim, 0, max(0, x.shape[dim] - 1))], dim)
    return total.flip(dim) if reverse else total
