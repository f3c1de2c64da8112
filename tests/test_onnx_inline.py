"""Weights inside an ONNX file: read past protobuf, in memory once, and no more of them than other constants."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from qgraph import spill
from qgraph.inspect import file_bytes
from qgraph.onnx_inline import _encoded, outline
from qgraph.onnx_io import from_onnx, save_onnx, to_proto
from qgraph.onnx_read import read_model
from tests.protos import equal
from tests.test_large_model import linux, run

RNG = np.random.default_rng(0)


def weight(name: str, *shape: int, dtype: type = np.float32) -> TensorProto:
    return numpy_helper.from_array((8 * RNG.standard_normal(shape)).astype(dtype), name)


def model() -> ModelProto:
    """Initializers of several types and sizes, some in the branches of an If, and a constant node."""
    found = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]> g (float[4,64] x, bool c) => (float[4,40] y) {
             k = Constant <value = float[2] {1.5, 2.5}> ()
             h = If (c) <then_branch = t () => (float[4,64] a) { a = Mul (x, u) }, else_branch = e () => (float[4,64] b) { b = Add (x, u) }>
             p = MatMul (h, w) y = Add (p, v)
           }"""
    )
    found.graph.initializer.extend(
        [weight("w", 64, 40), weight("v", 40), weight("i", 300, dtype=np.int64), weight("f16", 33, 21, dtype=np.float16)]
    )
    half = TensorProto(name="bf", data_type=TensorProto.BFLOAT16, dims=[1000], raw_data=bytes(range(250)) * 8, doc_string="halves")
    found.graph.initializer.append(half)
    for attribute in found.graph.node[1].attribute:
        attribute.g.initializer.append(weight("u", 4, 64))
    return found


def stored(path: Path) -> Path:
    path.write_bytes(model().SerializeToString())
    return path


def inside(data: bytes) -> list[TensorProto]:
    """The tensors that were made external."""
    graph = ModelProto.FromString(outline(data, "m.onnx")).graph
    graphs = [graph, *(a.g for n in graph.node for a in n.attribute if a.HasField("g"))]
    return [t for g in graphs for t in g.initializer if t.data_location == TensorProto.EXTERNAL]


def test_larger_initializers_become_ranges_of_the_file_also_in_bodies() -> None:
    data, graph = model().SerializeToString(), model().graph
    found = inside(data)
    assert [t.name for t in found] == ["w", "i", "f16", "bf", "u", "u"] and not any(t.raw_data for t in found)
    for tensor, source in zip(found[:2], (graph.initializer[0], graph.initializer[2]), strict=True):
        entries = {e.key: e.value for e in tensor.external_data}
        start, length = int(entries["offset"]), int(entries["length"])
        assert entries["location"] == "m.onnx" and len(data[start : start + length]) == len(source.raw_data)
        assert (tensor.dims, tensor.data_type) == (source.dims, source.data_type)


def test_what_is_read_and_written_is_the_same_model(tmp_path) -> None:
    path, x = stored(tmp_path / "m.onnx"), torch.randn(4, 64)
    proto = onnx.load(path)
    gm, plain = from_onnx(path), from_onnx(proto)
    assert equal(to_proto(gm), proto)
    for condition in (True, False):
        assert torch.equal(gm(x, torch.tensor(condition))[0], plain(x, torch.tensor(condition))[0])
    save_onnx(gm, tmp_path / "again.onnx")
    assert equal(onnx.load(tmp_path / "again.onnx"), proto) and not (tmp_path / "again.onnx.data").exists()


def test_the_file_may_change_after_it_was_read(tmp_path) -> None:
    path = stored(tmp_path / "m.onnx")
    gm, proto = from_onnx(path), onnx.load(path)
    path.write_bytes(b"gone")
    assert equal(to_proto(gm), proto)


def test_a_file_is_looked_at_without_reading_weights_also_through_a_link(tmp_path) -> None:
    path = stored(tmp_path / "m.onnx")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "model.onnx"
    link.symlink_to(path)
    for place in (path, link):
        found = read_model(place)
        assert isinstance(found.graph.initializers["w"].const_value, ir.ExternalTensor)
        assert file_bytes(place, found) == path.stat().st_size
        assert equal(to_proto(from_onnx(place)), onnx.load(path))


