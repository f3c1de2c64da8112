"""Recipes: what is wanted. A name such as "w4a8-g128", a `Recipe` object, or a YAML file.

    NAME   = SCHEME { "+" STAGE }
    SCHEME = "w" BITS "a" BITS ["kv" BITS] { "-dynamic" | "-token" | "-g" SIZE | "-sym" | "-asym" | "-tensor" | "-" CODEBOOK }
           | "nf" BITS { "-g" SIZE }

16 and 32 bits mean "stays float". CODEBOOK is "nf", "log" or "kmeans" (see codebook.py); "nf4-g64" is short for "w4a16-nf-g64". "-asym"
behind "-token" is about the activations: integer kernels take symmetric weights. Names in `ALIASES` stand for several fields. What a
backend makes of a recipe (which edges, which layout) is decided by `annotate`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from qgraph.codebook import KMEANS, LEVELS, SEARCHES, require_codebook
from qgraph.errors import RecipeError, nearest
from qgraph.pipeline import Pass
from qgraph.stages import stage, stages_of
from qgraph.types import Granularity, PerAxis, PerGroup, PerTensor, PerToken, QSpec

Per = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True)
class Int:
    """An integer format, before it is known which axis of which tensor it is laid on.

    `per` is "channel" (one scale per output channel; weights), "tensor", "token" (one per row, at run time) or "group" (`group`
    neighbours along the input axis; implied by `group`). `symmetric` None: symmetric, except for groups and activations per tensor.
    `unsigned` stores 0 .. 2**bits - 1. With a `codebook` (see codebook.py; weights only) the integers are codes of its levels.
    Raises RecipeError for a combination that has no meaning."""

    bits: int
    group: int | None = None
    per: Per | None = None
    symmetric: bool | None = None
    unsigned: bool = False
    dynamic: bool = False
    codebook: str | None = None

    def __post_init__(self) -> None:
        if self.codebook is not None:
            require_codebook(self.codebook)
            if not 2 <= self.bits <= 6:
                raise RecipeError(f"a codebook has 2 to 6 bits, not {self.bits}; for integers, give codebook: null")
            if self.symmetric is not None or self.unsigned or self.dynamic or self.per == "token":
                raise RecipeError(f"levels of codebook {self.codebook!r} are what they are: give bits and group, or per, alone")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise RecipeError(f"group must be a positive number of elements, got {self.group!r}")
        if self.per is not None and self.per not in ("tensor", "channel", "group", "token"):
            raise RecipeError(f"per={self.per!r} is unknown{nearest(str(self.per), ('tensor', 'channel', 'group', 'token'))}")
        if (self.per == "group") != (self.group is not None) and self.per is not None:
            raise RecipeError(f'per="group" and group=SIZE belong together, got per={self.per!r}, group={self.group!r}')
        try:
            self._spec(PerTensor(), symmetric=True)
        except ValueError as error:
            raise RecipeError(str(error)) from error

    def _spec(self, granularity: Granularity, *, symmetric: bool, dynamic: bool = False) -> QSpec:
        if self.codebook is not None:
            return QSpec(f"uint{self.bits}", granularity=granularity, codebook=self.codebook)
        return QSpec(f"{'u' if self.unsigned else ''}int{self.bits}", symmetric, granularity, dynamic)

    def weight_spec(self, *, in_axis: int, out_axis: int) -> QSpec:
        """The spec of a weight whose input and output channels run along these axes."""
        if self.dynamic or self.per == "token":
            raise RecipeError("weights are constants: they have no dynamic or per-token scales")
        if self.group is not None:
            return self._spec(PerGroup(in_axis, self.group), symmetric=bool(self.symmetric))
        granularity = PerTensor() if self.per == "tensor" else PerAxis(out_axis)
        return self._spec(granularity, symmetric=self.symmetric is not False)

    def activation_spec(self) -> QSpec:
        """The spec of an activation: per tensor, per token or per group of its last axis."""
        if self.codebook is not None:
            raise RecipeError(f"codebook {self.codebook!r} is for weights: no kernel computes with levels of activations")
        if self.per == "channel":
            raise RecipeError("activations have no per-channel scales in integer kernels; use per='tensor' or per='token'")
        if self.group is not None:
            return self._spec(PerGroup(-1, self.group), symmetric=self.symmetric is not False, dynamic=True)
        if self.per == "token":
            return self._spec(PerToken(), symmetric=self.symmetric is not False, dynamic=True)
        return self._spec(PerTensor(), symmetric=bool(self.symmetric), dynamic=self.dynamic)


ALIASES: dict[str, Mapping[str, Any]] = {
    "dfq": {
        "weights": {"bits": 8},
        "activations": {"bits": 8, "per": "tensor", "unsigned": True},
        "embeddings": {"bits": 8, "group": 128, "symmetric": True},
        "stages": ["cle", "absorb-from-moments", "ranges-from-moments", "correct-from-moments"],
    },
    "w8a8-encoder": {  # one pass more in front of products that read a residual stream, for 2 dB more than without
        "weights": {"bits": 8},
        "activations": {"bits": 8, "per": "token", "symmetric": False, "unsigned": True, "dynamic": True},
        "embeddings": {"bits": 8, "group": 128, "symmetric": True},
        "stages": [{"smoothquant": {"alpha": 0.5, "explicit": True}}],
    },
    "qoq": {
        "weights": {"bits": 4, "group": 128},
        "activations": {"bits": 8, "per": "token", "symmetric": True, "dynamic": True},
        "embeddings": {"bits": 8},
        "weight_range": "search",
        "stages": ["awq", "two-level"],
    },
    "llm-int8": {
        "weights": {"bits": 8},
        "activations": {"bits": 8, "per": "token", "symmetric": True, "dynamic": True},
        "embeddings": {"bits": 8, "group": 128, "symmetric": True},
        "stages": ["llm-int8"],
    },
    "zeroquant": {
        "weights": {"bits": 8, "group": 128, "symmetric": True},
        "activations": {"bits": 8, "per": "token", "symmetric": True, "dynamic": True},
    },
}
"""Names of whole methods -> the fields of their recipe, in the form of a YAML file."""


@dataclass(frozen=True)
class Recipe:
    """What is wanted, for every backend.

    `stages` are passes that run in order, each on the float, the observed or the quantized graph (see `Pass`).
    `rules` maps a glob over module paths and ONNX node names to None (stays float) or to a mapping with `weights` and
    `activations` that replace the recipe's own; the last rule that matches wins. `observer` names an entry of
    `qgraph.observe.OBSERVERS`, `observer_options` its arguments; `weight_range` and `weight_range_options` say in the same words how
    the ranges of weights are chosen from their values. `embeddings` is the format of embedding tables (None: float), `kv_cache` that of keys
    and values of attention: bits, and symmetric or not."""

    weights: Int | None = None
    activations: Int | None = None
    stages: tuple[Pass, ...] = ()
    rules: Mapping[str, Mapping[str, Int | None] | None] = field(default_factory=dict)
    kv_cache: Int | None = None
    embeddings: Int | None = None
    observer: str = "minmax"
    observer_options: Mapping[str, Any] = field(default_factory=dict)
    weight_range: str = "minmax"
    weight_range_options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "custom"

    def __post_init__(self) -> None:
        if self.weights is None and self.activations is None and self.kv_cache is None:
            raise RecipeError("the recipe quantizes nothing: give weights, activations, kv_cache or several of them")
        if self.weights is not None and self.weights.codebook is not None:
            if self.activations is not None:
                raise RecipeError("levels of a codebook are multiplied in float: take 16 bits for activations, such as w4a16-nf-g64")
            if self.weight_range not in SEARCHES:
                raise RecipeError(f"weight_range of a codebook is {' or '.join(SEARCHES)}, not {self.weight_range!r}")
        if self.kv_cache is not None and (self.kv_cache.group, self.kv_cache.codebook, self.kv_cache.per) != (None, None, None):
            raise RecipeError("rows of a key/value cache have one scale each, found at run time: kv_cache takes bits and symmetric alone")
        if self.observer != Recipe.observer and not self.static:
            raise RecipeError(
                f"observer={self.observer!r} chooses static activation ranges, and recipe {self.name} has none: its activations are in float "
                "or have scales computed at run time; weight_range chooses those of weights"
            )

    @property
    def static(self) -> bool:
        """True when activation ranges come from calibration data."""
        formats = [self.activations, *((rule or {}).get("activations") for rule in self.rules.values())]
        return any(f is not None and not f.activation_spec().dynamic for f in formats)

    @property
    def needs_data(self) -> bool:
        """True when calibration data is needed, for ranges or for a stage."""
        observed = self.static and not any(p.fills_ranges for p in self.stages)
        return observed or any(p.needs_data for p in self.stages)


FLOAT_BITS = 16
"""How a recipe's name says "not quantized"."""

