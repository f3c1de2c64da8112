"""Program: a lowered graph in an ONNX Runtime session. Torch tensors in, torch tensors out; arrays in, arrays out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import checker, helper
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qgraph.backend import Kernel
from qgraph.backends.onnxruntime.kernels import kernels
from qgraph.backends.onnxruntime.runtime import Options, newest_ir_version, session
from qgraph.errors import LoweringError, ModelError
from qgraph.onnx_io import save_onnx
from qgraph.onnx_opset import header

FILE = "model.onnx"

LARGE = 2**26
"""Bytes of a model from which it is not loaded in full before it runs."""


@dataclass(frozen=True)
class Structure:
    """How a torch module returns its results: the tree, and its leaves, of which those that are no nodes (None, numbers) are constant."""

    tree: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, gm: GraphModule) -> Structure | None:
        """That of a captured graph; None for a graph that returns its values as they are."""
        tree, values = getattr(gm, "_out_spec", None), gm.graph.output_node().args[0]
        return None if tree is None else cls(tree, tuple(values) if isinstance(values, tuple | list) else (values,))

    def __call__(self, values: Sequence[Any]) -> Any:
        computed = iter(values)
        return pytree.tree_unflatten([next(computed) if isinstance(leaf, Node) else leaf for leaf in self.leaves], self.tree)


@dataclass
class Program:
    """Runs the file in `folder`, a temporary one that lives as long as the program.

    `gm` is the graph in pure ONNX operators; `structure` is how the flat outputs are returned, None for a tuple (ONNX)."""

    gm: GraphModule
    folder: tempfile.TemporaryDirectory[str]
    options: Options = field(default_factory=Options)
    structure: Structure | None = None

    @property
    def path(self) -> Path:
        return Path(self.folder.name) / FILE

    @cached_property
    def session(self) -> ort.InferenceSession:
        """Made when it is first asked for. Raises LoweringError when ONNX Runtime refuses the model."""
        return session(str(self.path), self.options)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run on positional inputs (nested ones are flattened, None left out), on named ones, or on one mapping of names.

        Raises ModelError for a wrong number or name of inputs."""
        feeds = self._feeds(inputs, named)
        arrays = any(isinstance(v, np.ndarray) for v in feeds.values())
        found = self.session.run(None, {k: _array(v) for k, v in feeds.items()})
        values = found if arrays else [torch.from_numpy(np.ascontiguousarray(v)) for v in found]
        return tuple(values) if self.structure is None else self.structure(values)

    def _feeds(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        names = [i.name for i in self.session.get_inputs()]
        only = inputs[0] if len(inputs) == 1 and not named else None
        if isinstance(only, Mapping):
            inputs, named = (), only
        # An argument that was None at the capture is no input; one that was not is then missing.
        flat: list[Any] = [v for v in pytree.tree_leaves(inputs) if v is not None]
        feeds = dict(zip(names, flat, strict=False)) | dict(named)
        if len(flat) + len(named) != len(names) or set(feeds) != set(names):
            got = f"{len(flat)} positional" + (f" and {', '.join(named)}" if named else "")
            raise ModelError(f"the program takes {', '.join(names)}; got {got}")
        return feeds

    def kernels(self) -> list[Kernel]:
        """Per promised node what ONNX Runtime makes of it, read from the graph that it optimizes itself for this."""
        return kernels(str(self.path), self.options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, and its external data where it has some, to `path`; an existing file is replaced by a complete one only."""
        save_onnx(self.gm, path)


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def build(gm: GraphModule, *, options: Options, structure: Structure | None = None) -> Program:
    """The program of a graph of pure ONNX operators: written, checked by the ONNX checker, loaded by ONNX Runtime.

    A large one is loaded without optimizations: where ONNX Runtime computes float weights from stored integers, it keeps the result of
    each operation on the way, of all weights, until it is through. Raises LoweringError when one of them refuses it."""
    fit_ir_version(gm)
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="qgraph-")
    path = os.path.join(folder.name, FILE)
    save_onnx(gm, path)
    try:
        checker.check_model(path)
    except checker.ValidationError as error:
        raise LoweringError(f"the lowered model is not valid ONNX: {' '.join(str(error).split())}") from error
    program = Program(gm, folder, options, structure)
    if sum(file.stat().st_size for file in program.path.parent.iterdir()) < LARGE:
        program.session  # noqa: B018  made now
    else:
        session(path, replace(options, optimized=False))
    return program


def fit_ir_version(gm: GraphModule) -> None:
    """Keeps the model's ir_version, moved into the range from what its opsets need to what ONNX Runtime reads."""
    opsets = [helper.make_opsetid(domain, version) for domain, version in header(gm).opsets.items()]
    least = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    model = gm.meta["onnx_model"]
    gm.meta["onnx_model"] = replace(model, ir_version=min(max(model.ir_version, least), max(least, newest_ir_version())))
