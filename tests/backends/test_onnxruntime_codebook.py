"""Codebooks in ONNX files: packed on disk, looked up once, at load."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from qgraph.backends.onnxruntime.codebook import planes
from qgraph.backends.onnxruntime.kernels import optimized_graph
from qgraph.backends.onnxruntime.runtime import Options
from tests.small import mlp_proto, samples

FORMATS = ["nf4-g16", "nf4-g10", "w4a16-nf", "w2a16-nf-tensor", "w3a16-kmeans", "w5a16-kmeans-g16", "w4a16-kmeans-tensor", "w4a16-log-g32"]


def optimized(path, folder) -> onnx.GraphProto:
    return optimized_graph(str(path), str(folder), Options())


def kinds(graph: onnx.GraphProto) -> set[str]:
    return {n.op_type for n in graph.node}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_planes_hold_every_bit_once(bits: int, eighths: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (8 * eighths,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    found, total = torch.zeros(len(codes), dtype=torch.int64), 0
    for shift, width, data in planes(codes, bits):
        assert data.dtype == torch.uint8 and len(data) * 8 // width == len(codes)
        for i in range(len(codes)):
            byte = int(data[i * width // 8])
            found[i] |= (byte >> (i * width % 8) & (2**width - 1)) << shift
        total += len(data)
    assert torch.equal(found, codes.long()) and total * 8 == bits * len(codes)


@pytest.mark.parametrize("recipe", FORMATS)
def test_onnx_models_compute_what_the_reference_does_and_look_up_at_load(recipe: str, tmp_path) -> None:
    x, path = samples(7), tmp_path / "small.onnx"
    quantized = qgraph.quantize(mlp_proto(), recipe=recipe, output=path)
    onnx.checker.check_model(str(path), full_check=True)
    program = qgraph.lower(quantized, strict=True)
    want = quantized(torch.from_numpy(x))
    want = want[0] if isinstance(want, tuple | list) else want
    assert np.abs(program(x) - want.numpy()).max() < 1e-5
    assert all(k.fused for k in program.kernels()) and len(program.kernels()) == 2
    written = kinds(onnx.load(path).graph)
    assert written & {"Gather", "GatherElements"}
    whole = recipe.startswith(("nf4", "w4a16-nf", "w2a16-nf", "w4a16-log", "w4a16-kmeans-tensor"))
    assert ("BitShift" in written) is not whole, "bytes that hold whole codes need no shifts"
    assert kinds(optimized(path, tmp_path)) <= {"MatMul", "Add", "Relu", "Gemm", "FusedGemm", "FusedMatMul"}
    with pytest.raises(qgraph.ModelError, match="quantized already"):
        qgraph.prepare(path, recipe="w8a16")


class Net(torch.nn.Module):
    """A table, a convolution, and a linear behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(40, 24)
        self.conv = torch.nn.Conv1d(24, 10, 3, groups=2)
        self.head = torch.nn.Linear(10, 33)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.table(ids).mT).mT)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["nf", "kmeans"])
def test_tables_convolutions_and_halves_of_torch_models(name: str, half: bool, tmp_path) -> None:
    net, ids = Net().eval(), torch.arange(12).reshape(2, 6) * 3
    net = net.half() if half else net
    each = {"bits": 4, "codebook": name}
    recipe = qgraph.recipe.from_dict({"weights": each, "embeddings": each})
    quantized = qgraph.quantize(net, example_inputs=(ids,), recipe=recipe)
    formats = [e.decision for e in quantized.meta["qgraph"].ledger if e.role == "weight"]
    assert len(formats) == 3 and all(f.startswith(f"{name}4 per axis 0") for f in formats)
    path = qgraph.export(quantized, tmp_path / "net.onnx")
    found, want = qgraph.lower(quantized)(ids), quantized(ids)
    assert found.dtype == want.dtype and torch.allclose(found, want, atol=2e-3 if half else 1e-5)
    assert not kinds(optimized(path, tmp_path)) & {"GatherElements", "BitShift", "BitwiseAnd"}


def test_little_is_computed_on_the_way_to_a_weight(tmp_path) -> None:
    """ONNX Runtime holds all of it, of all weights, while it loads a model."""
    qgraph.quantize(torch.nn.Linear(64, 40), example_inputs=(torch.randn(2, 64),), recipe="nf4-g16", output=tmp_path / "m.onnx")
    nodes = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type not in ("Gemm", "MatMul", "Add")]
    assert sorted(n for n in nodes if n != "Cast") == ["Gather", "Mul", "Reshape"]  # Cast: of bytes, and of what is stored in float16


@pytest.mark.parametrize(("recipe", "bits"), [("w2a16-kmeans", 2), ("w3a16-kmeans", 3), ("w4a16-kmeans", 4), ("nf4-g64", 4)])
def test_a_file_has_as_many_bits_per_weight_as_its_name_says(recipe: str, bits: int, tmp_path) -> None:
    n, k = 200, 640
    layer, x = torch.nn.Linear(k, n, bias=False), torch.randn(1, k)
    path = tmp_path / "layer.onnx"
    qgraph.quantize(layer, example_inputs=(x,), recipe=recipe, output=path)
    overhead = 2 * n * (2**bits if "kmeans" in recipe else k / 64)  # levels or scales, in float16
    assert n * k * bits / 8 + overhead <= path.stat().st_size <= n * k * bits / 8 + overhead + 4096


def test_codes_that_are_an_input_are_looked_up_at_every_run(tmp_path) -> None:
    """What the other tests look for can be found."""
    path = tmp_path / "small.onnx"
    qgraph.quantize(mlp_proto(), recipe="w4a16-nf", output=path)
    model = onnx.load(path)
    codes = next(i for n in model.graph.node if n.op_type == "Cast" for i in model.graph.initializer if i.name == n.input[0])
    model.graph.input.append(onnx.helper.make_tensor_value_info(codes.name, codes.data_type, codes.dims))
    onnx.save(model, path)
    assert "Gather" in kinds(optimized(path, tmp_path))
