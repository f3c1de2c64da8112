"""norm_quantize is torch's norm, then the reference's quantization: integers one step apart at most, and only where y lies on a border."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qgraph import reference
from qgraph.backends.cupy import norm_quantize
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.norm_quantize import work
from qgraph.backends.cupy.ops import K
from qgraph.errors import LoweringError

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
APART = {FLOAT: 2e-3, HALF: 2e-3, BFLOAT: 2e-2}
"""The share of integers that may be a step apart: y is rounded to its type, and one rounding in some hundred may differ."""


def values(*shape, dtype, seed=0):
    """Rows of different sizes around a mean."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random).add(2) * torch.exp(torch.randn(*shape[:-1], 1, generator=random))).to(dtype)


def norm(x, weight, bias, eps, layer):
    """Torch's, in float64, rounded once."""
    wide, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    if layer:
        return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype)
    y = F.rms_norm(wide, x.shape[-1:], weight, eps)
    return (y if bias is None else y + bias).to(x.dtype)


def agree(x, residual, weight, bias, layer, dtype, symmetric, scale=None, zero=None, schedule=0, checked=False):
    eps = 1e-5
    with emulation(schedule=schedule, checked=checked):
        q, s, z, sums, h, y = K.norm_quantize(x, residual, weight, bias, eps, layer, scale, zero, dtype, symmetric, True, True)
    total = x if residual is None else x + residual
    expected = norm(total, weight, bias, eps, layer)
    assert h.numel() == 0 if residual is None else torch.equal(h, total)
    assert torch.equal(sums, q.sum(-1, keepdim=True, dtype=torch.int32))
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-5)
    if scale is None:
        eq, es, ez = reference.dynamic_quantize(expected, dtype, symmetric, -1, -1)
        torch.testing.assert_close(s, es, rtol=1e-5 if x.dtype == FLOAT else torch.finfo(x.dtype).eps, atol=0)
        assert bool(((z.int() - ez.int()).abs() <= 1).all())
        exact = reference.dynamic_quantize(y, dtype, symmetric, -1, -1)
        assert all(torch.equal(a, b) for a, b in zip((q, s, z), exact, strict=True)), "y itself is quantized bit for bit"
    else:
        eq = reference.quantize(expected, scale, zero, dtype)
        assert torch.equal(q, reference.quantize(y, scale, zero, dtype))
    steps = (q.int() - eq.int()).abs()
    assert steps.max() <= 1
    assert steps.float().mean() <= APART[x.dtype]


@pytest.mark.parametrize(
    ("dtype", "k"), [(HALF, 576), (HALF, 101), (HALF, 4096), (HALF, 16384), (HALF, 33000), (FLOAT, 384), (BFLOAT, 2048)]
)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_rows_are_normalised_and_quantized(dtype, k, data):
    seed, flag = data.draw(st.integers(0, 99)), st.booleans()
    x = values(*data.draw(st.sampled_from([(1, 1), (5,), (3, 2)] if k < 4096 else [(1,), (2,)])), k, dtype=dtype, seed=seed)
    residual, weight, bias = (values(*shape, dtype=dtype, seed=seed + 1) if data.draw(flag) else None for shape in (x.shape, (k,), (k,)))
    static = data.draw(flag)
    scale, zero = (torch.tensor(0.04), torch.tensor(7, dtype=torch.int8)) if static else (None, None)
    integers = "int8" if static else data.draw(st.sampled_from(["int8", "uint8"]))
    schedule = data.draw(st.sampled_from([0, 1, 7]))
    agree(x, residual, weight, bias, data.draw(flag), integers, data.draw(flag), scale, zero, schedule)


@pytest.mark.parametrize("k", [64, 100])
def test_no_access_leaves_the_tensors(k):
    x, residual, weight, bias = (values(*shape, dtype=HALF, seed=i) for i, shape in enumerate([(7, k), (7, k), (k,), (k,)]))
    agree(x, residual, weight, bias, True, "uint8", False, checked=True)


def test_the_variance_survives_a_large_mean():
    """In one pass, mean(x^2) - mean(x)^2, float32 would lose all of it; so only the mean's own rounding, 5e-4, is seen."""
    x = torch.randn(3, 256) + 1e4
    with emulation():
        *_, y = K.norm_quantize(x, None, None, None, 1e-5, True, None, None, "int8", True, False, True)
    torch.testing.assert_close(y, norm(x, None, None, 1e-5, True), rtol=1e-5, atol=2e-3)


def test_a_row_of_equal_elements_and_one_with_a_nan():
    x = torch.ones(3, 64)
    x[2, 5] = torch.nan
    with emulation():
        q, scale, *_ = K.norm_quantize(x, None, None, None, 1e-5, True, None, None, "int8", True, False, False)
    assert scale.flatten().tolist() == [1, 1, 1]
    assert (q[:2] == 0).all()
    assert (q[2] == -128).all()


@pytest.mark.parametrize(("rows", "k"), [(48, 2048), (145, 1024)])
@pytest.mark.parametrize(("residual", "keep_y"), [(False, False), (True, True)])
def test_what_is_read_once_comes_from_memory_once(rows, k, residual, keep_y, monkeypatch):
    """And the weight once for each block, on a device that gets three blocks of 256 threads. Rows of several warps, whose sums share an array
    without a race, and of one."""
    monkeypatch.setattr(norm_quantize, "device_of", lambda device: (80, 1))
    x, rest, weight = (values(*shape, dtype=HALF, seed=i) for i, shape in enumerate([(rows, k), (rows, k), (k,)]))
    with emulation(checked=True) as run:
        K.norm_quantize(x, rest if residual else None, weight, None, 1e-6, True, None, None, "int8", True, False, keep_y)
    (_, profile), least = run.profiles[0], work(rows, k, HALF, residual=residual, keep_y=keep_y).bytes
    assert (profile.unique, profile.sector_efficiency, profile.bank_conflicts) == (least, 1.0, 0)
    assert profile.traffic <= 1.05 * least


@pytest.mark.parametrize("k", [64, 101, 1100])
def test_blocks_do_several_rows_where_rows_are_many(k, monkeypatch):
    monkeypatch.setattr(norm_quantize, "device_of", lambda device: (80, 1))
    x, residual, weight, bias = (values(*shape, dtype=HALF, seed=i) for i, shape in enumerate([(53, k), (53, k), (k,), (k,)]))
    agree(x, residual, weight, bias, True, "uint8", False, checked=True, schedule=7)


def test_what_does_not_fit_is_an_error():
    x = torch.randn(4, 8)
    with emulation(), pytest.raises(LoweringError, match="weight is torch.float32"):
        K.norm_quantize(x, None, torch.ones(4), None, 1e-5, True, None, None, "int8", True, False, False)
    with emulation(), pytest.raises(LoweringError, match="residual is torch.float16"):
        K.norm_quantize(x, x.half(), None, None, 1e-5, True, None, None, "int8", True, False, False)


def test_shapes_are_known_without_running():
    x = torch.randn(2, 5, 16, dtype=HALF)
    with emulation():
        for residual, scale, keep_y in ((None, None, False), (x.clone(), torch.tensor(0.1), True)):
            arguments = (x, residual, None, None, 1e-5, True, scale, None, "uint8", False, True, keep_y)
            torch.library.opcheck(K.norm_quantize.default, arguments, test_utils=("test_schema", "test_faketensor"))
