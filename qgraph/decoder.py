"""Decoder: a language model that takes and returns its key/value cache as tensors, which is what a graph can have.

    model(input_ids, attention_mask, past_key_values=cache)  ->  logits, and the cache is another one
    decoder(input_ids, attention_mask, [{"key": .., "value": ..}, ..])  ->  {"logits": .., "present": [{"key": .., "value": ..}, ..]}

Both compute the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from qgraph.errors import CaptureError

Layer = dict[str, torch.Tensor]
"""The "key" and the "value" of one layer, [batch, heads, length, size] each."""

ROWS, TOKENS = 1024, 2**20
"""Limits of the dynamic dimensions: rows of a batch, tokens of a call and before it."""


class Decoder(torch.nn.Module):
    """`model(input_ids=, attention_mask=, past_key_values=, use_cache=True)`, whose answer has `logits` and `past_key_values`, as a module of
    plain tensors. Its positions, where the model takes `position_ids`, count the tokens that the mask admits, so that rows may be
    padded on the left.

    `cache` makes of a list of (key, value) what the model takes as past_key_values, `transformers.DynamicCache` for one; by default a tuple
    of such pairs. `options` are more keyword arguments: {"logits_to_keep": 1} leaves all rows but the last one out of the last product.
    Raises CaptureError for a model that returns no cache."""

    def __init__(
        self, model: torch.nn.Module, *, cache: Callable[[list[tuple[torch.Tensor, torch.Tensor]]], Any] = tuple,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.cache, self.options = model, cache, dict(options or {})
        self.counts_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.layers = self._layers()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Sequence[Layer]) -> dict[str, Any]:
        """input_ids [batch, sequence], attention_mask [batch, past + sequence] of 1 and 0, past_key_values [batch, heads, past, size]."""
        options = dict(self.options)
        if self.counts_positions:
            now = torch.arange(input_ids.shape[1], device=input_ids.device) + past_key_values[0]["key"].shape[2]
            options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0).index_select(1, now)  # of known length; a slice's is not
        past = self.cache([(layer["key"], layer["value"]) for layer in past_key_values])
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past, use_cache=True, **options)
        return {"logits": found.logits, "present": _layers_of(found.past_key_values)}

    def feed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, list[Layer]]:
        """The arguments of `forward` for a text from its start, as calibration takes them: nothing is in the cache."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return input_ids, mask, self._cache(input_ids.shape[0], 0)

    def example_inputs(self) -> tuple[torch.Tensor, torch.Tensor, list[Layer]]:
        """Two rows of three tokens behind five, for `prepare` and `capture`."""
        return torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64), self._cache(2, 5)

    def dynamic_shapes(self) -> dict[str, Any]:
        """Those of torch.export: the batch, the length of what is new, of what is in the cache, and of both together."""
        dim = torch.export.Dim
        rows, new, past = dim("batch", max=ROWS), dim("sequence", max=TOKENS), dim("past", min=0, max=TOKENS)
        layer = {"key": {0: rows, 2: past}, "value": {0: rows, 2: past}}
        return {"input_ids": {0: rows, 1: new}, "attention_mask": {0: rows, 1: dim.AUTO}, "past_key_values": [layer] * len(self.layers)}

    def _cache(self, rows: int, length: int) -> list[Layer]:
        return [
            {name: torch.zeros(rows, t.shape[1], length, t.shape[3], dtype=t.dtype) for name, t in layer.items()} for layer in self.layers
        ]

    def _layers(self) -> list[Layer]:
        """Keys and values of a single token, as the model itself makes them, without their data."""
        token = torch.zeros(1, 1, dtype=torch.int64)
        with torch.no_grad():
            found = self.model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=True)
        pairs = getattr(found, "past_key_values", None)
        if pairs is None:
            raise CaptureError(f"{type(self.model).__name__} returns no past_key_values with use_cache=True: it has no cache to export")
        return [{name: t.to("meta") for name, t in layer.items()} for layer in _layers_of(pairs)]


def _layers_of(cache: Iterable[Any]) -> list[Layer]:
    """Of a cache object that iterates over its layers, or a tuple of pairs."""
    return [{"key": key, "value": value} for key, value, *_ in cache]
