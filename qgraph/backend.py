"""Backends: what can be executed where. A backend is a placement (data), a lowering, and a program that runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from os import PathLike
from typing import Any, Protocol, cast, runtime_checkable

from torch.fx import GraphModule

from qgraph.errors import RecipeError, nearest
from qgraph.types import QSpec

ALL = frozenset({"*"})
"""Every kind of an interface."""


@dataclass(frozen=True)
class Placement:
    """Where a backend computes in integers, as data; `annotate` solves it together with a recipe.

    compute          interfaces with an integer kernel when x and weight are quantized (static ranges)
    dynamic          those that also have one when the range of x is found at run time
    weight_only      those whose weight alone may be stored in integers
    activation_only  those whose x alone may be in integers, before a float weight
    always_output    those whose integer kernel exists only with a quantized output
    follow           interface -> kinds that have an integer kernel when all their operands are quantized
    share            interface -> kinds whose output keeps the scale of its inputs
    absorb           activation kinds that a quantized output of their producer performs (saturation)
    accepts          (the operation seen through its interface, role, spec) -> None, or a sentence that says why the backend refuses; a role
                     is "weight", "x", "weight alone" for a weight that "weight" has passed, beside a float x, or "kv_cache" for rows of keys
                     and values of an Attention
    pays             (the operation, the spec of its x, whether x comes from float, whether the result goes to float) -> None, or a
                     sentence that says why float is as fast; asked where no rule names the operation
    x_format         the form of static activations where a recipe leaves it open (`Int.symmetric` None); None: as the recipe has it
    """

    compute: tuple[type, ...] = ()
    dynamic: tuple[type, ...] = ()
    weight_only: tuple[type, ...] = ()
    activation_only: tuple[type, ...] = ()
    always_output: tuple[type, ...] = ()
    follow: Mapping[type, frozenset[str]] = field(default_factory=dict)
    share: Mapping[type, frozenset[str]] = field(default_factory=dict)
    absorb: frozenset[str] = frozenset()
    accepts: Callable[[Any, str, QSpec], str | None] = lambda operation, role, spec: None
    pays: Callable[[Any, QSpec, bool, bool], str | None] = lambda operation, spec, from_float, to_float: None
    x_format: QSpec | None = None


@dataclass(frozen=True)
class Kernel:
    """What one promised node became in the runtime's own graph. `reason` says why when it is not `fused`."""

    node: str
    promised: str
    became: str
    fused: bool
    reason: str = ""


@runtime_checkable
class Program(Protocol):
    """A lowered graph that runs."""

    def __call__(self, *inputs: Any, **named: Any) -> Any: ...

    def kernels(self) -> list[Kernel]: ...

    def save(self, path: str | PathLike[str]) -> None: ...


class Backend(Protocol):
    """Lowers a converted graph. `placement` says which edges `annotate` may quantize for it."""

    @property
    def name(self) -> str: ...

    @property
    def placement(self) -> Placement: ...

    def lower(self, gm: GraphModule, *, strict: bool = False) -> Program: ...

    def export(self, gm: GraphModule, path: str | PathLike[str]) -> None: ...


@runtime_checkable
class Targeted(Protocol):
    """A backend whose programs run on machines of one kind, a name of `saturation.TARGETS`. `prepare` sees to it that sums are exact there."""

    @property
    def target(self) -> str: ...


@runtime_checkable
class Translator(Protocol):
    """A backend that first translates what it lowers. Who lowers many variants of one graph translates the float graph once."""

    def translate(self, gm: GraphModule) -> GraphModule: ...


BACKENDS: dict[str, str | Callable[[], Backend]] = {
    "cupy": "qgraph.backends.cupy:Cupy",
    "onnxruntime": "qgraph.backends.onnxruntime:OnnxRuntime",
    "reference": "qgraph.backends.reference:Reference",
    "tensorrt": "qgraph.backends.tensorrt:TensorRT",
}
"""Name -> factory, or "module:factory" that is imported when first asked for."""


def register_backend(name: str, factory: Callable[[], Backend]) -> None:
    """Make a backend known by name to prepare, lower, quantize and the command line."""
    BACKENDS[name] = factory


def get_backend(backend: str | Backend, *, target: str | None = None) -> Backend:
    """The backend of a name; an object is returned as it is. With `target`, for machines of that kind.

    Raises RecipeError for an unknown name, and for a backend that is not made for machines of a kind."""
    found = _backend(backend) if isinstance(backend, str) else backend
    if target is None:
        return found
    if not isinstance(found, Targeted) or not is_dataclass(found):
        raise RecipeError(f"target {target!r}: backend {found.name} is not made for machines of a kind; onnxruntime is")
    return cast(Backend, replace(found, target=target))


def _backend(backend: str) -> Backend:
    if backend not in BACKENDS:
        raise RecipeError(f"unknown backend {backend!r}{nearest(backend, BACKENDS)}")
    factory = BACKENDS[backend]
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    return factory()
