"""w8a8_gemm.cu with CONV, emulated, against qgraph.reference.quantized_conv: equal bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import reference
from qgraph.backends.cupy import w8a8, w8a8_conv
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.w8a8 import MEDIUM, Config, pack_bias
from qgraph.backends.cupy.w8a8_conv import pack_conv, unpack_conv
from qgraph.errors import LoweringError

ONE = torch.ones(1)


def integers(*shape, dtype=torch.int8):
    return torch.randint(-128, 128, shape).to(dtype) if dtype == torch.int8 else torch.randint(0, 256, shape, dtype=dtype)


def call(x, x_scale, x_zero, weight, w_scale, bias, window, y_scale=None, y_zero=None, y_dtype=None):
    p = pack_conv(weight, w_scale)
    biases = None if bias is None else pack_bias(bias)
    kernel = list(weight.shape[2:])
    return K.w8a8_conv(x, x_scale, x_zero, p.weight, p.scale, p.sums, biases, w_scale.dtype, kernel, *window, y_scale, y_zero, y_dtype)


def agrees(x, weight, window, *, x_zero=None, bias=None, y=(None, None, None), **how):
    """The kernel equals the reference; what the emulation saw."""
    x_scale, w_scale = torch.rand(1), torch.rand(weight.shape[0])
    dtype = str(x.dtype).removeprefix("torch.")
    expected = reference.quantized_conv(x, x_scale, x_zero, dtype, weight, w_scale, None, "int8", bias, *window, 1, *y)
    with emulation(**how) as seen:
        got = call(x, x_scale, x_zero, weight, w_scale, bias, window, *y)
    assert got.dtype == expected.dtype and got.movedim(1, -1).is_contiguous()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    return seen


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_equals_the_reference_for_any_window(data):
    axes, size = data.draw(st.integers(1, 2)), st.integers(1, 3)
    many = st.lists(size, min_size=axes, max_size=axes)
    kernel, stride, dilation = data.draw(many), data.draw(many), data.draw(many)
    padding = data.draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    spatial = [
        max(1, d * (k - 1) + 1 - padding[i] - padding[axes + i]) + data.draw(st.integers(0, 6))
        for i, (k, d) in enumerate(zip(kernel, dilation, strict=True))
    ]
    b, c, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    x = integers(b, c, *spatial, dtype=data.draw(st.sampled_from([torch.int8, torch.uint8])))
    x_zero = data.draw(st.sampled_from([None, integers(1, dtype=x.dtype)]))
    bias = data.draw(st.sampled_from([None, torch.randn(n), torch.randint(-1000, 1000, (n,), dtype=torch.int32)]))
    window = (stride, padding, dilation)
    agrees(x, integers(n, c, *kernel), window, x_zero=x_zero, bias=bias, schedule=data.draw(st.sampled_from([0, 1, 7])))


def test_requantizes():
    x = integers(2, 20, 5, 6, dtype=torch.uint8)
    y = (torch.tensor([40.0]), torch.tensor([7], dtype=torch.uint8), "uint8")
    agrees(x, integers(5, 20, 3, 3), ([1, 2], [1, 1, 1, 0], [1, 1]), x_zero=integers(1, dtype=torch.uint8), y=y)


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_start_inside_of_a_tap_and_no_access_is_out_of_bounds(splits, monkeypatch):
    """K = 9 * 48 in tiles of 64: a tile spans taps, and a split begins within one."""
    monkeypatch.setattr(w8a8_conv, "split", lambda *_: Config(MEDIUM, splits))
    x, weight = integers(2, 48, 5, 7), integers(9, 48, 3, 3)
    ((_, profile),) = agrees(x, weight, ([1, 1], [1, 1, 1, 1], [1, 1]), bias=torch.randn(9), checked=True, schedule=7).profiles
    assert profile.bank_conflicts == 0


def test_an_image_with_its_channels_last_is_not_copied():
    x = integers(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    assert w8a8_conv._image(x, None, [0, 0, 0, 0]).data_ptr() == x.data_ptr()
    agrees(x, integers(6, 32, 1, 1), ([1, 1], [0] * 4, [1, 1]))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_unpack_inverts_pack(n, c, kernel):
    weight = integers(n, c, *kernel)
    assert torch.equal(unpack_conv(pack_conv(weight, ONE), weight.shape), weight)
    unsigned = (weight.int() + 128).to(torch.uint8)
    assert torch.equal(unpack_conv(pack_conv(unsigned, ONE, torch.tensor([128], dtype=torch.uint8)), weight.shape), weight)


def test_weights_that_keep_their_zero_points_are_refused():
    with pytest.raises(LoweringError, match="leave int8 when their zero points are subtracted"):
        pack_conv(torch.tensor([[[[-128, 127]]]], dtype=torch.int8), ONE, torch.tensor([5], dtype=torch.int8))


def test_three_spatial_axes_and_older_devices_are_refused(monkeypatch):
    with emulation():
        with pytest.raises(LoweringError, match=r"no kernel convolves x \[1, 16, 2, 2, 2\]"):
            call(integers(1, 16, 2, 2, 2), ONE, None, integers(1, 16, 1, 1, 1), ONE, None, ([1] * 3, [0] * 6, [1] * 3))
        monkeypatch.setattr(w8a8_conv, "device_of", lambda _: (75, 40))
        with pytest.raises(LoweringError, match="sm_80 or newer, not sm_75"):
            call(integers(1, 16, 2, 2), ONE, None, integers(1, 16, 1, 1), ONE, None, ([1] * 2, [0] * 4, [1] * 2))


def test_the_op_has_a_schema_and_shapes_that_hold():
    p = pack_conv(integers(5, 20, 3, 3), ONE)
    arguments = (integers(2, 20, 6, 5), ONE, None, p.weight, p.scale, p.sums, None, torch.float32, [3, 3], [1, 2], [1, 1, 0, 0], [1, 1])
    with emulation():
        torch.library.opcheck(w8a8_conv.w8a8_conv, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_output_has_a_kernel_that_is_checked():
    assert {w8a8.gemm(MEDIUM, out, unsigned=u, conv=True) for out in w8a8.OUT.values() for u in (False, True)} == set(w8a8_conv.KERNELS)
    assert w8a8_conv.work((1, 16, 8, 8), (32, 16, 3, 3), (1, 32, 8, 8)).int8_ops == 2 * 32 * 64 * 16 * 9
