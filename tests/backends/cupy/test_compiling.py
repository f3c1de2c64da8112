"""The cache of compiled kernels, and what is said where something to compile with is missing."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from qgraph.backends.cupy import compiling, toolchain
from qgraph.backends.cupy.compiling import cubin, nvrtc
from qgraph.backends.cupy.emulate import build
from qgraph.backends.cupy.launch import Kernel
from qgraph.backends.cupy.toolchain import cuda_include, elf_size, keep, whole
from qgraph.errors import LoweringError

SOURCE = """
#include "qg.cuh"
QG_KERNEL __launch_bounds__(32) fill(float *y, float value) { y[threadIdx.x] = value + ADDED; }
"""
DEFINES = (("ADDED", "1"),)

needs_cupy = pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one kernel, and an empty cache."""
    monkeypatch.setenv("QGRAPH_CUDA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toy.cu").write_text(SOURCE)
    return tmp_path


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_nothing_needs_cupy_until_a_kernel_is_compiled():
    done = run("""
import sys
sys.modules["cupy"] = None
import qgraph, qgraph.backends.cupy, qgraph.backends.cupy.check, qgraph.backends.cupy.autotune
from qgraph.backends.cupy.compiling import cubin
try:
    cubin("qg.cuh", (), 80)
except qgraph.errors.LoweringError as e:
    print(e)
""")
    assert done.stdout.startswith("the cupy backend compiles its kernels with CuPy's NVRTC (ModuleNotFoundError: ")
    assert "pip install 'qgraph[cuda]'" in done.stdout and "QGRAPH_CUDA=emulate" in done.stdout


def test_a_cupy_that_cannot_load_nvrtc_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(LoweringError, match="ModuleNotFoundError|ImportError"):
        nvrtc()


def test_a_device_older_than_the_kernels_is_refused(folder):
    with pytest.raises(LoweringError, match="toy.cu: sm_70 is too old for the kernels; they need sm_75 or newer"):
        cubin("toy.cu", DEFINES, 70, folder)


@needs_cupy
def test_what_nvrtc_cannot_compile_is_an_error_with_its_words(folder):
    with pytest.raises(LoweringError, match=r'NVRTC cannot compile toy.cu:\n.*identifier "ADDED" is undefined'):
        cubin("toy.cu", (), 80, folder)
    assert not list((folder / "cache" / "cubin").iterdir())


@needs_cupy
def test_a_compiled_file_has_every_byte_that_its_header_promises(folder):
    content = cubin("toy.cu", DEFINES, 80, folder).read_bytes()
    assert len(content) == elf_size(content)


@needs_cupy
def test_a_kernel_is_compiled_once_for_each_source_definition_and_architecture(folder, monkeypatch):
    compiled = []
    compile_ = compiling._compile
    monkeypatch.setattr(compiling, "_compile", lambda *a: compiled.append(a) or compile_(*a))
    first = cubin("toy.cu", DEFINES, 80, folder)
    assert cubin("toy.cu", DEFINES, 80, folder) == first and len(compiled) == 1
    others = {cubin("toy.cu", DEFINES, 90, folder), cubin("toy.cu", (("ADDED", "2"),), 80, folder)}
    (folder / "toy.cu").write_text(SOURCE.replace("value +", "value -"))
    others.add(cubin("toy.cu", DEFINES, 80, folder))
    assert len(others | {first}) == len(compiled) == 4


@needs_cupy
@pytest.mark.parametrize("left", [0, 3, 100, 2000])
def test_a_cubin_that_was_cut_off_is_compiled_again(folder, left):
    path = cubin("toy.cu", DEFINES, 80, folder)
    content = path.read_bytes()
    path.write_bytes(content[:left])
    assert cubin("toy.cu", DEFINES, 80, folder).read_bytes() == content


def test_an_emulated_build_that_was_cut_off_is_built_again(folder):
    made = build.__wrapped__("toy.cu", DEFINES, False, folder)
    (path,) = (folder / "cache" / "emulated").glob("*.so")
    assert made.library._name == str(path)
    # In the place of a file that is loaded, never into it: that one is mapped into this process.
    keep(path, path.read_bytes()[:1000])
    assert not whole(path)
    build.__wrapped__("toy.cu", DEFINES, False, folder)
    assert whole(path)


@needs_cupy
def test_processes_that_compile_the_same_kernel_do_not_disturb_each_other(folder):
    program = f"""
import time
from pathlib import Path
from qgraph.backends.cupy.compiling import _version, cubin
from qgraph.backends.cupy.toolchain import whole
_version()
folder = Path({str(folder)!r})
(folder / f"ready-{{time.monotonic_ns()}}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.001)
print(all(whole(cubin("toy.cu", (("ADDED", str(i)),), 80, folder)) for i in range(8)))
"""
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in both] == ["True", "True"]
    names = [p.name for p in (folder / "cache" / "cubin").iterdir()]
    assert len(names) == 8 and all(name.endswith(".cubin") for name in names)


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "_candidates", lambda: [tmp_path])
    with pytest.raises(LoweringError, match="no CUDA headers .* install the wheels nvidia-cuda-runtime"):
        cuda_include.__wrapped__()


def test_tensors_on_the_cpu_are_no_place_for_a_kernel(folder, monkeypatch):
    monkeypatch.delenv("QGRAPH_CUDA", raising=False)
    fill = Kernel("toy.cu", "fill", DEFINES, folder=folder)
    y = torch.zeros(32)
    with pytest.raises(LoweringError, match="kernel fill has its tensors on cpu: move .* or set QGRAPH_CUDA=emulate"):
        fill((1,), 32, y, 1.5)
    monkeypatch.setenv("QGRAPH_CUDA", "emulat")
    with pytest.raises(LoweringError, match="QGRAPH_CUDA=emulat: 'emulate' is what it can be"):
        fill((1,), 32, y, 1.5)
    monkeypatch.setenv("QGRAPH_CUDA", "emulate")
    fill((1,), 32, y, 1.5)
    assert y.tolist() == [2.5] * 32
