"""Scales as 8-bit integers times a float: exact products that are found again, a smaller file with the same numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qgraph
from qgraph.double_scales import factored, nearest, run_length
from qgraph.errors import RecipeError
from qgraph.passes import DoubleScales, InsertFakeQuant
from qgraph.pipeline import Context
from qgraph.views import FakeQuantize, const_value, view


@given(st.integers(0, 2**32 - 1), st.sampled_from([16, 48, 64, 250]), st.floats(-30, 3))
def test_scales_made_of_integers_are_found_again_bit_for_bit(seed, length, exponent):
    rng = np.random.default_rng(seed)
    scale = torch.from_numpy((rng.uniform(0.05, 1, (6, length)) * rng.choice([-1, 1], (6, length)) * 10.0**exponent).astype(np.float32))
    found = nearest(scale, length)
    assert found.q.dtype == torch.int8 and bool((found.q != 0).all()) and int(found.q.abs().amax()) == 127
    exact = found.q.double() * found.d.double()
    assert torch.equal(found.value.double(), exact)
    assert float(((found.value - scale) / scale.abs().amax(1, keepdim=True)).abs().max()) <= 0.5 / 127 * 1.001
    again = factored(found.value.reshape(3, -1))
    assert again is not None and torch.equal(again.value.reshape(-1), found.value.reshape(-1))


def test_ordinary_scales_are_not_taken_for_products():
    assert factored(torch.rand(8, 64) + 0.1) is None
    assert factored(torch.ones(13)) is None  # no run of 16


def test_equal_and_zero_scales_are_products():
    scale = torch.full((4, 32), 0.3)
    scale[1] = 0
    made = nearest(scale, 32).value
    found = factored(made)
    assert found is not None and torch.equal(found.value.reshape(4, 32), made) and not bool(made[1].any())


def test_runs_divide_the_number_of_scales():
    assert [run_length(n, 64) for n in (27648, 576 * 18, 17, 34, 96)] == [64, 64, 17, 34, 48]
    assert run_length(2 * 13, 25) is None and run_length(7, 64) is None


class Net(nn.Module):
    def __init__(self, half=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(256, 192), nn.Linear(192, 40)
        with torch.no_grad():
            self.a.weight *= torch.rand(192, 1) + 0.2
        if half:
            self.half()

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


X = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))


def prepared(recipe="w4a16-g32-sym", module=None, x=X):
    gm = qgraph.prepare(module or Net().eval(), (x,), recipe=recipe)
    InsertFakeQuant().run(gm, Context())
    return gm


def scales(gm):
    return [const_value(v.scale) for n in gm.graph.nodes if (v := view(FakeQuantize, n)) is not None]


def test_the_pass_changes_scales_by_half_a_step_and_a_second_run_changes_nothing():
    gm = prepared()
    before, text = scales(gm), qgraph.text(gm)
    assert DoubleScales(size=64).run(gm, Context()) == 2
    assert [s.shape for s in scales(gm)] == [s.shape for s in before]
    for old, new in zip(before, scales(gm), strict=True):
        assert 0 < float((old - new).abs().max() / old.abs().max()) <= 0.5 / 127 * 1.001
        assert factored(new) is not None
    assert qgraph.text(gm).count("fake_quantize") == text.count("fake_quantize")
    assert DoubleScales(size=64).run(gm, Context()) == 0
    assert [e.reason for e in gm.meta["qgraph"].ledger if e.role == "weight"] == [
        "scales in 8 bits, with a float for 64 of them",
        "scales in 8 bits, with a float for 60 of them",
    ]


def test_scales_per_channel_stay_and_float16_scales_are_declined():
    assert DoubleScales().run(prepared("w8a16"), Context()) == 0
    ctx = Context()
    assert DoubleScales().run(prepared(module=Net(half=True).eval(), x=X.half()), ctx) == 0
    assert {d.reason for d in ctx.declines} == {f"scales of {n}.weight are float16, of which 8 bits are no small part" for n in "ab"}


def test_scales_that_no_run_divides_are_declined():
    ctx = Context()
    assert DoubleScales().run(prepared(module=nn.Linear(64, 13).eval(), x=torch.randn(2, 64)), ctx) == 1
    assert DoubleScales(size=16).run(prepared(module=nn.Linear(64, 13).eval(), x=torch.randn(2, 64)), ctx) == 0
    assert [d.reason for d in ctx.declines] == ["26 scales of weight cannot be cut into equal runs of 16 to 16"]


def test_an_onnx_model_gets_the_scales_of_the_torch_model(tmp_path):
    made = tmp_path / "net.onnx"
    torch.onnx.export(Net().eval(), (X,), str(made), verbose=False)
    from_torch, from_file = prepared(), qgraph.prepare(made, recipe="w4a16-g32-sym")
    InsertFakeQuant().run(from_file, Context())
    for gm in (from_torch, from_file):
        assert DoubleScales().run(gm, Context()) == 2
    for a, b in zip(scales(from_torch), scales(from_file), strict=True):
        assert torch.equal(a, b if a.shape == b.shape else b.T)


def test_an_impossible_size_is_an_error():
    with pytest.raises(RecipeError, match="from 16 to 256 scales, not 8"):
        qgraph.load_recipe("w4a16-g32", ["stages=[{double-scales: {size: 8}}]"])


def test_the_file_is_smaller_and_the_program_runs_the_same_kernel_on_the_same_numbers(tmp_path):
    sizes = {}
    for recipe in ("w4a16-g32-sym", "w4a16-g32-sym+double-scales"):
        gm = qgraph.quantize(Net().eval(), example_inputs=(X,), recipe=recipe)
        program = qgraph.lower(gm, strict=True)
        assert [k.became for k in program.kernels()] == ["MatMulNBits", "MatMulNBits"]
        with torch.no_grad():
            assert float((program(X) - gm(X)).norm() / gm(X).norm()) < 1e-5
        program.save(tmp_path / "m.onnx")
        sizes[recipe] = (tmp_path / "m.onnx").stat().st_size
    plain, doubled = sizes.values()
    assert 192 * 8 * 3 - 1500 < plain - doubled < 192 * 8 * 3  # the larger layer saves 3 of 4 bytes of its scales
