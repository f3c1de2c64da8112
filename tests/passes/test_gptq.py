"""GPTQ with feedback on the quantized prefix."""

import io

import onnx
import pytest
import torch

import qgraph
from qgraph.errors import RecipeError
from qgraph.layers import layers
from qgraph.passes import GPTQ
from qgraph.pipeline import Context
from qgraph.reference import fake_quantize

WIDTH = 24
DYNAMIC = ({0: torch.export.Dim("n", min=2, max=64)},)


class Block(torch.nn.Module):
    """x + down(silu(gate) * up), with biases, on correlated inputs."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.gate, self.up, self.down = torch.nn.Linear(WIDTH, 40), torch.nn.Linear(WIDTH, 40), torch.nn.Linear(40, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range(4)), torch.nn.Linear(WIDTH, 10)).eval()


def batches(count=12):
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(6, WIDTH, generator=g)
    return [torch.randn(8, 6, generator=g) @ mix + 0.3 * torch.randn(8, WIDTH, generator=g) for _ in range(count)]


def proto(module):
    file = io.BytesIO()
    torch.onnx.export(module, (batches(1)[0],), file, dynamo=True, dynamic_shapes=DYNAMIC, input_names=["x"], verbose=False)
    return onnx.load_model_from_string(file.getvalue())


def quantized(origin, recipe):
    data, model = batches(), net()
    if origin == "onnx":
        return qgraph.quantize(proto(model), [{"x": x.numpy()} for x in data], recipe=recipe, backend="reference")
    data = [(x,) for x in data]
    return qgraph.quantize(model, data, recipe=recipe, example_inputs=data[0], dynamic_shapes=DYNAMIC, backend="reference")


def error(graph):
    """Squared error of the outputs, relative to their power, on data that calibration has not seen."""
    x = torch.cat(batches(20)[12:])
    with torch.no_grad():
        want, found = net()(x), graph(x)
    found = found[0] if isinstance(found, tuple | list) else found
    return float((found - want).square().sum() / want.square().sum())


def calibrated(recipe):
    """The graph before it is converted: its weights are still fake-quantized."""
    data = [(x,) for x in batches()]
    graph = qgraph.prepare(net(), data[0], recipe=recipe, dynamic_shapes=DYNAMIC, backend="reference")
    qgraph.calibrate(graph, data)
    return graph, data


def weights(graph):
    return {node.name: layer.weight for node, layer in layers(graph, Context(), by="test", biases=False).items()}


@pytest.mark.parametrize("origin", ["torch", "onnx"])
@pytest.mark.parametrize("scheme", ["w3a16-g16-sym", "w4a16-g16", "w3a16", "w4a8-g16-sym"])
def test_outputs_are_kept_better_than_with_nearest_numbers(origin: str, scheme: str) -> None:
    assert error(quantized(origin, f"{scheme}+gptq")) < 0.5 * error(quantized(origin, scheme))


@pytest.mark.parametrize("residual", [False, True])
def test_feedback_makes_good_for_what_went_wrong_before(residual: bool) -> None:
    torch.manual_seed(0)
    layers_ = torch.nn.Linear(WIDTH, 60), torch.nn.Linear(60, WIDTH)

    class Two(torch.nn.Module):
        """The first layer has two bits; all that it spoils can be undone by the second."""

        def __init__(self):
            super().__init__()
            self.coarse, self.fine = layers_

        def forward(self, x):
            h = self.coarse(x)
            return h[:, :WIDTH] + self.fine(h) if residual else self.fine(h)

    data = [(x,) for x in batches()]
    x = torch.cat(batches(20)[12:])
    errors = []
    for feedback in (1.0, 0.0):
        settings = ["rules.coarse={weights: {bits: 2}}", f"stages=[{{gptq: {{feedback: {feedback}}}}}]"]
        recipe = qgraph.load_recipe("w8a16-g16-sym", settings)
        graph = qgraph.quantize(Two(), data, recipe=recipe, example_inputs=data[0], dynamic_shapes=DYNAMIC, backend="reference")
        errors.append(float((graph(x) - Two()(x)).square().sum()))
    assert errors[0] < 0.2 * errors[1]


def test_both_origins_give_the_same_model() -> None:
    x = torch.cat(batches(2))
    a, b = quantized("torch", "w4a16-g16+gptq")(x), quantized("onnx", "w4a16-g16+gptq")(x)
    torch.testing.assert_close(a, b[0] if isinstance(b, tuple | list) else b, rtol=0.02, atol=0.02)


def test_weights_lie_on_the_grid_of_their_scales_and_some_scales_are_negative() -> None:
    graph, _ = calibrated("w4a16-g16-sym+gptq")
    negative = 0
    for layer in layers(graph, Context(), by="test", biases=False).values():
        fake = layer.fake
        scale = graph.get_buffer(str(fake.scale.target))
        assert torch.equal(fake_quantize(layer.weight, scale, None, fake.dtype, fake.axis, fake.group), layer.weight)
        negative += int((scale < 0).sum())
    assert negative


def test_a_second_run_changes_nothing() -> None:
    graph, data = calibrated("w4a16-g16+gptq")
    before = weights(graph)
    assert GPTQ().run(graph, Context(data=data)) == 0
    after = weights(graph)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_kept_scales_are_those_of_the_range() -> None:
    graph, data = calibrated("w4a16-g16")
    qgraph.passes.InsertFakeQuant.of(graph).run(graph, Context())
    scales = [layer.fake.scale.target for layer in layers(graph, Context(), by="test", biases=False).values()]
    assert GPTQ(scales="keep").run(graph, Context(data=data)) == len(scales)
    assert [layer.fake.scale.target for layer in layers(graph, Context(), by="test", biases=False).values()] == scales


def test_the_ledger_tells_rows_and_damping() -> None:
    graph, _ = calibrated("w4a16-g16+gptq")
    (reason,) = {e.reason for e in graph.meta["qgraph"].ledger if e.by == "gptq"}
    assert reason == "rounded to keep the output on 96 rows of calibration data, damping 0.03"


class Sum(torch.nn.Module):
    """Neither summand is known before both layers are rounded."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(WIDTH, 40), torch.nn.Linear(WIDTH, 40)

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x))