_SCHEME = re.compile(r"w(\d+)a(\d+)(?:kv(\d+))?((?:-[a-z0-9]+)*)")
_SUFFIXES = ("dynamic", "token", "g<SIZE>", "sym", "asym", "tensor", "nf", "log", "kmeans")
NAMES = ("w8a8", "w8a8-dynamic", "w8a8-token-asym", "w8a8-encoder", "w8a16", "w4a16-g128", "w4a8-g128")
"""The recipes that the README and the CLI list; any other NAME of the grammar works as well."""


EMBEDDINGS = Int(8, group=128, symmetric=True)
"""Rows are read one by one, so finer scales cost nothing in speed; of 128 elements they take 3 % of the table."""


def named(name: str) -> Recipe:
    """The recipe of a NAME (see the module's grammar). Raises RecipeError for one that has no meaning."""
    scheme, *stages = name.split("+")
    if scheme in ALIASES:
        found = from_dict({**ALIASES[scheme], "name": name})
        return dataclasses.replace(found, stages=(*found.stages, *map(stage, stages)))
    m = _SCHEME.fullmatch(re.sub(r"^nf(\d)", r"w\1a16-nf", scheme))
    if not m:
        raise RecipeError(f"unknown recipe {name!r}{nearest(name, (*NAMES, *ALIASES))}")
    w, a, kv = (FLOAT_BITS if bits == 32 else bits for bits in (int(x or FLOAT_BITS) for x in m.groups()[:3]))
    options = _suffixes(name, m[4])
    symmetric, group, per = options.get("symmetric"), options.get("group"), options.get("per")
    if options.get("token") and group is None:
        symmetric = None
    weights = None if w == FLOAT_BITS else Int(w, group=group, symmetric=symmetric, per=per, codebook=options.get("codebook"))
    return Recipe(
        weights=weights,
        activations=None if a == FLOAT_BITS else _activations(a, group, options),
        kv_cache=None if kv == FLOAT_BITS else Int(kv),
        embeddings=None if weights is None else EMBEDDINGS,
        stages=tuple(stage(s) for s in stages),
        weight_range="search" if weights is not None and weights.bits < 8 else "minmax",
        name=name,
    )


