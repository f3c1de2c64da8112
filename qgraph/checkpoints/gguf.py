"""GGUF: blocks of 32 or 256 neighbours along the inputs -> integers, scales, minima.

    type   integers            groups   w =
    Q4_0   uint4, zero 8       32       d * (q - 8)
    Q4_1   uint4               32       d * q + m
    Q5_0   uint5, zero 16      32       d * (q - 16)
    Q5_1   uint5               32       d * q + m
    Q8_0   int8                32       d * q
    Q2_K   uint2               16       (d * s) * q - dmin * m    s, m: 4 bits per group; d, dmin: float16 per 256
    Q3_K   int3                16       (d * s) * q               s: 6 bits, signed
    Q4_K   uint4               32       (d * s) * q - dmin * m    s, m: 6 bits
    Q5_K   uint5               32       as Q4_K
    Q6_K   int6                16       (d * s) * q               s: int8

d and m are float16 and products with scales of few bits are exact in float32, so that each weight is rounded once, in the sum.
Source: ggml's ggml-common.h (block structs) and ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qgraph.checkpoints.tensor import QuantizedTensor, Value
from qgraph.errors import ModelError, nearest
from qgraph.types import PerGroup, QSpec

Bytes = npt.NDArray[np.uint8]
Block = tuple[Any, Any, Any]
"""Of blocks [n, bytes]: integers [n, elements], scales [n, groups], minima [n, groups] (or None)."""


def _half(blocks: Bytes, start: int) -> npt.NDArray[np.float32]:
    """The float16 numbers at byte `start` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _fields(data: Bytes, bits: int, run: int) -> Bytes:
    """Fields of `bits` bits: those of the low ends of `run` bytes, then the next ones of the same bytes, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found = (data.reshape(len(data), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return found.reshape(len(data), -1)


def _bits(data: Bytes) -> Bytes:
    """The bits of the bytes, lowest first, [n, 8 * bytes]."""
    return np.unpackbits(np.ascontiguousarray(data), axis=1, bitorder="little")


def _q4_0(b: Bytes) -> Block:
    return _fields(b[:, 2:], 4, 16), _half(b, 0), None


def _q4_1(b: Bytes) -> Block:
    return _fields(b[:, 4:], 4, 16), _half(b, 0), _half(b, 2)


def _q5_0(b: Bytes) -> Block:
    return _fields(b[:, 6:], 4, 16) | _bits(b[:, 2:6]) << 4, _half(b, 0), None


def _q5_1(b: Bytes) -> Block:
    return _fields(b[:, 8:], 4, 16) | _bits(b[:, 4:8]) << 4, _half(b, 0), _half(b, 2)


def _q8_0(b: Bytes) -> Block:
    return b[:, 2:].view(np.int8), _half(b, 0), None


def _q2_k(b: Bytes) -> Block:
    scales = b[:, :16]
    return _fields(b[:, 16:80], 2, 32), _half(b, 80) * (scales & 15), -(_half(b, 82) * (scales >> 4))


def _q3_k(b: Bytes) -> Block:
    high, packed = _fields(b[:, :32], 1, 32), b[:, 96:108]
    scales = (_fields(packed[:, :8], 4, 8) | _fields(packed[:, 8:], 2, 4) << 4).astype(np.int8) - 32
    return _fields(b[:, 32:96], 2, 32).astype(np.int8) + (high.astype(np.int8) * 4 - 4), _half(b, 108) * scales, None


def _scales_of_six_bits(b: Bytes) -> tuple[Any, Any]:
    """12 bytes: four scales, four minima (each with 2 bits of a later one above its 6), and the low halves of four more of both."""
    a, m, rest = b[:, :4], b[:, 4:8], b[:, 8:12]
    return np.concatenate([a & 63, rest & 15 | a >> 6 << 4], 1), np.concatenate([m & 63, rest >> 4 | m >> 6 << 4], 1)


def _q4_k(b: Bytes) -> Block:
    scale, minimum = _scales_of_six_bits(b[:, 4:16])
    return _fields(b[:, 16:], 4, 32), _half(b, 0) * scale, -(_half(b, 2) * minimum)


def _q5_k(b: Bytes) -> Block:
    scale, minimum = _scales_of_six_bits(b[:, 4:16])
    return _fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4, _half(b, 0) * scale, -(_half(b, 2) * minimum)


def _q6_k(b: Bytes) -> Block:
    q = _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4
    return q.astype(np.int8) - 32, _half(b, 208) * b[:, 192:208].view(np.int8), None


TYPES: dict[str, tuple[Callable[[Bytes], Block], str, int]] = {
    "Q4_0": (_q4_0, "uint4", 8),
    "Q4_1": (_q4_1, "uint4", 0),
    "Q5_0": (_q5_0, "uint5", 16),
    "Q5_1": (_q5_1, "uint5", 0),
    "Q8_0": (_q8_0, "int8", 0),
    "Q2_K": (_q2_k, "uint2", 0),
    "Q3_K": (_q3_k, "int3", 0),
    "Q4_K": (_q4_k, "uint4", 0),
    "Q5_K": (_q5_k, "uint5", 0),
    "Q6_K": (_q6_k, "int6", 0),
}
"""Type -> how a block is read, the type of its integers, their zero point."""

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64, "BF16": torch.bfloat16}


def open_gguf(path: Path) -> Any:
    """A reader of the `gguf` package. Raises ModelError without it, and for a file that is truncated or is not GGUF."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(f"{path}: GGUF files are read with the Python package gguf, which is not installed") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is truncated or no GGUF file ({error})") from error


