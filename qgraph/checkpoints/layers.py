"""A linear of a quantized graph as the compressed-tensors format describes it: integers, scales, and formats of weight and x."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.checkpoints.bits import words
from qgraph.checkpoints.compressed import packed, packed_zero
from qgraph.checkpoints.stored import Entry
from qgraph.errors import ModelError
from qgraph.types import PerAxis, PerGroup, PerTensor, PerToken, QSpec
from qgraph.views import Dequantize, DynamicQuantize, Linear, Quantize, const_value, granularity, view


@dataclass(frozen=True, eq=False)
class Layer:
    """q int8 [N, K], scale [N, G], zero_point int8 [N, G] or None, of `bits` bits; `x` is the format of the activations (None: float) and
    `x_scale`, `x_zero_point` its constants where they are static. `name` is the module's path."""

    name: str
    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    x: QSpec | None = None
    x_scale: Tensor | None = None
    x_zero_point: Tensor | None = None

    @property
    def format(self) -> str:
        return "pack-quantized" if self.x is None else "int-quantized"

    def scheme(self) -> dict[str, Any]:
        """The entry of config_groups, without its targets."""
        groups = self.scale.shape[1]
        weights = _arguments(self.bits, symmetric=self.zero_point is None, strategy="channel" if groups == 1 else "group")
        if groups > 1:
            weights["group_size"] = self.q.shape[1] // groups
        x = None
        if self.x is not None:
            strategy = "token" if isinstance(self.x.granularity, PerToken) else "tensor"
            symmetric = self.x.symmetric if self.x.dynamic else self.x_zero_point is None
            x = _arguments(self.x.bits, symmetric=symmetric, strategy=strategy, dynamic=self.x.dynamic)
        return {"weights": weights, "input_activations": x, "output_activations": None, "format": self.format}

    def entries(self) -> list[Entry]:
        """The tensors of the file."""
        (n, k), groups = self.q.shape, self.scale.shape[1]
        found = [Entry(f"{self.name}.weight_scale", self.scale.dtype, (n, groups), lambda: self.scale)]
        if self.x is None:
            found += [
                Entry(f"{self.name}.weight_packed", torch.int32, (n, words(k, self.bits)), lambda: packed(self.q, self.bits)),
                Entry(f"{self.name}.weight_shape", torch.int64, (2,), lambda: torch.tensor([n, k])),
            ]
        else:
            found.append(Entry(f"{self.name}.weight", torch.int8, (n, k), lambda: self.q))
        if (zero := self.zero_point) is not None:
            shape, dtype = ((words(n, self.bits), groups), torch.int32) if self.x is None else ((n, groups), torch.int8)
            found.append(
                Entry(f"{self.name}.weight_zero_point", dtype, shape, lambda: packed_zero(zero, self.bits) if self.x is None else zero)
            )
        constants = {"input_scale": self.x_scale, "input_zero_point": self.x_zero_point}
        return found + [_entry(f"{self.name}.{name}", t.reshape(1)) for name, t in constants.items() if t is not None]


def _entry(name: str, value: Tensor) -> Entry:
    return Entry(name, value.dtype, tuple(value.shape), lambda: value)


def _arguments(bits: int, *, symmetric: bool, strategy: str, dynamic: bool = False) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}


def integer_layer(name: str, v: Linear) -> Layer | None:
    """The layer, None where its weight is no stored integers. Raises ModelError for what the format cannot say."""
    w = view(Dequantize, v.weight)
    q, scale = (None, None) if w is None else (const_value(w.q), const_value(w.scale))
    if w is None or q is None or scale is None:
        return None
    per, bits = granularity(w.axis, w.group), int(w.dtype.removeprefix("u").removeprefix("int"))
    n, k = q.shape[0], q.shape[-1]
    axis = {PerGroup: v.in_axis, PerAxis: v.out_axis}.get(type(per))
    along = w.axis is None or (axis is not None and w.axis % q.dim() == axis % q.dim())
    if q.dim() != 2 or v.in_axis != -1 or not along or bits > 8 or (k > w.group > 0 and k % w.group):
        raise ModelError(f"{name}: a weight {list(q.shape)} of {w.dtype} {per} has no place in the format; groups must divide its rows")
    zero = None if w.zero_point is None else const_value(w.zero_point)
    middle = 2 ** (bits - 1) if w.dtype.startswith("u") else 0
    scales, zeros = _columns(scale, n), _columns(_shifted(zero, middle), n)
    zeros = zeros.expand_as(scales).contiguous()
    return Layer(name, _shifted(q, middle), scales, zeros if bool(zeros.any()) else None, bits, *_activations(name, v.x, bits))


def _columns(factor: Tensor, n: int) -> Tensor:
    """[N, groups] of one number, [N] or [N, groups]."""
    return (factor.reshape(n, -1) if factor.numel() > 1 else factor.reshape(1, 1).expand(n, 1)).contiguous()


def _shifted(q: Tensor | None, middle: int) -> Tensor:
    """Unsigned integers whose middle is this as signed ones; None is 0."""
    return ((torch.zeros((), dtype=torch.int16) if q is None else q.to(torch.int16)) - middle).to(torch.int8)


def _activations(name: str, x: Node, bits: int) -> tuple[QSpec | None, Tensor | None, Tensor | None]:
    """(format, static scale, static zero point) of integers that x is made of."""
    outer = view(Dequantize, x)
    if outer is None:
        return None, None, None
    dynamic = view(DynamicQuantize, outer.q.args[0]) if outer.q.target is operator.getitem else None
    static, scale = view(Quantize, outer.q), const_value(outer.scale)
    spec = QSpec(outer.dtype, dynamic is not None and dynamic.symmetric, granularity(outer.axis, outer.group), dynamic is not None)
    known = dynamic is not None or (static is not None and scale is not None)
    if not known or not isinstance(spec.granularity, PerTensor | PerToken) or bits != 8 or spec.bits != 8:
        raise ModelError(
            f"{name}: activations as {spec} beside weights of {bits} bits have no place in the format; 8 bits per tensor or per token do"
        )
    if dynamic is not None:
        return spec, None, None
    zero = None if outer.zero_point is None else const_value(outer.zero_point)
    shifted = _shifted(zero, 0 if spec.signed else 128)
    return spec, scale, shifted if bool(shifted.any()) else None
