"""Static ranges without data: from batch norms, in PyTorch modules, ONNX models and from the shell; reasons where that cannot be."""

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import qgraph
from qgraph.cli import main
from qgraph.errors import CalibrationError, RecipeError
from qgraph.observe import Observer
from qgraph.passes import RangesFromMoments
from qgraph.pipeline import Context
from qgraph.recipe import load_recipe
from qgraph.testing import check
from tests.everywhere import EVERYWHERE

IMAGES = torch.randn(32, 3, 12, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with batch norms that know their data, a residual sum, a head; `between` sits before the head. With `spread` the weights
    of channels differ by as many powers of ten, and what reads them undoes it."""

    def __init__(self, between=None, spread=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.d, self.b, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 5, 1),
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, momentum=None) for _ in range(3))
        self.between = between or nn.Identity()
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        factors = torch.logspace(-spread / 2, spread / 2, 8)[torch.randperm(8)]
        with torch.no_grad():
            self.norms[1].weight *= factors
            self.norms[1].bias *= factors
            self.b.weight /= factors[:, None, None]
            self.train()(IMAGES)
        self.eval()

    def forward(self, x):
        x = torch.relu(self.norms[0](self.a(x)))
        x = x + self.norms[2](self.b(torch.relu(self.norms[1](self.d(x)))))
        return self.head(self.between(x))


def proto(net):
    return torch.onnx.export(net, (IMAGES[:2],), dynamo=True, optimize=False, verbose=False).model_proto


def db(net, quantized):
    with torch.no_grad():
        want, got = (torch.cat([f(x) if f is net else first(f(x)) for x in IMAGES.split(2)]) for f in (net, quantized))
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def ranges(gm):
    return {e.node: e for e in gm.meta["qgraph"].ledger if e.role == "range"}


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_without_data_a_model_is_quantized_nearly_as_well_as_with(origin):
    net = Net()
    model, example = (net, (IMAGES[:2],)) if origin == "torch" else (proto(net), None)
    quantized = qgraph.quantize(model, example_inputs=example, recipe="dfq")
    calibrated = qgraph.quantize(model, [(x,) for x in IMAGES.split(2)], example_inputs=example, recipe="w8a8")
    assert qgraph.lower(quantized).kernels()
    assert db(net, quantized) > max(20.0, db(net, calibrated) - 4), (db(net, quantized), db(net, calibrated))


def test_a_range_reaches_six_deviations_and_stops_where_a_relu_does():
    net = Net()
    gm = qgraph.prepare(net, (IMAGES[:2],), recipe=load_recipe("dfq", ["stages=[ranges-from-moments]"]), backend=EVERYWHERE)
    observers = [m for m in gm.modules() if isinstance(m, Observer)]
    assert observers and all(m.frozen for m in observers)
    found = {m.name: m.range() for m in observers}
    norm = net.norms[0]
    low, high = next(r for name, r in found.items() if "relu" in name and "relu_1" not in name)
    assert float(low) == 0 and float(high) == pytest.approx(float((norm.bias + 6 * norm.weight.abs()).detach().max()), rel=1e-4)
    entry = ranges(gm)["x"]
    assert entry.decision == "[-6, 6]"
    assumed = gm.meta["qgraph"].ledger.get("x", "distribution")
    assert assumed is not None and assumed.reason == "taken as normal, mean 0 and deviation 1; see option inputs"
    gm(IMAGES[:2] * 100)
    assert [m.range() for m in observers] == list(found.values()), "nothing is observed any more"


def test_a_second_run_and_a_graph_without_observers_change_nothing():
    gm = qgraph.prepare(Net(), (IMAGES[:2],), recipe="dfq")
    check(RangesFromMoments(), (gm, gm(IMAGES[:2])), (IMAGES[:2],), None)
    assert RangesFromMoments().run(qgraph.prepare(Net(), (IMAGES[:2],), recipe="w8a8-dynamic"), Context()) == 0


def test_inputs_between_two_numbers_have_that_range():
    recipe = load_recipe("dfq", ["stages=[{ranges-from-moments: {inputs: [0, 1]}}]"])
    assert ranges(qgraph.prepare(Net(), (IMAGES[:2],), recipe=recipe, backend=EVERYWHERE))["x"].decision == "[0, 1]"


@pytest.mark.parametrize("options", [{"inputs": "uniform"}, {"inputs": [1, 0]}, {"inputs": [1]}, {"sigmas": 0}])
def test_other_inputs_are_refused(options):
    with pytest.raises(RecipeError, match="inputs is|sigmas must"):
        RangesFromMoments(**options)


class Sorted(nn.Module):
    def forward(self, x):
        return torch.sort(x, -1)[0]


def test_what_no_rule_knows_is_named_and_taken_from_data_where_there_is_some():
    net = Net(between=Sorted())
    with pytest.raises(CalibrationError, match=r"\d operands have no statistics, the first: .*nothing is known of what .*; give batches"):
        qgraph.quantize(net, example_inputs=(IMAGES[:2],), recipe="dfq")
    batches = [(x,) for x in IMAGES.split(2)]
    prepared = qgraph.prepare(net, (IMAGES[:2],), recipe="dfq")
    open_ones = [m for m in prepared.modules() if isinstance(m, Observer) and not m.frozen]
    qgraph.calibrate(prepared, batches)
    assert 0 < len(open_ones) < len(ranges(prepared))
    assert db(net, qgraph.convert(prepared)) > 20


def test_a_model_whose_batch_norms_are_folded_already_says_so():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(CalibrationError, match="export folds batch norms away"):
        qgraph.quantize(net, example_inputs=(IMAGES[:2],), recipe="dfq")


def test_statistics_are_not_carried_through_many_layers():
    deep = nn.Sequential(nn.LayerNorm(6), *(layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.ReLU()))).eval()
    with pytest.raises(CalibrationError, match="4 layers lie between .* and the last batch norm or norm"):
        qgraph.quantize(deep, example_inputs=(torch.randn(3, 6),), recipe="dfq")


def test_the_recipe_needs_no_data_and_its_stages_can_be_changed():
    assert not load_recipe("dfq").needs_data
    assert not load_recipe("w8a8+ranges-from-moments").needs_data
    assert load_recipe("w8a8+ranges-from-moments+bias-correct").needs_data


def test_the_shell_needs_no_calibration(tmp_path):
    onnx.save(proto(Net()), tmp_path / "net.onnx")
    done = CliRunner().invoke(main, ["quantize", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "out.onnx"), "--recipe", "dfq"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out.onnx").exists()


def test_equalization_rescues_channels_of_different_sizes():
    net = Net(spread=3.0)
    tensor = "weights.per=tensor"
    without, with_it = (
        db(net, qgraph.quantize(net, example_inputs=(IMAGES[:2],), recipe=load_recipe("dfq", sets)))
        for sets in ([tensor, "stages=[ranges-from-moments]"], [tensor])
    )
    assert with_it > without + 20, (without, with_it)


def test_the_ranges_of_a_norm_are_those_of_its_weight_and_bias():
    norm = nn.LayerNorm(6)
    norm.weight.data, norm.bias.data = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)
    net = nn.Sequential(norm, nn.Linear(6, 4)).eval()
    gm = qgraph.prepare(net, (torch.randn(3, 6),), recipe="dfq")
    (found,) = [m.range() for m in gm.modules() if isinstance(m, Observer) if "0" in m.name]
    want = norm.bias - 6 * norm.weight, norm.bias + 6 * norm.weight
    assert [float(v) for v in found] == pytest.approx([float(want[0].min()), float(want[1].max())], rel=1e-4)
    assert np.isfinite(float(found[0]))
