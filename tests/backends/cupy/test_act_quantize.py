"""act_quantize is torch's activation and product, then the reference's quantization: integers one step apart at most, and seldom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qgraph import reference
from qgraph.backends.cupy.act_quantize import ACTS, work
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.ops import K
from qgraph.errors import LoweringError

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
TORCH = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
APART = {FLOAT: 2e-3, HALF: 2e-3, BFLOAT: 2e-2}
"""The share of integers that may be a step apart."""


def values(*shape, dtype, seed=0):
    """Rows of different sizes."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random).add(0.3) * torch.exp(torch.randn(*shape[:-1], 1, generator=random))).to(dtype)


def agree(gate, up, act, dtype, symmetric, scale=None, zero=None, schedule=0, checked=False):
    with emulation(schedule=schedule, checked=checked):
        q, s, z, sums = K.act_quantize(gate, up, act, scale, zero, dtype, symmetric, True)
    y = TORCH[act](gate)
    y = y if up is None else y * up
    assert torch.equal(sums, q.sum(-1, keepdim=True, dtype=torch.int32))
    if scale is None:
        expected, es, ez = reference.dynamic_quantize(y, dtype, symmetric, -1, -1)
        torch.testing.assert_close(s, es, rtol=1e-5 if gate.dtype == FLOAT else torch.finfo(gate.dtype).eps, atol=0)
        assert bool(((z.int() - ez.int()).abs() <= 1).all())
    else:
        expected = reference.quantize(y, scale, zero, dtype)
    steps = (q.int() - expected.int()).abs()
    assert steps.max() <= 1
    assert steps.float().mean() <= APART[gate.dtype]


@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("dtype", "k"), [(HALF, 576), (HALF, 1536), (HALF, 14337), (FLOAT, 101), (BFLOAT, 2048)])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_rows_are_activated_and_quantized(dtype, k, act, data):
    seed, flag = data.draw(st.integers(0, 99)), st.booleans()
    gate = values(*data.draw(st.sampled_from([(1, 1), (5,), (3, 2)] if k < 4096 else [(1,), (2,)])), k, dtype=dtype, seed=seed)
    up = values(*gate.shape, dtype=dtype, seed=seed + 1) if data.draw(flag) else None
    static = data.draw(flag)
    scale, zero = (torch.tensor(0.04), torch.tensor(-7, dtype=torch.int8)) if static else (None, None)
    integers = "int8" if static else data.draw(st.sampled_from(["int8", "uint8"]))
    agree(gate, up, act, integers, data.draw(flag), scale, zero, data.draw(st.sampled_from([0, 1, 7])))


@pytest.mark.parametrize("k", [64, 100])
def test_no_access_leaves_the_tensors(k):
    agree(values(7, k, dtype=HALF), values(7, k, dtype=HALF, seed=1), "silu", "uint8", False, checked=True)


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_elements_are_rounded_as_vectors_are(act):
    """Rows of 7 have no whole vector; with a zero behind them they are one."""
    gate, up = (values(64, 7, dtype=HALF, seed=seed) for seed in (0, 1))
    with emulation():
        q, scale, *_ = K.act_quantize(gate, up, act, None, None, "int8", True, False)
        wide, expected, *_ = K.act_quantize(F.pad(gate, (0, 1)), F.pad(up, (0, 1)), act, None, None, "int8", True, False)
    assert torch.equal(scale, expected)
    assert torch.equal(q, wide[:, :7])


def test_large_arguments_saturate_as_torch_has_it():
    gate = torch.tensor([[torch.nan, -3e38, 3e38, -100.0, 100.0, -50.0, 50.0, 0.0, -0.0]])
    scale = torch.tensor(0.5)
    for act, fn in TORCH.items():
        with emulation():
            q, *_ = K.act_quantize(gate, None, act, scale, None, "int8", True, False)
        assert torch.equal(q, reference.quantize(fn(gate), scale, None, "int8")), act


def test_halves_of_one_matrix_are_read_where_they_lie_and_once():
    wide = values(8, 2048, dtype=HALF)
    gate, up = wide[:, :1024], wide[:, 1024:]
    agree(gate, up, "silu", "int8", True)
    with emulation(checked=True) as run:
        K.act_quantize(gate, up, "silu", None, None, "int8", True, False)
    (_, profile), least = run.profiles[0], work(8, 1024, HALF).bytes
    assert (profile.unique, profile.sector_efficiency, profile.bank_conflicts) == (least, 1.0, 0)
    assert profile.traffic <= 1.05 * least


def test_what_does_not_fit_is_an_error():
    x = torch.randn(4, 8)
    assert set(ACTS) == set(TORCH)
    with emulation(), pytest.raises(LoweringError, match="no kernel for the activation relu"):
        K.act_quantize(x, None, "relu", None, None, "int8", True, False)
    with emulation(), pytest.raises(LoweringError, match="the kernel needs the same"):
        K.act_quantize(x, x[:2], "silu", None, None, "int8", True, False)


def test_shapes_are_known_without_running():
    x = torch.randn(2, 5, 16, dtype=HALF)
    with emulation():
        for scale, sums in ((None, True), (torch.tensor(0.1), False)):
            arguments = (x, x.clone(), "silu", scale, None, "uint8", False, sums)
            torch.library.opcheck(K.act_quantize.default, arguments, test_utils=("test_schema", "test_faketensor"))
