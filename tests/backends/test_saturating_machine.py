"""ONNX Runtime on an emulated machine that adds pairs of products in 16 bits: exact where models are made for it, badly wrong without.

The emulator is qemu's user mode (Debian package qemu-user, which .ci/run installs); the emulated process loads numpy and ONNX Runtime."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import qgraph
from tests.everywhere import EVERYWHERE

QEMU = shutil.which("qemu-x86_64")
pytestmark = pytest.mark.skipif(
    QEMU is None or platform.machine() != "x86_64", reason="needs qemu-x86_64 (apt-get install qemu-user) on an x86-64 machine"
)

HASWELL = """
import sys
import numpy as np
import onnxruntime as ort
for path in sys.argv[1:]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.save(path + ".y.npy", session.run(None, {session.get_inputs()[0].name: np.load(path + ".x.npy")})[0])
"""


@dataclass(frozen=True)
class Product:
    """MatMul and Add, or Conv, at its worst: all weights and activations are as large as they can be, in the last channel alone not."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    recipe: str = "w8a8"
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        channels = self.weight[0]
        weight = np.ones(self.weight, np.float32)
        weight[0], weight[-1] = -1, np.linspace(-1, 1, weight[0].size).reshape(weight[0].shape)
        bias = np.linspace(-1, 2, channels, dtype=np.float32)
        if len(self.weight) == 2:
            nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
        else:
            nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], **self.attributes)]
        stored = [numpy_helper.from_array(np.ascontiguousarray(weight.T) if len(self.weight) == 2 else weight, "w")]
        stored.append(numpy_helper.from_array(bias, "b"))
        x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", self.x), ("y", [None] * len(self.x))))
        return helper.make_model(
            helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
        )


WORST = {
    "linear": Product((5, 64), (8, 64)),
    "row": Product((1, 66), (8, 66)),
    "rows": Product((2, 3, 64), (8, 64)),
    "dynamic": Product((5, 64), (8, 64), "w8a8-dynamic"),
    "groups": Product((5, 64), (8, 64), "w8a8-g32"),
    "conv": Product((1, 6, 5, 5), (8, 6, 3, 3)),
    "stem": Product((1, 3, 8, 8), (8, 3, 3, 3), attributes={"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "pointwise": Product((1, 8, 4, 4), (8, 8, 1, 1)),
    "grouped": Product((1, 8, 5, 5), (8, 4, 3, 3), attributes={"group": 2}),
    "depthwise": Product((1, 8, 5, 5), (8, 1, 3, 3), attributes={"group": 8}),
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> dict[tuple[str, bool], float]:
    """(model, made for this machine) -> relative error of the emulated machine's output, against the reference in torch. All in one process."""
    folder, want = tmp_path_factory.mktemp("saturation"), {}
    for name, case in WORST.items():
        x = torch.ones(case.x)
        for safe in (True, False):
            path = folder / f"{name}-{safe}.onnx"
            backend = replace(EVERYWHERE, target="x86-avx2") if safe else EVERYWHERE
            gm = qgraph.quantize(case.model(), [(x,)], recipe=case.recipe, backend=backend, output=path)
            want[name, safe] = gm(x)[0].detach().numpy()
            np.save(f"{path}.x.npy", x.numpy())
    paths = [str(folder / f"{name}-{safe}.onnx") for name, safe in want]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if Path(p).is_dir())}
    command = [str(QEMU), "-cpu", "Haswell", sys.executable, "-c", HASWELL, *paths]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return {case: _error(np.load(f"{path}.y.npy"), want[case]) for case, path in zip(want, paths, strict=True)}


def _error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", WORST)
def test_sums_are_exact_where_the_proof_says_so(name, emulated) -> None:
    assert emulated[name, True] < 0.01


@pytest.mark.parametrize("name", WORST)
def test_without_it_they_are_wrong_where_the_proof_fails(name, emulated) -> None:
    saturates = name not in ("groups", "depthwise")
    assert (emulated[name, False] > 0.4) == saturates, emulated[name, False]
