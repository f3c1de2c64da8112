"""prepare, calibrate, convert, lower, export, quantize: the flow and its errors, from PyTorch and from ONNX."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import qgraph
from qgraph.ledger import state
from qgraph.observe import Observer
from qgraph.recipe import NAMES
from tests.small import mlp_proto, mlp_torch, samples

X = torch.from_numpy(samples())


def batches() -> list[Any]:
    return [X[i : i + 3] for i in range(0, len(X), 3)]


ROWS = ({0: torch.export.Dim("rows", min=1, max=64)},)


def first(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).detach()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("recipe", [*NAMES, "w4a16-g32-sym", "w8a8-tensor"])
@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_every_recipe_runs_on_both_origins_and_the_program_agrees_with_the_reference(recipe: str, origin: str, tmp_path: Path) -> None:
    module, example = mlp_torch()
    model, inputs = (module, example) if origin == "torch" else (mlp_proto(), None)
    path = tmp_path / "m.onnx"
    quantized = qgraph.quantize(
        model, batches(), example_inputs=inputs, dynamic_shapes=ROWS if inputs else None, recipe=recipe, output=path
    )
    reference, want = first(quantized(X)), module(X).detach()
    assert 1e-6 < relative_error(reference, want) < (0.2 if "w4" in recipe else 0.05)
    program = qgraph.lower(quantized, strict=True)
    assert relative_error(first(program(X)), reference) < 0.02
    assert program.kernels() or recipe == "w8a16"
    onnx.checker.check_model(str(path), full_check=True)


def test_prepare_leaves_the_model_as_it_was_and_returns_floats() -> None:
    module, example = mlp_torch()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    prepared = qgraph.prepare(module, example)
    torch.testing.assert_close(prepared(*example), module(*example))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert state(prepared).stage == "prepared"


def test_a_prepared_graph_can_be_calibrated_by_calling_it() -> None:
    module, example = mlp_torch()
    prepared = qgraph.prepare(module, example)
    prepared(*example)
    assert qgraph.convert(prepared).meta["qgraph"].stage == "converted"


def test_convert_leaves_the_prepared_graph_with_its_observers() -> None:
    prepared = qgraph.prepare(mlp_proto())
    qgraph.calibrate(prepared, batches())
    count = len([m for m in prepared.modules() if isinstance(m, Observer)])
    once, again = qgraph.convert(prepared), qgraph.convert(prepared)
    assert count == len([m for m in prepared.modules() if isinstance(m, Observer)]) > 0
    torch.testing.assert_close(once(X), again(X), rtol=0, atol=0)


def test_a_graph_of_qgraph_is_a_model_too_and_is_not_changed() -> None:
    graph = qgraph.from_onnx(mlp_proto())
    before = qgraph.text(graph)
    qgraph.prepare(graph, recipe="w8a16")
    assert qgraph.text(graph) == before


def test_verified_preparation_runs_every_pass_on_the_example_inputs() -> None:
    module, example = mlp_torch()
    assert qgraph.prepare(module, example, verify="numerics").meta["qgraph"].stage == "prepared"


def test_the_ledger_of_the_quantized_graph_lists_every_weight() -> None:
    quantized = qgraph.quantize(mlp_proto(), recipe="w8a8-dynamic")
    summary = state(quantized).ledger.summary()
    assert summary["weights_quantized"] == summary["weights"] > 0


def test_a_rule_keeps_an_operation_in_float_and_says_so() -> None:
    names = [e.node for e in state(qgraph.prepare(mlp_proto(), recipe="w8a16")).ledger if e.role == "weight"]
    recipe = qgraph.load_recipe("w8a16", [f"rules.{names[0]}=null"])
    entry = state(qgraph.prepare(mlp_proto(), recipe=recipe)).ledger.get(names[0], "weight")
    assert entry is not None and not entry.quantized and names[0] in entry.reason


def test_a_static_recipe_without_data_names_the_way_out() -> None:
    with pytest.raises(
        qgraph.CalibrationError, match="needs calibration data: give batches, or take a recipe without it, such as w8a8-dynamic"
    ):
        qgraph.quantize(mlp_proto(), recipe="w8a8")


def test_what_a_stage_refuses_is_kept_with_the_graph() -> None:
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]> g (float[N,2] x) => (float[N,2] z)
        <float[2,2] w = {1, 0.5, -2, 1}> { [first] y = MatMul (x, w) z = Relu (y) }""")
    graph = qgraph.quantize(model, [{"x": torch.randn(4, 2).numpy()}], recipe="w8a8+bias-correct")
    (refused,) = state(graph).declines
    assert str(refused) == "bias_correct declined at first: MatMul takes no bias, and no constant per output channel is added behind it"


def test_convert_refuses_a_graph_that_is_not_prepared() -> None:
    with pytest.raises(qgraph.ModelError, match="this one is captured: call qgraph.prepare first"):
        qgraph.convert(qgraph.from_onnx(mlp_proto()))


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    quantized = qgraph.quantize(mlp_proto(), recipe="w8a8-dynamic", output=tmp_path / "q.onnx")
    with pytest.raises(qgraph.ModelError, match="quantized already"):
        qgraph.prepare(tmp_path / "q.onnx")
    with pytest.raises(qgraph.ModelError, match="quantized already"):
        qgraph.prepare(quantized)


