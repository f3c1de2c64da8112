"""capture(): the graph computes what the module does, takes and returns the same structures, and says where it cannot."""

import contextlib
import copy
import inspect
import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from qgraph.capture import capture
from qgraph.edit import copy_graph
from qgraph.errors import CaptureError
from qgraph.ledger import state

aten = torch.ops.aten
BATCH, SEQ = Dim("batch", min=1, max=512), Dim("seq", min=2)


def targets(gm: GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def line_of(fn: Any, text: str) -> str:
    """`file.py:12` of the line of `fn` that contains `text`."""
    lines, first = inspect.getsourcelines(fn)
    return f"{inspect.getsourcefile(fn)}:{first + next(i for i, line in enumerate(lines) if text in line)}"


class Tagger(nn.Module):
    """Tied weights, dropout, batch norm, no_grad, dict of nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.head.weight = self.embed.weight
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(10)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        with torch.no_grad():
            e = self.embed(ids)
        y = self.norm(self.drop(self.head(e)).flatten(0, 1))
        return {"logits": y, "pair": (e if scale is None else e * scale, [y + 1])}


def test_structure_names_and_symbolic_dims_survive() -> None:
    module = Tagger().eval()
    gm = capture(module, (torch.randint(0, 10, (3, 4)),), {"ids": {0: BATCH, 1: SEQ}})
    assert state(gm).input_names == ("ids",)
    assert state(gm).output_names == ("logits", "pair.0", "pair.1.0")
    assert sorted(state(gm).dim_names.values()) == ["batch", "seq"]
    symbols = {v: k for k, v in state(gm).dim_names.items()}
    placeholder = gm.graph.find_nodes(op="placeholder")[0]
    assert [str(d) for d in placeholder.meta["val"].shape] == [symbols["batch"], symbols["seq"]]
    for shape in ((3, 4), (2, 9)):
        ids = torch.randint(0, 10, shape)
        torch.testing.assert_close(gm(ids), module(ids))


def test_no_grad_is_inlined_and_dropout_and_asserts_go() -> None:
    gm = capture(Tagger(), torch.randint(0, 10, (3, 4)))
    assert targets(gm) == [aten.embedding.default, aten.linear.default, aten.flatten.using_ints, aten.batch_norm.default, aten.add.Tensor]
    assert not [m for m in gm.modules() if isinstance(m, GraphModule) and m is not gm]


def test_tied_weights_are_one_constant_and_recorded() -> None:
    module = Tagger()
    gm = capture(module, torch.randint(0, 10, (3, 4)))
    weights = [n.args[0 if n.target is aten.embedding.default else 1] for n in gm.graph.nodes if n.target in targets(gm)[:2]]
    assert weights[0] is weights[1] and weights[0].target == "embed.weight"
    assert state(gm).tied == (("embed.weight", "head.weight"),)
    assert gm.embed.weight is module.embed.weight and isinstance(gm.embed.weight, nn.Parameter)


def test_separate_parameters_on_one_memory_are_tied_too() -> None:
    module = Tagger()
    module.head.weight = nn.Parameter(module.embed.weight.data)
    assert state(capture(module, torch.randint(0, 10, (3, 4)))).tied == (("embed.weight", "head.weight"),)


def test_equal_but_separate_parameters_are_not_tied() -> None:
    module = Tagger()
    module.head.weight = nn.Parameter(module.embed.weight.detach().clone())
    gm = capture(module, torch.randint(0, 10, (3, 4)))
    assert state(gm).tied == () and {n.target for n in gm.graph.find_nodes(op="get_attr")} >= {"embed.weight", "head.weight"}


def test_module_paths_and_source_lines_survive() -> None:
    gm = capture(Tagger(), torch.randint(0, 10, (3, 4)))
    linear = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    assert list(linear.meta["nn_module_stack"].values())[-1][0] == "head"
    assert "self.norm(self.drop(self.head(e)).flatten(0, 1))" in linear.meta["stack_trace"]


def test_a_training_module_is_captured_in_eval_and_left_as_it_was() -> None:
    module = Tagger().train()
    module.norm.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    flags = [m.training for m in module.modules()]
    ids = torch.randint(0, 10, (3, 4))
    gm = capture(module, ids)
    assert [m.training for m in module.modules()] == flags and True in flags and False in flags
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    torch.testing.assert_close(gm(ids), module.eval()(ids))


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Fields(nn.Module):
    def forward(self, batch: dict[str, Tensor], *, pair: tuple[Tensor, Tensor], flag: bool = True) -> Answer:
        total = batch["a"] + pair[0] * pair[1]
        return Answer(logits=total @ batch["b"], hidden=total if flag else -total)


def test_nested_keyword_inputs_and_a_dataclass_of_outputs() -> None:
    module = Fields()
    a, b, c, d = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 4), torch.randn(3, 4)
    dynamic = {"batch": {"a": {0: BATCH}, "b": None}, "pair": ({0: BATCH}, {0: BATCH}), "flag": None}
    gm = capture(module, {"pair": (c, d), "flag": False, "batch": {"a": a, "b": b}}, dynamic)
    assert state(gm).input_names == ("batch.a", "batch.b", "pair.0", "pair.1", "flag")
    assert state(gm).output_names == ("logits", "hidden")
    assert list(state(gm).dim_names.values()) == ["batch"]
    a, c, d = torch.randn(7, 4), torch.randn(7, 4), torch.randn(7, 4)
    got, want = gm(batch={"a": a, "b": b}, pair=(c, d), flag=False), module({"a": a, "b": b}, pair=(c, d), flag=False)
    assert isinstance(got, Answer)
    torch.testing.assert_close((got.logits, got.hidden), (want.logits, want.hidden))


def test_example_inputs_are_kept_in_the_order_of_the_placeholders() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - 2 * y

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    gm = capture(Two(), {"y": y, "x": x})
    assert state(gm).input_names == ("x", "y")
    kept = state(gm).example_inputs
    assert kept is not None and kept[0] is x and kept[1] is y
    torch.testing.assert_close(gm(x, y), x - 2 * y)
    torch.testing.assert_close(gm(y=y, x=x), x - 2 * y)


def test_an_output_named_like_an_input_gets_a_name_of_its_own() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x + 1, "y": x}

    assert state(capture(Same(), torch.ones(2))).output_names == ("x_out", "y")


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.relu(self.conv(x))
        before = z
        z += y
        z.mul_(2)
        return z - before.abs()


def test_in_place_operators_become_functional() -> None:
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    gm = capture(InPlace(), (x, y))
    assert targets(gm) == [aten.conv2d.padding, aten.relu.default, aten.add.Tensor, aten.mul.Tensor, aten.abs.default, aten.sub.Tensor]
    torch.testing.assert_close(gm(x, y), InPlace()(x, y))


def test_writes_through_views_are_resolved_and_layers_stay_whole() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.norm, self.bn = nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)
            nn.init.normal_(self.bn.running_mean)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.fc(self.bn(x)))
            x[:, :2] = 3
            head = x[:, 4:]
            head.mul_(2)
            return x

    x = torch.randn(3, 8)
    gm = capture(Views(), x)
    assert not [t for t in targets(gm) if getattr(t, "_schema", None) is not None and t._schema.is_mutable]
    assert {aten.linear.default, aten.layer_norm.default, aten.batch_norm.default} <= set(targets(gm))
    torch.testing.assert_close(gm(x), Views().eval()(x))


def test_a_write_that_would_promote_keeps_the_type() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = x * 2
            z.add_(y)
            return z

    x, y = torch.randn(3).half(), torch.randn(3)
    got = capture(Half(), (x, y))(x, y)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, Half()(x, y))


def test_a_write_into_an_input_leaves_the_callers_tensor_alone() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(x, inplace=True) + 1

    x = torch.randn(5)
    kept = x.clone()
    gm = capture(First(), x.clone())
    torch.testing.assert_close(gm(x), torch.relu(kept) + 1)
    assert torch.equal(x, kept)


def test_transformer_layers_of_torch_are_seen_through_even_without_gradients() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        gm = capture(layer, x)
        torch.testing.assert_close(gm(x), layer.eval()(x), rtol=1e-5, atol=1e-5)
    assert targets(gm).count(aten.linear.default) == 4 and aten.scaled_dot_product_attention.default in targets(gm)
    assert torch.backends.mha.get_fastpath_enabled()


def test_autocast_becomes_explicit_casts() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x

    x = torch.randn(4, 4)
    got = capture(Mixed(), x)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, Mixed()(x))


def test_the_copy_is_independent() -> None:
    ids = torch.randint(0, 10, (3, 4))
    gm = capture(Tagger(), ids)
    twin = copy.deepcopy(gm)
    with torch.no_grad():
        twin.embed.weight.zero_()
    assert not torch.equal(twin(ids)["logits"], gm(ids)["logits"])
    assert state(twin) is not state(gm) and state(twin).output_names == state(gm).output_names
    torch.testing.assert_close(copy.deepcopy(gm)(ids), gm(ids))


def test_an_exported_program_brings_its_own_inputs() -> None:
    ids = torch.randint(0, 10, (3, 4))
    program = torch.export.export(Tagger().eval(), (ids,), dynamic_shapes={"ids": {0: BATCH, 1: SEQ}}, strict=False)
    gm = capture(program)
    assert state(gm).input_names == ("ids",) and state(gm).tied == (("embed.weight", "head.weight"),)
    assert sorted(state(gm).dim_names.values()) == ["ids_dim0", "ids_dim1"]
    torch.testing.assert_close(gm(ids[:2]), Tagger().eval()(ids[:2]))


def test_an_aten_graph_is_taken_as_it_is() -> None:
    ids = torch.randint(0, 10, (3, 4))
    source = torch.export.export(Tagger().eval(), (ids,), strict=False).run_decompositions().module(check_guards=False)
    gm = capture(source, (ids,))
    assert aten.addmm.default in targets(gm) and aten.linear.default not in targets(gm)
    assert gm is not source
    torch.testing.assert_close(gm(ids), Tagger().eval()(ids))


def test_norms_with_several_results_are_spelled_with_one() -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.LayerNorm(6)).eval()
    nn.init.normal_(module[1].running_mean)
    x = torch.randn(2, 3, 8)
    source = torch.export.export(module, (x,), strict=False).run_decompositions().module(check_guards=False)
    assert aten.native_layer_norm.default in targets(source)
    gm = capture(source, x)
    assert targets(gm)[1:] == [aten.batch_norm.default, aten.layer_norm.default]
    assert gm.graph.find_nodes(op="call_function", target=aten.layer_norm.default)[0].meta["val"].shape == (2, 4, 6)
    torch.testing.assert_close(gm(x), module(x), rtol=1e-5, atol=1e-5)


def test_a_symbolic_trace_is_exported() -> None:
    x = torch.randn(2, 3, 8, 8)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    gm = capture(torch.fx.symbolic_trace(module), x)
    assert targets(gm) == [aten.conv2d.default, aten.relu.default]
    torch.testing.assert_close(gm(x), module(x))


def test_a_captured_graph_is_returned() -> None:
    gm = capture(nn.ReLU(), torch.ones(2))
    assert capture(gm, torch.ones(2)) is gm


def test_numpy_in_forward_is_captured_by_the_second_tracer() -> None:
    class Numpy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(np.tanh(x.numpy())) + 1

    x = torch.randn(3)
    torch.testing.assert_close(capture(Numpy(), x)(x), torch.tanh(x) + 1)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), Branch())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.data_ptr() % 2)


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x)
        return self.seen * 2


class CacheSlice(Cache):
    def forward(self, x: Tensor) -> Tensor:
        self.seen[:2] = x[:2]
        return self.seen * 2


@pytest.mark.parametrize(
    ("module", "line", "remedy"),
    [
        (Outer(), line_of(Branch.forward, "if x.sum()"), "torch.where"),
        (Opaque(), line_of(Opaque.forward, "data_ptr"), "write this line with torch operations"),
        (Cache(), line_of(Cache.forward, "add_"), "'seen'.*return the new value as an output"),
        (CacheSlice(), "", "'seen'.*return the new value as an output"),
    ],
)
def test_what_cannot_be_captured_is_shown_with_its_line_and_a_remedy(module: nn.Module, line: str, remedy: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(CaptureError, match=remedy) as caught:
        capture(module, torch.randn(3, 3) if isinstance(module, Outer) else torch.randn(3))
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert out.getvalue() == ""


def test_the_source_text_is_in_the_error() -> None:
    with pytest.raises(CaptureError, match=r"cannot capture Branch at .*: if x\.sum\(\) > 0:"):
        capture(Branch(), torch.ones(3))


def test_inputs_on_which_the_module_itself_fails_are_blamed() -> None:
    with pytest.raises(CaptureError, match="Outer fails on the example inputs themselves at .*test_capture.py.*return self.inner"):
        capture(Outer(), torch.randn(2, 5))
    with pytest.raises(CaptureError, match="missing 1 required positional argument"):
        capture(Tagger(), ())
    with pytest.raises(CaptureError, match="example_inputs must be a tuple .* got ndarray"):
        capture(Tagger(), np.zeros(3))


def test_a_dimension_that_the_module_fixes_is_explained() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(4, 3) + 1

    with pytest.raises(CaptureError, match="batch.*dynamic_shapes"):
        capture(Fixed(), torch.randn(4, 3), {"x": {0: BATCH}})


def test_other_objects_are_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="not a TorchScript module"):
        capture(torch.jit.trace(nn.ReLU(), torch.ones(2)), torch.ones(2))
    with pytest.raises(CaptureError, match="not a function"):
        capture(torch.relu if inspect.isfunction(torch.relu) else line_of, torch.ones(2))  # type: ignore[arg-type]


def test_a_tensor_kept_on_the_module_does_not_stay_there() -> None:
    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return x + 1

    module = Keeps()
    capture(module, torch.ones(2))
    assert not hasattr(module, "last")


def test_the_flow_copies_a_captured_graph_without_warnings() -> None:
    ids = torch.randint(0, 10, (3, 4))
    gm = capture(Tagger(), ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copy_graph(gm)
    assert twin.graph is not gm.graph and twin.embed.weight is gm.embed.weight
    torch.testing.assert_close(twin(ids), gm(ids))


def test_both_branches_of_a_cond_are_kept() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: x - 1, (x,))

    module, x = Either().eval(), torch.rand(2, 3)
    gm = copy.deepcopy(capture(module, x))
    for value in (x, -x):
        torch.testing.assert_close(gm(value), module(value))
