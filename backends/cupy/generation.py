"""CudaGenerator: text from a decoder whose linears and cache are in integers, token by token, on CUDA kernels.

quantized = qgraph.quantize(Decoder(model), recipe="w4a16kv8-g128", backend="cupy", ...)
program = qgraph.lower(quantized, backend=Cupy(capacity=4096))
for token in CudaGenerator(program)(input_ids, tokens=64): ...
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qgraph.backends.cupy.causal import stand_in
from qgraph.backends.cupy.keep_cache import CACHE, KeptCache
from qgraph.backends.cupy.kv_cache import QuantizedCache, advance
from qgraph.backends.cupy.program import Program
from qgraph.errors import LoweringError
from qgraph.generation import Step, TextGenerator, Tokens, named_feeds


class CudaGenerator(TextGenerator):
    """Runs a program that was lowered with Cupy(capacity=...). Each text has its own cache; a prompt is one call.

    Raises LoweringError for a program without a cache, and for texts that are longer than it."""

    def __init__(self, program: Program) -> None:
        kept = program.gm.meta.get(CACHE)
        if not isinstance(kept, KeptCache):
            raise LoweringError(
                "the program keeps no cache: quantize a qgraph.decoder.Decoder with a recipe such as w4a16kv8-g128, and lower it with "
                "backend=Cupy(capacity=TOKENS)"
            )
        self.program, self.kept = program, kept

    def begin(self, ids: Tokens, mask: Tokens, tokens: int) -> Step:
        batch, length = ids.shape
        if length + tokens > self.kept.capacity:
            raise LoweringError(f"{length} tokens and {tokens} more exceed the cache's capacity of {self.kept.capacity}")
        starts = _starts(mask)
        if starts.any() and not self.kept.known.masks:
            raise LoweringError("shorter rows are padded on the left, and the model takes no mask that could say where")
        caches, first = self._allocate(batch), torch.from_numpy(starts).to(self.program.device)
        return lambda ids, mask: self._step(ids, mask, first, caches)

    def _allocate(self, batch: int) -> list[QuantizedCache]:
        found: list[QuantizedCache] = []
        for layer in self.kept.layers:
            shared = found[0].lengths if found else None
            options = {"bits": layer.bits, "symmetric": layer.symmetric, "dtype": layer.dtype, "device": self.program.device}
            found.append(
                QuantizedCache.allocate(batch, layer.kv_heads, layer.head_dim, capacity=self.kept.capacity, lengths=shared, **options)  # type: ignore[arg-type]
            )
        return found

    def _step(self, ids: Tokens, mask: Tokens, starts: Tensor, caches: list[QuantizedCache]) -> np.ndarray:
        """The logits of the last position [batch, vocabulary]; the caches have `ids` in them afterwards."""
        known, past = self.kept.known, caches[0].appended
        feeds = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in named_feeds(known, ids, mask).items()}
        feeds |= {i.name: stand_in(i, len(ids), past, self.program.device) for i in known.cache}
        values = [feeds[name] for name in self.kept.names]
        found = self.program(*values, caches[0].lengths, starts, *(t for c in caches for t in (c.codes, c.params)))
        advance(caches, ids.shape[1])
        logits: np.ndarray = next(value for value in found if value.dim() == 3)[:, -1].to(torch.float32).cpu().numpy()
        return logits


def _starts(mask: Tokens) -> np.ndarray:
    """int32 [batch]: how many places pad each row on its left. Raises LoweringError for a mask that is 0 elsewhere."""
    starts = (mask == 0).sum(axis=1)
    if not np.array_equal(mask != 0, np.arange(mask.shape[1]) >= starts[:, None]):
        raise LoweringError("the mask is 0 in places that do not pad a row on its left")
    found: np.ndarray = starts.astype(np.int32)
    return found
