"""What the kernels of a lowered graph have to do, layer by layer, and `qgraph inspect --backend cupy`."""

import json
import re

import onnx
import pytest
import torch
from click.testing import CliRunner

import qgraph
from qgraph.backends.cupy import Cupy, kv_cache, layers
from qgraph.backends.cupy.layers import WORK, Sizes, inspect
from qgraph.backends.cupy.roofline import A100, Work
from qgraph.backends.cupy.toolchain import HERE
from qgraph.cli import main
from qgraph.edit import copy_graph
from qgraph.errors import LoweringError, RecipeError
from qgraph.types import type_of
from tests.backends.cupy.decoders import small
from tests.small import mlp_proto, samples


@pytest.fixture
def file(tmp_path):
    onnx.save(mlp_proto(), tmp_path / "mlp.onnx")
    return str(tmp_path / "mlp.onnx")


def by_op(found):
    return {layer.op: layer for layer in found}


def test_a_torch_graph_is_counted_with_its_own_sizes():
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 32, bias=False)).eval().half()
    x = torch.randn(3, 5, 64).half()
    gm = qgraph.quantize(net, [(x,)], example_inputs=(x,), recipe="w4a16-g32", backend="cupy")
    found = layers.layers(Cupy(device="cpu").lower(gm).gm, Sizes())
    assert [layer.op for layer in found] == ["weight_only_linear"] * 2
    first, second = (layer.work for layer in found)
    assert first.fp16_ops == 2 * 15 * 128 * 64 and second.fp16_ops == 2 * 15 * 32 * 128
    stored = 128 * 64 // 2 + 128 * 2 * 2
    moved = 15 * (64 + 128) * 2
    assert stored + moved <= first.bytes <= stored + moved + 128 * 2 * 1 + 128 * 8, "zero points, bias and row scales on top"


def test_symbolic_sizes_are_what_the_caller_says(file):
    one, many = (inspect(file, recipe="w8a8-token", dims=dims) for dims in ({}, {"N": 64}))
    assert one.as_json()["dims"] == {"N": 1} and many.as_json()["dims"] == {"N": 64}
    assert [layer.work.int8_ops for layer in one.layers if layer.op == "w8a8_linear"] == [2 * 16 * 24, 2 * 32 * 5], "K up to whole vectors"
    for a, b in zip(one.layers, many.layers, strict=True):
        assert (a.node, a.op) == (b.node, b.op) and b.work.bytes > a.work.bytes
        assert b.work.int8_ops == 64 * a.work.int8_ops
        assert b.seconds[A100.name] == A100.time(b.work)


def test_a_product_of_symbols_is_a_size():
    sizes = Sizes({"batch": 3})
    assert [sizes._symbol(d) for d in ("batch", "2*batch*seq", "?")] == [3, 6, 1]
    assert sizes.free == {"seq", "?"}


def test_every_op_that_lowering_makes_is_counted():
    sources = "".join((HERE / name).read_text() for name in ("claim.py", "fuse.py", "keep_cache.py"))
    made = set(re.findall(r"\bK\.(\w+)\.default", sources))
    assert {"w8a8_linear", "norm_quantize"} <= made
    assert made == {str(op).split(".")[1] for op in WORK}


def test_attention_over_a_cache_counts_its_tokens_and_what_is_appended():
    _, gm = small()
    program = Cupy(device="cpu", capacity=64).lower(copy_graph(gm))
    one, many = (by_op(layers.layers(program.gm, sizes)) for sizes in (Sizes(), past_of(gm, 50)))
    head = kv_cache.append_work((1, 1, 2, 32), 8, torch.float32)
    for found, tokens in ((one, 2), (many, 51)):
        assert found["cached_attention"].work == kv_cache.work((1, 1, 4, 32), 2, tokens, 8, torch.float32) + head


def past_of(gm, tokens):
    """Sizes in which the cache holds so many."""
    past = next(type_of(n).shape[2] for n in gm.graph.nodes if n.op == "placeholder" and "key" in n.name)
    return Sizes({past: tokens})


def test_a_convolution_counts_its_windows():
    net = torch.nn.Sequential(torch.nn.Conv2d(16, 24, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(24, 8, 1)).eval()
    x = torch.randn(2, 16, 10, 12)
    gm = qgraph.quantize(net, [(x,)], example_inputs=(x,), recipe="w8a8", backend="cupy")
    found = [layer.work for layer in layers.layers(Cupy(device="cpu").lower(gm).gm, Sizes()) if layer.op == "w8a8_conv"]
    assert [w.int8_ops for w in found] == [2 * 240 * 24 * 16 * 9, 2 * 240 * 8 * 24]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-token"])
def test_quantizations_are_counted_beside_the_linears(recipe, file):
    prepared = qgraph.prepare(qgraph.from_onnx(file), recipe=recipe, backend="cupy")
    qgraph.calibrate(prepared, [samples(8)])
    program = Cupy(device="cpu").lower(qgraph.convert(prepared))
    found = by_op(layers.layers(program.gm, Sizes({"N": 8})))
    rows = found["quantize_static" if recipe == "w8a8" else "quantize_rows"].work
    assert rows.int8_ops == 0 and rows.bytes >= 8 * 16 * 5, "float32 in, bytes out"
    assert found["w8a8_linear"].work.int8_ops > 0


def test_the_command_prints_layers_and_their_sum(file):
    done = CliRunner().invoke(main, ["inspect", "--backend", "cupy", "--recipe", "w8a8-token", "--dim", "N=8", file])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split()[:4] == ["layer", "kernel", "MB", "GOP"]
    assert [line.split()[1] for line in lines[1:5]] == ["quantize_rows", "w8a8_linear", "quantize_rows", "w8a8_linear"]
    assert lines[5].startswith("total") and lines[6].endswith("nothing is measured; N=8.") and lines[7].startswith("Reach: ")
    assert 0 < float(lines[2].split()[7]) <= 100


def test_the_command_prints_json(file):
    done = CliRunner().invoke(main, ["inspect", "--backend", "cupy", "--recipe", "w4a16-g32", "--json", file])
    found = json.loads(done.output)
    assert {layer["op"] for layer in found["layers"]} == {"weight_only_linear"} and found["dims"] == {"N": 1}
    assert Work(**found["layers"][0]["work"]).bytes > 0


def test_a_file_without_quantized_layers_is_an_error(file):
    with pytest.raises(LoweringError, match=r"no layer of .*mlp.onnx runs a kernel .* a recipe quantizes it first"):
        inspect(file)


def test_a_recipe_that_needs_data_is_refused(file):
    with pytest.raises(RecipeError, match="recipe w8a8 looks at data: quantize the model first"):
        inspect(file, recipe="w8a8")


@pytest.mark.parametrize(
    ("options", "said"), [(["--dim", "N=2"], "for --backend cupy"), (["--backend", "cupy", "--dim", "N"], "give a name and a number")]
)
def test_options_that_do_not_fit_are_wrong_usage(options, said, file):
    done = CliRunner().invoke(main, ["inspect", *options, file])
    assert done.exit_code == 2 and said in done.output
