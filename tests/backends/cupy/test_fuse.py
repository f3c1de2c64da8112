"""Norms and activations that join the quantization behind them: text in, text out, the numbers, a second run, refusals; both dialects."""

import pytest
import torch

import qgraph
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.fuse import FuseActQuantize, FuseNormQuantize
from qgraph.edit import copy_graph
from qgraph.pipeline import Context
from tests.decoder import decoder, ids


class Block(torch.nn.Module):
    """A transformer's feed-forward part: residual sum, norm (read twice), gated activation."""

    def __init__(self, norm: torch.nn.Module, act: str = "silu") -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.gate, self.up, self.down = torch.nn.Linear(40, 72), torch.nn.Linear(40, 72), torch.nn.Linear(72, 40)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = x + y
        n = self.norm(h)
        gate = (
            torch.nn.functional.silu(self.gate(n)) if self.act == "silu" else torch.nn.functional.gelu(self.gate(n), approximate=self.act)
        )
        return h + n * 0.5 + self.down(gate * self.up(n))


def layer_norm() -> torch.nn.Module:
    norm = torch.nn.LayerNorm(40, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(40) + 0.5)
        norm.bias.copy_(torch.randn(40))
    return norm


def rms_norm() -> torch.nn.Module:
    norm = torch.nn.RMSNorm(40, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(40) + 0.5)
    return norm


def graph(recipe: str, norm=layer_norm, act: str = "silu"):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 40), torch.randn(2, 5, 40))
    return qgraph.quantize(Block(norm(), act).eval(), [inputs], example_inputs=inputs, recipe=recipe, backend="cupy"), inputs


def names(gm: torch.fx.GraphModule) -> list[str]:
    return [str(n.target).rsplit(".", 2)[-2] for n in gm.graph.nodes if getattr(n.target, "namespace", "") in ("qgraph_cuda", "aten")]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-token"])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_a_norm_with_its_residual_sum_is_one_kernel_that_writes_what_else_is_read(recipe, norm):
    gm, inputs = graph(recipe, norm)
    fused, expected = copy_graph(gm), gm(*inputs).detach()
    assert FuseNormQuantize().run(fused, Context()) == 1
    kept = names(fused)
    assert (
        kept.count("norm_quantize") == 1 and not {"layer_norm", "rms_norm"} & set(kept) and kept.count("add") == names(gm).count("add") - 1
    )
    (node,) = (n for n in fused.graph.nodes if "norm_quantize" in str(n.target))
    assert sorted(u.args[1] for u in node.users)[-2:] == [4, 5]  # the sum and the norm are read as floats, too
    with emulation(), torch.no_grad():
        found = fused(*inputs)
    assert (found - expected).norm() < 5e-3 * expected.norm()
    assert FuseNormQuantize().run(fused, Context()) == 0


@pytest.mark.parametrize("act", ["silu", "none", "tanh"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-token"])
def test_an_activation_and_the_product_behind_it_join_the_quantization(recipe, act):
    gm, inputs = graph(recipe, act=act)
    fused, expected = copy_graph(gm), gm(*inputs).detach()
    assert FuseActQuantize().run(fused, Context()) == 1
    assert not {"silu", "gelu"} & set(names(fused)) and names(fused).count("act_quantize") == 1
    with emulation(), torch.no_grad():
        found = fused(*inputs)
    assert (found - expected).norm() < 5e-3 * expected.norm()
    assert FuseActQuantize().run(fused, Context()) == 0


def test_a_norm_over_more_than_rows_is_declined_with_the_reason():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 40)
    net = torch.nn.Sequential(torch.nn.LayerNorm([5, 40]), torch.nn.Linear(40, 12)).eval()
    gm = qgraph.quantize(net, example_inputs=(x,), recipe="w8a8-token", backend="cupy")
    context = Context()
    assert FuseNormQuantize().run(gm, context) == 0
    (declined,) = context.declines
    assert declined.reason.endswith("this is a layer norm over axes (-2, -1)")


def test_an_activation_that_is_read_as_floats_stays():
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = torch.nn.Linear(40, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = torch.nn.functional.gelu(x)
            return a + self.down(a)

    x = torch.randn(3, 40)
    gm = qgraph.quantize(Twice().eval(), example_inputs=(x,), recipe="w8a8-token", backend="cupy")
    context = Context()
    assert FuseActQuantize().run(gm, context) == 0
    assert [d.reason for d in context.declines] == ["%gelu is read as floats, too"]


def test_the_chains_of_an_onnx_decoder_are_norms_and_gates_as_well(tmp_path):
    gm = qgraph.quantize(decoder(tmp_path), recipe="w8a8-token", backend="cupy")
    fused = copy_graph(gm)
    (batch,) = ids(1, 6, 8)  # the rows of the table that are not 0
    counts = [p.run(fused, Context()) for p in (FuseNormQuantize(), FuseActQuantize())]
    assert counts[0] >= 4 and counts[1] >= 2  # two layers
    with emulation(), torch.no_grad():
        found, expected = fused(**batch)[0], gm(**batch)[0]
    assert (found - expected).norm() < 2e-2 * expected.norm()
