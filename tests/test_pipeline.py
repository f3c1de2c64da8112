"""Passes alone, in pipelines and in torch's PassManager; verification that catches a pass which breaks its word."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.fx.passes.infra.pass_manager import PassManager

from qgraph.contracts import FLOOR, difference
from qgraph.errors import QGraphError, VerificationError
from qgraph.pattern import Const, Op, Var
from qgraph.pipeline import EQUIVALENT, EXACT, LOSSY, Context, Contract, Hook, Pass, Pipeline
from qgraph.rewrite import rule
from qgraph.testing import check, from_torch
from qgraph.text import text
from qgraph.views import Linear

ATEN = torch.ops.aten
X = torch.linspace(-1, 1, 6).view(2, 3)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(3, 5), torch.nn.Linear(5, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) * 3.0


def net():
    return from_torch(Net(), X)[0]


@rule(Op(Linear, "linear", x=Var("x"), weight=Const("w"), bias=Const("b")))
def split(m, rw):
    return rw.call(ATEN.add.Tensor, rw.call(ATEN.linear.default, m.x, m.w), m.b)


@rule(Op(ATEN.relu.default, self=Var("x")))
def relu_to_gelu(m, rw):
    return rw.call(ATEN.gelu.default, m.x)


@rule(Op(ATEN.mul.Tensor, self=Var("x"), other=3.0))
def mul_last(m, rw):
    return rw.call(ATEN.mul.Scalar, m.x, 3.0)


@dataclass(frozen=True)
class Rewrites(Pass):
    """Test pass: applies one rule under a contract given by the subclass."""

    limit: int = 7

    rules: ClassVar[tuple[Any, ...]] = ()

    def run(self, gm, ctx):
        return ctx.apply(gm, self.rules)


class SplitLinear(Rewrites):
    contract = EQUIVALENT(1e-6)
    rules = (split,)


class SplitLinearExactly(Rewrites):
    contract = EXACT
    rules = (mul_last,)


class WrongActivation(Rewrites):
    contract = EQUIVALENT(1e-3)
    rules = (relu_to_gelu,)


class LossyActivation(Rewrites):
    contract = LOSSY
    rules = (relu_to_gelu,)


@dataclass(frozen=True)
class Call(Pass):
    """Test pass around a function of the graph."""

    fn: Callable[[torch.fx.GraphModule], int]
    name: ClassVar[str] = "call"

    def run(self, gm, ctx):
        return self.fn(gm)


def test_a_pass_is_named_after_its_class_and_prints_its_options():
    assert SplitLinear.name == "split_linear"
    assert str(SplitLinear(limit=3)) == "split_linear(limit=3)"
    assert str(Pipeline(SplitLinear(), Pipeline(LossyActivation(1), name="inner"))) == (
        "pipeline(split_linear(limit=7), inner(lossy_activation(limit=1)))"
    )
    assert SplitLinear(limit=3) == SplitLinear(limit=3) != SplitLinear()


def test_a_pass_called_alone_says_whether_it_changed_the_graph():
    gm = net()
    first, again = SplitLinear()(gm), LossyActivation()(gm)
    assert first.graph_module is gm and first.modified and again.modified
    assert not LossyActivation()(gm).modified


def test_torchs_pass_manager_takes_passes_and_pipelines():
    gm = net()
    want = gm(X)
    result = PassManager(passes=[SplitLinear(), Pipeline(SplitLinearExactly())], run_checks_after_each_pass=True)(gm)
    assert result.modified
    assert "aten.mul.Scalar" in text(result.graph_module) and "aten.linear(%x, @up.weight)" in text(result.graph_module)
    torch.testing.assert_close(result.graph_module(X), want)


def test_a_step_has_count_time_and_declines():
    @rule(Op(ATEN.relu.default, self=Var("x")))
    def never(m, rw):
        rw.decline("not today")

    class Shy(Rewrites):
        rules = (never, mul_last)

    ctx = Context()
    steps = Pipeline(SplitLinear(), Shy()).run(net(), ctx)
    assert [(s.name, s.count) for s in steps] == [("split_linear", 2), ("shy", 1)]
    assert all(s.seconds > 0 for s in steps)
    assert [str(d) for d in steps[1].declines] == ["never declined at relu: not today"]
    assert ctx.steps == steps and tuple(ctx.declines) == steps[1].declines and steps[0].declines == ()
    assert str(steps[1]).startswith("shy: 1 changes in ")


def test_nested_pipelines_give_their_steps_in_place():
    steps = Pipeline(SplitLinear(), Pipeline(LossyActivation(), SplitLinearExactly())).run(net())
    assert [s.name for s in steps] == ["split_linear", "lossy_activation", "split_linear_exactly"]


def test_hooks_run_before_and_after_each_pass_also_in_nested_pipelines():
    events: list[tuple[str, Any]] = []
    hook = Hook(before=lambda p, gm: events.append(("before", p.name)), after=lambda p, gm, step: events.append((p.name, step.count)))
    Pipeline(SplitLinear(), Pipeline(LossyActivation()), hooks=[hook]).run(net())
    assert events == [("before", "split_linear"), ("split_linear", 2), ("before", "lossy_activation"), ("lossy_activation", 1)]


def test_recorded_steps_print_their_graphs_and_others_keep_none():
    recorded = Pipeline(LossyActivation(), SplitLinearExactly()).run(net(), Context(record=True))
    assert "aten.relu" in recorded[0].before and "aten.gelu" in recorded[0].after
    assert recorded[0].after == recorded[1].before
    assert "- %1: f32[2,5] = aten.relu(%0)\n+ %1: f32[2,5] = aten.gelu(%0)" in recorded[0].diff()
    plain = Pipeline(LossyActivation()).run(net())[0]
    assert (plain.before, plain.after) == (None, None)
    with pytest.raises(QGraphError, match=r"kept no graphs: run with Context\(record=True\)"):
        plain.diff()


def test_numerics_accepts_passes_that_keep_their_contract_and_skips_lossy_ones():
    ctx = Context(samples=[(X,), (X * 2,)])
    for lossy in (LossyActivation(), Pipeline(LossyActivation())):
        steps = Pipeline(SplitLinear(), lossy, SplitLinearExactly(), verify="numerics").run(net(), ctx)
        assert [s.count for s in steps] == [2, 1, 1]


def test_numerics_names_the_pass_the_node_and_the_worst_element():
    with pytest.raises(VerificationError) as caught:
        Pipeline(SplitLinearExactly(), WrongActivation(), verify="numerics").run(net(), Context(samples=[(X,)]))
    message = str(caught.value)
    assert message.startswith("wrong_activation broke EQUIVALENT(0.001): down ")  # the first surviving node, by module path
    assert "linear_1: f32[2,4] = aten.linear(%gelu_default" in message
    assert "worst element [" in message and "before" in message and "after" in message and "allowed difference" in message
    assert message.endswith("it reads %gelu_default, made by relu_to_gelu")


def test_numerics_finds_a_pass_that_edits_the_graph_behind_the_drivers_back():
    def negate_output(gm):
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            output.args = ((gm.graph.call_function(ATEN.neg.default, (output.args[0][0],)),),)
        gm.recompile()
        return 0

    with pytest.raises(VerificationError, match=r"call broke EXACT: output 0: worst element \[\d, \d\]: before"):
        Pipeline(Call(negate_output), verify="numerics").run(net(), Context(samples=[(X,)]))


def test_numerics_is_applied_inside_nested_pipelines():
    with pytest.raises(VerificationError, match="wrong_activation broke"):
        Pipeline(SplitLinear(), Pipeline(WrongActivation()), verify="numerics").run(net(), Context(samples=[(X,)]))
    with pytest.raises(VerificationError, match="wrong_activation broke"):
        Pipeline(SplitLinear(), Pipeline(WrongActivation(), verify="numerics")).run(net(), Context(samples=[(X,)]))


def test_numerics_reports_a_graph_that_no_longer_runs():
    def shrink(gm):
        linear = next(n for n in gm.graph.nodes if n.target is ATEN.linear.default)
        linear.args = (linear.args[0], linear.args[2])
        gm.recompile()
        return 1

    with pytest.raises(VerificationError, match="call broke the graph: it does not run any more: "):
        Pipeline(Call(shrink), verify="numerics").run(net(), Context(samples=[(X,)]))


def test_numerics_compares_random_graphs_with_equal_draws():
    class Noisy(torch.nn.Module):
        def forward(self, x):
            return torch.rand_like(x) * 3.0

    class Drawing(SplitLinearExactly):
        def run(self, gm, ctx):
            torch.rand(7)
            return super().run(gm, ctx)

    gm, _ = from_torch(Noisy(), X)
    assert Pipeline(Drawing(), verify="numerics").run(gm, Context(samples=[(X,)]))[0].count == 1
    state = torch.random.get_rng_state()
    Pipeline(SplitLinearExactly(), verify="numerics").run(gm, Context(samples=[(X,)]))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_numerics_without_samples_is_an_error_and_so_is_an_unknown_mode():
    for pipeline in (Pipeline(verify="numerics"), Pipeline(Pipeline(verify="numerics"))):
        with pytest.raises(QGraphError, match="needs sample inputs"):
            pipeline.run(net())
    with pytest.raises(QGraphError, match="verify is None, 'structure' or 'numerics', not 'all'"):
        Pipeline(verify="all")


def test_structure_catches_an_illegal_graph_after_the_pass_that_made_it():
    def move(gm):
        nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
        nodes[0].prepend(nodes[1])
        return 1

    with pytest.raises(VerificationError, match=r"after call: %relu at relu .*reads %linear before it is computed"):
        Pipeline(SplitLinearExactly(), Call(move), verify="structure").run(net())


def test_check_takes_passes_and_notices_one_that_never_stops_changing():
    def grow(gm):
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            output.args = ((gm.graph.call_function(ATEN.alias.default, (output.args[0][0],)),),)
        gm.recompile()

    check(SplitLinearExactly(), from_torch(Net(), X), (X,), None)
    with pytest.raises(AssertionError, match="a second run reports 2 changes"):
        check(Call(lambda gm: 2), from_torch(Net(), X), (X,), None)
    with pytest.raises(AssertionError, match="a second run changed the graph"):
        check(grow, from_torch(Net(), X), (X,), None)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(WrongActivation(), from_torch(Net(), X), (X,), None)
    with pytest.raises(AssertionError, match="and not what was expected"):
        check(SplitLinearExactly(), from_torch(Net(), X), (X,), "return %x")


@pytest.mark.parametrize(
    ("before", "after", "tol", "expected"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0, None),
        ([1.0, -2.0], [1.0, -2.5], 0.0, "worst element [1]: before -2.0, after -2.5, allowed difference 0"),
        ([1.0, 100.0], [1.05, 100.0], 1e-3, None),  # relative to the largest magnitude
        ([1.0, 100.0], [1.2, 100.05], 1e-3, "worst element [0]: before 1.0, after 1.2000000476837158, allowed difference 0.1"),
        ([0.0, 0.0], [0.0, FLOOR * 0.9e-3], 1e-3, None),
        ([0.0, 0.0], [0.0, FLOOR * 1.1e-3], 1e-3, "worst element [1]"),
        ([float("nan"), float("inf")], [float("nan"), float("inf")], 0.0, None),
        ([float("nan"), 1.0], [0.0, 1.0], 1e-3, "worst element [0]: before nan, after 0.0"),
        ([float("inf"), 1.0], [float("-inf"), 1.0], 1e-3, "worst element [0]: before inf, after -inf"),
        ([], [], 0.0, None),
        ([1.0], [[1.0]], 0.0, "before torch.float32[1], after torch.float32[1, 1]"),
    ],
)
def test_difference_follows_the_definition_of_the_contracts(before, after, tol, expected):
    found = difference(torch.tensor(before), torch.tensor(after), tol)
    assert found is None if expected is None else found is not None and found.startswith(expected)


def test_contracts_print_as_they_are_written_and_refuse_a_meaningless_tolerance():
    assert [str(c) for c in (EXACT, EQUIVALENT(1e-5), LOSSY)] == ["EXACT", "EQUIVALENT(1e-05)", "LOSSY"]
    assert isinstance(EXACT, Contract)
    for tol in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="tol must be between 0 and 1"):
            EQUIVALENT(tol)
