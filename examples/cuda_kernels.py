"""A transformer block on raw CUDA kernels: on a GPU if there is one, else the same kernels emulated on the CPU.

python examples/cuda_kernels.py
"""

import os

import torch
from torch import Tensor, nn

import qgraph
from qgraph.backends.cupy import Cupy

if not torch.cuda.is_available():
    os.environ["QGRAPH_CUDA"] = "emulate"


class Block(nn.Module):
    """The feed-forward part: residual sum, norm, gated activation."""

    def __init__(self, width: int = 128, inner: int = 320) -> None:
        super().__init__()
        self.attended, self.norm = nn.Linear(width, width), nn.RMSNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attended(x)
        n = self.norm(h)
        return h + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


def show(title: str, quantized: torch.fx.GraphModule, backend: Cupy, x: Tensor) -> None:
    program = qgraph.lower(quantized, backend=backend, strict=True)
    expected, found = quantized(x), program(x).cpu()
    print(f"{title}: {', '.join(k.became for k in program.kernels())}")
    print(f"    distance to the reference program {(found - expected).norm() / expected.norm():.1e} of its output")


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(2, 5, 128)
    print(f"device: {Cupy().target_device()}{', kernels emulated' if 'QGRAPH_CUDA' in os.environ else ''}")
    for recipe in ("w8a8-token", "w4a16-g32"):
        quantized = qgraph.quantize(module, example_inputs=(x,), recipe=recipe, backend="cupy")
        show(recipe, quantized, Cupy(), x)
    show("w4a16-g32 for large batches", quantized, Cupy(rows=64), x)


if __name__ == "__main__":
    main()