def _suffixes(name: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for suffix in text.split("-")[1:]:
        if m := re.fullmatch(r"g(\d+)", suffix):
            found["group"] = int(m[1])
        elif suffix in ("dynamic", "token"):
            found[suffix] = True
        elif suffix in ("sym", "asym"):
            found["symmetric"] = suffix == "sym"
        elif suffix == "tensor":
            found["per"] = "tensor"
        elif suffix in (*LEVELS, KMEANS):
            found["codebook"] = suffix
        else:
            raise RecipeError(f"recipe {name!r}: unknown suffix -{suffix}{nearest(*_meant(name, suffix))}")
    return found


def _meant(name: str, suffix: str) -> tuple[str, Iterable[str]]:
    """What to look for among what: an alias written nearly right, else a suffix."""
    return (name, ALIASES) if difflib.get_close_matches(name, ALIASES, 1, 0.9) else (suffix, _SUFFIXES)


def _activations(bits: int, group: int | None, options: Mapping[str, Any]) -> Int:
    """Case 1: group-wise weights: int8 rows per weight block, as integer kernels of such weights compute (ORT.md, accuracy level 4).
    Case 2: per token, int8 or asymmetric uint8. Case 3: one range per tensor, static or dynamic, unsigned and
    asymmetric unless the backend prefers another form."""
    if group is not None:
        return Int(bits, group=group, symmetric=True, dynamic=True)
    if options.get("token"):
        symmetric = options.get("symmetric") is not False
        return Int(bits, per="token", symmetric=symmetric, unsigned=not symmetric, dynamic=True)
    return Int(bits, per="tensor", unsigned=True, dynamic=bool(options.get("dynamic")))


def load_recipe(source: str | Path | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a name, a YAML file or an object, with `key=value` overrides ("observer=percentile", "weights.bits=4").

    A YAML file has the fields of `Recipe`; `recipe: NAME` in it is the base that the other fields change. Raises RecipeError."""
    recipe = source if isinstance(source, Recipe) else _from_text(str(source))
    return from_dict(_overridden(overrides), base=recipe) if (overrides := list(overrides)) else recipe


def _from_text(source: str) -> Recipe:
    if not source.endswith((".yaml", ".yml")):
        return named(source)
    try:
        data = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {source}: {error.strerror if isinstance(error, OSError) else 'is not text'}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe file {source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe file {source} must hold a mapping such as `recipe: w8a8`, found {type(data).__name__}")
    base = named(str(data.pop("recipe"))) if "recipe" in data else None
    return from_dict({"name": Path(source).stem, **data}, base=base)


def _overridden(overrides: Iterable[str]) -> dict[str, Any]:
    """["weights.bits=4"] -> {"weights": {"bits": 4}}; a rule's pattern may hold dots: `rules.encoder.*=null`."""
    data: dict[str, Any] = {}
    for item in overrides:
        name, sep, value = item.partition("=")
        if not sep or not name:
            raise RecipeError(f"--set takes key=value, got {item!r}")
        head, *rest = name.split(".", 1)
        parsed = yaml.safe_load(value)
        if rest:
            data.setdefault(head, {})[rest[0]] = parsed
        else:
            data[head] = parsed
    return data


def from_dict(data: Mapping[str, Any], *, base: Recipe | None = None) -> Recipe:
    """A Recipe from plain values, changing `base` where given. Raises RecipeError that names unknown fields."""
    known = [f.name for f in dataclasses.fields(Recipe)]
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            raise RecipeError(f"recipe has no field {name!r}{nearest(str(name), known)}")
        old = getattr(base, name) if base else None
        if name in ("weights", "activations", "kv_cache", "embeddings"):
            value = _int(value, old, name)
        elif name == "rules":
            value = {**(old or {}), **{str(k): _rule(k, v, base) for k, v in _mapping(value, name).items()}}
        elif name in ("observer_options", "weight_range_options"):
            value = {**(old or {}), **_mapping(value, name)}
        elif name == "stages":
            value = stages_of(value)
        values[name] = value
    return dataclasses.replace(base, **values) if base else Recipe(**values)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} must be a mapping, got {value!r}")
    return value


def _int(value: Any, old: Int | None, name: str) -> Int | None:
    if value is None or isinstance(value, Int):
        return value
    known = [f.name for f in dataclasses.fields(Int)]
    for k in _mapping(value, name):
        if k not in known:
            raise RecipeError(f"{name} has no option {k!r}{nearest(str(k), known)}")
    try:
        return dataclasses.replace(old, **value) if old else Int(**value)
    except TypeError as error:
        raise RecipeError(f"{name}: {error}") from error


def _rule(pattern: str, value: Any, base: Recipe | None) -> Mapping[str, Int | None] | None:
    if value is None:
        return None
    rule = _mapping(value, f"rule {pattern!r}")
    for k in rule:
        if k not in ("weights", "activations"):
            raise RecipeError(f"rule {pattern!r} has no field {k!r}{nearest(str(k), ('weights', 'activations'))}")
    return {k: _int(v, getattr(base, k, None), f"rule {pattern!r}: {k}") for k, v in rule.items()}
