"""Codes of few bits <-> int32 words: element i takes bits [i * bits, (i + 1) * bits) of its row, across words where they do not end together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """[rows, ceil(count * bits / 32)] int32 -> [rows, count] uint8; 1 <= bits <= 8."""
    data = np.ascontiguousarray(words.numpy()).view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = ((data[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(len(data), -1)[:, :count]
    else:
        stream = np.unpackbits(data, axis=1, count=count * bits, bitorder="little")
        codes = np.packbits(stream.reshape(len(data), count, bits), axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(np.ascontiguousarray(codes))


def pack(codes: Tensor, bits: int) -> Tensor:
    """[rows, count] uint8, each below 2**bits -> [rows, ceil(count * bits / 32)] int32; the last word is filled with zeros."""
    rows, count = codes.shape
    stream = np.unpackbits(codes.numpy()[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, count * bits)
    data = np.packbits(np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32))), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(data).view(np.int32))


def words(count: int, bits: int) -> int:
    """int32 words that `count` codes take."""
    return -(-count * bits // 32)
