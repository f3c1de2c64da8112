"""plan: what quantizing will take, from types alone."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import qgraph
from qgraph.cli import main
from qgraph.errors import CalibrationError
from qgraph.plan import Plan
from tests.decoder import decoder, ids
from tests.everywhere import EVERYWHERE
from tests.simulated import ConvNet, images

RECIPE = "w4a16-g32+lean"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return decoder(tmp_path_factory.mktemp("plan"), hidden=64, inner=128, blocks=2, heads=4, vocabulary=256)


def same(a: Plan, b: Plan) -> bool:
    """But for what this process has loaded meanwhile."""
    return replace(a, runtime=0) == replace(b, runtime=0)


def test_stops_and_live_values_are_counted(model):
    found = qgraph.plan(model, RECIPE, ids(3, 32))
    assert found.segments == 2 * 4 + 1  # q, k and v are one, gate and up are one
    run = 3 * 32  # the batches are small enough to run as one
    assert found.widest == "b0.down"  # residual stream and inner values; the mask has a type that inference does not know
    assert found.live_total == found.live == pytest.approx(2 * run * 64 + 2 * run * 128, rel=0.01)
    assert found.segment == 2 * 256 * 64  # the embedding is the largest weight that runs
    assert found.running > 3 * 4 * 32 * 32 * 2  # the scores of attention
    assert found.statistics == 2 * 128 * 64 or found.statistics == 2 * 64 * 256


def test_more_data_means_more_live_values_and_two_models_twice_as_many(model):
    few, many = qgraph.plan(model, RECIPE, ids(4, 32)), qgraph.plan(model, RECIPE, ids(40, 32))
    assert many.live_total == 10 * few.live_total
    assert qgraph.plan(model, "w4a16-g32+round", ids(4, 32)).live_total == 2 * few.live_total


def test_dims_take_the_place_of_batches(model):
    assert same(qgraph.plan(model, RECIPE, dims={"batch": 4, "seq": 32}), qgraph.plan(model, RECIPE, ids(4, 32)))
    assert (
        qgraph.plan(model, RECIPE, dims={"batch": 4, "seq": 32}, count=5).live_total
        == 5 * qgraph.plan(model, RECIPE, ids(4, 32)).live_total
    )
    with pytest.raises(CalibrationError, match="dims with numbers for seq"):
        qgraph.plan(model, RECIPE, dims={"batch": 4})
    assert qgraph.plan(model, "w4a16-g32").segments == 0  # nothing is run, so nothing needs sizes


def test_the_file_is_as_large_as_planned(model, tmp_path):
    found = qgraph.plan(model, "w4a16-g32")
    qgraph.quantize(model, recipe="w4a16-g32", output=tmp_path / "out.onnx")
    size = (tmp_path / "out.onnx.data").stat().st_size
    assert 0.8 * found.file < size < 1.25 * found.file


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's account of mapped pages")
def test_no_weight_is_read(tmp_path):
    path = decoder(tmp_path, hidden=256, inner=512)
    graph = qgraph.from_onnx(path)
    qgraph.plan(graph, RECIPE, ids(2, 16))
    account = Path("/proc/self/smaps").read_text()
    pages = re.findall(rf"{re.escape(str(path.parent))}/weights\.bin\n.*?\nRss:\s+(\d+) kB", account, re.DOTALL)
    assert pages and sum(map(int, pages)) < 200, "weights were read"


def test_torch_modules_with_symbolic_dimensions():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(32, 64), torch.nn.Linear(64, 16)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    given = {"example_inputs": (torch.randn(2, 32),), "dynamic_shapes": shapes, "backend": "reference"}
    found = qgraph.plan(Net().eval(), "w8a8-token+round", [(torch.randn(5, 32),)], **given)
    assert (found.segments, found.widest, found.live_total) == (2, "second", 2 * 5 * 64 * 4)
    assert same(qgraph.plan(Net().eval(), "w8a8-token+round", dims={"batch": 5}, **given), found)


def test_static_ranges_and_convolutions():
    """Observers stand between values and layers."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    given = {"example_inputs": (torch.cat([x for (x,) in images(2)]),), "dynamic_shapes": shapes, "backend": EVERYWHERE}
    found = qgraph.plan(ConvNet().eval(), "w8a8+round", images(5), **given)
    assert found.segments == 5 and found.live_total == 2 * 2 * 12 * 10 * 10 * 4 * 4  # two runs of four images, two models


def test_printed_and_from_the_shell(model, tmp_path):
    assert "peak memory" in str(qgraph.plan(model, RECIPE, ids(2, 16))) and "output file" in str(qgraph.plan(model, "w4a16-g32"))
    arguments = ["quantize", str(model), "-o", str(tmp_path / "out.onnx"), "--recipe", "w4a16-g32", "--plan"]
    done = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["file"] == qgraph.plan(model, "w4a16-g32").file
    assert not (tmp_path / "out.onnx").exists()
