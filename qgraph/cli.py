"""The command line: qgraph quantize | sensitivity | eval | inspect | passes | diff, on files.

Exit status 0, 1 for an error (one line on stderr, `--debug` for the traceback), 2 for wrong usage. torch is imported by the commands
that need it, so that help and usage errors come at once.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

import qgraph
from qgraph.errors import ModelError, QGraphError, RecipeError

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from qgraph.backend import Backend
    from qgraph.feeds import Input
    from qgraph.recipe import Recipe

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class _Failure(click.ClickException):
    """`error: text` on stderr, status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {' '.join(self.message.split())}", file=file, err=file is None)


class _Command(click.Command):
    """A command that reports QGraphError and OSError in one line, or as they are with --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params.pop("debug"):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except (QGraphError, OSError) as error:
            raise _Failure(str(error)) from error


class _Group(click.Group):
    command_class = _Command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qgraph.__version__)
def main() -> None:
    """Quantize ONNX and PyTorch models, and look at the result."""


@main.command()
@click.argument("source", metavar="IN.onnx|PACKAGE.MODULE:FUNCTION")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The ONNX file to write.")
@click.option("--recipe", default="w8a8", show_default=True, help="Name (w8a8, w8a8-dynamic, w8a8+smoothquant, ..., auto) or a YAML file.")
@click.option(
    "--calibration", type=click.Path(), help="One .npz with arrays named as the inputs, a folder of .npz files, or text (with --tokenizer)."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Samples per feed out of one .npz, or of text.")
@click.option("--tokenizer", type=click.Path(), help="For text: the model's tokenizer.json, or a folder with it.")
@click.option("--window", type=click.IntRange(min=2), help="For text: tokens of a sample.  [default: 256]")
@click.option("--samples", type=click.IntRange(min=1), help="For text: how many samples, spread over it.  [default: 48, or all]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe; may be repeated.")
@click.option("--backend", default="onnxruntime", show_default=True, help="What the model is quantized for.")
@click.option("--target", help="The CPU on which sums have to be exact: x86-vnni, x86-avx2 or arm64-dot.  [default: x86-vnni]")
@click.option("--strict", is_flag=True, help="Fail when a kernel that was promised did not come out.")
@click.option("--max-drop", type=float, help="With --recipe auto: how much the metric may fall.  [default: 0.01]")
@click.option("--metric", help="With --recipe auto: sqnr, agreement, or PACKAGE.MODULE:FUNCTION of (run, batches).  [default: sqnr]")
@click.option("--evaluation", type=click.Path(), help="With --recipe auto: data for the metric, in the form of --calibration.")
@click.option(
    "--resume", type=click.Path(path_type=Path), help="A folder that keeps finished layers (auto: a file of trials); run again to go on."
)
@click.option("--plan", "only_plan", is_flag=True, help="Write nothing: say what it will take, memory, temporary files, the output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quantize(
    source: str,
    output: Path,
    recipe: str,
    calibration: str | None,
    batch: int,
    tokenizer: str | None,
    window: int | None,
    samples: int | None,
    overrides: tuple[str, ...],
    backend: str,
    target: str | None,
    strict: bool,
    max_drop: float | None,
    metric: str | None,
    evaluation: str | None,
    resume: Path | None,
    only_plan: bool,
    as_json: bool,
) -> None:
    """Quantize a model and write it as ONNX.

    FUNCTION takes no arguments and returns (module, example_inputs), or (module, example_inputs, dynamic_shapes).
    A recipe names formats and, behind +, stages that raise accuracy: w8a8+smoothquant ("qgraph passes" lists them). With the recipe
    "auto", the fastest one within a budget is searched for."""
    _check_paths(source, output)
    _quiet()
    from qgraph.backend import get_backend
    from qgraph.recipe import load_recipe
    from qgraph.report import report, report_text

    runtime = get_backend(backend, target=target)
    budget = {"max_drop": max_drop, "metric": metric, "evaluation": evaluation}
    text = {"tokenizer": tokenizer, "length": window, "samples": samples}
    if only_plan:
        _plan(source, recipe, overrides, runtime, calibration, batch, text, as_json)
        return
    if recipe == "auto":
        if overrides:
            raise RecipeError("--set changes a recipe, and auto searches for one; leave it out")
        quantized = _auto(source, runtime, calibration, batch, text, resume=resume, **budget)
    elif given := [f"--{name.replace('_', '-')}" for name, value in budget.items() if value is not None]:
        raise RecipeError(f"{', '.join(given)}: for --recipe auto, not for {recipe}")
    else:
        wanted = load_recipe(recipe, overrides)
        model, example_inputs, dynamic_shapes = _load(source)
        prepared = qgraph.prepare(model, example_inputs, recipe=wanted, backend=runtime, dynamic_shapes=dynamic_shapes)
        _calibrate(prepared, wanted, calibration, batch, text, resume, runtime)
        quantized = qgraph.convert(prepared)
    program = qgraph.lower(quantized, backend=runtime, strict=strict)
    program.save(output)
    found = quantized.meta["qgraph"]
    made = report(source, output, found, program.kernels())
    trials = f"{found.tradeoff}\n\n" if found.tradeoff else ""
    click.echo(json.dumps(made) if as_json else trials + report_text(made))


def _plan(
    source: str,
    recipe: str,
    overrides: tuple[str, ...],
    runtime: Backend,
    calibration: str | None,
    batch: int,
    text: dict[str, Any],
    as_json: bool,
) -> None:
    from qgraph.recipe import load_recipe
    from qgraph.tokens import calibration_batches

    model, inputs = _captured(source)
    batches = None if calibration is None else calibration_batches(calibration, batch, inputs, **text)
    found = qgraph.plan(model, load_recipe(recipe, overrides), batches, backend=runtime)
    click.echo(json.dumps(found.as_json()) if as_json else str(found))


def _auto(source: str, runtime: Backend, calibration: str | None, batch: int, text: dict[str, Any], **budget: Any) -> GraphModule:
    """The graph that keeps the budget. On a terminal the trials are shown as they end."""
    from qgraph.auto import auto
    from qgraph.tokens import calibration_batches

    if calibration is None:
        raise RecipeError("recipe auto looks at data: give --calibration")
    model, inputs = _captured(source)
    data = calibration_batches(calibration, batch, inputs, **text)
    held_out = budget.pop("evaluation")
    metric = budget.pop("metric") or "sqnr"
    return auto(
        model,
        data,
        backend=runtime,
        metric=_imported(metric) if _FUNCTION.fullmatch(metric) else metric,
        evaluation=None if held_out is None else calibration_batches(held_out, batch, inputs, **text),
        **budget,
    )


def _captured(source: str) -> tuple[Any, tuple[Input, ...]]:
    """A graph of the model, and its inputs."""
    from qgraph.api import as_graph
    from qgraph.feeds import inputs_of

    model, example_inputs, dynamic_shapes = _load(source)
    gm = as_graph(model, example_inputs, dynamic_shapes=dynamic_shapes)
    return gm, inputs_of(gm)


@main.command()
@click.argument("source", metavar="IN.onnx|PACKAGE.MODULE:FUNCTION")
@click.option(
    "--calibration", required=True, type=click.Path(), help="One .npz with arrays named as the inputs, or a folder of .npz files."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Samples per feed out of one .npz.")
@click.option("--recipe", default="w8a8", show_default=True, help="Name or YAML file of the formats to look at.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe; may be repeated.")
@click.option("--backend", default="onnxruntime", show_default=True, help="What the model is quantized for.")
@click.option("--effect", type=click.Choice(["alone", "others"]), help="Also the effect on the model's outputs: slow.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def sensitivity(
    source: str, calibration: str, batch: int, recipe: str, overrides: tuple[str, ...], backend: str, effect: Any, as_json: bool
) -> None:
    """What each operation loses when it alone is quantized, the most sensitive first."""
    _quiet()
    from qgraph.recipe import load_recipe

    model, inputs = _captured(source)
    wanted, data = load_recipe(recipe, overrides), qgraph.load_batches(calibration, batch, [i.name for i in inputs])
    found = qgraph.sensitivity(model, data, recipe=wanted, backend=backend, effect=effect)
    click.echo(json.dumps(found.as_json()) if as_json else str(found))


def _quiet() -> None:
    """What torch says to its own developers while it exports is no business of a shell user."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


