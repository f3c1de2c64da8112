"""Where ONNX Runtime's CPU provider computes in integers, and which formats it takes (measured with 1.31 on AVX512-VNNI).

Reasons for what is left out: integer convolution with run-time ranges (ConvInteger) takes 4 to 5.5 times the float kernel's time;
16-bit activations are not fused at all; int4 weights have kernels for matrix products and embeddings only.

Of the functions with a kernel on bytes, time between integer neighbours over that of dequantize, function, quantize (on [1, 64, 40, 40], two
threads): leaky_relu 0.7 follows; softmax 5.2 (on [1, 12, 128, 128]) stays float; sigmoid 0.65, but nearly always a gate: with its product 1.5 as a
SiLU, whose float kernel is one pass, and as a gate of [1, C, 1, 1] nothing to gain; tanh and hard_sigmoid have no kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qgraph.backend import ALL, Placement
from qgraph.cost import Kernel, Machine, work_of
from qgraph.types import PerGroup, PerToken, QSpec
from qgraph.views import Activation, Concat, Conv, DataMovement, Elementwise, Embedding, Linear, Pool, const_value

BLOCKS = (16, 32, 64, 128, 256)
"""Group sizes of MatMulNBits."""

SIMULATED = "; prepared for the backend 'reference' they are simulated"
"""Behind refusals of formats that no kernel has."""


def _accepts(operation: Any, role: str, spec: QSpec) -> str | None:
    if role == "weight alone":
        return None
    if role == "kv_cache":
        return f"attention reads floats here; the backend 'cupy' stores {spec.bits} bits{SIMULATED}"
    if role == "weight":
        return _accepts_weight(operation, spec)
    if isinstance(operation, Conv) and operation.transposed:
        return "there is no integer kernel for transposed convolution"
    return (isinstance(operation, Linear) and _obstacle(operation)) or _accepts_x(spec)


def _obstacle(linear: Linear) -> str | None:
    """What a general Gemm may have and integer products have not."""
    if linear.x_axis != -1:
        return "integer kernels take no transposed x"
    if linear.alpha != 1 or (linear.bias is not None and linear.beta != 1):
        return "integer kernels have no factors alpha and beta"
    bias = const_value(linear.bias) if linear.bias is not None else None
    if bias is not None and bias.dim() > 1 and bias.shape[0] != 1:
        return "integer kernels take one bias per output channel, not a matrix"
    return None


def _accepts_weight(operation: Any, spec: QSpec) -> str | None:
    if spec.codebook is not None:
        return None  # looked up once, when the model is loaded
    if isinstance(spec.granularity, PerGroup):
        if isinstance(operation, Linear) and (spec.bits > 8 or spec.group not in BLOCKS):
            return f"MatMulNBits takes at most 8 bits in groups of {', '.join(map(str, BLOCKS))}, not {spec}"
        return None
    if not spec.signed or not spec.symmetric:
        return f"integer kernels are fast with signed symmetric weights, not with {spec}; groups may be asymmetric"
    if spec.bits > 8:
        return f"weights have at most 8 bits, not {spec.bits}"
    return None


def _accepts_x(spec: QSpec) -> str | None:
    if isinstance(spec.granularity, PerGroup):
        ok = spec.symmetric and spec.signed and spec.bits == 8
        return None if ok else f"rows are quantized per weight block to int8, symmetric, not to {spec}"
    if isinstance(spec.granularity, PerToken):
        return None if spec.bits == 8 else f"rows with a scale each have 8 bits in integer kernels, not {spec.bits}{SIMULATED}"
    if spec.bits != 8:
        return f"activations have 8 bits in integer kernels, not {spec.bits}{SIMULATED}"
    if spec.signed:
        return f"kernels are fast with uint8 activations, not with {spec}; set activations.unsigned"
    return "run-time ranges are asymmetric (DynamicQuantizeLinear)" if spec.dynamic and spec.symmetric else None


PLACEMENT = Placement(
    compute=(Linear, Conv),
    dynamic=(Linear,),
    weight_only=(Linear, Conv, Embedding),
    always_output=(Conv,),  # a quantized convolution without a quantized output stays a float one
    follow={
        Elementwise: frozenset({"add", "mul"}),
        Activation: frozenset({"leaky_relu"}),
        Concat: ALL,
        Pool: frozenset({"average", "global_average"}),
    },
    share={Pool: frozenset({"max"}), DataMovement: ALL},
    absorb=frozenset({"relu", "clip"}),
    accepts=_accepts,
)


MACHINE = Machine(
    float32=Kernel(rate=200e3, thin=110e3, bandwidth=80e3, width=4),
    int8=Kernel(rate=650e3, thin=77e3, bandwidth=40e3, width=1),
    convert=12e3,
)
"""Two cores with AVX512-VNNI, measured: dense convolutions and linears take 0.26 to 0.31 of the float time, thin convolutions 1.4 to 2.9
times with conversions (the kernel of a depthwise 5x5 on [1, 240, 12, 80]: 43 us in float, 75 in integers). tests/bench/cost.py prints
estimates beside what single operations take."""


def pays(operation: Any, spec: QSpec, from_float: bool, to_float: bool) -> str | None:
    """Convolutions with static ranges by the cost model; linears pay from the sizes on that matter."""
    work = work_of(operation) if isinstance(operation, Conv) and not spec.dynamic else None
    gain = MACHINE.gain(work, quantize=from_float, dequantize=to_float) if work is not None else 1.0
    if work is None or gain > 0:
        return None
    slower = MACHINE.float32.time(work) / (MACHINE.float32.time(work) - gain)
    return f"float takes about {slower:.2f} of the time of integers with the conversions around them"


PAYING = replace(PLACEMENT, pays=pays)
"""Float where integers are not faster; `OnnxRuntime(placement=PLACEMENT)` has integers wherever there is a kernel."""
