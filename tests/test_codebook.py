"""Codebooks: their levels, how they are fitted, written in recipes, and what becomes of a weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

import qgraph
from qgraph.codebook import LEVELS, TableLevels, fit, log_levels, normal_levels, rounded
from qgraph.errors import CalibrationError, RecipeError
from qgraph.hessian import lattice, round_rows
from qgraph.ops import Q
from qgraph.recipe import Int, Recipe, load_recipe, named
from qgraph.reference import encode, fake_lookup, lookup
from qgraph.types import PerAxis, PerGroup, PerTensor, QSpec
from qgraph.verify import check_graph
from tests.small import mlp_proto, mlp_torch, samples

PUBLISHED = (  # Dettmers et al., QLoRA (2023), appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def spec(name: str, bits: int = 4, per=None) -> QSpec:
    return QSpec(f"uint{bits}", granularity=per or PerAxis(0), codebook=name)


def test_nf4_is_the_published_table_bit_for_bit() -> None:
    assert normal_levels(4).tolist() == list(PUBLISHED)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_normal_levels_are_quantiles_at_even_probabilities_on_either_side(bits: int) -> None:
    levels, half = normal_levels(bits).double().numpy(), 2 ** (bits - 1)
    assert len(levels) == 2**bits and levels[half - 1] == 0 and (levels[0], levels[-1]) == (-1, 1)
    largest = norm.ppf(1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2)
    for side in (levels[half - 1 :], levels[:half]):
        steps = abs(norm.cdf(side * largest)[1:] - norm.cdf(side * largest)[:-1])
        assert steps == pytest.approx(steps[0], abs=1e-5)


def test_log_levels_are_zero_and_powers_of_two() -> None:
    assert log_levels(3).tolist() == [-1, -0.5, -0.25, 0, 0.125, 0.25, 0.5, 1]
    assert log_levels(2).tolist() == [-1, 0, 0.5, 1]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(6,), (5, 6)]), st.sampled_from([None, 0, 1, -1]), st.integers(1, 9))
def test_encode_finds_the_nearest_level(seed: int, shape: tuple[int, ...], axis: int | None, count: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    axis = None if axis is None or len(shape) == 1 else axis
    table = torch.randn(count if axis is None else (shape[axis], count), generator=g).sort(-1).values
    codes = encode(x, table, None, axis)
    rows = table if axis is None else table.reshape([*(n if i == axis % 2 else 1 for i, n in enumerate(shape)), count])
    nearest = (x[..., None] - rows).abs().amin(-1)
    assert codes.dtype == torch.uint8 and torch.equal((lookup(codes, table, None, axis) - x).abs(), nearest)


def test_of_two_levels_as_near_the_lower_one_is_taken() -> None:
    assert encode(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([-2.0, 0.0, 0.0, 4.0]), None).tolist() == [0, 1, 2]


def test_scales_multiply_what_the_table_holds() -> None:
    table, scale = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([[1.0, 10.0]])
    x = torch.tensor([[0.9, 1.1, 15.0]])  # the second group has one element
    assert fake_lookup(x, table, scale, None, 1, 2).tolist() == [[0.0, 2.0, 20.0]]
    with pytest.raises(ValueError, match="does not fit"):
        lookup(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3, 4), None, 0)


def test_the_gradient_goes_straight_to_the_weight() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    grad = torch.randn(3, 4)
    Q.fake_lookup(x, log_levels(3), None).backward(grad)
    assert torch.equal(x.grad, grad)


_SEED = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(12, 64, generator=_SEED) * torch.rand(12, 1, generator=_SEED) * 0.1
CHANNELS = torch.rand(1, 64, generator=_SEED).pow(4) + 0.01


def error(found: torch.Tensor, importance: torch.Tensor = CHANNELS) -> float:
    return float((importance * (found - WEIGHT).square()).sum())


@pytest.mark.parametrize("per", [PerTensor(), PerAxis(0), PerGroup(1, 16), PerGroup(1, 24)])
@pytest.mark.parametrize("name", [*LEVELS, "kmeans"])
def test_a_search_and_importance_lessen_the_error_that_counts(name: str, per) -> None:
    plain = error(fit(WEIGHT, spec(name, per=per)).nearest(WEIGHT))
    searched = error(fit(WEIGHT, spec(name, per=per), CHANNELS, search="search").nearest(WEIGHT))
    assert searched < plain or (name == "log" and searched == plain)  # twice a scale has nearly the same levels
    assert searched <= error(fit(WEIGHT, spec(name, per=per), search="search").nearest(WEIGHT))


def test_kmeans_is_better_than_levels_that_do_not_know_the_weights() -> None:
    assert error(rounded(WEIGHT, spec("kmeans")), 1) < 0.8 * error(rounded(WEIGHT, spec("nf")), 1)
    grouped = error(rounded(WEIGHT, spec("kmeans", per=PerGroup(1, 32))), 1)
    assert grouped < 0.8 * error(rounded(WEIGHT, spec("nf", per=PerGroup(1, 32))), 1)


def test_tables_and_scales_are_numbers_of_float16_where_these_do() -> None:
    for found in (fit(WEIGHT, spec("kmeans")).table, fit(WEIGHT, spec("nf")).scale):
        assert torch.equal(found.half().float(), found)
    tiny = fit(WEIGHT * 1e-7, spec("nf"))
    assert not torch.equal(tiny.scale.half().float(), tiny.scale)
    assert error(tiny.nearest(WEIGHT * 1e-7) * 1e7) < 1.01 * error(fit(WEIGHT, spec("nf")).nearest(WEIGHT))


@pytest.mark.parametrize("name", [*LEVELS, "kmeans"])
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    weight = torch.cat([torch.zeros(2, 64), WEIGHT])
    assert bool((rounded(weight, spec(name))[:2] == 0).all())


@pytest.mark.parametrize("grouped", [False, True])
def test_levels_serve_gptq(grouped: bool) -> None:
    seed = torch.Generator().manual_seed(5)
    x = torch.randn(400, 64, generator=seed) @ torch.randn(64, 64, generator=seed)
    h = (x.T @ x / len(x))[None]
    found = fit(WEIGHT, spec("kmeans", 3, PerGroup(1, 16) if grouped else PerAxis(0)), h[0].diagonal()[None])
    scale = None if found.scale is None else found.scale.repeat_interleave(16, 1)[None]
    levels, on = TableLevels(found.table[None], scale), lattice(h)
    assert torch.equal(levels.nearest(WEIGHT[None])[0], found.nearest(WEIGHT))
    result = round_rows(WEIGHT[None], on, levels)[0]
    assert torch.equal(found.nearest(result), result)
    costs = [float((((w - WEIGHT) @ h[0]) * (w - WEIGHT)).sum()) for w in (result, found.nearest(WEIGHT))]
    assert costs[0] < 0.75 * costs[1], costs


def test_names_of_recipes() -> None:
    assert named("nf4-g64").weights == Int(4, group=64, codebook="nf") == named("w4a16-nf-g64").weights
    assert named("w3a16-kmeans").weights == Int(3, codebook="kmeans")
    assert named("w4a16-log").weights == Int(4, codebook="log")
    rules = load_recipe("nf4-g64", ["rules.second={weights: {bits: 8, codebook: null, group: null}}"]).rules
    assert rules["second"]["weights"] == Int(8)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Int(4, codebook="nf5"), "unknown codebook 'nf5'; did you mean 'nf'?"),
        (lambda: Int(8, codebook="nf"), "a codebook has 2 to 6 bits, not 8; for integers, give codebook: null"),
        (lambda: Int(4, codebook="nf", symmetric=False), "levels of codebook 'nf' are what they are"),
        (lambda: Int(4, codebook="nf").activation_spec(), "codebook 'nf' is for weights"),
        (lambda: named("w4a8-nf-g64"), "take 16 bits for activations, such as w4a16-nf-g64"),
        (lambda: load_recipe("nf4-g64", ["weight_range=entropy"]), "weight_range of a codebook is minmax or search, not 'entropy'"),
        (lambda: Recipe(weights=Int(8), kv_cache=Int(4, codebook="log")), "kv_cache takes bits and symmetric alone"),
        (lambda: named("w4a16-nff"), "unknown suffix -nff; did you mean 'nf'?"),
    ],
)
def test_what_has_no_meaning_is_refused_with_a_sentence(make, text: str) -> None:
    with pytest.raises(RecipeError, match=text.replace("?", r"\?")):
        make()


def test_a_spec_with_a_codebook_prints_its_name() -> None:
    assert str(spec("nf", per=PerGroup(1, 64))) == "nf4 per group of 64 along axis 1"
    with pytest.raises(ValueError, match="codes of a codebook"):
        QSpec("int4", codebook="nf")


def quantized(recipe, origin: str = "onnx", **options):
    model, example = mlp_torch() if origin == "torch" else (mlp_proto(), None)
    x = samples(12)
    batches = [(torch.from_numpy(x[:4]),)] if origin == "torch" else [{"x": x}]
    return qgraph.quantize(model, batches, example_inputs=example, recipe=recipe, **options)


@pytest.mark.parametrize("origin", ["torch", "onnx"])
@pytest.mark.parametrize("recipe", ["nf4-g10", "w3a16-kmeans", "w4a16-kmeans-g16", "w4a16-log", "w4a16-nf-tensor"])
def test_prepare_and_convert_make_codes_of_the_nearest_levels(origin: str, recipe: str) -> None:
    graph = quantized(recipe, origin)
    text = qgraph.text(graph)
    assert text.count("qg.lookup") == 2 and "fake" not in text
    model = mlp_torch()[0]
    with torch.no_grad():
        for layer in (model.first, model.second):
            wanted = load_recipe(recipe).weights.weight_spec(in_axis=1, out_axis=0)
            layer.weight.copy_(fit(layer.weight, wanted, search="search").nearest(layer.weight))
        x = torch.from_numpy(samples(4))
        found = graph(x)
        assert torch.allclose(found[0] if isinstance(found, tuple | list) else found, model(x), atol=1e-5)
    formats = {e.decision for e in graph.meta["qgraph"].ledger if e.role == "weight"}
    assert all(f.startswith(("nf4", "kmeans3", "kmeans4", "log4")) for f in formats), formats


def test_rules_and_codebooks_meet() -> None:
    graph = quantized(load_recipe("w4a16-kmeans", ["rules.second={weights: {bits: 8, codebook: null}}"]))
    assert {e.node: e.decision for e in graph.meta["qgraph"].ledger if e.role == "weight"} == {
        "first": "kmeans4 per axis 1",
        "second": "int8 sym per axis 0",
    }
    with pytest.raises(RecipeError, match="levels of a codebook are multiplied in float"):
        quantized(load_recipe("w8a8-dynamic", ["rules.second={weights: {bits: 4, codebook: nf}}"]))


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = mlp_torch()
    model[0].second.weight.data[2, 3] = torch.nan
    with pytest.raises(CalibrationError, match="second.weight' contains NaN or infinity"):
        qgraph.quantize(model[0], example_inputs=model[1], recipe="nf4-g16")


def test_what_is_quantized_is_not_quantized_again() -> None:
    with pytest.raises(qgraph.ModelError, match="the model is quantized already"):
        qgraph.prepare(quantized("nf4-g16"), recipe="w8a16")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"table": torch.tensor([0.0, 2.0, 1.0])}, "levels are not ascending numbers"),
        ({"q": torch.full((3, 4), 3, dtype=torch.uint8)}, "has code 3; its table has 3 levels"),
        ({"table": torch.zeros(2, 3), "table_axis": 0}, "a table of 2 rows for 3 along axis 0"),
        ({"table": torch.zeros(3, 3)}, "a table is"),
        ({"scale": torch.zeros(3), "axis": 0}, "has a scale that is 0 or no number somewhere"),
        ({"scale": torch.ones(4), "axis": 0}, "has scale of shape"),
    ],
)
def test_an_illegal_lookup_is_named(changed: dict, text: str) -> None:
    values = {"q": torch.ones(3, 4, dtype=torch.uint8), "table": torch.tensor([0.0, 1.0, 2.0]), "scale": None} | changed
    gm = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    tensors = []
    for name in ("q", "table", "scale"):
        if values[name] is not None:
            gm.register_buffer(name, values[name])
        tensors.append(None if values[name] is None else gm.graph.get_attr(name))
    gm.graph.output(gm.graph.call_function(Q.lookup.default, (*tensors, values.get("table_axis"), values.get("axis"), 0)))
    with pytest.raises(qgraph.VerificationError, match=text):
        check_graph(gm)


@pytest.mark.parametrize("recipe", ["w3a16-kmeans", "w3a16-nf-g8"])
def test_stages_that_round_for_the_output_take_the_levels(recipe: str) -> None:
    x = torch.from_numpy(samples(64)) @ torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    model, errors = mlp_torch()[0], []
    for stage in ("", "+gptq", "+round"):
        graph = qgraph.quantize(model, [(b,) for b in x.split(8)], example_inputs=(x[:8],), recipe=recipe + stage)
        assert qgraph.text(graph).count("qg.lookup") == 2
        with torch.no_grad():
            errors.append(float((torch.cat([graph(b) for b in x.split(8)]) - model(x)).square().mean()))
    assert max(errors[1:]) < 0.8 * errors[0], errors
