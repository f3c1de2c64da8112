"""perplexity(model, windows) = exp(mean of -log p(token i + 1 | tokens 0..i) over all windows): one window in memory at a time."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from qgraph.errors import CalibrationError, ModelError
from qgraph.feeds import inputs_of, of_argument
from qgraph.sweep import bar
from qgraph.taps import ORT_ERRORS
from qgraph.tokens import Ids, check_ids, decoder_feeds

Logits = Callable[[Ids], Tensor]
"""Token ids [1, length] -> logits [1, length, vocabulary]."""


@dataclass(frozen=True)
class Perplexity:
    """`value` over that many `windows`, in which `tokens` were predicted (all but the first of each)."""

    value: float
    tokens: int
    windows: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"perplexity {self.value:.4f} ({self.tokens} tokens in {self.windows} windows)"


def perplexity(model: Any, windows: Iterable[Any], *, label: str = "perplexity", progress: bool | None = None) -> Perplexity:
    """The perplexity of a decoder on windows of token ids, each [length] and without what came before it.

    `model` is the path of an ONNX file or its proto, a program that `lower` made, a graph, or a torch module, which takes ids and
    whatever `tokens.decoder_feeds` knows, and gives logits. `progress`: a bar on stderr; None shows it on a terminal only.
    Raises CalibrationError: no windows, windows of one token, ids beyond the vocabulary; ModelError: inputs that are not a decoder's,
    no logits, logits that are NaN, a model that does not run."""
    logits, rows = _decoder(model)
    total, tokens, count = 0.0, 0, 0
    with bar(operator.length_hint(windows, 0) or None, label, progress, rate="tokens") as advance:
        for window in windows:
            ids = np.asarray(window, np.int64).reshape(1, -1)
            if ids.size < 2:
                raise CalibrationError("a window needs two tokens at least: one is predicted from the other")
            check_ids(ids, rows, f"window {count}")
            total += _loss(logits(ids), ids, f"window {count}")
            tokens, count = tokens + ids.size - 1, count + 1
            advance(tokens)
    if not count:
        raise CalibrationError("there are no windows to measure perplexity on")
    return Perplexity(math.exp(min(total / tokens, 700.0)), tokens, count)


def _loss(found: Tensor, ids: Ids, where: str) -> float:
    """Sum over the window of -log of the probability of each next token, in float32."""
    if found.dim() != 3 or found.shape[:2] != ids.shape:
        raise ModelError(f"logits have shape {list(found.shape)}; for ids {list(ids.shape)} they must be [1, {ids.shape[1]}, vocabulary]")
    check_ids(ids, found.shape[-1], where)
    loss = float(cross_entropy(found[0, :-1].float(), torch.from_numpy(ids[0, 1:]), reduction="sum"))
    if math.isnan(loss):
        raise ModelError(f"{where}: the model's logits are NaN")
    return loss


def _decoder(model: Any) -> tuple[Logits, int | None]:
    """(what computes logits, the size of the vocabulary where it is known)."""
    if isinstance(model, str | os.PathLike | onnx.ModelProto):
        from qgraph.backends.onnxruntime.runtime import Options, session

        if not isinstance(model, onnx.ModelProto) and not os.path.isfile(model):
            raise ModelError(f"{os.fspath(model)!r} does not exist")
        return _of_session(session(model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model), Options()))
    if hasattr(model, "session"):
        return _of_session(model.session)
    if isinstance(model, GraphModule) and "qgraph" in model.meta:
        inputs = inputs_of(model)
        rows = min((i.limit for i in inputs if i.limit is not None), default=None)
        return lambda ids: _first_logits(_without_gradients(model, *map(torch.from_numpy, decoder_feeds(inputs, ids).values()))), rows
    return lambda ids: _first_logits(_without_gradients(model, torch.from_numpy(ids))), None


def _without_gradients(model: Any, *args: Tensor) -> Any:
    with torch.no_grad():
        return model(*args)


def _first_logits(found: Any) -> Tensor:
    """The result's `logits`, else its first float tensor of three axes."""
    if isinstance(own := getattr(found, "logits", None), Tensor):
        return own
    leaf = next((x for x in tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3), None)
    if leaf is None:
        raise ModelError(f"the model gives no logits [batch, length, vocabulary], but {type(found).__name__}")
    return leaf


def _of_session(session: Any) -> tuple[Logits, int | None]:
    inputs, outputs = (tuple(map(of_argument, arguments)) for arguments in (session.get_inputs(), session.get_outputs()))
    three = [o for o in outputs if o.type is not None and o.type.is_float and o.type.rank in (3, None)]
    chosen = next((o for o in outputs if o.name == "logits"), three[0] if three else None)
    if chosen is None:
        raise ModelError(
            f"the model has no output logits [batch, length, vocabulary]; it has {', '.join(f'{o.name}: {o.type}' for o in outputs)}"
        )

    def logits(ids: Ids) -> Tensor:
        try:
            return torch.from_numpy(session.run([chosen.name], decoder_feeds(inputs, ids))[0])
        except ORT_ERRORS as error:
            raise ModelError(f"ONNX Runtime does not run the model: {str(error).splitlines()[0]}") from error

    shape = chosen.type.shape if chosen.type is not None else None
    return logits, shape[-1] if shape and isinstance(shape[-1], int) else None