def test_export_refuses_a_folder_and_keeps_files_on_failure(tmp_path: Path) -> None:
    quantized = qgraph.quantize(mlp_proto(), recipe="w8a16")
    with pytest.raises(qgraph.ModelError, match="is a folder; give a file name"):
        qgraph.export(quantized, tmp_path)
    with pytest.raises(qgraph.ModelError, match="does not exist"):
        qgraph.export(quantized, tmp_path / "missing" / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_something_that_is_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="not int"):
        qgraph.prepare(3)


def test_unknown_backends_and_recipes_name_the_known_ones() -> None:
    with pytest.raises(qgraph.RecipeError, match="unknown backend 'onnxruntme'; did you mean 'onnxruntime'"):
        qgraph.prepare(mlp_proto(), backend="onnxruntme")
    with pytest.raises(qgraph.RecipeError, match="unknown recipe"):
        qgraph.prepare(mlp_proto(), recipe="int8")


def test_half_precision_models_stay_in_half_precision(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).half()
    x = torch.randn(5, 8, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    for recipe in ("w8a8", "w8a8-dynamic"):
        quantized = qgraph.quantize(net, [x], example_inputs=(x,), recipe=recipe, output=tmp_path / "half.onnx")
        assert quantized(x).dtype == torch.float16
        (output,) = ort.InferenceSession(tmp_path / "half.onnx").get_outputs()
        assert output.type == "tensor(float16)"
        assert relative_error(first(qgraph.lower(quantized)(x)), net(x).detach()) < 0.05


def test_bfloat16_models_keep_their_type_in_the_reference_and_are_refused_by_onnxruntime() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).bfloat16()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantized = qgraph.quantize(net, [x], example_inputs=(x,))
    assert quantized(x).dtype == torch.bfloat16
    assert {t.dtype for name, t in quantized.named_buffers() if name.endswith("_scale")} == {torch.bfloat16}
    assert relative_error(quantized(x).float(), net(x).detach().float()) < 0.05
    with pytest.raises(qgraph.LoweringError, match="is bfloat16, for which .* has no kernels: quantize module.float"):
        qgraph.lower(quantized)


def test_nested_and_absent_arguments_are_calibrated_and_run_as_the_module_takes_them() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp_torch()[0]

        def forward(self, inputs: dict[str, Tensor], pair: list[Tensor], mask: Tensor | None = None) -> Tensor:
            y: Tensor = self.net(inputs["x"]) * pair[0]
            return y + pair[1] if mask is None else y * mask

    model = Nested().eval()
    example = ({"x": X[:3]}, [torch.rand(3, 1), torch.rand(3, 1)], None)
    prepared = qgraph.prepare(model, example, recipe="w8a8")
    qgraph.calibrate(prepared, [example], progress=False)
    program = qgraph.lower(qgraph.convert(prepared))
    assert relative_error(first(program(*example)), first(model(*example))) < 0.05


def test_a_float64_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(qgraph.ModelError, match=r"float64.*convert the model"):
        qgraph.prepare(nn.Linear(16, 4).double(), torch.randn(2, 16).double())


def test_results_that_are_no_tensors_keep_their_place_in_the_structure() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp_torch()[0]

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.net(x)
            return {"none": None, "pair": (y, 3), "last": -y}

    model = Nested().eval()
    quantized = qgraph.quantize(model, example_inputs=(X[:3],), recipe="w8a8-dynamic")
    got = qgraph.lower(quantized)(X[:3])
    assert list(got) == ["none", "pair", "last"] and got["none"] is None and got["pair"][1] == 3
    assert relative_error(got["pair"][0], first(model(X[:3])["pair"])) < 0.05 and torch.equal(got["last"], -got["pair"][0])


def test_dynamic_dimensions_keep_their_names(tmp_path: Path) -> None:
    module, example = mlp_torch()
    qgraph.quantize(module, batches(), example_inputs=example, dynamic_shapes=ROWS, output=tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    assert [v.shape[0] for v in (*session.get_inputs(), *session.get_outputs())] == ["rows", "rows"]


def test_a_relu_that_float_reads_does_not_take_the_linear_out_of_integers() -> None:
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.LayerNorm(12)).eval()
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    quantized = qgraph.quantize(net, [x], example_inputs=(x,))
    program = qgraph.lower(quantized, strict=True)
    assert [k.fused for k in program.kernels()] == [True]
    assert relative_error(first(program(x)), first(quantized(x))) < 1e-4


def test_a_constant_with_more_axes_than_the_product_keeps_them() -> None:
    """ONNX Runtime would take a [1, 1, N] constant for a bias and return two axes instead of three."""
    rows = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 17]> g (float[M,16] x) => (float[1,M,3] y) { p = MatMul (x, w) y = Add (p, b) }'
    )
    rng = torch.Generator().manual_seed(0)
    for name, shape in (("w", (16, 3)), ("b", (1, 1, 3))):
        rows.graph.initializer.append(onnx.numpy_helper.from_array(torch.randn(shape, generator=rng).numpy(), name))
    quantized = qgraph.quantize(rows, recipe="w8a8-dynamic")
    program = qgraph.lower(quantized, strict=True)
    assert first(program(X)).shape == first(quantized(X)).shape == (1, 12, 3)
    assert relative_error(first(program(X)), first(quantized(X))) < 1e-4
