"""A PyTorch model to static INT8 ONNX: a small residual network, calibrated, converted, checked, written and timed against itself."""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import qgraph


class Block(nn.Module):
    """Depthwise separable convolution with a residual."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.pointwise(torch.relu(self.norm1(self.depthwise(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU6())
        self.blocks = nn.Sequential(Block(24), Block(24))
        self.head = nn.Linear(24, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


def images(count: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures of stripes, and which of four directions they run in."""
    label = torch.randint(4, (count,))
    angle = (label * torch.pi / 4 + torch.randn(count) * 0.1)[:, None, None]
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    stripes = torch.sin(0.7 * (x * torch.cos(angle) + y * torch.sin(angle)))
    return stripes[:, None] * torch.rand(count, 3, 1, 1) + torch.randn(count, 3, 32, 32) * 0.3, label


def trained() -> nn.Module:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        image, label = images(32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(image), label).backward()
        optimizer.step()
    return net.eval()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    net, (image, label) = trained(), images(400)
    batch = torch.export.Dim("batch", min=1, max=512)
    prepared = qgraph.prepare(net, (image[:2],), recipe="w8a8", dynamic_shapes={"image": {0: batch}})
    qgraph.calibrate(prepared, (images(16)[0] for _ in range(8)))
    quantized = qgraph.convert(prepared)  # a GraphModule: integer weights, callable in torch
    program = qgraph.lower(quantized)
    program.save(folder / "stripes.int8.onnx")

    with torch.no_grad():
        scores = {"float": net(image), "reference": quantized(image), "onnxruntime": program(image)}
    for name, output in scores.items():
        print(f"{name:12} accuracy {(torch.as_tensor(output).argmax(1) == label).float().mean():.3f}")
    print(*(f"{k.node}: {k.became}" for k in program.kernels()), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
