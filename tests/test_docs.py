"""The Python blocks of every README run, one after the other in one namespace; the shell blocks of the top README do too."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qgraph import passes
from qgraph.backends.cupy import legalize as cuda_legalize
from qgraph.backends.onnxruntime import legalize
from qgraph.cli import main
from tests import small

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "passes" / "README.md", ROOT / "backends" / "README.md", ROOT / "tests" / "README.md"]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, code) of each fenced block of the language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start(1)].count("\n") + 1, m[1]) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.save_mlp(tmp_path / "model.onnx")
    space = {"__name__": "__page__"}
    for line, code in blocks(page, "python"):
        # Padded, so that a traceback shows the page's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), space)  # noqa: S102


def test_the_command_lines_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.save_mlp(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=small.samples())
    commands = [line for _, code in blocks(ROOT / "README.md", "sh") for line in code.splitlines() if line.startswith("qgraph ")]
    assert len(commands) >= 4
    for command in commands:
        result = CliRunner().invoke(main, shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}{result.exception!r}"


def test_the_readme_names_every_recipe_and_command():
    text = (ROOT / "README.md").read_text()
    from qgraph.recipe import NAMES

    assert [word for word in (*NAMES, *(f"qgraph {c}" for c in main.commands), "make demo", "make test") if word not in text] == []


def named(page: Path, section: str = "") -> list[str]:
    """What the first column of the page's tables (or of those in one section) names in code, in order."""
    text = page.read_text().partition(f"## {section}")[2].partition("\n## ")[0] if section else page.read_text()
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_the_table_of_passes_has_them_all():
    found = {name for name in passes.__all__ if isinstance(getattr(passes, name), type)}
    assert sorted(named(ROOT / "passes" / "README.md")) == sorted(found)


@pytest.mark.parametrize(
    ("section", "module", "passes"),
    [
        ("How `onnxruntime` lowers", legalize, legalize.LEGALIZE),
        ("Raw CUDA kernels: `cupy`", cuda_legalize, cuda_legalize.lowering_passes()),
    ],
)
def test_the_passes_of_a_backend_are_listed_in_their_order(section, module, passes):
    names = [p.name for p in passes]
    assert [n for n in named(ROOT / "backends" / "README.md", section) if n in names] == names
    assert re.findall(r"\w+", module.__doc__.split("\n\n")[1].replace("->", "")) == names
