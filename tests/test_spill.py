"""Tensors in temporary files, and large tensors part by part."""

import errno
import gc
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qgraph import observe, parts, reference, spill
from qgraph.edit import add_constant
from qgraph.errors import ModelError
from qgraph.onnx_io import from_onnx
from qgraph.onnx_save import save_onnx
from qgraph.qparams import scale_shape
from qgraph.types import PerAxis, PerGroup, PerTensor, QSpec, attribute

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_tensor_in_a_file_is_the_same_tensor(dtype):
    x = torch.randint(0, 2, (5, 7, 3)).to(dtype).transpose(0, 1)
    found = spill.Store().put(x)
    assert found.dtype == dtype and found.shape == x.shape and torch.equal(found.float(), x.float())
    assert spill.is_mapped(found) and spill.is_mapped(found[2:, 1]) and not spill.is_mapped(x)
    assert spill.Store().put(found) is found


def test_it_can_be_written_to_and_keeps_its_values_when_pages_are_let_go(monkeypatch):
    found = spill.Store().put(torch.arange(100_000.0))
    found[3] = -1
    monkeypatch.setattr(spill, "RESIDENT", 0)
    spill.release()
    assert found[3] == -1 and torch.equal(found[4:], torch.arange(4.0, 100_000.0))


def test_constants_stay_in_memory_up_to_a_limit_and_make_room_when_they_die(monkeypatch):
    gc.collect()
    monkeypatch.setattr(spill, "HELD", spill._held + 5 * 2**20)
    first = [spill.settled(torch.zeros(2**19)) for _ in range(4)]
    assert [spill.is_mapped(x) for x in first] == [False, False, True, True]
    assert not spill.is_mapped(spill.settled(torch.zeros(1000)))
    del first[:2]
    assert not spill.is_mapped(spill.settled(torch.zeros(2**19)))


def test_a_view_of_other_memory_stays_with_it(monkeypatch):
    monkeypatch.setattr(spill, "HELD", 0)
    x = torch.zeros(2**10, 2**8)
    assert spill.settled(x.T).data_ptr() == x.data_ptr() != spill.settled(x).data_ptr()


def test_memory_counts_as_long_as_its_owner_lives():
    gc.collect()
    before, array = spill._held, np.zeros(2**18, np.float32)
    found = spill.settled(torch.from_numpy(array), owner=array).numpy()
    del array
    gc.collect()
    assert spill._held == before + 2**20
    del found
    gc.collect()
    assert spill._held == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files in /proc")
def test_files_are_few_and_go_with_their_tensors(monkeypatch):
    monkeypatch.setattr(spill, "CHUNK", 2**20)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    store = spill.Store()
    kept = [store.put(torch.full((2**16,), i, dtype=torch.int8)) for i in range(64)]
    assert before + 4 <= len(os.listdir("/proc/self/fd")) <= before + 12
    assert all(bool((x == i).all()) for i, x in enumerate(kept))
    del kept, store
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_an_error_with_a_way_out(monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(
        ModelError, match=r"no room for 4 MB more .*No space left on device\); name a folder with more in the variable TMPDIR"
    ):
        spill.Store().put(torch.zeros(1_000_000))
    assert not list(Path(tempfile.gettempdir()).glob("qgraph-*.part"))


@pytest.mark.parametrize("shape", [(37, 29), (29, 5, 7)])
@pytest.mark.parametrize(("axis", "group"), [(None, 0), (0, 0), (1, 0), (-1, 0), (0, 4), (1, 4), (-1, -1), (-2, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_in_parts_gives_the_same_bits(shape, axis, group, transposed, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(shape)
    x = x.transpose(0, 1) if transposed else x
    scale = torch.rand(scale_shape(x.shape, axis, group)) + 0.01
    zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8)
    for z in (zero, None):
        whole = reference.quantize(x, scale, z, "uint4", axis, group)
        both = (
            whole,
            reference.fake_quantize(x, scale, z, "uint4", axis, group),
            reference.dequantize(whole, scale, z, "uint4", axis, group),
        )
        with monkeypatch.context() as patch:
            patch.setattr(parts, "PART", 100)
            sliced = reference.quantize(x, scale, z, "uint4", axis, group)
            again = (
                sliced,
                reference.fake_quantize(x, scale, z, "uint4", axis, group),
                reference.dequantize(sliced, scale, z, "uint4", axis, group),
            )
        for a, b in zip(both, again, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


def test_a_scale_of_another_shape_is_refused_in_parts_as_well(monkeypatch):
    monkeypatch.setattr(parts, "PART", 100)
    with pytest.raises(ValueError, match="expected"):
        reference.quantize(torch.randn(40, 30), torch.ones(80, 6), None, "int4", 1, 5)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerAxis(1), PerGroup(0, 4), PerGroup(1, 4)])
@pytest.mark.parametrize("kind", ["minmax", "mse"])
def test_ranges_in_parts_are_the_same(granularity, kind, monkeypatch):
    x = torch.randn(37, 29, generator=torch.Generator().manual_seed(1)).half()
    spec = QSpec("int4", True, granularity)
    whole = observe.range_of(x, spec, kind)
    monkeypatch.setattr(parts, "PART", 100)
    assert all(torch.equal(a, b) for a, b in zip(whole, observe.range_of(x, spec, kind), strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory from /proc")
def test_constants_are_let_go_one_by_one_while_a_model_is_written(tmp_path, monkeypatch):
    """16 weights of 4 MB."""
    products = " ".join(f"{f'h{i + 1}' if i < 15 else 'y'} = MatMul (h{i}, w{i})" for i in range(16))
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 20]> g (float[1,1024] h0) => (float[1,1024] y) {{ {products} }}"""
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.full((1024, 1024), i, np.float32), f"w{i}") for i in range(16))
    gm = from_onnx(model)
    for node in [n for n in gm.graph.nodes if n.op == "get_attr"]:
        node.target = add_constant(gm, "stored", spill.Store().put(attribute(node)))
    gm.recompile()
    monkeypatch.setattr(spill, "RESIDENT", 0)
    spill.release()
    before = spill._mapped_in()
    monkeypatch.setattr(spill, "RESIDENT", before + 8 * 2**20)
    save_onnx(gm, tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").stat().st_size >= 64 * 2**20
    assert spill._mapped_in() < before + 24 * 2**20
