"""The main job on real models: MiniLM and EfficientNet-Lite0 from PyTorch, PP-OCRv4 recognition from ONNX, each to INT8 ONNX.

`make demo`, or `python -m examples.demo [FOLDER]` in the checkout. Writes FOLDER/*.int8.onnx (default demo-output) and prints one
table: file size, SQNR of the output, task metric, latency as a share of the float model's, kernels fused of those promised.
"""

import logging
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

import qgraph
from tests.models import measure, zoo

MODELS = (zoo.minilm, zoo.effnet, zoo.pprec)
COLUMNS = ("model", "recipe", "size MB", "SQNR dB", "task metric", "latency / float", "kernels fused", "seconds")


def quantize(real: zoo.RealModel, path: Path) -> str:
    """Write the INT8 model; returns kernels "fused / promised"."""
    prepared = qgraph.prepare(real.model, real.example_inputs, recipe=real.recipe, dynamic_shapes=real.dynamic_shapes)
    qgraph.calibrate(prepared, real.calibration_batches())
    program = qgraph.lower(qgraph.convert(prepared))
    program.save(path)
    kernels = program.kernels()
    return f"{sum(k.fused for k in kernels)} / {len(kernels)}"


def row(real: zoo.RealModel, path: Path) -> tuple[str, ...]:
    start = perf_counter()
    kernels = quantize(real, path)
    seconds = perf_counter() - start
    sqnr, metric = real.score(path)
    ratios = {label: measure.latency_ratio(real.float_onnx, path, shape) for label, shape in real.latency_shapes.items()}
    return (
        real.title,
        f"{real.recipe.name}, {real.recipe.observer}" if real.recipe.static else real.recipe.name,
        f"{measure.file_bytes(real.float_onnx) / 1e6:.1f} -> {measure.file_bytes(path) / 1e6:.1f}",
        f"{sqnr:.1f}",
        f"{metric.name} {metric.float_value:.3f} -> {metric.value:.3f}",
        ", ".join(f"{ratio:.2f} ({label})" for label, ratio in ratios.items()),
        kernels,
        f"{seconds:.0f}",
    )


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {measure.THREADS} threads, onnxruntime {version('onnxruntime')}, torch {version('torch')}"


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    table = Table(*COLUMNS, title="float -> INT8", caption=machine())
    for load in MODELS:
        real = load()
        console.print(f"{real.title}: quantizing, scoring and timing ...")
        table.add_row(*row(real, folder / f"{real.name}.int8.onnx"))
    console.print(table)
    console.print(f"files: {', '.join(str(p) for p in sorted(folder.glob('*.onnx')))}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
