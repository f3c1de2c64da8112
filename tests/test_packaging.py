"""The wheel holds every package, and works where the source tree is not."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from sysconfig import get_path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())

PROGRAM = """
import sys
import onnxruntime, qgraph, torch

assert qgraph.__file__.startswith(sys.argv[1]), qgraph.__file__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 5)).eval()
batches = [(torch.randn(4, 16),) for _ in range(4)]
qgraph.quantize(model, batches, example_inputs=batches[0], recipe="w8a8", output="small.onnx")
x = batches[1][0]
session = onnxruntime.InferenceSession("small.onnx")
out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
error = (out - model(x)).norm() / model(x).norm()
assert 0 < error < 0.05, error
"""


def declared_folders() -> set[Path]:
    mapping = {name: ROOT / folder for name, folder in CONFIG["tool"]["setuptools"]["package-dir"].items()}
    folders = set()
    for package in CONFIG["tool"]["setuptools"]["packages"]:
        owner = max((name for name in mapping if package == name or package.startswith(name + ".")), key=len)
        folders.add(mapping[owner].joinpath(*package.removeprefix(owner).strip(".").split(".")))
    return folders


def test_every_package_folder_is_declared_for_the_wheel():
    found = {init.parent for top in ("qgraph", "passes", "backends") for init in (ROOT / top).rglob("__init__.py")}
    linked = {
        folder
        for folder in found
        if folder.is_relative_to(ROOT / "qgraph" / "passes") or folder.is_relative_to(ROOT / "qgraph" / "backends")
    }
    assert found - linked == declared_folders()


def test_every_module_lies_in_a_declared_package():
    modules = {module.parent for top in ("passes", "backends") for module in (ROOT / top).rglob("*.py")}
    assert modules <= declared_folders()


def pip(*args: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A new environment in another directory, with the wheel installed; what qgraph needs comes from this environment."""
    folder = tmp_path_factory.mktemp("elsewhere")
    # From a copy: building in the checkout would leave build/ and *.egg-info behind.
    for name in ("qgraph", "passes", "backends"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    site = Path(get_path("purelib", vars={"base": str(folder / "env")}))
    pip("install", "--no-deps", "--target", site, wheel)
    # Appended after the environment's own folder, and without its .pth files: an editable qgraph there stays unseen.
    (site / "dependencies.pth").write_text(get_path("purelib") + "\n" + get_path("platlib") + "\n")
    return folder


def run_elsewhere(elsewhere: Path, *args: str) -> subprocess.CompletedProcess[str]:
    python = elsewhere / "env" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(python), "-P", *args]
    return subprocess.run(command, check=False, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)


def test_the_installed_wheel_quantizes_a_small_model(elsewhere):
    result = run_elsewhere(elsewhere, "-c", PROGRAM, str(elsewhere / "env"))
    assert result.returncode == 0, result.stderr
    assert (elsewhere / "small.onnx").stat().st_size > 0


def test_the_installed_wheel_has_the_command(elsewhere):
    result = run_elsewhere(elsewhere, "-m", "qgraph", "--help")
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("quantize", "inspect", "passes", "diff"))


def test_the_wheel_carries_licence_and_type_marker(elsewhere):
    result = run_elsewhere(elsewhere, "-c", "import importlib.metadata as m; print(*m.files('qgraph'), sep='\\n')")
    files = result.stdout.split()
    assert any(f.endswith("licenses/LICENSE") for f in files), result.stderr
    assert "qgraph/py.typed" in files and "qgraph/passes/__init__.py" in files and "qgraph/backends/onnxruntime/__init__.py" in files
    assert len(files) == len(set(files))
