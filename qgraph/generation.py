"""Text token by token. Generator: from an ONNX file whose inputs and outputs carry a key/value cache, on ONNX Runtime.

    logits, present = model(input_ids, attention_mask[, position_ids], past)
    next = choose(logits[:, -1]),  past = present,  and so on

One row or several, of which shorter ones are padded on the left.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from qgraph.backends.onnxruntime.runtime import Options, session
from qgraph.errors import ModelError
from qgraph.feeds import Input, of_argument
from qgraph.tokens import Roles, empty_cache, roles

Tokens = np.ndarray
"""int64 [batch] or [batch, length]."""


Step = Callable[[Tokens, Tokens], np.ndarray]
"""(ids [batch, new], the mask of all so far [batch, past + new]) -> logits of the last position [batch, vocabulary]; it has a cache."""


class TextGenerator(ABC):
    """Text, token by token, from a model that has a cache."""

    @abstractmethod
    def begin(self, ids: Tokens, mask: Tokens, tokens: int) -> Step:
        """With an empty cache, for texts that start with `ids` and get `tokens` more at most."""

    def __call__(
        self, input_ids: Any, *, mask: Any = None, tokens: int = 128, stop: Collection[int] = (), temperature: float = 0.0,
        top_k: int | None = None, seed: int = 0,
    ) -> Iterator[Tokens]:  # fmt: skip
        """The next token of every row, int64 [batch], at most `tokens` times, until every row has had one of `stop`; a row that has goes on
        with that one. `input_ids` is [batch, length]; shorter rows are padded on the left, where `mask` [batch, length] is 0.

        `temperature` 0 takes the most probable token; above, one is drawn from softmax(logits / temperature), among the `top_k` most
        probable ones."""
        ids = np.asarray(input_ids, np.int64)
        admitted = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        choose = _greedy if temperature <= 0 else _sampler(temperature, top_k, np.random.default_rng(seed))
        step, ended = self.begin(ids, admitted, tokens), np.zeros(len(ids), bool)
        while tokens > 0 and not ended.all():
            following = np.where(ended, ids[:, -1], choose(step(ids, admitted)))
            yield following
            ended |= np.isin(following, list(stop))
            ids, tokens = following[:, None], tokens - 1
            admitted = np.concatenate([admitted, np.ones_like(ids)], axis=1)


class Generator(TextGenerator):
    """Runs the file at `path` with `threads` threads. Which input is what `tokens.roles` says; the cache is in the order of the outputs of four
    axes, and the first output of three are the logits.

    Raises ModelError for a file that has no such inputs and outputs."""

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.session = session(str(path), Options(threads))
        inputs, outputs = (list(map(of_argument, a)) for a in (self.session.get_inputs(), self.session.get_outputs()))
        self.roles = roles(inputs)
        self.present = [o.name for o in outputs if _rank(o) == 4]
        logits = [o.name for o in outputs if _rank(o) == 3]
        if not logits or not self.roles.cache or len(self.roles.cache) != len(self.present):
            found = f"inputs {', '.join(i.name for i in inputs)} and outputs {', '.join(o.name for o in outputs)}"
            raise ModelError(
                f"{path} has {found}: a generator needs tokens, as many past as present tensors of four axes, and logits of three; "
                "export the model through qgraph.decoder.Decoder"
            )
        self.logits = logits[0]

    def begin(self, ids: Tokens, mask: Tokens, tokens: int) -> Step:
        past = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in empty_cache(self.roles, len(ids)).items()}

        def step(ids: Tokens, mask: Tokens) -> np.ndarray:
            nonlocal past
            logits, past = self._step(ids, mask, past)
            return logits

        return step

    def _step(self, ids: Tokens, mask: Tokens, past: dict[str, ort.OrtValue]) -> tuple[np.ndarray, dict[str, ort.OrtValue]]:
        """(logits of the last position [batch, vocabulary], the cache with `ids` in it); the cache is not copied out of ONNX Runtime."""
        feeds = past | {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for n, v in named_feeds(self.roles, ids, mask).items()}
        values, *present = self.session.run_with_ort_values([self.logits, *self.present], feeds)
        logits: np.ndarray = values.numpy()[:, -1]
        return logits, dict(zip(past, present, strict=True))


def named_feeds(known: Roles, ids: Tokens, mask: Tokens) -> dict[str, Tokens]:
    """The model's inputs but its cache, by name, for `ids` [batch, new] and the mask of all tokens so far."""
    position = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    return {i.name: v for part, v in (((known.ids,), ids), (known.masks, mask), (known.positions, position)) for i in part}


def _rank(value: Input) -> int | None:
    return None if value.type is None else value.type.rank


def _greedy(logits: np.ndarray) -> Tokens:
    most: Tokens = logits.argmax(-1)
    return most


def _sampler(temperature: float, top_k: int | None, rng: np.random.Generator) -> Callable[[np.ndarray], Tokens]:
    def draw(logits: np.ndarray) -> Tokens:
        scores = logits.astype(np.float64) / temperature
        if top_k is not None and top_k < scores.shape[-1]:
            least = np.partition(scores, -top_k, axis=-1)[:, -top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        return _greedy(scores + rng.gumbel(size=scores.shape))  # its largest element is distributed as softmax(scores)

    return draw


def pad_left(texts: Sequence[Sequence[int]], token: int = 0) -> tuple[Tokens, Tokens]:
    """(input_ids, mask) of texts of different lengths, [batch, the longest]: `token` stands before the shorter ones."""
    longest = max(map(len, texts))
    ids = np.array([[token] * (longest - len(t)) + list(t) for t in texts], np.int64)
    return ids, np.array([[0] * (longest - len(t)) + [1] * len(t) for t in texts], np.int64)
