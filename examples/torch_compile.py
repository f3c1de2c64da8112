"""torch.compile with qgraph as its backend: a transformer layer runs with INT8 weights and run-time INT8 activations."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import qgraph


class Layer(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer()).eval()
    x = torch.randn(2, 20, 64)
    with torch.no_grad():
        expected = model(x)
        for recipe in ("w8a8-dynamic", "w8a16"):
            torch.compiler.reset()
            compiled = torch.compile(model, backend=qgraph.torch_backend(recipe))
            error = (compiled(x) - expected).norm() / expected.norm()
            print(f"{recipe:14} relative error {error:.4f}")


if __name__ == "__main__":
    main()