def test_layers_whose_outputs_are_added_to_each_other_are_rounded_together() -> None:
    data = [(x,) for x in batches()]
    graph = qgraph.quantize(Sum().eval(), data, example_inputs=data[0], recipe="w4a16-g16+gptq", backend="reference")
    assert not graph.meta["qgraph"].declines


class Experts(torch.nn.Module):
    """The second expert sees two rows in all."""

    def __init__(self):
        super().__init__()
        self.often, self.seldom = torch.nn.Linear(WIDTH, 8), torch.nn.Linear(WIDTH, 8)

    def forward(self, x):
        return torch.cat([self.often(x[1:]), self.seldom(x[:1])])


def test_experts_that_saw_too_little_keep_the_nearest_numbers_and_are_named() -> None:
    data = [(x,) for x in batches(2)]
    graph = qgraph.quantize(Experts().eval(), data, example_inputs=data[0], recipe="w4a16-g16+gptq", backend="reference")
    (decline,) = graph.meta["qgraph"].declines
    assert "only 2 rows" in decline.reason and decline.path == "seldom"


def test_convolutions_are_left_to_the_stage_for_them() -> None:
    data = [(torch.randn(2, 3, 8, 8),)]
    graph = qgraph.quantize(torch.nn.Conv2d(3, 4, 3).eval(), data, example_inputs=data[0], recipe="w8a16+gptq", backend="reference")
    assert "stage round" in graph.meta["qgraph"].declines[0].reason


@pytest.mark.parametrize("options", [{"feedback": 1.5}, {"scales": "guess"}, {"damp": 0.0}])
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        GPTQ(**options)
