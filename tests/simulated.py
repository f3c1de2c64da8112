"""Graphs with fake quantization, as stages at "quantized" find them."""

import torch
from torch import nn

import qgraph
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.pipeline import Context
from tests.everywhere import EVERYWHERE


def simulated(model, batches, recipe="w8a8"):
    """The prepared and calibrated graph of a torch module (batch size 1 to 4096) or an ONNX model, its observers replaced."""
    shapes = None
    example = None
    if isinstance(model, nn.Module):
        model, example = model.eval(), (torch.cat([batches[0][0]] * 2),)
        shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    graph = qgraph.prepare(model, example, recipe=recipe, backend=EVERYWHERE, dynamic_shapes=shapes)
    qgraph.calibrate(graph, batches)
    InsertFakeQuant.of(graph).run(graph, Context())
    return graph


class ConvNet(nn.Module):
    """Every kind of convolution that mobile networks have; weights of very different sizes, so that 8 bits are felt."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6()),
            *(nn.Conv2d(8, 12, 1, bias=False), nn.ReLU(), nn.Conv2d(12, 6, 3, padding=2, dilation=2, groups=2), nn.ReLU()),
        )
        self.head = nn.Linear(6, 5)
        for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            layer.weight.data *= torch.exp(torch.randn(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.data.normal_(0.2, 0.3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def images(count, seed=1):
    """Batches of one smooth image with an offset, as photographs are."""
    x = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) + 0.3
    return [(image[None],) for image in nn.functional.interpolate(x, scale_factor=5, mode="bilinear")]
