"""The compile check: what it reads from cubins, and that it finds what is wrong. Compiling needs CuPy and cuobjdump, but no device."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from qgraph.backends.cupy import check as checking
from qgraph.backends.cupy import resources
from qgraph.backends.cupy.check import ARCHS, check, configuration, kernels, main, shape
from qgraph.backends.cupy.launch import Kernel
from qgraph.backends.cupy.resources import cuobjdump, usages
from qgraph.backends.cupy.toolchain import HERE
from qgraph.errors import LoweringError

README = Path(__file__).parents[3] / "backends" / "README.md"


def missing() -> str:
    """What the compile check lacks here, if anything."""
    try:
        cuobjdump()
    except LoweringError as e:
        return str(e)
    return "" if find_spec("cupy") else "CuPy is not installed"


compiles = pytest.mark.skipif(bool(missing()), reason=missing())

SOURCE = """
#include "qg.cuh"
QG_KERNEL __launch_bounds__(THREADS) clean(const float *x, float *y) {
  QG_DYNAMIC_SHARED(tile);
  __shared__ float s[64];
  s[threadIdx.x % 64] = x[threadIdx.x];
  qg::copy16_async(tile + 16 * threadIdx.x, x);
  qg::copy_commit();
  qg::copy_wait<0>();
  __syncthreads();
  qg::store16(y + 4 * threadIdx.x, qg::load16(tile + 16 * (threadIdx.x ^ 1)));
  y[0] += s[0];
}
QG_KERNEL __launch_bounds__(THREADS) spilling(const float *x, float *y, int n) {
  float kept[300];
  for (int i = 0; i < 300; i++) kept[i] = x[i * threadIdx.x];
  y[threadIdx.x] = kept[n];
}
QG_KERNEL unbounded(float *y) { y[threadIdx.x] = 1; }
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.cu").write_text(SOURCE)
    return lambda name, **fields: Kernel("toy.cu", name, (("THREADS", "128"),), folder=tmp_path, **fields)


@compiles
def test_a_sound_kernel_has_no_problems_and_its_use_is_known(toy):
    found = check([toy("clean", shared=2048, expects=("LDGSTS.128", "STG.E.128", "LDS.128"))])
    assert [c.arch for c in found] == [80, 90, 120]
    for c in found:
        assert c.problems == ()
        assert (c.usage.threads, c.usage.stack, c.usage.local) == (128, 0, 0)
        assert 8 <= c.usage.registers <= 64
        assert c.usage.shared % 256 == 0 and 256 <= c.usage.shared <= 1024, "64 floats, at the alignment of the dynamic part"
    assert [c.blocks for c in found] == [16, 16, 12], "what 2048 and 1536 threads hold"


@compiles
def test_what_is_wrong_is_said(toy):
    problems = [
        c.problems for c in check([toy("spilling"), toy("unbounded"), toy("clean", shared=120 << 10), toy("clean", expects=("IMMA",))])
    ]
    assert all("1200 bytes of each thread are in memory" in p[0] for p in problems[:3])
    assert all(p == ("no __launch_bounds__, so that its registers may not fit the block",) for p in problems[3:6])
    assert problems[6] == problems[7] == ()
    assert re.fullmatch(r"a block of 128 threads with \d+ bytes of shared memory does not fit an SM", problems[8][0])
    assert all(p == ("its machine code has no IMMA",) for p in problems[9:])


@compiles
def test_the_exit_status_tells(toy, monkeypatch, capsys):
    monkeypatch.setattr(checking, "kernels", lambda families: (toy("clean"),))
    assert main(["--arch", "80"]) == 0
    assert "clean" in capsys.readouterr().out
    monkeypatch.setattr(checking, "kernels", lambda families: (toy("clean"), toy("clean", expects=("HMMA",))))
    assert main(["--arch", "80", "--markdown"]) == 1
    out = capsys.readouterr().out
    assert "| `clean` | `THREADS=128` | 128 |" in out
    assert "clean THREADS=128 sm_80: its machine code has no HMMA" in out


@compiles
def test_a_kernel_that_is_not_in_its_file_is_an_error(toy):
    with pytest.raises(LoweringError, match=r"toy.cu has no kernel claen; did you mean 'clean'\?"):
        check([toy("claen")], (80,))


def test_unknown_words_are_errors(capsys):
    assert main(["--arch", "42"]) == 1
    assert "sm_42 is none of the architectures" in capsys.readouterr().out
    assert main(["--family", "quantising"]) == 1
    assert "there is no kernel family quantising; did you mean 'quantizing'" in capsys.readouterr().out


def test_a_missing_cuobjdump_is_named(monkeypatch, tmp_path):
    cuobjdump.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(resources, "_wheel_folders", tuple)
    with pytest.raises(LoweringError, match="pip install nvidia-cuda-cuobjdump"):
        cuobjdump()
    cuobjdump.cache_clear()


@compiles
def test_a_file_that_is_no_cubin_is_an_error(tmp_path):
    (tmp_path / "x.cubin").write_bytes(b"no ELF")
    with pytest.raises(LoweringError, match=r"cuobjdump .*x\.cubin|x\.cubin: cuobjdump"):
        usages(tmp_path / "x.cubin", 80)


@pytest.mark.parametrize(
    "instruction, opcode, found",
    [
        ("LDG.128", "LDG.E.128.CONSTANT", True),
        ("LDG.E.128", "LDG.E.64", False),
        ("LDG", "LDGSTS.E.BYPASS.128", False),
        ("IMMA", "IMMA.16832.S8.S8", True),
    ],
)
def test_an_instruction_is_found_by_its_words(instruction, opcode, found):
    usage = resources.Usage(0, 0, 0, 0, 32, resources.Counter([opcode]))
    assert usage.has(instruction) is found


def test_every_kernel_file_belongs_to_a_family():
    assert {k.file for k in kernels()} == {p.name for p in HERE.glob("*.cu")}


def test_every_kernel_says_which_instructions_it_is_about():
    assert [f"{k.name} {configuration(k)}" for k in kernels() if not k.expects] == []


@compiles
@pytest.mark.slow
def test_no_kernel_spills_and_each_holds_its_instructions():
    """Those of half, and those without a float type, each for one architecture in turn; the command takes all of them."""
    found = [k for k in kernels() if not {"float", "__nv_bfloat16"} & {v for name, v in k.defines if name in ("REAL", "OUT")}]
    assert len(found) > 60
    problems = [
        f"{c.kernel.name} {configuration(c.kernel)} sm_{c.arch}: {p}"
        for i, arch in enumerate(ARCHS)
        for c in check(found[i :: len(ARCHS)], (arch,))
        for p in c.problems
    ]
    assert problems == []


def test_the_readme_lists_every_kernel():
    """`python -m qgraph.backends.cupy.check --markdown` prints the table."""
    listed = set(re.findall(r"^\| `(\w+)` \| `?([^`|]*)`? \|", README.read_text(), re.MULTILINE))
    assert {(k.name, shape(k)) for k in kernels()} <= listed
