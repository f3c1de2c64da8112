"""Quantized checkpoints: integers and values bit for bit, against definitions written out element by element; and broken files."""

import json
import os
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import qgraph
from qgraph.checkpoints.bits import pack, unpack, words
from qgraph.checkpoints.gguf import TYPES, decode
from qgraph.checkpoints.stored import Entry, read_header, write
from qgraph.errors import ModelError
from tests.quantized_files import (
    RNG,
    folder_of,
    gguf_blocks,
    gptq,
    int32,
    stream,
    write_gguf,
)


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_codes_lie_densely_in_words_whatever_their_bits(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, count), dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (2, words(count, bits))
    assert torch.equal(packed, int32([stream(row, bits) for row in codes]))
    assert np.array_equal(unpack(packed, bits, count).numpy(), codes)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_has_the_weights_that_its_definition_gives(tmp_path, bits, version):
    parts, q, weight = gptq(bits, 32, 64, 32, version=version)
    config = {"quant_method": "gptq", "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    path = folder_of(tmp_path / "m", {f"a.b.{n}": t for n, t in parts.items()} | {"a.b.bias": torch.ones(32)}, config)
    found = qgraph.load_checkpoint(path)
    w = found["a.b.weight"]
    assert found.format == "GPTQ" and set(found) == {"a.b.weight", "a.b.bias"}
    assert np.array_equal(w.q.numpy(), q) and w.order is None
    assert np.array_equal(w.dequantize().numpy(), weight)
    assert str(w.spec) == f"uint{bits} asym per group of 32 along axis 1" and torch.equal(found["a.b.bias"], torch.ones(32))


def test_gptq_sorted_by_activation_keeps_an_order_of_columns(tmp_path):
    g_idx = RNG.permutation(np.arange(64) // 16)
    parts, q, weight = gptq(4, 24, 64, 16, g_idx=g_idx)
    w = qgraph.load_checkpoint(folder_of(tmp_path / "m", {f"x.{n}": t for n, t in parts.items()}))["x.weight"]
    assert np.array_equal(g_idx[w.order], np.arange(64) // 16)
    assert np.array_equal(w.q.numpy(), q[:, w.order])
    assert np.array_equal(w.dequantize().numpy(), weight)


def test_gptq_with_one_group_is_per_channel(tmp_path):
    parts, _, weight = gptq(4, 16, 64, 64)
    w = qgraph.load_checkpoint(folder_of(tmp_path / "m", {f"x.{n}": t for n, t in parts.items()}))["x.weight"]
    assert w.spec.granularity == qgraph.PerAxis(0) and w.scale.shape == (16,)
    assert np.array_equal(w.dequantize().numpy(), weight)


def test_awq_has_the_weights_that_its_definition_gives(tmp_path):
    n, k, group = 24, 64, 32
    q, zero = RNG.integers(0, 16, (k, n)), RNG.integers(0, 16, (k // group, n))
    scales = RNG.uniform(0.001, 0.1, (k // group, n)).astype(np.float16)

    def interleaved(codes):  # AutoAWQ: nibble i of a word holds column order[i]
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return int32([[sum(int(row[8 * c + order[i]]) << (4 * i) for i in range(8)) for c in range(n // 8)] for row in codes])

    tensors = {"x.qweight": interleaved(q), "x.qzeros": interleaved(zero), "x.scales": torch.from_numpy(scales)}
    found = qgraph.load_checkpoint(folder_of(tmp_path / "m", tensors, {"quant_method": "awq"}))
    w = found["x.weight"]
    expected = np.array(
        [[scales[j // group, i] * np.float16(q[j, i] - zero[j // group, i]) for j in range(k)] for i in range(n)], np.float16
    )
    assert found.format == "AWQ" and np.array_equal(w.q.numpy(), q.T)
    assert np.array_equal(w.dequantize().numpy(), expected)


@pytest.mark.parametrize(("bits", "group", "asymmetric"), [(4, 16, True), (4, 40, False), (8, 40, True), (3, 8, True)])
def test_pack_quantized_has_the_weights_that_its_definition_gives(tmp_path, bits, group, asymmetric):
    n, k, half = 10, 40, 2 ** (bits - 1)
    g = k // group if k % group == 0 else -(-k // group)
    group = -(-k // g)
    q, zero = RNG.integers(-half, half, (n, k)), RNG.integers(-half, half, (n, g)) * asymmetric
    scale = RNG.uniform(0.001, 0.1, (n, g)).astype(np.float32)
    tensors = {
        "x.weight_packed": int32([stream(row + half, bits) for row in q]),
        "x.weight_scale": torch.from_numpy(scale),
        "x.weight_shape": torch.tensor([n, k]),
    }
    if asymmetric:
        tensors["x.weight_zero_point"] = int32([stream(column + half, bits) for column in zero.T]).T
    config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}, "input_activations": None}}}
    w = qgraph.load_checkpoint(folder_of(tmp_path / "m", tensors, config))["x.weight"]
    expected = np.array(
        [[np.float32(q[i, j] - zero[i, j // group]) * scale[i, j // group] for j in range(k)] for i in range(n)], np.float32
    )
    assert np.array_equal(w.q.numpy(), q) and w.spec.dtype == f"int{bits}"
    assert np.array_equal(w.dequantize().numpy(), expected)


def test_int_quantized_keeps_the_format_of_activations(tmp_path):
    q, scale = RNG.integers(-128, 128, (6, 16)).astype(np.int8), RNG.uniform(0.01, 0.1, (6, 1)).astype(np.float32)
    x = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    config = {"config_groups": {"group_0": {"targets": ["re:.*x$"], "weights": {"num_bits": 8}, "input_activations": x}}}
    tensors = {"a.x.weight": torch.from_numpy(q), "a.x.weight_scale": torch.from_numpy(scale), "norm.weight": torch.ones(6)}
    found = qgraph.load_checkpoint(folder_of(tmp_path / "m", tensors, config))
    assert found.format == "compressed-tensors"
    assert np.array_equal(found["a.x.weight"].dequantize().numpy(), q * scale)
    assert found["a.x.weight"].x == qgraph.QSpec("int8", True, qgraph.PerToken(), dynamic=True)
    assert torch.equal(found["norm.weight"], torch.ones(6))


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_has_the_weights_that_its_own_package_gives(kind):
    blocks, elements = gguf_blocks(kind), GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    w = decode(SimpleNamespace(name="x", tensor_type=GGMLQuantizationType[kind], shape=np.array([2 * elements, 6]), data=blocks))
    low, high = w.spec.range
    assert low <= int(w.q.min()) and int(w.q.max()) <= high
    assert w.scale.shape[1] * w.spec.group == w.shape[1] == 2 * elements
    assert np.array_equal(w.dequantize().numpy(), gguf.dequantize(blocks, GGMLQuantizationType[kind]))


def test_a_gguf_file_gives_its_tensors_under_its_own_names(tmp_path):
    blocks = gguf_blocks("Q4_1")
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (blocks, "Q4_1"), "output_norm.weight": np.arange(5, dtype=np.float32)})
    for source in (path, tmp_path):
        found = qgraph.load_checkpoint(source)
        assert list(found) == ["blk.0.ffn_up.weight", "output_norm.weight"] and found.format == "GGUF"
        assert np.array_equal(found["blk.0.ffn_up.weight"].dequantize().numpy(), gguf.dequantize(blocks, GGMLQuantizationType.Q4_1))
        assert torch.equal(found["output_norm.weight"], torch.arange(5.0))


def test_the_writer_holds_one_tensor_at_a_time_and_other_readers_take_the_file(tmp_path):
    made = []
    tensors = {"b": torch.arange(6, dtype=torch.int32).view(2, 3), "a": torch.randn(3).bfloat16(), "empty": torch.empty(0, 4)}

    def make(name):
        made.append(name)
        return tensors[name]

    entries = [Entry(n, t.dtype, tuple(t.shape), lambda n=n: make(n)) for n, t in tensors.items()]
    write(tmp_path / "x.safetensors", entries)
    found = load_file(tmp_path / "x.safetensors")
    assert sorted(made) == ["a", "b", "empty"]
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    again = read_header(tmp_path / "x.safetensors")
    assert all(torch.equal(again[n].read(), t) for n, t in tensors.items())


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"precious")

    def fail():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "x.safetensors", [Entry("a", torch.float32, (2,), fail)])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"] and (tmp_path / "x.safetensors").read_bytes() == b"precious"


def truncated_tensors(folder):
    path = folder_of(folder / "m", {"x.weight": torch.ones(8, 8)}) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return path


def truncated_header(folder):
    path = folder_of(folder / "m", {"x.weight": torch.ones(8, 8)}) / "model.safetensors"
    os.truncate(path, 20)
    return path


def header_of_something_else(folder):
    (folder / "x.safetensors").write_bytes((5).to_bytes(8, "little") + b"[1,2]" + bytes(40))
    return folder / "x.safetensors"


def sizes_that_do_not_fit(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return folder / "x.safetensors"


def truncated_gguf(folder):
    path = write_gguf(folder / "m.gguf", {"a.weight": (gguf_blocks("Q4_K"), "Q4_K")})
    os.truncate(path, path.stat().st_size - 100)
    return path


def gguf_of_another_kind(folder):
    (folder / "m.gguf").write_bytes(b"This is no model." * 10)
    return folder / "m.gguf"


def missing_zeros(folder):
    parts, *_ = gptq(4, 16, 32, 16)
    return folder_of(folder / "m", {f"x.{n}": t for n, t in parts.items() if n != "qzeros"})


def marlin(folder):
    parts, *_ = gptq(4, 16, 32, 16)
    return folder_of(folder / "m", {f"x.{n}": t for n, t in parts.items()}, {"quant_method": "gptq", "checkpoint_format": "marlin"})


def part_of_a_checkpoint(folder):
    path = folder_of(folder / "m", {"x.weight": torch.ones(2)})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x.weight": "a", "y.weight": "b"}}))
    return path


def mixed_formats(folder):
    parts, *_ = gptq(4, 16, 32, 16)
    tensors = {f"x.{n}": t for n, t in parts.items()} | {"y.weight": torch.ones(2, 2, dtype=torch.int8), "y.weight_scale": torch.ones(2, 1)}
    return folder_of(folder / "m", tensors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "nothing: no such checkpoint"),
        (lambda folder: folder, "no folder with a .safetensors or .gguf file"),
        (truncated_tensors, "model.safetensors is truncated: its tensors end at byte"),
        (truncated_header, "truncated or no safetensors file"),
        (header_of_something_else, "its header cannot be read"),
        (sizes_that_do_not_fit, "tensor 'x' has 8 bytes, which do not fit F32"),
        (truncated_gguf, "m.gguf is truncated or no GGUF file"),
        (gguf_of_another_kind, "m.gguf is truncated or no GGUF file"),
        (missing_zeros, "tensor 'x.qzeros' is missing"),
        (marlin, "GPTQ layout 'marlin' is not known"),
        (part_of_a_checkpoint, "lists tensor 'y.weight', which no file holds"),
        (mixed_formats, "mixes the formats GPTQ and compressed-tensors"),
    ],
)
def test_a_broken_checkpoint_is_one_sentence(tmp_path, make, message):
    with pytest.raises(ModelError, match=message) as error:
        qgraph.load_checkpoint(make(tmp_path))
    assert "\n" not in str(error.value)


def wrong_shape(parts):
    return parts | {"scales": parts["scales"][:, :-1]}


def uneven_groups(parts):
    return parts | {"g_idx": torch.zeros(32, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("change", "message"), [(wrong_shape, "x: qweight .* fit no number of bits"), (uneven_groups, "x: g_idx does not give 2 groups")]
)
def test_parts_that_do_not_fit_are_one_sentence(tmp_path, change, message):
    parts, *_ = gptq(4, 16, 32, 16)
    found = qgraph.load_checkpoint(folder_of(tmp_path / "m", {f"x.{n}": t for n, t in change(parts).items()}))
    with pytest.raises(ModelError, match=message):
        found["x.weight"]


def test_activations_of_an_unknown_format_are_one_sentence(tmp_path):
    x = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True, "symmetric": True}
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": x}}}
    tensors = {"x.weight": torch.ones(4, 4, dtype=torch.int8), "x.weight_scale": torch.ones(4, 1)}
    with pytest.raises(ModelError, match="x: activations of the format .*'type': 'float'.* are not read"):
        qgraph.load_checkpoint(folder_of(tmp_path / "m", tensors, config))["x.weight"]