def _check_paths(source: str, output: Path) -> None:
    """Before anything takes time: can the output be written, and is it not the input?"""
    if output.is_dir():
        raise ModelError(f"output {output} is a directory; give a file name such as {output / 'model.onnx'}")
    if not output.absolute().parent.is_dir():
        raise ModelError(f"output folder {output.absolute().parent} does not exist")
    if os.path.exists(source) and output.exists() and os.path.samefile(source, output):
        raise ModelError(f"output {output} is the input; write to another file")


def _load(source: str) -> tuple[Any, tuple[Any, ...] | None, Any]:
    """(model, example inputs, dynamic shapes) of an ONNX file or of what PACKAGE.MODULE:FUNCTION returns."""
    if os.path.exists(source) or not _FUNCTION.fullmatch(source):
        from qgraph.onnx_io import from_onnx

        return from_onnx(source), None, None
    made = _imported(source)()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[1], tuple | list):
        raise ModelError(f"{source} must return (module, example_inputs) or (module, example_inputs, dynamic_shapes)")
    return made[0], tuple(made[1]), made[2] if len(made) == 3 else None


def _imported(source: str) -> Any:
    """The function that PACKAGE.MODULE:FUNCTION names."""
    module_name, _, function_name = source.partition(":")
    if os.getcwd() not in sys.path:  # the console script does not put it there, python -m does
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"cannot load {source}: {error}") from error


