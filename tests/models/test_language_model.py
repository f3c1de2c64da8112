"""A language model at four bits: floors under what its perplexity is today."""

import pytest
import torch

import qgraph
from qgraph.perplexity import perplexity
from tests.bench.llm import with_float_weights
from tests.models import smollm2

WINDOWS = 16
"""Of calibration: a third of what the benchmark takes."""


@pytest.fixture(scope="module")
def lm():
    return smollm2.LogitsOnly(smollm2.causal_lm())


def test_four_bits_keep_the_perplexity(lm: torch.nn.Module) -> None:
    calibration, evaluation = smollm2.windows()
    batches = [(torch.from_numpy(window[None]),) for window in calibration[:WINDOWS]]
    shapes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=2, max=2048)},)
    example = (torch.from_numpy(calibration[:2]),)
    graph = qgraph.quantize(lm, batches, recipe="w4a16-g32-sym+gptq", example_inputs=example, dynamic_shapes=shapes, backend="reference")
    entries = [e for e in graph.meta["qgraph"].ledger if e.by == "gptq"]
    assert len(entries) == 210 and not graph.meta["qgraph"].declines[1:]
    float_, quantized = (perplexity(m, evaluation[:8]).value for m in (lm, with_float_weights(graph)))
    assert quantized < 1.06 * float_, (quantized, float_)
