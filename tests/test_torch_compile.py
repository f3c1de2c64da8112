"""torch.compile with a quantized program: frozen parameters, changing sizes, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

import qgraph
from qgraph.recipe import Int, Recipe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 5)
        self.register_buffer("shift", torch.linspace(-1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x + self.shift))) * x.shape[0]


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a16", "w4a16-g16"])
@pytest.mark.parametrize("backend", ["onnxruntime", "reference"])
def test_the_compiled_model_is_the_quantized_one(recipe: str, backend: str) -> None:
    net, x = Net().eval(), torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(net, backend=qgraph.torch_backend(recipe, backend=backend), dynamic=False)
    with torch.no_grad():
        assert 1e-6 < error(compiled(x), net(x)) < (0.2 if "w4" in recipe else 0.03)


def test_sizes_may_change_from_call_to_call() -> None:
    net = Net().eval()
    compiled = torch.compile(net, backend=qgraph.torch_backend("w8a16"))
    with torch.no_grad():
        for rows in (4, 7, 9):
            x = torch.randn(rows, 16)
            assert error(compiled(x), net(x)) < 0.03


def test_a_graph_without_weights_runs_as_it_is() -> None:
    compiled = torch.compile(lambda x: torch.relu(x) + 1, backend=qgraph.torch_backend("w8a16"))
    x = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(compiled(x), torch.relu(x) + 1)


def test_static_recipes_are_refused_for_lack_of_data() -> None:
    with pytest.raises(qgraph.RecipeError, match="needs calibration data, which torch.compile has not"):
        qgraph.torch_backend("w8a8")
    with pytest.raises(qgraph.RecipeError):
        qgraph.torch_backend(Recipe(weights=Int(8), rules={"head": {"activations": Int(8, per="tensor", unsigned=True)}}))
