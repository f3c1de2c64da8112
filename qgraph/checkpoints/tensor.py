"""QuantizedTensor: value = (q - zero_point) * scale + offset, as a file holds it, one integer per element."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qgraph.errors import ModelError
from qgraph.reference import spread
from qgraph.types import PerAxis, PerGroup, QSpec


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """The weight [out, in] of a layer.

    `q` has the weight's shape, in `types.storage(spec.dtype)`; `scale` and `zero_point` (None: 0) have the shape that
    `spec.granularity` asks for, scale in the file's float type. `offset`, of scale's shape and type, is added in each group (the
    minimum of GGUF's formats, which is no multiple of the scale). `order` [in]: column j of `q` belongs to input order[j] (None: j).
    `x` is the format of the layer's activations where the checkpoint has one; a static one has `x_scale` and `x_zero_point` (None: 0)."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QSpec
    offset: Tensor | None = None
    order: Tensor | None = None
    x: QSpec | None = None
    x_scale: Tensor | None = None
    x_zero_point: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def dequantize(self) -> Tensor:
        """The float weight [out, in] with its columns in the layer's order: float32 arithmetic, rounded once to scale's type."""
        axis, group = self.spec.axis, self.spec.group
        value = self.q.float()
        if self.zero_point is not None:
            value = value - spread(self.zero_point, self.q, axis, group).float()
        value = value * spread(self.scale, self.q, axis, group).float()
        if self.offset is not None:  # the product is exact: at most 17 bits times 5
            value = value + spread(self.offset, self.q, axis, group).float()
        value = value.to(self.scale.dtype)
        return value if self.order is None else value[:, self.order.argsort()]

    def rows(self, index: Tensor) -> QuantizedTensor:
        """Its rows (output channels) `index`, in that order. Scales must have one entry per row."""
        zero = None if self.zero_point is None else self.zero_point[index]
        offset = None if self.offset is None else self.offset[index]
        return replace(self, q=self.q[index], scale=self.scale[index], zero_point=zero, offset=offset)

    def equal(self, other: QuantizedTensor) -> bool:
        """The same format and the same stored numbers."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


Value = QuantizedTensor | Tensor
"""A parameter of a checkpoint: quantized, or float."""


def grouping(columns: int, groups: int) -> PerAxis | PerGroup:
    """That of a weight [N, columns] with scales [N, groups]: one group is a scale per output channel."""
    return PerAxis(0) if groups == 1 else PerGroup(1, -(-columns // groups))


def shaped(factor: Tensor) -> Tensor:
    """Scales or zero points [N, groups] in the shape of that granularity: [N] for one group."""
    return factor[:, 0].contiguous() if factor.shape[1] == 1 else factor.contiguous()


def order_of_groups(name: str, g_idx: Tensor | None, k: int, groups: int) -> Tensor | None:
    """The inputs sorted by their group, None where they lie so. Groups must then be equally long, but for the last."""
    if g_idx is None or groups == 1:
        return None
    size = -(-k // groups)
    order = torch.argsort(g_idx, stable=True)
    if g_idx.shape != (k,) or not torch.equal(g_idx[order].long(), torch.arange(k) // size):
        raise ModelError(f"{name}: g_idx does not give {groups} groups of {size} inputs each")
    return None if torch.equal(order, torch.arange(k)) else order
