"""Whole models through the CUDA kernels, in the emulator: the reference program's outputs, every product of a quantized weight on a kernel."""

from collections import Counter

import pytest
import torch

import qgraph
from qgraph.backends.cupy import Cupy, lowering_passes
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.generation import CudaGenerator
from qgraph.edit import copy_graph
from qgraph.pipeline import Pipeline
from tests.models import smollm2, zoo


def lowered(gm: torch.fx.GraphModule, *inputs: torch.Tensor) -> tuple[Counter[str], torch.Tensor, float]:
    """Kernels by name, the outputs, and their distance to the reference program's relative to them."""
    with torch.no_grad():
        expected = gm(*inputs)
    with emulation():
        program = qgraph.lower(gm, backend="cupy", strict=True)
        found = program(*inputs)
    return Counter(k.became for k in program.kernels()), found, float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("recipe", "bound"), [("w8a8", 1e-3), ("w8a8-token", 0.15)])
def test_an_encoder_in_integers_is_its_reference_program(recipe, bound):
    """Bit for bit what the fused ops compute in torch. That program is not the reference's: sums in another order move some integers by a step,
    and ranges per token with outliers amplify that (a norm's weight changed by 1e-7 moves the reference's own outputs by 6 %)."""
    model = zoo.minilm()
    shapes = {"example_inputs": model.example_inputs, "dynamic_shapes": model.dynamic_shapes}
    gm = qgraph.quantize(model.model, model.calibration_batches()[:6], recipe=recipe, backend="cupy", **shapes)
    ids, mask = (torch.from_numpy(array[:1, :16].copy()) for array in model.evaluation.values())
    kernels, found, error = lowered(gm, ids, mask)
    assert (kernels["w8a8_linear"], kernels["norm_quantize"], kernels["act_quantize"], kernels["embedding_dequantize"]) == (36, 12, 6, 3)
    *fusions, _ = lowering_passes()
    fused = copy_graph(gm)
    Pipeline(*fusions).run(fused)
    with emulation(), torch.no_grad():  # norms and activations are kernels already
        assert torch.equal(found, fused(ids, mask))
    assert error < bound


@pytest.mark.slow
def test_a_language_model_at_four_bits_is_its_reference_program():
    ids = torch.from_numpy(smollm2.windows()[1][:1, :16].copy())
    recipe = qgraph.load_recipe("w4a16-g128", ["weight_range=minmax"])
    gm = qgraph.quantize(smollm2.LogitsOnly(smollm2.causal_lm()), example_inputs=(ids,), recipe=recipe, backend="cupy")
    kernels, _, error = lowered(gm, ids)
    assert kernels == {"weight_only_linear": 211, "embedding_dequantize": 1}
    assert error < 1e-3


@pytest.mark.slow
def test_a_language_model_writes_the_text_of_its_reference_program_from_a_cache_of_eight_bits():
    decoder = smollm2.decoder(smollm2.causal_lm())
    shapes = {"example_inputs": decoder.example_inputs(), "dynamic_shapes": decoder.dynamic_shapes()}
    recipe = qgraph.load_recipe("w8a16kv8", ["weight_range=minmax"])
    gm = qgraph.quantize(decoder, recipe=recipe, backend="cupy", **shapes)
    text = smollm2.windows()[1][0, :6].tolist()
    with emulation():
        generator = CudaGenerator(qgraph.lower(gm, backend=Cupy(capacity=64), strict=True))
        found = [int(token[0]) for token in generator([text], tokens=3)]
    assert len(generator.kept.layers) == 30
    for _ in range(3):
        with torch.no_grad():
            text.append(int(gm(*decoder.feed(torch.tensor([text])))["logits"][0, -1].argmax()))
    assert found == text[-3:]
