"""Gathered and dequantized rows, dequantized tensors and unpacked codes are the reference's bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import reference
from qgraph.backends.cupy.embedding import pack_table, work
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.ops import K
from qgraph.errors import LoweringError
from qgraph.types import int_range, storage

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def table(n, k, dtype, group, real, zero_points, seed=0):
    """Integers over the whole range, with scales (and zero points) per row or group."""
    random = torch.Generator().manual_seed(seed)
    low, high = int_range(dtype)
    shape = (n, -(-k // group)) if group else (n,)
    q, zero = (torch.randint(low, high + 1, s, generator=random).to(storage(dtype)) for s in ((n, k), shape))
    return q, torch.rand(shape, generator=random).add(0.01).to(real), zero if zero_points else None


@pytest.mark.parametrize("real", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4", "int3"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_rows_are_gathered_and_dequantized(dtype, real, data):
    n, k = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 4, 30, 64, 100, 576, 2500]))
    group = data.draw(st.sampled_from([0, 5, 8, 32, 64]))
    q, scale, zero = table(n, k, dtype, group, real, data.draw(st.booleans()), data.draw(st.integers(0, 99)))
    ids = torch.randint(0, n, data.draw(st.sampled_from([(), (0,), (7,), (2, 3)])))
    packed = pack_table(q, dtype)
    with emulation(schedule=data.draw(st.sampled_from([0, 1, 4]))):
        rows = K.embedding_dequantize(ids, packed, scale, zero, dtype, k, group)
        unpacked = K.unpack(packed, dtype, k)
        whole = K.dequantize(q, scale, zero, group)
    expected = reference.dequantize(q, scale, zero, dtype, 1 if group else 0, group)
    for found, wanted in ((rows, expected[ids]), (unpacked, q), (whole, expected)):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (40, 64), (0, 3)])
def test_a_tensor_of_any_shape_has_one_scale(shape):
    q = torch.randint(0, 256, shape, dtype=torch.uint8)
    scale, zero = torch.tensor(0.3), torch.tensor(200, dtype=torch.uint8)
    with emulation():
        assert torch.equal(K.dequantize(q, scale, zero, 0), reference.dequantize(q, scale, zero, "uint8"))


def test_two_codes_share_a_byte_the_first_in_its_low_half():
    q = torch.tensor([[1, 2, -3]], dtype=torch.int8)
    assert pack_table(q, "int4").tolist() == [[0x21, 0x0D, 0, 0, 0, 0, 0, 0]]
    assert pack_table(q, "int8").tolist() == [[1, 2, 253, 0, 0, 0, 0, 0]]


def test_an_id_in_no_row_gives_nan():
    q, scale, _ = table(3, 16, "int8", 0, FLOAT, False)
    with emulation(checked=True):
        found = K.embedding_dequantize(torch.tensor([-1, 3, 2]), pack_table(q, "int8"), scale, None, "int8", 16, 0)
    assert found.isnan().all(1).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("k", [100, 1024])
def test_no_access_leaves_the_tensors_and_sectors_are_used_whole(dtype, k):
    q, scale, zero = table(12, k, dtype, 32, HALF, True)
    packed = pack_table(q, dtype)
    with emulation(checked=True) as run:
        K.embedding_dequantize(torch.tensor([3, 11, 0]), packed, scale, zero, dtype, k, 32)
        K.embedding_dequantize(torch.tensor([3, 11, 0]), packed, scale[:, 0].contiguous(), None, dtype, k, 0)
        assert torch.equal(K.unpack(packed, dtype, k), q)
    if k == 1024:
        (_, groups), (_, rows), *unpack = run.profiles
        assert groups.unique == work(3, k, dtype, HALF, group=32, zero_points=True).bytes
        assert rows.unique == work(3, k, dtype, HALF).bytes
        assert all(p.sector_efficiency == 1 for p in (groups, rows, *(p for _, p in unpack)))


@pytest.mark.parametrize(("dtype", "zero_points"), [("int4", False), ("uint4", True), ("int8", True)])
def test_a_row_and_its_scales_are_read_once(dtype, zero_points):
    """Each quarter of 4096 columns looks up its id, and shares a sector of scales, and of zero points, among its lanes."""
    q, scale, zero = table(5, 4096, dtype, 64, HALF, zero_points)
    with emulation(checked=True) as run:
        K.embedding_dequantize(torch.tensor([3, 0, 4]), pack_table(q, dtype), scale, zero, dtype, 4096, 64)
    ((_, profile),) = run.profiles
    assert profile.traffic <= 1.02 * work(3, 4096, dtype, HALF, group=64, zero_points=zero_points).bytes


def test_what_does_not_fit_is_an_error():
    q, scale, _ = table(3, 16, "int8", 0, FLOAT, False)
    packed = pack_table(q, "int8")
    with emulation(), pytest.raises(LoweringError, match="the kernel reads int64"):
        K.embedding_dequantize(torch.tensor([1], dtype=torch.int32), packed, scale, None, "int8", 16, 0)
    with emulation(), pytest.raises(LoweringError, match="3 scales do not fit 3 rows of 2 groups each"):
        K.embedding_dequantize(torch.tensor([1]), packed, scale, None, "int8", 16, 8)


def test_shapes_are_known_without_running():
    q, scale, zero = table(5, 24, "int4", 8, HALF, True)
    packed, checks = pack_table(q, "int4"), ("test_schema", "test_faketensor")
    with emulation():
        ids = torch.tensor([[1, 2]])
        torch.library.opcheck(K.embedding_dequantize.default, (ids, packed, scale, zero, "int4", 24, 8), test_utils=checks)
        torch.library.opcheck(K.dequantize.default, (q, scale, zero, 8), test_utils=checks)
        for dtype in ("int4", "uint8"):
            torch.library.opcheck(K.unpack.default, (packed, dtype, 12), test_utils=checks)
