"""The CuPy backend as a whole: formats, placement, lowering, the program; kernels run in the emulator."""

import numpy as np
import pytest
import torch

import qgraph
from qgraph.backends.cupy import Cupy, claim, packed_cache
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.weight_packing import pack_weight
from qgraph.errors import LoweringError, ModelError, RecipeError
from tests.small import mlp_proto, samples


class Net(torch.nn.Module):
    """Three linears, ragged in every size, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Linear(100, 128), torch.nn.LayerNorm(128)
        self.second, self.last = torch.nn.Linear(128, 72), torch.nn.Linear(72, 33, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(self.norm(torch.nn.functional.gelu(self.first(x))))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches(count: int = 4) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 7, 100, generator=generator),) for _ in range(count)]


def lowered(net: torch.nn.Module, recipe: str, **options: object) -> tuple[torch.fx.GraphModule, object]:
    gm = qgraph.quantize(net, batches(), example_inputs=batches(1)[0], recipe=recipe, backend="cupy")
    with emulation():
        return gm, qgraph.lower(gm, backend=Cupy(**options), strict=True)


@pytest.mark.parametrize(
    ("recipe", "kernels", "tolerance"),
    [
        ("w8a8", {"quantize_static", "norm_quantize", "w8a8_linear"}, 1e-5),
        ("w8a8-token", {"quantize_rows", "norm_quantize", "w8a8_linear"}, 1e-5),
        ("w8a8-dynamic", {"quantize_tensor", "w8a8_linear"}, 1e-5),
        ("w4a16-g32", {"weight_only_linear"}, 1e-3),
    ],
)
def test_every_linear_runs_a_kernel_and_computes_what_the_reference_computes(net, recipe, kernels, tolerance):
    gm, program = lowered(net, recipe)
    assert {k.became for k in program.kernels()} == kernels and len([k for k in program.kernels() if "linear" in k.became]) == 3
    (x,) = batches(1)[0]
    expected = gm(x).detach()
    with emulation():
        found = program(x)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (found - net(x)).norm() > 1e-3 * expected.norm()  # it is the quantized model


def test_a_model_from_onnx_lowers_the_same_way():
    x = samples(4)
    gm = qgraph.quantize(mlp_proto(), [{"x": x}], recipe="w8a8-token", backend="cupy")
    with emulation():
        program = qgraph.lower(gm, backend="cupy", strict=True)
        (found,) = program(x)
    assert isinstance(found, np.ndarray) and "w8a8_linear" in {k.became for k in program.kernels()}
    np.testing.assert_allclose(found, gm(torch.from_numpy(x))[0].detach().numpy(), rtol=1e-4, atol=1e-5)


def test_half_models_stay_half(net):
    x = batches(1)[0][0].half()
    gm = qgraph.quantize(Net().half().eval(), example_inputs=(x,), recipe="w4a16-g32", backend="cupy")
    with emulation():
        found = qgraph.lower(gm, backend="cupy", strict=True)(x)
    expected = gm(x).detach()
    assert found.dtype == torch.float16 and (found.float() - expected.float()).norm() < 4e-3 * expected.float().norm()


def test_large_batches_multiply_integers_and_the_ledger_says_so(net):
    gm, program = lowered(net, "w4a16-g32", rows=64)
    assert {k.became for k in program.kernels()} == {"quantize_rows", "norm_quantize", "w8a8_linear"}
    said = [e for e in program.gm.meta["qgraph"].ledger if e.by == "rows_in_integers"]
    assert {(e.role, e.decision) for e in said} == {("x", "int8 sym per token dynamic"), ("weight", "int8 sym per axis 0")}
    (x,) = batches(1)[0]
    expected = gm(x).detach()
    with emulation():
        error = (program(x) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.03  # int8 steps of x and weight, beside those of 4 bits that are there already
    assert {k.became for k in lowered(net, "w4a16-g32", rows=15)[1].kernels()} == {"weight_only_linear"}


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("w4a8-g32", "no kernel quantizes rows of x in groups"),
        ("nf4-g64", "no kernel looks weights up in a codebook"),
        ("w4a16-g48", "groups are multiples of 32"),
        ("w8a6", "tensor cores multiply int8 and uint8"),
    ],
)
def test_formats_without_a_kernel_are_refused_with_the_reason(net, recipe, reason):
    try:
        gm = qgraph.prepare(net, batches(1)[0], recipe=recipe, backend="cupy")
    except (ModelError, RecipeError) as e:
        assert reason in str(e)
    else:
        assert any(reason in e.reason for e in gm.meta["qgraph"].ledger)


def test_convolutions_of_one_group_run_in_integers_from_one_to_the_next():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 24, 3, padding=1), torch.nn.ReLU6(), torch.nn.Conv2d(24, 20, 3, stride=2), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers, torch.nn.Conv2d(20, 40, 3, groups=20), torch.nn.Conv2d(40, 9, 1)).eval()
    x = torch.randn(2, 3, 11, 12)
    gm = qgraph.quantize(net, [(x,)], example_inputs=(x,), recipe="w8a8", backend="cupy")
    reasons = [e.reason for e in gm.meta["qgraph"].ledger if e.decision == "float"]
    assert any("the integer convolution has one group, not 20" in r for r in reasons)
    with emulation():
        program = qgraph.lower(gm, backend="cupy", strict=True)
        found = program(x)
    ran = [k.became for k in program.kernels()]
    assert ran == ["quantize_static", "w8a8_conv", "w8a8_conv", "dequantize", "quantize_static", "w8a8_conv"] or ran.count("w8a8_conv") == 3
    expected = gm(x).detach()
    assert (found - expected).norm() < 5e-3 * expected.norm()  # a sum in another order may move an integer by one


def test_what_was_prepared_for_another_backend_says_what_torch_runs():
    conv = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.ReLU()).eval()
    x = torch.randn(1, 4, 9, 9)
    gm = qgraph.quantize(conv, [(x,)], example_inputs=(x,), recipe="w8a8", backend="reference")
    with emulation():
        program = qgraph.lower(gm, backend="cupy")
        missed = [k for k in program.kernels() if not k.fused]
        assert [(k.became, k.promised) for k in missed] == [("torch", "integer convolution")]
        (said,) = (e for e in program.gm.meta["qgraph"].ledger if e.role == "kernel")
        assert (said.decision, said.reason) == ("torch", missed[0].reason) and "one group" in said.reason
        torch.testing.assert_close(program(x), gm(x).detach(), rtol=1e-4, atol=1e-4)
        with pytest.raises(LoweringError, match="have no CUDA kernel: "):
            qgraph.lower(gm, backend="cupy", strict=True)


@pytest.mark.parametrize(("recipe", "dequantized_by"), [("w8a16", None), ("w8a16-tensor", "dequantize")])
def test_a_weight_that_torch_reads_as_floats_is_a_miss_whatever_dequantizes_it(recipe, dequantized_by):
    x = torch.randn(1, 4, 9, 9)
    gm = qgraph.quantize(torch.nn.ConvTranspose2d(4, 6, 3).eval(), example_inputs=(x,), recipe=recipe, backend="reference")
    with emulation():
        program = qgraph.lower(gm, backend="cupy")
        torch.testing.assert_close(program(x), gm(x).detach())
    missed = [k for k in program.kernels() if not k.fused]
    assert [(k.promised, k.became) for k in missed] == [("convolution", "torch")]
    assert [k.became for k in program.kernels() if k.fused] == ([dequantized_by] if dequantized_by else [])


def test_without_a_device_the_error_names_the_emulator(net, monkeypatch):
    monkeypatch.delenv("QGRAPH_CUDA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gm = qgraph.quantize(net, example_inputs=batches(1)[0], recipe="w8a16", backend="cupy")
    with pytest.raises(LoweringError, match="needs a CUDA device.*QGRAPH_CUDA=emulate"):
        qgraph.lower(gm, backend="cupy")
    monkeypatch.setenv("QGRAPH_CUDA", "simulate")
    with pytest.raises(LoweringError, match="'emulate' is what it can be"):
        qgraph.lower(gm, backend="cupy")


def test_there_is_no_file_of_it_and_the_error_says_what_to_do(net, tmp_path):
    gm, program = lowered(net, "w8a16")
    for write in (program.save, lambda path: qgraph.export(gm, path, backend="cupy")):
        with pytest.raises(LoweringError, match="no file"):
            write(tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


def test_torch_compile_takes_the_module(net):
    _, program = lowered(net, "w8a8-token")
    (x,) = batches(1)[0]
    with emulation():
        compiled = torch.compile(program.gm, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), program(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_read_again_from_the_cache(monkeypatch, tmp_path, dtype):
    monkeypatch.setenv("QGRAPH_CUDA_CACHE", str(tmp_path))
    x = torch.randn(2, 1024, dtype=dtype)
    gm = qgraph.quantize(torch.nn.Linear(1024, 1200).to(dtype).eval(), example_inputs=(x,), recipe="w4a16-g128", backend="cupy")
    packings = []
    monkeypatch.setattr(claim, "pack_weight", lambda *a, **k: packings.append(a) or pack_weight(*a, **k))
    with emulation():
        first, again = (qgraph.lower(gm, backend="cupy") for _ in range(2))
        assert len(packings) == 1 and torch.equal(first(x), again(x))
        (file,) = (tmp_path / "packed").iterdir()
        file.write_bytes(file.read_bytes()[:1000])  # a disk that was full
        assert torch.equal(qgraph.lower(gm, backend="cupy")(x), first(x)) and len(packings) == 2
        monkeypatch.setattr(packed_cache, "_sources", lambda: "another layout")
        assert torch.equal(qgraph.lower(gm, backend="cupy")(x), first(x)) and len(packings) == 3


class Tied(torch.nn.Module):
    """A table of embeddings that is the last layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = torch.nn.Embedding(70, 64), torch.nn.Linear(64, 64)
        self.head = torch.nn.Linear(64, 70, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.table(ids))))


@pytest.mark.parametrize("setting", ["embeddings.group=32", "embeddings.bits=4"])
def test_embeddings_are_gathered_from_integers(setting):
    torch.manual_seed(0)
    ids = torch.randint(0, 70, (3, 9))
    gm = qgraph.quantize(Tied().eval(), example_inputs=(ids,), recipe=qgraph.load_recipe("w4a16-g32", [setting]), backend="cupy")
    with emulation():
        program = qgraph.lower(gm, backend="cupy", strict=True)
        found = program(ids)
    expected = gm(ids).detach()
    assert [k.became for k in program.kernels()] == ["embedding_dequantize", "weight_only_linear", "weight_only_linear"]
    assert (found - expected).norm() < 1e-3 * expected.norm()
