"""Quantized checkpoints by definition, element by element, and small modules for them."""

import json

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import save_file
from torch import nn

import qgraph
from qgraph.checkpoints.tensor import QuantizedTensor
from qgraph.text import path_of
from qgraph.types import int_range, storage
from qgraph.views import Dequantize, Linear, const_value, view

RNG = np.random.default_rng(5)


def stream(codes, bits):
    """The words of one row, bit by bit."""
    number = sum(int(c) << (i * bits) for i, c in enumerate(codes))
    return [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


def int32(values):
    return torch.from_numpy(np.array(values, np.uint32).view(np.int32))


def gptq(bits, n, k, group, *, version=1, g_idx=None):
    """(stored parts, integers [n, k], weight [n, k] as AutoGPTQ defines it)."""
    groups = -(-k // group)
    q, zero = RNG.integers(0, 2**bits, (n, k)), RNG.integers(0, 2**bits, (groups, n))
    scales = RNG.uniform(0.001, 0.1, (groups, n)).astype(np.float16)
    index = np.arange(k) // group if g_idx is None else g_idx
    written = (zero - 1) % 2**bits if version == 1 else zero
    parts = {
        "qweight": int32([stream(row, bits) for row in q]).T.contiguous(),
        "qzeros": int32([stream(row, bits) for row in written]),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    weight = np.empty((n, k), np.float16)
    for i in range(n):
        for j in range(k):
            weight[i, j] = scales[index[j], i] * np.float16(q[i, j] - zero[index[j], i])
    return parts, q, weight


def folder_of(path, tensors, config=None):
    path.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return path


HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}

"""Where in a block float16 numbers lie, (0, 2) for other types: random bytes there could be NaN."""


def gguf_blocks(kind, rows=6):
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    blocks = RNG.integers(0, 256, (rows * 2, size), dtype=np.uint8)
    for at in HALVES.get(kind, (0, 2)):
        blocks[:, at : at + 2] = RNG.normal(size=(rows * 2, 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(path, tensors, architecture="llama", heads=4, kv_heads=2):
    """tensors: name -> float array, or (bytes of blocks, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=None if kind is None else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


IDS = torch.tensor([[3, 0, 17, 49, 8], [1, 1, 40, 2, 33]])

DYNAMIC = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)


class Net(nn.Module):
    """An embedding, two layers that read the same x, one with a bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.gate, self.up, self.head = nn.Linear(64, 48), nn.Linear(64, 48, bias=False), nn.Linear(48, 50)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(torch.relu(self.gate(x)) * self.up(x))


class Wrapper(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)


def weight(n, k, group, dtype="uint4", *, offset=False, zero=False, order=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    low, high = int_range(dtype)
    shape = (n, k // group)
    return QuantizedTensor(
        q=torch.randint(low, high + 1, (n, k), generator=g).to(storage(dtype)),
        scale=torch.rand(shape, generator=g) * 0.1 + 0.01,
        zero_point=torch.randint(low, high + 1, shape, generator=g).to(storage(dtype)) if zero else None,
        spec=qgraph.QSpec(dtype, not zero, qgraph.PerGroup(1, group)),
        offset=-torch.rand(shape, generator=g) if offset else None,
        order=order,
    )


def values():
    return {
        "embed.weight": weight(50, 64, 32, offset=True),
        "gate.weight": weight(48, 64, 32, zero=True, order=torch.randperm(64, generator=torch.Generator().manual_seed(0))),
        "gate.bias": torch.linspace(-1, 1, 48),
        "up.weight": weight(48, 64, 32, offset=True, seed=2),
        "head.weight": weight(50, 48, 16, "int3"),
        "head.bias": torch.linspace(2, -1, 50),
    }


def floats(tensors):
    return {n: v.dequantize().float() if isinstance(v, QuantizedTensor) else v for n, v in tensors.items()}


def loaded(module, tensors):
    module.load_state_dict(floats(tensors))
    return module.eval()


def close(found, expected, tolerance=1e-5):
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm()) < tolerance


def integers(gm):
    """Module path -> the integers that its linear reads."""
    found = {}
    for node in gm.graph.nodes:
        v = view(Linear, node)
        w = None if v is None else view(Dequantize, v.weight)
        if w is not None:
            found[path_of(node)] = const_value(w.q)
    return found


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))
