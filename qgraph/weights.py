"""The weight of a convolution or linear seen by its channels: sizes, values per channel laid along it, largest magnitudes.

Groups, transposed convolutions and weights stored either way round are told apart here, once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qgraph.views import Conv, Linear, const_value


@dataclass(frozen=True, eq=False)
class Weight:
    """`value` is the weight of the layer `v`; input and output channels are counted over all groups."""

    v: Conv | Linear
    value: Tensor

    @property
    def groups(self) -> int:
        return self.v.groups if isinstance(self.v, Conv) else 1

    @property
    def _transposed(self) -> bool:
        return isinstance(self.v, Conv) and self.v.transposed

    @property
    def outputs(self) -> int:
        return int(self.value.shape[self.v.out_axis]) * (self.groups if self._transposed else 1)

    @property
    def inputs(self) -> int:
        return int(self.value.shape[self.v.in_axis]) * (1 if self._transposed else self.groups)

    def split(self) -> Tensor:
        """The weight with a leading axis of groups: the axes of the layer, which count from the end, are then those of one group."""
        found: Tensor = self.value.unflatten(0, (self.groups, -1))
        return found

    def scaled(self, values: Tensor, axis: int) -> Tensor:
        """The weight in float64 times a value per channel of its `axis` (the layer's in_axis or out_axis), or times one number."""
        shape = [1] * (self.value.ndim + 1)
        if values.numel() > 1:
            shape[0], shape[axis] = self.groups, values.numel() // self.groups
        found: Tensor = self.split().double() * values.reshape(shape)
        return found.reshape(self.value.shape)

    def response(self, shift: Tensor) -> Tensor:
        """What the weight gives on each output channel, in float64 [outputs], for an input that is `shift` [inputs] everywhere.

        Not for a convolution that pads, and not for a transposed one: their borders respond otherwise."""
        moved = self.scaled(shift, self.v.in_axis)
        return moved.sum([a for a in range(-moved.ndim, 0) if a != self.v.out_axis])

    def absmax(self, axis: int) -> Tensor:
        """Largest magnitude per channel of `axis`, float32."""
        split = self.split().float().abs()
        over = [a for a in range(1, split.ndim) if a != axis % split.ndim]
        return split.amax(over).flatten() if over else split.flatten()


def constant_weight(v: Conv | Linear) -> Weight | None:
    """The layer's weight where it is a constant of float type; a linear's must have two axes."""
    value = const_value(v.weight)
    if value is None or not value.is_floating_point() or (isinstance(v, Linear) and value.ndim != 2):
        return None
    return Weight(v, value)
