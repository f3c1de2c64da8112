"""Every kernel family on a CUDA device: numbers, streams, CUDA graphs, torch.compile. The same bodies run emulated, so that they are right
on the day they meet a GPU."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import qgraph
from qgraph.backends.cupy import Cupy
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.generation import CudaGenerator
from qgraph.backends.cupy.roofline import A100
from qgraph.errors import LoweringError
from tests.backends.cupy.cases import SMALL
from tests.backends.cupy.decoders import small
from tests.bench import cuda

GPU = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])
on_devices = pytest.mark.parametrize("device", ["cpu", GPU], indirect=True)
FEW = ["w8a8, dp4a", "w4, vector", "tensor", "cache of 8 bits"]
"""One, two and more kernels for a call; static and dynamic allocation."""


@pytest.fixture
def device(request):
    """A device on which kernels run."""
    with emulation() if request.param == "cpu" else nullcontext():
        yield torch.device(request.param)


@on_devices
@pytest.mark.parametrize("name", SMALL)
def test_equals_the_reference(name, device):
    case = SMALL[name](device)
    case.check(case.op(case.x))


@on_devices
@pytest.mark.parametrize("name", FEW)
def test_runs_on_the_current_stream(name, device):
    """x becomes right late, and on that stream only: a kernel anywhere else would read what was there before."""
    case = SMALL[name](device)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    right, x = case.another(), case.x.clone()
    if device.type == "cuda":
        case.op(x)  # compiled before it counts
        torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        if device.type == "cuda":
            torch.cuda._sleep(50_000_000)
        x.copy_(right)
        found = case.op(x)
    if stream is not None:
        stream.synchronize()
    case.check(found, right)


def recorded(run: Callable[[], Any], device: torch.device) -> tuple[list[torch.Tensor], Callable[[], object]]:
    """What `run` returns, and a function that computes it again in the same memory: a CUDA graph, or on the CPU what one would do."""
    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the first call compiles and loads, which no capture may do
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = pytree.tree_leaves(run())
        return found, graph.replay
    found = pytree.tree_leaves(run())
    return found, lambda: [f.copy_(again) for f, again in zip(found, pytree.tree_leaves(run()), strict=True)]


@on_devices
@pytest.mark.parametrize("name", SMALL if torch.cuda.is_available() else FEW)
def test_a_cuda_graph_replays_with_new_values(name, device):
    case = SMALL[name](device)
    x = case.x.clone()
    found, replay = recorded(lambda: case.op(x), device)
    for values in (case.x, case.another()):
        x.copy_(values)
        replay()
        case.check(found, values)


@on_devices
@pytest.mark.parametrize("name", SMALL if torch.cuda.is_available() else FEW)
def test_torch_compile_keeps_it_whole(name, device):
    case = SMALL[name](device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    torch.compiler.reset()
    compiled = torch.compile(lambda x: case.op(x), fullgraph=True, backend=backend)
    case.check(compiled(case.x))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(96), torch.nn.Linear(96, 160), torch.nn.Linear(160, 72)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(self.norm(x))))


@on_devices
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-token", "w4a16-g32"])
def test_a_program_gives_what_its_graph_gives(recipe, device):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 96)
    gm = qgraph.quantize(Net().eval(), [(x,)], example_inputs=(x,), recipe=recipe, backend="cupy")
    expected = gm(x).detach()
    program = qgraph.lower(gm, backend="cupy", strict=True)
    found = program(x)
    assert found.device.type == device.type
    assert (found.cpu() - expected).norm() <= 2e-3 * expected.norm()


@on_devices
def test_a_decoder_writes_the_text_of_its_graph_from_a_cache_in_integers(device):
    (decoder, gm), text = small(), [7, 8, 61]
    found = [int(token[0]) for token in CudaGenerator(qgraph.lower(gm, backend=Cupy(capacity=32), strict=True))([text], tokens=4)]
    for _ in range(4):
        with torch.no_grad():
            text.append(int(gm(*decoder.feed(torch.tensor([text])))["logits"][0, -1].argmax()))
    assert found == text[-4:]


def on_the_host(run):
    start = perf_counter()
    run()
    return perf_counter() - start


def test_the_benchmark_checks_and_times_every_family(monkeypatch):
    """The script for a GPU, on small shapes in the emulator."""
    monkeypatch.setitem(cuda.MODELS, "tiny", ((136, 320),))
    for name, value in {"WIDTH": 320, "CACHES": ((2, 150),), "HEADS": (4, 2, 64)}.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(cuda, "SMALL", {"rows": SMALL["rows"], "broken": lambda d: replace(SMALL["rows"](d), expected=lambda x: x)})
    bench = cuda.Bench(torch.device("cpu"), A100, on_the_host, perf_counter() + 600)
    with emulation():
        assert list(bench.check()) == ["broken"]
        found = list(bench.timings(["tiny"], [20]))
        assert list(cuda.Bench(bench.device, None, on_the_host, deadline=0.0).timings(["tiny"], [20])) == []
    assert [t.kernel for t in found] == [*cuda.LINEARS, *cuda.ROW_KERNELS, "append + attend, 8 bits", "append + attend, 4 bits"]
    assert all(t.seconds > 0 and t.bandwidth > 0 and 0 < t.fraction < 1 for t in found)
    lines = cuda.markdown(found).splitlines()
    assert len(lines) == 2 + len(found) and {line.count("|") for line in lines} == {len(cuda.HEADER) + 1}
    assert cuda.table(found).row_count == len(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu():
    with pytest.raises(LoweringError, match="timed on a CUDA device"):
        cuda.main([])
