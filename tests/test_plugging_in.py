"""From outside the package: an op with its interface entry, an observer, a stage, a backend's placement, torch's PassManager, onnx_ir."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir
import onnx_ir.passes
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_manager import PassManager

import qgraph
from qgraph import views
from qgraph.backend import BACKENDS, Placement
from qgraph.ledger import state
from qgraph.observe import OBSERVERS, Observer
from qgraph.passes import Canonicalize, FoldConstants, RemoveDead, as_onnx_pass
from qgraph.pipeline import Context, Pass
from qgraph.ranges import MinMax
from qgraph.stages import STAGES
from qgraph.views import Linear
from tests.small import mlp_proto, mlp_torch, samples


@torch.library.custom_op("outside::scaled_linear", mutates_args=())
def scaled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """2 x . weight, with weight [in, out]."""
    return 2 * x @ weight


@scaled_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


class Outside(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 2, 15).view(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.outside.scaled_linear(x, self.weight) + 0.5


@pytest.fixture
def entry() -> Iterator[None]:
    target = torch.ops.outside.scaled_linear.default

    @qgraph.implements(Linear, target)
    def as_linear(node: torch.fx.Node) -> Linear:
        o = views.operands(node)
        return Linear(o["x"], o["weight"], None, in_axis=-2, out_axis=-1, alpha=2.0)

    yield
    del views.VIEWS[Linear][target]


def test_an_op_from_outside_is_quantized_once_it_has_an_interface_entry(entry: None) -> None:
    x = torch.linspace(-1, 1, 20).view(4, 5)
    quantized = qgraph.quantize(Outside(), example_inputs=(x,), recipe="w8a16", backend="reference")
    found = state(quantized).ledger.summary()
    assert (found["weights"], found["weights_quantized"]) == (1, 1)
    error = (quantized(x) - Outside()(x)).norm() / Outside()(x).norm()
    assert 1e-6 < error < 0.02


def test_an_op_without_an_entry_is_a_barrier() -> None:
    with pytest.raises(qgraph.ModelError, match="nothing to quantize"):
        qgraph.prepare(Outside(), (torch.ones(1, 5),), recipe="w8a16")


def test_an_observer_from_outside_serves_a_recipe() -> None:
    @qgraph.register_observer("half-range")
    def half_range(spec: qgraph.QSpec, *, name: str = "", share: float = 0.5) -> Observer:
        return Observer(spec, MinMax(), lambda statistic, spec: (share * statistic.low, share * statistic.high), name=name)

    module, example = mlp_torch()
    recipe = qgraph.load_recipe("w8a8", ["observer=half-range", "observer_options.share=0.25"])
    try:
        ours, usual = (qgraph.quantize(module, [example], example_inputs=example, recipe=r) for r in (recipe, "w8a8"))
    finally:
        del OBSERVERS["half-range"]
    torch.testing.assert_close(ours.x_scale, 0.25 * usual.x_scale)


@dataclass(frozen=True)
class DoubleBiases(Pass):
    """A stage that can be seen: every bias doubled."""

    def run(self, gm: GraphModule, ctx: Context) -> int:
        biases = [v.bias for n in gm.graph.nodes if (v := qgraph.view(Linear, n)) and v.bias is not None]
        with torch.no_grad():
            for node in biases:
                owner, _, name = str(node.target).rpartition(".")
                old = views.const_value(node)
                assert old is not None
                setattr(gm.get_submodule(owner), name, torch.nn.Parameter(2 * old))
        return len(biases)


def test_a_stage_from_outside_runs_where_the_recipe_names_it() -> None:
    module, example = mlp_torch()
    qgraph.register_stage("double-biases", DoubleBiases)
    try:
        graph = qgraph.prepare(module, example, recipe="w8a16+double-biases")
    finally:
        del STAGES["double-biases"]
    plain = qgraph.prepare(module, example, recipe="w8a16")
    assert not torch.allclose(graph(*example), plain(*example))
    torch.testing.assert_close(graph.second.bias, 2 * plain.second.bias)


def test_a_backend_from_outside_decides_what_is_quantized() -> None:
    class Nothing:
        name = "nothing"
        placement = Placement(weight_only=(Linear,), accepts=lambda operation, role, spec: f"no {role} in {spec.dtype} here")

    qgraph.register_backend("nothing", Nothing)
    try:
        with pytest.raises(qgraph.ModelError, match="no weight in int8 here"):
            qgraph.prepare(mlp_proto(), recipe="w8a16", backend="nothing")
    finally:
        del BACKENDS["nothing"]


def test_passes_run_in_torchs_pass_manager() -> None:
    gm = qgraph.from_onnx(mlp_proto())
    result: Any = PassManager([Canonicalize(), FoldConstants(), RemoveDead()])(gm)
    x = torch.from_numpy(samples())
    torch.testing.assert_close(result.graph_module(x), qgraph.from_onnx(mlp_proto())(x))


def test_passes_run_in_an_onnx_ir_pipeline() -> None:
    model = onnx_ir.from_proto(mlp_proto())
    pipeline = onnx_ir.passes.Sequential(as_onnx_pass(DoubleBiases()), as_onnx_pass(RemoveDead()))
    result = pipeline(model)
    assert result.modified
    x = torch.from_numpy(samples())
    assert not torch.allclose(qgraph.from_onnx(result.model)(x)[0], qgraph.from_onnx(mlp_proto())(x)[0])