def decode(tensor: Any) -> QuantizedTensor | Tensor:
    """A tensor of a GGUFReader; one of a plain float type, and one without two axes, as floats. Raises ModelError for other types."""
    kind, shape = tensor.tensor_type.name, tuple(int(n) for n in tensor.shape[::-1])
    if kind in _PLAIN:
        return torch.from_numpy(np.array(tensor.data)).view(_PLAIN[kind]).reshape(shape)
    if kind not in TYPES:
        raise ModelError(f"tensor {tensor.name!r} is of type {kind}{nearest(kind, [*TYPES, *_PLAIN])}")
    read, dtype, zero = TYPES[kind]
    data = np.ascontiguousarray(tensor.data)
    q, scale, minimum = read(data.reshape(prod(shape) // _elements(kind), -1))
    groups = shape[-1] * scale.shape[1] // q.shape[1]

    def per_group(factor: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(factor, np.float32)).reshape(*shape[:-1], groups)

    scales = per_group(scale)
    return QuantizedTensor(
        q=torch.from_numpy(np.ascontiguousarray(q)).reshape(shape),
        scale=scales,
        zero_point=torch.full(scales.shape, zero, dtype=torch.uint8) if zero else None,
        spec=QSpec(dtype, zero != 0 or not dtype.startswith("u"), PerGroup(len(shape) - 1, shape[-1] // groups)),
        offset=None if minimum is None else per_group(minimum),
    )


def _elements(kind: str) -> int:
    return 256 if kind.endswith("K") else 32


@dataclass(frozen=True)
class Architecture:
    """What the file says of the model: ggml's name of its architecture, its number of blocks, and of heads of q and of k."""

    path: Path
    name: str
    blocks: int
    heads: int
    kv_heads: int


def architecture(path: Path, reader: Any) -> Architecture:
    """Raises ModelError for a file that does not name its architecture, or states numbers of heads per layer."""

    def field(key: str, default: Any) -> Any:
        found = reader.fields.get(key)
        return default if found is None else found.contents()

    name = str(field("general.architecture", ""))
    if not name:
        raise ModelError(f"{path} has no general.architecture")
    heads = field(f"{name}.attention.head_count", 1)
    found = field(f"{name}.block_count", 0), heads, field(f"{name}.attention.head_count_kv", heads)
    if not all(isinstance(n, int) for n in found):
        raise ModelError(f"{path}: its layers have different numbers of heads, which is not supported")
    return Architecture(path, name, *found)


LAYOUT = {"llama": ("attn_q", "attn_k"), "qwen2": (), "qwen3": ()}
"""Architecture of ggml -> the tensors whose rows lie as its interleaved rotary embedding wants them; everything else lies as in torch."""


def by_parameter(
    decoders: Mapping[str, Callable[[], Value]], model: Architecture, parameters: Iterable[str]
) -> dict[str, tuple[str, Callable[[], Value]]]:
    """Torch's name of a parameter -> the file's name, and a decoder that gives the rows in torch's order.

    Raises ModelError for an architecture of unknown layout."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next((k for k, name in MODEL_ARCH_NAMES.items() if name == model.name), None)
    if kind is None or model.name not in LAYOUT:
        known = nearest(model.name, LAYOUT)
        raise ModelError(f"{model.path}: how GGUF lays out the architecture {model.name!r} is not known{known}; pass a mapping of tensors")
    table = get_tensor_name_map(kind, model.blocks)
    found: dict[str, tuple[str, Callable[[], Value]]] = {}
    for parameter in parameters:
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is not None and name in decoders:
            part = name.split(".")[-2]
            heads = model.kv_heads if part == "attn_k" else model.heads
            turned = part in LAYOUT[model.name]
            found[parameter] = name, partial(_turned_back, decoders[name], heads) if turned else decoders[name]
    return found


def _turned_back(decode: Callable[[], Value], heads: int) -> Value:
    """Rows of each head: pairs of neighbours (i, i + 1) -> first all first ones, then all second ones."""
    value = decode()
    rows = torch.arange(value.shape[0]).reshape(heads, -1, 2).mT.reshape(-1)
    return value.rows(rows) if isinstance(value, QuantizedTensor) else value[rows]