def _calibrate(
    prepared: Any, recipe: Recipe, path: str | None, batch: int, text: dict[str, Any], resume: Path | None, backend: Backend
) -> None:
    if recipe.needs_data and path is None:
        raise RecipeError(f"recipe {recipe.name} looks at data: give --calibration, or use a recipe without it, such as w8a8-dynamic")
    from qgraph.feeds import inputs_of
    from qgraph.tokens import calibration_batches

    batches = None if path is None else calibration_batches(path, batch, inputs_of(prepared), **text)
    if resume is not None:
        from qgraph.resume import open_run

        open_run(resume, prepared, batches, backend.name)
    qgraph.calibrate(prepared, batches)


@main.command("eval")
@click.argument("model", metavar="MODEL.onnx", type=click.Path())
@click.option("--perplexity", "text", required=True, type=click.Path(), help="Text, or an .npz of token ids.")
@click.option("--tokenizer", type=click.Path(), help="The model's tokenizer.json, or a folder with it.")
@click.option("--window", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens that are seen at once.")
@click.option("--samples", type=click.IntRange(min=1), help="How many windows, spread over the text.  [default: all]")
@click.option("--beside", type=click.Path(), metavar="FLOAT.onnx", help="A model to compare with on the same windows.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(model: str, text: str, tokenizer: str | None, window: int, samples: int | None, beside: str | None, as_json: bool) -> None:
    """How well a language model predicts a text: exp of the mean loss of a token, lower is better."""
    from qgraph.perplexity import perplexity
    from qgraph.tokens import load_windows, spread

    windows = spread(load_windows(text, tokenizer, length=window), samples)
    found = {path: perplexity(path, windows, label=Path(path).name) for path in (model, beside) if path is not None}
    ratio = None if beside is None else float(found[model]) / float(found[beside])
    if as_json:
        made = {"perplexity": float(found[model]), "tokens": found[model].tokens, "windows": found[model].windows}
        click.echo(json.dumps(made if beside is None else made | {"beside": float(found[beside]), "ratio": ratio}))
        return
    for path, result in found.items():
        click.echo(f"{path}: {result}")
    if ratio is not None:
        click.echo(f"ratio {ratio:.4f}")


@main.command()
@click.argument("file", metavar="FILE.onnx")
@click.option("--backend", type=click.Choice(["onnxruntime", "cupy"]), default="onnxruntime", show_default=True, help="What would run it.")
@click.option("--recipe", help="With --backend cupy: quantize it first, by a recipe that needs no data.")
@click.option(
    "--dim", "dims", multiple=True, metavar="NAME=N", help="With --backend cupy: the size of an axis; may be repeated.  [default: 1]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(file: str, backend: str, recipe: str | None, dims: tuple[str, ...], as_json: bool) -> None:
    """Nodes by kind, weights by type, the quantized share, and what ONNX Runtime runs.

    With --backend cupy: the CUDA kernel of each layer, what it has to do, and the least time that takes on some GPUs."""
    if backend == "cupy":
        from qgraph.backends.cupy.layers import inspect as inspect_kernels

        kernels = inspect_kernels(file, recipe=recipe, dims=_sizes(dims))
        click.echo(json.dumps(kernels.as_json()) if as_json else kernels.text())
        return
    if recipe is not None or dims:
        raise click.UsageError("--recipe and --dim are for --backend cupy")
    from qgraph import inspect as inspection

    found = inspection.inspect(file)
    click.echo(json.dumps(found.as_json()) if as_json else inspection.text(found))


def _sizes(dims: tuple[str, ...]) -> dict[str, int]:
    """NAME=N, ... as numbers by name."""
    pairs = [d.partition("=") for d in dims]
    if wrong := [d for d, (name, _, n) in zip(dims, pairs, strict=True) if not name or not n.isdigit()]:
        raise click.BadParameter(f"{wrong[0]}: give a name and a number, as in batch=8", param_hint="--dim")
    return {name: int(n) for name, _, n in pairs}


@main.command()
def passes() -> None:
    """The catalogue of passes: name, contract, its stage in a recipe (w8a8+STAGE), what it does."""
    import qgraph.passes as available
    from qgraph.pipeline import Pass
    from qgraph.stages import STAGES

    stages = {factory.partition(":")[2]: f"+{stage}" for stage, factory in STAGES.items() if isinstance(factory, str)}
    found = [p for name in available.__all__ if isinstance(p := getattr(available, name), type) and issubclass(p, Pass)]
    rows = [
        (p.name, str(p.contract), stages.get(p.__name__, ""), (sys.modules[p.__module__].__doc__ or p.name).splitlines()[0]) for p in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for *cells, does in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), does]))


@main.command()
@click.argument("before", metavar="A.onnx")
@click.argument("after", metavar="B.onnx")
def diff(before: str, after: str) -> None:
    """Text diff of the printed forms of two models."""
    from qgraph.onnx_io import from_onnx
    from qgraph.text import diff as text_diff

    if found := text_diff(from_onnx(before), from_onnx(after)):
        click.echo(found)
