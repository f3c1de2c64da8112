"""compressed-tensors: w = (q - zero_point) * weight_scale, per tensor, per channel or per group along the inputs.

    pack-quantized   weight_packed int32 [N, ceil(K * bits / 32)] of codes q + 2**(bits-1), weight_shape [2], weight_scale [N, G],
                     weight_zero_point int32 packed along N, or int8 [N, G]; weight_g_idx int32 [K] (older files)
    int-quantized    weight int8 [N, K], weight_scale [N, 1] (or one element), weight_zero_point int8

Source: the library of that name, compressors/pack_quantized and compressors/naive_quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qgraph.checkpoints.bits import pack, unpack, words
from qgraph.checkpoints.tensor import QuantizedTensor, grouping, order_of_groups, shaped
from qgraph.errors import ModelError
from qgraph.types import Granularity, PerTensor, PerToken, QSpec

NAMES = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale", "input_zero_point")


def decode(name: str, parts: Mapping[str, Tensor], group: Mapping[str, Any]) -> QuantizedTensor:
    """The weight of layer `name` from its stored `parts`; `group` is the layer's entry of the configuration's config_groups.

    Raises ModelError for parts that are missing or do not fit, and for formats of activations other than dynamic per token."""
    scale, zero, bits = parts.get("weight_scale"), parts.get("weight_zero_point"), int((group.get("weights") or {}).get("num_bits", 8))
    q = _unpacked(name, parts, bits) if "weight_packed" in parts else parts["weight"]
    n, k = q.shape
    if scale is None or scale.numel() % n and scale.numel() != 1 or scale.numel() > q.numel():
        found = "is missing" if scale is None else f"{list(scale.shape)} does not fit the weight [{n}, {k}]"
        raise ModelError(f"{name}: weight_scale {found}")
    if zero is not None and zero.dtype == torch.int32:
        zero = _signed(unpack(zero.T, bits, n), bits).T
    per_tensor = scale.numel() == 1
    groups = scale.numel() // n

    def fit(t: Tensor) -> Tensor:
        return t.reshape(()) if per_tensor else shaped(t.reshape(n, groups))

    order = None if per_tensor else order_of_groups(name, parts.get("weight_g_idx"), k, groups)
    return QuantizedTensor(
        q=q if order is None else q[:, order],
        scale=fit(scale),
        zero_point=None if zero is None or not bool(zero.any()) else fit(zero),
        spec=QSpec(f"int{bits}", zero is None, PerTensor() if per_tensor else grouping(k, groups)),
        order=order,
        **_activations(name, parts, group.get("input_activations")),
    )


def _unpacked(name: str, parts: Mapping[str, Tensor], bits: int) -> Tensor:
    data, shape = parts["weight_packed"], [int(n) for n in parts.get("weight_shape", ())]
    if len(shape) != 2 or tuple(data.shape) != (shape[0], words(shape[1], bits)):
        raise ModelError(f"{name}: weight_packed {list(data.shape)} does not hold a weight of shape {shape} in {bits} bits")
    return _signed(unpack(data, bits, shape[1]), bits)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _activations(name: str, parts: Mapping[str, Tensor], wanted: Mapping[str, Any] | None) -> dict[str, Any]:
    if not wanted:
        return {}
    kind, dynamic = {key: wanted.get(key) for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")}, wanted.get("dynamic")
    granularities: dict[str, Granularity] = {"tensor": PerTensor(), "token": PerToken()}
    per = granularities.get(str(kind["strategy"]))
    static, zero = parts.get("input_scale"), parts.get("input_zero_point")
    if kind["type"] != "int" or per is None or (dynamic is not True and (static is None or static.numel() != 1 or per != PerTensor())):
        raise ModelError(
            f"{name}: activations of the format {kind} are not read; integers per tensor, or with dynamic scales per token, are"
        )
    spec = QSpec(f"int{kind['num_bits']}", bool(kind["symmetric"]), per, dynamic=dynamic is True)
    if spec.dynamic or static is None:
        return {"x": spec}
    return {"x": spec, "x_scale": static.reshape(()), "x_zero_point": None if zero is None else zero.reshape(()).to(torch.int8)}


def group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of config_groups whose targets name the layer (by its path, or as "re:PATTERN"), else the first that targets a class."""
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, Mapping)]
    for group in groups:
        for target in group.get("targets") or ():
            if target == name or (target.startswith("re:") and re.match(target.removeprefix("re:"), name)):
                return group
    return next((g for g in groups if any("." not in t and not t.startswith("re:") for t in g.get("targets") or ())), {})


def packed(q: Tensor, bits: int) -> Tensor:
    """Integers [N, K] of "int<bits>" -> weight_packed."""
    return pack((q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), bits)


def packed_zero(zero_point: Tensor, bits: int) -> Tensor:
    """Zero points [N, G] of "int<bits>" -> weight_zero_point of pack-quantized."""
    return packed(zero_point.T.contiguous(), bits).T.contiguous()
