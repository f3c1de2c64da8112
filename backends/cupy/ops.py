"""Registers what starts kernels as torch ops: torch.ops.qgraph_cuda.<name>, opaque to torch.compile and torch.export, with a shape function.

The numbers are those of the qg op that it stands for (qgraph.reference); the packed weights are the backend's own layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

K = torch.ops.qgraph_cuda


def cuda_op(arguments: str, result: str = "Tensor", *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator: `fn` becomes torch.ops.qgraph_cuda.<its name>. Give it a shape function with `.register_fake`."""

    def register(fn: Callable[..., Any]) -> CustomOpDef:
        name = f"qgraph_cuda::{fn.__name__}"
        return torch.library.custom_op(name, fn, mutates_args=mutates, schema=f"({arguments}) -> {result}")

    return register
