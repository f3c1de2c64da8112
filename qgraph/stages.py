"""Names of stages in recipes ("w8a8+NAME", or `stages:` of a YAML file) -> passes. One more pass is one more line here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from qgraph.errors import RecipeError, nearest
from qgraph.pipeline import Pass

STAGES: dict[str, str | Callable[..., Pass]] = {
    "smoothquant": "qgraph.passes.smooth_quant:SmoothQuant",
    "awq": "qgraph.passes.awq:AWQ",
    "cle": "qgraph.passes.equalize:Equalize",
    "relax-clip": "qgraph.passes.relax_clip:RelaxClip",
    "absorb-high-bias": "qgraph.passes.absorb_high_bias:AbsorbHighBias",
    "absorb-from-moments": "qgraph.passes.absorb_high_bias:AbsorbFromMoments",
    "ranges-from-moments": "qgraph.passes.ranges_from_moments:RangesFromMoments",
    "correct-from-moments": "qgraph.passes.bias_correct:CorrectFromMoments",
    "weigh-channels": "qgraph.passes.weigh_channels:WeighChannels",
    "two-level": "qgraph.passes.two_level:TwoLevel",
    "reduce-range": "qgraph.passes.reduce_range:ReduceRange",
    "mixed": "qgraph.passes.mixed:Mixed",
    "bits": "qgraph.passes.allocate_bits:AllocateBits",
    "bias-correct": "qgraph.passes.bias_correct:BiasCorrect",
    "super-weight": "qgraph.passes.super_weight:SuperWeight",
    "llm-int8": "qgraph.passes.split_outliers:SplitOutliers",
    "dense-sparse": "qgraph.passes.keep_weights:KeepLargest",
    "keep-sensitive": "qgraph.passes.keep_weights:KeepSensitive",
    "round": "qgraph.passes.round_weights:RoundWeights",
    "gptq": "qgraph.passes.gptq:GPTQ",
    "double-scales": "qgraph.passes.double_scales:DoubleScales",
}
"""Stage name in a recipe -> factory of a pass whose keywords are its options, or "module:factory" that is imported when first asked for."""


def register_stage(name: str, factory: Callable[..., Pass]) -> None:
    """Make `+name` usable in recipe names and in the `stages` of YAML files. See `Pass` for where a stage runs."""
    STAGES[name] = factory


def stage(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """The pass of this name with these options. Raises RecipeError for an unknown name or option, one that is missing, or one of no use."""
    if name not in STAGES:
        raise RecipeError(f"unknown stage +{name}{nearest(name, STAGES)}")
    factory = STAGES[name]
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    known, given = inspect.signature(factory).parameters, options or {}
    for option in given:
        if option not in known:
            raise RecipeError(f"stage {name} has no option {option!r}{nearest(str(option), known)}")
    if missing := [k for k, p in known.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and k not in given]:
        raise RecipeError(f"stage {name} needs {', '.join(missing)}: write stages: [{{{name}: {{{missing[0]}: ...}}}}]")
    try:
        return factory(**given)
    except (TypeError, ValueError) as error:  # a value of another type than the option's
        raise RecipeError(f"stage {name} cannot take {dict(given)}: {error}") from error


def stages_of(value: Any) -> tuple[Pass, ...]:
    """["smoothquant", {"smoothquant": {"alpha": 0.4}}, a pass] -> passes. Raises RecipeError."""
    found = []
    for s in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(s, Mapping):
            found.append(stage(s) if isinstance(s, str) else s)
            continue
        for name, options in s.items():
            if not isinstance(options or {}, Mapping):
                raise RecipeError(f"stage {name} must be a mapping, got {options!r}")
            found.append(stage(str(name), options))
    return tuple(found)
