"""What hurts when a BERT goes to 8 bits? Its activations: the ablation of Bondarenko et al. 2021 (arXiv 2109.12948) on MiniLM.

`python -m examples.bert_ablation` in the checkout. All variants run in torch, in the reference backend, which has a kernel for each of
them. Each line is the same model with other operands in integers: weights (W8, one scale per channel), activations (A8), or both, with
one scale per tensor from calibration data, one per tensor found at run time, or one per token. Weights alone cost next to nothing, and
tokens of their own give most of the loss back. ZeroQuant (arXiv 2206.01861) has groups of weights and tokens of activations. The last
line is why weights have a scale per channel.
"""

import warnings

import numpy as np
import torch

import qgraph
from tests.models import measure, zoo

SENTENCES = 24
VARIANTS = {
    "W8A32": "w8a32",
    "W32A8, static per tensor": "w32a8",
    "W8A8, static per tensor": "w8a8",
    "W8A8, dynamic per tensor": "w8a8-dynamic",
    "W8A8, per token": "w8a8-token",
    "W8A8, per token, asymmetric": "w8a8-token-asym",
    "ZeroQuant": "zeroquant",
    "W8A32, weights per tensor": "w8a32-tensor",
}


def quantized(graph: torch.fx.GraphModule, recipe: str, batches: list[dict[str, np.ndarray]]) -> torch.fx.GraphModule:
    """Embeddings stay in float: they are no part of the ablation."""
    wanted = qgraph.load_recipe(recipe, ["embeddings=null"])
    return qgraph.quantize(graph, batches, recipe=wanted, backend="reference")


def main() -> None:
    warnings.filterwarnings("ignore")
    real = zoo.minilm()
    graph = qgraph.capture(real.model, real.example_inputs, dynamic_shapes=real.dynamic_shapes)
    data = {name: array[:SENTENCES] for name, array in real.evaluation.items()}
    mask = data["attention_mask"].astype(bool)
    batches = list(real.calibration_batches(size=12))

    def output(module: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return module(*(torch.from_numpy(np.array(array)) for array in data.values())).numpy()

    reference = output(real.model)
    print(f"{'MiniLM':30} {'SQNR dB':>8} {'cosine':>8}")
    for title, recipe in VARIANTS.items():
        found = output(quantized(graph, recipe, batches))
        sqnr, cosine = measure.sqnr_db(reference[mask], found[mask]), measure.sentence_cosine(reference, found, mask)
        print(f"{title:30} {sqnr:8.1f} {cosine:8.4f}", flush=True)


if __name__ == "__main__":
    main()
