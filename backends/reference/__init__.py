"""The oracle: a converted graph run by torch, node by node, with the reference bodies of the qg ops."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qgraph.backend import ALL, Kernel, Placement
from qgraph.errors import LoweringError
from qgraph.onnx_values import to_numpy
from qgraph.views import Concat, Conv, DataMovement, Elementwise, Embedding, Linear, Pool

EVERYWHERE = Placement(
    compute=(Linear, Conv),
    dynamic=(Linear, Conv),
    weight_only=(Linear, Conv, Embedding),
    activation_only=(Linear, Conv),
    follow={Elementwise: frozenset({"add", "mul"}), Concat: ALL, Pool: frozenset({"average", "global_average"})},
    share={Pool: frozenset({"max"}), DataMovement: ALL},
    absorb=frozenset({"relu", "clip"}),
)
"""torch runs every format that a recipe can ask for."""


@dataclass
class Program:
    """Calls the graph without gradients. Tensors in, tensors out; arrays in, arrays out."""

    gm: GraphModule

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Positional and named inputs are the graph's own; the result has its structure."""
        leaves = pytree.tree_leaves((inputs, named))
        arrays = any(isinstance(v, np.ndarray) for v in leaves)
        args, kwargs = pytree.tree_map_only(np.ndarray, torch.from_numpy, (inputs, named))
        with torch.no_grad():
            found = self.gm(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, to_numpy, found) if arrays else found

    def kernels(self) -> list[Kernel]:
        """Nothing is fused and nothing was promised."""
        return []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raises LoweringError: a reference program is a torch module and has no file format."""
        raise LoweringError("the reference backend writes no files: save the graph with torch.save, or export with backend='onnxruntime'")


@dataclass(frozen=True)
class Reference:
    """Runs a graph as it is, on the device of its tensors."""

    name: str = "reference"
    placement: Placement = EVERYWHERE

    def lower(self, gm: GraphModule, *, strict: bool = False) -> Program:
        """`strict` changes nothing: there is no kernel that could be missed."""
        return Program(copy.copy(gm))

    def export(self, gm: GraphModule, path: str | os.PathLike[str]) -> None:
        """Raises LoweringError, as `Program.save`."""
        self.lower(gm).save(path)
