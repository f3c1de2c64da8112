"""Recipes: names, YAML files, overrides, and the errors that name the nearest thing."""

from pathlib import Path

import pytest

from qgraph.errors import RecipeError
from qgraph.recipe import NAMES, Int, Recipe, load_recipe
from qgraph.types import PerAxis, PerGroup, PerTensor, PerToken, QSpec


@pytest.mark.parametrize("name", NAMES)
def test_a_listed_name_is_a_recipe_of_that_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_static_w8a8_has_signed_channels_and_unsigned_activations() -> None:
    recipe = load_recipe("w8a8")
    assert recipe.weights is not None and recipe.activations is not None
    assert recipe.weights.weight_spec(in_axis=0, out_axis=1) == QSpec("int8", True, PerAxis(1))
    assert recipe.activations.activation_spec() == QSpec("uint8", False, PerTensor())
    assert recipe.static


def test_dynamic_recipes_need_no_data() -> None:
    recipe = load_recipe("w8a8-dynamic")
    assert recipe.activations is not None
    assert recipe.activations.activation_spec() == QSpec("uint8", False, PerTensor(), dynamic=True)
    assert not recipe.static


def test_groups_run_along_the_input_axis_and_are_asymmetric_unless_said() -> None:
    for name, symmetric in (("w4a16-g128", False), ("w4a16-g32-sym", True)):
        recipe = load_recipe(name)
        assert recipe.weights is not None and recipe.activations is None
        spec = recipe.weights.weight_spec(in_axis=1, out_axis=0)
        assert spec == QSpec("int4", symmetric, PerGroup(1, recipe.weights.group or 0))


def test_w4a8_quantizes_rows_per_weight_block() -> None:
    recipe = load_recipe("w4a8-g64")
    assert recipe.activations is not None
    assert recipe.activations.activation_spec() == QSpec("int8", True, PerGroup(-1, 64), dynamic=True)


def test_token_suffix_means_a_scale_for_each_row() -> None:
    activations = load_recipe("w8a8-token").activations
    assert activations is not None
    assert activations.activation_spec() == QSpec("int8", True, PerToken(), dynamic=True)


def test_a_yaml_file_changes_a_named_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "recipe: w8a8\nobserver: percentile\nobserver_options: {percentile: 99.9}\n"
        "rules: {head: null, 'body.*': {weights: {bits: 4}}}\nweights: {per: tensor}\n"
    )
    recipe = load_recipe(file)
    assert recipe.name == "mine" and recipe.observer == "percentile" and recipe.observer_options == {"percentile": 99.9}
    assert recipe.weights == Int(8, per="tensor")
    assert recipe.rules["head"] is None
    assert recipe.rules["body.*"] == {"weights": Int(4)}


def test_weight_ranges_are_chosen_by_an_override() -> None:
    recipe = load_recipe("w8a8-dynamic", ["weight_range=percentile", "weight_range_options.percentile=99"])
    assert recipe.weight_range == "percentile" and recipe.weight_range_options == {"percentile": 99}


def test_overrides_reach_nested_fields_and_rules_with_dots() -> None:
    recipe = load_recipe("w8a8", ["weights.bits=4", "rules.encoder.*=null", "observer=moving-average"])
    assert recipe.weights == Int(4) and recipe.rules == {"encoder.*": None} and recipe.observer == "moving-average"


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("w8a9x", [], "unknown recipe 'w8a9x'; did you mean 'w8a8'"),
        ("w8a8-encodr", (), "unknown suffix -encodr; did you mean 'w8a8-encoder'"),
        ("w8a8-dynamik", [], "unknown suffix -dynamik; did you mean 'dynamic'"),
        ("w8a8+nothing", [], r"unknown stage \+nothing"),
        ("w99a8", [], "must be int2..int16"),
        ("w16a16", [], "quantizes nothing"),
        ("w8a8kv8", ["kv_cache.group=32"], "kv_cache takes bits and symmetric alone"),
        ("missing.yaml", [], "missing.yaml: No such file"),
        ("w8a8", ["observr=minmax"], "no field 'observr'; did you mean 'observer'"),
        (
            "w8a8-dynamic",
            ["observer=mse"],
            "observer='mse' chooses static activation ranges, and recipe w8a8-dynamic has none.*weight_range",
        ),
        ("w8a8", ["weight_range_options=3"], "weight_range_options must be a mapping"),
        ("w8a8", ["weights.bit=4"], "no option 'bit'; did you mean 'bits'"),
        ("w8a8", ["weights"], "key=value"),
        ("w8a8", ["rules.x={weight: null}"], "no field 'weight'; did you mean 'weights'"),
        ("w8a8", ["weights.per=row"], "per='row' is unknown"),
        ("w8a8", ["weights.group=-1"], "positive number"),
    ],
)
def test_bad_recipes_are_named_with_the_nearest_good_one(source: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(source, overrides)


def test_a_yaml_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    for text, message in (("- 1\n", "must hold a mapping"), ("a: [", "is not YAML")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("make", [lambda: Int(8, per="group"), lambda: Int(4, group=32, per="tensor"), lambda: Int(1)])
def test_formats_without_meaning_cannot_be_built(make: object) -> None:
    with pytest.raises(RecipeError):
        make()  # type: ignore[operator]


def test_weights_cannot_be_dynamic_and_activations_cannot_be_per_channel() -> None:
    with pytest.raises(RecipeError, match="no dynamic"):
        Int(8, dynamic=True).weight_spec(in_axis=0, out_axis=1)
    with pytest.raises(RecipeError, match="no per-channel"):
        Int(8, per="channel").activation_spec()


def test_a_recipe_object_passes_through() -> None:
    recipe = Recipe(weights=Int(8))
    assert load_recipe(recipe) is recipe


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[bits]", r"stage bits needs size: write stages: \[\{bits: \{size: ...\}\}\]"),
        ("[{bits: {size: 10, choices: 4}}]", "stage bits cannot take .*: 'int' object is not iterable"),
        ("[{gptq: {dmap: 0.1}}]", "stage gptq has no option 'dmap'.*'damp'"),
        ("[{gptq: 3}]", "stage gptq must be a mapping, got 3"),
        ("[gpqt]", "unknown stage \\+gpqt; did you mean 'gptq'"),
    ],
)
def test_stages_that_cannot_be_made_are_refused_with_what_to_write(stages, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("w4a16-g32", [f"stages={stages}"])