SAMPLE = model().SerializeToString()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_cut_or_damaged_file_is_refused_where_protobuf_refuses_it(data) -> None:
    whole = bytearray(SAMPLE)
    end = data.draw(st.integers(0, len(whole)))
    for place in data.draw(st.lists(st.integers(0, 400), max_size=2)):
        whole[place] = data.draw(st.integers(0, 255))
    broken = bytes(whole[:end])
    assert parses(outline(broken, "m")) == parses(broken)


def parses(data: bytes) -> bool:
    try:
        ModelProto.FromString(data)
    except DecodeError:
        return False
    return True


def test_what_is_no_model_is_given_back() -> None:
    deep = GraphProto(initializer=[weight("w", 300)]).SerializeToString()
    for _ in range(500):
        for tag in b"\x32\x2a\x0a":  # the graph of an attribute of a node of a graph
            deep = bytes([tag]) + _encoded(len(deep)) + deep
    deep = b"\x3a" + _encoded(len(deep)) + deep
    for data in (b"\xff" * 10_000_000, b"text\n" * 1000, deep):
        assert outline(data, "m") == data


def test_data_of_a_wrong_size_or_type_stays_for_the_reader() -> None:
    odd = [
        TensorProto(name="short", data_type=TensorProto.FLOAT, dims=[1000], raw_data=bytes(3999)),
        TensorProto(name="four", data_type=TensorProto.INT4, dims=[4000], raw_data=bytes(2000)),
        TensorProto(name="", data_type=TensorProto.FLOAT, dims=[1000], raw_data=bytes(4000)),
        TensorProto(name="list", data_type=TensorProto.FLOAT, dims=[1000], float_data=[0.0] * 1000),
    ]
    assert not inside(ModelProto(graph=GraphProto(initializer=odd)).SerializeToString())


def test_they_leave_memory_beyond_what_constants_may_take(tmp_path, monkeypatch) -> None:
    path = stored(tmp_path / "m.onnx")
    monkeypatch.setattr(spill, "LARGE", 1024)
    monkeypatch.setattr(spill, "HELD", spill._held + 64 * 40 * 4)
    gm = from_onnx(path)
    assert not spill.is_mapped(gm.w) and spill.is_mapped(gm.i) and spill.is_mapped(gm.bf)
    assert equal(to_proto(gm), onnx.load(path))


BIG, WIDTH = 24, 1800
"""Matrices of 13 MB: 311 MB."""

READ = """
import sys
def memory(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))
import qgraph, torch
qgraph.from_onnx(sys.argv[1])
before = memory("VmRSS")
gm = qgraph.from_onnx(sys.argv[2])
assert all(bool((getattr(gm, f"w{i}")[[0, -1]] == i).all()) for i in range(int(sys.argv[3])))
print(memory("VmHWM") - before)
"""


@linux
def test_a_model_of_300_mb_in_one_file_takes_less_than_that(tmp_path) -> None:
    """Protobuf alone would take its size once while it reads, and the bytes of the file once more."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in "xy"]
    nodes = [helper.make_node("MatMul", [f"v{i}" if i else "x", f"w{i}"], [f"v{i + 1}" if i < BIG - 1 else "y"]) for i in range(BIG)]
    shell = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    path, small = tmp_path / "big.onnx", stored(tmp_path / "small.onnx")
    with path.open("wb") as file:
        file.write(shell.SerializeToString())
        for i in range(BIG):  # parts of a message that follow each other are one message
            one = numpy_helper.from_array(np.full((WIDTH, WIDTH), i, np.float32), f"w{i}")
            file.write(ModelProto(graph=GraphProto(initializer=[one])).SerializeToString())
    assert path.stat().st_size > 300e6
    done = run(READ, small, path, str(BIG))
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    print(f"\n{grown / 1e6:.0f} MB more memory for {path.stat().st_size / 1e6:.0f} MB of weights")  # noqa: T201
    assert grown < 0.8 * path.stat().st_size
